"""The demo's text generation data: the authors' token files, targets that follow from their sources."""
import csv
import json
import re

import pytest

from unimo2_paddle.data.demo_tasks.seq2seq import FILES, SEPARATOR, write
from unimo2_paddle.data.shapes import COLOURS, SHAPES, split_of
from unimo2_paddle.data.tokenizer import Tokenizer

COLUMNS = {"cnndm": ["src", "tgt"], "gigaword": ["src", "tgt"], "squad_qg": ["src", "tgt"], "coqa": ["src", "knowledge", "tgt"]}
NAMES = {name: shape for shape, names in SHAPES.items() for name in names}
THING = re.compile(f"({'|'.join(COLOURS)}) ({'|'.join(sorted(NAMES, key=len, reverse=True))})")


@pytest.fixture(scope="module")
def written(demo_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("seq2seq") / "seq2seq"
    write(str(out), str(demo_data), 1)
    return out


def rows_of(written, task, place):
    with open(written / task / f"{FILES[task][place]}.json", encoding="utf-8") as file:
        return json.load(file)


def things(text):
    return {(colour, NAMES[name]) for colour, name in THING.findall(text)}


@pytest.mark.parametrize("task", sorted(FILES))
def test_cells_are_vocabulary_keys_that_spell_the_text(demo_data, written, task):
    tokenizer = Tokenizer.from_directory(demo_data / "vocab")
    keys = {key: number for number, key in enumerate((demo_data / "vocab" / "vocab.txt").read_text().split("\n"))}
    for place in range(3):
        with open(written / task / f"{FILES[task][place]}.tsv", encoding="utf-8", newline="") as file:
            table = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        rows = rows_of(written, task, place)
        assert len(table) == len(rows) and list(table[0]) == COLUMNS[task]
        for cells, row in zip(table, rows):
            for name, text in row.items():
                parts = [tokenizer.decode([keys[key] for key in part.split(" ")]) for part in cells[name].split(SEPARATOR)]
                assert SEPARATOR.join(parts) == text and text


@pytest.mark.parametrize("task", ["cnndm", "gigaword"])
def test_dev_and_test_tell_of_combinations_that_training_never_has(written, task):
    for place, split in enumerate(("train", "dev", "test")):
        for row in rows_of(written, task, place):
            told = sorted(things(row["tgt"]))
            assert len(told) in (2, 3) and {split_of(one, other) for one in told for other in told if one < other} == {split}


def test_a_summary_keeps_the_notable_relation_and_is_no_sentence_of_its_passage(written):
    for row in rows_of(written, "cnndm", 0):
        notable = next(sentence for sentence in row["src"].split(". ") if sentence.startswith("Most notably, "))
        there, relation = row["tgt"].split(". ")
        assert things(notable) == things(relation) <= things(there) and re.search("left of|above", relation)
        assert row["src"].split(". ")[0] not in row["tgt"]


def test_questions_and_answers_follow_from_the_passage(written):
    for row in rows_of(written, "squad_qg", 0):
        answer, passage = row["src"].split(SEPARATOR)
        assert row["tgt"].endswith("?") and things(answer) <= things(passage) and things(row["tgt"]) <= things(passage)
    turns = set()
    for row in rows_of(written, "coqa", 0):
        parts = row["src"].split(SEPARATOR)
        assert len(parts) % 2 == 1 and all(part.endswith("?") for part in parts[::2]) and not row["tgt"].endswith("?")
        assert things(row["tgt"]) <= things(row["knowledge"])
        turns.add(len(parts))
    assert turns == {1, 3, 5, 7}


def test_the_same_arguments_write_the_same_bytes(demo_data, written, tmp_path):
    write(str(tmp_path / "again"), str(demo_data), 1)
    assert {p.name: p.read_bytes() for p in written.rglob("*.*")} == {p.name: p.read_bytes() for p in (tmp_path / "again").rglob("*.*")}
