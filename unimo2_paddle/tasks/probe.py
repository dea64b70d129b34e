"""Linear probing: features of frozen encoders, computed once and kept on disk."""
import hashlib
import os

import numpy as np

from unimo2_paddle.errors import DataError
from unimo2_paddle.tasks.base import normalise_tensor, to_tensors
from unimo2_paddle.tasks.classification import ClassificationEvaluator
from unimo2_paddle.tasks.finetune import batches_of
from unimo2_paddle.tasks.retrieval_scoring import evaluation_mode


class FeatureDataset:
    """Labelled pictures as pooled features; :meth:`fill` must run before the first sample.

    Args:
        pictures: a ``PictureDataset``; collate: of its samples.
        directory: where the features are kept; name: of the split; batch_size: of the encoder.
    """

    def __init__(self, pictures, collate, directory, name, batch_size):
        self.pictures, self.collate, self.directory = pictures, collate, directory
        self.name, self.batch_size, self.features = name, batch_size, None
        self.images, self.labels = pictures.images, pictures.labels

    def __len__(self):
        return len(self.pictures)

    def fill(self, model, show_progress=False):
        """Features float32 ``[N, H]`` from the cache, or computed now and written there.

        The file's name carries a digest of the encoders' weights, the pictures' names and their preparation, so that nothing stale is read.
        """
        if self.features is not None:
            return
        path = os.path.join(self.directory, f"{self.name}-{self._digest(model)}.npy")
        if os.path.isfile(path):
            try:
                features = np.load(path, allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: damaged feature cache ({error}); remove the file") from None
            if features.shape != (len(self), model.config.hidden_size):
                raise DataError(f"{path}: has features {features.shape}, expected {(len(self), model.config.hidden_size)}; remove the file")
        else:
            features = self._compute(model, show_progress)
            os.makedirs(self.directory, exist_ok=True)
            with open(f"{path}.tmp", "wb") as file:
                np.save(file, features)
            os.replace(f"{path}.tmp", path)
        self.features = features

    def _digest(self, model):
        digest = hashlib.sha256()
        for parameter in model.backbone.parameters():
            digest.update(parameter.name.encode())
            digest.update(parameter.numpy().tobytes())
        pictures = self.pictures
        digest.update(repr((pictures.images.paths, pictures.size, pictures.crop, pictures.exif)).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    def _compute(self, model, show_progress):
        from tqdm import tqdm

        parts = []
        with evaluation_mode(model), tqdm(total=len(self), desc=f"features, {self.name}", unit="picture", disable=not show_progress) as bar:
            for _, batch in batches_of(self.pictures, self.collate, self.batch_size):
                parts.append(model.features(image=normalise_tensor(to_tensors(batch)["image"])).numpy())
                bar.update(len(parts[-1]))
        return np.concatenate(parts)

    def sample(self, index, rng):
        """``features`` float32 ``[H]`` and ``label``; in training also ``mix``, which tells the collation to make targets."""
        sample = {"features": self.features[index], "label": int(self.labels[index])}
        return sample if rng is None else {**sample, "mix": 0}


class ProbeEvaluator(ClassificationEvaluator):
    """The classification evaluator on cached features: only the head runs."""

    def run(self, model):
        self.dataset.fill(model)
        with evaluation_mode(model):
            self.logits = np.concatenate([model.head(to_tensors(batch)["features"]).numpy()
                                          for _, batch in batches_of(self.dataset, self.collate, 4096)])
        self.metrics = self.score(self.logits, self.dataset)
        return dict(self.metrics)
