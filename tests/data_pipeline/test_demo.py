"""The demo corpora: true captions, clean splits, the same bytes every time, nothing half-written."""
import hashlib
import itertools
import json
import os
import re

import cv2
import numpy as np
import pytest

from unimo2_paddle.data import demo, shapes
from unimo2_paddle.data.demo import write_demo_data
from unimo2_paddle.data.formats.karpathy import read_karpathy
from unimo2_paddle.data.shards import ShardSet
from unimo2_paddle.data.tokenizer import Tokenizer
from unimo2_paddle.errors import UserInputError

SHAPE_OF = {word: shape for shape, words in shapes.SHAPES.items() for word in words}
SIZE_OF = {word: size for size, words in shapes.SIZES.items() for word in words}
THING = re.compile("(?:(%s) )?(?:(%s) )?(%s)\\b" % ("|".join(SIZE_OF), "|".join(shapes.COLOURS), "|".join(SHAPE_OF)), re.I)
RELATION = re.compile(r"(?P<side>left|right) of|(?P<way>above|below|over|under)(?! it\b)"
                      r"|to its (?P<its>left|right)|(?P<it>above|below) it", re.I)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("demo") / "data")
    return out, write_demo_data(out, size=60, seed=3)


def things_named(text):
    """The (size, colour, shape) that a text names; None where it does not say."""
    return [(SIZE_OF.get((size or "").lower()), colour.lower() or None, SHAPE_OF[shape.lower()])
            for size, colour, shape in THING.findall(text)]


def rows(out, split):
    with open(os.path.join(out, "scenes", split + ".jsonl")) as file:
        return [json.loads(line) for line in file]


def combinations_of(types):
    return {frozenset(pair) for pair in itertools.combinations(sorted(set(types)), 2)}


def tree(out):
    files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(out) for name in names)
    return {os.path.relpath(path, out): hashlib.sha256(open(path, "rb").read()).hexdigest() for path in files}


def test_the_same_size_and_seed_give_the_same_bytes(world, tmp_path):
    out, summary = world
    write_demo_data(str(tmp_path / "again"), size=60, seed=3)
    assert tree(tmp_path / "again") == tree(out)
    write_demo_data(str(tmp_path / "other"), size=60, seed=4)
    other = tree(tmp_path / "other")
    assert other.keys() == tree(out).keys() and other["pairs/pairs-00000.tar"] != tree(out)["pairs/pairs-00000.tar"]
    assert "60 pairs" in summary and "20 val" in summary and "20 test" in summary


def test_the_splits_divide_all_combinations_about_60_20_20():
    pairs = list(itertools.combinations(shapes.TYPES, 2))
    found = [shapes.split_of(*pair) for pair in pairs]
    assert len(pairs) == 1128 and all(shapes.split_of(two, one) == split for (one, two), split in zip(pairs, found))
    shares = {split: found.count(split) / 1128 for split in shapes.SPLITS}
    assert sum(shares.values()) == pytest.approx(1)
    for split, share in {"train": 0.6, "dev": 0.2, "test": 0.2}.items():
        assert shares[split] == pytest.approx(share, abs=0.03)
        assert set(shapes.combinations(split, 2)) == {pair for pair, where in zip(pairs, found) if where == split}
        assert {kind for pair in shapes.combinations(split, 2) for kind in pair} == set(shapes.TYPES)


def test_no_dev_or_test_combination_is_painted_or_written_in_training(world):
    out, _ = world
    held_out = {frozenset(pair) for split in ("dev", "test") for pair in shapes.combinations(split, 2)}
    for row in rows(out, "train"):
        assert not combinations_of((thing["colour"], thing["shape"]) for thing in row["objects"]) & held_out
    lines = [line for kind in ("pairs", "texts") for record in read_all(out, kind) for line in record.texts]
    assert len(lines) == 60 * 5 + 60
    for line in lines:
        named = {(colour, shape) for _, colour, shape in things_named(line) if colour}
        assert not combinations_of(named) & held_out, line


def test_every_pair_in_a_held_out_picture_is_of_its_split_and_no_two_pictures_show_the_same(world):
    out, _ = world
    for split in ("dev", "test"):
        sets = [frozenset((thing["colour"], thing["shape"]) for thing in row["objects"]) for row in rows(out, split)]
        assert len(sets) == 20 == len(set(sets))
        assert {shapes.split_of(*pair) for types in sets for pair in combinations_of(types)} == {split}
    for size, dev, test in ((400, 300, 400), (4000, 300, 400), (399, 99, 133), (30, 20, 20)):
        types = demo._held_out_types(size, seed=5)
        for split, count in (("dev", dev), ("test", test)):
            assert len(types[split]) == count == len({frozenset(group) for group in types[split]})


