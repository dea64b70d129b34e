"""Image classification, ImageNet-1k above all (UNIMO-2, Table 2): finetuning with the usual recipe, and a linear probe."""
import os
from dataclasses import dataclass, field

import numpy as np
import paddle
from PIL import Image

from unimo2_paddle.data.formats.image_classes import (
    ClassedImages,
    held_out,
    list_classes,
    names_of_folders,
    read_class_folders,
    read_class_names,
    read_list_file,
)
from unimo2_paddle.data.images import Augmentation, augment_image, decode_image, resize_image
from unimo2_paddle.data.mixing import Mixing, mix_batch, smooth_targets
from unimo2_paddle.data.mixture import generator
from unimo2_paddle.data.randaugment import RandAugment, rand_augment
from unimo2_paddle.errors import CheckpointError, DataError
from unimo2_paddle.metrics.classification import accuracy, class_recalls, confusion_matrix, majority_accuracy, topk_accuracy
from unimo2_paddle.models.losses import log_softmax
from unimo2_paddle.tasks.base import Task
from unimo2_paddle.tasks.classification import ClassificationEvaluator, ClassificationTask, build_classifier, classifier_logits
from unimo2_paddle.tasks.finetune import TASK_FILE, FinetuneEval, FinetuneTrain, read_task_file, softmax
from unimo2_paddle.tasks.probe import FeatureDataset, ProbeEvaluator

TOP = 5          # the k of the second accuracy, and of the guesses in the predictions
TABLE_ROWS = 20  # classes named on the screen at most


@dataclass
class ImagenetData:
    """Group ``data``: pictures of classes.

    ``format: folders``: ``images/SPLIT/CLASS/picture``. ``format: lists``: PaddleClas' ``lists/SPLIT_list.txt`` with paths below ``images``
    (``lists`` empty = ``images``). ``num_classes`` is only for lists (0 = told by a finetuned checkpoint or the training list).
    ``class_names``: optional file of names (LOC_synset_mapping.txt, PaddleClas' label list, or one per line). ``held_out``: share of the
    training pictures that is the split ``dev`` instead, for data sets whose test labels are public only as ``val``.
    """

    images: str
    format: str = "folders"
    lists: str = ""
    class_names: str = ""
    num_classes: int = 0
    held_out: float = 0.0
    exif: bool = True
    num_workers: int = 0

    def problems(self):
        found = [] if self.images else ["images: is empty; give a directory"]
        if self.format not in ("folders", "lists"):
            found.append(f"format: {self.format!r} is not one of folders, lists")
        if not 0 <= self.held_out < 1:
            found.append(f"held_out: must be in [0, 1), is {self.held_out}")
        return found + [f"{key}: must not be negative, is {getattr(self, key)}" for key in ("num_classes", "num_workers") if getattr(self, key) < 0]


@dataclass
class ImagenetTrain(FinetuneTrain):
    """Group ``train``: ``method`` is finetune, or linear_probe (only the head learns, on features computed once without augmentation)."""

    method: str = "finetune"
    label_smoothing: float = 0.1
    dropout: float = 0.0                       # before the head
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(crop=1.0, crop_scale=[0.08, 1.0], flip=0.5))
    randaugment: RandAugment = field(default_factory=RandAugment)
    mixing: Mixing = field(default_factory=Mixing)
    feature_cache: str = ""                    # folder of a linear probe's features; empty: run.output/features

    def problems(self):
        found = super().problems()
        if self.method not in ("finetune", "linear_probe"):
            found.append(f"method: {self.method!r} is not one of finetune, linear_probe")
        return found + [f"{key}: must be in [0, 1), is {getattr(self, key)}" for key in ("label_smoothing", "dropout") if not 0 <= getattr(self, key) < 1]


@dataclass
class ImagenetEval(FinetuneEval):
    """Group ``eval``; ``centre_crop``: share of the shorter side that is looked at (0.875 is usual), 0 = the whole picture, squashed to a
    square as in pre-training."""

    centre_crop: float = 0.0

    def problems(self):
        return super().problems() + ([] if 0 <= self.centre_crop <= 1 else [f"centre_crop: must be in [0, 1], is {self.centre_crop}"])


def centre_crop(image, size, share):
    """The middle ``share`` of the shorter side as ``[size, size, 3]``; ``share`` 0 squashes the whole picture."""
    if not share:
        return resize_image(image, size)
    height, width = image.shape[:2]
    edge = share * min(height, width)
    left, top = (width - edge) / 2, (height - edge) / 2
    return np.array(Image.fromarray(image).resize((size, size), Image.BICUBIC, box=(left, top, left + edge, top + edge)))


