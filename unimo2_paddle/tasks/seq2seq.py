"""Text generation from text: summaries, headlines, questions, answers in a dialogue (UNIMO, Table 2).

One encoder reads the source in both directions and writes the target from left to right; the loss is label-smoothed cross entropy
per target token. UNIMO-2 does the same with its text side: its grounded tokens are chosen by the source alone.
"""
import dataclasses
import os
from dataclasses import dataclass, field

import paddle

from unimo2_paddle.data.collate import FIRST_POSITION
from unimo2_paddle.data.formats.seq2seq import SEQ2SEQ
from unimo2_paddle.data.tokenizer import Tokenizer
from unimo2_paddle.metrics.text_generation import SELECTION, baseline_texts, meteor, text_metrics
from unimo2_paddle.models.configuration import Unimo2Config, UnimoConfig
from unimo2_paddle.models.generation import Decoding, generate, generate_from_prefix
from unimo2_paddle.models.losses import smoothed_cross_entropy
from unimo2_paddle.models.parallel import global_share
from unimo2_paddle.models.unimo import UnimoModel
from unimo2_paddle.tasks.base import Task, build_backbone, check_vocabulary, to_tensors
from unimo2_paddle.tasks.finetune import FinetuneEval, FinetuneTask, FinetuneTrain, batches_of
from unimo2_paddle.tasks.reporting import right_and_wrong, write_html_report, write_json, write_predictions, write_text
from unimo2_paddle.tasks.retrieval_scoring import evaluation_mode
from unimo2_paddle.tasks.seq2seq_data import Seq2SeqData, Seq2SeqDataset, max_turns, source_arrays, training_arrays
from unimo2_paddle.tasks.work import seq2seq_work

TEXT_INPUTS = ("input_ids", "position_ids", "text_mask", "role_ids", "turn_ids")
DIALOG_TABLES = ("role_embedding", "turn_embedding")  # new in finetuning: no pre-training has them


@dataclass
class Seq2SeqTrain(FinetuneTrain):
    """Group ``train``."""

    label_smoothing: float = 0.1

    def problems(self):
        return super().problems() + ([] if 0 <= self.label_smoothing < 1 else [f"label_smoothing: must be in [0, 1), is {self.label_smoothing}"])


@dataclass
class Seq2SeqEval(FinetuneEval):
    """Group ``eval``. ``max_records``: the first ones of the split (0: all). ``stem``: Porter's stemmer in ROUGE. ``java_metrics``: METEOR of
    questions in ``unimo2 eval`` where Java and its program are installed."""

    batch_size: int = 32
    max_records: int = 0
    stem: bool = True
    java_metrics: bool = True
    decoding: Decoding = field(default_factory=Decoding)

    def problems(self):
        return super().problems() + ([] if self.max_records >= 0 else [f"max_records: must be at least 0, is {self.max_records}"])


def word_logits(model, batch):
    """Vocabulary logits ``[N, V]`` at ``predict_from`` of a batch of ``training_arrays``, by either system."""
    inputs = {key: batch[key] for key in TEXT_INPUTS if key in batch}
    if isinstance(model, UnimoModel):
        states = model(**inputs).text_states
    else:
        mask = inputs["text_mask"]
        states = model.fuse(None, model.encode_text(**inputs), mask, with_grounding_loss=False).fused_text
    return model.mlm_logits(paddle.index_select(states.reshape([-1, states.shape[-1]]), batch["predict_from"]))


def write_texts(model, batch, tokenizer, decoding, word_starts=None):
    """Hypotheses per record, best first, after a batch of ``source_arrays``, by either system."""
    inputs = {key: batch[key] for key in TEXT_INPUTS if key in batch}
    if isinstance(model, UnimoModel):
        return generate_from_prefix(model, inputs, tokenizer.cls_id, tokenizer.mask_id, decoding, word_starts)
    source = inputs["input_ids"], inputs["position_ids"], inputs["text_mask"]
    return generate(model, None, tokenizer.cls_id, tokenizer.mask_id, decoding, source, word_starts)


