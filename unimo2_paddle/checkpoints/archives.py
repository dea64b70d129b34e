"""Archives of unknown origin unpacked safely, and our own packed so that the same directory gives the same bytes.

Nothing is written outside the target, whatever the names in the archive are; what an unpacked tree holds is directories and regular
files only: a link to a file inside becomes a copy of it. Limits on bytes, ratio and number of members stop archives made to fill disks.
"""
import bz2
import gzip
import lzma
import os
import posixpath
import re
import shutil
import tarfile
import zlib
from dataclasses import dataclass

from unimo2_paddle.errors import ArchiveError

_CHUNK = 1 << 20
_BLOCK = 512
_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, gzip.BadGzipFile, ValueError, OverflowError, IndexError)
_SPARE = 64 << 20  # bytes of disk that stay free


@dataclass(frozen=True)
class Limits:
    """What an archive may become: bytes in all, bytes per byte of the archive (small archives may always have 64 MiB), and members."""

    total: int = 400 << 30
    ratio: int = 100
    members: int = 5_000_000

    def bytes_of(self, archive_size):
        """Bytes that an archive of this size may become."""
        return min(self.total, max(self.ratio * archive_size, 64 << 20))


def extract(archive, directory, limits=None):
    """Unpack a tar file (plain, gzip, bzip2, xz) into an existing empty directory.

    Args:
        archive: path. directory: path; on an error what was unpacked so far is in it, so give a temporary one.
        limits: ``Limits``.

    Returns:
        int: number of files written.

    Raises:
        ArchiveError: no tar file, a damaged one, one with an absolute name, ``..``, a link out, a device or a repeated name, or over a limit;
            OSError: the disk's.
    """
    limits = limits or Limits()
    path, root = os.fspath(archive), os.path.abspath(directory)
    size = os.path.getsize(path)
    allowed = limits.bytes_of(size)
    with open(path, "rb") as file:
        opener = next((opener for magic, opener in _OPENERS.items() if _head(file).startswith(magic)), None)
        stream = _Bounded(opener(file) if opener else file, path, allowed)
        try:
            with tarfile.TarFile(fileobj=stream, mode="r") as tar:
                written = _Unpacking(path, root, limits, allowed).run(tar)
            stream.check_end()
        except _DAMAGE as error:
            raise ArchiveError(f"{path}: {_what_it_is(path)} ({error or type(error).__name__})") from None
        except OSError as error:
            if error.errno is None:  # bz2 and gzip say "invalid data" so; the disk's errors have a number
                raise ArchiveError(f"{path}: damaged ({error}); fetch it again") from None
            raise
    return written


