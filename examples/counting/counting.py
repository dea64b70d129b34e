"""How many objects does a picture show? A task outside of the package; docs/add_a_task.md goes through it.

    python examples/counting/counting.py train -c examples/counting/demo.yaml
"""
import json
import os
import sys
import zlib  # noqa: F401  before paddle: Paddle 2.6.2 exports zlib's symbols, and the first use would then crash
from dataclasses import dataclass

import numpy as np
import paddle.nn.functional as F

from unimo2_paddle.cli import main
from unimo2_paddle.data.formats.karpathy import read_karpathy
from unimo2_paddle.data.images import decode_image, resize_image
from unimo2_paddle.errors import DataError
from unimo2_paddle.metrics.classification import accuracy, majority_accuracy
from unimo2_paddle.tasks.base import TASKS
from unimo2_paddle.tasks.classification import ClassificationEvaluator, ClassificationTask, classifier_logits
from unimo2_paddle.tasks.finetune import FinetuneEval, FinetuneTrain

MOST = 8  # objects that can be told apart; the classes are 0 to MOST


@dataclass
class CountingData:
    """Group ``data``: ``annotations``, ``images``: a Karpathy file and its picture folder; ``scenes``: folder of SPLIT.jsonl, each line with
    ``key`` (the picture's name without its ending) and ``objects``."""

    annotations: str
    images: str
    scenes: str

    def problems(self):
        return [f"{key}: is empty; give a path" for key in ("annotations", "images", "scenes") if not getattr(self, key)]


class CountedPictures:
    """The pictures of a split with their numbers of objects.

    Raises:
        DataError: a file cannot be read, a picture is in no scene, or a scene has more objects than there are classes.
    """

    def __init__(self, data, split, size):
        self.size = size
        self.paths = [image.path for image in read_karpathy(data.annotations, data.images, split)]
        path = os.path.join(data.scenes, f"{'dev' if split == 'val' else split}.jsonl")
        try:
            with open(path, encoding="utf-8") as file:
                known = {row["key"]: len(row["objects"]) for row in map(json.loads, file)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error}); unimo2 demo-data writes such files") from None
        self.counts = [known.get(os.path.splitext(os.path.basename(picture))[0], -1) for picture in self.paths]
        for picture, count in zip(self.paths, self.counts):
            if not 0 <= count <= MOST:
                raise DataError(f"{path}: no scene of {picture} with at most {MOST} objects")

    def __len__(self):
        return len(self.paths)

    def sample(self, index, rng):
        """One picture (uint8 ``[S, S, 3]``) and its count; ``rng`` is for random changes of training pictures, of which there are none."""
        return resize_image(decode_image(self.paths[index]), self.size), self.counts[index]


class CountingTask(ClassificationTask):
    """A linear layer on the pooled picture, one output per number."""

    sections = {**ClassificationTask.sections, "data": CountingData, "train": FinetuneTrain, "eval": FinetuneEval}
    inputs = "image"

    def __init__(self, config):
        super().__init__(config)
        self.model_config = config.model.model_config()
        self.selection = f"{config.eval.split}/accuracy"

    def num_labels(self):
        return MOST + 1

    def dataset(self, split):
        return CountedPictures(self.config.data, split, self.model_config.image_size)

    def collate(self, samples):
        pictures, counts = zip(*samples)
        return {"image": np.stack(pictures), "labels": np.array(counts, dtype=np.int64)}

    def loss(self, model, batch):
        logits = classifier_logits(model, batch)
        hits = (logits.argmax(axis=1) == batch["labels"]).astype("float32")
        return {"loss": F.cross_entropy(logits, batch["labels"]), "accuracy": 100.0 * hits.mean().detach()}

    def evaluators(self):
        settings = self.config.eval
        return [ClassificationEvaluator(settings.split, self.split(settings.split), self.collate, score, explain, settings.batch_size,
                                        self.evaluate_every())]


def score(logits, dataset):
    """Accuracy, that of always saying the most frequent number (both in percent), and by how much the answers are off on average."""
    counts, answers = np.array(dataset.counts), logits.argmax(axis=1)
    return {"accuracy": accuracy(answers, counts), "most_frequent": majority_accuracy(counts), "off_by": float(np.abs(answers - counts).mean())}


def explain(logits, dataset):
    """What the report shows of every picture."""
    return [{"image": path, "objects": count, "prediction": int(answer), "correct": bool(answer == count)}
            for path, count, answer in zip(dataset.paths, dataset.counts, logits.argmax(axis=1))]


if __name__ == "__main__":
    TASKS["counting"] = "counting:CountingTask"  # Python finds counting.py because it is the program
    sys.exit(main())
