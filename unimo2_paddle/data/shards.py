"""Tar shards in the WebDataset convention: written, indexed and read in random access, ordered epoch by epoch.

A shard is a plain tar file; members that share a key (the name up to the first dot of its base name) are one record:
``key.jpg`` (or .jpeg, .png, .webp) is the picture, ``key.txt`` holds one text per line, ``key.json`` has a "caption".
This is what img2dataset writes for CC3M and SBU.
"""
import bisect
import functools
import glob
import hashlib
import io
import json
import os
import re
import tarfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import List, Optional

import numpy as np

from unimo2_paddle.data.remote_shards import is_remote
from unimo2_paddle.data.tar_members import tar_members
from unimo2_paddle.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
KINDS = ("pairs", "images", "texts")

_INDEX_VERSION = 1
_MAX_OPEN_SHARDS = 64
_MAX_TABLES = 256  # member indices kept in memory when they can be read back from the cache


@dataclass(frozen=True)
class Record:
    """One training record.

    Attributes:
        key: its name inside the shard.
        shard: path of the tar file.
        image: the encoded picture, or None for kind "texts".
        texts: the non-empty lines of key.txt, or the caption of key.json; empty for kind "images".
    """

    key: str
    shard: str
    image: Optional[bytes]
    texts: List[str]


class ShardWriter:
    """Writes records into numbered shards ``PREFIX-00000.tar``; the same records always give the same bytes.

    A shard appears under its name only when it is complete; leaving the context with an exception removes the
    unfinished one.

    Args:
        directory: where to write; created when missing.
        prefix: first part of the file names.
        records_per_shard: how many records fill a shard.

    Raises:
        DataError: the directory already holds shards with this prefix (they would be mixed up with the new ones).
    """

    def __init__(self, directory, prefix, records_per_shard=1000):
        if records_per_shard < 1:
            raise DataError(f"records_per_shard must be at least 1, not {records_per_shard}")
        self.directory, self.prefix, self.records_per_shard = os.fspath(directory), prefix, records_per_shard
        os.makedirs(self.directory, exist_ok=True)
        old = glob.glob(os.path.join(glob.escape(self.directory), glob.escape(prefix) + "-*.tar"))
        if old:
            raise DataError(f"{self.directory}: already holds {len(old)} shard(s) named {prefix}-*.tar; "
                            "remove them or write to another directory")
        self.paths = []
        self._tar, self._keys = None, set()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.close()
        else:
            self._abandon()

    def write(self, key, image=None, texts=()):
        """Appends one record and returns the file name of the shard that holds it.

        Args:
            key: relative name without a dot in its last part; unique in the shard.
            image: encoded JPEG, PNG or WebP bytes, or None.
            texts: strings without line breaks, one line each.
        """
        self._check(key, image, texts)
        if self._tar is None:
            self._path = os.path.join(self.directory, f"{self.prefix}-{len(self.paths):05d}.tar")
            self._tar = tarfile.open(self._path + ".tmp", "w", format=tarfile.GNU_FORMAT)
        if image is not None:
            self._add(f"{key}.{_image_extension(image)}", image)
        if texts:
            self._add(f"{key}.txt", "".join(text + "\n" for text in texts).encode("utf-8"))
        self._keys.add(key)
        name = os.path.basename(self._path)
        if len(self._keys) == self.records_per_shard:
            self.close()
        return name

    def close(self):
        """Completes the open shard, if any."""
        if self._tar is None:
            return
        self._tar.close()
        os.replace(self._path + ".tmp", self._path)
        self.paths.append(self._path)
        self._tar, self._keys = None, set()

    def _abandon(self):
        if self._tar is not None:
            self._tar.close()
            os.remove(self._path + ".tmp")
            self._tar = None

    def _check(self, key, image, texts):
        where = f"{self.directory}, record {key!r}"
        if _split_name(key + ".x") != (key, "x"):
            raise DataError(f"{where}: a key is a relative name without a dot in its last part")
        if key in self._keys:
            raise DataError(f"{where}: this key was already written to the shard")
        if image is None and not texts:
            raise DataError(f"{where}: neither an image nor a text")
        if image is not None and _image_extension(image) is None:
            raise DataError(f"{where}: the image is neither JPEG, PNG nor WebP")
        if any("\n" in text or "\r" in text or not text.strip() for text in texts):
            raise DataError(f"{where}: a text is empty or has a line break")

    def _add(self, name, data):
        member = tarfile.TarInfo(name)  # its mtime and owner are 0: bytes must not depend on who writes when
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))


