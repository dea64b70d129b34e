"""One file over HTTP: resumed, tried again, checked, in place only when it is whole.

Python's urllib does all that is needed (one GET with a Range header, redirects, the system's proxies and certificates), so no HTTP
package is pinned for it.
"""
import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from unimo2_paddle.errors import DownloadError

_CHUNK = 1 << 18
_ENOUGH = 1 << 20          # bytes after which a connection counts as useful and failures are counted anew
_LONGEST_WAIT = 60.0       # seconds between two tries, whatever the server asks for
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_SPARE = 64 << 20          # bytes of disk that stay free


@dataclass(frozen=True)
class Patience:
    """How often a fetch that gets nowhere is tried again (after 1, 2, 4, ... times ``delay`` seconds), and after how many seconds
    without a byte (``stall``) a connection counts as dead."""

    retries: int = 5
    delay: float = 1.0
    stall: float = 60.0


class Fetched(NamedTuple):
    """What was put in place: its size in bytes and its sha256 in hexadecimal."""

    size: int
    sha256: str


def download(url, target, size=None, sha256=None, patience=None, title=None):
    """Fetch ``url`` into the file ``target``, which appears only when all of it is there and right.

    What has arrived is kept in ``target.part``; another call goes on from there when the server can (Range) and the file is still the
    same one there, and starts again otherwise.

    Args:
        url: http or https address. target: file to write. size, sha256: what the file must be; None: not known.
        patience: ``Patience``. title: what to call the file in the progress display; None: no display.

    Returns:
        Fetched.

    Raises:
        DownloadError: no such file, no use in further tries, no room on the disk, or another file than wanted.
    """
    patience = patience or Patience()
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise DownloadError(f"{url!r} is not an http or https address")
    part = _Part(target, url)
    try:
        os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
        resumed = part.length() > 0
        _complete(part, size, patience, title)
        found = _identity(part.path)
        if resumed and sha256 not in (None, found.sha256):
            part.drop()  # the first bytes may be of an older file or of a crash: one whole try decides
            _complete(part, size, patience, title)
            found = _identity(part.path)
        if sha256 not in (None, found.sha256):
            part.drop()
            raise DownloadError(f"{url}: the file there has sha256 {found.sha256}, expected is {sha256}: it was replaced or damaged; "
                                "try another mirror, and do not use this file")
        os.replace(part.path, target)
        part.drop()
        return found
    except OSError as error:
        raise DownloadError(f"cannot write {error.filename or target}: {error.strerror or error}; free space or choose another place") from None


def sha256_of(path):
    """The sha256 of a file, in hexadecimal."""
    return _identity(path).sha256


def _identity(path):
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
            size += len(chunk)
    return Fetched(size, digest.hexdigest())


class _Again(Exception):
    """One try failed and another may succeed, at the earliest after ``wait`` seconds."""

    def __init__(self, text, wait=0.0):
        super().__init__(text)
        self.wait = wait


class _Part:
    """The file that is arriving, and beside it a note on which file of which server it is the beginning of."""

    def __init__(self, target, url):
        self.path, self.url, self._note = f"{target}.part", url, f"{target}.part.json"

    def length(self):
        """Bytes that a request can go on from; 0 when what is there belongs to something else or nobody knows to what."""
        return os.path.getsize(self.path) if self.note() and os.path.isfile(self.path) else 0

    def note(self):
        """``{"url", "total", "validator"}``, or {} when there is no usable one."""
        try:
            with open(self._note, encoding="utf-8") as file:
                note = json.load(file)
        except (OSError, ValueError):
            return {}
        usable = isinstance(note, dict) and note.get("url") == self.url and (note.get("total") or note.get("validator"))
        return note if usable else {}

    def begin(self, total, validator):
        """Start an empty part; the note comes first, so that bytes never lie beside the note of another file."""
        self.drop()
        with open(self._note, "w", encoding="utf-8") as file:
            json.dump({"url": self.url, "total": total, "validator": validator}, file)

    def drop(self):
        for path in (self.path, self._note):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def _complete(part, size, patience, title):
    """Receive until the part is whole."""
    failures = 0
    while True:
        before = part.length()
        if before and before == part.note().get("total"):
            return  # a process ended between the last byte and the renaming
        try:
            return _receive(part, size, patience.stall, title)
        except _Again as error:
            failures = 1 if part.length() - before >= _ENOUGH else failures + 1
            if failures > patience.retries:
                kept = part.length()
                hint = f"; {kept} bytes are kept, the same command goes on from there" if kept else ""
                raise DownloadError(f"{part.url}: {error} (tried {failures} times){hint}") from None
            time.sleep(min(max(error.wait, patience.delay * 2 ** (failures - 1)), _LONGEST_WAIT))


