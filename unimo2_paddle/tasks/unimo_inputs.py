"""What UNIMO reads of a picture in the tasks: a detector's regions from a store, where UNIMO-2 reads pixels from a file.

A task's samples hold a picture's ``Regions`` in the place of its pixels; :func:`image_arrays` turns either into the batch's arrays and
:func:`image_inputs` these into the model's arguments. Nothing else in a task's data depends on the system.
"""
import os

import numpy as np

from unimo2_paddle.data.region_inputs import region_arrays
from unimo2_paddle.data.region_store import Regions, RegionStore
from unimo2_paddle.errors import ConfigError, DataError
from unimo2_paddle.models.configuration import UnimoConfig
from unimo2_paddle.tasks.base import normalise_tensor

REGION_INPUTS = ("image_features", "image_location", "image_mask")
MAX_REGIONS = 101  # of a picture with the global one, the authors' max_img_len in finetuning


class RegionPictures:
    """The regions of pictures that annotations name by an id or a file.

    Args:
        directory: a store of region features; config: the ``UnimoConfig`` of the model that reads them.
        max_regions: regions per picture with the global one, at most; 0: all.

    Raises:
        DataError: there is no such store, or its features have another width than the model reads.
    """

    def __init__(self, directory, config, max_regions=0):
        self.store, self.max_regions = RegionStore(directory), max_regions or None
        self._keys = {}
        if self.store.feature_size != config.image_embedding_size:
            raise DataError(f"{directory}: features are {self.store.feature_size} wide, the model's image_embedding_size is "
                            f"{config.image_embedding_size}; use the features of the detector the model was made with, or set "
                            "model.image_embedding_size for a model without weights")

    def name(self, pictures, source):
        """Find out how the store calls the pictures of a split: all by their ``image_id``, or all by their file's name without its ending.

        Args:
            pictures: records with ``image_id`` and ``path``; source: the annotation file, for the message.

        Raises:
            DataError: the store lacks pictures under both kinds of names.
        """
        named = {picture.path: (picture.image_id, os.path.splitext(os.path.basename(picture.path))[0]) for picture in pictures}
        absent = [[names[kind] for names in named.values() if names[kind] not in self.store] for kind in (0, 1)]
        kind = 0 if len(absent[0]) <= len(absent[1]) else 1
        if absent[kind]:
            raise DataError(f"{self.store.directory}: has no regions for {len(absent[kind])} of {len(named)} pictures of {source}, the first is "
                            f"{absent[kind][0]!r} (it has {next(iter(self.store))!r}); import the features of these pictures, or name their store")
        self._keys.update((path, names[kind]) for path, names in named.items())

    def get(self, path, rng=None):
        """The ``Regions`` of the picture with this path (or, if nobody named it, this key); never changed at random."""
        return self.store[self._keys.get(path, path)]

    def arrays(self, paths):
        """The batch's arrays of some pictures, see :func:`image_arrays`."""
        return image_arrays([self.get(path) for path in paths], self.max_regions)


def open_regions(data, config, split):
    """The :class:`RegionPictures` of a split that the group ``data`` names (``regions``, which may hold ``{split}``); ``None`` for UNIMO-2.

    Raises:
        ConfigError: the model and the data are of different systems.
        DataError: see :class:`RegionPictures`.
    """
    told = mismatch(data, config)
    if told:
        raise ConfigError(told)
    return RegionPictures(data.regions.replace("{split}", split), config, data.max_regions) if data.regions else None


def image_arrays(pictures, max_regions=None):
    """Pictures as arrays of a batch.

    Args:
        pictures: uint8 ``[S, S, 3]`` each, or ``Regions`` each; max_regions: see :class:`RegionPictures`.

    Returns:
        dict of ``image`` uint8 ``[B, S, S, 3]``, or ``image_features`` ``[B, N, D]``, ``image_location`` ``[B, N, 5]``, ``image_mask`` ``[B, N]``.
    """
    if isinstance(pictures[0], Regions):
        return region_arrays(pictures, max_regions)
    return {"image": np.stack(pictures)}


def image_inputs(batch):
    """The model's arguments for the pictures of a batch of tensors; empty when it has none."""
    if "image" in batch:
        return {"image": normalise_tensor(batch["image"])}
    return {name: batch[name] for name in REGION_INPUTS if name in batch}


def mismatch(data, config):
    """What is wrong when data and model are of different systems, else an empty text."""
    if isinstance(config, UnimoConfig) and not data.regions:
        return "data.regions: is empty, but UNIMO reads a detector's regions; give a store (unimo2 features import makes one)"
    if not isinstance(config, UnimoConfig) and data.regions:
        return "data.regions: UNIMO-2 reads pixels; leave regions out and give data.images, or name a model of UNIMO"
    return ""


def known_system(section):
    """The model config of a group ``model``, ``None`` as long as its checkpoint is still to be made."""
    return section.model_config() if section.config or os.path.exists(section.init) else None


def region_problems(data):
    """Problems of the keys ``images``, ``regions`` and ``max_regions`` of a group ``data``."""
    found = [] if data.images or data.regions else ["images: is empty; give a path (for UNIMO: give regions, a store of region features)"]
    return found + ([f"max_regions: must be at least 2 (the global region and another one) or 0 (all), is {data.max_regions}"]
                    if data.max_regions < 0 or data.max_regions == 1 else [])


def stored_limit(data):
    """What a prediction must know of the group ``data`` to read pictures as in training; nothing for UNIMO-2."""
    return {"max_regions": data.max_regions} if data.regions else {}
