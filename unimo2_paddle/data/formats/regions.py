"""What the region files of every format share: the record, base64 number buffers, checks, streaming, width against height.

A detector's output is one line per picture (or per picture and text). A format is a list of named columns and a separator
(``bottom_up.py``, ``unimo_records.py``); the columns with these names mean the same everywhere:

- ``image_id``, ``width``, ``height`` (pixels), ``number_box``;
- ``boxes``, ``features``: base64 of little-endian float32, ``number_box`` rows; a box is (x1, y1, x2, y2) in pixels;
- ``object_ids``, ``attribute_ids`` (int64) and ``object_confidence``, ``attribute_confidence`` (float32), base64, one number per box;
- ``object_probs``, ``attribute_probs``: base64 of float32, ``number_box`` rows over the detector's classes, column 0 being "none".
"""
import base64
import binascii
import gzip
import zlib
from dataclasses import dataclass
from typing import NamedTuple, Optional, Tuple

import numpy as np

from unimo2_paddle.errors import DataError

_PER_BOX = {"object_ids": "<i8", "object_confidence": "<f4", "attribute_ids": "<i8", "attribute_confidence": "<f4"}
_PROBABILITIES = ("object_probs", "attribute_probs")
LABELS = (*_PER_BOX, *_PROBABILITIES)
_SLACK = 0.01  # of the longer side: detectors round, and enlarge small pictures before they look


@dataclass(frozen=True)
class RegionText:
    """A text that stands in the same line as its picture.

    Attributes:
        text_id: name of the text; label: the line's label column.
        token_ids: vocabulary ids with [CLS] and [SEP]; empty where there is only a picture to caption.
        sentence_ids, position_ids: of every token (the model does not use the first).
        segment_labels: captioning's whole-word column: 1 for a token that continues a word, -1 for [CLS] and [SEP].
    """

    text_id: str
    label: str
    token_ids: Tuple[int, ...] = ()
    sentence_ids: Tuple[int, ...] = ()
    position_ids: Tuple[int, ...] = ()
    segment_labels: Tuple[int, ...] = ()


@dataclass(frozen=True)
class RegionRecord:
    """The regions a detector found in one picture (at least one).

    Attributes:
        image_id: name of the picture; width, height: of the picture in pixels, as the format's columns state them.
        boxes: float32 [N, 4] (x1, y1, x2, y2) in pixels; features: float32 [N, D].
        object_ids, attribute_ids: int64 [N], counted from 0 without "none", or None; object_confidence, attribute_confidence: float32
            [N] or None.
        object_probs, attribute_probs: float32 [N, C], column 0 is "none", or None.
        text: the ``RegionText`` of the line, or None.
    """

    image_id: str
    width: int
    height: int
    boxes: np.ndarray
    features: np.ndarray
    object_ids: Optional[np.ndarray] = None
    object_confidence: Optional[np.ndarray] = None
    attribute_ids: Optional[np.ndarray] = None
    attribute_confidence: Optional[np.ndarray] = None
    object_probs: Optional[np.ndarray] = None
    attribute_probs: Optional[np.ndarray] = None
    text: Optional[RegionText] = None


class RegionFormat(NamedTuple):
    """An on-disk format: ``layouts`` (tuples of column names of different lengths), the separator, and what reads and writes the
    columns that are not about regions: ``image_id(field, where) -> str``, ``read_text(row, where) -> RegionText`` and
    ``write_text(RegionText) -> {column: field}``, None where the format has no texts."""

    layouts: Tuple[Tuple[str, ...], ...]
    separator: str
    image_id: object
    read_text: object = None
    write_text: object = None


def read_regions(path, layout, labels=True, bad_record=None, position=None):
    """Yields (place, RegionRecord) of every line of a file, plain or gzipped, holding one line at a time.

    Args:
        path: the file; layout: its ``RegionFormat``; labels: also read what the detector calls the regions.
        bad_record: called as ``bad_record(place, error)`` for every line that cannot be used, which is then skipped; None: such a line
            raises. A place is "file:line".
        position: called with the bytes of the file read so far, for a progress bar.

    Raises:
        DataError: the file cannot be read, or a line is malformed.
    """
    number = 0
    try:
        with open(path, "rb") as raw, (gzip.open(raw) if str(path).endswith(".gz") else raw) as lines:
            for number, line in enumerate(lines, 1):
                if position is not None:
                    position(raw.tell())
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    record = parse_regions(line, layout, place, labels)
                except DataError as error:
                    if bad_record is None:
                        raise
                    bad_record(place, error)
                    continue
                yield place, record
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read after line {number}: {getattr(error, 'strerror', None) or error}; "
                        "fetch this file again") from None


