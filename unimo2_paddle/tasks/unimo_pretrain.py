"""UNIMO's pre-training over image-caption pairs, images and texts (arXiv 2012.15409, section 3; the authors never released theirs).

Cross-modal contrastive learning has two terms here, where the paper writes one sum over all candidates: in ``contrastive`` both sides are
encoded alone (the batch's pairs, and retrieved pictures and texts as further positives), in ``rewriting`` they are encoded together
(rewritten captions as positives and hard negatives). In one sum the easy positives of the first kind would leave the second kind
without a gradient, and every objective should have its own weight and curve.
"""
from dataclasses import dataclass, field

import paddle
import paddle.nn.functional as F

from unimo2_paddle.data.mixture import CORPORA
from unimo2_paddle.data.pretrain_batches import lookahead_for
from unimo2_paddle.data.unimo_batches import Candidates, UnimoBatchBuilder
from unimo2_paddle.data.unimo_sources import RelatedPictures, UnimoPretrainData, check_stores, open_unimo_sources
from unimo2_paddle.models.configuration import UnimoConfig
from unimo2_paddle.models.losses import masked_region_losses, multi_positive_contrastive_loss
from unimo2_paddle.models.parallel import gather_rows, mean_over_all, rank
from unimo2_paddle.models.transformer import length
from unimo2_paddle.models.unimo import HEADS
from unimo2_paddle.tasks.base import build_backbone
from unimo2_paddle.tasks.pretrain import PretrainTask, fragment_share, mixture_problems, negative_weights
from unimo2_paddle.tasks.retrieval import RetrievalData, RetrievalDataset, RetrievalEval
from unimo2_paddle.tasks.unimo_inputs import REGION_INPUTS, open_regions
from unimo2_paddle.tasks.unimo_retrieval import TEXT_INPUTS, take
from unimo2_paddle.tasks.unimo_zeroshot import ZeroShotEvaluator, alone_scores, pool_pictures, pool_texts
from unimo2_paddle.tasks.work import unimo_pretraining_work

NEW_HEADS = ("match_fc.*", "mask_region_*")  # a released model and RoBERTa lack them


@dataclass
class UnimoPairObjectives:
    """Weights of the objectives on image-caption pairs; 0 switches one off."""

    contrastive: float = 1.0      # both sides encoded alone: the batch's pairs of all workers, retrieved pictures and texts
    rewriting: float = 1.0        # encoded together: rewritten captions against the pair, random pairs as further negatives
    masked_lm: float = 1.0        # masked words, with the picture
    region_classes: float = 1.0   # what the detector called masked regions, with the caption
    region_features: float = 1.0  # the features of masked regions
    caption: float = 0.0          # left-to-right prediction of the caption from the picture

    def problems(self):
        return negative_weights(self)


@dataclass
class UnimoImageObjectives:
    """Weights of the objectives on images without text."""

    region_classes: float = 1.0
    region_features: float = 1.0

    def problems(self):
        return negative_weights(self)


@dataclass
class UnimoTextObjectives:
    """Weights of the objectives on texts without images."""

    masked_lm: float = 1.0
    seq2seq: float = 1.0          # sequence-to-sequence fragments in every second text step (drawn), in all when masked_lm is 0

    def problems(self):
        return negative_weights(self)


@dataclass
class UnimoPretrainTrain:
    """Length of the run and how the objectives are computed. Mask ratios and overlap are keys of the model (``txt_mask_ratio``,
    ``vl_mask_ratio`` of regions, ``overlap_ratio``)."""

    steps: int = 1000
    accumulate: int = 1              # micro-batches per optimizer step; contrastive candidates come from one micro-batch
    temperature: float = 0.07        # of the cosines in the contrastive term
    candidates: Candidates = field(default_factory=Candidates)
    pairs: UnimoPairObjectives = field(default_factory=UnimoPairObjectives)
    images: UnimoImageObjectives = field(default_factory=UnimoImageObjectives)
    texts: UnimoTextObjectives = field(default_factory=UnimoTextObjectives)

    def problems(self):
        found = [f"{key}: must be at least 1, is {getattr(self, key)}" for key in ("steps", "accumulate") if getattr(self, key) < 1]
        if self.temperature <= 0:
            found.append(f"temperature: must be above 0, is {self.temperature}")
        if self.pairs.rewriting > 0 and self.candidates.hard_negatives + self.candidates.random_negatives == 0:
            found.append("candidates: rewriting needs negatives; set hard_negatives or random_negatives, or pairs.rewriting to 0")
        return found


