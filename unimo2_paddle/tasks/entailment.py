"""Visual entailment on SNLI-VE: is a sentence true of a picture, false, or not to be decided (UNIMO-2, Table 1; UNIMO, Table 1)."""
from dataclasses import dataclass

import numpy as np
import paddle.nn.functional as F

from unimo2_paddle.data.formats.snli_ve import LABELS, Hypothesis, read_snli_ve
from unimo2_paddle.data.region_store import RegionStore
from unimo2_paddle.errors import DataError
from unimo2_paddle.metrics.classification import accuracy, class_recalls, confusion_matrix, majority_accuracy
from unimo2_paddle.models.adversarial import AdversarialConfig
from unimo2_paddle.models.configuration import Unimo2Config, UnimoConfig
from unimo2_paddle.tasks.adversarial import adversarial_problems, adversarial_terms
from unimo2_paddle.tasks.classification import ClassificationEvaluator, classifier_inputs, classifier_logits
from unimo2_paddle.tasks.finetune import FinetuneEval, FinetuneTrain, softmax
from unimo2_paddle.tasks.pairs import PairData, PairTask
from unimo2_paddle.tasks.unimo_inputs import stored_limit


@dataclass
class EntailmentData(PairData):
    """Group ``data`` of visual entailment, besides the keys of all pair tasks.

    ``format``: ``snli_ve`` reads ``annotations``, the JSON-lines files with ``{split}`` for train, dev or test ("val" as a split is "dev");
    ``store`` takes hypotheses and labels from the authors' records that were imported with the region features (UNIMO; ``regions`` holds
    ``{split}``). ``image_suffix``: of picture file names.
    """

    annotations: str = ""
    image_suffix: str = ".jpg"
    format: str = "snli_ve"

    def problems(self):
        found = super().problems()
        if self.format not in ("snli_ve", "store"):
            found.append(f"format: {self.format!r} is not one of snli_ve, store")
        elif self.format == "store":
            if "{split}" not in self.regions:
                found.append(f"regions: must contain {{split}}, for example data/snli_ve/regions_{{split}}; is {self.regions!r}")
        elif "{split}" not in self.annotations:
            found.append(f"annotations: must contain {{split}}, for example data/snli_ve/snli_ve_{{split}}.jsonl; is {self.annotations!r}")
        return found

    def file(self, split):
        """The annotation file of a split."""
        return self.annotations.replace("{split}", "dev" if split == "val" else split)


class EntailmentTask(PairTask):
    """Three-way classification of (picture, hypothesis)."""

    sections = {**PairTask.sections, "data": EntailmentData, "train": FinetuneTrain, "eval": FinetuneEval, "adversarial": AdversarialConfig}
    systems = (Unimo2Config, UnimoConfig)

    @classmethod
    def check(cls, config):
        return super().check(config) + adversarial_problems(config)

    def __init__(self, config):
        super().__init__(config)
        self.selection = f"{config.eval.split}/accuracy"

    def num_labels(self):
        return len(LABELS)

    def description(self):
        return {"labels": list(LABELS), "max_text_len": self.config.data.max_text_len,
                "layout": self.config.head.layout, "contrastive": self.config.head.contrastive, **stored_limit(self.config.data)}

    def work(self, batch):
        tokens, flops = super().work(batch)
        return tokens, flops * self.config.adversarial.passes

    def records(self, split):
        """Hypotheses of a split."""
        data = self.config.data
        if data.format == "store":
            return stored_hypotheses(data.regions.replace("{split}", split), self.tokenizer)
        return read_snli_ve(data.file(split), data.images, data.image_suffix, check_pictures=bool(data.images))

    def target(self, record):
        return record.label

    def target_array(self, targets):
        return np.asarray(targets, dtype=np.int64)

    def loss(self, model, batch):
        """Cross entropy, over perturbed inputs where the group ``adversarial`` asks for it."""
        settings, labels = self.config.adversarial, batch["labels"]
        if settings.adv_type == "none":
            logits = classifier_logits(model, batch)
            terms = {"loss": F.cross_entropy(logits, labels)}
        else:
            inputs = classifier_inputs(batch)
            terms, logits = adversarial_terms(model, lambda **deltas: model(**inputs, **deltas), lambda z: F.cross_entropy(z, labels), batch, settings)
        if logits is not None:
            hits = (logits.argmax(axis=1) == labels).astype("float32")
            terms["accuracy"] = 100.0 * hits.mean().detach()
        return terms

    def evaluators(self):
        settings = self.config.eval
        return [EntailmentEvaluator(self, settings)]


