"""Hypotheses about the generated pictures in the files of SNLI-VE.

::

    DIR/snli_ve_{train,dev,test}.jsonl
    DIR/flickr30k-images/<number>.jpg

Every picture has one hypothesis of each label. Entailed and contradicting ones name objects, their sizes and relations; neutral ones
tell what the picture cannot show (what a thing is made of, who painted it), or compare two things of one size class. Both kinds of
words also occur in contradictions ("the green ring is made of wood" without a green ring), so that the sentence alone
does not give the label away more than it does in SNLI.
"""
import json
import os

from unimo2_paddle.data.demo_tasks.pictures import copy_pictures
from unimo2_paddle.data.demo_tasks.scenes import read_scenes
from unimo2_paddle.data.mixture import generator
from unimo2_paddle.data.shapes import COLOURS, INVERSE, RELATIONS, SHAPES, SIZES

SPLITS = ("train", "dev", "test")
_ORDER = ("entailment", "neutral", "contradiction")
_COMPARED = 0.4    # of the hypotheses compare two sizes, where two things give the label (six of ten)
_INVISIBLE = 0.35  # of the other contradictions tell something invisible about a thing that is not there
_CANNOT_BE_SEEN = (
    "is made of wood", "is made of paper", "was painted first", "was painted by a child", "is very old", "is heavy", "is cold", "is new",
)


def write(directory, demo_directory, seed):
    """Write the data set; the same arguments give the same bytes.

    Args:
        directory: folder to write; demo_directory: what ``unimo2 demo-data`` wrote; seed: of the choice of hypotheses.

    Returns:
        a summary line.
    """
    os.makedirs(directory, exist_ok=True)
    counts = {}
    for split in SPLITS:
        lines, pictures = [], []
        for image_id, row, told in judged_pictures(demo_directory, split, seed):
            pictures.append((row, os.path.join(directory, "flickr30k-images", f"{image_id}.jpg")))
            lines += [json.dumps(_line(image_id, label, text)) + "\n" for label, text in told]
        copy_pictures(demo_directory, pictures)
        with open(os.path.join(directory, f"snli_ve_{split}.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(lines)
        counts[split] = len(lines)
    return "visual entailment: " + ", ".join(f"{count} hypotheses in {split}" for split, count in counts.items()) + f" ({directory})"


def judged_pictures(demo_directory, split, seed):
    """Yields (image id, scene row, [(label, hypothesis)]) of every picture of a split, one hypothesis of each label."""
    scenes = [(row, scene) for row, scene in read_scenes(demo_directory, split) if not row["key"].startswith("image")]
    for number, (row, scene) in enumerate(scenes):
        place = SPLITS.index(split)
        rng = generator(seed, place, number)
        yield str((place + 1) * 10 ** 9 + number), row, [(label, _hypothesis(scene, label, rng)) for label in _ORDER]


def _line(image_id, label, text):
    return {"Flickr30K_ID": image_id, "annotator_labels": [label], "captionID": f"{image_id}.jpg#0", "gold_label": label,
            "pairID": f"{image_id}.jpg#0r1{label[0]}", "sentence1": "", "sentence2": text}


def _pick(rng, choices):
    return choices[int(rng.integers(len(choices)))]


def _hypothesis(scene, label, rng):
    compared = _comparison(scene, label, rng) if rng.random() < _COMPARED else None
    if compared:
        return compared
    if label == "neutral":
        return f"The {_words(_pick(rng, scene.objects).type, rng)} {_pick(rng, _CANNOT_BE_SEEN)}."
    true = label == "entailment"
    if not true and rng.random() < _INVISIBLE:
        return f"The {_words(_absent(scene, rng), rng)} {_pick(rng, _CANNOT_BE_SEEN)}."
    if rng.random() < 0.5:
        return _existence(scene, true, rng)
    return _relation(scene, true, rng)


def _words(kind, rng):
    return f"{kind[0]} {_pick(rng, SHAPES[kind[1]])}"


def _absent(scene, rng):
    """A (colour, shape) that the picture does not have, sharing one of the two with an object."""
    thing = _pick(rng, scene.objects)
    while True:
        kind = (_pick(rng, list(COLOURS)), thing.shape) if rng.random() < 0.5 else (thing.colour, _pick(rng, list(SHAPES)))
        if kind not in scene.types:
            return kind


def _existence(scene, true, rng):
    thing = _pick(rng, scene.objects)
    if rng.random() < 0.7:
        size = _pick(rng, SIZES[thing.size]) + " " if rng.random() < 0.5 else ""
        return f"There is a {size}{_words(thing.type if true else _absent(scene, rng), rng)}."
    size = thing.size if true else "small" if thing.size == "large" else "large"
    return f"The {_words(thing.type, rng)} is {_pick(rng, SIZES[size])}."


def _relation(scene, true, rng):
    first, relation, second = _pick(rng, scene.relations)
    if not true:
        relation = INVERSE[relation]
    if rng.random() < 0.5:
        first, relation, second = second, INVERSE[relation], first
    one, other = scene.objects[first], scene.objects[second]
    return f"The {_words(one.type, rng)} is {_pick(rng, RELATIONS[relation])} the {_words(other.type, rng)}."


def _comparison(scene, label, rng):
    """A sentence on which of two things is larger, or ``None`` when no two things give this label."""
    things = scene.objects
    pairs = [(one, other) for one in things for other in things
             if one is not other and (one.size == other.size) == (label == "neutral")]
    if not pairs:
        return None
    one, other = _pick(rng, pairs)
    word = _pick(rng, ("larger", "smaller"))
    if label != "neutral":
        truth = "larger" if one.size == "large" else "smaller"
        word = truth if label == "entailment" else {"larger": "smaller", "smaller": "larger"}[truth]
    return f"The {_words(one.type, rng)} is {word} than the {_words(other.type, rng)}."
