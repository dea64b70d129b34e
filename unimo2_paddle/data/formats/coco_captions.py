"""COCO captions on disk: the authors' tokenised filelists with object tags, COCO and NoCaps annotation JSON, and the result JSON of
the COCO server.

A line of the authors' data is ``image_id;image_path;caption_id;token_ids;sent_ids;pos_ids;seg_labels;label`` (reference notes, section
1.6), of their object tags ``image_id;token_ids;sent_ids;pos_ids``. Numbers are separated by blanks. Empty token ids mean: a picture to
caption. Files may be gzipped.
"""
import gzip
import json
import os
import zlib
from dataclasses import dataclass, field
from typing import List

from unimo2_paddle.data.formats.pictures import picture_path
from unimo2_paddle.errors import DataError

RECORD_FIELDS = ("image_id", "image_path", "caption_id", "token_ids", "sent_ids", "pos_ids", "seg_labels", "label")
TAG_FIELDS = ("image_id", "token_ids", "sent_ids", "pos_ids")
_ID_PREFIX = 9  # characters the authors cut off an image id before they read the number


@dataclass
class CaptionImage:
    """A picture with its captions.

    Attributes:
        image_id: COCO's number as text, or a name.
        path: the picture file.
        captions: texts, possibly none (pictures that are only to be captioned).
        tokens: captions as vocabulary ids with [CLS] and [SEP], where the data came tokenised.
        domain: NoCaps' "in-domain", "near-domain" or "out-domain"; else empty.
    """

    image_id: str
    path: str
    captions: List[str] = field(default_factory=list)
    tokens: List[List[int]] = field(default_factory=list)
    domain: str = ""


def read_caption_filelist(path, images_dir):
    """Read what a filelist names.

    Args:
        path: text file with one data file per line, relative to its own folder (or to the working directory); images_dir: folder that
            image paths are relative to.

    Returns:
        list of :class:`CaptionImage` in order of first appearance.

    Raises:
        DataError: a file is missing or malformed (named as file:line), or there is no record.
    """
    images = {}
    for name in filelist_paths(path):
        for where, fields in _records(name, RECORD_FIELDS):
            image_id, tokens = coco_image_id(fields[0], where), id_lists(fields, (3, 4, 5), RECORD_FIELDS, where)[0]
            if image_id not in images:
                images[image_id] = CaptionImage(image_id, picture_path(images_dir, fields[1].strip(), f"{where}: image_path"))
            if tokens:
                images[image_id].tokens.append(tokens)
    if not images:
        raise DataError(f"{path}: no records in the files it names; a line is {';'.join(RECORD_FIELDS)}")
    return list(images.values())


def read_object_tags(path, most=100):
    """Object tags of every picture as vocabulary ids.

    Args:
        path: the tag file; most: longer lists are cut to so many ids (their last id stays last).

    Returns:
        dict image id -> list of ids.

    Raises:
        DataError: the file is missing, malformed, or holds a picture twice.
    """
    tags = {}
    for where, fields in _records(path, TAG_FIELDS):
        image_id, ids = coco_image_id(fields[0], where), id_lists(fields, (1, 2, 3), TAG_FIELDS, where)[0]
        if image_id in tags:
            raise DataError(f"{where}: image {image_id} has object tags already")
        tags[image_id] = ids if len(ids) <= most else ids[: most - 1] + ids[-1:]
    if not tags:
        raise DataError(f"{path}: no object tags in this file; a line is {';'.join(TAG_FIELDS)}")
    return tags


def read_coco_captions(path, images_dir):
    """Read a COCO or NoCaps annotation file (``images`` with id, file_name and NoCaps' domain; ``annotations`` with image_id, caption).

    Returns:
        list of :class:`CaptionImage` in file order; without ``annotations`` they have no captions.

    Raises:
        DataError: the file is missing or malformed, or an annotation is of no picture.
    """
    content = _read_json(path)
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError(f'{path}: no list "images": this is not a COCO annotation file')
    images = {}
    for number, entry in enumerate(entries):
        where = f"{path}: images[{number}]"
        if not isinstance(entry, dict) or "id" not in entry:
            raise DataError(f"{where}: an object with id and file_name is needed")
        image_id = str(entry["id"])
        if image_id in images:
            raise DataError(f"{where}: image {image_id} appears twice")
        place = picture_path(images_dir, entry.get("file_name"), f"{where}.file_name")
        images[image_id] = CaptionImage(image_id, place, domain=str(entry.get("domain") or ""))
    for number, entry in enumerate(content.get("annotations") or []):
        where = f"{path}: annotations[{number}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("caption"), str) or str(entry.get("image_id")) not in images:
            raise DataError(f"{where}: a caption of a picture in this file is needed")
        images[str(entry["image_id"])].captions.append(entry["caption"].strip())
    return list(images.values())


