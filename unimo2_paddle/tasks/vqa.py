"""Visual question answering on VQA v2 as classification over the frequent answers (UNIMO-2, Table 1).

The authors never released this task. The model is that of their other pair tasks: product of the two poolers, one fully connected
layer. Loss and answers are the field's usual ones: soft targets min(people / 3, 1) with binary cross entropy, 3,129 answers.
"""
import hashlib
import os
from dataclasses import dataclass, field
from typing import Dict, List

import numpy as np
import paddle
import paddle.nn.functional as F

from unimo2_paddle.data.formats.vqa import IMAGE_PATTERN, read_annotations, read_visual_genome, read_vqa, submission_rows
from unimo2_paddle.errors import CheckpointError, DataError
from unimo2_paddle.metrics.vqa import (
    answer_vocabulary,
    frequent_answer_accuracy,
    frequent_answers,
    normalise_answer,
    soft_targets,
    validate_submission,
    vqa_accuracy,
    vqa_metrics,
)
from unimo2_paddle.tasks.classification import ClassificationEvaluator, classifier_logits
from unimo2_paddle.tasks.finetune import TASK_FILE, FinetuneEval, FinetuneTrain, read_task_file
from unimo2_paddle.tasks.pairs import PairData, PairTask
from unimo2_paddle.tasks.reporting import write_json, write_predictions

HELD_OUT = "minival"


@dataclass
class VqaData(PairData):
    """Group ``data`` of VQA, besides the keys of all pair tasks.

    ``questions``, ``annotations``: split name -> official file; a split without annotations can only be answered, not judged.
    ``train_on``: splits to learn from. With [train, val], ``held_out_images`` pictures of the last of them (chosen by a hash of their
    id) stay out and form the split "minival". ``answers_from``: splits whose answers are counted for the classes;
    ``min_answer_count``: how often an answer must be the most frequent one. ``image_pattern``: file name of a picture in ``images``.
    ``visual_genome``: question_answers.json to learn from as well, its pictures in ``visual_genome_images``;
    ``visual_genome_image_data``: image_data.json, by which pictures of the judged split are left out.
    """

    questions: Dict[str, str] = field(default_factory=dict)
    annotations: Dict[str, str] = field(default_factory=dict)
    train_on: List[str] = field(default_factory=lambda: ["train"])
    held_out_images: int = 0
    answers_from: List[str] = field(default_factory=lambda: ["train", "val"])
    min_answer_count: int = 9
    image_pattern: str = IMAGE_PATTERN
    visual_genome: str = ""
    visual_genome_images: str = ""
    visual_genome_image_data: str = ""

    def problems(self):
        found = super().problems()
        if not self.questions:
            found.append("questions: is empty; give the question file of every split")
        if not self.train_on:
            found.append("train_on: is empty; name at least one split")
        for key in ("train_on", "answers_from"):
            found += [f"{key}: split {name!r} has no annotations" for name in getattr(self, key) if not self.annotations.get(name)]
        found += [f"train_on: split {name!r} has no questions" for name in self.train_on if not self.questions.get(name)]
        found += [f"annotations: split {name!r} has no questions" for name in self.annotations if not self.questions.get(name)]
        found += [f"{key}: must be at least {low}, is {getattr(self, key)}"
                  for key, low in (("held_out_images", 0), ("min_answer_count", 1)) if getattr(self, key) < low]
        if self.visual_genome and not self.visual_genome_images:
            found.append("visual_genome_images: is needed with visual_genome")
        return found


