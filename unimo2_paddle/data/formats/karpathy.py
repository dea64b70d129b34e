"""Karpathy JSON: captions and splits of Flickr30k, Flickr8k and COCO (dataset_flickr30k.json, dataset_coco.json)."""
import json
import os
from collections import Counter
from dataclasses import dataclass
from typing import List

from unimo2_paddle.data.formats.pictures import picture_path, require_pictures
from unimo2_paddle.errors import DataError


@dataclass(frozen=True)
class CaptionedImage:
    """A picture file with its captions.

    Attributes:
        image_id: COCO's number (as text) where there is one, else the file name without its suffix, which is how the
            authors' ``.ids`` files name Flickr30k pictures.
        path: the picture file.
        captions: raw sentences, at least one.
    """

    image_id: str
    path: str
    captions: List[str]


def read_karpathy(annotations, images_dir, split, include_restval=False, check_pictures=True):
    """Reads one split of a Karpathy JSON file.

    Args:
        annotations: the JSON file; ``images[]`` with filename, split, sentences[].raw and optionally filepath, cocoid.
        images_dir: the picture folder; a picture is ``images_dir/[filepath/]filename``.
        split: "train", "val" or "test" (or whatever the file uses).
        include_restval: with "train", also take the split "restval" (COCO's usual training set).
        check_pictures: make sure that every picture exists.

    Returns:
        list of CaptionedImage in file order.

    Raises:
        DataError: the file is missing or malformed (naming the image and the key), the split is empty, an image appears
            twice, or pictures are missing.
    """
    wanted = {split, "restval"} if include_restval and split == "train" else {split}
    found, first_use, splits = [], {}, Counter()
    for number, entry in enumerate(_read_images(annotations)):
        where = f"{annotations}: images[{number}]"
        if not isinstance(entry, dict):
            raise DataError(f"{where} is not an object")
        name = _field(entry, "split", where)
        splits[name] += 1
        if name not in wanted:
            continue
        image = _captioned_image(entry, images_dir, where)
        if image.image_id in first_use:
            raise DataError(f"{where}: image {image.image_id} was already images[{first_use[image.image_id]}]")
        first_use[image.image_id] = number
        found.append(image)
    if not found:
        present = ", ".join(f"{name} ({count})" for name, count in sorted(splits.items())) or "none"
        raise DataError(f"{annotations}: no image of split {split!r}; the file has: {present}")
    if check_pictures:
        require_pictures(images_dir, [image.path for image in found], annotations)
    return found


def _read_images(annotations):
    try:
        with open(annotations, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise DataError(f"{annotations}: cannot read the annotations: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{annotations}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{annotations}: not JSON in UTF-8: {error}") from None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise DataError(f'{annotations}: no list "images": this is not a Karpathy annotation file')
    return images


def _captioned_image(entry, images_dir, where):
    filename = _field(entry, "filename", where)
    if entry.get("filepath"):
        filename = _field(entry, "filepath", where) + "/" + filename
    path = picture_path(images_dir, filename, f"{where}.filename")
    sentences = entry.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        raise DataError(f"{where}.sentences: a non-empty list of captions is needed")
    captions = []
    for number, sentence in enumerate(sentences):
        place = f"{where}.sentences[{number}]"
        if not isinstance(sentence, dict):
            raise DataError(f"{place} is not an object")
        captions.append(_field(sentence, "raw", place).strip())
    number = entry.get("cocoid")
    return CaptionedImage(os.path.splitext(os.path.basename(filename))[0] if number is None else str(number), path, captions)


def _field(entry, key, where):
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}.{key}: a non-empty text is needed" + ("" if key in entry else ", the key is missing"))
    return value
