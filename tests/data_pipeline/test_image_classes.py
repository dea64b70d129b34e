"""Classes of pictures: folders, list files, class names, the held-out share, prompts."""
import numpy as np
import pytest
from PIL import Image

from unimo2_paddle.data.formats.image_classes import held_out, list_classes, names_of_folders, read_class_folders, read_class_names, read_list_file
from unimo2_paddle.data.prompts import fill_template, read_templates
from unimo2_paddle.errors import DataError


@pytest.fixture
def folders(tmp_path):
    for name, count in (("b dog", 2), ("a_cat", 1), ("c", 3)):
        for number in range(count):
            path = tmp_path / "train" / name / ("deep" if number else "") / f"p{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((4, 4, 3), "uint8")).save(path, "JPEG")
    (tmp_path / "train" / "a_cat" / "Thumbs.db").write_text("")
    (tmp_path / "train" / ".hidden").mkdir()
    return tmp_path / "train"


def test_labels_are_the_places_of_the_sorted_folder_names(folders):
    classes = list_classes(folders)
    images = read_class_folders(folders, classes)
    assert classes == ["a_cat", "b dog", "c"]
    assert images.labels.tolist() == [0, 1, 1, 2, 2, 2] and images.labels.dtype == np.int64
    assert all(path.endswith(".JPEG") for path in images.paths) and len(set(images.paths)) == 6


def test_a_split_may_lack_classes_but_not_bring_new_ones(folders):
    assert read_class_folders(folders, ["_", "a_cat", "b dog", "c"]).labels.min() == 1
    with pytest.raises(DataError, match="c: is not one of the 2 classes"):
        read_class_folders(folders, ["a_cat", "b dog"])


def test_an_empty_class_folder_is_named(folders):
    (folders / "empty").mkdir()
    with pytest.raises(DataError, match="empty: holds no picture"):
        read_class_folders(folders, list_classes(folders))


@pytest.mark.parametrize("place", ["nowhere", "train/c"])
def test_a_directory_without_class_folders_says_what_is_expected(folders, place):
    with pytest.raises(DataError, match="CLASS/picture.jpg"):
        list_classes(folders.parent / place if place == "nowhere" else folders / "a_cat")


def test_list_files_take_paths_with_spaces_and_labels_from_the_end(folders):
    path = folders.parent / "train_list.txt"
    path.write_text("a_cat/p0.JPEG 0\n\nb dog/p0.JPEG 12\n")
    images = read_list_file(path, folders)
    assert images.labels.tolist() == [0, 12] and images.paths[1].endswith("b dog/p0.JPEG")


@pytest.mark.parametrize("line, text", [
    ("a_cat/p0.JPEG", "list.txt:2: 'a_cat/p0.JPEG' is not 'path label'"),
    ("a_cat/p0.JPEG one", "list.txt:2: .* is not 'path label'"),
    ("a_cat/p0.JPEG -1", "list.txt:2: .* is not 'path label'"),
    (" 3", "list.txt:2: '3' is not 'path label'"),
    ("a_cat/p0.JPEG 7", "list.txt:2: label 7, but there are 5 classes"),
    ("../secret.jpg 1", "list.txt:2: '../secret.jpg' is not a file name inside"),
    ("a_cat/p9.JPEG 1", "1 of 2 pictures are missing"),
])
def test_a_bad_line_is_named_with_its_number(folders, line, text):
    path = folders.parent / "list.txt"
    path.write_text(f"a_cat/p0.JPEG 0\n{line}\n")
    with pytest.raises(DataError, match=text):
        read_list_file(path, folders, classes=5)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00 1\n"])
def test_an_empty_or_binary_list_is_refused(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DataError, match="lists no picture|not a text file"):
        read_list_file(tmp_path / "list.txt", tmp_path)


@pytest.mark.parametrize("text", [
    "n02 fish, Piscis\nn01 tench, Tinca tinca\nn03 café\n",      # by folder, any order (LOC_synset_mapping.txt)
    "2 café\n0 tench, Tinca tinca\n1 fish\n",                    # by label (PaddleClas)
    "tench\nfish\ncafé\n",                                       # in label order
    "n01\ttench\nn02\tfish\nn03\tcafé",
])
def test_class_names_are_understood_in_their_usual_forms(tmp_path, text):
    (tmp_path / "names.txt").write_text(text, encoding="utf-8")
    assert read_class_names(tmp_path / "names.txt", ["n01", "n02", "n03"]) == ["tench", "fish", "café"]


def test_names_of_several_words_in_label_order_stay_whole(tmp_path):
    (tmp_path / "names.txt").write_text("red circle\nred square\n")
    assert read_class_names(tmp_path / "names.txt", ["x", "y"]) == ["red circle", "red square"]


@pytest.mark.parametrize("text, match", [
    ("tench\nfish\n", "has 2 names for 3 classes"),
    ("n01 a\nn01 b\nn03 c\n", "names.txt:2: class 'n01' is named twice"),
    ("0 a\n1 ,\n2 c\n", "class 1 \\(n02\\) has no name"),
])
def test_class_names_that_do_not_fit_are_refused(tmp_path, text, match):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(DataError, match=match):
        read_class_names(tmp_path / "names.txt", ["n01", "n02", "n03"])


def test_folder_names_read_as_words():
    assert names_of_folders(["red_circle", "n01", "a  b"]) == ["red circle", "n01", "a b"]


def test_the_held_out_share_depends_on_each_path_alone():
    paths = [f"root/train/c{i % 7}/p{i}.jpg" for i in range(4000)]
    chosen = held_out(paths, "root", 0.1)
    assert 0.07 < chosen.mean() < 0.13
    moved = held_out([p.replace("root", "else/where") for p in paths[::3]], "else/where", 0.1)
    np.testing.assert_array_equal(moved, chosen[::3])
    assert held_out(paths, "root", 0.2)[chosen].all()  # a larger share only adds pictures


def test_bundled_templates_are_read_and_filled():
    photos = read_templates("photos")
    assert len(photos) >= 40 and len(set(photos)) == len(photos) and all(t.count("{}") == 1 for t in photos)
    assert fill_template("a photo of a {}.", "owl") == "a photo of an owl."
    assert fill_template("a {}, banana {{x}}", "pear") == "a pear, banana {{x}}"
    assert fill_template("A {} alone", "ant") == "An ant alone"
    assert fill_template("the {}", "owl") == "the owl"


@pytest.mark.parametrize("text, match", [("a thing\n", "templates.txt:1: .*must contain"), ("# only\n", "has no template"),
                                         ("ok {}\n{} and {}\n", "templates.txt:2")])
def test_a_bad_template_file_is_refused(tmp_path, text, match):
    path = tmp_path / "templates.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=match):
        read_templates(str(path))


def test_an_unknown_template_list_names_the_known_ones():
    with pytest.raises(DataError, match="known: photos, shapes"):
        read_templates("fotos")