def test_every_coloured_shape_occurs_in_the_smallest_training_set():
    shown = [kind for pair in shapes.covering_pairs() for kind in pair]
    assert len(shapes.covering_pairs()) == demo.SMALLEST_SIZE and sorted(shown) == sorted(shapes.TYPES)
    assert {shapes.split_of(*pair) for pair in shapes.covering_pairs()} == {"train"}


def read_all(out, kind):
    records = ShardSet(os.path.join(out, kind, "*.tar"), kind)
    assert records.bad_records == 0
    return [records.read(i) for i in range(len(records))]


def test_all_corpora_are_read_by_their_readers(world):
    out, _ = world
    train = {row["key"]: row for row in rows(out, "train")}
    pairs, images, texts = (read_all(out, kind) for kind in ("pairs", "images", "texts"))
    assert (len(pairs), len(images), len(texts)) == (60, 30, 60)
    for record in pairs + images:
        assert os.path.join(out, train[record.key]["file"]) == record.shard
        assert cv2.imdecode(np.frombuffer(record.image, np.uint8), cv2.IMREAD_COLOR).shape == (112, 112, 3)
    assert all(len(record.texts) == 1 and 2 <= record.texts[0].count(".") <= 4 for record in texts)
    retrieval = os.path.join(out, "retrieval")
    for split, name, count in (("train", "train", 15), ("dev", "val", 20), ("test", "test", 20)):
        listed = read_karpathy(os.path.join(retrieval, "dataset_shapes.json"), os.path.join(retrieval, "images"), name)
        assert len(listed) == count and all(len(image.captions) == 5 for image in listed)
        if split != "train":
            assert [image.image_id for image in listed] == [row["key"] for row in rows(out, split)]
    by_key = {record.key: record for record in pairs}
    for image in read_karpathy(os.path.join(retrieval, "dataset_shapes.json"), os.path.join(retrieval, "images"), "train"):
        assert by_key[image.image_id].texts == image.captions and by_key[image.image_id].image == open(image.path, "rb").read()
    tokenizer = Tokenizer.from_directory(os.path.join(out, "vocab"))
    assert tokenizer.vocab_size == 512
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for record in pairs for text in record.texts)


def some_scenes(count, splits=shapes.SPLITS):
    rng = np.random.default_rng(11)
    return [shapes.sample_scene(rng, splits[i % len(splits)]) for i in range(count)]


def test_objects_keep_apart_and_inside_the_picture():
    for scene in some_scenes(200):
        boxes = [thing.box for thing in scene.objects]
        assert len(boxes) in (2, 3) and len(scene.types) == len(boxes)
        for left, top, right, bottom in boxes:
            assert 2 <= left < right <= 110 and 2 <= top < bottom <= 110
        for one, other in itertools.combinations(boxes, 2):
            assert one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]


def test_what_is_painted_is_what_the_scene_says():
    rng = np.random.default_rng(5)
    names, values = list(shapes.COLOURS), np.array(list(shapes.COLOURS.values()), float)
    for scene in some_scenes(60):
        picture = shapes.draw(scene, rng)
        assert picture.dtype == np.uint8 and picture.shape == (112, 112, 3)
        inside_any = np.zeros((112, 112), np.uint8)
        for thing in scene.objects:
            mask = np.zeros((112, 112), np.uint8)
            cv2.fillPoly(mask, [outline.round().astype(np.int32) for outline in thing.outlines()], 1)
            inside_any |= cv2.dilate(mask, np.ones((5, 5)))
            seen = np.median(picture[cv2.erode(mask, np.ones((3, 3))) == 1], axis=0)
            assert names[np.abs(values - seen).sum(axis=1).argmin()] == thing.colour
            left, top, right, bottom = thing.box
            ys, xs = np.nonzero(mask)
            assert np.abs(np.array([xs.min(), ys.min(), xs.max(), ys.max()]) - (left, top, right, bottom)).max() <= 1.5
        ground = picture[inside_any == 0].astype(float)
        assert np.abs(ground[:, None] - values).sum(axis=2).min() > 60  # no piece of background looks like an object


def find(scene, named):
    """The one object that a text means by (size, colour, shape)."""
    size, colour, shape = named
    found = [thing for thing in scene.objects
             if thing.shape == shape and colour in (None, thing.colour) and size in (None, thing.size)]
    assert len(found) == 1, named
    return found[0]


def stated_relations(scene, sentence):
    """Yields (subject, relation, reference), read from the sentence by word order alone."""
    mentions = [(match.start(), find(scene, named)) for match, named in zip(THING.finditer(sentence), things_named(sentence))]
    for match in RELATION.finditer(sentence):
        word = next(value for value in match.groupdict().values() if value).lower()
        before = [thing for start, thing in mentions if start < match.start()]
        after = [thing for start, thing in mentions if start > match.start()]
        introduced = re.search(r"(^|, and |look |and, )(to the )?$", sentence[:match.start()], re.I)
        if match.group("its") or match.group("it"):
            yield (after[0], word, before[-1]) if introduced else (before[-1], word, mentions[0][1])
        else:
            yield (after[1], word, after[0]) if introduced else (before[-1], word, after[0])