@dataclass
class UnimoPretrainEval(RetrievalEval):
    """Zero-shot retrieval during pre-training: ``annotations`` empty = none; ``regions``: store of the pictures (``{split}`` is replaced)."""

    split: str = "val"
    annotations: str = ""
    regions: str = ""
    images: str = ""           # picture folder, for reports only
    format: str = "karpathy"

    def problems(self):
        found = super().problems()
        if self.annotations and not self.regions:
            found.append("regions: is empty; give the store of the pictures of eval.annotations")
        return found


class UnimoPretrainTask(PretrainTask):
    """Joint learning on pairs, images and texts; every step reads one corpus."""

    sections = {**PretrainTask.sections, "data": UnimoPretrainData, "train": UnimoPretrainTrain, "eval": UnimoPretrainEval}
    systems = (UnimoConfig,)

    @classmethod
    def check(cls, config):
        train, mixture, data = config.train, config.mixture, config.data
        problems = mixture_problems(config)
        pairs = mixture.weights.get("pairs", 0) > 0
        size = mixture.global_batch.get("pairs", 0) // train.accumulate
        if pairs and size % train.candidates.group:
            problems.append(f"mixture.global_batch.pairs: {size} pairs per micro-batch are not a multiple of train.candidates.group "
                            f"{train.candidates.group}")
        if pairs and train.candidates.rewritten and not any(source.augmentations for source in data.pairs):
            problems.append("train.candidates: asks for rewritten or related candidates, but no source of data.pairs has augmentations; make them "
                            "with unimo2 augment, or set paraphrases, hard_negatives, related_texts and related_images to 0")
        if pairs and train.candidates.related_images and not (data.related or data.images):
            problems.append("data.related: is required because train.candidates.related_images is above 0 and there is no data.images")
        model_config = config.model.model_config() if config.model.config else None
        for corpus in CORPORA:
            if mixture.weights.get(corpus, 0) > 0 and not any(vars(getattr(train, corpus)).values()):
                problems.append(f"train.{corpus}: no objective is above 0, but mixture.weights.{corpus} is; switch one on, or the corpus off")
            for name in ("region_classes", "region_features"):
                key = f"image_predict_{name[7:].replace('features', 'feature').replace('classes', 'class')}"
                if getattr(getattr(train, corpus), name, 0) > 0 and isinstance(model_config, UnimoConfig) and not getattr(model_config, key):
                    problems.append(f"train.{corpus}.{name}: the model does not predict them; set model.{key}: true, or the weight to 0")
        if config.run.graph == "static":
            problems.append("run.graph: unimo_pretrain does not run as a static Program (how many regions are masked decides its shapes); set "
                            "run.graph to dynamic or to_static")
        return problems

    def build_model(self):
        return build_backbone(self.config.model, self.config.run.seed, self.model_config, heads=HEADS, head_patterns=NEW_HEADS)

    def work(self, batch):
        return unimo_pretraining_work(self.model_config, batch, self.config.train)

    def group(self):
        return self.config.train.candidates.group

    def open_sources(self, bad_records, shard):
        readers, orders = open_unimo_sources(self.config.data, self.step_kinds(), self.config.run.seed, bad_records, list_bad=shard.rank == 0,
                                             turn=(shard.rank, shard.world_size))
        for corpus in ("pairs", "images"):
            check_stores([reader.store for reader in readers.get(corpus, ())], self.model_config, getattr(self.config.train, corpus).region_classes > 0)
        return readers, orders, lookahead_for({corpus: found for corpus, found in readers.items() if corpus == "texts"}, orders)

    def batch_builder(self, readers, bad_records):
        config, train = self.config, self.config.train
        related = RelatedPictures(config.data.related or [source.regions for source in config.data.images])
        check_stores(related, self.model_config, classes=False)
        return UnimoBatchBuilder(
            config.data, readers, related, self.tokenizer, self.model_config, config.run.seed, train.candidates, words=train.pairs.masked_lm > 0,
            regions=train.pairs.region_classes + train.pairs.region_features > 0,
            classes=[corpus for corpus in ("pairs", "images") if getattr(train, corpus).region_classes > 0],
            seq2seq=fragment_share(train.texts), bad_records=bad_records)

    def evaluators(self):
        settings = self.config.eval
        if not settings.annotations:
            return []
        data = RetrievalData(annotations=settings.annotations, images=settings.images, regions=settings.regions, vocab=self.config.data.vocab,
                             format=settings.format, max_text_len=self.config.data.max_text_len, max_regions=self.model_config.max_img_len)
        dataset = RetrievalDataset.read(data, self.tokenizer, settings.split, settings.max_images, settings.captions_per_image,
                                        open_regions(data, self.model_config, settings.split))
        return [ZeroShotEvaluator(dataset, settings.split, settings.image_batch, settings.pair_batch, settings.every_steps, False, settings.rerank_k)]

    def illustrate(self, model, writer, step):
        """Nothing to show: regions are no pictures."""

    def _pair_terms(self, model, batch):
        weights, terms = self.config.train.pairs, {}
        if weights.contrastive:
            terms.update(self._contrastive_terms(model, batch))
        if weights.rewriting:
            terms.update(self._rewriting_terms(model, batch))
        regions = weights.region_classes + weights.region_features > 0
        if weights.masked_lm or regions:
            picture, text = self._fused(batch)
            if regions:
                picture["image_features"] = hide_regions(picture["image_features"], picture["image_mask"], batch["hidden"])
            out = model(**picture, **{**text, "input_ids": batch["masked_ids"]})
            if weights.masked_lm:
                terms["masked_lm"] = self._word_loss(model, out.text_states, batch)
            if regions:
                clean = paddle.index_select(batch["image_features"], batch["fused"])
                terms.update(region_terms(model, out.image_states, clean, batch, weights))
        if weights.caption:
            terms["caption"] = self._caption_loss(model, *self._fused(batch, causal=True))
        return terms

    def _contrastive_terms(self, model, batch):
        """Pictures and texts encoded alone: the pairs of all workers, and what was retrieved for them."""
        images, texts = pool_pictures(model, batch), pool_texts(model, batch, batch["image_features"].shape[0])
        related = {"text": pool_texts(model, batch, prefix="related_text_") if "related_text_real" in batch else None,
                   "image": pool_pictures(model, batch, prefix="related_") if "related_image_real" in batch else None}
        losses, own = [], None
        for query, answers, kind in ((images, texts, "text"), (texts, images, "image")):
            size, candidates = query.shape[0], gather_rows(answers)
            here = paddle.arange(rank() * size, (rank() + 1) * size, dtype="int64")
            positive, real = F.one_hot(here, candidates.shape[0]), paddle.ones([size, candidates.shape[0]])
            if related[kind] is not None:
                companions, counts = gather_rows(related[kind]), gather_rows(batch[f"related_{kind}_real"])
                owner = paddle.arange(companions.shape[0], dtype="int64") // (companions.shape[0] // candidates.shape[0])
                belongs = (owner.unsqueeze(0) == here.unsqueeze(1)).astype("float32")
                candidates = paddle.concat([candidates, companions])
                positive, real = paddle.concat([positive, belongs * counts], axis=1), paddle.concat([real, counts.expand_as(belongs)], axis=1)
            scores = alone_scores(query, candidates) / self.config.train.temperature
            losses.append(multi_positive_contrastive_loss(scores, positive, real))
            own = ((scores + (real - 1.0) * 1e9).argmax(axis=1) == here).astype("float32").mean() if own is None else own
        return {"contrastive": (losses[0] + losses[1]) / 2, "contrastive_accuracy": own.detach()}

    def _rewriting_terms(self, model, batch):
        """Pictures and texts encoded together: the pair and its rewritten captions against what it is not."""
        out = model(**take(batch, REGION_INPUTS, batch["joint_image"]), **take(batch, TEXT_INPUTS, batch["joint_text"]), first_only=True)
        positive, real = batch["joint_positive"], batch["joint_real"]
        scores = model.matching_score(out).reshape([-1, positive.shape[1]])
        best = (scores + (real - 1.0) * 1e9).argmax(axis=1)
        right = (positive * F.one_hot(best, positive.shape[1])).sum(axis=1).mean()
        return {"rewriting": multi_positive_contrastive_loss(scores, positive, real), "rewriting_accuracy": right.detach()}

    def _fused(self, batch, causal=False):
        """(picture, text) arguments of the pairs that are encoded together, texts at the length of the captions alone."""
        picture, text = take(batch, REGION_INPUTS, batch["fused"]), take(batch, TEXT_INPUTS, batch["fused"])
        text = {name: array[:, : batch["masked_ids"].shape[1]] for name, array in text.items()}
        if causal:
            text["text_mask"] = paddle.tril(text["text_mask"].unsqueeze(1) * text["text_mask"].unsqueeze(2))
        return picture, text

    def _caption_loss(self, model, picture, text):
        states = model(**picture, **text).text_states[:, :-1]
        ids, shown = text["input_ids"][:, 1:].reshape([-1]), text["text_mask"][:, 1:].max(axis=-1).reshape([-1])
        loss = F.cross_entropy(model.mlm_logits(states.reshape([-1, states.shape[-1]])), ids, reduction="none").reshape([-1])
        return mean_over_all((loss * shown).sum(), shown.sum())

    def _word_loss(self, model, states, batch):
        if batch["labels"].shape[0] == 0:  # a worker whose pairs all had regions masked
            return mean_over_all(states.sum() * 0.0, 0)
        return super()._word_loss(model, states, batch)

    def _image_terms(self, model, batch):
        """Masked regions of pictures alone."""
        hidden = hide_regions(batch["image_features"], batch["image_mask"], batch["hidden"])
        out = model(hidden, batch["image_location"], batch["image_mask"])
        return region_terms(model, out.image_states, batch["image_features"], batch, self.config.train.images)

    def _text_terms(self, model, batch):
        """Masked words, or sequence-to-sequence fragments."""
        name = "masked_lm" if "masked_ids" in batch else "seq2seq"
        ids = batch["masked_ids"] if name == "masked_lm" else batch["input_ids"]
        out = model(input_ids=ids, position_ids=batch["position_ids"], text_mask=batch["text_mask"])
        return {name: self._word_loss(model, out.text_states, batch)}


