"""Where UNIMO's pre-training reads: stores of region features with captions and their augmentations, and texts."""
import os
from dataclasses import dataclass, field
from typing import List, Optional, Union

from unimo2_paddle.augment.store import Augmentations, RecordAugmentations
from unimo2_paddle.data.formats.karpathy import read_karpathy
from unimo2_paddle.data.mixture import CORPORA, ORDER_DRAW, generator
from unimo2_paddle.data.pretrain_batches import Source, open_sources, shard_problems
from unimo2_paddle.data.region_store import Regions, RegionStore
from unimo2_paddle.data.shards import EpochOrder, ShardSet
from unimo2_paddle.errors import DataError

BLOCK = 1000  # records of a store or caption file that are shuffled like a shard
FORMATS = ("shards", "karpathy")


@dataclass
class PairSource:
    """Pictures with captions: ``regions`` is a store (``unimo2 features import``), ``captions`` tar shards with ``key.txt`` or ``key.json``
    (their pictures are not read) or a Karpathy JSON file; a key or picture name is looked up in the store. ``augmentations``: what
    ``unimo2 augment`` wrote of these captions, empty = none. ``restval``: to split "train" belongs "restval" (COCO)."""

    regions: str
    captions: Union[str, List[str]]
    format: str = "shards"
    split: str = "train"
    restval: bool = True
    augmentations: str = ""
    weight: float = 1.0

    def problems(self):
        found = [] if self.weight > 0 else [f"weight: must be above 0, is {self.weight}"]
        if self.format not in FORMATS:
            found.append(f"format: {self.format!r} is not one of {', '.join(FORMATS)}")
        if self.format == "karpathy" and not isinstance(self.captions, str):
            found.append("captions: must be one file with format: karpathy")
        return found


@dataclass
class RegionSource:
    """Pictures without captions: a store of region features."""

    regions: str
    weight: float = 1.0

    def problems(self):
        return [] if self.weight > 0 else [f"weight: must be above 0, is {self.weight}"]


@dataclass
class UnimoPretrainData:
    """Group ``data`` of UNIMO's pre-training: three corpora, each a weighted list of sources.

    ``related``: stores with the pictures that ``unimo2 augment retrieve`` found; empty: those of ``images``. The longest picture is the
    model's ``max_img_len`` (regions with the global one).
    """

    vocab: str
    pairs: List[PairSource] = field(default_factory=list)
    images: List[RegionSource] = field(default_factory=list)
    texts: List[Source] = field(default_factory=list)
    related: List[str] = field(default_factory=list)
    max_text_len: int = 128
    shuffle_window: int = 10000
    cache_dir: str = ""             # where indices of tar shards are kept between runs; empty: in memory only
    allow_pipe: bool = False        # whether shards of texts may be commands, see docs of pre-training
    shard_cache: str = ""
    shard_cache_gb: float = 100.0
    num_workers: int = 0
    max_bad_ratio: float = 0.01

    def problems(self):
        problems = [f"{key}: must be at least {low}, is {getattr(self, key)}"
                    for key, low in (("max_text_len", 3), ("shuffle_window", 1), ("num_workers", 0)) if getattr(self, key) < low]
        if not 0 <= self.max_bad_ratio <= 1:
            problems.append(f"max_bad_ratio: must be between 0 and 1, is {self.max_bad_ratio}")
        if self.shard_cache_gb <= 0:
            problems.append(f"shard_cache_gb: must be above 0, is {self.shard_cache_gb}")
        return problems + shard_problems(self, ["texts"])


@dataclass(frozen=True)
class PictureRecord:
    """A picture's regions; of the pairs also its captions and, where they were made, their augmentations."""

    key: str
    shard: str
    regions: Regions
    texts: Optional[List[str]] = None
    augmentations: Optional[RecordAugmentations] = None


class _Blocks:
    """``count`` records in blocks that are shuffled like shards; the reading interface of ``ShardSet``."""

    def __init__(self, count):
        self._count = count
        self.shard_lengths = [min(BLOCK, count - first) for first in range(0, count, BLOCK)]

    def __len__(self):
        return self._count

    def neighbours(self, index):
        """The record numbers of the block that holds record ``index``."""
        first = index // BLOCK * BLOCK
        return range(first, min(first + BLOCK, self._count))


class CaptionFile(_Blocks):
    """The captions of a Karpathy JSON file by record number."""

    def __init__(self, path, split, restval):
        self._name = os.path.basename(path)
        # only keys and captions stay: an epoch of COCO is 113,000 pictures
        self._rows = [(image.image_id, image.captions) for image in read_karpathy(path, "", split, restval, check_pictures=False)]
        super().__init__(len(self._rows))

    def place(self, index):
        """(name of the file, name of the picture)."""
        return self._name, self._rows[index][0]

    def texts(self, index):
        """(input shard of ``unimo2 augment`` or None where the key alone says which, key, captions)."""
        return None, *self._rows[index]