class ShardSet:
    """Random access to the records of many shards through a small index of their members.

    The index is found by reading the tar headers alone and, with ``cache_dir``, is kept there for the next run. A set can
    be forked and pickled: every process opens its own files, and only a bounded number of them.

    Args:
        paths: tar paths or patterns (``*``, ``?``, ``{00000..00331}``, ``{a,b}``), one or a list, or with ``remote`` commands
            ``pipe:COMMAND`` (with ``{...}`` patterns). A shard that is named twice counts once.
        kind: "pairs" (picture and text), "images" (texts are ignored) or "texts" (pictures are ignored).
        cache_dir: directory for the indices, or None.
        bad_record: called as ``bad_record(shard, key, reason)`` for every record that is left out because a member is missing,
            empty, doubled, unsafely named, not a regular file or too large. What only shows in the content (undecodable
            text, JSON without a caption) raises DataError in ``read``.
        max_member_bytes: largest member that is accepted.
        remote: ``ShardCache`` for shards that commands fetch, or None.
        turn: (rank, workers) of workers that open the same shards at the same time: with ``cache_dir`` each begins elsewhere and
            finds what the others have indexed, so that they share the work.

    Raises:
        DataError: nothing matches, a shard cannot be fetched, or is empty, truncated, broken or without one usable record.
    """

    def __init__(self, paths, kind, cache_dir=None, bad_record=None, max_member_bytes=64 << 20, remote=None, turn=(0, 1)):
        if kind not in KINDS:
            raise DataError(f"unknown kind of shards {kind!r}: use one of {', '.join(KINDS)}")
        self.kind, self.cache_dir, self.max_member_bytes = kind, cache_dir, max_member_bytes
        self.remote, self.paths = remote, expand_shards(paths, remote is not None)
        if cache_dir is not None:
            try:
                os.makedirs(cache_dir, exist_ok=True)
            except OSError as error:
                raise DataError(f"{cache_dir}: cannot hold the shard indices: {error.strerror}") from None
        self._identities = [remote.identity(path) if is_remote(path) else _identity(path) for path in self.paths]
        self._tables, counts = OrderedDict(), {}
        first = len(self.paths) * turn[0] // turn[1]
        for number in (*range(first, len(self.paths)), *range(first)):
            table = self._table(number)
            counts[number] = len(table), table.bad
        self.shard_lengths = [counts[number][0] for number in range(len(counts))]
        self.bad_records = sum(len(bad) for _, bad in counts.values())
        for number, path in enumerate(self.paths if bad_record is not None else ()):
            for key, reason in counts[number][1]:
                bad_record(path, key, reason)
        self._starts = [0] + np.cumsum(self.shard_lengths).tolist()

    def __len__(self):
        return self._starts[-1]

    def read(self, index):
        """Returns record number ``index`` (shards in the order of ``paths``).

        Raises:
            DataError: the record's content is unusable, or the shard changed since it was indexed.
        """
        shard, row = self._find(index)
        table = self._table(shard)
        key, image, texts = table.key(row), None, []
        if self.kind != "texts":
            image = self._bytes(shard, key, *table.spans[row, :2])
        if self.kind != "images":
            texts = _texts(self._bytes(shard, key, *table.spans[row, 2:]), table.is_json[row],
                           f"{self.paths[shard]}, record {key}")
        return Record(key, self.paths[shard], image, texts)

    def place(self, index):
        """(path of the shard, key of the record) of record number ``index``."""
        shard, row = self._find(index)
        return self.paths[shard], self._table(shard).key(row)

    def neighbours(self, index):
        """The record numbers of the shard that holds record ``index``, as a range."""
        shard, _ = self._find(index)
        return range(self._starts[shard], self._starts[shard + 1])

    def _find(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def _bytes(self, shard, key, offset, size):
        handle = self._open(shard)
        data = os.pread(handle.descriptor, int(size), int(offset))
        if len(data) != size:
            raise DataError(f"{self.paths[shard]}, record {key}: shortened since it was indexed")
        return data

    def _open(self, shard):
        path = self.paths[shard]
        if is_remote(path):
            handle = self.remote.open(path)
            self._identities[shard] = self._identities[shard] or self.remote.identity(path)
            return handle
        return _open_shard(os.getpid(), path, self._identities[shard])

    def _table(self, shard):
        table = self._tables.pop(shard, None)
        self._tables[shard] = table = self._load_table(shard) if table is None else table
        if self.cache_dir is not None and len(self._tables) > _MAX_TABLES:
            self._tables.popitem(last=False)
        return table

    def _load_table(self, shard):
        path, handle, cache = self.paths[shard], None, None
        if self._identities[shard] is None:
            handle = self._open(shard)  # remote and never fetched
        identity = self._identities[shard]
        if self.cache_dir is not None:
            place = path if is_remote(path) else os.path.abspath(path)
            what = repr((_INDEX_VERSION, place, identity, self.kind, self.max_member_bytes))
            name = "remote" if is_remote(path) else os.path.basename(path)
            cache = os.path.join(self.cache_dir, f"{name}.{hashlib.sha256(what.encode('utf-8', 'replace')).hexdigest()[:20]}.npz")
            table = _Table.load(cache)
            if table is not None:
                return table
        handle = handle or self._open(shard)
        table = _index(tar_members(handle.descriptor, identity[0], path), self.kind, self.max_member_bytes)
        if not len(table):
            reasons = "; ".join(f"{key}: {reason}" for key, reason in table.bad[:3])
            raise DataError(f"{path}: no usable record for {self.kind}" + (f" ({reasons})" if reasons else " (empty tar)"))
        if cache is not None:
            table.save(cache)
        return table


class EpochOrder:
    """In which order an epoch reads the records: a function of (seed, epoch) alone, whatever the number of workers.

    The shards are shuffled, then the records inside windows of ``window`` consecutive records of that sequence: at any time all
    workers of all ranks read the same few shards, which the disk or a shard cache serves well, and only a window is ever
    materialised, whatever the length of the epoch. A permutation of the whole epoch (a Feistel network would need no memory either)
    would mix better and turn every record into a random read of the whole corpus. So ``window`` should span several shards, and
    who writes shards should shuffle the records over them.

    Args:
        shard_lengths: number of records of every shard, in the order of the set.
        seed: seed of the order.
        window: how many records are shuffled together.
    """

    def __init__(self, shard_lengths, seed, window=10000):
        if window < 1:
            raise DataError(f"the shuffle window must be at least 1, not {window}")
        self._lengths = np.asarray(shard_lengths, dtype=np.int64)
        self._firsts = np.cumsum(self._lengths) - self._lengths
        self._total, self.seed, self.window = int(self._lengths.sum()), seed, window
        self._epochs, self._windows = OrderedDict(), OrderedDict()

    def __len__(self):
        return self._total

    def fingerprint(self):
        """What the order depends on, as plain values: two orders are the same when their fingerprints are."""
        return {"records": self._total, "shards": len(self._lengths), "seed": int(self.seed), "window": self.window,
                "lengths": hashlib.sha256(self._lengths.astype("<i8").tobytes()).hexdigest()[:16]}

    def index(self, epoch, position):
        """Returns the record index read at ``position`` (0 .. len-1) of ``epoch``."""
        if not 0 <= position < self._total:
            raise IndexError(f"position {position} of an epoch of {self._total} records")
        number, inside = divmod(position, self.window)
        return int(_remember(self._windows, (epoch, number), self._window, 4)[inside])

    def window_of(self, epoch, position):
        """(epoch, number of the window) that holds a position."""
        return epoch, position // self.window

    def window_after(self, epoch, number):
        """(epoch, number) of the window that is read next."""
        return (epoch, number + 1) if (number + 1) * self.window < self._total else (epoch + 1, 0)

    def shards(self, epoch, number):
        """The numbers of the shards that a window reads, in the order they are reached."""
        order, starts = _remember(self._epochs, epoch, self._shuffle_shards, 2)
        last = min(self._total, (number + 1) * self.window) - 1
        first, last = np.searchsorted(starts, (number * self.window, last), side="right") - 1
        return [int(shard) for shard in order[first:last + 1] if self._lengths[shard]]

    def _window(self, name):
        epoch, number = name
        start = number * self.window
        count = min(self.window, self._total - start)
        positions = start + self._generator(epoch, 1 + number).permutation(count)
        order, starts = _remember(self._epochs, epoch, self._shuffle_shards, 2)
        slots = np.searchsorted(starts, positions, side="right") - 1
        return positions - starts[slots] + self._firsts[order[slots]]

    def _shuffle_shards(self, epoch):
        order = self._generator(epoch, 0).permutation(len(self._lengths))
        lengths = self._lengths[order]
        return order, np.cumsum(lengths) - lengths

    def _generator(self, epoch, part):
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(self.seed, spawn_key=(epoch, part))))


