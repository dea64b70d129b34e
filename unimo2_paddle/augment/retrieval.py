"""Related pictures and texts of every record, by BM25 between captions or by the cosine of embeddings.

An embedding index is searched by :mod:`unimo2_paddle.vector_search`.
"""
import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from typing import List

import numpy as np

from unimo2_paddle.augment.parts import MANIFEST, Parts, ProcessShare, read_manifest, write_json
from unimo2_paddle.augment.sources import InputShard
from unimo2_paddle.augment.store import RecordWriter
from unimo2_paddle.augment.tables import TextColumn, TextColumnWriter, open_array, open_column
from unimo2_paddle.augment.text_index import words
from unimo2_paddle.errors import DataError, UserInputError
from unimo2_paddle.vector_search import VectorSearch

WHAT = "embedding index"
_BATCH = 64      # pictures or texts encoded, queries searched at once
_ROWS = 1 << 16  # rows of features checked at once


@dataclass(frozen=True)
class QueryRecord:
    """A record that looks for neighbours: its captions and, for an embedding index, its features float32 [n, H]."""

    key: str
    captions: List[str]
    features: np.ndarray


def build_embedding_index(directory, source, kind, encode, model, share):
    """Encode the pictures or captions of a source into an index; see ``Parts`` for sharing and resuming.

    Args:
        directory: to write; source: a ``Source``; kind: "images" or "texts"; encode: list of encoded pictures or texts -> features [n, H].
        model: fingerprint of the model; share: a ``ProcessShare``.

    Returns:
        the manifest, or None while other processes' parts are missing.
    """
    shards = source.shards()
    parts = Parts(directory, {"what": WHAT, "kind": kind, "model": model})
    parts.run(shards, share, lambda records, target: _encode_part(records, target, kind, encode))
    return parts.finish(shards, {"sources": list(source.paths)}, lambda names: _merge(parts, names))


def _encode_part(records, target, kind, encode):
    keys, owners, texts, pending, blocks = [], [], [], [], []
    for record in records:
        items = [record.image] if kind == "images" else [caption for caption in record.captions if words(caption)]
        for item in items:
            owners.append(len(keys))
            texts.append(item if kind == "texts" else "")
            pending.append(item)
        keys.append(record.key)
        while len(pending) >= _BATCH:
            blocks.append(encode(pending[:_BATCH]))
            pending = pending[_BATCH:]
    blocks += [encode(pending)] if pending else []
    features = np.concatenate(blocks) if blocks else np.zeros((0, 0), np.float32)
    _save_part(target(".npz"), keys, owners, texts, unit(features))
    return {"records": len(keys), "items": len(owners)}


def _save_part(path, keys, owners, texts, features):
    key_data, key_ends = TextColumn.arrays(keys)
    data, ends = TextColumn.arrays(texts)
    with open(path, "wb") as file:
        np.savez(file, keys=key_data, key_ends=key_ends, texts=data, text_ends=ends, owners=np.array(owners, np.int32), features=features)


