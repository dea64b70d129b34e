"""Generated data for tools/claims.py: the hard world (``data/shapes.py``) in several sizes, and what its models are judged by.

::

    OUT/world-N/         what `unimo2 demo-data --world hard --size N` writes; a smaller one holds the first pairs of a larger one
    OUT/entailment/      hypotheses about pictures of the middle size, and of development and test pictures, in the files of SNLI-VE
    OUT/classes/         {train,val,test}/COLOUR_SHAPE/*.jpg, one object each, with specks
    OUT/texts/           {val,test}.txt, a text per line on scenes of development and test combinations
"""
import os

import cv2

from unimo2_paddle.data import shapes
from unimo2_paddle.data.demo import write_demo_data
from unimo2_paddle.data.demo_tasks import entailment
from unimo2_paddle.data.mixture import generator

WORLD = "hard"
PICTURES_PER_CLASS = {"train": 8, "val": 4, "test": 6}
TEXTS = {"val": ("dev", 150), "test": ("test", 300)}
_CLASSES, _TEXTS = 11, 12  # name spaces of the generators


def prepare(out, sizes, seed=1, classes=0):
    """Write what is not there yet; the same arguments give the same bytes.

    Args:
        out: directory; sizes: numbers of pairs; seed: of everything; classes: how many of the 48 kinds of objects have class folders; 0: all.
    """
    sizes = sorted(sizes)
    for size in sizes:
        print(write_demo_data(os.path.join(out, f"world-{size}"), size, seed, WORLD).splitlines()[0], flush=True)
    middle = os.path.join(out, f"world-{sizes[len(sizes) // 2]}")
    for name, write in (("entailment", lambda path: entailment.write(path, middle, seed)), ("classes", lambda path: _write_classes(path, seed, classes)),
                        ("texts", lambda path: _write_texts(path, seed))):
        path = os.path.join(out, name)
        if not os.path.isdir(path):
            temporary = f"{path}.{os.getpid()}.tmp"
            write(temporary)
            os.rename(temporary, path)


def _write_classes(directory, seed, classes):
    for place, (split, pictures) in enumerate(PICTURES_PER_CLASS.items()):
        for label, (colour, shape) in enumerate(shapes.TYPES[:classes or None]):
            folder = os.path.join(directory, split, f"{colour}_{shape}")
            os.makedirs(folder)
            for number in range(pictures):
                rng = generator(seed, _CLASSES, place, label, number)
                picture = shapes.draw(shapes.sample_single(rng, (colour, shape)), rng, shapes.WORLDS[WORLD].specks)
                cv2.imwrite(os.path.join(folder, f"{number:03d}.jpg"), picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])


def _write_texts(directory, seed):
    os.makedirs(directory)
    world = shapes.WORLDS[WORLD]
    for name, (split, count) in TEXTS.items():
        with open(os.path.join(directory, f"{name}.txt"), "w", encoding="utf-8") as file:
            for number in range(count):
                rng = generator(seed, _TEXTS, shapes.SPLITS.index(split), number)
                scene = shapes.sample_scene(rng, split, three=world.three)
                file.write(shapes.paragraph(scene, rng, int(rng.integers(2, 5)), world.even_words) + "\n")