def parse_regions(line, layout, where, labels=True):
    """The RegionRecord of one line (bytes).

    Raises:
        DataError: naming ``where`` and the column.
    """
    fields = line.rstrip(b"\r\n").split(layout.separator.encode())
    columns = next((names for names in layout.layouts if len(names) == len(fields)), None)
    if columns is None:
        known = "; or ".join(f"{len(names)} ({layout.separator.join(names)})" for names in layout.layouts).replace("\t", " ")
        raise DataError(f"{where}: {len(fields)} fields instead of {known}")
    row = dict(zip(columns, fields))
    image_id = layout.image_id(_decoded(row["image_id"], where), where)
    width, height, count = (_number(row[name], name, where) for name in ("width", "height", "number_box"))
    if not width or not height:
        raise DataError(f"{where}: image {image_id} has the size {width} x {height}")
    if not count:
        raise DataError(f"{where}: image {image_id} has no box; detect its regions again with a lower threshold, or leave it out")
    boxes = _buffer(row["boxes"], count, "boxes", where, width=4)
    features = _buffer(row["features"], count, "features", where)
    _check_values(boxes, features, where)
    found = _read_labels(row, count, where) if labels else {}
    text = layout.read_text(row, where) if layout.read_text else None
    return RegionRecord(image_id, width, height, boxes, features, text=text, **found)


def format_regions(record, layout, columns=None, image_id=None):
    """The line (without line break) that ``parse_regions`` reads back as ``record``; columns the record has nothing for are empty.

    Args:
        record: a RegionRecord; layout: the ``RegionFormat``; columns: which of its layouts, None the longest the record can fill.
        image_id: how the file names the picture, if not like the record.
    """
    columns = columns or next((names for names in sorted(layout.layouts, key=len, reverse=True)
                               if len(layout.layouts) == 1 or all(getattr(record, name) is not None for name in _PER_BOX if name in names)))
    row = {"image_id": image_id or record.image_id, "width": record.width, "height": record.height, "number_box": len(record.boxes),
           "boxes": _encoded(record.boxes, "<f4"), "features": _encoded(record.features, "<f4")}
    for name in LABELS:
        value = getattr(record, name)
        if value is not None:
            row[name] = _encoded(value, _PER_BOX.get(name, "<f4"))
    if record.text is not None and layout.write_text:
        row.update(layout.write_text(record.text))
    return layout.separator.join(str(row.get(name, "")) for name in columns)


def size_order(record):
    """In which order the boxes say the two sizes must be read.

    Returns:
        "stated" or "swapped" when they lie inside the picture in this order only, "either", or None when in neither.
    """
    stated = _inside(record.boxes, record.width, record.height)
    swapped = _inside(record.boxes, record.height, record.width)
    return ("either" if swapped else "stated") if stated else "swapped" if swapped else None


def _inside(boxes, width, height):
    slack = max(1.0, _SLACK * max(width, height))
    return boxes[:, 2].max() <= width + slack and boxes[:, 3].max() <= height + slack and boxes[:, :2].min() >= -slack


def _check_values(boxes, features, where):
    if not np.isfinite(boxes).all() or not np.isfinite(features).all():
        raise DataError(f"{where}: {'features' if np.isfinite(boxes).all() else 'boxes'} hold numbers that are not finite")
    wrong = np.flatnonzero((boxes[:, 2:] < boxes[:, :2]).any(axis=1))
    if len(wrong):
        raise DataError(f"{where}: box {wrong[0]} is {boxes[wrong[0]].tolist()}, which is not (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2")


def _read_labels(row, count, where):
    found = {}
    remedy = "; leave out what the detector calls the regions with --no-objects"
    try:
        for name, dtype in _PER_BOX.items():
            if name in row:
                found[name] = _buffer(row[name], count, name, where, dtype, width=1)[:, 0]
        for name in _PROBABILITIES:
            if row.get(name):
                found[name] = probabilities = _buffer(row[name], count, name, where)
                kind = name.split("_")[0]
                if probabilities.shape[1] < 2:
                    raise DataError(f"{where}: {name} has {probabilities.shape[1]} column, where \"none\" and at least one class are expected")
                found[f"{kind}_ids"] = probabilities[:, 1:].argmax(axis=1)
                found[f"{kind}_confidence"] = probabilities[:, 1:].max(axis=1)
    except DataError as error:
        raise DataError(f"{error}{remedy}") from None
    return found


def _buffer(field, rows, name, where, dtype="<f4", width=None):
    """A base64 field as an array [rows, width]; without ``width`` that follows from the number of bytes."""
    if not field:
        raise DataError(f"{where}: {name} is empty")
    try:
        data = base64.b64decode(field, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: {name} is not base64 ({error})") from None
    size = np.dtype(dtype).itemsize
    per_row = width or max(1, len(data) // (rows * size))
    if len(data) != rows * per_row * size:
        raise DataError(f"{where}: {name} holds {len(data)} bytes, which are not {rows} rows"
                        + (f" of {width}" if width else "") + f" numbers of {size} bytes; number_box is {rows}")
    return np.frombuffer(data, dtype).reshape(rows, per_row)


def _encoded(values, dtype):
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()


def _decoded(field, where):
    try:
        text = field.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise DataError(f"{where}: image_id is not UTF-8 text") from None
    if not text:
        raise DataError(f"{where}: image_id is empty")
    return text


def _number(field, name, where):
    text = field.strip()
    if not (text.isdigit() and len(text) < 10):
        raise DataError(f"{where}: {name} is {text[:20].decode('utf-8', 'replace')!r} where a whole number is expected")
    return int(text)


def plain_id(text, where):
    """The ``image_id`` of formats that name pictures as they are."""
    return text
