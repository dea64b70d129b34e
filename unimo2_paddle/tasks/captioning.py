"""Image captioning: label-smoothed training in the ``caption`` layout, CIDEr-optimised second stage, beam search, COCO metrics
(UNIMO-2, Table 1; UNIMO, Table 1, adversarial training there; reference: unimo2.md section 1.6, unimo1.md section 5.3)."""
import dataclasses
import os
from dataclasses import dataclass, field

import numpy as np
import paddle
import paddle.nn.functional as F

from unimo2_paddle.data.formats.coco_captions import result_rows
from unimo2_paddle.data.tokenizer import Tokenizer
from unimo2_paddle.metrics.caption import CiderD, caption_metrics, java_metrics
from unimo2_paddle.metrics.ptb import caption_tokens
from unimo2_paddle.models.adversarial import AdversarialConfig
from unimo2_paddle.models.configuration import Unimo2Config, UnimoConfig
from unimo2_paddle.models.generation import FIRST_POSITION, Decoding
from unimo2_paddle.models.losses import smoothed_cross_entropy
from unimo2_paddle.models.parallel import mean_over_all
from unimo2_paddle.models.transformer import length
from unimo2_paddle.tasks.adversarial import adversarial_problems, adversarial_terms
from unimo2_paddle.tasks.base import Task, build_backbone, check_vocabulary, to_tensors
from unimo2_paddle.tasks.captioners import captioner_of
from unimo2_paddle.tasks.captioning_data import CaptionDataset, CaptioningData, picture_arrays
from unimo2_paddle.tasks.finetune import FinetuneEval, FinetuneTask, FinetuneTrain, batches_of
from unimo2_paddle.tasks.reporting import right_and_wrong, write_html_report, write_json, write_predictions
from unimo2_paddle.tasks.retrieval_scoring import evaluation_mode
from unimo2_paddle.tasks.unimo_inputs import mismatch, open_regions, stored_limit
from unimo2_paddle.tasks.work import caption_work

_END = "[end]"  # counts as a word in rewards: else nothing rewards a caption for ending where it should


@dataclass
class CaptioningTrain(FinetuneTrain):
    """Group ``train``. ``scst``: optimise CIDEr-D instead (second stage, from a trained captioner): the reward of ``scst_samples`` drawn
    captions per picture above a baseline; a sample is then a picture, not a caption. ``scst_baseline``: ``greedy`` is the reward of the
    greedy caption (the original method), ``others`` the mean of the picture's other drawn captions, which needs no greedy search and
    has less variance where drawn captions are much worse than the greedy one.
    """

    label_smoothing: float = 0.1
    scst: bool = False
    scst_samples: int = 5
    scst_temperature: float = 1.0
    scst_baseline: str = "greedy"

    def problems(self):
        found = super().problems()
        if not 0 <= self.label_smoothing < 1:
            found.append(f"label_smoothing: must be in [0, 1), is {self.label_smoothing}")
        if self.scst_samples < 1:
            found.append(f"scst_samples: must be at least 1, is {self.scst_samples}")
        if self.scst_baseline not in ("greedy", "others"):
            found.append(f"scst_baseline: {self.scst_baseline!r} is not one of greedy, others")
        if self.scst and self.scst_baseline == "others" and self.scst_samples < 2:
            found.append("scst_samples: the baseline others needs at least 2")
        if self.scst_temperature <= 0:
            found.append(f"scst_temperature: must be above 0, is {self.scst_temperature}")
        return found


@dataclass
class CaptioningEval(FinetuneEval):
    """Group ``eval``. ``max_images``: the first ones of the split (0: all). ``neighbours``: also judge captions copied from so many most
    similar training pictures (0: no); the visual encoder of the model being evaluated finds them. ``java_metrics``: METEOR and SPICE
    in ``unimo2 eval`` where they are installed."""

    batch_size: int = 32
    max_images: int = 0
    neighbours: int = 0
    java_metrics: bool = True
    decoding: Decoding = field(default_factory=Decoding)

    def problems(self):
        return super().problems() + [f"{key}: must be at least 0, is {getattr(self, key)}" for key in ("max_images", "neighbours")
                                     if getattr(self, key) < 0]


