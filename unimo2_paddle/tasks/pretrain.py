"""UNIMO-2 pre-training over image-caption pairs, images and texts (design notes section 6; the authors never released theirs)."""
import os
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Dict, List

import numpy as np
import paddle
import paddle.nn.functional as F

from unimo2_paddle.data.mixture import CORPORA, Batches, MixturePlan
from unimo2_paddle.data.pretrain_batches import BadRecords, PretrainBatchBuilder, PretrainData, lookahead_for, open_sources
from unimo2_paddle.data.tokenizer import Tokenizer
from unimo2_paddle.errors import ConfigError
from unimo2_paddle.models.losses import contrastive_loss, visual_contrastive_loss
from unimo2_paddle.models.parallel import gather_rows, mean_over_all, rank
from unimo2_paddle.models.transformer import length
from unimo2_paddle.tasks.base import Task, build_unimo2, check_vocabulary, normalise_tensor
from unimo2_paddle.tasks.dictionary_health import DictionaryHealth, has_code_choice
from unimo2_paddle.tasks.finetune import copy_vocabulary
from unimo2_paddle.tasks.retrieval import RetrievalData, RetrievalEval, evaluation_mode, retrieval_evaluators
from unimo2_paddle.tasks.work import pretraining_work


def negative_weights(group):
    """Problems of a group of weights."""
    return [f"{name}: a weight must not be negative, is {value}" for name, value in vars(group).items() if value < 0]


@dataclass
class PairObjectives:
    """Weights of the objectives on image-caption pairs; 0 switches one off."""

    contrastive: float = 1.0       # CMCL between the unimodal encoders, candidates of all workers
    matching: float = 1.0          # image-text matching with hard negatives
    masked_lm: float = 1.0         # masked words read through grounded tokens
    dictionary: float = 1.0        # the two dictionary terms (1.0 / 0.25 inside)
    caption: float = 0.0           # left-to-right caption language model
    masked_grounding: float = 0.0  # masked grounded tokens (needs model.with_grounding_mask)

    def problems(self):
        return negative_weights(self)


@dataclass
class ImageObjectives:
    """Weights of the objectives on images without text."""

    visual_contrastive: float = 1.0
    dictionary: float = 1.0
    masked_grounding: float = 0.0

    def problems(self):
        return negative_weights(self)


@dataclass
class TextObjectives:
    """Weights of the objectives on texts without images."""

    masked_lm: float = 1.0
    dictionary: float = 1.0
    seq2seq: float = 0.0           # sequence-to-sequence fragments in every second text step (drawn), in all when masked_lm is 0

    def problems(self):
        return negative_weights(self)


def fragment_share(texts):
    """The share of the text steps that are sequence-to-sequence fragments, from the weights of the objectives on texts."""
    return 0.0 if texts.seq2seq == 0 else 0.5 if texts.masked_lm > 0 else 1.0


@dataclass
class Mixture:
    """Share of the steps and samples per optimizer step (over all workers and micro-batches) of each corpus."""

    weights: Dict[str, float] = field(default_factory=lambda: {"pairs": 1.0})
    global_batch: Dict[str, int] = field(default_factory=lambda: {"pairs": 64})

    def problems(self):
        problems = [f"{group}.{name}: unknown corpus; known: {', '.join(CORPORA)}"
                    for group in ("weights", "global_batch") for name in getattr(self, group) if name not in CORPORA]
        if not any(w > 0 for w in self.weights.values()) or any(w < 0 for w in self.weights.values()):
            problems.append("weights: must not be negative, and one must be above 0")
        problems += [f"global_batch.{name}: is required because weights.{name} is above 0"
                     for name, w in self.weights.items() if w > 0 and self.global_batch.get(name, 0) < 1]
        return problems


