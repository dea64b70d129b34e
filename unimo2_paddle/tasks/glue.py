"""GLUE: one sentence or two to a class or a score, with the text side alone (UNIMO-2, Table 3; UNIMO, Table 2).

The text goes as ``[CLS] a [SEP]`` or ``[CLS] a [SEP] b [SEP]`` through the text encoder and, with its grounded tokens, the grounded
encoder (UNIMO: through its one encoder); the head reads the relu pooler of its first text token (reference: unimo2.md section 1.5,
unimo1.md sections 3.1 and 5.1).
"""
import os
from dataclasses import dataclass, field
from typing import List

import numpy as np
import paddle.nn.functional as F

from unimo2_paddle.data.collate import FIRST_POSITION, text_arrays
from unimo2_paddle.data.formats.glue import GLUE, glue_file, read_glue, read_submission, submission_lines
from unimo2_paddle.data.tokenizer import Tokenizer
from unimo2_paddle.errors import ConfigError, DataError
from unimo2_paddle.metrics import glue as metrics
from unimo2_paddle.models.configuration import Unimo2Config, UnimoConfig
from unimo2_paddle.tasks.base import Task, check_vocabulary
from unimo2_paddle.tasks.classification import ClassificationEvaluator, ClassificationTask, build_classifier, classifier_logits
from unimo2_paddle.tasks.finetune import FinetuneEval, FinetuneTrain, softmax
from unimo2_paddle.tasks.reporting import write_text


@dataclass
class GlueData:
    """Group ``data``.

    ``dataset``: sst2, mnli, cola or stsb. ``directory``: its folder of TSV files, official or the authors'. ``vocab``: folder of the
    three vocabulary files. ``max_text_len``: tokens with [CLS] and [SEP]; longer pairs lose the end of their longer text.
    ``labels``: class names in the order of the numbers, for files that label with numbers in another order than ours.
    ``answers``: folder of the test answers in the server's format, for data whose test labels are known (the demo's).
    """

    dataset: str
    directory: str
    vocab: str
    max_text_len: int = 512
    labels: List[str] = field(default_factory=list)
    answers: str = ""
    num_workers: int = 0

    def problems(self):
        found = [f"{key}: is empty; give a path" for key in ("directory", "vocab") if not getattr(self, key)]
        if self.dataset not in GLUE:
            return found + [f"dataset: {self.dataset!r} is not one of {', '.join(GLUE)}"]
        if self.labels and sorted(self.labels) != sorted(GLUE[self.dataset].labels):
            found.append(f"labels: {', '.join(self.labels)} must be {', '.join(GLUE[self.dataset].labels) or 'empty (a score has no classes)'} "
                         "in the order of their numbers")
        if self.max_text_len < 5:
            found.append(f"max_text_len: must be at least 5 ([CLS] a [SEP] b [SEP]), is {self.max_text_len}")
        if self.num_workers < 0:
            found.append(f"num_workers: must be at least 0, is {self.num_workers}")
        return found

    def class_names(self):
        """Class names in the order of the head's outputs; empty for a score."""
        return list(self.labels or GLUE[self.dataset].labels)


@dataclass
class GlueTrain(FinetuneTrain):
    """Group ``train``; ``dropout`` is the head's."""

    dropout: float = 0.1

    def problems(self):
        return super().problems() + ([] if 0 <= self.dropout < 1 else [f"dropout: must be in [0, 1), is {self.dropout}"])


def encode_text(tokenizer, text_a, text_b, max_len):
    """Ids of ``[CLS] a [SEP]`` or, with ``text_b`` not ``None``, ``[CLS] a [SEP] b [SEP]``, cut to ``max_len``.

    A pair that is too long loses tokens from the end of whichever text is longer at that moment (of equals the second).
    """
    a, b = tokenizer.encode(text_a), None if text_b is None else tokenizer.encode(text_b)
    if b is None:
        return [tokenizer.cls_id, *a[: max_len - 2], tokenizer.sep_id]
    room = max_len - 3
    if len(a) + len(b) > room:
        keep_a, keep_b = len(a), len(b)
        while keep_a + keep_b > room:
            if keep_a > keep_b:
                keep_a -= 1
            else:
                keep_b -= 1
        a, b = a[:keep_a], b[:keep_b]
    return [tokenizer.cls_id, *a, tokenizer.sep_id, *b, tokenizer.sep_id]


