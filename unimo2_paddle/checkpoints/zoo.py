"""The model zoo: which weights and data there are, and having them on this disk.

A registry is a directory of YAML files, each a mapping of names to :class:`ZooEntry`. The project's own (``model_zoo/``) lists what the
authors released; ``UNIMO2_ZOO`` names further ones (``unimo2 zoo publish`` writes them), separated like PATH.

``UNIMO2_HOME`` (default ``~/.cache/unimo2``) holds ``zoo/NAME`` (unpacked, whole or absent), ``downloads/`` (what is arriving) and
``zoo.lock.json`` (address, size and sha256 of every archive at its first download). ``UNIMO2_OFFLINE=1`` forbids the network.
"""
import contextlib
import difflib
import glob
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from typing import List, Union
from urllib.parse import urlsplit

from unimo2_paddle.checkpoints.archives import Limits, check_room, extract
from unimo2_paddle.checkpoints.download import download, sha256_of
from unimo2_paddle.config import build, read_yaml
from unimo2_paddle.errors import ArchiveError, CheckpointError, ConfigError, DownloadError, ZooError
from unimo2_paddle.file_lock import locked

PREFIX = "zoo:"
KINDS = ("model", "data", "scripts")
UNKNOWN = "unknown"
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_ARCHIVE = re.compile(r"\.(tar|tgz|tar\.(gz|bz2|xz))$")


@dataclass
class ZooEntry:
    """One archive and what it is.

    ``urls``: addresses of the same archive, tried in order; a relative one is a file beside the registry's. ``size``: of the archive in
    bytes. ``root``: the folder in the archive that holds everything, which is taken off; ``use_at``: where the authors' scripts and our run
    configs look for it. ``config``: bundled model config that authors' weights lack. ``files``: what is in it. ``table``: the rows of the
    papers' tables it belongs to. ``size``, ``sha256`` and ``licence`` are "unknown" where nobody has told.
    """

    kind: str
    about: str
    urls: List[str]
    system: str = UNKNOWN
    size: Union[int, str] = UNKNOWN
    sha256: str = UNKNOWN
    licence: str = UNKNOWN
    root: str = ""
    use_at: str = ""
    config: str = ""
    files: str = ""
    table: List[str] = field(default_factory=list)
    used_by: List[str] = field(default_factory=list)
    name = ""       # the key it stands under,
    registry = ""   # and in which file

    def problems(self):
        found = []
        if self.kind not in KINDS:
            found.append(f"kind: {self.kind!r} is not one of {', '.join(KINDS)}")
        if not self.urls:
            found.append("urls: at least one is needed")
        for url in self.urls:
            if urlsplit(url).scheme not in ("http", "https") and (":" in url or url.startswith("/") or ".." in url.split("/")):
                found.append(f"urls: {url!r} is neither an http(s) address nor a file beside this registry")
        if self.sha256 != UNKNOWN and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            found.append(f"sha256: {self.sha256!r} is neither 64 hexadecimal digits nor {UNKNOWN}")
        if self.size != UNKNOWN and not (isinstance(self.size, int) and self.size > 0):
            found.append(f"size: {self.size!r} is neither a number of bytes nor {UNKNOWN}")
        if self.config and not os.path.isfile(_bundled_model_config(self.config)):
            found.append(f"config: there is no bundled model config {self.config!r}")
        return found

    def local_archive(self):
        """The archive's path when it lies beside the registry, else None."""
        for url in self.urls:
            if not urlsplit(url).scheme:
                return os.path.join(os.path.dirname(self.registry), url)
        return None


