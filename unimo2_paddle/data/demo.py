"""The demo corpora: the coloured-shape world (``data/shapes.py``) written in the file formats of real data.

::

    OUT/pairs/pairs-00000.tar ...     key.jpg + key.txt, five captions, one per line
    OUT/images/images-00000.tar ...   key.jpg, other scenes
    OUT/texts/texts-00000.tar ...     key.txt, one line of two to four sentences about a scene nobody painted
    OUT/retrieval/dataset_shapes.json, OUT/retrieval/images/*.jpg    Karpathy style; splits train, val, test
    OUT/vocab/{vocab.txt,encoder.json,vocab.bpe}                     trained on the training texts
    OUT/scenes/{train,dev,test}.jsonl                                what is where in every picture, with boxes
    OUT/demo.json                                                    what this is, and figures about it

No combination of objects of a development or test picture occurs in training, neither painted nor written. In the hard world (one of
``shapes.WORLDS``) all scenes have three objects, and two pictures in a row of development and test show the same three.
"""
import json
import os
import re
import shutil
from dataclasses import dataclass
from typing import List

import cv2
import numpy as np

from unimo2_paddle.data import shapes
from unimo2_paddle.data.shapes import WORLDS, Scene, caption, combinations, covering_pairs, draw, paragraph, sample_scene
from unimo2_paddle.data.shards import ShardWriter
from unimo2_paddle.data.tokenizer import train_vocabulary
from unimo2_paddle.errors import DataError, UserInputError

GENERATOR_VERSION = 1  # raise it when the same (size, seed) would give other files
CAPTIONS_PER_PICTURE = 5
VOCABULARY_SIZE = 512
SMALLEST_SIZE = len(shapes.TYPES) // 2  # two objects per picture must be able to show every (colour, shape)

_RECORDS_PER_SHARD = 1000
_JPEG_QUALITY = 92
_STREAMS = ("pairs", "images", "texts", "dev", "test", "dev types", "test types")
_MARKER = "UNFINISHED"
_KARPATHY_SPLIT = {"train": "train", "dev": "val", "test": "test"}


@dataclass(frozen=True)
class Picture:
    """A painted scene: its name, encoded JPEG and captions."""

    name: str
    scene: Scene
    jpeg: bytes
    captions: List[str]