def hide_regions(features, mask, hidden):
    """Features of pictures some of whose regions are hidden: zeros, and the global region of such a picture is the mean of what shows.

    Args:
        features: ``[B, 1 + N, D]``, the global region first; mask, hidden: ``[B, 1 + N]``, ``hidden[:, 0]`` is 0.

    Returns:
        ``[B, 1 + N, D]``; pictures without a hidden region as they were.
    """
    visible = (mask * (1.0 - hidden))[:, 1:].unsqueeze(2)                           # [B, N, 1]
    regions = features[:, 1:] * visible
    mean = regions.sum(axis=1, keepdim=True) / visible.sum(axis=1, keepdim=True).clip(min=1.0)
    touched = (hidden.sum(axis=1) > 0).astype(features.dtype).reshape([-1, 1, 1])
    return paddle.concat([touched * mean + (1.0 - touched) * features[:, :1], regions], axis=1)


def region_terms(model, states, features, batch, weights):
    """Loss terms of masked regions, as means over all workers' regions.

    Args:
        states: ``[B, N, H]`` of the pictures with hidden regions; features: ``[B, N, D]`` as they were; weights: ``region_classes`` and
            ``region_features`` are computed where above 0.
    """
    places, states = batch["predict_regions"], states.reshape([-1, states.shape[-1]])
    if places.shape[0] == 0:  # Paddle 2.6.2 cannot select nothing; the heads still get a gradient, of 0
        nothing = sum(value.sum() for value in model.region_predictions(states[:1]) if value is not None) * 0.0
        return {name: mean_over_all(nothing, 0) for name in ("region_classes", "region_features") if getattr(weights, name)}
    logits, found = model.region_predictions(paddle.index_select(states, places))
    wanted = paddle.index_select(features.reshape([-1, features.shape[-1]]), places)
    classes, regression = masked_region_losses(logits if weights.region_classes else None, found if weights.region_features else None,
                                               batch.get("region_classes"), wanted)
    # in the authors' layout both are means over this worker's regions; workers have different numbers of them
    return {name: mean_over_all(value * float(places.shape[0]), length(places))
            for name, value in (("region_classes", classes), ("region_features", regression)) if value is not None}
