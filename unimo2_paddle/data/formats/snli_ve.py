"""SNLI-VE (visual entailment): the official ``snli_ve_{train,dev,test}.jsonl``, one pair of picture and hypothesis per line."""
import json
from dataclasses import dataclass
from typing import Tuple

from unimo2_paddle.data.formats.pictures import picture_path, require_pictures
from unimo2_paddle.errors import DataError

LABELS = ("contradiction", "neutral", "entailment")
NO_LABEL = "-"  # the annotators did not agree; such lines are left out, as in all published results


@dataclass(frozen=True)
class Hypothesis:
    """A sentence about a picture: true of it (entailment), false (contradiction), or not to be decided from it (neutral).

    ``label`` is an index into :data:`LABELS`; ``tokens``: vocabulary ids with [CLS] and [SEP], where the data came tokenised.
    """

    pair_id: str
    image_id: str
    text: str
    path: str
    label: int
    tokens: Tuple[int, ...] = ()


def read_snli_ve(path, images_dir, suffix=".jpg", check_pictures=True):
    """One split of SNLI-VE.

    Args:
        path: the JSON-lines file; of a line ``gold_label``, ``sentence2``, ``pairID`` and ``Flickr30K_ID`` are read (without the last
            one the picture is the part of ``pairID`` before ".jpg").
        images_dir: the Flickr30k pictures; suffix: of a picture's file name after its id.
        check_pictures: make sure that every picture exists.

    Returns:
        list of :class:`Hypothesis` in file order, without those whose gold label is "-".

    Raises:
        DataError: the file is missing or malformed (naming the line and the key), or pictures are missing.
    """
    found = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    hypothesis = _parse(line, f"{path}: line {number}", images_dir, suffix)
                    if hypothesis is not None:
                        found.append(hypothesis)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}") from None
    if not found:
        raise DataError(f"{path}: has no line with a gold label")
    if check_pictures:
        require_pictures(images_dir, list(dict.fromkeys(hypothesis.path for hypothesis in found)), path)
    return found


def _parse(line, where, images_dir, suffix):
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise DataError(f"{where}: is not an object")
    label = _text(entry, "gold_label", where)
    if label == NO_LABEL:
        return None
    if label not in LABELS:
        raise DataError(f"{where}.gold_label: {label!r} is not one of {', '.join(LABELS)} or {NO_LABEL!r}")
    pair_id = _text(entry, "pairID", where)
    image_id = _text(entry, "Flickr30K_ID", where) if "Flickr30K_ID" in entry else pair_id.partition(".jpg")[0]
    image_id = image_id[:-len(suffix)] if suffix and image_id.endswith(suffix) else image_id
    path = picture_path(images_dir, image_id + suffix, f"{where}.Flickr30K_ID")
    return Hypothesis(pair_id, image_id, _text(entry, "sentence2", where).strip(), path, LABELS.index(label))


def _text(entry, key, where):
    value = entry.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and key == "Flickr30K_ID":
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}.{key}: a non-empty text is needed" + ("" if key in entry else ", the key is missing"))
    return value.strip()
