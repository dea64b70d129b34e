"""Tiny corpora of real-looking captions and their indices."""
import pytest

from unimo2_paddle.augment.command import augment
from unimo2_paddle.augment.lexicon import Lexicon
from unimo2_paddle.augment.parsing import SceneParser
from unimo2_paddle.cli import build_parser
from unimo2_paddle.data.shards import ShardWriter

NOUNS = ("dog", "cat", "horse", "cow", "bird", "car", "truck", "bench", "tree", "boat")
COLOURS = ("red", "green", "blue", "black", "white", "brown")
SIZES = ("large", "small", "big")
RELATIONS = ("above", "below", "to the left of", "to the right of", "behind", "in front of", "next to")


def photo_captions(number):
    """Two captions of picture ``number``: different pictures, a small vocabulary."""
    one, other = NOUNS[number % 10], NOUNS[(number * 7 + 3) % 10]
    if one == other:
        other = NOUNS[(number + 1) % 10]
    colour, tint, size = COLOURS[number % 6], COLOURS[(number // 2 + 3) % 6], SIZES[number % 3]
    return [f"A {size} {colour} {one} is {RELATIONS[number % 7]} a {tint} {other}.", f"There is a {colour} {one} and a {tint} {other} near them."]


def _write_pairs(directory, count=60, per_shard=20, captions=photo_captions):
    """Text shards of ``count`` records; returns the pattern that names them."""
    with ShardWriter(directory, "pairs", per_shard) as writer:
        for number in range(count):
            writer.write(f"{number:05d}", texts=captions(number))
    return str(directory / "*.tar")


def _run(*arguments):
    """Run a step of ``unimo2 augment``, errors coming through."""
    augment(build_parser().parse_args(["augment", *map(str, arguments)]))


@pytest.fixture(scope="session")
def write_pairs():
    return _write_pairs


@pytest.fixture(scope="session")
def run():
    return _run


@pytest.fixture(scope="session")
def parser():
    return SceneParser(Lexicon.load())


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """(pattern of the shards, directory of the text index over them); not to be changed."""
    folder = tmp_path_factory.mktemp("augment")
    pattern = _write_pairs(folder / "pairs")
    _run("index", "--source", pattern, "--out", folder / "index")
    return pattern, folder / "index"
