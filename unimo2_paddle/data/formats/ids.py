"""The authors' ``.ids`` files of Flickr30k and COCO retrieval: captions already turned into vocabulary ids.

A line is ``token_ids;sent_ids;pos_ids;image_id;sent_id``, numbers separated by blanks (reference: the authors' retrieval
reader). Files of the training, development and test split stay apart: ``train.ids``, ``val.all.ids``, ``test.all.ids``.
"""
from dataclasses import dataclass
from typing import List

from unimo2_paddle.data.formats.pictures import picture_path, require_pictures
from unimo2_paddle.errors import DataError

_FIELDS = ("token_ids", "sent_ids", "pos_ids", "image_id", "sent_id")


@dataclass(frozen=True)
class TokenisedCaption:
    """One line of an ``.ids`` file.

    Attributes:
        token_ids: vocabulary ids with [CLS] and [SEP], length L.
        sentence_ids: segment of every token, length L (the models do not use it).
        position_ids: position of every token, length L; the authors count from 2.
        image_id: name of the picture without its suffix.
        sentence_id: name of the caption.
    """

    token_ids: List[int]
    sentence_ids: List[int]
    position_ids: List[int]
    image_id: str
    sentence_id: str


@dataclass(frozen=True)
class TokenisedImage:
    """A picture file with its tokenised captions (at least one)."""

    image_id: str
    path: str
    captions: List[TokenisedCaption]


def read_ids(path):
    """Yields the TokenisedCaption of every line; blank lines are passed over.

    Raises:
        DataError: the file cannot be read, or a line (named as file:line) is malformed.
    """
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    yield _parse(raw, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"{path}: cannot read the captions: {error.strerror}") from None


def read_ids_dataset(path, images_dir, suffix=".jpg", check_pictures=True):
    """Reads an ``.ids`` file grouped by picture.

    Args:
        path: the file.
        images_dir: the picture folder; a picture is ``images_dir/<image_id><suffix>``.
        suffix: ending of the picture files; check_pictures: make sure that every picture exists.

    Returns:
        list of TokenisedImage in order of first appearance.

    Raises:
        DataError: as in ``read_ids``, or the file has no caption, or pictures are missing.
    """
    images = {}
    for caption in read_ids(path):
        if caption.image_id not in images:
            place = picture_path(images_dir, caption.image_id + suffix, f"{path}: image_id")
            images[caption.image_id] = TokenisedImage(caption.image_id, place, [])
        images[caption.image_id].captions.append(caption)
    if not images:
        raise DataError(f"{path}: no caption in this file; a line is {';'.join(_FIELDS)}")
    images = list(images.values())
    if check_pictures:
        require_pictures(images_dir, [image.path for image in images], path)
    return images


def _parse(raw, where):
    try:
        fields = raw.decode("utf-8").rstrip("\r\n").split(";")
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8 text") from None
    if len(fields) != len(_FIELDS):
        raise DataError(f"{where}: {len(fields)} fields instead of {len(_FIELDS)} ({';'.join(_FIELDS)})")
    numbers = []
    for name, field in zip(_FIELDS, fields[:3]):
        values = field.split()
        for value in values:
            # int() alone would also take signs, underscores and foreign digits
            if not (value.isascii() and value.isdigit() and len(value) < 10):
                raise DataError(f"{where}: {name} has {value[:40]!r} where a number is expected")
        numbers.append([int(value) for value in values])
    lengths = [len(values) for values in numbers]
    if not lengths[0] or len(set(lengths)) > 1:
        raise DataError(f"{where}: token_ids, sent_ids and pos_ids have {lengths[0]}, {lengths[1]} and {lengths[2]} numbers; "
                        "they must be equally many and at least one")
    image_id, sentence_id = fields[3].strip(), fields[4].strip()
    if not image_id:
        raise DataError(f"{where}: image_id is empty")
    return TokenisedCaption(*numbers, image_id, sentence_id)
