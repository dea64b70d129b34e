"""Remote shards: ``pipe:COMMAND`` is a shell command that writes a tar file to its standard output.

    pipe:aws s3 cp s3://bucket/cc3m/00042.tar -

A shard is fetched whole into a local cache of limited size, shared by all processes of a machine, and then read like a local one; the
copy used least recently makes room for new ones. Since a command can do anything, configurations must allow them by name.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import queue
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from unimo2_paddle.data.tar_members import tar_members
from unimo2_paddle.errors import DataError
from unimo2_paddle.file_lock import locked

PREFIX = "pipe:"

_CHUNK = 1 << 20
_ROOM_EVERY = 64 << 20   # bytes fetched between two looks at the size of the cache
_MAX_HANDLES = 16
_TOUCH_EVERY = 10.0      # seconds
_handles = OrderedDict()  # open copies of this process


def is_remote(path):
    """Whether a shard is named by a command."""
    return path.startswith(PREFIX)


@dataclass(frozen=True)
class ShardCache:
    """Local copies of remote shards in a directory that several processes may share.

    Beside every copy stands a small JSON file with size and sha256 of the shard, kept when the copy goes: a shard that is fetched
    again must be the same, or positions in it would mean other records.

    Args:
        directory: where the copies are; created when missing.
        limit: bytes that all copies together may take. Fetches under way count too, but are never stopped for it: with several
            processes fetching at once it can be passed by their shards for a while.
        retries: how often a command that fails is tried again, after 1, 2, 4, ... times ``delay`` seconds.
        stall: seconds without a byte after which a command counts as failed.
    """

    directory: str
    limit: int
    retries: int = 3
    delay: float = 1.0
    stall: float = 300.0

    def identity(self, shard):
        """(size, sha256) of a shard that was fetched before, else None."""
        try:
            with open(self._file(shard, ".json"), encoding="utf-8") as file:
                entry = json.load(file)
            return int(entry["size"]), str(entry["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def open(self, shard):
        """An open copy of the shard, fetched if it is not there.

        Returns:
            an object with ``descriptor``; it stays readable when the copy is removed.

        Raises:
            DataError: the command failed to the last, wrote no whole tar file, a larger one than the cache may hold, or another one
                than before; or the cache cannot be written.
        """
        name = (self.directory, shard)
        handle = _handles.pop(name, None)
        if handle is None:
            for old in [old for old, held in _handles.items() if os.fstat(held.descriptor).st_nlink == 0]:
                del _handles[old]  # its copy was removed, but the disk gets the space back only when nobody has it open
            try:
                handle = _Handle(self._opened(shard))
            except OSError as error:
                raise self._unusable(error) from None
        handle.touch()
        _handles[name] = handle
        while len(_handles) > _MAX_HANDLES:
            _handles.popitem(last=False)
        return handle

    def fetch(self, shard):
        """Have a copy of the shard there; raises as :meth:`open`."""
        try:
            os.close(self._opened(shard))
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error):
        return DataError(f"{self.directory}: cannot hold copies of remote shards: {error.strerror}; free space or choose another "
                         "data.shard_cache")

    def _file(self, shard, ending):
        return os.path.join(self.directory, hashlib.sha256(shard.encode("utf-8", "surrogateescape")).hexdigest()[:24] + ending)

    def _opened(self, shard):
        os.makedirs(self.directory, exist_ok=True)
        copy = self._file(shard, ".tar")
        descriptor = _open_used(copy)
        if descriptor is None:
            with locked(self._file(shard, ".lock")):
                descriptor = _open_used(copy)  # another process may have fetched it while this one waited
                if descriptor is None:
                    descriptor = self._fetch(shard, copy)
        return descriptor

    def _fetch(self, shard, copy):
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.delay * 2 ** (attempt - 1))
            try:
                return self._fetch_once(shard, copy)
            except _Failed as error:
                problem = error
        raise DataError(f"{shard}: {problem} (tried {self.retries + 1} times)")

    def _fetch_once(self, shard, copy):
        """Runs the command into a temporary file, which becomes the copy when all of it proved right."""
        temporary = copy + ".tmp"  # of nobody else: the shard's lock is held
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            size, digest = self._run(shard, descriptor)
            known = self.identity(shard)
            if known is None:
                try:
                    for _ in tar_members(descriptor, size, shard):
                        pass
                except DataError as error:
                    raise _Failed(str(error)[len(shard) + 2:]) from None
                self._register(shard, size, digest)
            elif known != (size, digest):
                raise _Failed(f"the shard is not the one that was indexed: {size} bytes now, {known[0]} then, or other content; if it was "
                              f"replaced on purpose, remove {self._file(shard, '.json')} and start a new run")
            os.rename(temporary, copy)
            self._make_room()
            return descriptor
        except BaseException:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise

    def _run(self, shard, descriptor):
        """The command's output into ``descriptor``; returns (bytes, sha256)."""
        digest, size, looked = hashlib.sha256(), 0, 0
        with tempfile.TemporaryFile(dir=self.directory) as errors:
            # a session of its own, so that a command of several processes ends as a whole
            process = subprocess.Popen(shard[len(PREFIX):], shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                                       start_new_session=True)
            try:
                while True:
                    if not select.select([process.stdout], [], [], self.stall)[0]:
                        raise _Failed(f"the command gave nothing for {self.stall:g} s")
                    chunk = os.read(process.stdout.fileno(), _CHUNK)
                    if not chunk:
                        break
                    size += len(chunk)
                    if size > self.limit:
                        raise DataError(f"{shard}: is larger than all of the shard cache may be ({self.limit} bytes); raise data.shard_cache_gb")
                    digest.update(chunk)
                    _write(descriptor, chunk)
                    if size - looked >= _ROOM_EVERY:
                        looked = size
                        self._make_room()
                status = process.wait(self.stall)
            except subprocess.TimeoutExpired:
                raise _Failed("the command closed its output and did not end") from None
            finally:
                _end(process)
            if status:
                raise _Failed(f"the command ended with exit status {status}: {_last_line(errors)}")
        return size, digest.hexdigest()

    def _register(self, shard, size, digest):
        path = self._file(shard, ".json")
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            json.dump({"shard": shard, "size": size, "sha256": digest}, file)
        os.replace(path + ".tmp", path)

    def _make_room(self):
        """Removes the copies used least recently until all of them fit, and what killed fetches left behind."""
        with locked(os.path.join(self.directory, "room.lock")):
            copies, total = [], 0
            for entry in os.scandir(self.directory):
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                if entry.name.endswith(".tar"):
                    copies.append((status.st_mtime_ns, status.st_size, entry.path))
                    total += status.st_size
                elif entry.name.endswith(".tar.tmp") and not _remove_if_abandoned(entry.path):
                    total += status.st_size
            for _, size, path in sorted(copies):
                if total <= self.limit:
                    break
                os.remove(path)
                total -= size