def pack(directory, archive, prefix):
    """Write the regular files below ``directory`` as ``archive`` (tar.gz), under ``prefix``/; no times, owners or modes go in.

    Raises:
        ArchiveError: the directory holds a link or something that is no file.
    """
    files = []
    for place, directories, names in os.walk(directory):
        directories.sort()
        for name in sorted(names) + [name for name in directories if os.path.islink(os.path.join(place, name))]:
            path = os.path.join(place, name)
            if os.path.islink(path) or not os.path.isfile(path):
                raise ArchiveError(f"{path}: is a link or no regular file; put the file itself there")
            files.append((posixpath.join(prefix, os.path.relpath(path, directory).replace(os.sep, "/")), path))
    with open(archive, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed, \
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, path in sorted(files):
            member = tarfile.TarInfo(name)
            member.size, member.mode = os.path.getsize(path), 0o644
            with open(path, "rb") as file:
                tar.addfile(member, file)
    return len(files)


class _Unpacking:
    """One archive on its way into one directory."""

    def __init__(self, path, root, limits, allowed):
        self.path, self.root, self.limits, self.allowed = path, root, limits, allowed
        self.written, self.files, self.links = 0, 0, {}

    def run(self, tar):
        for number, member in enumerate(tar):
            if number >= self.limits.members:
                self._refuse(f"more than {self.limits.members} members")
            tar.members = []  # tarfile keeps every header it has seen
            name = self._checked(member.name)
            if name == "." or posixpath.basename(name).startswith("._") or posixpath.basename(name) == ".DS_Store":
                continue  # what macOS puts beside every file would be taken for a variable
            if member.isdir():
                self._directory(name)
            elif member.isreg():
                with tar.extractfile(member) as source:
                    self._file(name, source)
            elif member.issym() or member.islnk():
                within = posixpath.dirname(name) if member.issym() else ""
                self.links[name] = self._checked(member.linkname, within, f"{name}: a link to ")
            else:
                self._refuse(f"{name}: a device, pipe or other special file")
        self._copy_links()
        return self.files

    def _refuse(self, what):
        raise ArchiveError(f"{self.path}: not unpacked: {what}")

    def _checked(self, name, within="", told=""):
        """The normalised name of a member, relative to the root; refuses what leads elsewhere."""
        bad = not name or "\0" in name or "\\" in name or re.match(r"[A-Za-z]:", name)
        if bad or name.startswith("/") or len(os.fsencode(name)) > 3000 or any(len(os.fsencode(part)) > 255 for part in name.split("/")):
            self._refuse(f"{told}{name[:200]!r}: an absolute, empty or otherwise unusable name")
        if not within and not told and ".." in name.split("/"):
            self._refuse(f"{name[:200]!r}: leads out of the directory ('..')")
        normal = posixpath.normpath(posixpath.join(within, name))
        if normal == ".." or normal.startswith("../"):
            self._refuse(f"{told}{name[:200]!r}: leads out of the directory")
        return normal

    def _place(self, name):
        return os.path.join(self.root, *name.split("/"))

    def _directory(self, name):
        try:
            os.makedirs(self._place(name), exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            self._refuse(f"{name}: both a file and a directory")

    def _file(self, name, source):
        self._directory(posixpath.dirname(name) or ".")
        try:  # nothing in the tree is a link, so an exclusive open cannot leave it
            descriptor = os.open(self._place(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            self._refuse(f"{name}: is in the archive twice")
        with os.fdopen(descriptor, "wb") as target:
            while True:
                chunk = source.read(_CHUNK)
                if not chunk:
                    break
                self.written += len(chunk)
                if self.written > self.allowed:
                    self._refuse(f"unpacks to more than {self.allowed} bytes")
                target.write(chunk)
        self.files += 1

    def _copy_links(self):
        """Links become copies, after all files are there; a link to a link is followed, a circle or a missing target refused."""
        for name, target in self.links.items():
            seen = {name}
            while target in self.links and target not in seen:
                seen.add(target)
                target = self.links[target]
            if not os.path.isfile(self._place(target)) or target in self.links:
                self._refuse(f"{name}: a link to {target}, which is no file in the archive")
            with open(self._place(target), "rb") as source:
                self._file(name, source)


class _Bounded:
    """What tarfile needs of a file, forwards only, with a limit on all bytes and on those of one read.

    tarfile reads a whole extended header into memory: its size is the archive's word, so a small archive could ask for all memory.
    """

    def __init__(self, stream, path, allowed):
        self._stream, self._path, self._position, self._last = stream, path, 0, b""
        self._allowed = allowed + (64 << 20)  # headers and padding come on top

    def tell(self):
        return self._position

    def read(self, size=-1):
        if size < 0 or size > _CHUNK:
            raise ArchiveError(f"{self._path}: not unpacked: a header of {size} bytes")
        data = self._stream.read(size)
        self._position += len(data)
        if self._position > self._allowed:
            raise ArchiveError(f"{self._path}: not unpacked: unpacks to more than {self._allowed} bytes")
        self._last = data
        return data

    def seek(self, position):
        if position < self._position:
            raise tarfile.ReadError("a member begins inside another one")
        while self._position < position and self.read(min(_CHUNK, position - self._position)):
            pass

    def check_end(self):
        """The last block read must be the end marker (tarfile takes any broken header for the end), and the rest must be sound."""
        if self._last.count(0) != _BLOCK or len(self._last) != _BLOCK:
            raise tarfile.ReadError("no end-of-archive marker: truncated, or a broken header")
        while self.read(_CHUNK):
            pass


def _head(file):
    head = file.read(_BLOCK)
    file.seek(0)
    return head


def _what_it_is(path):
    """What to call an archive that could not be read to its end."""
    with open(path, "rb") as file:
        head = _head(file)
    if not head:
        return "an empty file, no archive"
    if head.lstrip()[:1] == b"<":
        return "a web page, no archive: a login page or a proxy's message, or the address of a page instead of the file"
    if head.startswith(b"PK\x03\x04"):
        return "a zip file; unpack it and pack it again as tar.gz"
    if any(head.startswith(magic) for magic in _OPENERS) or head[257:262] == b"ustar":
        return "damaged or truncated; fetch it again"
    return "no tar archive"


def check_room(archive, directory):
    """Raise ArchiveError when a disk has not even room for as many bytes as the archive has."""
    need, free = os.path.getsize(archive), shutil.disk_usage(directory).free
    if need + _SPARE > free:
        raise ArchiveError(f"{archive}: {need} bytes packed, and {free} are free on the disk of {directory}; free space or choose another disk")
