"""Classification tasks on the shared classifier: loss, evaluation, predictions (VQA, entailment, GLUE, ImageNet build on it)."""
import os

import numpy as np
import paddle

from unimo2_paddle.models.classifier import Unimo2Classifier, UnimoClassifier
from unimo2_paddle.models.configuration import UnimoConfig
from unimo2_paddle.tasks.base import load_initial, to_tensors
from unimo2_paddle.tasks.finetune import FinetuneTask, batches_of
from unimo2_paddle.tasks.reporting import right_and_wrong, write_html_report, write_json, write_predictions
from unimo2_paddle.tasks.retrieval_scoring import evaluation_mode
from unimo2_paddle.tasks.unimo_inputs import image_inputs
from unimo2_paddle.tasks.work import classifier_work

TEXT_INPUTS = ("input_ids", "position_ids", "text_mask")


def classifier_logits(model, batch):
    """Logits ``[B, C]`` of a batch with a picture (pixels or regions) and/or the text arrays."""
    return model(**classifier_inputs(batch))


def classifier_inputs(batch):
    """A classifier's arguments from a batch of tensors."""
    return {**{key: batch[key] for key in TEXT_INPUTS if key in batch}, **image_inputs(batch)}


def build_classifier(section, seed, config, inputs, num_labels, dropout=0.1, prefix="cls_out", new_head=True, layout="pair", contrastive=False):
    """A classifier of the system that ``config`` is of, drawn from ``seed``, then with the weights of ``section.init``; its head may be new
    if ``new_head``. ``prefix``, ``layout`` and ``contrastive`` are UNIMO-2's.

    Raises:
        CheckpointError: the weights do not fit the model.
    """
    paddle.seed(seed)
    with paddle.utils.unique_name.guard():
        if isinstance(config, UnimoConfig):
            model = UnimoClassifier(config, inputs, num_labels, dropout)
        else:
            model = Unimo2Classifier(config, inputs, num_labels, dropout, prefix, layout, contrastive)
    load_initial(model, section, ("cls_out*",) if new_head else ())
    return model


class ClassificationEvaluator:
    """Predicts a whole split and scores it.

    Args:
        name: what the metrics are reported under, usually the split; dataset, collate: the split and its batching.
        score: ``score(logits [N, C], dataset) -> dict[str, float]``.
        explain: ``explain(logits, dataset) -> list`` of mappings per sample with at least ``correct`` (and ``image``, ``prediction`` ...).
        batch_size, every_steps: as in ``FinetuneEval``.
        tables: ``tables(logits, dataset) -> list`` of (caption, header, rows) for the report, optional.
    """

    def __init__(self, name, dataset, collate, score, explain, batch_size=64, every_steps=0, tables=None):
        self.name, self.dataset, self.collate, self.score, self.explain = name, dataset, collate, score, explain
        self.batch_size, self.every_steps, self.tables = batch_size, every_steps, tables
        self.logits = self.metrics = None

    def run(self, model):
        """Metrics of ``model`` on the split; the model's mode is restored."""
        logits = []
        with evaluation_mode(model):
            for _, batch in batches_of(self.dataset, self.collate, self.batch_size):
                logits.append(classifier_logits(model, to_tensors(batch)).numpy())
        self.logits = np.concatenate(logits)
        self.metrics = self.score(self.logits, self.dataset)
        return dict(self.metrics)

    def table(self):
        """The last run as text for the screen."""
        width = max(len(name) for name in self.metrics)
        return "\n".join([f"{self.name}: {len(self.dataset)} samples"] + [f"  {n:<{width}}  {v:.4f}" for n, v in self.metrics.items()])

    def write_report(self, directory):
        """``<name>.jsonl`` (every prediction), ``<name>.json`` (metrics) and ``<name>.html`` (right and wrong examples)."""
        rows = self.explain(self.logits, self.dataset)
        write_predictions(os.path.join(directory, f"{self.name}.jsonl"), rows)
        write_json(os.path.join(directory, f"{self.name}.json"), self.metrics)
        tables = self.tables(self.logits, self.dataset) if self.tables else ()
        write_html_report(os.path.join(directory, f"{self.name}.html"), f"Predictions, {self.name}", self.metrics,
                          right_and_wrong(rows), tables=tables)


class ClassificationTask(FinetuneTask):
    """A finetuning task whose model is the shared classifier; subclasses give data sets, collation, targets and metrics."""

    inputs = "pair"

    def num_labels(self):
        """Outputs of the head."""
        raise NotImplementedError

    def work(self, batch):
        return classifier_work(self.model_config, batch, getattr(getattr(self.config, "head", None), "layout", "pair"))

    def build_model(self):
        return build_classifier(self.config.model, self.config.run.seed, self.model_config, self.inputs, self.num_labels(),
                                new_head=self.is_training())
