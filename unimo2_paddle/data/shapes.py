"""The coloured-shape world behind the demo data: scenes, their pictures, captions and statements.

A scene holds two or three objects of 8 colours x 6 shapes x 2 sizes on a textured background. Which two (colour, shape)
may meet is decided by the split: a combination that occurs in development or test scenes occurs nowhere in training.

``WORLDS`` are two settings of the same generator: the plain one, and a hard one for experiments in which nothing may be solved easily.
"""
import hashlib
import itertools
import math
from dataclasses import dataclass, replace
from typing import Tuple

import cv2
import numpy as np

PICTURE_SIZE = 112  # pixels
SPLITS = ("train", "dev", "test")
COLOURS = {  # RGB; the corners of the colour cube are the farthest apart
    "red": (214, 36, 36), "green": (38, 162, 58), "blue": (42, 70, 214), "yellow": (246, 216, 42),
    "cyan": (40, 202, 216), "pink": (246, 104, 190), "black": (18, 18, 22), "white": (247, 247, 244),
}
SHAPES = {  # the first name is the one used in annotations
    "circle": ("circle", "disc"), "square": ("square", "box"), "triangle": ("triangle", "three-sided shape"),
    "star": ("star", "five-pointed star"), "cross": ("cross", "plus sign"), "ring": ("ring", "hoop"),
}
SIZES = {"large": ("large", "big"), "small": ("small", "little", "tiny")}
RELATIONS = {
    "left of": ("left of", "to the left of"), "right of": ("right of", "to the right of"),
    "above": ("above", "over"), "below": ("below", "under"),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

_RADII = {"large": (18.5, 21.0), "small": (11.5, 13.0)}  # pixels of PICTURE_SIZE; visibly different even side by side
_GAP = 3.0  # pixels between two objects and to the border
_CLEAR = 1.5  # a relation holds when the offset along its axis is this many times the offset across
_BACKGROUNDS = ("noise", "gradient", "stripes")

TYPES = tuple(itertools.product(COLOURS, SHAPES))  # the 48 (colour, shape)
# The 48 types stand on a circle in hashed order and the distance between two of them decides the split of the combination.
# Every type so has 10 partners in test, 10 in dev and 27 in training, and enough triples close up within dev and test: a
# hash of each combination alone would leave too few three-object scenes there.
_CIRCLE = sorted(TYPES, key=lambda kind: hashlib.sha256(" ".join(kind).encode()).digest())
_DISTANCES = {"test": (1, 2, 3, 4, 5), "dev": (7, 14, 21, 20, 13)}  # dev: 7 times 1..5 around a circle of 48


@dataclass(frozen=True)
class SceneObject:
    """One object; lengths in pixels of a PICTURE_SIZE picture, the angle in radians."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    stretch: float

    @property
    def type(self):
        """The (colour, shape) that the splits are about."""
        return self.colour, self.shape

    def outlines(self):
        """The closed polygons [N, 2] (x, y) that bound the object; a ring has two."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        turn = np.array([[cos, sin], [-sin, cos]])
        stretch = np.array([self.stretch, 1.0 / self.stretch])
        return [(points * self.radius * stretch) @ turn + (self.x, self.y) for points in _OUTLINES[self.shape]]

    @property
    def box(self):
        """The tight box (left, top, right, bottom) in pixels."""
        outer = self.outlines()[0]
        return tuple(round(float(value), 2) for value in (*outer.min(axis=0), *outer.max(axis=0)))

    @property
    def place(self):
        """Where in the picture it is: a (row, column) of "top", "" , "bottom" and "left", "", "right"."""
        row = "top" if self.y < 0.4 * PICTURE_SIZE else "bottom" if self.y > 0.6 * PICTURE_SIZE else ""
        column = "left" if self.x < 0.4 * PICTURE_SIZE else "right" if self.x > 0.6 * PICTURE_SIZE else ""
        return row, column


@dataclass(frozen=True)
class Scene:
    """Objects that do not overlap, the clear relations between them, and the kind of background.

    ``relations`` holds (i, name, j), "object i is NAME object j", for i < j; a pair on a diagonal has none. Together they
    connect all objects.
    """

    objects: Tuple[SceneObject, ...]
    relations: Tuple[Tuple[int, str, int], ...]
    background: str

    @property
    def types(self):
        """The set of (colour, shape) in the scene."""
        return frozenset(thing.type for thing in self.objects)

    def relation(self, i, j):
        """How object i stands to object j, or None when that is not clear."""
        for first, name, second in self.relations:
            if (first, second) == (i, j):
                return name
            if (first, second) == (j, i):
                return INVERSE[name]
        return None

    def to_json(self):
        """A dict of plain values for scene files."""
        objects = [{"colour": thing.colour, "shape": thing.shape, "size": thing.size, "box": list(thing.box),
                    "centre": [round(thing.x, 2), round(thing.y, 2)]} for thing in self.objects]
        return {"objects": objects, "relations": [list(relation) for relation in self.relations],
                "background": self.background}


def split_of(one, other):
    """The split in which two (colour, shape) may meet in a picture or text; None for a type with itself."""
    apart = abs(_CIRCLE.index(one) - _CIRCLE.index(other))
    apart = min(apart, len(TYPES) - apart)
    return next((split for split, near in _DISTANCES.items() if apart in near), "train" if apart else None)


def combinations(split, count):
    """All sets of ``count`` types (tuples, in a fixed order) of which every two may meet in ``split``."""
    sets = [(kind,) for kind in TYPES]
    for _ in range(count - 1):
        sets = [group + (kind,) for group in sets for kind in TYPES[TYPES.index(group[-1]) + 1:]
                if all(split_of(kind, member) == split for member in group)]
    return sets


def covering_pairs():
    """Combinations of the training split in which every type occurs exactly once: opposites on the circle."""
    half = len(TYPES) // 2
    return list(zip(_CIRCLE[:half], _CIRCLE[half:]))


def sample_scene(rng, split, types=None, three=0.4):
    """Draws a scene.

    Args:
        rng: numpy Generator; the scene is a function of its state.
        split: "train", "dev" or "test"; every two objects are a combination of it.
        types: the (colour, shape) of the objects, or None to draw two or three.
        three: how often three are drawn.
    """
    if types is None:
        types = _sample_types(rng, split, 2 if rng.random() < 1 - three else 3)
    while True:
        objects = _place([types[i] for i in rng.permutation(len(types))], rng)
        relations = _relations(objects)
        if len(relations) >= len(objects) - 1:
            return Scene(objects, relations, _BACKGROUNDS[rng.integers(len(_BACKGROUNDS))])


def sample_single(rng, kind):
    """Draws a scene of one object of the (colour, shape) ``kind``; no corpus has such scenes."""
    return Scene(_place([kind], rng), (), _BACKGROUNDS[rng.integers(len(_BACKGROUNDS))])


def _sample_types(rng, split, count):
    chosen = []
    while len(chosen) < count:
        choices = [kind for kind in TYPES if all(split_of(kind, member) == split for member in chosen)]
        # two types may have no third partner: then start over
        chosen = chosen + [choices[rng.integers(len(choices))]] if choices else []
    return chosen


def _place(types, rng):
    """Puts objects of these types, of random sizes, at random places where their boxes keep a gap."""
    while True:
        things = []
        for colour, shape in types:
            size = "large" if rng.random() < 0.5 else "small"
            things.append(SceneObject(colour, shape, size, 0.0, 0.0, rng.uniform(*_RADII[size]), rng.uniform(-0.2, 0.2),
                                      rng.uniform(0.95, 1.05)))
        for _ in range(100):  # three large ones fit only just: these tries keep them from being rare
            placed = _try_places(things, rng)
            if placed:
                return placed


def _try_places(things, rng):
    placed, boxes = [], []
    for thing in things:
        box = np.array(thing.box).reshape(2, 2)
        for _ in range(10):
            centre = rng.uniform(_GAP - box[0], PICTURE_SIZE - _GAP - box[1])
            low, high = box[0] + centre, box[1] + centre
            if all((low > other_high + _GAP).any() or (high < other_low - _GAP).any() for other_low, other_high in boxes):
                break
        else:
            return None
        boxes.append((low, high))
        placed.append(replace(thing, x=float(centre[0]), y=float(centre[1])))
    return tuple(placed)


def _relations(objects):
    found = []
    for i, j in itertools.combinations(range(len(objects)), 2):
        across, down = objects[j].x - objects[i].x, objects[j].y - objects[i].y
        if abs(across) >= _CLEAR * abs(down):
            found.append((i, "left of" if across > 0 else "right of", j))
        elif abs(down) >= _CLEAR * abs(across):
            found.append((i, "above" if down > 0 else "below", j))
    return tuple(found)


def draw(scene, rng, specks=0):
    """Paints a scene over at most ``specks`` dots; returns uint8 [PICTURE_SIZE, PICTURE_SIZE, 3] RGB."""
    picture = np.ascontiguousarray(_background(scene.background, rng))
    for _ in range(int(rng.integers(specks + 1)) if specks else 0):
        colour = list(COLOURS.values())[rng.integers(len(COLOURS))]
        cv2.circle(picture, tuple(int(place) for place in rng.integers(PICTURE_SIZE, size=2)), int(rng.integers(1, 4)), colour, cv2.FILLED, cv2.LINE_AA)
    for thing in scene.objects:
        tint = np.array(COLOURS[thing.colour]) * rng.uniform(0.93, 1.05) + rng.uniform(-7, 7, 3)
        colour = np.clip(tint, 0, 255).round().tolist()
        # several contours in one call fill by the even-odd rule, which gives the ring its hole
        outlines = [((points - 0.5) * 16).round().astype(np.int32) for points in thing.outlines()]
        cv2.fillPoly(picture, outlines, colour, lineType=cv2.LINE_AA, shift=4)
    return picture


def _background(kind, rng):
    """A texture in two similar muted colours of middling brightness, which no object's colour comes near."""
    grey = rng.uniform(105, 150)
    one = grey + rng.uniform(-12, 12, 3)
    two = one + rng.uniform(14, 30) * rng.choice([-1, 1]) + rng.uniform(-6, 6, 3)
    side = np.arange(PICTURE_SIZE) / PICTURE_SIZE
    angle = rng.uniform(0, 2 * math.pi)
    along = np.add.outer(side * math.sin(angle), side * math.cos(angle))
    if kind == "stripes":
        blend = np.clip(0.5 + 2 * np.sin(along * rng.uniform(30, 60)), 0, 1)
    elif kind == "gradient":
        blend = (along - along.min()) / (along.max() - along.min())
    else:
        coarse = rng.random((8, 8), dtype=np.float32)
        blend = np.clip(cv2.resize(coarse, (PICTURE_SIZE, PICTURE_SIZE), interpolation=cv2.INTER_CUBIC), 0, 1)
    grain = rng.standard_normal((PICTURE_SIZE, PICTURE_SIZE, 1), dtype=np.float32) * 4
    return np.clip(one + blend[..., None] * (two - one) + grain, 0, 255).astype(np.uint8)


def _polygon(corners, start=-math.pi / 2):
    angles = start + np.arange(corners) * 2 * math.pi / corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _make_outlines():
    """Outlines around the origin, scaled so that shapes of one radius look equally large."""
    star = _polygon(10)
    star[1::2] *= 0.45
    arm, width = 1.1, 0.38
    cross = np.array([(width, -arm), (width, -width), (arm, -width), (arm, width), (width, width), (width, arm),
                      (-width, arm), (-width, width), (-arm, width), (-arm, -width), (-width, -width), (-width, -arm)])
    return {"circle": [_polygon(48)], "square": [_polygon(4, -math.pi / 4) * 1.27], "triangle": [_polygon(3) * 1.27],
            "star": [star * 1.27], "cross": [cross], "ring": [_polygon(48) * 1.06, _polygon(48) * 0.6]}


_OUTLINES = _make_outlines()


@dataclass(frozen=True)
class World:
    """How much there is to tell apart.

    Attributes:
        three: share of the scenes with three objects, the others have two.
        arrangements: how many held-out pictures show the same objects, differing in sizes, places and relations alone.
        specks: at most so many dots of the objects' colours in a picture, which no caption mentions.
        even_words: synonyms are as frequent as the usual words.
    """

    three: float = 0.4
    arrangements: int = 1
    specks: int = 0
    even_words: bool = False


WORLDS = {"plain": World(), "hard": World(three=1.0, arrangements=2, specks=12, even_words=True)}

# {A}: a large red circle; {the_A}: the circle, or the red circle where another circle is near; {at_A}: at the top left;
# {AB}: how A stands to B (left of); {A_it}: the same without naming B (to its left). C stands in relation to {the_X},
# which is A or B.
_PAIR_CAPTIONS = (
    "{A} is {AB} {B}.", "there is {A} {AB} {B}.", "{AB} {B} there is {A}.", "{B} with {A} {A_it}.", "{A} sits {AB} {B}.",
    "{A} and {B}, {the_A} {AB} {the_B}.", "a picture of {A} and {B}.", "{A} {at_A} and {B} {at_B}.",
    "the picture shows {B} and, {A_it}, {A}.", "we see {A} {AB} {B}.",
)
_TRIPLE_CAPTIONS = (
    "{A} is {AB} {B} and {C} is {CX} {the_X}.", "there is {A} {AB} {B}, with {C} {CX} {the_X}.",
    "{AB} {B} there is {A}, and {CX} {the_X} {C}.", "a picture of {A}, {B} and {C}.", "{A} {at_A}, {B} {at_B} and {C} {at_C}.",
    "{A}, {B} and {C}, {the_A} {AB} {the_B}.", "three shapes: {C} {CX} {the_X}, {A} and {B}, {the_A} {AB} {the_B}.",
    "we see {C}, and {A} {AB} {B}.", "{B} with {A} {A_it} and {C} {CX} {the_X}.",
)
_FACTS = (
    "{the_A} is {AB} {the_B}.", "{the_A} is {a_size}.", "{the_A} is {at_A}.", "{the_A} is {a_colour}.",
    "{the_B} has {the_A} {A_it}.", "if you look {AB} {the_B}, you find {the_A}.",
)
GENERAL_STATEMENTS = (
    "Circles and rings are round.", "A disc is a circle.", "A hoop is a ring.", "A box is a square.", "A plus sign is a cross.",
    "A ring has a hole in the middle.", "A square has four corners.", "A triangle has three sides.", "A star has five points.",
    "A cross has four arms.", "Red, green and blue are colours.", "Yellow, cyan and pink are bright colours.",
    "Black is dark and white is bright.", "Little things and tiny things are small.", "A big thing is large.",
    "What is left of a thing is not right of it.", "What is above a thing is not below it.", "Shapes do not overlap.",
    "Every shape has one colour.", "A picture has two or three shapes.",
)


def caption(scene, rng, n=5, even_words=False):
    """Returns ``n`` different sentences about a scene; each names colour and shape of every object, and is true.

    Four of five also name the sizes, and most the relations. At most as many as there are sentence patterns (9). With ``even_words``
    synonyms are as frequent as the usual words.
    """
    patterns = _PAIR_CAPTIONS if len(scene.objects) == 2 else _TRIPLE_CAPTIONS
    if n > len(patterns):
        raise ValueError(f"at most {len(patterns)} captions per scene, not {n}")
    chosen = rng.permutation(len(patterns))[:n]
    return [_sentence(patterns[i], _words(scene, rng, with_sizes=rng.random() < 0.8, even=even_words)) for i in chosen]


def paragraph(scene, rng, sentences, even_words=False):
    """Returns ``sentences`` sentences about one scene in a line: what there is, then true facts about it."""
    patterns = _PAIR_CAPTIONS if len(scene.objects) == 2 else _TRIPLE_CAPTIONS
    words = _words(scene, rng, with_sizes=rng.random() < 0.5, even=even_words)
    told = [_sentence(patterns[rng.integers(len(patterns))], words)]
    while len(told) < sentences:
        fact = _sentence(_FACTS[rng.integers(len(_FACTS))], _words(scene, rng, names=words["names"], even=even_words))
        if fact not in told:
            told.append(fact)
    return " ".join(told)


def _words(scene, rng, with_sizes=True, names=None, even=False):
    """The values of a sentence's slots for a random choice of who is A, B and C."""
    half, most = (None, None) if even else (0.5, 0.75)
    count = len(scene.objects)
    orders = [order for order in itertools.permutations(range(count)) if _tellable(scene, order)]
    order = orders[rng.integers(len(orders))]
    names = names or [_pick(rng, SHAPES[thing.shape], most) for thing in scene.objects]
    words = {"names": names}
    for slot, i in zip("ABC", order):
        thing = scene.objects[i]
        size = _pick(rng, SIZES[thing.size], half)
        alone = sum(other.shape == thing.shape for other in scene.objects) == 1
        words[slot] = "a " + (size + " " if with_sizes else "") + f"{thing.colour} {names[i]}"
        words["the_" + slot] = "the " + ("" if alone else thing.colour + " ") + names[i]
        words["at_" + slot] = say_place(thing.place)
    thing = scene.objects[order[0]]
    words.update(a_size=_pick(rng, SIZES[thing.size], half), a_colour=thing.colour)
    relation = scene.relation(order[0], order[1])
    words["AB"] = _pick(rng, RELATIONS[relation], half)
    words["A_it"] = f"to its {relation.split()[0]}" if relation.endswith(" of") else f"{relation} it"
    if count == 3:
        anchor = next(k for k in (1, 0) if scene.relation(order[2], order[k]))
        words["CX"] = _pick(rng, RELATIONS[scene.relation(order[2], order[anchor])], half)
        words["the_X"] = words["the_" + "AB"[anchor]]
    return words


def _tellable(scene, order):
    """Whether A has a clear relation to B, and C to one of them."""
    return scene.relation(order[0], order[1]) and (
        len(order) == 2 or scene.relation(order[2], order[0]) or scene.relation(order[2], order[1]))


def _pick(rng, words, usual):
    """The first word with probability ``usual``, else one of the others; any of them when ``usual`` is ``None``."""
    if usual is None:
        return words[rng.integers(len(words))]
    return words[0] if len(words) == 1 or rng.random() < usual else words[1 + rng.integers(len(words) - 1)]


def say_place(place):
    """The words of an object's (row, column): "at the top left", "on the right", "in the middle"."""
    row, column = place
    if not row:
        return f"on the {column}" if column else "in the middle"
    return f"at the {row} {column}".rstrip()


def _sentence(pattern, words):
    sentence = pattern.format(**words)
    return sentence[0].upper() + sentence[1:]