def mixture_problems(config):
    """Problems between the corpora, their batches and the objectives that need several samples, of both systems' pre-training."""
    problems, train, mixture = [], config.train, config.mixture
    for corpus in CORPORA:
        if mixture.weights.get(corpus, 0) > 0 and not getattr(config.data, corpus):
            problems.append(f"data.{corpus}: mixture.weights.{corpus} is above 0 but no shards are given")
    contrastive = {"pairs": train.pairs.contrastive, "images": getattr(train.images, "visual_contrastive", 0)}
    for corpus, weight in contrastive.items():
        size = mixture.global_batch.get(corpus, 0) // train.accumulate
        if weight > 0 and mixture.weights.get(corpus, 0) > 0 and size < 2:
            problems.append(f"mixture.global_batch.{corpus}: contrastive learning needs at least 2 samples per micro-batch, has {size}")
    for corpus, size in mixture.global_batch.items():
        if size % train.accumulate:
            problems.append(f"mixture.global_batch.{corpus}: {size} is not a multiple of train.accumulate {train.accumulate}")
    return problems


@dataclass
class PretrainTrain:
    """Length of the run and how the objectives are computed."""

    steps: int = 1000
    accumulate: int = 1              # micro-batches per optimizer step; contrastive candidates come from one micro-batch
    mask_ratio: float = 0.15
    matching_group: int = 16         # hard negatives are drawn inside fixed groups of so many consecutive pairs
    fused_per_group: int = 0         # so many pairs of each group go through the grounded encoder, all serve contrast; 0: all of them
    matching_negatives: int = 2      # per pair: 2 = another text and another image, 1 = alternately one of them
    matching_temperature: float = 1.0  # of the softmax over similarities that draws negatives; large = uniform
    text_for_matching: str = "clean"  # "masked": matching shares the masked-word pass, as the authors' single-text batches do (faster)
    visual_temperature: float = 0.1
    frozen: List[str] = field(default_factory=list)  # name patterns of parameters that keep their initial values, for example "*_temperature"
    pairs: PairObjectives = field(default_factory=PairObjectives)
    images: ImageObjectives = field(default_factory=ImageObjectives)
    texts: TextObjectives = field(default_factory=TextObjectives)

    def problems(self):
        problems = [f"{key}: must be at least {low}, is {getattr(self, key)}" for key, low in
                    (("steps", 1), ("accumulate", 1), ("matching_group", 2)) if getattr(self, key) < low]
        if self.matching_negatives not in (1, 2):
            problems.append(f"matching_negatives: must be 1 or 2, is {self.matching_negatives}")
        if self.text_for_matching not in ("clean", "masked"):
            problems.append(f"text_for_matching: {self.text_for_matching!r} is not one of clean, masked")
        if not 0 <= self.fused_per_group <= self.matching_group:
            problems.append(f"fused_per_group: must be between 0 and matching_group {self.matching_group}, is {self.fused_per_group}")
        if self.fused_per_group and self.text_for_matching == "masked":
            problems.append("fused_per_group: needs text_for_matching: clean (negatives come from pairs whose words are not masked)")
        if not 0 < self.mask_ratio < 1:
            problems.append(f"mask_ratio: must be between 0 and 1, is {self.mask_ratio}")
        problems += [f"{key}: must be above 0, is {getattr(self, key)}"
                     for key in ("matching_temperature", "visual_temperature") if getattr(self, key) <= 0]
        return problems


@dataclass
class PretrainEval(RetrievalEval):
    """Zero-shot retrieval during pre-training: ``annotations`` empty = none. ``dictionary_every``: steps between looks at the use of the
    dictionary on the same pictures; 0 = never, and a model without such a dictionary is never looked at."""

    split: str = "val"
    annotations: str = ""
    images: str = ""
    format: str = "karpathy"
    dictionary_every: int = 0

    def problems(self):
        found = super().problems()
        return found + ([] if self.dictionary_every >= 0 else [f"dictionary_every: must be at least 0, is {self.dictionary_every}"])