class VqaTask(PairTask):
    """Questions about pictures, answered with one of the frequent answers."""

    sections = {**PairTask.sections, "data": VqaData, "train": FinetuneTrain, "eval": FinetuneEval}

    def __init__(self, config):
        super().__init__(config)
        self.selection = f"{config.eval.split}/accuracy"
        self._answers = self._index = self._frequent = None

    @classmethod
    def check(cls, config):
        problems, data, split = super().check(config), config.data, config.eval.split
        if split == HELD_OUT:
            if not data.held_out_images:
                problems.append(f"eval.split: {HELD_OUT} needs data.held_out_images above 0")
        elif split in data.train_on:
            problems.append(f"eval.split: {split} is in data.train_on; judge on another split, or hold out pictures with "
                            f"data.held_out_images and eval.split {HELD_OUT}")
        elif not data.questions.get(split):
            problems.append(f"eval.split: {split!r} has no data.questions; known: {', '.join(data.questions)}")
        return problems

    @property
    def answers(self):
        """The classes: those of ``model.init`` when it is a VQA model, else counted in the annotations."""
        if self._answers is None:
            self._load_answers()
        return self._answers

    def _load_answers(self):
        init, data = self.config.model.init_path, self.config.data
        about = read_task_file(init) if init and os.path.isfile(os.path.join(init, TASK_FILE)) else {}
        if about.get("task") == self.config.task:
            try:
                self._answers, self._frequent = list(about["answers"]), dict(about["frequent_answers"])
            except (KeyError, TypeError, ValueError):
                raise CheckpointError(f"{os.path.join(init, TASK_FILE)}: has no usable answers; give the best/ directory of a VQA run") from None
        else:
            self._answers = answer_vocabulary([a for name in data.answers_from for a in read_annotations(data.annotations[name]).values()],
                                              data.min_answer_count)
            if not self._answers:
                raise DataError(f"no answer occurs {data.min_answer_count} times in {', '.join(data.answers_from)}; lower data.min_answer_count")
        self._index = {answer: number for number, answer in enumerate(self._answers)}

    def frequent(self):
        """The baseline's answers: question type -> most frequent training answer."""
        if self._frequent is None:
            self._frequent = frequent_answers([record.annotation for record in self.split("train").records])
        return self._frequent

    def num_labels(self):
        return len(self.answers)

    def description(self):
        return {"answers": self.answers, "frequent_answers": self.frequent(), "max_text_len": self.config.data.max_text_len,
                "layout": self.config.head.layout, "contrastive": self.config.head.contrastive}

    def records(self, split):
        """Questions of a split: "train" (all of ``data.train_on`` and Visual Genome), "minival", or one of the files."""
        data = self.config.data
        if split == HELD_OUT:
            return [r for r in self._read(data.train_on[-1]) if r.image_id in self._held_out()]
        if split != "train":
            return self._read(split)
        held_out = self._held_out()
        records = [r for name in data.train_on for r in self._read(name) if not (name == data.train_on[-1] and r.image_id in held_out)]
        if data.visual_genome:
            judged = {r.image_id for r in self.split(self.config.eval.split).records}
            records += [r for r in read_visual_genome(data.visual_genome, data.visual_genome_images, data.visual_genome_image_data, judged)
                        if self.target(r)]
        return records

    def _read(self, name):
        data = self.config.data
        return read_vqa(data.questions[name], data.images, data.annotations.get(name, ""), data.image_pattern)

    def _held_out(self):
        """Ids of the pictures of the last training split that are kept for judging."""
        count = self.config.data.held_out_images
        if not count:
            return frozenset()
        ids = {record.image_id for record in self._read(self.config.data.train_on[-1])}
        return frozenset(sorted(ids, key=lambda number: hashlib.sha256(str(number).encode()).digest())[:count])

    def target(self, record):
        if record.annotation is None:
            return None
        if self._index is None:
            self._load_answers()
        return soft_targets(record.annotation.answers, self._index)

    def target_array(self, targets):
        array = np.zeros((len(targets), len(self.answers)), dtype=np.float32)
        for row, target in zip(array, targets):
            for number, value in target.items():
                row[number] = value
        return array

    def loss(self, model, batch):
        """Binary cross entropy, summed over the answers and averaged over the questions."""
        logits = classifier_logits(model, batch)
        loss = F.binary_cross_entropy_with_logits(logits, batch["labels"], reduction="sum") / logits.shape[0]
        chosen = paddle.take_along_axis(batch["labels"], logits.argmax(axis=1, keepdim=True), axis=1)
        return {"loss": loss, "soft_accuracy": 100.0 * chosen.mean().detach()}

    def evaluators(self):
        settings = self.config.eval
        judged = settings.split == HELD_OUT or bool(self.config.data.annotations.get(settings.split))
        return [VqaEvaluator(self, judged, self.split(settings.split), settings.batch_size, self.evaluate_every())]


class VqaEvaluator(ClassificationEvaluator):
    """Answers a split, judges it where annotations exist, and writes the server's submission file.

    Args:
        task: the ``VqaTask``; judged: whether the split has annotations; dataset, batch_size, every_steps: as in the base class.
    """

    def __init__(self, task, judged, dataset, batch_size, every_steps):
        super().__init__(task.config.eval.split, dataset, task.collate, self._score, self._explain, batch_size, every_steps, self._tables)
        self.task, self.judged, self.by_question_type, self.baseline = task, judged, {}, None

    def _predicted(self, logits):
        return [self.task.answers[number] for number in logits.argmax(axis=1)]

    def _score(self, logits, dataset):
        if not self.judged:
            return {"questions": float(len(dataset))}
        annotations = [record.annotation for record in dataset.records]
        metrics, self.by_question_type = vqa_metrics(self._predicted(logits), annotations)
        if self.baseline is None:
            self.baseline = frequent_answer_accuracy(self.task.frequent(), annotations)
        return metrics

    def table(self):
        """The last run as text: overall, per answer type, per question type, and the baseline."""
        if not self.judged:
            return f"{self.name}: {len(self.dataset)} questions answered; the answers of this split are not public, see the submission file"
        lines = [super().table(), f"  most frequent answer per question type (baseline): {self.baseline:.2f}", "  per question type:"]
        width = max(map(len, self.by_question_type))
        return "\n".join(lines + [f"    {kind:<{width}}  {value:.2f}" for kind, value in self.by_question_type.items()])

    def write_report(self, directory):
        """``<name>.jsonl``, ``<name>_submission.json`` and, where judged, ``<name>.json`` and ``<name>.html``."""
        ids = [record.question_id for record in self.dataset.records]
        rows = submission_rows(ids, self._predicted(self.logits))
        validate_submission(rows, ids)
        write_json(os.path.join(directory, f"{self.name}_submission.json"), rows)
        if self.judged:
            super().write_report(directory)
        else:
            write_predictions(os.path.join(directory, f"{self.name}.jsonl"), self._explain(self.logits, self.dataset))

    def _explain(self, logits, dataset):
        rows = []
        for record, answer, row in zip(dataset.records, self._predicted(logits), logits):
            probability = float(1.0 / (1.0 + np.exp(-np.float64(row.max()))))
            shown = {"image": record.path, "question_id": record.question_id, "question": record.text, "prediction": answer,
                     "probability": round(probability, 4)}
            if record.annotation is not None:
                score = vqa_accuracy(answer, record.annotation.answers)
                people = sorted({normalise_answer(text) for text in record.annotation.answers})
                shown.update(answer=record.annotation.common, people=people, accuracy=round(score, 3), correct=score >= 0.5)
            rows.append(shown)
        return rows

    def _tables(self, logits, dataset):
        rows = [[kind, f"{value:.2f}"] for kind, value in self.by_question_type.items()]
        rows.append(["baseline: most frequent answer per question type", f"{self.baseline:.2f}"])
        return [("Accuracy per question type", ["question type", "accuracy"], rows)]
