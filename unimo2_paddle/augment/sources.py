"""Where the records to augment come from: tar shards, or caption files cut into blocks of records, one input shard each."""
import functools
import os
from dataclasses import dataclass
from typing import Callable, Iterator, List, Optional, Union

from unimo2_paddle.data.formats.coco_captions import read_coco_captions
from unimo2_paddle.data.formats.karpathy import read_karpathy
from unimo2_paddle.data.shards import ShardSet, expand_shards
from unimo2_paddle.errors import DataError, UserInputError

BLOCK = 10000  # records of a caption file that make one input shard
FORMATS = ("shards", "karpathy", "coco", "lines")


@dataclass(frozen=True)
class AugmentRecord:
    """One record: its key, the input shard's name, its captions (possibly none) and its picture (path, encoded bytes or None)."""

    key: str
    shard: str
    captions: List[str]
    image: Optional[Union[str, bytes]] = None


@dataclass(frozen=True)
class InputShard:
    """A part of the source: ``name`` names the output shard; ``identity`` changes when the input does; ``read()`` yields its records,
    calling ``bad(key, reason)`` for each that cannot be used; ``records`` is how many are tried, ``left_out`` how many had no usable member."""

    name: str
    identity: str
    records: int
    read: Callable[..., Iterator[AugmentRecord]]
    left_out: int = 0


@dataclass(frozen=True)
class Source:
    """What the command line says about a source.

    Attributes:
        paths: tar paths or patterns, or one caption file.
        format: "shards", "karpathy", "coco" or "lines" (one caption a line; the key is the line's number, from 0).
        kind: "pairs", "images" or "texts": what a tar record must have.
        images: picture folder of karpathy and coco.
        split: split of a Karpathy file.
        cache_dir: where shard indices are kept, or None.
    """

    paths: List[str]
    format: str = "shards"
    kind: str = "pairs"
    images: str = ""
    split: str = "train"
    cache_dir: Optional[str] = None

    def shards(self):
        """The input shards in order.

        Raises:
            UserInputError: two would have one name; DataError: as the readers of the formats.
        """
        if self.format not in FORMATS:
            raise UserInputError(f"source format {self.format!r}: use one of {', '.join(FORMATS)}")
        if self.format == "shards":
            shards = [self._tar(path) for path in expand_shards(self.paths)]
        else:
            if len(self.paths) != 1:
                raise UserInputError(f"source format {self.format}: give one file, not {len(self.paths)}")
            shards = self._blocks(self.paths[0])
        names = [shard.name for shard in shards]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise UserInputError(f"several input shards are called {twice[0]}: the output has one file per name; rename them or augment them separately")
        return shards

    def _tar(self, path):
        reader = ShardSet([path], self.kind, cache_dir=self.cache_dir)
        name = os.path.basename(path)
        name = name[:-4] if name.endswith(".tar") else name
        return InputShard(name, _identity(path), len(reader), functools.partial(_read_tar, reader, name), reader.bad_records)

    def _blocks(self, path):
        stem = os.path.splitext(os.path.basename(path))[0]
        if self.format == "karpathy":
            records = [(image.image_id, image.captions, image.path) for image in read_karpathy(path, self.images, self.split)]
            stem = f"{stem}-{self.split}"
        elif self.format == "coco":
            records = [(image.image_id, image.captions, image.path) for image in read_coco_captions(path, self.images)]
        else:
            return _line_blocks(path, stem)
        identity = _identity(path)
        return [InputShard(f"{stem}-{number:05d}", f"{identity} {self.split} {first}", len(records[first:first + BLOCK]),
                           functools.partial(_read_block, records[first:first + BLOCK], f"{stem}-{number:05d}"))
                for number, first in enumerate(range(0, len(records), BLOCK))]


def _read_tar(reader, name, bad):
    for index in range(len(reader)):
        try:
            record = reader.read(index)
        except DataError as error:
            bad(f"record {index}", str(error))
            continue
        yield AugmentRecord(record.key, name, record.texts, record.image)


def _read_block(records, name, bad):
    for key, captions, image in records:
        yield AugmentRecord(key, name, [caption for caption in captions if caption.strip()], image)


def _line_blocks(path, stem):
    """Blocks of a text file, found by one pass that keeps a position per block."""
    starts, count = [], 0
    try:
        with open(path, "rb") as file:
            position = 0
            for line in file:
                if count % BLOCK == 0:
                    starts.append((position, count))
                position += len(line)
                count += 1
    except OSError as error:
        raise DataError(f"{path}: cannot read the captions: {error.strerror}") from None
    if not count:
        raise DataError(f"{path}: no caption in this file")
    identity = _identity(path)
    return [InputShard(f"{stem}-{number:05d}", f"{identity} {first}", min(BLOCK, count - first),
                       functools.partial(_read_lines, path, f"{stem}-{number:05d}", position, first, min(BLOCK, count - first)))
            for number, (position, first) in enumerate(starts)]


def _read_lines(path, name, position, first, count, bad):
    with open(path, "rb") as file:
        file.seek(position)
        for number in range(first, first + count):
            line = file.readline()
            try:
                text = line.decode("utf-8").strip()
            except UnicodeDecodeError:
                bad(str(number), f"{path}:{number + 1}: not UTF-8 text")
                continue
            yield AugmentRecord(str(number), name, [text] if text else [])


def _identity(path):
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"