def read_classes(data, init=""):
    """Class folder names (or numbers, for lists) in label order, without reading pictures.

    They are those of the training split; where it is not at hand, those a finetuned checkpoint ``init`` was trained with, else those of
    the first other split found.

    Raises:
        DataError: nothing tells the classes.
    """
    stored = read_task_file(init).get("classes") if init and os.path.isfile(os.path.join(init, TASK_FILE)) else None
    if data.format == "folders":
        if os.path.isdir(os.path.join(data.images, "train")):
            return list_classes(os.path.join(data.images, "train"))
        if stored:
            return stored
        for split in ("val", "dev", "test"):
            if os.path.isdir(os.path.join(data.images, split)):
                return list_classes(os.path.join(data.images, split))
        raise DataError(f"{data.images}: has none of the folders train, val, dev, test; expected is {data.images}/SPLIT/CLASS/picture.jpg")
    if data.num_classes:
        return [str(label) for label in range(data.num_classes)]
    if stored:
        return stored
    listed = read_list_file(list_path(data, "train"), data.images)
    return [str(label) for label in range(int(listed.labels.max()) + 1)]


def list_path(data, split):
    """The list file of a split."""
    return os.path.join(data.lists or data.images, f"{split}_list.txt")


def read_split(data, split, classes):
    """The :class:`ClassedImages` of a split; ``train`` and ``dev`` share the training pictures when ``held_out`` is above 0.

    Raises:
        DataError: as the readers of ``data.formats.image_classes``.
    """
    shared = data.held_out > 0 and split in ("train", "dev")
    stored = "train" if shared else split
    if data.format == "folders":
        images = read_class_folders(os.path.join(data.images, stored), classes)
    else:
        images = read_list_file(list_path(data, stored), data.images, len(classes))
    if shared:
        images = images.part(held_out(images.paths, data.images, data.held_out) == (split == "dev"))
        if not len(images):
            raise DataError(f"data.held_out {data.held_out} leaves no picture for the split {split!r}; choose another share")
    return images


class PictureDataset:
    """Labelled pictures, augmented when ``sample`` is given a generator and ``train`` settings."""

    def __init__(self, images: ClassedImages, size, train=None, exif=True, crop=0.0):
        self.images, self.size, self.train, self.exif, self.crop = images, size, train, exif, crop

    def __len__(self):
        return len(self.images)

    @property
    def labels(self):
        """int64 ``[N]``."""
        return self.images.labels

    def sample(self, index, rng):
        """``image`` uint8 ``[S, S, 3]``, ``label``, and in training ``mix``, the seed of what is random about the batch it opens."""
        image, sample = decode_image(self.images.paths[index], self.exif), {"label": int(self.labels[index])}
        if rng is None or self.train is None:
            return {**sample, "image": centre_crop(image, self.size, self.crop)}
        image = rand_augment(augment_image(image, self.size, self.train.augmentation, rng), self.train.randaugment, rng)
        return {**sample, "image": image, "mix": int(rng.integers(1 << 62))}


def soft_cross_entropy(logits, targets):
    """Mean cross entropy with target distributions ``[B, C]``."""
    return -(targets * log_softmax(logits)).sum(axis=-1).mean()