def result_rows(image_ids, captions):
    """Captions in the COCO server's result format.

    Raises:
        DataError: an image id is not a number.
    """
    wrong = [i for i in image_ids if not str(i).isdigit()]
    if wrong:
        raise DataError(f"image id {wrong[0]!r} is not a number, so the COCO server cannot know the picture")
    return [{"image_id": int(i), "caption": caption} for i, caption in zip(image_ids, captions)]


def result_problems(path, image_ids):
    """What the COCO server would refuse in a result file.

    Args:
        path: the result JSON; image_ids: the pictures of the split.

    Returns:
        list of texts, empty when the file is fine.

    Raises:
        DataError: the file cannot be read or is not JSON.
    """
    rows = _read_json(path)
    if not isinstance(rows, list):
        return ["the file must be a list of {image_id, caption}"]
    problems, seen, wanted = [], set(), {int(i) for i in image_ids}
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("image_id"), int) or not isinstance(row.get("caption"), str):
            problems.append(f"[{number}]: an object with image_id (number) and caption (text) is needed")
            continue
        if row["image_id"] in seen:
            problems.append(f"[{number}]: image {row['image_id']} has a caption already")
        if row["image_id"] not in wanted:
            problems.append(f"[{number}]: image {row['image_id']} is not in the split")
        if not row["caption"].strip():
            problems.append(f"[{number}]: the caption of image {row['image_id']} is empty")
        seen.add(row["image_id"])
    absent = sorted(wanted - seen)
    if absent:
        problems.append(f"{len(absent)} pictures have no caption: {', '.join(map(str, absent[:3]))}{', ...' if len(absent) > 3 else ''}")
    return problems


def _read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None


def filelist_paths(path):
    """The files a filelist names, one per line: relative to the filelist's folder, or as the authors have it to the working directory.

    Raises:
        DataError: the list cannot be read or is empty.
    """
    try:
        with open(path, encoding="utf-8") as file:
            names = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the list of files: {getattr(error, 'strerror', None) or error}") from None
    if not names:
        raise DataError(f"{path}: names no file")
    near = [os.path.join(os.path.dirname(path), name) for name in names]
    return [beside if os.path.exists(beside) or not os.path.exists(name) else name for beside, name in zip(near, names)]


def _records(path, names):
    """Yields (place, fields) of every line that is not blank."""
    opener = gzip.open if str(path).endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                fields = line.rstrip("\r\n").split(";")
                if len(fields) != len(names):
                    raise DataError(f"{path}:{number}: {len(fields)} fields instead of {len(names)} ({';'.join(names)})")
                yield f"{path}:{number}", fields
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read after line {number}: {getattr(error, 'strerror', None) or error}") from None


def coco_image_id(text, where):
    """A picture's number as text; the authors write nine characters before it, which are cut off."""
    text = text.strip()
    digits = text if text.isdigit() else text[_ID_PREFIX:]
    if not (digits.isascii() and digits.isdigit()):
        raise DataError(f"{where}: image_id {text!r} is neither a number nor {_ID_PREFIX} characters and a number")
    return str(int(digits))


def id_lists(fields, columns, names, where):
    """The lists of ids in some columns; they must be equally long."""
    lists = []
    for column in columns:
        values = fields[column].split()
        wrong = [v for v in values if not (v.isascii() and v.isdigit() and len(v) < 10)]
        if wrong:
            raise DataError(f"{where}: {names[column]} has {wrong[0][:40]!r} where a number is expected")
        lists.append([int(v) for v in values])
    if len({len(values) for values in lists}) > 1:
        told = ", ".join(f"{names[c]} {len(v)}" for c, v in zip(columns, lists))
        raise DataError(f"{where}: the columns have different numbers of ids ({told})")
    return lists