def hypothesis_text(hypothesis, tokenizer):
    """The text of a hypothesis: no special tokens, single blanks."""
    return " ".join(tokenizer.decode(hypothesis.ids).split())


class Seq2SeqTask(FinetuneTask):
    """Finetune and judge a generator of texts."""

    systems = (Unimo2Config, UnimoConfig)
    sections = {**Task.sections, "data": Seq2SeqData, "train": Seq2SeqTrain, "eval": Seq2SeqEval}

    def __init__(self, config):
        super().__init__(config)
        self.spec = SEQ2SEQ[config.data.dataset]
        self.selection = f"{config.eval.split}/{SELECTION[self.spec.kind]}"
        self.model_config = config.model.model_config()
        self.tokenizer = Tokenizer.from_directory(config.data.vocab)
        check_vocabulary(self.tokenizer, self.model_config, config.data.vocab)
        self.roles = getattr(self.model_config, "dialog", False)

    @classmethod
    def check(cls, config):
        if not config.model.config and not os.path.exists(os.path.join(config.model.init_path, "config.json")):
            return []  # the checkpoint is still to be made
        model, spec = config.model.model_config(), SEQ2SEQ[config.data.dataset]
        limit = model.text_max_position_embeddings - FIRST_POSITION
        found = [f"{group}.{key}: {value} tokens, but the model has positions for {limit}" for group, key, value in (
            ("data", "max_source_len", config.data.max_source_len), ("data", "max_target_len", config.data.max_target_len),
            ("eval.decoding", "max_length", config.eval.decoding.max_length)) if value > limit]
        if isinstance(model, UnimoConfig):
            if spec.dialog and (model.role_type_size < 3 or model.turn_type_size < 2):
                found.append(f"model.role_type_size: {spec.title} is a dialogue, which needs role_type_size 3 and turn_type_size 16")
            if model.dialog and not spec.dialog:
                found.append(f"model.role_type_size: {spec.title} is no dialogue; leave role_type_size and turn_type_size out")
        return found

    def build_model(self):
        tables = DIALOG_TABLES if self.is_training() else ()
        return build_backbone(self.config.model, self.config.run.seed, self.model_config, vision=False, heads=("masked_lm",), head_patterns=tables)

    def dataset(self, split):
        return Seq2SeqDataset(self.config.data, self.tokenizer, split, max_turns(self.model_config), 0 if split == "train" else self.config.eval.max_records)

    def collate(self, samples):
        """Sources and targets for training; sources alone in evaluation."""
        sources, targets = zip(*samples)
        if targets[0] is None:
            return source_arrays(sources, self.tokenizer.pad_id, self.roles)
        return training_arrays(sources, targets, self.tokenizer.pad_id, self.roles)

    def work(self, batch):
        return seq2seq_work(self.model_config, batch)

    def loss(self, model, batch):
        """Label-smoothed cross entropy per target token."""
        logits = word_logits(model, batch)
        share = global_share(batch["labels"].shape[0])
        losses = smoothed_cross_entropy(logits, batch["labels"], self.config.train.label_smoothing, reduction="none")
        hits = (logits.argmax(axis=-1) == batch["labels"]).astype("float32")
        return {"loss": losses.sum() / share, "token_accuracy": (hits.sum() / share).detach()}

    def evaluators(self):
        settings = self.config.eval
        word_starts = self.tokenizer.word_start_table() if settings.decoding.block_trigrams else None
        return [Seq2SeqEvaluator(settings.split, self.split(settings.split), self.collate, self.spec.kind, settings, self.evaluate_every(), word_starts)]

    def description(self):
        data = self.config.data
        return {"dataset": data.dataset, "max_source_len": data.max_source_len, "dialog": self.spec.dialog,
                "decoding": dataclasses.asdict(self.config.eval.decoding)}