class ImagenetTask(ClassificationTask):
    """Finetuning or a linear probe on pictures of classes; zero-shot classification is the task ``zeroshot``."""

    sections = {**Task.sections, "data": ImagenetData, "train": ImagenetTrain, "eval": ImagenetEval}
    inputs = "image"

    def __init__(self, config):
        super().__init__(config)
        self.model_config = config.model.model_config()
        self.selection = f"{config.eval.split}/top1"
        self.classes = read_classes(config.data, config.model.init_path)
        self.names = read_class_names(config.data.class_names, self.classes) if config.data.class_names else names_of_folders(self.classes)
        self.probing = config.train.method == "linear_probe"

    def num_labels(self):
        return len(self.classes)

    def dataset(self, split):
        config = self.config
        train = config.train if split == "train" and not self.probing else None
        pictures = PictureDataset(read_split(config.data, split, self.classes), self.model_config.image_size, train, config.data.exif,
                                  config.eval.centre_crop)
        if not self.probing:
            return pictures
        cache = config.train.feature_cache or os.path.join(config.run.output, "features")
        return FeatureDataset(pictures, self.collate, cache, split, config.eval.batch_size)

    def collate(self, samples):
        labels = np.array([sample["label"] for sample in samples], dtype=np.int64)
        part = "features" if "features" in samples[0] else "image"
        batch = {part: np.stack([sample[part] for sample in samples]), "labels": labels}
        if "mix" in samples[0]:
            train = self.config.train
            targets = smooth_targets(labels, len(self.classes), train.label_smoothing)
            if part == "image":
                batch["image"], targets = mix_batch(batch["image"], targets, train.mixing, generator(samples[0]["mix"]))
            batch["targets"] = targets
        return batch

    def build_model(self):
        """The classifier; a linear probe's backbone is frozen.

        Raises:
            CheckpointError: in an evaluation, ``model.init`` has no head or one of other classes.
        """
        init, fresh = self.config.model.init_path, self.is_training()
        stored = read_task_file(init).get("classes") if init and os.path.isfile(os.path.join(init, TASK_FILE)) else None
        if stored and stored != self.classes and not fresh:
            raise CheckpointError(f"{init}: was trained on {len(stored)} classes ({', '.join(stored[:3])} ...), data.images has {len(self.classes)} "
                                  f"({', '.join(self.classes[:3])} ...); evaluate it on its own classes, or train it on these")
        model = build_classifier(self.config.model, self.config.run.seed, self.model_config, self.inputs, self.num_labels(),
                                 self.config.train.dropout, new_head=fresh)
        if self.probing:
            for parameter in model.backbone.parameters():
                parameter.stop_gradient = True
            self._model = model
        return model

    def train_batches(self, shard, state=None):
        if self.probing:
            data = self.split("train")
            if shard.rank == 0:
                data.fill(self._model, self.config.run.progress)
            if shard.world_size > 1:
                paddle.distributed.barrier()
                data.fill(self._model)
        return super().train_batches(shard, state)

    def loss(self, model, batch):
        logits = model.head(batch["features"]) if "features" in batch else classifier_logits(model, batch)
        hits = (logits.argmax(axis=1) == batch["labels"]).astype("float32").mean()
        return {"loss": soft_cross_entropy(logits, batch["targets"]), "accuracy": hits.detach()}

    def evaluators(self):
        settings = self.config.eval
        kind = ProbeEvaluator if self.probing else ClassificationEvaluator
        evaluator = kind(settings.split, self.split(settings.split), self.collate, self.score, self.explain, settings.batch_size,
                         self.evaluate_every(), tables=self.class_tables)
        evaluator.baselines = {"top1": majority_accuracy(evaluator.dataset.labels)}
        return [evaluator]

    def score(self, logits, dataset):
        """Top-1, top-5 (where there are more than five classes) and mean per-class accuracy, in percent."""
        return class_metrics(logits, dataset.labels)

    def explain(self, logits, dataset):
        return explain_classes(logits, dataset.images, self.names)

    def class_tables(self, logits, dataset):
        return [class_table(logits, dataset.labels, self.names)]

    def description(self):
        return {"classes": self.classes, "names": self.names, "inputs": self.inputs, "centre_crop": self.config.eval.centre_crop}


def class_metrics(logits, labels):
    """``top1``, ``top5`` (where there are more than five classes) and ``class_mean`` in percent, of scores ``[N, C]``."""
    metrics = {"top1": accuracy(logits.argmax(axis=1), labels)}
    if logits.shape[1] > TOP:
        metrics[f"top{TOP}"] = topk_accuracy(logits, labels, TOP)
    recalls = class_recalls(confusion_matrix(logits.argmax(axis=1), labels, logits.shape[1]))
    return {**metrics, "class_mean": float(np.nanmean(recalls))}


def explain_classes(logits, images, names):
    """One mapping per picture: file, true class, prediction, the five best guesses with probabilities, right or wrong."""
    rows = []
    for path, label, probabilities in zip(images.paths, images.labels.tolist(), softmax(logits)):
        best = np.argsort(-probabilities, kind="stable")[:TOP].tolist()
        rows.append({"image": path, "class": names[label], "prediction": names[best[0]], "correct": best[0] == label,
                     "guesses": {names[i]: round(float(probabilities[i]), 4) for i in best}})
    return rows


def class_table(logits, labels, names):
    """(caption, header, rows) of every class that occurs, worst first, with what it is mostly taken for."""
    matrix = confusion_matrix(logits.argmax(axis=1), labels, len(names))
    recalls, rows = class_recalls(matrix), []
    for label in sorted(np.flatnonzero(~np.isnan(recalls)), key=lambda i: (recalls[i], i)):
        wrong = matrix[label].copy()
        wrong[label] = 0
        taken = f"{names[int(wrong.argmax())]} ({wrong.max()})" if wrong.any() else ""
        rows.append([names[label], int(matrix[label].sum()), f"{recalls[label]:.1f}", taken])
    return ("Classes, worst first", ["class", "pictures", "right, %", "mostly taken for"], rows)