def import_features(directory, features, keys, kind):
    """Make an index of features computed elsewhere (CLIP, a detector, a sentence encoder ...).

    Args:
        directory: to write (must not exist); features: .npy file, float [N, H].
        keys: text file, a line per row: ``KEY`` or ``SHARD<TAB>KEY`` or ``SHARD<TAB>KEY<TAB>TEXT``; rows of a record and of a shard stand together.
        kind: "images" or "texts".

    Returns:
        the manifest.

    Raises:
        DataError: the files are missing, malformed or do not fit each other; UserInputError: the directory exists.
    """
    try:
        array = np.load(features, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{features}: cannot read the features ({getattr(error, 'strerror', None) or 'no .npy array'})") from None
    rows = _key_rows(keys, os.path.splitext(os.path.basename(features))[0])
    if array.ndim != 2 or array.dtype.kind != "f" or len(rows) != len(array) or not array.size:
        raise DataError(f"{features}: {array.dtype} {list(array.shape)} does not fit {len(rows)} lines of {keys}; float [{len(rows)}, H] is needed")
    if not all(np.isfinite(array[first:first + _ROWS]).all() for first in range(0, len(array), _ROWS)):
        raise DataError(f"{features}: not every number is finite")
    if os.path.lexists(directory):
        raise UserInputError(f"{directory} exists; choose another --out, or remove it")
    shards = {}
    for number, (shard, key, text) in enumerate(rows):
        shards.setdefault(shard, []).append((number, key, text))
    parts = Parts(directory, {"what": WHAT, "kind": kind, "model": f"imported {_digest(features)}"})

    def make(entries, target):
        names, owners = [], []
        for _, key, _ in entries:
            if not names or names[-1] != key:
                names.append(key)
            owners.append(len(names) - 1)
        chosen = np.asarray(array[[number for number, _, _ in entries]], np.float32)
        _save_part(target(".npz"), names, owners, [text for _, _, text in entries], unit(chosen))
        return {"records": len(names), "items": len(owners)}

    inputs = [InputShard(name, "imported", len(entries), lambda bad, entries=entries: iter([entries])) for name, entries in shards.items()]
    parts.run(inputs, ProcessShare(), lambda records, target: make([entry for entries in records for entry in entries], target))
    return parts.finish(inputs, {"sources": [os.fspath(features)]}, lambda names: _merge(parts, names))


def _key_rows(path, stem):
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the keys: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    rows = []
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        fields = line.rstrip("\r").split("\t")
        if len(fields) > 3 or not all(fields[:2]) or "/" in fields[0] and len(fields) > 1:
            raise DataError(f"{path}:{number}: a line is KEY, SHARD and KEY, or SHARD, KEY and TEXT, separated by tabs")
        rows.append((stem, fields[0], "") if len(fields) == 1 else (fields[0], fields[1], fields[2] if len(fields) == 3 else ""))
    return rows


def unit(features):
    """Rows scaled to length 1 (zero rows stay zero), float32."""
    norms = np.sqrt((features.astype(np.float64) ** 2).sum(1, keepdims=True))
    return (features / np.where(norms > 0, norms, 1)).astype(np.float32)


def _merge(parts, names):
    folder = os.path.join(parts.directory, "index")
    temporary = folder + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    keys, texts, owners, first_records, first_items, records, items, width = (TextColumnWriter(temporary, "keys"), TextColumnWriter(temporary, "texts"),
                                                                             [], [], [], 0, 0, 0)
    raw = os.path.join(temporary, "features.npy")
    for name in names:
        with np.load(parts.path(name, ".npz"), allow_pickle=False) as part:
            keys.add(part["keys"], part["key_ends"])
            texts.add(part["texts"], part["text_ends"])
            owners.append(part["owners"] + np.int32(records))
            first_records.append(records)
            first_items.append(items)
            records, items = records + len(part["key_ends"]), items + len(part["owners"])
            width = max(width, part["features"].shape[1])
    keys.close()
    texts.close()
    if not items:
        raise DataError(f"{parts.directory}: the source has nothing to index")
    features = np.lib.format.open_memmap(raw, "w+", np.float32, (items, width))
    for name, first in zip(names, first_items):
        with np.load(parts.path(name, ".npz"), allow_pickle=False) as part:
            block = part["features"]
        if len(block):
            features[first:first + len(block)] = block
    features.flush()
    np.save(os.path.join(temporary, "owners.npy"), np.concatenate(owners))
    write_json(os.path.join(temporary, "about.json"), {"shards": names, "first_records": first_records, "first_items": first_items})
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)


class EmbeddingIndex:
    """A built index of unit features.

    Args:
        directory: what ``build_embedding_index`` or ``import_features`` wrote.
        backend: "faiss", "numpy", or "auto" (faiss where it is installed).

    Raises:
        DataError: it is missing, unfinished or damaged; UserInputError: faiss is asked for and not installed.
    """

    def __init__(self, directory, backend="auto"):
        manifest = read_manifest(directory, WHAT)
        if manifest.get("what") != WHAT:
            raise DataError(f"{directory}: is a {manifest.get('what')}, not an {WHAT}")
        self.directory, self.kind, self.model, self.sources = directory, manifest.get("kind"), manifest.get("model"), manifest.get("sources", [])
        folder = os.path.join(directory, "index")
        self.features, self.owners = open_array(folder, "features.npy"), np.array(open_array(folder, "owners.npy"))
        self.keys, self.texts = open_column(folder, "keys"), open_column(folder, "texts")
        try:
            with open(os.path.join(folder, "about.json"), encoding="utf-8") as file:
                about = json.load(file)
            self.shards = about["shards"]
            self._first_records, self._first_items = np.array(about["first_records"]), np.array([*about["first_items"], len(self.owners)])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{directory}: no usable {WHAT} ({type(error).__name__}); build it again") from None
        if self.features.ndim != 2 or len(self.features) != len(self.owners) or self.kind not in ("images", "texts"):
            raise DataError(f"{directory}: {len(self.owners)} items but features {list(self.features.shape)}; build the index again")
        self._search = VectorSearch(self.features, backend)

    def __len__(self):
        return len(self.owners)

    def fingerprint(self):
        """A short digest of what the index was built from."""
        return _digest(os.path.join(self.directory, MANIFEST))

    def record_of(self, item):
        """(shard name, key) of an item number."""
        owner = int(self.owners[item])
        return self.shards[int(np.searchsorted(self._first_records, owner, side="right")) - 1], self.keys[owner]

    def query_shards(self):
        """The index's own records as ``InputShard`` of ``QueryRecord``."""
        identity = self.fingerprint()
        return [InputShard(name, identity, int(len(np.unique(self.owners[first:last]))), functools.partial(self._queries, int(first), int(last)))
                for name, first, last in zip(self.shards, self._first_items[:-1], self._first_items[1:])]

    def _queries(self, first, last, bad):
        while first < last:
            end = first + int(np.searchsorted(self.owners[first:last], self.owners[first], side="right"))
            captions = [self.texts[item] for item in range(first, end)] if self.kind == "texts" else []
            yield QueryRecord(self.keys[int(self.owners[first])], captions, np.array(self.features[first:end]))
            first = end

    def check_width(self, queries):
        """Raise ``UserInputError`` unless queries [Q, H] are as wide as the features."""
        if queries.shape[1] != self.features.shape[1]:
            raise UserInputError(f"{self.directory}: features have width {self.features.shape[1]}, the queries {queries.shape[1]}; "
                                 "both must come from one model")

    def search(self, queries, number):
        """The nearest items.

        Args:
            queries: float [Q, H], scaled to length 1 here; number: items per query.

        Returns:
            list of Q pairs (items int64 [M], cosines float64 [M]), M = min(number, N), best first, equal ones in the order of the index.

        Raises:
            UserInputError: another width.
        """
        queries = unit(np.asarray(queries))
        self.check_width(queries)
        return self._search.search(queries, number)


