"""The store of region features: one directory of flat arrays, read at random by picture without ever entering memory.

::

    DIR/features.npy            float16 or float32 [R, D], the regions of all pictures one after the other
    DIR/boxes.npy               float32 [R, 4] (x1, y1, x2, y2) in pixels
    DIR/object_ids.npy ...      what the detector called the regions, where the source told
    DIR/pictures.npy            int64 [M, 4]: first region, number of regions, width, height
    DIR/key_ends.npy, keys.bin  names of the pictures (UTF-8), one after the other
    DIR/hashes.npy, order.npy   sorted 64-bit hashes of the names and the pictures they stand for
    DIR/texts.jsonl             captions or hypotheses that stood in the same lines, where there were any
    DIR/manifest.json           counts, sizes and sources; written last

``data/region_import.py`` writes it, from 37 GB of text in the case of the authors' Flickr30k. The arrays are plain ``.npy`` files.
"""
import hashlib
import json
import mmap
import os
from dataclasses import dataclass
from typing import Optional

import numpy as np

from unimo2_paddle.errors import DataError

STORE_VERSION = 1
HEADER_BYTES = 128  # of every array file
MANIFEST = "manifest.json"
TEXTS = "texts.jsonl"
LABELS = ("object_ids", "object_confidence", "attribute_ids", "attribute_confidence", "object_probs", "attribute_probs")


@dataclass(frozen=True)
class Regions:
    """The regions of one picture, N at least 1.

    Attributes:
        key: name of the picture; width, height: of the picture in pixels.
        features: float32 [N, D]; boxes: float32 [N, 4] (x1, y1, x2, y2) in pixels.
        object_ids, attribute_ids: int32 [N] or None; object_confidence, attribute_confidence: float32 [N] or None.
        object_probs, attribute_probs: float32 [N, C], column 0 is "none", or None.
    """

    key: str
    width: int
    height: int
    features: np.ndarray
    boxes: np.ndarray
    object_ids: Optional[np.ndarray] = None
    object_confidence: Optional[np.ndarray] = None
    attribute_ids: Optional[np.ndarray] = None
    attribute_confidence: Optional[np.ndarray] = None
    object_probs: Optional[np.ndarray] = None
    attribute_probs: Optional[np.ndarray] = None


class RegionStore:
    """Random access to the regions of pictures by name.

    Nothing but the manifest is read before the first use. Files are mapped, and the pages of a picture are let go as soon as it has been
    copied out, so the memory of a process does not grow with what it reads. Instances may be forked and pickled.

    Args:
        directory: what ``unimo2 features import`` wrote.

    Attributes:
        manifest: the content of ``manifest.json``; feature_size: D; object_names, attribute_names: lists of str, or None.

    Raises:
        DataError: there is no store, it is of another version, or a file of it is missing or has another size than when written.
    """

    def __init__(self, directory):
        self.directory = os.fspath(directory)
        self.manifest = read_manifest(self.directory)
        self.feature_size = self.manifest["feature_size"]
        self.object_names, self.attribute_names = self.manifest["object_names"], self.manifest["attribute_names"]
        self._columns = None

    def __getstate__(self):
        return {**self.__dict__, "_columns": None}

    def __len__(self):
        return self.manifest["pictures"]

    def __contains__(self, key):
        return self._find(key) is not None

    def __iter__(self):
        """The names of the pictures in the order of the sources."""
        return (self.key(number) for number in range(len(self)))

    def __getitem__(self, key):
        """The ``Regions`` of a picture; features are float32 whatever the store holds.

        Raises:
            DataError: the store has no such picture.
        """
        number = self._find(key)
        if number is None:
            raise DataError(f"{self.directory}: has no regions of picture {key!r}; it holds {len(self)} pictures, the first is {self.key(0)!r}")
        columns = self._open()
        first, count, width, height = (int(value) for value in columns["pictures"][number])
        found = {name: columns[name].rows(first, first + count) for name in ("features", "boxes", *LABELS) if name in columns}
        return Regions(str(key), width, height, **found)

    def names(self, key, least_confidence=0.0, with_attributes=True):
        """What the detector saw in a picture: "red square" for every region called so with enough confidence, most confident first.

        Args:
            key: the picture; least_confidence: of the object, 0 to 1 (the authors' tag files go by 0.35 and 0.2); with_attributes: put the
                attribute before the object.

        Returns:
            list of different str.

        Raises:
            DataError: no such picture, or the store has neither object ids nor their names.
        """
        regions = self[key]
        if regions.object_ids is None or self.object_names is None:
            what = "object ids" if regions.object_ids is None else "names of the objects (import with --object-names)"
            raise DataError(f"{self.directory}: has no {what}, so there are no tags")
        told = []
        for place in np.argsort(-regions.object_confidence, kind="stable"):
            if regions.object_confidence[place] < least_confidence:
                break
            name = self.object_names[regions.object_ids[place]]
            if with_attributes and self.attribute_names is not None and regions.attribute_ids is not None:
                name = f"{self.attribute_names[regions.attribute_ids[place]]} {name}"
            told.append(name)
        return list(dict.fromkeys(told))

    def texts(self):
        """Yields the texts that came with the pictures as dicts: ``image_id``, ``text_id``, ``label``, ``token_ids``,
        ``sentence_ids``, ``position_ids``, ``segment_labels`` and ``source`` (name of the file)."""
        if self.manifest["texts"]:
            with open(os.path.join(self.directory, TEXTS), encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)

    def _open(self):
        if self._columns is None:
            self._columns = open_columns(self.directory, self.manifest)
        return self._columns

    def key(self, number):
        """The name of picture ``number`` in the order of the sources."""
        columns = self._open()
        start = int(columns["key_ends"][number - 1]) if number else 0
        return bytes(columns["keys"][start:int(columns["key_ends"][number])]).decode("utf-8")

    def _find(self, key):
        columns, wanted = self._open(), key_hash(str(key))
        place = int(np.searchsorted(columns["hashes"], wanted))
        while place < len(self) and columns["hashes"][place] == wanted:
            number = int(columns["order"][place])
            if self.key(number) == str(key):
                return number
            place += 1
        return None