class CaptioningTask(FinetuneTask):
    """Finetune and judge a captioner."""

    sections = {**Task.sections, "data": CaptioningData, "train": CaptioningTrain, "eval": CaptioningEval, "adversarial": AdversarialConfig}
    systems = (Unimo2Config, UnimoConfig)

    def __init__(self, config):
        super().__init__(config)
        self.selection = f"{config.eval.split}/cider"
        self.model_config = config.model.model_config()
        self.tokenizer = Tokenizer.from_directory(config.data.vocab)
        check_vocabulary(self.tokenizer, self.model_config, config.data.vocab)
        self.captioner = captioner_of(self.model_config)
        self._rewards = None

    @classmethod
    def check(cls, config):
        found = adversarial_problems(config)
        if config.train.scst and config.adversarial.adv_type != "none":
            found.append("adversarial.adv_type: perturbs cross-entropy training; with train.scst set none")
        if config.train.scst and config.run.graph == "static":
            found.append("train.scst: draws captions step by step, which a static Program cannot; set run.graph: dynamic")
        if not config.model.config and not os.path.exists(config.model.init_path):
            return found  # the checkpoint is still to be made
        found += [told for told in [mismatch(config.data, config.model.model_config())] if told]
        limit = config.model.model_config().text_max_position_embeddings - FIRST_POSITION
        for group, key, value in (("data", "max_text_len", config.data.max_text_len),
                                  ("eval.decoding", "max_length", config.eval.decoding.max_length),
                                  ("data", "max_objects", config.data.max_objects if config.data.objects else 0)):
            if value > limit:
                found.append(f"{group}.{key}: {value} tokens, but the model has positions for {limit}")
        return found

    def build_model(self):
        section = self.config.model
        # the authors' captioning program has no contrastive temperature, so a captioner of theirs lacks it
        section = dataclasses.replace(section, allow_missing=[*section.allow_missing, "cmcl_temperature"])
        return build_backbone(section, self.config.run.seed, self.model_config, heads=("masked_lm",))

    def dataset(self, split):
        by_caption, config = split == "train" and not self.config.train.scst, self.model_config
        return CaptionDataset.read(self.config.data, self.tokenizer, getattr(config, "image_size", 0), split, by_caption,
                                   0 if split == "train" else self.config.eval.max_images, open_regions(self.config.data, config, split))

    def collate(self, samples):
        arrays = picture_arrays(samples, self.tokenizer.pad_id, self.config.data.max_regions or None)
        if samples[0]["caption"] is not None:
            tags = None if samples[0]["tags"] is None else [s["tags"] for s in samples]
            arrays.update(self.captioner.targets([s["caption"] for s in samples], tags, self.tokenizer.pad_id))
        return arrays

    def work(self, batch):
        tokens, flops = caption_work(self.model_config, batch)
        return tokens, flops * self.config.adversarial.passes

    def description(self):
        return {"decoding": dataclasses.asdict(self.config.eval.decoding), "object_tags": bool(self.config.data.objects),
                **stored_limit(self.config.data)}

    def loss(self, model, batch):
        """Label-smoothed cross entropy per caption token, over perturbed inputs where the group ``adversarial`` asks for it, or with ``scst``
        the self-critical loss."""
        if self.config.train.scst:
            return self._self_critical(model, batch)
        labels, encoded = batch["labels"], self.captioner.encode(model, batch)
        count, settings = length(labels), self.config.adversarial

        def cross_entropy(logits):
            losses = smoothed_cross_entropy(logits, labels, self.config.train.label_smoothing, reduction="none")
            return mean_over_all(losses.sum(), count)

        if settings.adv_type == "none":
            logits = self.captioner.logits(model, encoded, batch)
            terms = {"loss": cross_entropy(logits)}
        else:
            terms, logits = adversarial_terms(model, lambda **deltas: self.captioner.logits(model, encoded, batch, **deltas), cross_entropy,
                                              batch, settings)
        if logits is not None:
            hits = (logits.argmax(axis=-1) == labels).astype("float32")
            terms["token_accuracy"] = mean_over_all(hits.sum(), count).detach()
        return terms

    def _self_critical(self, model, batch):
        """-(reward of a drawn caption - baseline) x log-probability of its tokens, per token."""
        train, tokenizer = self.config.train, self.tokenizer
        decoding = dataclasses.replace(self.config.eval.decoding, min_length=0, block_trigrams=False, temperature=train.scst_temperature)
        samples = train.scst_samples
        methods = ("sample", "greedy") if train.scst_baseline == "greedy" else ("sample",)
        with evaluation_mode(model):
            drawn, *greedy = (self.captioner.generate(model, batch, tokenizer, dataclasses.replace(decoding, method=method, samples=samples))
                              for method in methods)
        pictures, terms = batch["picture"].numpy().tolist(), {}
        rewards = np.array([[self._reward(picture, h) for h in own] for picture, own in zip(pictures, drawn)])
        if greedy:
            baseline = np.array([[self._reward(picture, own[0])] for picture, own in zip(pictures, greedy[0])])
            terms["greedy_reward"] = paddle.to_tensor(float(baseline.mean()))
        else:
            baseline = (rewards.sum(axis=1, keepdims=True) - rewards) / (samples - 1)
        advantage = (rewards - baseline).reshape(-1)
        captions = [h.ids for own in drawn for h in own]
        tag_lists = None
        if "tag_ids" in batch:
            lists = [row[:int(count)] for row, count in zip(batch["tag_ids"].numpy().tolist(), batch["tag_mask"].sum(axis=1).numpy())]
            tag_lists = [ids for ids in lists for _ in range(samples)]
        text = to_tensors(self.captioner.targets(captions, tag_lists, tokenizer.pad_id))
        encoded = {name: paddle.repeat_interleave(value, samples, axis=0) for name, value in self.captioner.encode(model, batch).items()}
        losses = F.cross_entropy(self.captioner.logits(model, encoded, text), text["labels"], reduction="none").reshape([-1])
        weights = np.repeat(advantage, [len(ids) - 1 for ids in captions]).astype("float32")
        return {"loss": mean_over_all((losses * paddle.to_tensor(weights)).sum(), len(weights)),
                "reward": paddle.to_tensor(float(rewards.mean())), **terms}

    def _reward(self, picture, hypothesis):
        """CIDEr-D of a caption against the training references of its picture."""
        if self._rewards is None:
            self._rewards = _Rewards(self.split("train"))
        words = caption_tokens(self.tokenizer.decode(hypothesis.ids))
        return self._rewards(picture, words + [_END] if hypothesis.finished(self.tokenizer.sep_id) else words)

    def evaluators(self):
        settings, split = self.config.eval, self.config.eval.split
        word_starts = self.tokenizer.word_start_table() if settings.decoding.block_trigrams else None
        found = [CaptionEvaluator(split, self.split(split), self.collate, settings, self.captioner, self.evaluate_every(), word_starts)]
        if settings.neighbours:
            found.append(NeighbourEvaluator(self.split(split), self.split("train"), self.collate, settings, self.captioner))
        return found


