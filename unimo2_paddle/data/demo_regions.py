"""A pretended detector for the generated pictures: boxes from the scene, features from a small fixed random network.

What a real detector gives is imitated with its faults: boxes are off by a few pixels, a picture has further boxes on nothing in
particular, now and then a name is wrong, and confidence is high for most things and low for most of the rest. The features are those of
two random convolutions over the box and a few pixels around it (so that the size of a thing shows), pooled and mixed at random: colour,
shape and size can be read from them with a linear layer.
"""
import cv2
import numpy as np

from unimo2_paddle.data.formats.regions import RegionRecord
from unimo2_paddle.data.shapes import COLOURS, PICTURE_SIZE, SHAPES

OBJECT_NAMES = (*SHAPES, "background")
ATTRIBUTE_NAMES = (*COLOURS, "grey")
FEATURE_SIZE = 64

_SIDE = 20             # pixels of a crop
_AROUND = 6            # pixels of the picture around a box that the crop also shows
_JITTER = 1.5          # pixels, standard deviation of every side of a box
_DISTRACTORS = (2, 4)  # boxes on nothing in particular, least and most
_WRONG_NAME = 0.03     # share of the names that are wrong
_GRID = 256            # features are multiples of 1 / _GRID: they compress well, and rounding hides the order of additions
_SEED = 2012           # of the network; every demo has the same detector


def detect(pictures, generators):
    """What the detector finds.

    Args:
        pictures: list of (key, Scene, uint8 [H, W, 3] RGB); generators: a numpy Generator for every picture.

    Returns:
        list of ``RegionRecord``, boxes in the order of falling confidence of the object, with ids into ``OBJECT_NAMES`` and
        ``ATTRIBUTE_NAMES`` and probabilities (column 0 is "none").
    """
    found = [_boxes(scene, rng) for (_, scene, _), rng in zip(pictures, generators)]
    crops = [_crop(picture, box) for (_, _, picture), (boxes, _, _) in zip(pictures, found) for box in boxes]
    features = region_features(np.stack(crops))
    ends = np.cumsum([len(boxes) for boxes, _, _ in found])
    records = []
    for (key, _, _), (boxes, objects, attributes), end in zip(pictures, found, ends):
        object_ids, attribute_ids = (probabilities[:, 1:].argmax(axis=1) for probabilities in (objects, attributes))
        rows = np.arange(len(boxes))
        order = np.argsort(-objects[rows, 1 + object_ids], kind="stable")
        records.append(RegionRecord(
            key, PICTURE_SIZE, PICTURE_SIZE, boxes[order], features[end - len(boxes):end][order], object_ids[order],
            objects[rows, 1 + object_ids][order], attribute_ids[order], attributes[rows, 1 + attribute_ids][order], objects[order], attributes[order]))
    return records


def region_features(crops):
    """Features of pieces of pictures.

    Args:
        crops: uint8 [N, _SIDE, _SIDE, 3] RGB.

    Returns:
        float32 [N, FEATURE_SIZE], not negative, multiples of 1 / 256.
    """
    rng = np.random.Generator(np.random.Philox(_SEED))
    first = rng.standard_normal((3 * 3 * 3, 24)).astype(np.float32) / np.sqrt(np.float32(27))
    second = rng.standard_normal((3 * 3 * 24, 32)).astype(np.float32) / np.sqrt(np.float32(216))
    mix = rng.standard_normal((4 * 4 * 32, FEATURE_SIZE)).astype(np.float32) / np.sqrt(np.float32(512))
    found = []
    for start in range(0, len(crops), 512):  # the pieces of a convolution of all crops at once would take a gigabyte
        states = crops[start:start + 512].astype(np.float32) / 127.5 - 1
        states = np.maximum(_pieces(states, 2) @ first, 0)   # [n, 9, 9, 24]
        states = np.maximum(_pieces(states, 2) @ second, 0)  # [n, 4, 4, 32]
        mixed = states.reshape(len(states), -1) @ mix
        found.append(np.round(np.maximum(4 * mixed + 1, 0) * _GRID) / _GRID)
    return np.concatenate(found).astype(np.float32)


def _pieces(states, stride):
    """[n, s, s, c] -> the 3 x 3 neighbourhoods [n, (s - 3) // stride + 1, ..., 9 c]."""
    windows = np.lib.stride_tricks.sliding_window_view(states, (3, 3), axis=(1, 2))[:, ::stride, ::stride]
    return windows.reshape(*windows.shape[:3], -1)


def _crop(picture, box):
    left, top, right, bottom = box
    side = max(right - left, bottom - top) / 2 + _AROUND
    scale = _SIDE / (2 * side)
    matrix = np.array([[scale, 0, _SIDE / 2 - scale * (left + right) / 2], [0, scale, _SIDE / 2 - scale * (top + bottom) / 2]])
    return cv2.warpAffine(picture, matrix, (_SIDE, _SIDE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _boxes(scene, rng):
    """Boxes float32 [N, 4], object and attribute probabilities float32 [N, C], in scene order, then the distractors."""
    boxes = [_limit(np.array(thing.box) + rng.normal(0, _JITTER, 4)) for thing in scene.objects]
    names = [(list(SHAPES).index(thing.shape), list(COLOURS).index(thing.colour)) for thing in scene.objects]
    for _ in range(rng.integers(_DISTRACTORS[0], _DISTRACTORS[1] + 1)):
        centre, half = rng.uniform(8, PICTURE_SIZE - 8, 2), rng.uniform(8, 24, 2)
        boxes.append(_limit(np.concatenate([centre - half, centre + half])))
        names.append((len(SHAPES), len(COLOURS)))
    things = len(scene.objects)
    sure = np.concatenate([0.4 + 0.6 * rng.beta(5, 1.5, things), 0.1 + 0.4 * rng.beta(1.5, 4, len(boxes) - things)])
    objects = _probabilities([o for o, _ in names], sure, len(OBJECT_NAMES), rng)
    attributes = _probabilities([a for _, a in names], sure * rng.uniform(0.6, 1, len(boxes)), len(ATTRIBUTE_NAMES), rng)
    return np.array(boxes, np.float32), objects, attributes


def _limit(box):
    """The box inside the picture, at least two pixels wide and high."""
    low, high = np.clip(np.minimum(box[:2], box[2:]), 0, PICTURE_SIZE - 2), np.clip(np.maximum(box[:2], box[2:]), 2, PICTURE_SIZE)
    return np.concatenate([low, np.maximum(high, low + 2)]).round(2)


def _probabilities(ids, sure, classes, rng):
    """Rows of probabilities [N, 1 + classes] whose largest class (not column 0) is the given id, or now and then another one."""
    rest = rng.dirichlet(np.full(1 + classes, 0.5), len(ids))
    for row, wanted in enumerate(ids):
        if rng.random() < _WRONG_NAME:
            wanted = int(rng.integers(classes))
        rest[row, 1 + wanted] = 0
        rest[row] *= (1 - sure[row]) / rest[row].sum()
        # what is left must not outweigh the name
        rest[row, 1 + wanted] = max(sure[row], 1.05 * rest[row, 1:].max())
        rest[row] /= rest[row].sum()
    return rest.round(4).astype(np.float32)