def home():
    """The cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.abspath(os.path.expanduser(os.environ.get("UNIMO2_HOME") or os.path.join(base, "unimo2")))


def is_offline():
    """Whether the network is forbidden."""
    return os.environ.get("UNIMO2_OFFLINE", "").strip().lower() not in ("", "0", "false", "no")


def entries(zoos=()):
    """Every entry of the project's registry, of ``UNIMO2_ZOO`` and of the directories ``zoos``, by name.

    Raises:
        ZooError: a registry is not there, has wrong entries, or names something a second time.
    """
    directories = [_bundled_registry(), *filter(None, os.environ.get("UNIMO2_ZOO", "").split(os.pathsep)), *zoos]
    found = {}
    for directory in dict.fromkeys(os.path.abspath(os.path.expanduser(one)) for one in directories):
        if not os.path.isdir(directory):
            raise ZooError(f"{directory}: no such zoo directory; check --zoo and UNIMO2_ZOO (unimo2 zoo publish makes one)")
        for path in sorted(glob.glob(os.path.join(glob.escape(directory), "*.yaml"))):
            for name, entry in _read_registry(path).items():
                if name in found:
                    raise ZooError(f"{path}: {name} is named in {found[name].registry} already; rename or remove one of them")
                found[name] = entry
    return found


def find(name, zoos=()):
    """The entry of a name (``zoo:`` before it is allowed); raises ZooError with what was perhaps meant."""
    known = entries(zoos)
    name = name[len(PREFIX):] if name.startswith(PREFIX) else name
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        raise ZooError(f"{name!r} is not in the model zoo; {hint} (unimo2 zoo list; further zoo directories: UNIMO2_ZOO)")
    return known[name]


def cached_path(name):
    """Where ``name`` is in the cache, there or not yet."""
    return os.path.join(home(), "zoo", name[len(PREFIX):] if name.startswith(PREFIX) else name)


def recorded(name):
    """What was recorded when ``name`` was first downloaded: ``{"url", "size", "sha256"}``, or {}."""
    found = _read_lock().get(name, {})
    return found if isinstance(found, dict) else {}


def fetch(name, mirror="", from_file="", to="", zoos=(), patience=None):
    """Have the files of a zoo name on this disk.

    Args:
        name: with or without ``zoo:``. mirror: address that holds the archive under the same path as the authors' server, or of the archive
            itself. from_file: the archive, fetched by other means. to: directory to make instead of the cache's. zoos: further registries.
        patience: see :func:`unimo2_paddle.checkpoints.download.download`.

    Returns:
        str: the directory.

    Raises:
        ZooError: unknown name, offline, or the cache holds another version; ArchiveError: unusable archive; DownloadError: the network's;
            CheckpointError: the archive holds no checkpoint, or the directory cannot be written.
    """
    entry = find(name, zoos)
    target = os.path.abspath(to) if to else cached_path(entry.name)
    if not to and os.path.isdir(target):
        return _checked_version(entry, target)
    if to and os.path.lexists(target) and not (os.path.isdir(target) and not os.listdir(target)):
        raise ZooError(f"--to {target}: exists already; nothing is overwritten. Choose another path or move it away")
    try:
        os.makedirs(os.path.join(home(), "downloads"), exist_ok=True)
        with locked(os.path.join(home(), "downloads", f"{entry.name}.lock"), lambda: print(f"waiting: another process fetches {entry.name}", flush=True)):
            if not to and os.path.isdir(target):
                return _checked_version(entry, target)  # the other process has done it
            archive, temporary, facts = _archive(entry, mirror, from_file, patience)
            _remove_leftovers(target)
            _place(entry, archive, target)
            if not to or not recorded(entry.name):
                _record(entry.name, facts)
            if temporary:
                os.remove(archive)
    except OSError as error:
        raise ZooError(f"{error.filename or home()}: {error.strerror or error}; choose another --to or another cache (UNIMO2_HOME)") from None
    return target


def by_hand(entry):
    """What to do without this program's network."""
    urls = [url for url in entry.urls if urlsplit(url).scheme]
    place = f", or unpack it yourself and give its directory (authors' layout: {entry.use_at})" if entry.use_at else ""
    return (f"By hand: fetch {' or '.join(urls) or entry.local_archive()} on any machine, then unimo2 download {entry.name} --from-file "
            f"ARCHIVE{place}; another server: --mirror URL")


def _checked_version(entry, target):
    known = recorded(entry.name).get("sha256")
    if entry.sha256 not in (UNKNOWN, known):
        raise ZooError(f"{target} holds another version of {entry.name} (archive sha256 {known or 'not recorded'}) than {entry.registry} lists "
                       f"({entry.sha256}); remove that directory to fetch it again")
    return target


def _archive(entry, mirror, from_file, patience):
    """(path of the checked archive, whether it is ours to remove, its facts)."""
    known = recorded(entry.name).get("sha256")
    expected = entry.sha256 if entry.sha256 != UNKNOWN else known
    local = from_file or (None if mirror else entry.local_archive())
    if local:
        if not os.path.isfile(local):
            raise ZooError(f"{local}: no such archive file. {by_hand(entry)}")
        found = sha256_of(local)
        if expected not in (None, found):
            raise ZooError(f"{local}: sha256 is {found}, expected for {entry.name} is {expected} ({_who_expects(entry)}); it is damaged or another "
                           "version, fetch it again")
        return local, False, {"url": os.path.basename(local), "size": os.path.getsize(local), "sha256": found}
    if is_offline():
        raise ZooError(f"{entry.name} is not in the cache ({cached_path(entry.name)}) and UNIMO2_OFFLINE forbids the network. {by_hand(entry)}")
    target, failures = os.path.join(home(), "downloads", f"{entry.name}.archive"), []
    for url in _addresses(entry, mirror):
        try:
            found = download(url, target, None if entry.size == UNKNOWN else entry.size, expected, patience, title=entry.name)
            return target, True, {"url": url, **found._asdict()}
        except DownloadError as error:
            failures.append(str(error))
    told = f" (expected by {_who_expects(entry)})" if any("sha256" in text for text in failures) else ""
    raise DownloadError("; ".join(failures) + f"{told}. {by_hand(entry)}")