def _receive(part, size, stall, title):
    """One request; raises _Again when the part is not whole after it."""
    offset, note = part.length(), part.note()
    with _open(part, offset, note, stall) as response:
        total = _total(part, response, offset, note)
        if response.status != 206:
            offset = 0  # a server without ranges, or the file has changed: from the beginning
        if size is not None and total is not None and total != size:
            part.drop()
            raise DownloadError(f"{part.url}: the server offers {total} bytes, expected are {size}: it is another file; try another mirror")
        _check_room(part.path, total or size, offset)
        if not offset:
            part.begin(total, _validator(response.headers))
        position = _save(part, response, offset, total or size, title)
    wanted = size if total is None else total
    if wanted is not None and position != wanted:
        if position > wanted:
            part.drop()
            raise DownloadError(f"{part.url}: the server sent more than the {wanted} bytes expected: it is another file; try another mirror")
        raise _Again(f"the connection ended after {position} of {wanted} bytes")


def _save(part, response, offset, total, title):
    """Append the body to the part; returns the part's length."""
    position = offset
    with open(part.path, "ab" if offset else "wb") as file, _Progress(title, offset, total) as progress:
        while total is None or position <= total:
            try:
                chunk = response.read1(_CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise _Again(f"the connection broke after {position} bytes: {_reason(error)}") from None
            if not chunk:
                break
            file.write(chunk)
            position += len(chunk)
            progress.reached(position)
    return position


def _open(part, offset, note, stall):
    headers = {"User-Agent": "unimo2_paddle", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if note.get("validator"):
            headers["If-Range"] = note["validator"]
    try:
        return urllib.request.build_opener(_Redirects).open(urllib.request.Request(part.url, headers=headers), timeout=stall)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and offset:
                part.drop()
                raise _Again("the server has no such range: starting from the beginning") from None
            if error.code in _AGAIN:
                raise _Again(f"HTTP status {error.code} ({error.reason})", _retry_after(error.headers)) from None
            raise DownloadError(f"{part.url}: HTTP status {error.code} ({str(error.reason).splitlines()[0]})") from None
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        cause = getattr(error, "reason", None)
        if isinstance(cause, ssl.SSLCertVerificationError) or isinstance(error, http.client.InvalidURL):
            raise DownloadError(f"{part.url}: {_reason(error)}") from None
        raise _Again(f"cannot be reached: {_reason(error)}") from None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to something that anybody on the way can change."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new not in ("http", "https") or (old == "https" and new == "http"):
            raise DownloadError(f"{req.full_url}: redirected to {newurl}, which is not followed from {old}; give a --mirror you trust")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _total(part, response, offset, note):
    """Length of the whole file in bytes, None when the server does not say; drops the part when the answer does not continue it."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        total = int(found.group(2)) if found and found.group(2) != "*" else None
        if not found or int(found.group(1)) != offset or (total is not None and note.get("total") not in (None, total)):
            part.drop()
            raise _Again("the server answered with another range than asked for: starting from the beginning")
        return note.get("total") if total is None else total
    length = response.headers.get("Content-Length", "").strip()
    return int(length) if length.isdigit() else None


def _validator(headers):
    """What If-Range may carry: a strong entity tag or a date."""
    tag = headers.get("ETag", "").strip()
    return tag if tag.startswith('"') else headers.get("Last-Modified", "").strip() or None


def _retry_after(headers):
    value = headers.get("Retry-After", "").strip()
    return float(value) if value.isdigit() else 0.0


def _check_room(path, total, offset):
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
    if total is not None and total - offset + _SPARE > free:
        raise DownloadError(f"{path}: {total - offset} bytes are to come and {free} are free on this disk; free space, or put UNIMO2_HOME on "
                            "another disk")


def _reason(error):
    cause = getattr(error, "reason", None) or error
    return str(getattr(cause, "strerror", None) or cause or type(cause).__name__)


class _Progress:
    """A bar on a terminal; elsewhere (a job's log) a line every ``EVERY`` seconds."""

    EVERY = 30.0

    def __init__(self, title, offset, total):
        self._title, self._offset, self._total, self._bar = title, offset, total, None
        self._started = self._said = time.monotonic()

    def __enter__(self):
        if self._title and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=self._title, initial=self._offset, total=self._total, unit="B", unit_scale=True, leave=False)
        return self

    def reached(self, position):
        if self._bar is not None:
            self._bar.update(position - self._bar.n)
        elif self._title and time.monotonic() - self._said >= self.EVERY:
            self._said = time.monotonic()
            speed = (position - self._offset) / max(self._said - self._started, 1e-9)
            of = f" of {self._total / 1e6:.1f}" if self._total else ""
            print(f"{self._title}: {position / 1e6:.1f}{of} MB, {speed / 1e6:.2f} MB/s", file=sys.stderr, flush=True)

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()
