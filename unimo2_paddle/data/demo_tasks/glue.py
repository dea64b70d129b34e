"""Four GLUE-like data sets about the coloured-shape world, in GLUE's own file formats.

SST-2: do bright or dark colours prevail in a sentence (large things count twice). MNLI: does a statement follow from what a sentence
tells; the mismatched sets tell in other words. CoLA: is a sentence in order or scrambled. STS-B: how much two sentences tell of the
same scene. Combinations of objects in dev and test occur in no training sentence. The test files carry no labels, as GLUE's; what
the server would know is in ``answers/``.
"""
import itertools
import os
from typing import NamedTuple, Optional

import numpy as np

from unimo2_paddle.data.demo_tasks.scenes import read_scenes
from unimo2_paddle.data.formats.glue import GLUE, submission_lines
from unimo2_paddle.data.shapes import COLOURS, INVERSE, RELATIONS, SHAPES, SIZES, TYPES, caption, say_place
from unimo2_paddle.errors import DataError

PER_SCENE = 2
_BRIGHT = ("yellow", "cyan", "pink", "white")
_FILES = {"train": "train", "dev": "dev", "test": "test"}


def write(directory, demo_directory, seed):
    """Write the four folders and ``answers`` into ``directory``; a function of the arguments alone.

    Args:
        directory: made if it does not exist; demo_directory: what ``unimo2 demo-data`` wrote; seed: 0 or more.

    Returns:
        a summary line.

    Raises:
        DataError: there are no demo data, or the files cannot be written.
    """
    scenes = {split: [scene for _, scene in read_scenes(demo_directory, split)] for split in _FILES}
    counts = {}
    try:
        for number, (dataset, writer) in enumerate((("sst2", _write_sst2), ("mnli", _write_mnli), ("cola", _write_cola), ("stsb", _write_stsb))):
            folder = os.path.join(directory, GLUE[dataset].title)
            for name in (folder, os.path.join(directory, "answers")):
                os.makedirs(name, exist_ok=True)
            generators = {split: np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(number, place))))
                          for place, split in enumerate(_FILES)}
            counts[dataset] = writer(folder, os.path.join(directory, "answers"), scenes, generators)
    except OSError as error:
        raise DataError(f"{directory}: cannot write the sentences: {error.strerror}") from None
    return "glue: " + ", ".join(f"{GLUE[dataset].title} {train} train, {dev} dev, {test} test" for dataset, (train, dev, test) in counts.items())


def _write_sst2(folder, answers, scenes, generators):
    rows = {split: _repeated(_mood, scenes[split], rng) for split, rng in generators.items()}
    for split in ("train", "dev"):
        _write_tsv(folder, split, ["sentence", "label"], rows[split])
    _write_tsv(folder, "test", ["index", "sentence"], [[n, text] for n, (text, _) in enumerate(rows["test"])])
    return _finish("sst2", "", answers, rows)


def _write_cola(folder, answers, scenes, generators):
    rows = {split: _repeated(_acceptability, scenes[split], rng) for split, rng in generators.items()}
    for split in ("train", "dev"):
        _write_tsv(folder, split, None, [["shapes", label, "" if label else "*", text] for text, label in rows[split]])
    _write_tsv(folder, "test", ["index", "sentence"], [[n, text] for n, (text, _) in enumerate(rows["test"])])
    return _finish("cola", "", answers, rows)


def _write_stsb(folder, answers, scenes, generators):
    rows = {split: _repeated(lambda scene, rng, split=split: _alike(scene, rng, scenes[split]), scenes[split], rng)
            for split, rng in generators.items()}
    header = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"]
    for split in _FILES:
        last = None if split != "test" else -1
        _write_tsv(folder, split, header[:last], [
            [n, "main-captions", "shapes", "2022", f"{n:04d}", "none", "none", one, two, f"{score:.3f}"][:last]
            for n, (one, two, score) in enumerate(rows[split])])
    return _finish("stsb", "", answers, rows)


