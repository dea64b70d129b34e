"""What all finetuning tasks share: epochs over a data set, batches, evaluation in splits, files beside the model."""
import json
import os
import shutil
from dataclasses import dataclass

import numpy as np

from unimo2_paddle.data.mixture import Batches, MixturePlan, generator
from unimo2_paddle.data.shards import EpochOrder
from unimo2_paddle.data.workers import note
from unimo2_paddle.errors import CheckpointError, DataError
from unimo2_paddle.tasks.base import Task

TASK_FILE = "task.json"


@dataclass
class FinetuneTrain:
    """Group ``train`` of finetuning tasks; tasks add their own keys by inheriting."""

    epochs: int = 3
    batch_size: int = 16    # per worker and micro-batch, as the authors count it
    accumulate: int = 1
    max_steps: int = 0      # stop after so many optimizer steps; 0: after the epochs

    def problems(self):
        return [f"{key}: must be at least {low}, is {getattr(self, key)}"
                for key, low in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("max_steps", 0)) if getattr(self, key) < low]


@dataclass
class FinetuneEval:
    """Group ``eval``: which split judges, and how often. During training choose a development split; the test split is run once, by
    ``unimo2 eval``."""

    split: str = "val"
    batch_size: int = 64
    every_steps: int = 0     # optimizer steps; 0: see every_epochs
    every_epochs: float = 1.0  # 0: only at the end

    def problems(self):
        found = [] if self.split else ["split: is empty; for example val or test"]
        return found + [f"{key}: must be at least {low}, is {getattr(self, key)}"
                        for key, low in (("batch_size", 1), ("every_steps", 0), ("every_epochs", 0)) if getattr(self, key) < low]


class FinetuneTask(Task):
    """A task over a map-style data set: ``len(dataset)``, ``dataset.sample(index, rng)`` (``rng`` is ``None`` in evaluation).

    Subclasses implement :meth:`dataset`, :meth:`collate`, ``build_model``, ``loss`` and ``evaluators``.
    """

    def __init__(self, config):
        super().__init__(config)
        self.world_size = max(1, int(os.environ.get("PADDLE_TRAINERS_NUM", "1")))
        self._datasets = {}

    def dataset(self, split):
        """The data set of a split."""
        raise NotImplementedError

    def collate(self, samples):
        """A list of samples as a dict of numpy arrays."""
        raise NotImplementedError

    def split(self, name):
        """The data set of a split, read once.

        Raises:
            DataError: the split is empty.
        """
        if name not in self._datasets:
            self._datasets[name] = self.dataset(name)
            if not len(self._datasets[name]):
                raise DataError(f"split {name!r} has no samples; check the data group and the split's name")
        return self._datasets[name]

    def global_batch(self):
        """Samples of one optimizer step over all workers and micro-batches."""
        train = self.config.train
        return train.batch_size * train.accumulate * self.world_size

    def steps_per_epoch(self):
        return max(1, -(-len(self.split("train")) // self.global_batch()))

    def total_steps(self):
        train = self.config.train
        return train.max_steps or train.epochs * self.steps_per_epoch()

    def is_training(self):
        """Whether this is a training run (whose length was worked out from the training split), not an evaluation alone."""
        return "train" in self._datasets

    def evaluate_every(self):
        """Steps between evaluations (0: only at the end). Evaluation alone has read no training data, and needs none."""
        settings = self.config.eval
        if not self.is_training():
            return 0
        if settings.every_steps:
            return settings.every_steps
        return max(1, int(round(settings.every_epochs * self.steps_per_epoch()))) if settings.every_epochs else 0

    def train_batches(self, shard, state=None):
        data, seed = self.split("train"), self.config.run.seed
        order = EpochOrder([len(data)], int(generator(seed).integers(1 << 62)), window=len(data))
        plan = MixturePlan({"train": [(1.0, order)]}, {"train": 1.0}, {"train": self.global_batch()}, seed, self.config.train.accumulate,
                           shard.rank, shard.world_size, state)
        return Batches(plan, _Builder(data, self.collate, seed), getattr(self.config.data, "num_workers", 0))

    def description(self):
        """What a prediction needs besides the weights (labels, lengths ...), as plain Python; stored as ``task.json`` beside the model."""
        return {}

    def save_assets(self, directory):
        """Write ``task.json`` and the vocabulary beside a saved model, so that the directory is all a prediction needs."""
        with open(os.path.join(directory, TASK_FILE), "w", encoding="utf-8") as file:
            file.write(json.dumps({"task": self.config.task, **self.description()}, indent=2, ensure_ascii=False) + "\n")
        vocab = getattr(self.config.data, "vocab", "")
        if vocab:
            copy_vocabulary(vocab, os.path.join(directory, "vocab"))


class _Builder:
    """Builds the batch of a draw; a function of the draw alone, safe in worker processes."""

    def __init__(self, data, collate, seed):
        self.data, self.collate, self.seed = data, collate, seed

    def __call__(self, draw):
        samples = []
        for slot, _, index in draw.slots:
            note(f"training sample {index}")
            samples.append(self.data.sample(index, draw.record_generator(self.seed, slot)))
        # the number of a record in its split names it in every format
        return {"samples": draw.size, "keys": [f"train[{index}]" for _, _, index in draw.slots], **self.collate(samples)}


def copy_vocabulary(source, target):
    """Copy the three vocabulary files of ``source`` (any of the accepted names) into the folder ``target``."""
    from unimo2_paddle.data.tokenizer import FILE_NAMES

    os.makedirs(target, exist_ok=True)
    for name in FILE_NAMES:
        found = [n for n in sorted(os.listdir(source)) if n == name or n.endswith("." + name)]
        shutil.copyfile(os.path.join(source, found[0]), os.path.join(target, name))


def read_task_file(directory):
    """The ``task.json`` of a finetuned directory.

    Raises:
        CheckpointError: there is none.
    """
    path = os.path.join(directory, TASK_FILE)
    if not os.path.isfile(path):
        raise CheckpointError(f"{directory} has no {TASK_FILE}; give the best/ directory of a finetuning run")
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def batches_of(dataset, collate, batch_size):
    """Evaluation batches in order: yields (first index, batch)."""
    for first in range(0, len(dataset), batch_size):
        yield first, collate([dataset.sample(index, None) for index in range(first, min(len(dataset), first + batch_size))])


def softmax(logits):
    """Row-wise softmax of a numpy array ``[N, C]``."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)