def expand_shards(patterns, allow_pipe=False):
    """Turns paths and patterns into the list of existing shard paths.

    Args:
        patterns: a path or pattern, or a list of them; ``{00000..00331}`` counts with leading zeros, ``{a,b}`` lists, then
            ``*``, ``?`` and ``[...]`` match files.
        allow_pipe: whether ``pipe:COMMAND`` may stand for a shard; its ``{...}`` are expanded too.

    Raises:
        DataError: a pattern matches nothing, a named file does not exist, or a command is not allowed.
    """
    patterns = [patterns] if isinstance(patterns, (str, os.PathLike)) else list(patterns)
    if not patterns:
        raise DataError("no shards given: name at least one tar file or pattern")
    found = OrderedDict()
    for pattern in map(os.fspath, patterns):
        missing = []
        if is_remote(pattern):
            if not allow_pipe:
                raise DataError(f"{pattern}: runs a shell command, which is off by default; set data.allow_pipe: true (and data.shard_cache) "
                                "if you trust where it comes from")
            found.update(dict.fromkeys(_expand_braces(pattern, pattern)))
            continue
        for path in [pattern] if os.path.exists(pattern) else _expand_braces(pattern, pattern):
            if os.path.isfile(path):
                found[path] = None
                continue
            matches = sorted(filter(os.path.isfile, glob.glob(path)))
            found.update(dict.fromkeys(matches))
            if not matches:
                missing.append(path)
        if missing:
            names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            if os.path.isdir(pattern):
                raise DataError(f"{pattern}: a directory stands where shards are expected; name its tar files, "
                                f"for example {os.path.join(pattern, '*.tar')}")
            raise DataError(f"no shard matches {pattern!r} (nothing at {names}; {len(missing)} missing): "
                            "check the path, or prepare the data first")
    return list(found)


