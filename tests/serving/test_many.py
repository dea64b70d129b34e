"""Many inputs: folders, CSV and JSON lines in, CSV and JSON lines out; wrong inputs are named or skipped, and nothing is left half-written."""
import csv
import json

import pytest

from unimo2_paddle import Predictor
from unimo2_paddle.errors import DataError
from unimo2_paddle.serving.many import file_requests

TEXT = "a small red ring"


@pytest.fixture
def score(grounded):
    predictor = Predictor(grounded.directory)
    return lambda image, text=TEXT: predictor(image=image, text=text).score


def test_every_picture_of_a_folder_gets_its_result_and_the_unreadable_one_its_reason(unimo2, grounded, folder, tmp_path, score):
    (folder / "broken.jpg").write_bytes(b"no picture")
    out = tmp_path / "out.csv"
    told = unimo2("predict", "-m", grounded.directory, "--images", folder, "--text", TEXT, "--output", out, "--batch-size", 4)
    assert told.status == 0 and "1 of 7 inputs could not be used" in told.err and "7 results" in told.out
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"].rsplit("/", 1)[1] for row in rows] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "broken.jpg", "5.jpg"]
    assert "not a picture" in rows[5]["error"] and rows[5]["score"] == ""
    for row in (rows[0], rows[6]):
        assert float(row["score"]) == pytest.approx(score(row["image"]), abs=1e-4)


def test_a_table_of_inputs_gives_json_lines_with_its_ids(unimo2, grounded, folder, tmp_path, score):
    table = tmp_path / "in.tsv"
    table.write_text('\ufeffid\timage\tsentence\n7\t2.jpg\t"a ""big"" box"\n8\tdeep/5.jpg\ta star\n', encoding="utf-8")
    told = unimo2("predict", "-m", grounded.directory, "--input", table, "--images", folder, "--output", tmp_path / "out.jsonl")
    assert told.status == 0, told.err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["7", "8"] and rows[0]["sentence"] == 'a "big" box'
    assert rows[1]["score"] == pytest.approx(score(folder / "deep" / "5.jpg", "a star"), abs=1e-4)


def test_wrong_lines_end_the_run_or_are_skipped_and_counted(unimo2, grounded, folder, tmp_path):
    rows = [{"image": str(folder / f"{n}.jpg"), "text": TEXT} for n in range(5)]
    rows[3]["image"] = "nowhere.jpg"
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = unimo2("predict", "-m", grounded.directory, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.csv")
    assert told.status == 2 and "in.jsonl:4: " in told.err and [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    told = unimo2("predict", "-m", grounded.directory, "--input", tmp_path / "in.jsonl", "--skip-bad")
    found = [json.loads(line) for line in told.out.splitlines()]
    assert told.status == 0 and ["error" in row for row in found] == [False, False, False, True, False] and "1 of 5" in told.err


@pytest.mark.parametrize("content, told", [
    ("", "is empty; the first line must name the columns"),
    ("image,text\na.jpg\n", ":2: has fewer fields than the 2 columns"),
    ("image,text\na.jpg,b,c\n", ":2: has more fields"),
    ('image,text\n"a.jpg,b\n', "not readable as a table"),
])
def test_malformed_tables_are_named_with_their_line(tmp_path, content, told):
    (tmp_path / "in.csv").write_text(content)
    with pytest.raises(DataError, match="in.csv") as raised:
        list(file_requests(str(tmp_path / "in.csv")))
    assert told in str(raised.value)


@pytest.mark.parametrize("arguments, told", [
    (["--images", "FOLDER"], "needs text too; give --text"),
    (["--images", "FOLDER", "--image", "a.jpg", "--text", "a"], "--images goes with"),
    (["--text", "a", "--output", "x.csv"], "--output and --skip-bad go with"),
    (["--images", "FOLDER", "--text", "a", "--output", "no/such/place.csv"], "--output no/such/place.csv: cannot be written"),
])
def test_wrong_arguments_end_with_status_2(unimo2, grounded, folder, arguments, told):
    outcome = unimo2("predict", "-m", grounded.directory, *(folder if a == "FOLDER" else a for a in arguments))
    assert outcome.status == 2 and told in outcome.err
