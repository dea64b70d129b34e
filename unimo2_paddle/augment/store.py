"""Augmentations on disk, JSON lines with an index by record key, and their random access for a batch builder."""
import json
import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Dict, List

import numpy as np

from unimo2_paddle.augment.parts import read_manifest
from unimo2_paddle.errors import DataError

KINDS = ("rewrites", "texts", "images")  # the folders of an augmentation directory
_MAX_OPEN = 64


class RecordWriter:
    """Writes ``.jsonl`` and ``.index.npy`` (uint64 [N, 2]: hash of the key, byte offset; sorted) through ``Parts``' ``target``."""

    def __init__(self, target):
        self._rows, self._index_path = open(target(".jsonl"), "wb"), target(".index.npy")
        self._entries, self._keys, self._offset = [], set(), 0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self._rows.close()
        if kind is None:
            index = np.array(sorted(self._entries), np.uint64).reshape(-1, 2)
            with open(self._index_path, "wb") as file:
                np.save(file, index)

    def write(self, key, row):
        """Append a JSON row.

        Raises:
            DataError: the input shard has this key twice.
        """
        if key in self._keys:
            raise DataError(f"record {key!r} occurs twice in one input shard; keys must be unique there")
        self._keys.add(key)
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        self._rows.write(line)
        self._entries.append((_hash(key), self._offset))
        self._offset += len(line)


@dataclass
class CaptionAugmentations:
    """Of one caption: ``positives`` (texts), ``negatives``: level -> list of mappings with ``text`` and what was changed or ``score``."""

    text: str
    positives: List[str]
    negatives: Dict[str, List[dict]]


@dataclass
class RecordAugmentations:
    """Of one record: its rewritten captions, related texts (mappings with ``text``, ``shard``, ``key``, ``score``) and related images
    (``shard``, ``key``, ``score``); empty lists where nothing was made."""

    key: str
    captions: List[CaptionAugmentations] = field(default_factory=list)
    texts: List[dict] = field(default_factory=list)
    images: List[dict] = field(default_factory=list)


class Augmentations:
    """Random access to what ``unimo2 augment`` wrote. Can be pickled and forked; keeps a bounded number of files open.

    Args:
        directory: holds ``rewrites``, ``texts`` and ``images``, or some of them.

    Raises:
        DataError: none of them is there, or one is unfinished or damaged.
    """

    def __init__(self, directory):
        self.directory = os.fspath(directory)
        self.manifests = {kind: read_manifest(os.path.join(self.directory, kind), kind) for kind in KINDS
                          if os.path.isdir(os.path.join(self.directory, kind))}
        if not self.manifests:
            raise DataError(f"{self.directory}: no augmentations here (rewrites, texts or images); make them with unimo2 augment")
        self._open = OrderedDict()

    def __getstate__(self):
        return {**self.__dict__, "_open": OrderedDict()}

    def shards(self):
        """The names of the input shards, in order."""
        return list(OrderedDict.fromkeys(name for manifest in self.manifests.values() for name in manifest["parts"]))

    def keys(self, shard):
        """The record keys of an input shard, in the order of its file."""
        kind = next((kind for kind, manifest in self.manifests.items() if shard in manifest["parts"]), None)
        if kind is None:
            raise DataError(f"{self.directory}: no input shard {shard!r}")
        with open(os.path.join(self.directory, kind, "parts", shard + ".jsonl"), encoding="utf-8") as file:
            return [json.loads(line)["key"] for line in file]

    def get(self, key, shard=None):
        """The augmentations of a record.

        Args:
            key: its key; shard: its input shard's file name or path (".tar" may be left out). Without it every part is searched, and a key
                that several shards have is refused.

        Returns:
            :class:`RecordAugmentations`.

        Raises:
            DataError: there is no such record or shard, the key is ambiguous, or a file is damaged.
        """
        if shard is not None:
            shard = os.path.basename(shard)
            shard = shard[:-4] if shard.endswith(".tar") else shard
        result, where = RecordAugmentations(key), set()
        for kind, manifest in self.manifests.items():
            for name in [shard] if shard is not None else manifest["parts"]:
                row = self._row(kind, name, key) if name in manifest["parts"] else None
                if row is None:
                    continue
                where.add(name)
                try:
                    if kind == "rewrites":
                        result.captions = [CaptionAugmentations(entry["text"], entry["positives"], entry["negatives"]) for entry in row["captions"]]
                    else:
                        setattr(result, kind, row[kind])
                except (KeyError, TypeError):
                    raise DataError(f"{self.directory}/{kind}/parts/{name}.jsonl: the row of {key!r} is damaged; make this part again") from None
        if not where:
            place = f" in shard {shard!r}" if shard is not None else ""
            raise DataError(f"{self.directory}: no augmentations of record {key!r}{place}; were they made from this corpus?")
        if len(where) > 1:
            raise DataError(f"{self.directory}: record {key!r} is in {len(where)} shards ({', '.join(sorted(where)[:3])}); name the shard")
        return result

    def _row(self, kind, name, key):
        index, descriptor = self._part(kind, name)
        value, path = np.uint64(_hash(key)), os.path.join(self.directory, kind, "parts", name + ".jsonl")
        place = int(np.searchsorted(index[:, 0], value)) if len(index) else 0
        while place < len(index) and index[place, 0] == value:
            try:
                row = json.loads(_line(descriptor, int(index[place, 1])))
                found = row["key"] == key
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path}: damaged at byte {int(index[place, 1])}; make this part again (remove it and repeat the command)") from None
            if found:
                return row
            place += 1
        return None

    def _part(self, kind, name):
        entry = (os.getpid(), kind, name)  # a forked worker opens its own
        if entry in self._open:
            self._open.move_to_end(entry)
            return self._open[entry][:2]
        path = os.path.join(self.directory, kind, "parts", name)
        try:
            index = np.load(path + ".index.npy", allow_pickle=False)  # 16 bytes a record
            file = open(path + ".jsonl", "rb")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'damaged'}); make this part again") from None
        self._open[entry] = (index, file.fileno(), file)
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)[1][2].close()
        return index, file.fileno()


def _line(descriptor, offset, block=1 << 14):
    """The line that begins at a byte, read without moving the file's position."""
    pieces = []
    while True:
        piece = os.pread(descriptor, block, offset)
        line, newline, _ = piece.partition(b"\n")
        pieces.append(line)
        if newline or not piece:
            return b"".join(pieces).decode("utf-8")
        offset += len(piece)


def _hash(key):
    data = key.encode("utf-8", "surrogatepass")
    return zlib.crc32(data) << 32 | zlib.adler32(data)
