"""Text generation about the coloured-shape world, in the files of UNIMO's four generation tasks.

::

    DIR/cnndm/{train,dev.2k,test}.tsv        passage -> summary: what there is, and the relation that the passage calls notable
    DIR/gigaword/{train,dev.20k,test}.tsv    sentence -> headline
    DIR/squad_qg/{train,dev,test}.tsv        "answer [SEP] passage" -> question
    DIR/coqa/{train,dev,test}.tsv            earlier questions and answers, passage in the column knowledge -> answer
    DIR/<task>/<file>.json                   the same as text: [{"src", ("knowledge",) "tgt"}], to judge by and to look at

A TSV has a header line; cells hold vocabulary keys (the lines of ``vocab.txt``) separated by blanks, and ``[SEP]`` between answer and passage
or between turns (reference: unimo1.md section 3.2). What a target tells stands anywhere in its source, often in other words, so copying the
first sentence is not enough. Combinations of things in dev and test occur in no training passage.
"""
import json
import os

from unimo2_paddle.data.demo_tasks.scenes import read_scenes
from unimo2_paddle.data.mixture import generator
from unimo2_paddle.data.shapes import GENERAL_STATEMENTS, INVERSE, RELATIONS, SHAPES, SIZES, caption, paragraph, say_place
from unimo2_paddle.data.tokenizer import Tokenizer

SPLITS = ("train", "dev", "test")
FILES = {"cnndm": ("train", "dev.2k", "test"), "gigaword": ("train", "dev.20k", "test"), "squad_qg": ("train", "dev", "test"),
         "coqa": ("train", "dev", "test")}
SEPARATOR = " [SEP] "
_MOST_TURNS = 4
_FOLLOW_UP = {"colour": "What colour is it?", "size": "How large is it?", "place": "And where is it?"}


def write(directory, demo_directory, seed):
    """Write the four data sets; the same arguments give the same bytes.

    Args:
        directory: folder to write; demo_directory: what ``unimo2 demo-data`` wrote; seed: of the choice of words.

    Returns:
        a summary line.
    """
    tokenizer = Tokenizer.from_directory(os.path.join(demo_directory, "vocab"))
    with open(os.path.join(demo_directory, "vocab", "vocab.txt"), encoding="utf-8") as file:
        keys = file.read().split("\n")
    counts = {}
    for place, split in enumerate(SPLITS):
        scenes = [scene for _, scene in read_scenes(demo_directory, split)]
        for task, (name, make) in enumerate(_MAKERS.items()):
            os.makedirs(os.path.join(directory, name), exist_ok=True)
            rows = [make(scene, generator(seed, task, place, number)) for number, scene in enumerate(scenes)]
            _write_split(os.path.join(directory, name, FILES[name][place]), rows, lambda text: _cell(text, tokenizer, keys))
            counts[split] = len(rows)
    return "seq2seq: 4 tasks of " + ", ".join(f"{count} {split}" for split, count in counts.items()) + f" ({directory})"


def _cell(text, tokenizer, keys):
    return SEPARATOR.join(" ".join(keys[i] for i in tokenizer.encode(part)) for part in text.split(SEPARATOR))