class PretrainTask(Task):
    """Joint learning on pairs, images and texts; every step reads one corpus."""

    sections = {**Task.sections, "data": PretrainData, "mixture": Mixture, "train": PretrainTrain, "eval": PretrainEval}

    def __init__(self, config):
        super().__init__(config)
        self.selection = f"{config.eval.split}/recall_mean"
        self.model_config = config.model.model_config()
        self.tokenizer = Tokenizer.from_directory(config.data.vocab)
        check_vocabulary(self.tokenizer, self.model_config, config.data.vocab)
        self._shown = None

    @classmethod
    def check(cls, config):
        problems = mixture_problems(config)
        train, mixture = config.train, config.mixture
        if mixture.weights.get("pairs", 0) > 0 and (train.pairs.matching > 0 or train.fused_per_group):
            size = mixture.global_batch.get("pairs", 0) // train.accumulate
            if size % train.matching_group:
                problems.append(f"mixture.global_batch.pairs: {size} pairs per micro-batch are not a multiple of "
                                f"train.matching_group {train.matching_group}")
        model_config = config.model.model_config()
        grounded = model_config.model_type == "grounded"
        can_mask = grounded and model_config.with_grounding_mask and model_config.grounding_method == "topk"
        for corpus in CORPORA:
            weights = vars(getattr(train, corpus))
            if weights.get("masked_grounding") and not can_mask:
                problems.append(f"train.{corpus}.masked_grounding: needs a grounded model with model.with_grounding_mask: true and "
                                "model.grounding_method: topk")
            if mixture.weights.get(corpus, 0) > 0 and not any(w for name, w in weights.items() if grounded or name != "dictionary"):
                problems.append(f"train.{corpus}: no objective that this model has is above 0, but mixture.weights.{corpus} is; "
                                "switch one on, or the corpus off")
        if config.data.max_text_len + 2 > model_config.text_max_position_embeddings:
            problems.append(f"data.max_text_len: {config.data.max_text_len} tokens need {config.data.max_text_len + 2} text positions, "
                            f"the model has {model_config.text_max_position_embeddings}")
        return problems

    def total_steps(self):
        return self.config.train.steps

    def step_kinds(self):
        return [c for c in CORPORA if self.config.mixture.weights.get(c, 0) > 0]

    def epochs(self, step, batches):
        """Passes over every corpus; ``epoch`` is that of the corpus most steps belong to."""
        read, weights = batches.epochs(), self.config.mixture.weights
        main = max(read, key=lambda corpus: weights[corpus])
        return {"epoch": read[main], **{f"epoch_{corpus}": value for corpus, value in read.items()}}

    def work(self, batch):
        return pretraining_work(self.model_config, batch, self.config.train)

    def build_model(self):
        model, patterns = build_unimo2(self.config.model, self.config.run.seed, self.model_config), self.config.train.frozen
        for pattern in patterns:
            found = [parameter for parameter in model.parameters() if fnmatchcase(parameter.name, pattern)]
            if not found:
                raise ConfigError(f"train.frozen: no parameter is called {pattern!r}; the names are in the header of a checkpoint's "
                                  "model.safetensors")
            for parameter in found:
                parameter.stop_gradient = True
        return model

    def train_batches(self, shard, state=None):
        config, train, mixture = self.config, self.config.train, self.config.mixture
        for corpus, size in mixture.global_batch.items():
            unit = self.group() if corpus == "pairs" else 1
            if mixture.weights.get(corpus, 0) > 0 and (size // train.accumulate) % (unit * shard.world_size):
                raise ConfigError(f"mixture.global_batch.{corpus}: {size // train.accumulate} samples per micro-batch cannot be shared by "
                                  f"{shard.world_size} workers in groups of {unit}; use a multiple of {unit * shard.world_size}")
        name = f"bad_records.{shard.rank}.jsonl" if shard.rank else "bad_records.jsonl"
        bad_records = BadRecords(os.path.join(config.run.output, name), config.data.max_bad_ratio)
        readers, orders, lookahead = self.open_sources(bad_records, shard)
        plan = MixturePlan(orders, mixture.weights, mixture.global_batch, config.run.seed, train.accumulate, shard.rank, shard.world_size, state)
        return Batches(plan, self.batch_builder(readers, bad_records), config.data.num_workers, lookahead)

    def group(self):
        """How many consecutive pairs belong together, so that no two workers may share them."""
        train = self.config.train
        return train.matching_group if train.pairs.matching > 0 or train.fused_per_group else 1

    def open_sources(self, bad_records, shard):
        """(readers, reading orders, ``Lookahead``) of the corpora in use."""
        readers, orders = open_sources(self.config.data, self.step_kinds(), self.config.run.seed, bad_records, list_bad=shard.rank == 0,
                                       turn=(shard.rank, shard.world_size))
        return readers, orders, lookahead_for(readers, orders)

    def batch_builder(self, readers, bad_records):
        """The function from a ``Draw`` to a batch."""
        config, train = self.config, self.config.train
        masked_grounding = [c for c in ("pairs", "images") if getattr(train, c).masked_grounding > 0]
        return PretrainBatchBuilder(
            config.data, readers, self.tokenizer, self.model_config, seed=config.run.seed, mask_ratio=train.mask_ratio,
            group=train.matching_group, fused_per_group=train.fused_per_group or train.matching_group, masked_grounding=masked_grounding,
            seq2seq=fragment_share(train.texts), bad_records=bad_records)

    def evaluators(self):
        config = self.config.eval
        if not config.annotations:
            return []
        data = RetrievalData(annotations=config.annotations, images=config.images, vocab=self.config.data.vocab, format=config.format,
                             max_text_len=self.config.data.max_text_len)
        evaluators = retrieval_evaluators(data, config, self.model_config, self.tokenizer)
        self._shown = evaluators[0].dataset
        if config.dictionary_every and has_code_choice(self.model_config):
            evaluators.append(DictionaryHealth(self._shown, every_steps=config.dictionary_every))
        return evaluators

    def save_assets(self, directory):
        """The vocabulary goes with the model."""
        copy_vocabulary(self.config.data.vocab, os.path.join(directory, "vocab"))

    def illustrate(self, model, writer, step, pictures=4, counted=64):
        """Sample pictures with their captions and grounded tokens, and the tokens used most over ``counted`` pairs."""
        if self._shown is None:
            return
        first_caption = [int(np.flatnonzero(self._shown.text_image == i)[0]) for i in range(min(counted, len(self._shown)))]
        image = self._shown.pictures(0, len(first_caption), model.config.image_size)
        ids, positions, mask = (paddle.to_tensor(a) for a in self._shown.text_batch(first_caption))
        with evaluation_mode(model):
            out = model.fuse(model.encode_image(normalise_tensor(paddle.to_tensor(image))), model.encode_text(ids, positions, mask), mask,
                             first_only=True, with_grounding_loss=False)
        tokens = None if out.grounded_ids is None else out.grounded_ids.numpy()
        for i, row in enumerate(first_caption[:pictures]):
            writer.add_image(tag=f"pairs/{i}", img=image[i], step=step)
            best = "" if tokens is None else f" | grounded tokens: {', '.join(map(str, tokens[i][:8]))}"
            writer.add_text(tag=f"pairs/{i}", text_string=self._shown.captions[row] + best, step=step)
        if tokens is not None:
            codes, counts = np.unique(tokens, return_counts=True)
            top = sorted(zip(counts, codes), reverse=True)[:10]
            used = ", ".join(f"{code} ({count} of {len(tokens)})" for count, code in top)
            writer.add_text(tag="grounded_tokens/most_used", text_string=used, step=step)
            writer.add_scalar(tag="grounded_tokens/used_codes", value=len(codes), step=step)

    def loss(self, model, batch):
        """Named terms of one micro-batch; ``"loss"`` is their weighted sum over the corpus' objectives."""
        corpus = batch["corpus"]
        terms = {"pairs": self._pair_terms, "images": self._image_terms, "texts": self._text_terms}[corpus](model, batch)
        weights = getattr(self.config.train, corpus)
        parts = [value * getattr(weights, name) for name, value in terms.items() if hasattr(weights, name)]
        named = {f"{corpus}/{name}": value for name, value in terms.items()}
        named["loss"] = sum(parts[1:], parts[0])
        return named

    def _pair_terms(self, model, batch):
        weights, masked_for_matching = self.config.train.pairs, self.config.train.text_for_matching == "masked"
        mask, positions = batch["text_mask"], batch["position_ids"]
        image = model.encode_image(normalise_tensor(batch["image"]))
        terms = {}
        clean = model.encode_text(batch["input_ids"], positions, mask)
        image_features, text_features = model.contrastive_features(image, clean)
        if weights.contrastive:
            terms["contrastive"], logits, _ = contrastive_loss(
                image_features, text_features, model.temperature(), all_image=gather_rows(image_features),
                all_text=gather_rows(text_features), offset=rank() * image.shape[0])
            labels = paddle.arange(rank() * image.shape[0], (rank() + 1) * image.shape[0], dtype="int64")
            terms["contrastive_accuracy"] = (logits.argmax(axis=1) == labels).astype("float32").mean().detach()
        # from here on only the pairs that go through the grounded encoder; the others still serve as negatives
        rows = batch["fused"]
        some_image, some_clean, mask, positions = (
            part if rows.shape[0] == part.shape[0] else paddle.index_select(part, rows) for part in (image, clean, mask, positions))
        masked = model.encode_text(batch["masked_ids"], positions, mask) if weights.masked_lm or masked_for_matching else None
        if weights.matching or weights.dictionary or weights.masked_grounding or (masked_for_matching and weights.masked_lm):
            token_mask = batch.get("token_mask")
            # only masked words and masked grounded tokens need more than the two first positions
            first_only = not (weights.masked_grounding or (masked_for_matching and weights.masked_lm))
            pair = model.fuse(some_image, masked if masked_for_matching else some_clean, mask, token_mask=token_mask, first_only=first_only)
            if weights.matching:
                terms.update(self._matching_terms(model, batch, image, masked if masked_for_matching else clean, pair,
                                                  image_features.detach(), text_features.detach()))
            if pair.grounding_loss is not None and weights.dictionary:
                terms["dictionary"] = pair.grounding_loss
            if weights.masked_grounding and token_mask is not None:
                terms["masked_grounding"] = self._masked_grounding_loss(model, pair, token_mask)
        if weights.masked_lm:
            out = pair if masked_for_matching else model.fuse(some_image, masked, mask, with_grounding_loss=False)
            terms["masked_lm"] = self._word_loss(model, out.fused_text, batch)
        if weights.caption:
            terms["caption"] = self._caption_loss(model, paddle.index_select(batch["input_ids"], rows), positions, mask, some_image)
        return terms

    def _matching_terms(self, model, batch, image, text, pair, image_features, text_features):
        """Matching of true pairs and of hard negatives drawn inside groups by similarity (Gumbel noise from the batch)."""
        train, group, here = self.config.train, self.config.train.matching_group, batch["fused"]
        blocks, size = image.shape[0] // group, here.shape[0]
        per = size // blocks
        with paddle.no_grad():
            similarity = paddle.matmul(image_features.reshape([blocks, group, -1]), text_features.reshape([blocks, group, -1]),
                                       transpose_y=True) / model.temperature()              # [blocks, image, text]
            own = paddle.eye(group)[:per] * 1e9
            start = (here // group) * group

            def draw(scores, noise):
                noise = noise.reshape([blocks, per, group])
                return (scores[:, :per] / train.matching_temperature - own + noise).argmax(axis=-1).reshape([-1]) + start

            other_text = draw(similarity, batch["noise"][:, 0])
            other_image = draw(similarity.transpose([0, 2, 1]), batch["noise"][:, 1])
            if train.matching_negatives == 2:
                images, texts = paddle.concat([here, other_image]), paddle.concat([other_text, here])
            else:
                even = (here % 2 == 0)
                images, texts = paddle.where(even, here, other_image), paddle.where(even, other_text, here)
        token_mask = batch.get("token_mask")
        if token_mask is not None:  # hidden grounded tokens must not tell true pairs from false ones
            token_mask = token_mask.tile([images.shape[0] // size, 1])
        negative = model.fuse(paddle.index_select(image, images), paddle.index_select(text, texts), paddle.index_select(batch["text_mask"], texts),
                              token_mask=token_mask, first_only=True, with_grounding_loss=False)
        logits = paddle.concat([model.matching_logits(pair), model.matching_logits(negative)])
        labels = paddle.concat([paddle.ones([size], dtype="int64"), paddle.zeros([logits.shape[0] - size], dtype="int64")])
        loss = F.cross_entropy(logits, labels, reduction="none").reshape([-1])
        accuracy = (logits.argmax(axis=1) == labels).astype("float32")
        # true and false pairs weigh the same however many negatives a pair has
        return {"matching": (loss[:size].mean() + loss[size:].mean()) / 2,
                "matching_accuracy": ((accuracy[:size].mean() + accuracy[size:].mean()) / 2).detach()}

    def _word_loss(self, model, fused_text, batch):
        """Cross entropy of the words at ``predict_from``, as the mean over all workers' words."""
        states = paddle.index_select(fused_text.reshape([-1, fused_text.shape[-1]]), batch["predict_from"])
        loss = F.cross_entropy(model.mlm_logits(states), batch["labels"], reduction="sum")
        return mean_over_all(loss, length(batch["labels"]))

    def _masked_grounding_loss(self, model, out, token_mask):
        hidden = out.fused_grounded.reshape([-1, out.fused_grounded.shape[-1]])
        loss = F.cross_entropy(model.masked_grounding_logits(hidden), out.grounded_ids.reshape([-1]), reduction="none").reshape([-1])
        hidden_tokens = token_mask.reshape([-1])
        return mean_over_all((loss * hidden_tokens).sum(), hidden_tokens.sum())

    def _caption_loss(self, model, ids, positions, mask, image):
        """Left-to-right prediction of the caption in the ``caption`` layout."""
        causal = paddle.tril(mask.unsqueeze(1) * mask.unsqueeze(2))
        text = model.encode_text(ids, positions, causal)
        out = model.fuse(image, text, causal, layout="caption")
        logits = model.mlm_logits(out.fused_text[:, :-1].reshape([-1, out.fused_text.shape[-1]]))
        weights = mask[:, 1:].reshape([-1])
        loss = F.cross_entropy(logits, ids[:, 1:].reshape([-1]), reduction="none").reshape([-1])
        return mean_over_all((loss * weights).sum(), weights.sum())

    def _image_terms(self, model, batch):
        """Two augmented views through the grounded encoder; the other view is the positive (visual contrastive learning)."""
        weights, size = self.config.train.images, batch["first_view"].shape[0]
        views = paddle.concat([normalise_tensor(batch["first_view"]), normalise_tensor(batch["second_view"])])
        token_mask = batch.get("token_mask")
        out = model.fuse(model.encode_image(views), token_mask=token_mask)
        terms = {}
        if weights.visual_contrastive:
            features = F.normalize(model.pool_image(out), axis=-1)
            first, second = features[:size], features[size:]
            terms["visual_contrastive"] = visual_contrastive_loss(
                first, second, self.config.train.visual_temperature, gather_rows(first), gather_rows(second), rank() * size)
        if out.grounding_loss is not None and weights.dictionary:
            terms["dictionary"] = out.grounding_loss
        if weights.masked_grounding and token_mask is not None:
            terms["masked_grounding"] = self._masked_grounding_loss(model, out, token_mask)
        return terms

    def _text_terms(self, model, batch):
        """Masked words, or sequence-to-sequence fragments, read through the grounded tokens of the text alone."""
        weights = self.config.train.texts
        ids = batch["masked_ids"] if "masked_ids" in batch else batch["input_ids"]
        states = model.encode_text(ids, batch["position_ids"], batch["text_mask"])
        out = model.fuse(text_states=states, text_mask=batch["text_mask"])
        name = "masked_lm" if "masked_ids" in batch else "seq2seq"
        terms = {name: self._word_loss(model, out.fused_text, batch)}
        if out.grounding_loss is not None and weights.dictionary:
            terms["dictionary"] = out.grounding_loss
        return terms