class CaptionShards:
    """The captions of tar shards by record number."""

    def __init__(self, shards):
        self._shards, self.shard_lengths = shards, shards.shard_lengths
        self.place, self.neighbours = shards.place, shards.neighbours

    def __len__(self):
        return len(self._shards)

    def texts(self, index):
        """As :meth:`CaptionFile.texts`."""
        record = self._shards.read(index)
        return record.shard, record.key, record.texts


class PairReader:
    """Records of a :class:`PairSource`.

    Raises:
        DataError: files are missing or damaged; in ``read``, a picture is not in the store or has no augmentations.
    """

    def __init__(self, store, captions, augmentations=None):
        self.store, self._captions, self._augmentations = store, captions, augmentations
        self.shard_lengths, self.place, self.neighbours = captions.shard_lengths, captions.place, captions.neighbours

    def __len__(self):
        return len(self._captions)

    def read(self, index):
        """The :class:`PictureRecord` number ``index``."""
        shard, key, texts = self._captions.texts(index)
        made = None if self._augmentations is None else self._augmentations.get(key, shard)
        return PictureRecord(key, self.place(index)[0], self.store[key], texts, made)


class RegionReader(_Blocks):
    """Records of a :class:`RegionSource`."""

    def __init__(self, store):
        super().__init__(len(store))
        self.store = store

    def place(self, index):
        """(directory of the store, name of the picture)."""
        return self.store.directory, self.store.key(index)

    def read(self, index):
        """The :class:`PictureRecord` number ``index``."""
        key = self.store.key(index)
        return PictureRecord(key, self.store.directory, self.store[key])


def open_unimo_sources(data, corpora, seed, bad_records, list_bad=True, turn=(0, 1)):
    """Open the corpora in use; arguments and results as of ``open_sources``, with :class:`PairReader` and :class:`RegionReader`.

    Raises:
        DataError: see ``RegionStore``, ``ShardSet``, ``Augmentations``.
    """
    readers, orders = open_sources(data, [c for c in corpora if c == "texts"], seed, bad_records, list_bad, turn)
    for corpus in (c for c in corpora if c != "texts"):
        sources = getattr(data, corpus)
        readers[corpus] = [_pair_reader(s, data, bad_records, list_bad, turn) if corpus == "pairs" else RegionReader(RegionStore(s.regions))
                           for s in sources]
        seeds = [generator(seed, ORDER_DRAW, CORPORA.index(corpus), number).integers(1 << 62) for number in range(len(sources))]
        orders[corpus] = [(source.weight, EpochOrder(reader.shard_lengths, order_seed, data.shuffle_window))
                          for source, reader, order_seed in zip(sources, readers[corpus], seeds)]
    return readers, orders


def _pair_reader(source, data, bad_records, list_bad, turn):
    store = RegionStore(source.regions)
    if source.format == "karpathy":
        captions = CaptionFile(source.captions, source.split, source.restval)
    else:
        shards = ShardSet(source.captions, "texts", cache_dir=data.cache_dir or None, bad_record=bad_records.write if list_bad else None, turn=turn)
        bad_records.check(shards.bad_records, shards.bad_records + len(shards), f"records of {source.captions}")
        captions = CaptionShards(shards)
    return PairReader(store, captions, Augmentations(source.augmentations) if source.augmentations else None)


class RelatedPictures:
    """The regions of retrieved pictures, wherever they are stored.

    Args:
        directories: stores of region features; a name that several have is taken from the first.
    """

    def __init__(self, directories):
        self._stores = [RegionStore(directory) for directory in directories]

    def __iter__(self):
        return iter(self._stores)

    def find(self, key):
        """The ``Regions`` of a picture, None where no store has it."""
        return next((store[key] for store in self._stores if key in store), None)


def check_stores(stores, config, classes):
    """Raise ``DataError`` for stores whose features are not the model's, or that name no objects although ``classes`` are predicted."""
    for store in stores:
        if store.feature_size != config.image_embedding_size:
            raise DataError(f"{store.directory}: the features are {store.feature_size} wide, the model's image_embedding_size is "
                            f"{config.image_embedding_size}; use the features the model was made for, or set model.image_embedding_size")
        if classes and "object_ids" not in store.manifest["arrays"]:
            raise DataError(f"{store.directory}: has no object ids to predict; import features with them, or set the weights region_classes to 0")