@dataclass(frozen=True)
class RetrieveOptions:
    """``top``: neighbours per record; ``own_captions``: let a picture's own other captions be related texts."""

    top: int = 10
    own_captions: bool = False

    def __post_init__(self):
        if self.top < 1:
            raise UserInputError(f"--top {self.top}: must be at least 1")


class TextSearch:
    """Related texts by BM25 in a ``TextIndex``: a record's captions are the queries."""

    kind = "texts"

    def __init__(self, index):
        self.index = index

    def rank(self, record, number):
        """[(item, score)] over all captions of the record, an item with its best score; and whether every item of the index is among them."""
        lists = [self.index.bm25(caption, number) for caption in record.captions if words(caption)]
        return _best_of(lists), all(len(items) < number for items, _ in lists)


class EmbeddingSearch:
    """Related items by cosine in an ``EmbeddingIndex``."""

    def __init__(self, index):
        self.index, self.kind = index, index.kind

    def rank(self, record, number):
        """As ``TextSearch.rank``, for the record's features."""
        return _best_of(self.index.search(record.features, number)), number >= len(self.index)


def _best_of(lists):
    """Items of several result lists with their best score, best first."""
    best = {}
    for items, scores in lists:
        for item, score in zip(items.tolist(), scores.tolist()):
            best[item] = max(score, best.get(item, score))
    return sorted(best.items(), key=lambda entry: (-entry[1], entry[0]))


def neighbours(search, record, options):
    """What is related to a record, best first, without the record itself.

    Its own picture and the very texts it asks with are always left out, its other captions unless ``own_captions``; a text that occurs
    several times is told once.

    Args:
        search: a ``TextSearch`` or ``EmbeddingSearch``; record: with ``key`` and ``captions``; options: ``RetrieveOptions``.

    Returns:
        list of mappings with ``shard``, ``key``, ``score`` and, of texts, ``text``.
    """
    asked = {tuple(words(caption)) for caption in record.captions}
    wanted, complete, found = options.top + 16, False, []
    while not complete and len(found) < options.top:
        ranked, complete = search.rank(record, wanted)
        found, seen = [], set(asked)
        # beyond that an item may have a better score for a caption whose list was too short to name it
        for item, score in ranked if complete else ranked[:wanted]:
            shard, key = search.index.record_of(item)
            if key == record.key and (search.kind == "images" or not options.own_captions):
                continue
            row = {"shard": shard, "key": key, "score": round(score, 4)}
            if search.kind == "texts":
                row["text"] = search.index.texts[item]
                if tuple(words(row["text"])) in seen:
                    continue
                seen.add(tuple(words(row["text"])))
            found.append(row)
            if len(found) == options.top:
                break
        wanted *= 4
    return found


def retrieve_part(search, options, records, target):
    """Write the neighbours of an input shard's records (see ``Parts``); returns the counts."""
    counts = Counter()
    with RecordWriter(target) as writer:
        for record in records:
            found = neighbours(search, record, options)
            counts.update(records=1, neighbours=len(found), records_without_neighbour=not found)
            writer.write(record.key, {"key": record.key, search.kind: found})
    return dict(sorted(counts.items()))


def _digest(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()[:16]