class _Rewards:
    """CIDEr-D against the references of training pictures, document frequencies from all of them."""

    def __init__(self, dataset):
        self.references = [[caption_tokens(text) + [_END] for text in dataset.references(i)] for i in range(len(dataset.images))]
        self.cider, self._vectors = CiderD(self.references), {}

    def __call__(self, picture, tokens):
        if picture not in self._vectors:
            self._vectors[picture] = [self.cider.vector(own) for own in self.references[picture]]
        return self.cider.score(tokens, self._vectors[picture])


class _CaptionReport:
    """Metrics, table and files of captions; subclasses make the captions in ``run``."""

    def __init__(self, name, dataset, settings, every_steps=0):
        self.name, self.dataset, self.settings, self.every_steps = name, dataset, settings, every_steps
        self.references = [dataset.references(i) for i in range(len(dataset.images))]
        self.captions = self.scores = self.metrics = self.cider = None
        self.notes = []

    def judge(self, captions, scores):
        """Keep the captions of all pictures and compute the metrics (empty when the split has no references)."""
        self.captions, self.scores, self.metrics, self.notes = captions, scores, {}, []
        if not all(self.references):
            self.notes = ["no references in this split: captions were written, nothing was measured"]
            return dict(self.metrics)
        self.metrics, self.cider = caption_metrics(captions, self.references)
        domains = [image.domain for image in self.dataset.images]
        for domain in sorted(set(domains) - {""}):  # NoCaps is reported per domain
            rows = [i for i, own in enumerate(domains) if own == domain]
            part = caption_metrics([captions[i] for i in rows], [self.references[i] for i in rows])[0]
            self.metrics.update({f"{key}_{domain}": part[key] for key in ("bleu_4", "cider")})
        return dict(self.metrics)

    def _add_java(self):
        if self.settings.java_metrics and self.metrics and not self.notes:
            scores, self.notes = java_metrics(self.captions, self.references)
            self.metrics.update(scores)
            self.notes = self.notes or [f"{', '.join(scores)}: by their Java programs"]

    def table(self):
        """The last run as text for the screen."""
        self._add_java()
        lines = [f"{self.name}: {len(self.captions)} pictures"] + [f"  {name:<20}{value:8.4f}" for name, value in self.metrics.items()]
        return "\n".join(lines + [f"  ({note})" for note in self.notes])

    def write_report(self, directory):
        """``<name>.jsonl`` (captions, references, scores), ``<name>.json`` (metrics), ``<name>.html`` and, where ids are numbers,
        ``captions_<name>_results.json`` in the COCO server's format."""
        self._add_java()
        rows = []
        for i, caption in enumerate(self.captions):
            image_id, path = self.dataset.name(i)
            row = {"image_id": image_id, "image": path, "caption": caption, "score": self.scores[i], "references": self.references[i]}
            if self.metrics:
                row.update(cider=float(self.cider[i]), correct=bool(self.cider[i] >= self.cider.mean()))
            rows.append(row)
        write_predictions(os.path.join(directory, f"{self.name}.jsonl"), rows)
        write_json(os.path.join(directory, f"{self.name}.json"), self.metrics)
        if all(row["image_id"].isdigit() for row in rows):
            results = result_rows([row["image_id"] for row in rows], self.captions)
            write_json(os.path.join(directory, f"captions_{self.name}_results.json"), results)
        write_html_report(os.path.join(directory, f"{self.name}.html"), f"Captions, {self.name}", self.metrics,
                          right_and_wrong([{"correct": True, **row} for row in rows]),
                          notes=["Under Right: captions whose CIDEr is at least the mean.", *self.notes])