def write_demo_data(out, size=4000, seed=1, world="plain"):
    """Writes the demo corpora; the same arguments always give the same bytes.

    Args:
        out: directory to write. One that already holds exactly these data is kept.
        size: number of training pairs, at least SMALLEST_SIZE. There are half as many further pictures and as many texts;
            dev and test have 300 and 400 pictures (below 400: a quarter and a third of ``size``, at least 20).
        seed: seed of everything random, 0 or more.
        world: one of ``shapes.WORLDS``.

    Returns:
        a summary for the screen.

    Raises:
        UserInputError: a wrong argument, or ``out`` holds something else.
        DataError: the files cannot be written.
    """
    if size < SMALLEST_SIZE:
        raise UserInputError(f"--size {size}: showing every coloured shape once takes at least {SMALLEST_SIZE} training pairs")
    if seed < 0:
        raise UserInputError(f"--seed {seed}: a seed is 0 or more")
    if world not in WORLDS:
        raise UserInputError(f"--world {world}: is not one of {', '.join(WORLDS)}")
    out = os.path.abspath(out)
    wanted = {"size": size, "seed": seed, "version": GENERATOR_VERSION, "world": world}
    kept = _existing(out, wanted)
    if kept is not None:
        return f"{out} already holds these demo data (nothing to do).\n" + _summary(out, kept)
    temporary = out + ".tmp"
    try:
        _start(temporary)
        try:
            about = _write(temporary, wanted)
            os.remove(os.path.join(temporary, _MARKER))
            os.rename(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise DataError(f"{out}: cannot write the demo data: {error.strerror or error}") from None
    return _summary(out, about)


def _existing(out, wanted):
    """The description of the same data at ``out``, None when there is nothing; anything else is refused."""
    if not os.path.lexists(out) or (os.path.isdir(out) and not os.listdir(out)):
        return None
    remedy = "remove it or choose another --out"
    try:
        with open(os.path.join(out, "demo.json"), encoding="utf-8") as file:
            about = json.load(file)
        found = {key: about[key] for key in wanted if key != "world"}
        found["world"] = about.get("world", "plain")  # data written before there were two
    except (OSError, ValueError, KeyError, TypeError):
        raise UserInputError(f"{out}: exists and is not a directory of demo data; {remedy}") from None
    if found != wanted:
        told = ["size {size}, seed {seed}, {world} world, generator version {version}".format(**values) for values in (found, wanted)]
        raise UserInputError(f"{out}: holds other demo data ({told[0]}; wanted: {told[1]}); {remedy}")
    return about


def _start(temporary):
    """Makes the working directory; one left by an interrupted run (it has our marker) is replaced."""
    marker = os.path.join(temporary, _MARKER)
    if os.path.lexists(temporary):
        if not os.path.isfile(marker):
            raise UserInputError(f"{temporary}: is in the way of the unfinished data; remove it or choose another --out")
        shutil.rmtree(temporary)
    os.makedirs(temporary)
    open(marker, "w").close()


def _write(root, wanted):
    size, seed, world = wanted["size"], wanted["seed"], WORLDS[wanted["world"]]
    train_texts, scene_rows, retrieval = [], {split: [] for split in shapes.SPLITS}, []

    first_types = covering_pairs() if world.three < 1 else []  # by threes, chance covers all types soon enough
    with ShardWriter(os.path.join(root, "pairs"), "pairs", _RECORDS_PER_SHARD) as writer:
        for number in range(size):
            types = first_types[number] if number < len(first_types) else None
            picture = _paint(f"pair{number:07d}", _generator(seed, "pairs", number), "train", world, types)
            shard = writer.write(picture.name, picture.jpeg, picture.captions)
            train_texts += picture.captions
            scene_rows["train"].append(_scene_row(picture, f"pairs/{shard}"))
            if number < max(1, size // 4):
                retrieval.append(("train", picture))
    with ShardWriter(os.path.join(root, "images"), "images", _RECORDS_PER_SHARD) as writer:
        for number in range(size // 2):
            picture = _paint(f"image{number:07d}", _generator(seed, "images", number), "train", world)
            shard = writer.write(picture.name, picture.jpeg)
            scene_rows["train"].append(_scene_row(picture, f"images/{shard}"))
    with ShardWriter(os.path.join(root, "texts"), "texts", _RECORDS_PER_SHARD) as writer:
        for number in range(size):
            text = _tell(_generator(seed, "texts", number), world)
            writer.write(f"text{number:07d}", texts=[text])
            train_texts.append(text)
    for split, types in _held_out_types(size, seed, world).items():
        for number, group in enumerate(types):
            picture = _paint(f"{split}{number:05d}", _generator(seed, split, number), split, world, group)
            scene_rows[split].append(_scene_row(picture, f"retrieval/images/{picture.name}.jpg"))
            retrieval.append((split, picture))

    _write_retrieval(os.path.join(root, "retrieval"), retrieval)
    train_vocabulary(train_texts, os.path.join(root, "vocab"), size=VOCABULARY_SIZE)
    os.makedirs(os.path.join(root, "scenes"))
    for split, rows in scene_rows.items():
        _write_text(os.path.join(root, "scenes", split + ".jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    about = _describe(wanted, scene_rows, retrieval)
    _write_text(os.path.join(root, "demo.json"), json.dumps(about, indent=2) + "\n")
    return about


def _generator(seed, stream, number):
    """An own generator per record: no record depends on how many others there are."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(_STREAMS.index(stream), number))))


def _held_out_types(size, seed, world=WORLDS["plain"]):
    """The sets of types of the dev and test pictures: pairs, and the world's share of triples; each in ``arrangements`` pictures in a row."""
    counts = {"dev": 300, "test": 400} if size >= 400 else {"dev": max(20, size // 4), "test": max(20, size // 3)}
    groups = {}
    for split, count in counts.items():
        rng = _generator(seed, split + " types", 0)
        chosen, count = [], count // world.arrangements
        pairs = round((1 - world.three) * count)
        for objects, share in ((2, pairs), (3, count - pairs)):
            sets = combinations(split, objects)
            chosen += [sets[i] for i in rng.permutation(len(sets))[:share]]
        groups[split] = [chosen[i] for i in rng.permutation(count) for _ in range(world.arrangements)]
    return groups


def _paint(name, rng, split, world, types=None):
    scene = sample_scene(rng, split, types, world.three)
    picture = draw(scene, rng, world.specks)
    done, jpeg = cv2.imencode(".jpg", picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    if not done:
        raise DataError(f"OpenCV could not encode picture {name} as JPEG")
    return Picture(name, scene, jpeg.tobytes(), caption(scene, rng, CAPTIONS_PER_PICTURE, world.even_words))


def _tell(rng, world):
    """A line of the text corpus; every fifth also, and every tenth only, states how the world is in general."""
    statements = [shapes.GENERAL_STATEMENTS[i] for i in rng.permutation(len(shapes.GENERAL_STATEMENTS))]
    kind, sentences = rng.random(), int(rng.integers(2, 5))
    if kind < 0.1:
        return " ".join(statements[:sentences])
    scene = sample_scene(rng, "train", three=world.three)
    if kind < 0.3:
        return paragraph(scene, rng, sentences - 1, world.even_words) + " " + statements[0]
    return paragraph(scene, rng, sentences, world.even_words)


def _scene_row(picture, file):
    return {"key": picture.name, "file": file, **picture.scene.to_json()}


def _write_retrieval(directory, pictures):
    os.makedirs(os.path.join(directory, "images"))
    images = []
    for number, (split, picture) in enumerate(pictures):
        with open(os.path.join(directory, "images", picture.name + ".jpg"), "wb") as file:
            file.write(picture.jpeg)
        first = number * CAPTIONS_PER_PICTURE
        sentences = [{"raw": text, "tokens": re.findall(r"[\w-]+", text.lower()), "imgid": number, "sentid": first + i}
                     for i, text in enumerate(picture.captions)]
        images.append({"filename": picture.name + ".jpg", "imgid": number, "split": _KARPATHY_SPLIT[split],
                       "sentids": [sentence["sentid"] for sentence in sentences], "sentences": sentences})
    _write_text(os.path.join(directory, "dataset_shapes.json"), json.dumps({"images": images, "dataset": "shapes"}))


def _describe(wanted, scene_rows, retrieval):
    splits = {}
    for split, rows in scene_rows.items():
        pairs = combinations(split, 2)
        splits[split] = {
            "pictures": len(rows),
            "with_three_objects": sum(len(row["objects"]) == 3 for row in rows),
            "combinations": len(pairs),
            "share_of_combinations": round(len(pairs) / (len(shapes.TYPES) * (len(shapes.TYPES) - 1) / 2), 4),
            "retrieval_pictures": sum(name == split for name, _ in retrieval),
        }
    return {
        "what": "Generated coloured-shape pictures, captions and texts of unimo2_paddle; no combination of objects in dev or "
                "test occurs in train",
        **wanted, "picture_size": shapes.PICTURE_SIZE,
        "corpora": {"pairs": wanted["size"], "images": wanted["size"] // 2, "texts": wanted["size"]},
        "splits": splits,
        "words": {"colours": list(shapes.COLOURS), "shapes": shapes.SHAPES, "sizes": shapes.SIZES,
                  "relations": shapes.RELATIONS},
    }


def _summary(out, about):
    corpora, splits = about["corpora"], about["splits"]
    return "\n".join([
        f"demo data in {out} (size {about['size']}, seed {about['seed']}, {about.get('world', 'plain')} world)",
        f"  pre-training: {corpora['pairs']} pairs with {CAPTIONS_PER_PICTURE} captions each, {corpora['images']} pictures, "
        f"{corpora['texts']} texts",
        f"  retrieval:    {splits['train']['retrieval_pictures']} train, {splits['dev']['pictures']} val and "
        f"{splits['test']['pictures']} test pictures",
        f"  combinations of two objects: {splits['train']['combinations']} in train, {splits['dev']['combinations']} only in "
        f"val, {splits['test']['combinations']} only in test",
    ])


def _write_text(path, text):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