def _expand_braces(pattern, whole):
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", brace.group(1))
    if span:
        first, last = int(span.group(1)), int(span.group(2))
        if not first <= last < first + 1000000:
            raise DataError(f"shard pattern {whole!r}: {brace.group(0)} does not count upwards (by less than a million)")
        width = len(span.group(1)) if span.group(1).startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(first, last + 1)]
    elif "," in brace.group(1):
        choices = brace.group(1).split(",")
    else:
        raise DataError(f"shard pattern {whole!r}: cannot expand {brace.group(0)}; use {{00000..00331}} or {{a,b}}")
    head, tail = pattern[:brace.start()], pattern[brace.end():]
    return [path for choice in choices for path in _expand_braces(head + choice + tail, whole)]


class _Handle:
    """An open shard that closes itself when the last user lets go: eviction cannot close it under a reading thread."""

    descriptor = None

    def __init__(self, path, identity):
        self.descriptor = os.open(path, os.O_RDONLY)
        status = os.fstat(self.descriptor)
        if (status.st_size, status.st_mtime_ns) != identity:
            raise DataError(f"{path}: changed since it was indexed; start again so that it is indexed anew")

    def __del__(self):
        if self.descriptor is not None:
            os.close(self.descriptor)


@functools.lru_cache(maxsize=_MAX_OPEN_SHARDS)
def _open_shard(process, path, identity):
    """The process number is part of the key, so a forked worker opens its own handle."""
    try:
        return _Handle(path, identity)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _identity(path):
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _remember(cache, key, make, limit):
    if key not in cache:
        if len(cache) >= limit:
            cache.popitem(last=False)
        cache[key] = make(key)
    return cache[key]


def _split_name(name):
    """``./a/b.c.jpg`` -> ("a/b", "c.jpg"); an unsafe name -> (None, ""); a hidden file or one without extension -> ("", "")."""
    while name.startswith("./"):
        name = name[2:]
    if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
        return None, ""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else ("", "")