class GlueDataset:
    """The sentences of one file; tokenised when asked for, so that MNLI's 393,000 pairs cost no memory twice.

    Attributes: ``records``; ``labels``: numpy ``[N]`` (int64, or float32 scores), or ``None`` for a test file.
    """

    def __init__(self, records, tokenizer, max_len):
        self.records, self.tokenizer, self.max_len = records, tokenizer, max_len
        labels = [record.label for record in records]
        self.labels = None if labels[:1] == [None] else np.array(labels, dtype="float32" if any(isinstance(v, float) for v in labels) else "int64")

    def __len__(self):
        return len(self.records)

    def sample(self, index, rng):
        """Token ids and label of a sentence; ``rng`` is not needed."""
        record = self.records[index]
        return encode_text(self.tokenizer, record.text_a, record.text_b, self.max_len), record.label


class GlueEvaluator(ClassificationEvaluator):
    """Scores a labelled part, or only predicts an unlabelled one; ``submission`` adds the server's file to the report.

    Args:
        name, dataset, collate, batch_size, every_steps: as in ``ClassificationEvaluator``.
        data: the task's :class:`GlueData`; metric_names: of ``metrics.glue.METRICS``; submission: file name for the server, or "".
    """

    def __init__(self, name, dataset, collate, data, metric_names, batch_size, every_steps, submission=""):
        super().__init__(name, dataset, collate, self._score, self._explain, batch_size, every_steps, self._tables)
        self.data, self.metric_names, self.submission = data, metric_names, submission
        self.names = data.class_names()

    def predictions(self, logits):
        """Class numbers or scores ``[N]`` of logits ``[N, C]``."""
        return logits.argmax(axis=1) if self.names else logits[:, 0]

    def baselines(self):
        """What knowing no sentence reaches, by name (percent): the most frequent class; for scores the correlation with shared words."""
        if self.dataset.labels is None:
            return {}
        if self.names:
            return {"majority accuracy": metrics.majority_accuracy(self.dataset.labels)}
        shared = [metrics.shared_words(r.text_a, r.text_b) for r in self.dataset.records]
        return {"constant score pearson": 0.0, "shared words pearson": metrics.pearson(shared, self.dataset.labels),
                "shared words spearman": metrics.spearman(shared, self.dataset.labels)}

    def table(self):
        """The last run as text for the screen: metrics, then baselines."""
        rows = [*self.metrics.items(), *(("baseline: " + name, value) for name, value in self.baselines().items())]
        if not rows:
            return f"{self.name}: {len(self.dataset)} sentences without labels: predictions only"
        width = max(len(name) for name, _ in rows)
        return "\n".join([f"{self.name}: {len(self.dataset)} sentences"] + [f"  {name:<{width}}  {value:6.2f}" for name, value in rows])

    def write_report(self, directory):
        """The reports of every classifier, and the server's file when this is a test part."""
        super().write_report(directory)
        if self.submission:
            folder = os.path.join(directory, "submission")
            os.makedirs(folder, exist_ok=True)
            indices = [record.index for record in self.dataset.records]
            write_text(os.path.join(folder, self.submission),
                       submission_lines(self.data.dataset, indices, self.predictions(self.logits), self.names))

    def _score(self, logits, dataset):
        return {} if dataset.labels is None else metrics.glue_metrics(self.metric_names, self.predictions(logits), dataset.labels)

    def _explain(self, logits, dataset):
        rows, scores = [], softmax(logits) if self.names else logits
        labels = [None] * len(dataset) if dataset.labels is None else dataset.labels.tolist()
        for record, label, prediction, score in zip(dataset.records, labels, self.predictions(logits).tolist(), scores):
            row = {"index": record.index, "text_a": record.text_a, **({} if record.text_b is None else {"text_b": record.text_b})}
            row["prediction"] = self.names[prediction] if self.names else round(prediction, 4)
            if self.names:
                row["probabilities"] = {name: round(float(p), 4) for name, p in zip(self.names, score)}
            if label is not None:
                row["label"] = self.names[label] if self.names else round(label, 4)
            # a score counts as right within half a point of five; without labels nothing is known to be wrong
            row["correct"] = label is None or (prediction == label if self.names else abs(prediction - label) <= 0.5)
            rows.append(row)
        return rows

    def _tables(self, logits, dataset):
        tables = [("Baselines", ["baseline", "value"], [[name, f"{value:.2f}"] for name, value in self.baselines().items()])]
        if self.names and dataset.labels is not None:
            counts = np.zeros((len(self.names), len(self.names)), dtype="int64")
            np.add.at(counts, (dataset.labels, self.predictions(logits)), 1)
            tables.append(("Confusion (rows: truth, columns: prediction)", ["", *self.names],
                           [[name, *row] for name, row in zip(self.names, counts.tolist())]))
        return tables


