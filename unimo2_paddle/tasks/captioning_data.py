"""Captioning data: pictures, their object tags and captions, as samples and batches."""
import logging
import os
from dataclasses import dataclass, field

import numpy as np

from unimo2_paddle.data.collate import FIRST_POSITION, PAD_POSITION, flat_positions, pad, seq2seq_visibility, text_arrays, with_special_tokens
from unimo2_paddle.data.formats.coco_captions import CaptionImage, read_caption_filelist, read_coco_captions, read_object_tags
from unimo2_paddle.data.formats.karpathy import read_karpathy
from unimo2_paddle.data.formats.pictures import require_pictures
from unimo2_paddle.data.images import Augmentation, augment_image, decode_image, resize_image
from unimo2_paddle.data.region_store import RegionStore
from unimo2_paddle.errors import DataError
from unimo2_paddle.tasks.unimo_inputs import MAX_REGIONS, image_arrays, region_problems

logger = logging.getLogger(__name__)
FORMATS = ("karpathy", "coco", "filelist", "store")


@dataclass
class CaptioningData:
    """Group ``data``.

    ``annotations``: a Karpathy JSON; for ``format: coco`` a COCO or NoCaps annotation file, for ``format: filelist`` the authors'
    filelist, both with ``{split}`` where the split's name stands. ``objects``: the authors' object-tag file (empty: no tags).
    ``references``: COCO annotations to judge by where the data have no captions themselves (filelists), may hold ``{split}``.
    ``include_restval``: train also on COCO's restval, as everybody does.
    For UNIMO ``regions`` is the store of region features (``{split}`` in it is replaced) and ``max_regions`` how many a picture has at most
    with the global one; ``images`` may then be empty, reports have no pictures then. ``format: store`` takes the captions from the authors'
    records that were imported with the features (``regions`` holds ``{split}``, ``annotations`` is empty).
    """

    vocab: str
    annotations: str = ""
    images: str = ""
    format: str = "karpathy"
    objects: str = ""
    references: str = ""
    max_text_len: int = 50
    max_objects: int = 100
    include_restval: bool = False
    exif: bool = True
    augmentation: Augmentation = field(default_factory=Augmentation)
    num_workers: int = 0
    regions: str = ""
    max_regions: int = MAX_REGIONS

    def problems(self):
        found = [f"{key}: is empty; give a path" for key in ("vocab", *["annotations"] * (self.format != "store")) if not getattr(self, key)]
        found += region_problems(self)
        found += [f"{key}: must be at least {low}, is {getattr(self, key)}"
                  for key, low in (("max_text_len", 3), ("max_objects", 2), ("num_workers", 0)) if getattr(self, key) < low]
        if self.format not in FORMATS:
            found.append(f"format: {self.format!r} is not one of {', '.join(FORMATS)}")
        elif self.format == "store":
            if "{split}" not in self.regions:
                found.append(f"regions: must contain {{split}}, for example data/coco/regions_{{split}}; is {self.regions!r}")
        elif self.format != "karpathy" and "{split}" not in self.annotations:
            found.append("annotations: write {split} where the split's name stands, for example captions_{split}.json")
        return found


def read_images(data, split):
    """The :class:`CaptionImage` of a split.

    Raises:
        DataError: files are missing or malformed.
    """
    place = data.annotations.replace("{split}", split)
    if data.format == "store":
        images = _stored_captions(data.regions.replace("{split}", split))
    elif data.format == "karpathy":
        found = read_karpathy(place, data.images, split, data.include_restval, check_pictures=bool(data.images))
        images = [CaptionImage(image.image_id, image.path, image.captions) for image in found]
    else:
        images = (read_coco_captions if data.format == "coco" else read_caption_filelist)(place, data.images)
        if data.images:
            require_pictures(data.images, [image.path for image in images], place)
    if data.references and split != "train":
        _add_references(images, data.references.replace("{split}", split))
    return images


def _stored_captions(directory):
    """The pictures of a store in the order of their records, with the captions that stood in these."""
    images = {}
    for row in RegionStore(directory).texts():
        image = images.setdefault(row["image_id"], CaptionImage(row["image_id"], row["image_id"]))
        if row["token_ids"]:
            image.tokens.append(row["token_ids"])
    if not images:
        raise DataError(f"{directory}: holds no records of captions; import the authors' files with --format captioning, or name data.annotations")
    return list(images.values())


def _add_references(images, path):
    known = {image.image_id: image for image in read_coco_captions(path, "")}
    for image in images:
        if image.image_id not in known:
            raise DataError(f"{path}: has no captions of image {image.image_id}")
        image.captions, image.domain = known[image.image_id].captions, known[image.image_id].domain