class CaptionEvaluator(_CaptionReport):
    """Captions every picture of a split by ``settings.decoding`` and scores them.

    Args:
        name: what the metrics are reported under; dataset: the split (samples are pictures); collate: its batching.
        settings: :class:`CaptioningEval`; captioner: of the model's system; word_starts: see :func:`models.generation.generate`.
    """

    def __init__(self, name, dataset, collate, settings, captioner, every_steps=0, word_starts=None):
        super().__init__(name, dataset, settings, every_steps)
        self.collate, self.captioner, self.word_starts = collate, captioner, word_starts

    def run(self, model):
        """Metrics of ``model`` on the split; the model's mode is restored."""
        captions, scores, tokenizer = [], [], self.dataset.tokenizer
        with evaluation_mode(model):
            for _, batch in batches_of(self.dataset, self.collate, self.settings.batch_size):
                found = self.captioner.generate(model, to_tensors(batch), tokenizer, self.settings.decoding, self.word_starts)
                captions += [tokenizer.decode(own[0].ids).strip() for own in found]
                scores += [own[0].scores[-1] for own in found]
        return self.judge(captions, scores)


class NeighbourEvaluator(_CaptionReport):
    """A baseline: the caption of the most similar training pictures, chosen as the one the others agree with most.

    Similarity is the product of the captioner's features (UNIMO-2: contrastive ones).
    """

    def __init__(self, dataset, train, collate, settings, captioner):
        super().__init__("nearest_neighbour", dataset, settings)
        self.train, self.collate, self.captioner = train, collate, captioner

    def run(self, model):
        """Metrics of the copied captions; ``model`` only finds the neighbours."""
        with evaluation_mode(model):
            candidates, queries = (self._features(model, dataset.alone()) for dataset in (self.train, self.dataset))
        similarity = queries @ candidates.T
        cider = CiderD([[caption_tokens(text) for text in self.train.references(i)] for i in range(len(self.train.images))])
        captions, scores = [], []
        for row in similarity:
            nearest = np.argsort(-row, kind="stable")[:self.settings.neighbours]
            captions.append(consensus([text for i in nearest for text in self.train.references(int(i))], cider))
            scores.append(float(row[nearest[0]]))
        return self.judge(captions, scores)

    def _features(self, model, dataset):
        parts = []
        for _, batch in batches_of(dataset, self.collate, self.settings.batch_size):
            parts.append(self.captioner.features(model, to_tensors(batch)).numpy())
        return np.concatenate(parts)


def consensus(captions, cider):
    """The caption that agrees most with the others by CIDEr-D (the first of equals); ``cider`` brings the document frequencies."""
    tokens = [caption_tokens(text) for text in captions]
    vectors = [cider.vector(own) for own in tokens]
    agreement = [cider.score(own, vectors[:i] + vectors[i + 1:] or [vectors[i]]) for i, own in enumerate(tokens)]
    return captions[int(np.argmax(agreement))]
