"""Annotation formats: Karpathy JSON and the authors' .ids files."""
import json
import re

import pytest

from unimo2_paddle.data.formats.ids import read_ids, read_ids_dataset
from unimo2_paddle.data.formats.karpathy import read_karpathy
from unimo2_paddle.errors import DataError


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "val2014").mkdir(parents=True)
    for name in ("1.jpg", "2.jpg", "val2014/COCO_3.jpg"):
        (folder / name).write_bytes(b"picture")
    return folder


def flickr():
    return [{"filename": f"{i}.jpg", "imgid": i, "split": split, "sentences": [{"raw": f"Text {i}."}, {"raw": " other "}]}
            for i, split in ((1, "train"), (2, "test"))]


def write(tmp_path, content):
    path = tmp_path / "dataset.json"
    path.write_text(content if isinstance(content, str) else json.dumps({"images": content, "dataset": "x"}))
    return str(path)


def test_karpathy_splits_are_read_apart(tmp_path, pictures):
    path = write(tmp_path, flickr())
    [image] = read_karpathy(path, str(pictures), "test")
    assert (image.image_id, image.path, image.captions) == ("2", str(pictures / "2.jpg"), ["Text 2.", "other"])
    assert [image.image_id for image in read_karpathy(path, pictures, "train")] == ["1"]


def test_coco_pictures_stand_in_folders_and_keep_their_numbers(tmp_path, pictures):
    entry = {"filepath": "val2014", "filename": "COCO_3.jpg", "cocoid": 522418, "split": "restval", "sentences": [{"raw": "t"}]}
    path = write(tmp_path, flickr() + [entry])
    assert [image.image_id for image in read_karpathy(path, pictures, "train")] == ["1"]
    images = read_karpathy(path, pictures, "train", include_restval=True)
    assert [(image.image_id, image.path) for image in images] == [
        ("1", str(pictures / "1.jpg")), ("522418", str(pictures / "val2014/COCO_3.jpg"))]
    assert len(read_karpathy(path, pictures, "test", include_restval=True)) == 1


@pytest.mark.parametrize("change,message", [
    ({"filename": None}, r"images\[0\].filename"), ({"filename": "/etc/passwd"}, "inside the picture folder"),
    ({"filename": "a/../../b"}, "inside the picture folder"), ({"split": 3}, r"images\[0\].split"),
    ({"sentences": []}, r"images\[0\].sentences"), ({"sentences": [{"raw": "x"}, {"raw": "  "}]}, r"sentences\[1\].raw"),
    ({"sentences": [{"tokens": []}]}, r"sentences\[0\].raw.*the key is missing"),
    ({"sentences": ["x"]}, r"sentences\[0\] is not"), ({"filename": "gone.jpg"}, "1 of 1 pictures are missing.*gone.jpg"),
    ({"split": "dev"}, r"no image of split 'train'.*dev \(1\)"),
])
def test_karpathy_errors_name_the_image_and_the_key(tmp_path, pictures, change, message):
    images = flickr()
    images[0].update(change)
    with pytest.raises(DataError, match=message):
        read_karpathy(write(tmp_path, images), pictures, "train")


@pytest.mark.parametrize("content,message", [
    ('{"images": [', "not JSON at line 1"), ("[]", 'no list "images"'), ('{"images": 3}', 'no list "images"'),
    ('{"images": [3]}', r"images\[0\] is not an object"), ('{"images": []}', "the file has: none"), ("[" * 100000, "not JSON"),
])
def test_files_that_are_not_karpathy_json_are_refused(tmp_path, pictures, content, message):
    with pytest.raises(DataError, match=message):
        read_karpathy(write(tmp_path, content), pictures, "train")


def test_karpathy_missing_things_and_doubles_are_named(tmp_path, pictures):
    path = write(tmp_path, flickr())
    with pytest.raises(DataError, match="nowhere.*no such picture folder"):
        read_karpathy(path, tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="absent.json.*cannot read"):
        read_karpathy(tmp_path / "absent.json", pictures, "train")
    with pytest.raises(DataError, match=r"images\[2\]: image 1 was already images\[0\]"):
        read_karpathy(write(tmp_path, flickr() + flickr()[:1]), pictures, "train")


def test_ids_files_are_read_and_grouped_by_picture(tmp_path, pictures):
    path = tmp_path / "train.ids"
    path.write_text("0 5 2;0 0 0;2 3 4;1;0\n0 6 7 2;0 0 0 0;2 3 4 5;2;0\r\n\n0 8 2;0 0 0;2 3 4;1;1")
    captions = list(read_ids(path))
    assert [caption.token_ids for caption in captions] == [[0, 5, 2], [0, 6, 7, 2], [0, 8, 2]]
    assert (captions[1].position_ids, captions[1].sentence_ids) == ([2, 3, 4, 5], [0, 0, 0, 0])
    images = read_ids_dataset(path, pictures)
    assert [(image.image_id, image.path, len(image.captions)) for image in images] == [
        ("1", str(pictures / "1.jpg"), 2), ("2", str(pictures / "2.jpg"), 1)]
    assert images[0].captions[1].sentence_id == "1"


@pytest.mark.parametrize("line,message", [
    (b"0 5;0 0;2 3;1", "4 fields instead of 5"), (b"0 5;0;2 3;1;0", "2, 1 and 2 numbers"), (b";;;1;0", "0, 0 and 0 numbers"),
    (b"0 -5;0 0;2 3;1;0", "token_ids has '-5'"), (b"0 5;0 0;2 3_0;1;0", "pos_ids has '3_0'"),
    (b"0 5;0 0;2 3; ;0", "image_id is empty"),
    (b"0 " + b"9" * 5000 + b";0 0;2 3;1;0", "token_ids has '9999"), (b"0 \xff;0 0;2 3;1;0", "not UTF-8"),
])
def test_ids_errors_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "x.ids"
    path.write_bytes(b"0 5;0 0;2 3;1;0\n" + line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        list(read_ids(path))
    assert f"{path}:2: " in str(caught.value)


def test_ids_data_sets_need_captions_and_pictures(tmp_path, pictures):
    path = tmp_path / "x.ids"
    path.write_text("\n")
    with pytest.raises(DataError, match="no caption in this file"):
        read_ids_dataset(path, pictures)
    path.write_text("".join(f"0 2;0 0;2 3;gone{i};0\n" for i in range(5)))
    with pytest.raises(DataError, match=re.escape("5 of 5 pictures are missing") + ".*gone0.jpg, gone1.jpg, gone2.jpg, ..."):
        read_ids_dataset(path, pictures)
    path.write_text("0 2;0 0;2 3;../1;0\n")
    with pytest.raises(DataError, match="inside the picture folder"):
        read_ids_dataset(path, pictures)
    with pytest.raises(DataError, match="absent.ids.*cannot read"):
        read_ids_dataset(tmp_path / "absent.ids", pictures)