class Lookahead:
    """Fetches in a thread the shards that are read after the current shuffle window, so that workers seldom wait for a command.

    Args:
        sources: {(corpus, number of the source): (``ShardSet``, ``EpochOrder``)}.
    """

    def __init__(self, sources):
        self._sources = {name: (reader, order) for name, (reader, order) in sources.items() if any(map(is_remote, reader.paths))}
        self._window, self._wanted, self._thread, self._closed = {}, queue.Queue(), None, False

    def __call__(self, read):
        """Take note of how many records every source has given: ``{corpus: [number, ...]}``."""
        for (corpus, number), (reader, order) in self._sources.items():
            window = order.window_of(*divmod(read[corpus][number], len(order)))
            if self._window.get((corpus, number)) != window:
                self._window[corpus, number] = window
                for shard in (*order.shards(*window), *order.shards(*order.window_after(*window))):
                    if is_remote(reader.paths[shard]):
                        self._wanted.put((reader.remote, reader.paths[shard]))
        if self._thread is None and self._sources:
            self._thread = threading.Thread(target=self._work, daemon=True, name="shard lookahead")
            self._thread.start()

    def close(self):
        """Begin no further fetch."""
        self._closed = True
        self._wanted.put(None)

    def _work(self):
        while True:
            wanted = self._wanted.get()
            if self._closed:
                return
            cache, shard = wanted
            with contextlib.suppress(DataError):  # the worker that needs the shard tries again and says what is wrong
                cache.fetch(shard)


class _Failed(Exception):
    """One try of a command failed; another may succeed."""


class _Handle:
    """An open copy that closes itself when the last user lets go."""

    def __init__(self, descriptor):
        self.descriptor, self._touched = descriptor, time.monotonic()

    def touch(self):
        """Mark the copy as used now, from time to time."""
        now = time.monotonic()
        if now > self._touched + _TOUCH_EVERY:
            self._touched = now
            with contextlib.suppress(OSError):  # another user's file: it ages faster, that is all
                os.utime(self.descriptor)

    def __del__(self):
        os.close(self.descriptor)


def _open_used(copy):
    """A copy opened and marked as used now, or None when there is none."""
    try:
        descriptor = os.open(copy, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):
        os.utime(descriptor)
    return descriptor


def _remove_if_abandoned(temporary):
    descriptor = os.open(temporary[: -len(".tar.tmp")] + ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while somebody fetches
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _write(descriptor, data):
    data = memoryview(data)
    while data:
        data = data[os.write(descriptor, data):]


def _end(process):
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    process.wait()


def _last_line(errors):
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - 2000))
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:500] if lines else "(it wrote nothing to standard error)"