class CaptionDataset:
    """A split: samples are captions (training) or pictures (evaluation and self-critical training).

    Attributes:
        images: list of ``CaptionImage``; tags: id list per picture, or ``None`` when there are no object tags.
        items: (picture, caption) numbers of the samples; the caption is ``None`` when a sample is a picture.
        regions: ``RegionPictures`` for UNIMO, ``None`` where pictures are files.
    """

    def __init__(self, images, tokenizer, image_size, data, tags=None, by_caption=True, regions=None):
        self.images, self.tokenizer, self.image_size, self.data = images, tokenizer, image_size, data
        self.tags, self.regions = tags, regions
        self.items = [(number, None) for number in range(len(images))]
        if by_caption:
            self.items = [(number, k) for number, image in enumerate(images) for k in range(len(image.tokens) or len(image.captions))]
        for image in images:
            largest = max((max(ids) for ids in image.tokens), default=0)
            if largest >= tokenizer.vocab_size:
                raise DataError(f"{data.annotations or data.regions}: token id {largest} of image {image.image_id} is outside the vocabulary of "
                                f"{tokenizer.vocab_size} entries ({data.vocab})")

    @classmethod
    def read(cls, data, tokenizer, image_size, split, by_caption, max_images=0, regions=None):
        """The data set that the group ``data`` describes; ``regions`` are those of its pictures (UNIMO).

        Raises:
            DataError: files are missing or malformed, a picture has no object tags, or no picture has a caption to train on.
        """
        images = read_images(data, split)
        images = images[:max_images] if max_images else images
        tags = None
        if data.objects:
            known = read_object_tags(data.objects, data.max_objects)
            absent = [image.image_id for image in images if image.image_id not in known]
            if absent:
                raise DataError(f"{data.objects}: no object tags for {len(absent)} of {len(images)} pictures, the first is {absent[0]}")
            tags = [known[image.image_id] for image in images]
        if regions is not None:
            regions.name(images, data.annotations or data.regions)
        dataset = cls(images, tokenizer, image_size, data, tags, by_caption, regions)
        if not dataset.items:
            raise DataError(f"{data.annotations or data.regions}: split {split!r} has no captions to learn from")
        cut = dataset.cut_captions() if by_caption else 0
        if cut:
            logger.warning("%s: %d of %d captions are longer than data.max_text_len %d and lose their end", data.annotations or data.regions, cut,
                           len(dataset), data.max_text_len)
        return dataset

    def __len__(self):
        return len(self.items)

    def alone(self):
        """The same pictures as samples without tags and captions."""
        return CaptionDataset(self.images, self.tokenizer, self.image_size, self.data, by_caption=False, regions=self.regions)

    def sample(self, index, rng):
        """A mapping with ``picture`` (number), ``image`` (uint8 ``[S, S, 3]``, or ``Regions``), ``tags`` and ``caption`` (ids or ``None``)."""
        number, k = self.items[index]
        return {"picture": number, "image": self._picture(self.images[number].path, rng), "tags": None if self.tags is None else self.tags[number],
                "caption": None if k is None else self.caption_ids(number, k)}

    def _picture(self, path, rng):
        if self.regions is not None:
            return self.regions.get(path)
        pixels = decode_image(path, exif=self.data.exif)
        return resize_image(pixels, self.image_size) if rng is None else augment_image(pixels, self.image_size, self.data.augmentation, rng)

    def caption_ids(self, number, k):
        """Caption ``k`` of a picture as ``[CLS] ... [SEP]``, cut to ``max_text_len`` with [SEP] kept."""
        image, most = self.images[number], self.data.max_text_len
        if not image.tokens:
            return with_special_tokens(self.tokenizer.encode(image.captions[k]), self.tokenizer, most)
        ids = image.tokens[k]
        return ids if len(ids) <= most else ids[: most - 1] + [self.tokenizer.sep_id]

    def cut_captions(self):
        """How many captions :meth:`caption_ids` cuts."""
        most, count = self.data.max_text_len, 0
        for image in self.images:
            if image.tokens:
                count += sum(len(ids) > most for ids in image.tokens)
            else:  # a text has at most as many tokens as bytes, so most need not be encoded
                count += sum(len(text.encode()) > most - 2 and len(self.tokenizer.encode(text)) > most - 2 for text in image.captions)
        return count

    def references(self, number):
        """The captions of a picture as texts."""
        image = self.images[number]
        return image.captions or [self.tokenizer.decode(ids) for ids in image.tokens]

    def name(self, number):
        """What predictions call a picture: (id, file)."""
        image = self.images[number]
        return image.image_id, os.path.normpath(image.path)


def picture_arrays(samples, pad_id, max_regions=None):
    """``picture`` int64 ``[B]``, what :func:`image_arrays` gives and, with object tags, ``tag_ids``, ``tag_positions``, ``tag_mask``."""
    arrays = {"picture": np.array([s["picture"] for s in samples], dtype="int64"), **image_arrays([s["image"] for s in samples], max_regions)}
    if samples[0]["tags"] is not None:
        tags = text_arrays([s["tags"] for s in samples], pad_id)
        arrays.update(tag_ids=tags["input_ids"], tag_positions=tags["position_ids"], tag_mask=tags["text_mask"])
    return arrays


def target_arrays(captions, tags, pad_id):
    """The text side of sequence-to-sequence training: tags ++ caption, no padding between them.

    Args:
        captions: id lists ``[CLS] ... [SEP]``; tags: id lists or ``None``.

    Returns:
        dict of ``input_ids``, ``position_ids`` int64 ``[B, L]`` (both parts count from 2), ``text_mask`` float32 ``[B, L, L]`` (all see the
        tags, the caption sees itself up to the present token), ``predict_from`` int64 ``[N]`` (flat places whose next token is predicted)
        and ``labels`` int64 ``[N]``.
    """
    tags = [[]] * len(captions) if tags is None else tags
    sizes = [(len(t), len(t) + len(c)) for t, c in zip(tags, captions)]
    length = max(end for _, end in sizes)
    positions = [[*range(FIRST_POSITION, FIRST_POSITION + len(t)), *range(FIRST_POSITION, FIRST_POSITION + len(c))]
                 for t, c in zip(tags, captions)]
    return {"input_ids": pad([[*t, *c] for t, c in zip(tags, captions)], pad_id), "position_ids": pad(positions, PAD_POSITION),
            "text_mask": seq2seq_visibility(sizes, length), "predict_from": flat_positions([range(start, end - 1) for start, end in sizes], length),
            "labels": np.concatenate([np.asarray(c[1:], dtype="int64") for c in captions])}