def _write_split(path, rows, cell):
    with open(path + ".tsv", "w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(rows[0]) + "\n")
        file.writelines("\t".join(cell(text) for text in row.values()) + "\n" for row in rows)
    with open(path + ".json", "w", encoding="utf-8") as file:
        json.dump(rows, file, indent=0)


def _pick(rng, choices):
    return choices[int(rng.integers(len(choices)))]


def _say(thing):
    return f"{thing.colour} {thing.shape}"


def _relate(scene, rng):
    """One relation of the scene in words of its own, seen from either side, and as targets tell it: with "left of" or "above" only."""
    first, relation, second = _pick(rng, scene.relations)
    if relation in ("right of", "below"):
        first, relation, second = second, INVERSE[relation], first
    one, other = scene.objects[first], scene.objects[second]
    target = one, relation, other
    if rng.random() < 0.5:
        one, relation, other = other, INVERSE[relation], one
    return f"the {_say(one)} {{}} {_pick(rng, RELATIONS[relation])} the {_say(other)}", target


def _summarise(scene, rng):
    key, (one, relation, other) = _relate(scene, rng)
    told = paragraph(scene, rng, 3).rstrip(".").split(". ") + ["Most notably, " + key.format("is")]
    if rng.random() < 0.5:
        told.append(_pick(rng, GENERAL_STATEMENTS).rstrip("."))
    names = sorted(f"a {_say(thing)}" for thing in scene.objects)
    return {"src": ". ".join(told[i] for i in rng.permutation(len(told))) + ".",
            "tgt": f"There is {', '.join(names[:-1])} and {names[-1]}. The {_say(one)} is {relation} the {_say(other)}."}


def _headline(scene, rng):
    told, (one, relation, other) = _relate(scene, rng)
    rest = [thing for thing in scene.objects if thing not in (one, other)]
    return {"src": caption(scene, rng, 1)[0].rstrip(".") + ", " + told.format("being") + ".",
            "tgt": f"{_say(one)} {relation} {_say(other)}" + "".join(f", {_say(thing)} near" for thing in rest)}


def _questions(scene):
    """(kind, thing asked about, question, answer) of everything that can be asked about a scene."""
    for number, thing in enumerate(scene.objects):
        name = thing.shape if sum(other.shape == thing.shape for other in scene.objects) == 1 else f"{thing.colour} {thing.shape}"
        if name == thing.shape:
            yield "colour", number, f"What colour is the {name}?", thing.colour
        yield "size", number, f"How large is the {name}?", thing.size
        yield "place", number, f"Where is the {name}?", say_place(thing.place)
    for first, relation, second in scene.relations:
        one, other = (_say(scene.objects[i]) for i in (first, second))
        yield "relation", first, f"What is {relation} the {other}?", f"the {one}"


def _facts(scene, rng, asked):
    """A passage that answers the questions ``asked`` and tells something else besides, and names things in its own words."""
    told = []
    for kind, number, _, _ in asked:
        thing = scene.objects[number]
        name = _pick(rng, SHAPES[thing.shape][:1] * 3 + SHAPES[thing.shape][1:])
        told.append({"colour": f"The {name} is {thing.colour}.", "size": f"The {thing.colour} {name} is {_pick(rng, SIZES[thing.size])}.",
                     "place": f"The {thing.colour} {name} is {say_place(thing.place)}."}.get(kind))
    sentences = [caption(scene, rng, 1)[0], *filter(None, told)]
    for first, relation, second in scene.relations:
        if any(kind == "relation" for kind, *_ in asked):
            one, other = (_say(scene.objects[i]) for i in (first, second))
            sentences.append(f"The {one} is {_pick(rng, RELATIONS[relation])} the {other}.")
    sentences = list(dict.fromkeys(sentences))
    return " ".join(sentences[i] for i in rng.permutation(len(sentences)))


def _ask(scene, rng):
    asked = _pick(rng, list(_questions(scene)))
    others = [question for question in _questions(scene) if question[3] != asked[3]]  # one answer must not stand for two questions
    passage = _facts(scene, rng, [asked, _pick(rng, others)])
    return {"src": asked[3] + SEPARATOR + passage, "tgt": asked[2]}


def _converse(scene, rng):
    """A dialogue of one to four questions whose later ones may say "it" for the thing of the question before."""
    choices = list(_questions(scene))
    asked = [choices[i] for i in rng.permutation(len(choices))[:int(rng.integers(1, _MOST_TURNS + 1))]]
    asked.sort(key=lambda question: question[1])  # questions about one thing follow each other
    questions = [asked[0][2]]
    for before, now in zip(asked, asked[1:]):
        follows = before[1] == now[1] and before[0] != "relation" and now[0] in _FOLLOW_UP
        questions.append(_FOLLOW_UP[now[0]] if follows else now[2])
    turns = [text for question, (_, _, _, answer) in zip(questions, asked) for text in (question, answer)]
    return {"src": SEPARATOR.join(turns[:-1]), "knowledge": _facts(scene, rng, asked), "tgt": turns[-1]}


_MAKERS = {"cnndm": _summarise, "gigaword": _headline, "squad_qg": _ask, "coqa": _converse}