def holds(subject, word, reference):
    across, down = subject.x - reference.x, subject.y - reference.y
    along = {"left": -across, "right": across, "above": -down, "over": -down, "below": down, "under": down}[word]
    return along >= 1.4 * (abs(down) if word in ("left", "right") else abs(across))


def places_hold(scene, sentence):
    """Whether "at the top left" and the like follow a thing that is there."""
    for match in re.finditer(r"(?:at the|on the) (top|bottom)? ?(left|right)?\b", sentence):
        thing = [find(scene, one) for one in things_named(sentence[:match.start()])][-1]
        told = {"top": thing.y < 45, "bottom": thing.y > 67, "left": thing.x < 45, "right": thing.x > 67, None: True}
        if not all(told[word] for word in match.groups()):
            return False
    return True


def test_captions_name_everything_differ_and_are_true():
    rng, captions, sized, related = np.random.default_rng(2), 0, 0, 0
    for scene in some_scenes(400):
        told = shapes.caption(scene, rng, 5)
        assert len(set(told)) == 5
        for sentence in told:
            named = things_named(sentence)
            assert {find(scene, one) for one in named} == set(scene.objects)
            assert {(colour, shape) for _, colour, shape in named if colour} == scene.types
            relations = list(stated_relations(scene, sentence))
            assert all(holds(*relation) for relation in relations), (sentence, scene)
            assert places_hold(scene, sentence), (sentence, scene)
            captions, sized, related = captions + 1, sized + any(size for size, _, _ in named), related + bool(relations)
            assert sentence[0].isupper() and sentence.endswith(".") and "{" not in sentence
    assert sized / captions > 0.7 and related / captions > 0.7


def test_paragraphs_tell_true_facts_about_one_scene():
    rng = np.random.default_rng(3)
    for scene in some_scenes(300):
        text = shapes.paragraph(scene, rng, 4)
        sentences = re.findall(r"[^.]+\.", text)
        assert len(sentences) == 4
        for sentence in sentences:
            assert all(holds(*relation) for relation in stated_relations(scene, sentence.strip())), text
            assert places_hold(scene, sentence), text
            fact = re.fullmatch(r" ?(The .+) is (\w+)\.", sentence)
            if fact:
                thing = find(scene, things_named(fact.group(1))[0])
                assert fact.group(2) in (thing.colour, *shapes.SIZES[thing.size]), text


def test_scenes_are_reproducible_from_their_generator():
    one, two = (shapes.sample_scene(np.random.default_rng(9), "test") for _ in range(2))
    assert one == two and json.loads(json.dumps(one.to_json()))["objects"][0]["box"] == list(one.objects[0].box)
    assert (shapes.draw(one, np.random.default_rng(1)) == shapes.draw(two, np.random.default_rng(1))).all()


def test_the_same_data_are_kept_and_anything_else_is_refused(world, tmp_path):
    out, _ = world
    before = os.stat(os.path.join(out, "demo.json")).st_mtime_ns
    assert "nothing to do" in write_demo_data(out, size=60, seed=3)
    assert os.stat(os.path.join(out, "demo.json")).st_mtime_ns == before
    with pytest.raises(UserInputError, match="other demo data .size 60, seed 3.*wanted: size 60, seed 5"):
        write_demo_data(out, size=60, seed=5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserInputError, match="not a directory of demo data; remove it or choose another"):
        write_demo_data(tmp_path / "mine", size=60)
    with pytest.raises(UserInputError, match="not a directory of demo data"):
        write_demo_data(tmp_path / "mine" / "thesis.txt", size=60)
    (tmp_path / "new.tmp").mkdir()
    with pytest.raises(UserInputError, match="new.tmp: is in the way"):
        write_demo_data(tmp_path / "new", size=60)
    assert sorted(os.listdir(tmp_path)) == ["mine", "new.tmp"]


@pytest.mark.parametrize("arguments,message", [({"size": 23}, "at least 24"), ({"size": 60, "seed": -1}, "0 or more")])
def test_impossible_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(UserInputError, match=message):
        write_demo_data(tmp_path / "out", **arguments)
    assert os.listdir(tmp_path) == []


def test_an_interrupted_run_leaves_nothing_and_a_killed_one_is_replaced(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "train_vocabulary", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_demo_data(tmp_path / "out", size=24)
    assert os.listdir(tmp_path) == []
    demo._start(str(tmp_path / "out.tmp"))  # what a killed run leaves
    (tmp_path / "out").mkdir()  # an empty directory is as good as none
    write_demo_data(tmp_path / "out", size=24)
    assert os.listdir(tmp_path) == ["out"] and "UNFINISHED" not in os.listdir(tmp_path / "out")
