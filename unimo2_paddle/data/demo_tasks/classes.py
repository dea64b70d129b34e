"""Classes of pictures in class folders and list files: real handwritten digits to finetune on, single shapes to name without training.

::

    DIR/digits/{train,val,test}/{0..9}/*.png   scikit-learn's 1,797 digits, enlarged to 64 pixels (400 in test, 200 in val)
    DIR/digits/{train,val,test}_list.txt       the same as PaddleClas list files
    DIR/digits/class_names.txt                 their names in words
    DIR/shapes/{val,test}/<colour>_<shape>/*.jpg   one object each, 48 classes
    DIR/shapes/class_names.txt                 "FOLDER name" per line

No picture or caption of the pre-training corpora has a single object, so every shape picture is of a kind the model never saw.
"""
import os

import cv2
import numpy as np

from unimo2_paddle.data.mixture import generator
from unimo2_paddle.data.shapes import COLOURS, SHAPES, TYPES, draw, sample_single
from unimo2_paddle.errors import DataError

DIGIT_SIZE = 64  # pixels; the originals have 8
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLIT_SIZES = {"test": 400, "val": 200}           # of the digits; the rest is train
PICTURES_PER_CLASS = {"val": 5, "test": 10}       # of the shapes
_DIGITS, _SHAPES = 0, 1
_JPEG_QUALITY = 92


def write(directory, demo_directory, seed):
    """Write both data sets; the same arguments give the same bytes.

    Args:
        directory: folder to write; demo_directory: not needed, the pictures are of their own; seed: of splits and drawings.

    Returns:
        a summary line.

    Raises:
        DataError: scikit-learn is not installed.
    """
    digits = _write_digits(os.path.join(directory, "digits"), seed)
    shapes = _write_shapes(os.path.join(directory, "shapes"), seed)
    return f"image classes: digits {digits}; {len(COLOURS) * len(SHAPES)} shape classes {shapes} ({directory})"


def _write_digits(directory, seed):
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the handwritten digits come with scikit-learn, which is not installed; pip install scikit-learn") from None

    digits = load_digits()
    order = generator(seed, _DIGITS).permutation(len(digits.images))
    places = np.split(order, np.cumsum(list(SPLIT_SIZES.values())))
    counts = []
    for split, numbers in zip((*SPLIT_SIZES, "train"), places):
        lines = []
        for number in sorted(numbers.tolist()):
            label = int(digits.target[number])
            name = f"{split}/{label}/digit{number:04d}.png"
            enlarged = cv2.resize(digits.images[number].astype(np.float32) * (255 / 16), (DIGIT_SIZE, DIGIT_SIZE), interpolation=cv2.INTER_CUBIC)
            _write_picture(os.path.join(directory, name), ".png", np.clip(np.rint(enlarged), 0, 255).astype(np.uint8))
            lines.append(f"{name} {label}\n")
        _write_text(os.path.join(directory, f"{split}_list.txt"), "".join(lines))
        counts.append(f"{len(lines)} {split}")
    _write_text(os.path.join(directory, "class_names.txt"), "".join(f"{label} {name}\n" for label, name in enumerate(DIGIT_NAMES)))
    return ", ".join(counts)


def _write_shapes(directory, seed):
    counts = []
    for split, pictures in PICTURES_PER_CLASS.items():
        for place, (colour, shape) in enumerate(TYPES):
            for number in range(pictures):
                rng = generator(seed, _SHAPES, list(PICTURES_PER_CLASS).index(split), place, number)
                picture = draw(sample_single(rng, (colour, shape)), rng)
                path = os.path.join(directory, split, f"{colour}_{shape}", f"{split}{number:03d}.jpg")
                _write_picture(path, ".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        counts.append(f"{pictures * len(TYPES)} {split}")
    _write_text(os.path.join(directory, "class_names.txt"), "".join(f"{colour}_{shape} {colour} {shape}\n" for colour, shape in sorted(TYPES)))
    return ", ".join(counts)


def _write_picture(path, ending, picture, options=()):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(cv2.imencode(ending, picture, list(options))[1].tobytes())


def _write_text(path, text):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