def _index(members, kind, max_member_bytes):
    """Groups members into records; returns a _Table."""
    wanted = {} if kind == "texts" else dict.fromkeys(IMAGE_EXTENSIONS, "image")
    if kind != "images":
        wanted.update(txt="txt", json="json")
    records, reasons, bad = {}, {}, []
    for member in members:
        if member.type == "directory":
            continue
        key, extension = _split_name(member.name)
        if key is None:
            bad.append((member.name, "unsafe member name (absolute, or with ..)"))
        if not key:
            continue
        record, role = records.setdefault(key, {}), wanted.get(extension)
        if role is None:
            continue
        if member.type != "file":
            reasons.setdefault(key, f".{extension} is not a regular file")
        elif member.size > max_member_bytes:
            reasons.setdefault(key, f".{extension} has {member.size} bytes, more than {max_member_bytes}")
        elif role in record:
            reasons.setdefault(key, f"more than one {role} member")
        else:
            record[role] = (member.offset, member.size)
    rows = []
    for key, record in records.items():
        image, text = record.get("image", (0, 0)), record.get("txt", (0, 0))
        is_json = not text[1]
        if is_json:  # img2dataset leaves key.txt empty when a picture came without a caption
            text = record.get("json", (0, 0))
        reason = reasons.get(key)
        if reason is None and kind != "texts" and not image[1]:
            reason = "empty image" if "image" in record else "no image (" + ", ".join(IMAGE_EXTENSIONS) + ")"
        if reason is None and kind != "images" and not text[1]:
            reason = "empty text" if "txt" in record or "json" in record else "no text (txt, json)"
        if reason is None:
            rows.append((key, image + text, is_json))
        else:
            bad.append((key, reason))
    return _Table.build(rows, bad)


@dataclass(frozen=True)
class _Table:
    """The usable records of a shard.

    Attributes:
        spans: int64 [N, 4]: image offset, image size, text offset, text size (0 where the kind needs none).
        is_json: bool [N], the text is the "caption" of a JSON file.
        ends, names: the keys, concatenated as UTF-8 in ``names`` (uint8), each ending at ``ends`` (int64 [N]).
        bad: list of (key, reason).
    """

    spans: np.ndarray
    is_json: np.ndarray
    ends: np.ndarray
    names: np.ndarray
    bad: list

    @classmethod
    def build(cls, rows, bad):
        keys = [key.encode("utf-8", "backslashreplace") for key, _, _ in rows]
        return cls(np.array([span for _, span, _ in rows], np.int64).reshape(-1, 4),
                   np.array([is_json for _, _, is_json in rows], bool),
                   np.cumsum([len(key) for key in keys], dtype=np.int64),
                   np.frombuffer(b"".join(keys), np.uint8), bad)

    def __len__(self):
        return len(self.ends)

    def key(self, row):
        start = self.ends[row - 1] if row else 0
        return self.names[start:self.ends[row]].tobytes().decode("utf-8")

    def save(self, path):
        temporary = f"{path}.{os.urandom(6).hex()}.tmp"  # workers of several machines may index the same shard at once
        bad = np.frombuffer(json.dumps(self.bad).encode("utf-8"), np.uint8)
        try:
            with open(temporary, "wb") as file:
                np.savez(file, spans=self.spans, is_json=self.is_json, ends=self.ends, names=self.names, bad=bad)
            os.replace(temporary, path)
        except OSError as error:
            if os.path.exists(temporary):
                os.remove(temporary)
            raise DataError(f"{path}: cannot store the shard index: {error.strerror}") from None

    @classmethod
    def load(cls, path):
        """Returns the stored table, or None when there is none or it is damaged (it is then made again)."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in ("spans", "is_json", "ends", "names")}
                bad = [tuple(entry) for entry in json.loads(stored["bad"].tobytes())]
            return cls(bad=bad, **arrays)
        except Exception:  # numpy and zipfile raise a dozen kinds for damaged files; each means "index again"
            return None


def _image_extension(data):
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _texts(data, is_json, where):
    try:
        text = data.decode("utf-8-sig")
        caption = json.loads(text).get("caption") if is_json else None
    except (ValueError, AttributeError, RecursionError):
        raise DataError(f"{where}: " + ("not a JSON object in UTF-8" if is_json else "text is not UTF-8")) from None
    if is_json:
        lines = [" ".join(caption.split())] if isinstance(caption, str) else []
    else:
        lines = [line.strip() for line in text.split("\n")]
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"{where}: " + ('JSON without a "caption"' if is_json else "empty text"))
    return lines
