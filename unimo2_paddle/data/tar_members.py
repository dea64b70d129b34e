"""The members of a tar file, found by reading its headers alone.

Python's tarfile would do at three times the cost per member, and CC3M alone has ten million members.
"""
import os
import re
from typing import NamedTuple

from unimo2_paddle.errors import DataError

_BLOCK = 512
_MAX_LONG_HEADER = 1 << 20
_DATALESS = b"123456"  # links, devices, directories, pipes: a size in their header counts no data


class Member(NamedTuple):
    """One entry of a tar file; ``type`` is "file", "directory" or "other" (links, devices, sparse files)."""

    name: str
    offset: int
    size: int
    type: str


def tar_members(descriptor, length, path):
    """Yields the Members of a tar file (ustar, GNU long names, pax).

    Args:
        descriptor: an open file descriptor; its position is neither used nor moved.
        length: size of the file in bytes.
        path: its name, for messages.

    Raises:
        DataError: the file is empty, truncated (a missing end-of-archive marker counts) or no tar file.
    """
    position, long_name, pax = 0, None, {}
    while True:
        header = os.pread(descriptor, _BLOCK, position)
        if len(header) == _BLOCK and header.count(0) == _BLOCK:
            return
        if len(header) < _BLOCK:
            what = "the file is empty" if length == 0 else f"truncated tar: no end-of-archive marker at byte {position}"
            raise DataError(f"{path}: {what}; fetch or write this shard again")
        size = _check_header(header, position, path)
        data, kind = position + _BLOCK, header[156:157]
        if kind not in b"LKxg":
            size = int(pax.get("size", size))
        if kind == b"S":  # an old GNU sparse file may continue its map in further header blocks
            more = header[482]
            while more:
                more = os.pread(descriptor, _BLOCK, data)[504:505] not in (b"", b"\0")
                data += _BLOCK
        stored = 0 if kind in _DATALESS else size
        if data + stored > length:
            raise DataError(f"{path}: truncated tar: the member at byte {position} needs {stored} bytes and "
                            f"{max(0, length - data)} are left; fetch or write this shard again")
        position = data + -(-stored // _BLOCK) * _BLOCK
        if kind in b"Lx":
            if size > _MAX_LONG_HEADER:
                raise DataError(f"{path}: broken tar: an extended header of {size} bytes at byte {data}")
            content = os.pread(descriptor, size, data)
            if kind == b"L":
                long_name = content.rstrip(b"\0")
            else:
                pax = _parse_pax(content, f"{path}: broken tar: pax header at byte {data}")
            continue
        if kind in b"Kg":
            continue
        name = pax.get("path") or _text(long_name if long_name is not None else _short_name(header))
        plain = kind in b"07\0" and not any(key.startswith("GNU.sparse") for key in pax)
        entry = "directory" if kind == b"5" or name.endswith("/") else "file" if plain else "other"
        yield Member(name, data, stored, entry)
        long_name, pax = None, {}


def _check_header(header, position, path):
    """Verifies a header block's checksum and returns the size it states."""
    try:
        stated = int(header[148:156].strip(b" \0") or b"0", 8)
        if stated != sum(header) - sum(header[148:156]) + 8 * 32:
            raise ValueError("checksum")
        field = header[124:136]
        if field[0] in (0x80, 0xff):  # GNU base-256 form for sizes of 8 GiB and more
            size = int.from_bytes(field[1:], "big", signed=field[0] == 0xff)
        else:
            size = int(field.strip(b" \0") or b"0", 8)
        if size < 0:
            raise ValueError("negative size")
        return size
    except ValueError:
        what = "it is compressed: unpack it" if header[:2] == b"\x1f\x8b" or header[:3] == b"BZh" else "fetch it again"
        raise DataError(f"{path}: not a tar file, or a broken one: bad header at byte {position}; {what}") from None


def _short_name(header):
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _parse_pax(content, where):
    """Records are ``LENGTH KEY=VALUE\\n``, the length counting itself."""
    values, start = {}, 0
    while start < len(content) and content[start]:
        digits = re.match(rb"(\d{1,9}) ", content[start:start + 10])
        end = start + int(digits.group(1)) if digits else 0
        key, equals, value = content[start + digits.end():end - 1].partition(b"=") if end > start else (b"", b"", b"")
        if not equals or end > len(content):
            raise DataError(f"{where} cannot be parsed; fetch or write this shard again")
        values[_text(key)] = _text(value)
        start = end
    if not re.fullmatch(r"\d{1,18}", values.get("size", "0")):
        raise DataError(f"{where} states the size {values['size']!r}; fetch or write this shard again")
    return values


def _text(raw):
    return raw.decode("utf-8", "backslashreplace")