class GlueTask(ClassificationTask):
    """SST-2, MNLI, CoLA (classes) or STS-B (a score)."""

    inputs = "text"
    systems = (Unimo2Config, UnimoConfig)
    sections = {**Task.sections, "data": GlueData, "train": GlueTrain, "eval": FinetuneEval}

    def __init__(self, config):
        super().__init__(config)
        self.data = config.data
        self.tokenizer = Tokenizer.from_directory(self.data.vocab)
        self.model_config = config.model.model_config()
        check_vocabulary(self.tokenizer, self.model_config, self.data.vocab)
        longest = self.model_config.text_max_position_embeddings - FIRST_POSITION
        if self.data.max_text_len > longest:
            raise ConfigError(f"data.max_text_len: is {self.data.max_text_len}, the model has positions for {longest} tokens")

    @property
    def selection(self):
        """The part that judges during training: MNLI's matched one; the metric is the authors'."""
        name = self.config.eval.split + ("_matched" if self.data.dataset == "mnli" else "")
        return f"{name}/{metrics.SELECTION[self.data.dataset]}"

    def num_labels(self):
        return len(self.data.class_names()) or 1

    def build_model(self):
        config = self.config
        return build_classifier(config.model, config.run.seed, self.model_config, self.inputs, self.num_labels(), config.train.dropout,
                                new_head=self.is_training())

    def dataset(self, split):
        """The sentences of ``split``, or of ``split:part`` (``val:matched``)."""
        split, _, part = split.partition(":")
        path = glue_file(self.data.directory, self.data.dataset, split, part)
        records = read_glue(path, self.data.dataset, self.data.labels)
        if split == "train" and records[0].label is None:
            raise DataError(f"{path}: the training sentences have no labels")
        return GlueDataset(records, self.tokenizer, self.data.max_text_len)

    def collate(self, samples):
        """Padded text arrays, and ``label`` (int64 or float32 ``[B]``) where there are labels."""
        batch = text_arrays([ids for ids, _ in samples], self.tokenizer.pad_id)
        if samples[0][1] is not None:
            batch["label"] = np.array([label for _, label in samples], dtype="int64" if self.data.class_names() else "float32")
        return batch

    def loss(self, model, batch):
        """Cross entropy, or for scores the mean squared error on the raw 0 to 5."""
        logits = classifier_logits(model, batch)
        if self.data.class_names():
            return {"loss": F.cross_entropy(logits, batch["label"])}
        return {"loss": F.mse_loss(logits.squeeze(-1), batch["label"])}

    def evaluators(self):
        """One per part of ``eval.split``: both of MNLI's development sets, and with its test sets the diagnostic AX when it is there."""
        settings, spec = self.config.eval, GLUE[self.data.dataset]
        found = []
        for part in spec.parts.get(settings.split, [""]):
            if glue_file(self.data.directory, self.data.dataset, settings.split, part) is None:
                continue
            dataset = self.split(f"{settings.split}:{part}")
            names = metrics.METRICS["ax" if part == "ax" else self.data.dataset]
            submission = spec.submissions[part][0] if settings.split == "test" else ""
            if submission and self.data.answers and dataset.labels is None:
                self._add_answers(dataset, os.path.join(self.data.answers, submission))
            found.append(GlueEvaluator("_".join(filter(None, (settings.split, part))), dataset, self.collate, self.data, names,
                                       settings.batch_size, self.evaluate_every(), submission))
        return found

    def _add_answers(self, dataset, path):
        answers = read_submission(path, self.data.dataset)
        missing = [record.index for record in dataset.records if record.index not in answers]
        if missing:
            raise DataError(f"{path}: no answer for test sentence {missing[0]}; data.answers must belong to data.directory")
        names, own = GLUE[self.data.dataset].labels, self.data.class_names()
        values = [answers[record.index] for record in dataset.records]
        dataset.labels = np.array([own.index(names[v]) for v in values], dtype="int64") if own else np.array(values, dtype="float32")

    def description(self):
        data = self.data
        return {"dataset": data.dataset, "labels": data.class_names(), "max_text_len": data.max_text_len, "pair": GLUE[data.dataset].pair}