def _who_expects(entry):
    if entry.sha256 != UNKNOWN:
        return f"registry {entry.registry}"
    return f"{_lock_path()}, recorded at the first download; remove its entry if the archive was replaced on purpose"


def _addresses(entry, mirror):
    if not mirror:
        return [url for url in entry.urls if urlsplit(url).scheme]
    if _ARCHIVE.search(urlsplit(mirror).path):
        return [mirror]
    return [f"{mirror.rstrip('/')}/{urlsplit(entry.urls[0]).path.lstrip('/')}"]


def _place(entry, archive, target):
    """Unpack beside ``target``, look at it, and only then let it have that name."""
    from unimo2_paddle.checkpoints.released import new_directory

    os.makedirs(os.path.dirname(target), exist_ok=True)
    check_room(archive, os.path.dirname(target))
    with new_directory(target) as temporary:
        if not extract(archive, temporary, Limits()):
            raise ArchiveError(f"{archive}: holds no files")
        _take_off_root(entry, temporary)
        if entry.kind == "model":
            _check_model(entry, archive, temporary)


def _remove_leftovers(target):
    """Remove what a killed process left of unpacking into the same place of the cache, whose lock is ours."""
    if os.path.dirname(target) == os.path.join(home(), "zoo"):
        for left in glob.glob(os.path.join(glob.escape(os.path.dirname(target)), f".{os.path.basename(target)}.tmp-*")):
            shutil.rmtree(left, ignore_errors=True)


def _take_off_root(entry, directory):
    """Move everything up while all of it is in one folder (of data: one that the registry names)."""
    while True:
        names = os.listdir(directory)
        inner = os.path.join(directory, names[0])
        if len(names) != 1 or not os.path.isdir(inner) or not (entry.kind == "model" or names[0] in entry.root.split("/")):
            return
        aside = os.path.join(directory, ".unpacked")  # so that the folder may hold one of its own name
        os.rename(inner, aside)
        for name in os.listdir(aside):
            os.rename(os.path.join(aside, name), os.path.join(directory, name))
        os.rmdir(aside)
        if not os.listdir(directory):
            return


def _check_model(entry, archive, directory):
    """Raise CheckpointError unless the directory is a checkpoint; give authors' weights the config they lack."""
    from unimo2_paddle.checkpoints.convert import CONFIG, locate
    from unimo2_paddle.checkpoints.released import list_variables, read_header

    try:
        if locate(directory)[0] == "released":
            for name in list_variables(directory):
                read_header(os.path.join(directory, name))
    except CheckpointError as error:
        shown = ", ".join(sorted(os.listdir(directory))[:8])
        text = str(error).replace(directory, entry.name)
        raise CheckpointError(f"{archive}: unpacks, but not to a checkpoint: {text} At the top are: {shown}") from None
    config = os.path.join(directory, CONFIG)
    if entry.config and not os.path.exists(config):
        shutil.copyfile(_bundled_model_config(entry.config), config)


def _bundled_model_config(name):
    return os.path.join(_PACKAGE, "models", "configs", f"{os.path.basename(name)}.json")


def _bundled_registry():
    """In an installed package the registry lies inside it, in a checkout beside it."""
    inside = os.path.join(_PACKAGE, "model_zoo")
    return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(_PACKAGE), "model_zoo")


def _read_registry(path):
    try:
        values, problems, found = read_yaml(path), [], {}
        for name, given in values.items():
            if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
                problems.append(f"{name!r}: a name has lower-case letters, digits, '.', '_' and '-', at most 64")
                continue
            entry = build(ZooEntry, given, name, problems)
            if entry is not None:
                entry.name, entry.registry = name, path
                found[name] = entry
    except ConfigError as error:
        raise ZooError(f"{path}: {'; '.join(error.problems)}") from None
    if problems:
        raise ZooError(f"{path}: {'; '.join(problems)}")
    return found


def _lock_path():
    return os.path.join(home(), "zoo.lock.json")


def _read_lock():
    try:
        with open(_lock_path(), encoding="utf-8") as file:
            values = json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ZooError(f"{_lock_path()}: cannot be read ({error}); repair or remove it (it holds what downloads were first seen as)") from None
    return values if isinstance(values, dict) else {}


def _record(name, facts):
    with locked(_lock_path() + ".lock"):
        values = {**_read_lock(), name: facts}
        temporary = _lock_path() + ".tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(json.dumps(values, indent=2, sort_keys=True) + "\n")
            os.replace(temporary, _lock_path())
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
