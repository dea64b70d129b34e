"""Captioning files: what is read equals what was written, and what is malformed is named by its place."""
import filecmp
import gzip
import json

import pytest

from unimo2_paddle.data.demo_tasks.captioning import write
from unimo2_paddle.data.formats.coco_captions import read_caption_filelist, read_coco_captions, read_object_tags, result_problems, result_rows
from unimo2_paddle.data.formats.karpathy import read_karpathy
from unimo2_paddle.data.tokenizer import Tokenizer
from unimo2_paddle.errors import DataError

RECORD = "shapes14_12;a.jpg;0;0 5 2;0 0 0;2 3 4;-1 0 -1;1"


@pytest.fixture(scope="module")
def written(demo_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("captioning")
    write(str(out), str(demo_data), 1)
    return out


def test_all_formats_of_the_demo_hold_the_same_captions(demo_data, written):
    tokenizer = Tokenizer.from_directory(demo_data / "vocab")
    train = read_karpathy(written / "dataset_shapes.json", written, "train")
    records = read_caption_filelist(str(written / "train_filelist"), written)
    assert [r.image_id for r in records] == [image.image_id for image in train] and len(train) == 24
    assert [[tokenizer.decode(ids) for ids in r.tokens] for r in records] == [image.captions for image in train]
    test = read_karpathy(written / "dataset_shapes.json", written, "test")
    coco = read_coco_captions(str(written / "captions_test.json"), written)
    assert [(c.image_id, c.path, c.captions) for c in coco] == [(t.image_id, t.path, t.captions) for t in test]
    tags = read_object_tags(str(written / "objects.ids"))
    assert {image.image_id for image in train + test} <= set(tags)
    assert all(ids[0] == tokenizer.cls_id and ids[-1] == tokenizer.sep_id for ids in tags.values())
    nocaps = read_coco_captions(str(written / "captions_nocaps.json"), written)
    assert {image.domain for image in nocaps} == {"in-domain", "out-domain"}


def test_pictures_to_caption_have_no_tokens(written):
    assert all(record.tokens == [] for record in read_caption_filelist(str(written / "test_filelist"), written))


def test_the_same_arguments_write_the_same_bytes(demo_data, written, tmp_path):
    write(str(tmp_path), str(demo_data), 1)
    names = [path.name for path in written.iterdir() if path.is_file()]
    assert len(names) == 11 and filecmp.cmpfiles(written, tmp_path, names, shallow=False)[0] == names


@pytest.mark.parametrize("line, told", [
    ("1;2;3", "3 fields instead of 8"),
    (RECORD.replace("shapes14_12", "cat"), "image_id 'cat'"),
    (RECORD.replace("0 5 2", "0 x 2"), "token_ids has 'x'"),
    (RECORD.replace("0 5 2", "0 -5 2"), "token_ids has '-5'"),
    (RECORD.replace("2 3 4", "2 3"), "different numbers"),
    (RECORD.replace("12;a.jpg", "13;../a.jpg"), "not a file name inside"),
])
def test_a_malformed_record_is_named_by_file_and_line(tmp_path, line, told):
    (tmp_path / "list").write_text("data\n")
    (tmp_path / "data").write_text(f"{RECORD}\n\n{line}\n")
    with pytest.raises(DataError, match=f"data:3.*{told}"):
        read_caption_filelist(str(tmp_path / "list"), tmp_path)


def test_missing_empty_and_damaged_files_are_told(tmp_path):
    (tmp_path / "list").write_text("data.gz\n")
    with pytest.raises(DataError, match="data.gz"):
        read_caption_filelist(str(tmp_path / "list"), tmp_path)
    (tmp_path / "data.gz").write_bytes(gzip.compress(f"{RECORD}\n".encode() * 500)[:60])
    with pytest.raises(DataError, match="cannot be read"):
        read_caption_filelist(str(tmp_path / "list"), tmp_path)
    (tmp_path / "list").write_text("\n")
    with pytest.raises(DataError, match="names no file"):
        read_caption_filelist(str(tmp_path / "list"), tmp_path)
    (tmp_path / "tags").write_text("7;0 5 2;0 0 0;2 3 4\n7;0 2;0 0;2 3\n")
    with pytest.raises(DataError, match="tags:2.*already"):
        read_object_tags(str(tmp_path / "tags"))


def test_long_tag_lists_keep_their_last_id(tmp_path):
    (tmp_path / "tags").write_text("7;0 5 6 7 2;0 0 0 0 0;2 3 4 5 6\n")
    assert read_object_tags(str(tmp_path / "tags"), most=3) == {"7": [0, 5, 2]}


@pytest.mark.parametrize("content, told", [
    ("[", "not JSON"), ("[]", "no list"), ('{"images": [{"id": 1}]}', "file_name"),
    ('{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}', "twice"),
    ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2, "caption": "x"}]}', r"annotations\[0\]"),
])
def test_malformed_coco_annotations_are_named(tmp_path, content, told):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=told):
        read_coco_captions(str(tmp_path / "a.json"), tmp_path)


def test_results_that_the_server_would_refuse_are_listed(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(result_rows(["3", "5"], ["a dog", "a cat"])))
    assert result_problems(path, ["3", "5"]) == []
    rows = [{"image_id": 3, "caption": "a"}, {"image_id": 3, "caption": " "}, {"image_id": 9, "caption": "b"}, {"image_id": "5"}]
    path.write_text(json.dumps(rows))
    told = " ".join(result_problems(path, ["3", "5"]))
    for part in ("has a caption already", "is empty", "9 is not in the split", "[3]", "1 pictures have no caption: 5"):
        assert part in told
    path.write_text("{}")
    assert "list" in result_problems(path, [])[0]
    with pytest.raises(DataError, match="not a number"):
        result_rows(["test1"], ["a"])


@pytest.fixture(scope="module")
def prepare():
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("prepare", Path(__file__).resolve().parents[2] / "tools/prepare_coco_captions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_references_are_prepared_from_karpathys_file_and_results_checked_against_them(prepare, written, tmp_path, capsys):
    assert prepare.main(["--karpathy", str(written / "dataset_shapes.json"), "--out", str(tmp_path)]) == 0
    references = tmp_path / "captions_test.json"
    assert read_coco_captions(str(references), "") == read_coco_captions(str(written / "captions_test.json"), "")
    ids = [image.image_id for image in read_coco_captions(str(references), "")]
    results = tmp_path / "results.json"
    results.write_text(json.dumps(result_rows(ids, ["a dog"] * len(ids))))
    assert prepare.main(["--check", str(results), "--references", str(references)]) == 0
    results.write_text(json.dumps(result_rows(ids[1:], ["a dog"] * len(ids[1:]))))
    assert prepare.main(["--check", str(results), "--references", str(references)]) == 1
    assert "1 pictures have no caption" in capsys.readouterr().out
    assert prepare.main(["--karpathy", str(references), "--out", str(tmp_path)]) == 2