def key_hash(key):
    """A 64-bit hash of a name, the same everywhere."""
    return np.uint64(int.from_bytes(hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest(), "little"))


def read_manifest(directory):
    """The manifest of a store whose files are all there.

    Raises:
        DataError: see :class:`RegionStore`.
    """
    path = os.path.join(directory, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        version, files = manifest["version"], dict(manifest["files"])
    except FileNotFoundError:
        unfinished = os.path.isdir(directory + ".unfinished")
        raise DataError(f"{directory}: no store of region features here" + ("; its import was interrupted, run it again to go on" if unfinished
                        else "; make one with unimo2 features import")) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); import the features again") from None
    if version != STORE_VERSION:
        raise DataError(f"{directory}: a store of version {version}, this program reads version {STORE_VERSION}; import the features again")
    for name, size in files.items():
        try:
            found = os.path.getsize(os.path.join(directory, name))
        except OSError:
            raise DataError(f"{directory}: {name} is missing; copy the whole directory again, or import the features again") from None
        if found != size:
            raise DataError(f"{directory}: {name} has {found} bytes, {size} were written; copy it again, or import the features again")
    return manifest


def open_columns(directory, manifest):
    """The arrays of a store by name: large ones as ``MappedRows``, the index as memory maps."""
    columns = {}
    for name, (dtype, shape) in manifest["arrays"].items():
        path = os.path.join(directory, name + ".npy")
        if name in ("features", "boxes", *LABELS):
            columns[name] = MappedRows(path, dtype, shape)
        else:
            columns[name] = np.memmap(path, dtype, "r", HEADER_BYTES, tuple(shape))
    columns["keys"] = np.memmap(os.path.join(directory, "keys.bin"), np.uint8, "r")
    return columns


class MappedRows:
    """Rows of a mapped array file, copied out as float32 or int32; the mapped pages are let go at once.

    A clean mapped page costs nothing, but it counts in the process's resident memory, and a container's limit may go by that.
    """

    def __init__(self, path, dtype, shape):
        self._out = np.int32 if np.dtype(dtype).kind == "i" else np.float32
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._rows = np.frombuffer(self._map, dtype, offset=HEADER_BYTES).reshape(shape)
        self._row_bytes = self._rows.strides[0]

    def rows(self, start, stop):
        found = self._rows[start:stop].astype(self._out)  # always a copy
        if hasattr(mmap, "MADV_DONTNEED"):
            first = (HEADER_BYTES + start * self._row_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, HEADER_BYTES + stop * self._row_bytes - first)
        return found
