"""Work split over input shards: one complete output part each, by any number of processes, interrupted and repeated at will.

::

    DIR/settings.json            what the parts are a function of; another setting is refused
    DIR/parts/NAME<ending>       the part of input shard NAME
    DIR/parts/NAME.json          its manifest, written last: a part without one does not exist
    DIR/bad_records.jsonl        records that could not be used, each with its reason
    DIR/manifest.json            written when the parts of all input shards are there
"""
import fcntl
import hashlib
import json
import os
import re
from contextlib import contextmanager

from unimo2_paddle.data.pretrain_batches import BadRecords
from unimo2_paddle.errors import DataError, UserInputError

MANIFEST, SETTINGS = "manifest.json", "settings.json"


class ProcessShare:
    """Which input shards this process works on (every ``count``-th, from ``index`` on) and how many bad records it puts up with.

    Args:
        text: "i/n" with 0 <= i < n; max_bad_ratio: share of bad records of an input shard above which it stops.

    Raises:
        UserInputError: they are not.
    """

    def __init__(self, text="0/1", max_bad_ratio=0.01):
        if not 0 <= max_bad_ratio <= 1:
            raise UserInputError(f"--max-bad-ratio {max_bad_ratio}: must be between 0 and 1")
        self.max_bad_ratio = max_bad_ratio
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        self.index, self.count = (int(match.group(1)), int(match.group(2))) if match else (1, 0)
        if self.index >= self.count:
            raise UserInputError(f"--shard {text}: use i/n with i from 0 to n-1, for example 0/4, 1/4, 2/4 and 3/4 in four processes")

    def of(self, items):
        return items[self.index::self.count]


class Parts:
    """The parts of one output directory.

    Args:
        directory: made when missing; settings: plain mapping that decides the parts' content.

    Raises:
        UserInputError: the directory has parts made with other settings, or cannot be written.
    """

    def __init__(self, directory, settings):
        self.directory, self.settings = os.path.abspath(directory), settings
        path = os.path.join(self.directory, SETTINGS)
        try:
            os.makedirs(os.path.join(self.directory, "parts"), exist_ok=True)
            if os.path.exists(path):
                self._compare(path)
            else:
                write_json(path, settings)
        except OSError as error:
            raise UserInputError(f"{self.directory}: cannot be written: {error.strerror}") from None

    def _compare(self, path):
        try:
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
            differing = [key for key in sorted(set(found) | set(self.settings)) if found.get(key) != json.loads(json.dumps(self.settings)).get(key)]
        except (ValueError, AttributeError, TypeError):
            raise UserInputError(f"{path}: damaged; remove {self.directory} or choose another directory") from None
        if differing:
            told = "; ".join(f"{key} {found.get(key)!r}, now {self.settings.get(key)!r}" for key in differing[:4])
            raise UserInputError(f"{self.directory}: its parts were made with other settings ({told}); choose another --out or remove it")

    def path(self, name, ending):
        return os.path.join(self.directory, "parts", name + ending)

    def manifest(self, shard):
        """The manifest of a shard's part, or None when it is missing, unfinished or made from another input."""
        try:
            with open(self.path(shard.name, ".json"), encoding="utf-8") as file:
                manifest = json.load(file)
            whole = manifest["input"] == shard.identity and all(
                os.path.getsize(self.path(shard.name, ending)) == size for ending, size in manifest["files"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return manifest if whole else None

    def run(self, shards, share, make, unit="record"):
        """Make the missing parts of this process' share, with a progress bar.

        Args:
            shards: all ``InputShard``; share: a ``ProcessShare``.
            make: called as ``make(records, target)``: reads the iterator, writes the files ``target(ending)`` and returns a mapping of
                counts; the files get their names only when it returns.

        Returns:
            (parts made, parts kept).

        Raises:
            DataError: too many records cannot be used.
        """
        from tqdm import tqdm

        mine = share.of(shards)
        made = kept = 0
        with tqdm(total=sum(shard.records for shard in mine), desc=os.path.basename(self.directory), unit=unit, unit_scale=True,
                  disable=None) as bar:
            for shard in mine:
                if self.manifest(shard) is not None:
                    bar.update(shard.records)
                    kept += 1
                    continue
                self._make(shard, make, bar, share.max_bad_ratio)
                made += 1
        return made, kept

    def _make(self, shard, make, bar, max_bad_ratio):
        bad = BadRecords(os.path.join(self.directory, "bad_records.jsonl"), max_bad_ratio, "--max-bad-ratio")
        temporary = {}

        def target(ending):
            temporary[ending] = f"{self.path(shard.name, ending)}.{os.getpid()}.tmp"
            return temporary[ending]

        def records():
            for record in shard.read(bad=lambda key, reason: (bad.saw(), bad.note(shard.name, key, reason))):
                bad.saw()
                yield record
                bar.update(1)

        try:
            counts = make(records(), target)
            files = {}
            for ending, path in temporary.items():
                files[ending] = os.path.getsize(path)
            digests = {ending: _sha256(path) for ending, path in temporary.items()}
            for ending, path in temporary.items():
                os.replace(path, self.path(shard.name, ending))
        except OSError as error:
            raise DataError(f"{self.directory}: cannot write the part {shard.name}: {error.strerror or error}") from None
        finally:
            for path in temporary.values():
                if os.path.exists(path):
                    os.remove(path)
        write_json(self.path(shard.name, ".json"), {"name": shard.name, "input": shard.identity, "files": files, "sha256": digests,
                                                    "counts": {**counts, "unreadable": bad.bad + shard.left_out}})

    def finish(self, shards, about=None, merge=None):
        """Complete the directory when the parts of all shards are there.

        Args:
            shards: all ``InputShard``; about: further entries of the manifest; merge: called with the list of names before the manifest is
                written, in one process at a time.

        Returns:
            the manifest with summed ``counts``, or None while parts are missing.
        """
        manifests = [self.manifest(shard) for shard in shards]
        if not all(manifests):
            return None
        counts = {}
        for manifest in manifests:
            for key, value in manifest["counts"].items():
                counts[key] = counts.get(key, 0) + value
        content = {**self.settings, **(about or {}), "parts": {m["name"]: m["sha256"] for m in manifests}, "counts": counts}
        path = os.path.join(self.directory, MANIFEST)
        with self._alone():
            if _read(path) != json.loads(json.dumps(content)):
                if merge is not None:
                    merge([manifest["name"] for manifest in manifests])
                write_json(path, content)
        return content

    @contextmanager
    def _alone(self):
        with open(os.path.join(self.directory, "lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def read_manifest(directory, what):
    """The manifest of a complete directory.

    Raises:
        DataError: there is none; the message says how to finish it.
    """
    content = _read(os.path.join(directory, MANIFEST))
    if isinstance(content, dict) and isinstance(content.get("parts"), dict):
        return content
    if os.path.exists(os.path.join(directory, SETTINGS)):
        raise DataError(f"{directory}: unfinished: parts are missing; run the command that began it again, in all its --shard processes")
    raise DataError(f"{directory}: no {what} here; make it with unimo2 augment")


def write_json(path, content):
    """Write an indented JSON file, all or nothing; several processes may write the same content at once."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False, sort_keys=True)
        file.write("\n")
    os.replace(temporary, path)


def _read(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