def _write_mnli(folder, answers, scenes, generators):
    rows = {split: _repeated(lambda scene, rng: _inference(scene, rng, "captions"), scenes[split], rng) for split, rng in generators.items()}
    other = {split: _repeated(lambda scene, rng: _inference(scene, rng, "tales"), scenes[split], generators[split]) for split in ("dev", "test")}
    names = GLUE["mnli"].labels
    header = ["index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse",
              "sentence1", "sentence2"]

    def lines(pairs, genre, extra):
        return [[n, n, f"{n}{names[label][0]}", genre, *(f"( {text} )" for text in (one, two, one, two)), one, two, *[names[label]] * extra]
                for n, (one, two, label) in enumerate(pairs)]

    annotators = [f"label{k}" for k in range(1, 6)]
    _write_tsv(folder, "train", [*header, "label1", "gold_label"], lines(rows["train"], "captions", 2))
    for part, pairs, genre in (("matched", rows, "captions"), ("mismatched", other, "tales")):
        _write_tsv(folder, f"dev_{part}", [*header, *annotators, "gold_label"], lines(pairs["dev"], genre, 6))
        # the pair's id would tell the label by its last letter, as it does in MultiNLI's training set
        _write_tsv(folder, f"test_{part}", header, [[*line[:2], str(line[0]), *line[3:]] for line in lines(pairs["test"], genre, 0)])
    mixed = [pair for both in zip(rows["test"][1::4], other["test"][1::4]) for pair in both]
    _write_tsv(folder, "diagnostic", ["index", "sentence1", "sentence2"], [[n, one, two] for n, (one, two, _) in enumerate(mixed)])
    _finish("mnli", "mismatched", answers, {**rows, "test": other["test"]})
    _finish("mnli", "ax", answers, {**rows, "test": mixed})
    return _finish("mnli", "matched", answers, rows)


def _finish(dataset, part, answers, rows):
    """Write the answers of the test rows; returns the sizes of the splits."""
    labels = [row[-1] for row in rows["test"]]
    _write(os.path.join(answers, GLUE[dataset].submissions[part][0]), submission_lines(dataset, list(range(len(labels))), labels))
    return tuple(len(rows[split]) for split in _FILES)


def _write_tsv(folder, name, header, rows):
    lines = ([header] if header else []) + rows
    _write(os.path.join(folder, f"{name}.tsv"), "".join("\t".join(map(str, line)) + "\n" for line in lines))


def _write(path, text):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def _repeated(make, scenes, rng):
    """``PER_SCENE`` rows of every scene, without those it has none for, in random order."""
    rows = [row for _ in range(PER_SCENE) for row in (make(scene, rng) for scene in scenes) if row is not None]
    return [rows[i] for i in rng.permutation(len(rows))]


def _any(rng, items):
    items = list(items)
    return items[rng.integers(len(items))]


def _sentence(text):
    return text[0].upper() + text[1:]


def _mood(scene, rng):
    """(sentence, 1 where bright colours prevail, else 0), or ``None`` when neither does."""
    text = caption(scene, rng, 1)[0]
    sizes_told = any(word in text.lower().split() for words in SIZES.values() for word in words)
    weight = sum((2 if sizes_told and thing.size == "large" else 1) * (1 if thing.colour in _BRIGHT else -1) for thing in scene.objects)
    return (text, int(weight > 0)) if weight else None


def _acceptability(scene, rng):
    """(sentence, 1 when in order); two of five are scrambled."""
    text = caption(scene, rng, 1)[0]
    return (_scrambled(text, rng), 0) if rng.random() < 0.4 else (text, 1)


def _scrambled(text, rng):
    """The sentence with two neighbours swapped, a word moved, a small word left out, or a few neighbours shuffled.

    Commas stay at their places in the sentence, so that they give nothing away.
    """
    words = text[0].lower() + text[1:].rstrip(".")
    commas = [word.endswith(",") for word in words.split()]
    words = [word.rstrip(",") for word in words.split()]
    while True:
        changed, kind = list(words), rng.integers(4)
        place = int(rng.integers(len(words) - 1))
        if kind == 0:
            changed[place: place + 2] = changed[place: place + 2][::-1]
        elif kind == 1:
            changed.insert(int(rng.integers(len(words))), changed.pop(place))
        elif kind == 2:
            small = [i for i, word in enumerate(words) if word in ("a", "the", "of", "is", "and", "with") and not commas[i]]
            if small:
                changed.pop(_any(rng, small))
        else:
            part = changed[place: place + 5]
            changed[place: place + 5] = [part[i] for i in rng.permutation(len(part))]
        if changed != words:
            kept = commas if len(changed) == len(words) else [False] * len(changed)
            return _sentence(" ".join(word + "," * comma for word, comma in zip(changed, kept)) + ".")