def stored_hypotheses(directory, tokenizer):
    """The hypotheses that stood in the same records as the region features of a store.

    Raises:
        DataError: there is no such store, it has no hypotheses, or their token ids are outside the vocabulary.
    """
    found = []
    for row in RegionStore(directory).texts():
        where = f"{directory}: hypothesis {row['text_id']}"
        if row["label"] not in ("0", "1", "2") or not row["token_ids"]:
            raise DataError(f"{where} of image {row['image_id']} has no label 0, 1 or 2 or no tokens; import files of the format entailment")
        if max(row["token_ids"]) >= tokenizer.vocab_size:
            raise DataError(f"{where} has token id {max(row['token_ids'])}, the vocabulary has {tokenizer.vocab_size} entries; data.vocab must be "
                            "the vocabulary these ids were made with")
        found.append(Hypothesis(row["text_id"], row["image_id"], tokenizer.decode(row["token_ids"]).strip(), row["image_id"], int(row["label"]),
                                tuple(row["token_ids"])))
    if not found:
        raise DataError(f"{directory}: holds no hypotheses; import the authors' records with --format entailment, or read data.format=snli_ve")
    return found


class EntailmentEvaluator(ClassificationEvaluator):
    """Accuracy, recall per label and the confusion matrix of a split."""

    def __init__(self, task, settings):
        super().__init__(settings.split, task.split(settings.split), task.collate, self._score, self._explain, settings.batch_size,
                         task.evaluate_every(), self._tables)
        self.matrix = None

    def _score(self, logits, dataset):
        labels, predicted = self._labels(dataset), logits.argmax(axis=1)
        self.matrix = confusion_matrix(predicted, labels, len(LABELS))
        recalls = {f"recall_{name}": float(value) for name, value in zip(LABELS, class_recalls(self.matrix)) if not np.isnan(value)}
        return {"accuracy": accuracy(predicted, labels), **recalls}

    @staticmethod
    def _labels(dataset):
        return np.array([record.label for record in dataset.records])

    def table(self):
        """The last run as text: accuracy, the majority baseline and the confusion matrix."""
        lines = [super().table(), f"  most frequent label (baseline): {majority_accuracy(self._labels(self.dataset)):.2f}",
                 f"  confusion matrix (rows: truth, columns: prediction)\n  {'':<15}" + "".join(f"{name:>15}" for name in LABELS)]
        return "\n".join(lines + [f"  {name:<15}" + "".join(f"{count:>15}" for count in row) for name, row in zip(LABELS, self.matrix)])

    def _explain(self, logits, dataset):
        rows = []
        for record, number, shares in zip(dataset.records, logits.argmax(axis=1), softmax(logits)):
            rows.append({"image": record.path, "pair_id": record.pair_id, "hypothesis": record.text, "label": LABELS[record.label],
                         "prediction": LABELS[number], "scores": {name: round(float(s), 4) for name, s in zip(LABELS, shares)},
                         "correct": bool(number == record.label)})
        return rows

    def _tables(self, logits, dataset):
        return [("Confusion matrix (rows: truth, columns: prediction)", ["", *LABELS],
                 [[name, *map(int, row)] for name, row in zip(LABELS, self.matrix)])]
