"""The generated GLUE-like data: repeatable, in GLUE's formats, with labels that follow from the sentences."""
import filecmp
import re

import pytest

from unimo2_paddle.data.demo_tasks.glue import ENTAILMENT, NEUTRAL, similarity, write
from unimo2_paddle.data.demo_tasks.scenes import read_scenes
from unimo2_paddle.data.formats.glue import GLUE, check_submission, glue_file, read_glue, read_submission
from unimo2_paddle.data.shapes import COLOURS, SHAPES, SIZES
from unimo2_paddle.errors import DataError

PLAIN = {word: first for words in (SHAPES, SIZES) for first, others in words.items() for word in others}


@pytest.fixture(scope="module")
def data(demo_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("glue")
    summary = write(str(out), str(demo_data), 1)
    assert "SST-2" in summary and "MNLI" in summary
    return out


def parts():
    for dataset, spec in GLUE.items():
        for split, files in spec.parts.items():
            for part in files:
                yield dataset, split, part


def test_the_same_seed_writes_the_same_bytes(data, demo_data, tmp_path):
    write(str(tmp_path / "again"), str(demo_data), 1)
    names = [str(path.relative_to(data)) for path in data.rglob("*.tsv")]
    assert len(names) == 3 * 3 + 6 + 6
    assert filecmp.cmpfiles(data, tmp_path / "again", names, shallow=False) == (names, [], [])
    write(str(tmp_path / "other"), str(demo_data), 2)
    assert filecmp.cmpfiles(data, tmp_path / "other", names, shallow=False)[1]


@pytest.mark.parametrize("dataset, split, part", list(parts()))
def test_every_file_is_read_as_glue(data, dataset, split, part):
    records = read_glue(glue_file(str(data / GLUE[dataset].title), dataset, split, part), dataset)
    assert len(records) >= 10
    assert all((record.label is None) == (split == "test") for record in records)
    if split == "test":
        assert check_submission(str(data / "answers" / GLUE[dataset].submissions[part][0]), dataset, part, size=0) == len(records)
        assert [record.index for record in records] == list(range(len(records)))


def things(text):
    """(size or "", colour, shape) of every thing in a text, by its usual words."""
    for word, first in sorted(PLAIN.items(), key=lambda item: -len(item[0])):
        text = re.sub(rf"\b{word}\b", first, text.lower()) if word != first else text.lower()
    return re.findall(rf"(?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", text)


def test_statements_about_what_there_is_have_the_right_label(data):
    records = read_glue(str(data / "MNLI" / "train.tsv"), "mnli")
    checked = 0
    for record in records:
        if record.text_b.startswith("There is"):
            [(_, colour, shape)] = things(record.text_b)
            told = (colour, shape) in {kind[1:] for kind in things(record.text_a)}
            assert record.label == (ENTAILMENT if told else NEUTRAL), record
            checked += 1
    assert checked >= 5
    assert {record.label for record in records} == {0, 1, 2}


def test_moods_follow_from_the_colours(data):
    for record in read_glue(str(data / "SST-2" / "train.tsv"), "sst2"):
        weights = [(2 if size == "large" else 1) * (1 if colour in ("yellow", "cyan", "pink", "white") else -1) for size, colour, _ in things(record.text_a)]
        assert record.label == int(sum(weights) > 0), record


def test_equal_things_in_equal_relation_score_five_and_others_less(data):
    records = read_glue(str(data / "STS-B" / "train.tsv"), "stsb")
    assert {record.label == 5.0 for record in records} == {True, False}
    for record in records:
        if record.label == 5.0:
            assert sorted(things(record.text_a)) == sorted(things(record.text_b))


@pytest.mark.parametrize("second, wanted", [
    (((("large", "red", "ring"), ("small", "blue", "star")), "above"), 1.0),
    (((("small", "blue", "star"), ("large", "red", "ring")), "below"), 1.0),
    (((("large", "red", "ring"), ("small", "blue", "star")), "below"), 5 / 6),
    (((("small", "red", "ring"), ("small", "blue", "star")), "above"), 5.5 / 6),
    (((("small", "green", "box"), ("large", "white", "disc")), "left of"), 1 / 6),
    (((("large", "red", "ring"), ("small", "blue", "star"), ("small", "white", "cross")), "above"), 6 / 8.5),
])
def test_similarity_is_the_share_of_what_agrees(second, wanted):
    first = ((("large", "red", "ring"), ("small", "blue", "star")), "above")
    assert similarity(first, second) == pytest.approx(wanted) == similarity(second, first)


def test_scrambled_sentences_differ_from_what_captions_say(data):
    records = read_glue(str(data / "CoLA" / "train.tsv"), "cola")
    assert 0.2 < sum(record.label == 0 for record in records) / len(records) < 0.6
    for record in records:
        assert record.text_a.endswith(".") and record.text_a[0].isupper()


def test_answers_are_no_constant(data):
    for dataset, spec in GLUE.items():
        for name, _ in spec.submissions.values():
            assert len(set(read_submission(str(data / "answers" / name), dataset).values())) > 1


def test_scenes_come_back_with_their_relations(demo_data):
    for row, scene in read_scenes(str(demo_data), "dev"):
        assert [thing.colour for thing in scene.objects] == [thing["colour"] for thing in row["objects"]]
        assert len(scene.relations) >= len(scene.objects) - 1


def test_without_demo_data_the_remedy_is_told(tmp_path):
    with pytest.raises(DataError, match="unimo2 demo-data"):
        write(str(tmp_path / "out"), str(tmp_path), 1)