def _thing(thing, rng, article="a", with_size=True):
    """An object in words: a large red circle."""
    size = _any(rng, SIZES[thing.size]) + " " if with_size else ""
    return f"{article} {size}{thing.colour} {_any(rng, SHAPES[thing.shape])}"


_TOLD = {  # what a premise tells, by genre
    "captions": {"relation": ("{A} is {AB} {B}{C}.", "there is {A} {AB} {B}{C}.", "{AB} {B} there is {A}{C}."),
                 "place": ("{A} {at_A} and {B} {at_B}.", "we see {A} {at_A}, and {B} {at_B}.")},
    "tales": {"relation": ("if you look {AB} {B}, you find {A}{C}.", "the picture shows {A}. it is {AB} {B}{C}."),
              "place": ("you find {A} {at_A}. {at_B} there is {B}.", "{at_A} of the picture we see {A} and {at_B} {B}.")},
}


def _inference(scene, rng, genre):
    """(premise, hypothesis, label number of GLUE's MNLI).

    The kind of statement is drawn before its label, and the labels a kind can have are equally likely: a hypothesis alone tells next to
    nothing about its label.
    """
    while True:
        state, labels = _any(rng, _STATEMENTS)
        label = _any(rng, labels)
        for _ in range(20):  # a label may need another premise, or there may be none for it
            premise, told = _premise(scene, rng, genre)
            hypothesis = state(scene, told, label, rng)
            if hypothesis:
                return premise, _sentence(hypothesis), label


class _Told(NamedTuple):
    """What a premise tells: the things, whether their sizes, and either how the first stands to the second or where things are."""

    things: list
    sizes: bool
    relation: Optional[str]


def _premise(scene, rng, genre):
    kind, with_sizes = ("relation" if rng.random() < 0.6 else "place"), rng.random() < 0.6
    order = _any(rng, _orders(scene))
    a, b, c = (scene.objects[i] for i in (*order, order[0])[:3])
    third = len(order) == 3 and kind == "relation"
    relation = scene.relation(order[0], order[1])
    words = {"A": _thing(a, rng, with_size=with_sizes), "B": _thing(b, rng, with_size=with_sizes), "AB": _any(rng, RELATIONS[relation]),
             "C": f", and there is {_thing(c, rng, with_size=with_sizes)}" if third else "", "at_A": say_place(a.place), "at_B": say_place(b.place)}
    text = _any(rng, _TOLD[genre][kind]).format(**words)
    text = " ".join(_sentence(part.strip()) + "." for part in text.split(".") if part.strip())
    return text, _Told([a, b] + [c] * third, with_sizes, relation if kind == "relation" else None)


def _orders(scene):
    """Orders of the objects in which the first has a clear relation to the second."""
    return [order for order in itertools.permutations(range(len(scene.objects))) if scene.relation(order[0], order[1])]


CONTRADICTION, NEUTRAL, ENTAILMENT = range(3)


def _size_statement(scene, told, label, rng):
    if told.sizes == (label == NEUTRAL):  # what is told can be right or wrong, what is not told is neither
        return None
    thing = _any(rng, told.things)
    size = thing.size if label == ENTAILMENT else _any(rng, SIZES) if label == NEUTRAL else ("small" if thing.size == "large" else "large")
    return f"{_thing(thing, rng, 'the', False)} is {_any(rng, SIZES[size])}."


def _colour_statement(scene, told, label, rng):
    alone = [thing for thing in told.things if sum(other.shape == thing.shape for other in scene.objects) == 1]
    if not alone:
        return None
    thing = _any(rng, alone)
    colour = thing.colour if label == ENTAILMENT else _any(rng, [c for c in COLOURS if c != thing.colour])
    return f"the {_any(rng, SHAPES[thing.shape])} is {colour}."


def _existence_statement(scene, told, label, rng):
    colour, shape = _any(rng, told.things).type if label == ENTAILMENT else _any(rng, [kind for kind in TYPES if kind not in scene.types])
    return f"there is a {colour} {_any(rng, SHAPES[shape])}."


def _relation_statement(scene, told, label, rng):
    if not told.relation or (label == NEUTRAL and len(told.things) < 3):
        return None
    (one, two), relation = told.things[:2], told.relation
    if label == NEUTRAL:
        one, two, relation = told.things[2], _any(rng, told.things[:2]), _any(rng, RELATIONS)
    elif label == CONTRADICTION:
        relation = INVERSE[relation]
    if rng.random() < 0.5:
        one, two, relation = two, one, INVERSE[relation]
    return f"{_thing(one, rng, 'the', False)} is {_any(rng, RELATIONS[relation])} {_thing(two, rng, 'the', False)}."