class Seq2SeqEvaluator:
    """Writes a text for every record of a split and judges it.

    Args:
        name: what the metrics are reported under; dataset, collate: the split and its batching; kind: of ``text_metrics``.
        settings: :class:`Seq2SeqEval`; every_steps: as in ``FinetuneEval``; word_starts: see ``generate_from_prefix``.
    """

    def __init__(self, name, dataset, collate, kind, settings, every_steps=0, word_starts=None):
        self.name, self.dataset, self.collate, self.kind, self.settings = name, dataset, collate, kind, settings
        self.every_steps, self.word_starts = every_steps, word_starts
        self.texts = self.scores = self.metrics = self.per_record = self._references = self._baselines = None
        self.notes = []

    def references(self):
        """Texts per record, ``None`` when the split has no targets."""
        if self._references is None and self.dataset.labelled:
            self._references = [self.dataset.references(index) for index in range(len(self.dataset))]
        return self._references

    def run(self, model):
        """Metrics of ``model`` on the split, in percent; the model's mode is restored."""
        self.texts, self.scores, self.metrics, self.notes = [], [], {}, []
        tokenizer = self.dataset.tokenizer
        with evaluation_mode(model):
            for _, batch in batches_of(self.dataset, self.collate, self.settings.batch_size):
                found = write_texts(model, to_tensors(batch), tokenizer, self.settings.decoding, self.word_starts)
                self.texts += [hypothesis_text(own[0], tokenizer) for own in found]
                self.scores += [float(own[0].scores[-1]) for own in found]
        if self.dataset.labelled:
            self.metrics, self.per_record = text_metrics(self.kind, self.texts, self.references(), self.settings.stem)
        else:
            self.notes = ["no targets in this split: texts were written, nothing was measured"]
        return dict(self.metrics)

    def baselines(self):
        """What texts that need no model reach, by name: the selecting metric in percent."""
        if self._baselines is None and self.dataset.labelled:
            texts = baseline_texts([self.dataset.passage(index) for index in range(len(self.dataset))], self.references())
            metric = SELECTION[self.kind]
            self._baselines = {f"{name} {metric}": text_metrics(self.kind, own, self.references(), self.settings.stem)[0][metric]
                               for name, own in texts.items()}
        return dict(self._baselines or {})

    def _add_meteor(self):
        if self.kind == "question" and self.settings.java_metrics and self.metrics and "meteor" not in self.metrics and not self.notes:
            found, self.notes = meteor(self.texts, self.references())
            self.metrics.update(found)

    def table(self):
        """The last run as text for the screen."""
        self._add_meteor()
        rows = [*self.metrics.items(), *(("baseline: " + name, value) for name, value in self.baselines().items())]
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join([f"{self.name}: {len(self.dataset)} records"] + [f"  {name:<{width}}  {value:6.2f}" for name, value in rows]
                         + [f"  ({note})" for note in self.notes])

    def write_report(self, directory):
        """``<name>.jsonl`` (sources, texts, references, scores), ``<name>.json`` (metrics), ``<name>.html``, and ``<name>.txt`` as the authors
        write it: number, tab, text."""
        self._add_meteor()
        rows = []
        for index, (text, score) in enumerate(zip(self.texts, self.scores)):
            row = {**self.dataset.shown(index), "text": text, "score": round(score, 6)}
            if self.metrics:
                row.update(references=self.references()[index], judged=round(float(self.per_record[index]), 2),
                           correct=bool(self.per_record[index] >= self.per_record.mean()))
            rows.append(row)
        write_predictions(os.path.join(directory, f"{self.name}.jsonl"), rows)
        write_json(os.path.join(directory, f"{self.name}.json"), self.metrics)
        write_text(os.path.join(directory, f"{self.name}.txt"), "".join(f"{row['id']}\t{row['text']}\n" for row in rows))
        write_html_report(os.path.join(directory, f"{self.name}.html"), f"Texts, {self.name}", self.metrics,
                          right_and_wrong([{"correct": True, **row} for row in rows]),
                          notes=["Under Right: texts judged at least as good as the mean.", *self.notes],
                          tables=[("Baselines", ["baseline", "value"], [[name, f"{value:.2f}"] for name, value in self.baselines().items()])])
