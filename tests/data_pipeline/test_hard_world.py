"""The hard world of the demo corpora: what makes it hard, and what it shares with the plain one."""
import json
import re
from collections import Counter

import numpy as np
import pytest

from unimo2_paddle.data import shapes
from unimo2_paddle.data.demo import write_demo_data
from unimo2_paddle.data.shards import ShardSet
from unimo2_paddle.errors import UserInputError


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    out = tmp_path_factory.mktemp("hard")
    for size in (24, 60):
        write_demo_data(str(out / str(size)), size=size, seed=2, world="hard")
    return out


def rows(directory, split):
    return [json.loads(line) for line in (directory / "scenes" / f"{split}.jsonl").read_text().splitlines()]


def kinds(row):
    return sorted((thing["colour"], thing["shape"]) for thing in row["objects"])


def test_every_scene_has_three_objects_of_combinations_of_its_split(hard):
    for split in shapes.SPLITS:
        for row in rows(hard / "60", split):
            one, two, three = kinds(row)
            assert {shapes.split_of(one, two), shapes.split_of(one, three), shapes.split_of(two, three)} == {split}


def test_held_out_pictures_come_in_twos_of_the_same_objects_in_other_arrangements(hard):
    for split in ("dev", "test"):
        held_out = rows(hard / "60", split)
        assert len(held_out) == 20
        for one, other in zip(held_out[::2], held_out[1::2]):
            assert kinds(one) == kinds(other) and one["objects"] != other["objects"]
        assert len({str(kinds(row)) for row in held_out}) == 10


def test_a_smaller_world_holds_the_first_pairs_of_a_larger_one(hard):
    small, large = (ShardSet(str(hard / size / "pairs" / "*.tar"), "pairs") for size in ("24", "60"))
    for number in range(24):
        one, other = small.read(number), large.read(number)
        assert one.image == other.image and one.texts == other.texts


def test_specks_are_drawn_beneath_the_objects():
    scene = shapes.sample_scene(np.random.default_rng(1), "train", three=1.0)
    plain, strewn = (shapes.draw(scene, np.random.default_rng(4), specks) for specks in (0, 40))
    assert (plain != strewn).any()
    inside = tuple(int(value) for value in (scene.objects[0].y, scene.objects[0].x))
    wanted = np.array(shapes.COLOURS[scene.objects[0].colour])
    assert scene.objects[0].shape == "ring" or np.abs(strewn[inside].astype(int) - wanted).max() < 30


def test_synonyms_are_as_frequent_as_the_usual_words():
    rng, found = np.random.default_rng(5), {True: Counter(), False: Counter()}
    for _ in range(150):
        scene = shapes.sample_scene(rng, "train", three=1.0)
        for even, counter in found.items():
            counter.update(re.findall(r"\b(disc|circle)\b", " ".join(shapes.caption(scene, rng, 5, even))))
    share = {even: counter["circle"] / sum(counter.values()) for even, counter in found.items()}
    assert share[True] == pytest.approx(0.5, abs=0.1) and share[False] == pytest.approx(0.75, abs=0.1)


def test_worlds_are_not_mixed_and_data_from_before_there_were_two_are_plain(hard, tmp_path):
    with pytest.raises(UserInputError, match="size 24, seed 2, hard world.*wanted: size 24, seed 2, plain world"):
        write_demo_data(str(hard / "24"), size=24, seed=2)
    with pytest.raises(UserInputError, match="--world odd: is not one of plain, hard"):
        write_demo_data(str(tmp_path / "odd"), size=24, world="odd")
    write_demo_data(str(tmp_path / "old"), size=24)
    about = json.loads((tmp_path / "old" / "demo.json").read_text())
    assert about.pop("world") == "plain"
    (tmp_path / "old" / "demo.json").write_text(json.dumps(about))
    assert "nothing to do" in write_demo_data(str(tmp_path / "old"), size=24)