def _place_statement(scene, told, label, rng):
    if bool(told.relation) != (label == NEUTRAL):
        return None
    thing = _any(rng, told.things)
    place = thing.place
    if label == NEUTRAL:
        place = _any(rng, [("top", "left"), ("top", "right"), ("bottom", "left"), ("bottom", "right"), ("top", ""), ("bottom", ""), ("", "left"),
                           ("", "right"), ("", "")])
    elif label == CONTRADICTION and place == ("", ""):
        place = (_any(rng, ("top", "bottom")), _any(rng, ("left", "right")))
    elif label == CONTRADICTION:
        opposite = {"top": "bottom", "bottom": "top", "left": "right", "right": "left", "": ""}
        place = tuple(opposite[word] for word in place)
    return f"{_thing(thing, rng, 'the', False)} is {say_place(place)}."


_STATEMENTS = (  # with the labels they can have: colours are always told, and there may always be a third thing
    (_size_statement, (CONTRADICTION, NEUTRAL, ENTAILMENT)), (_place_statement, (CONTRADICTION, NEUTRAL, ENTAILMENT)),
    (_relation_statement, (CONTRADICTION, NEUTRAL, ENTAILMENT)), (_colour_statement, (CONTRADICTION, ENTAILMENT)),
    (_existence_statement, (NEUTRAL, ENTAILMENT)),
)

_ALIKE = ("{A} is {AB} {B}{C}.", "there is {A} {AB} {B}{C}.", "{AB} {B} there is {A}{C}.", "we see {A} {AB} {B}{C}.")


def _alike(scene, rng, scenes):
    """(sentence, sentence, score 0 to 5): a scene and itself with up to five changes, or another scene of the split."""
    first = _facts(scene, rng)
    if rng.random() < 0.15:
        second = _facts(_any(rng, scenes), rng)
    else:
        second = first
        for _ in range(int(rng.integers(6))):
            second = _changed(second, rng)
    return _tell_facts(first, rng), _tell_facts(second, rng), 5.0 * similarity(first, second)


def _facts(scene, rng):
    """What a sentence tells: ([(size, colour, shape) of A, B and perhaps C], how A stands to B)."""
    order = _any(rng, _orders(scene))
    return tuple((scene.objects[i].size, scene.objects[i].colour, scene.objects[i].shape) for i in order), scene.relation(order[0], order[1])


def _changed(facts, rng):
    things, relation = list(facts[0]), facts[1]
    kind = rng.integers(4)
    if kind == 0:
        return facts[0], _any(rng, [name for name in RELATIONS if name != relation])
    place, field = int(rng.integers(len(things))), kind - 1
    values = [name for name in (SIZES, COLOURS, SHAPES)[field] if name != things[place][field]]
    things[place] = tuple(_any(rng, values) if n == field else value for n, value in enumerate(things[place]))
    return tuple(things), relation


def _tell_facts(facts, rng):
    (a, b, *rest), relation = facts
    if rng.random() < 0.5:
        a, b, relation = b, a, INVERSE[relation]

    def say(thing):
        return f"a {_any(rng, SIZES[thing[0]])} {thing[1]} {_any(rng, SHAPES[thing[2]])}"

    words = {"A": say(a), "B": say(b), "AB": _any(rng, RELATIONS[relation]), "C": f", and there is {say(rest[0])}" if rest else ""}
    return _sentence(_any(rng, _ALIKE).format(**words))


def similarity(first, second):
    """Share of what is told that agrees, 0 to 1, under the best matching of the things: colour and shape count 1 each, size a half,
    the relation 1; a thing only one side tells of counts fully against it."""
    most = max(len(first[0]), len(second[0]))
    one, two = (list(facts[0]) + [None] * (most - len(facts[0])) for facts in (first, second))
    best = 0.0
    for order in itertools.permutations(range(most)):
        agree = sum(weight * (one[i][n] == two[j][n]) for i, j in enumerate(order) if one[i] and two[j]
                    for n, weight in enumerate((0.5, 1.0, 1.0)))
        if set(order[:2]) == {0, 1} and (one[0] and two[0]):
            agree += first[1] == (second[1] if order[0] == 0 else INVERSE[second[1]])
        best = max(best, agree)
    return best / (2.5 * most + 1.0)
