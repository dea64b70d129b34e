"""List files from ImageNet as it is distributed."""
import importlib.util
from pathlib import Path

import pytest

from unimo2_paddle.data.formats.image_classes import read_class_names, read_list_file

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("prepare_imagenet", ROOT / "tools" / "prepare_imagenet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def raw(tmp_path):
    """Two classes, three training and two validation pictures, in the layout of the archive."""
    images = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    for name in ("train/n01440764/n01440764_1.JPEG", "train/n01443537/n01443537_1.JPEG", "train/n01443537/n01443537_2.JPEG", "val/v2.JPEG", "val/v1.JPEG"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(b"")
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nv2,n01443537 85 1 499 272 \nv1,n01440764 1 1 2 2 n01440764 3 3 4 4 \n")
    return tmp_path


def test_the_lists_are_read_back_as_the_same_pictures_and_labels(tool, raw, capsys):
    assert tool.main(["--root", str(raw), "--out", str(raw / "lists")]) == 0
    assert "3 training and 2 validation pictures of 2 classes" in capsys.readouterr().out
    images = raw / "ILSVRC" / "Data" / "CLS-LOC"
    assert read_list_file(raw / "lists" / "train_list.txt", images, 2).labels.tolist() == [0, 1, 1]
    val = read_list_file(raw / "lists" / "val_list.txt", images, 2)
    assert [Path(path).name for path in val.paths] == ["v1.JPEG", "v2.JPEG"] and val.labels.tolist() == [0, 1]
    assert read_class_names(raw / "LOC_synset_mapping.txt", ["0", "1"]) == ["tench", "goldfish"]


@pytest.mark.parametrize("spoil, text", [
    (lambda raw: (raw / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nv1,n09999999 1 1 2 2\n"), "LOC_val_solution.csv:2"),
    (lambda raw: (raw / "LOC_val_solution.csv").write_text("v1\n"), "LOC_val_solution.csv:1"),
    (lambda raw: (raw / "LOC_synset_mapping.txt").write_text("n01443537 a\nn01440764 b\n"), "sorted by WordNet id"),
    (lambda raw: (raw / "LOC_synset_mapping.txt").unlink(), "cannot read the classes"),
    (lambda raw: (raw / "ILSVRC" / "Data" / "CLS-LOC" / "val" / "v1.JPEG").unlink(), "1 of 2 validation pictures are missing"),
])
def test_raw_files_that_do_not_fit_are_named_and_nothing_is_written(tool, raw, capsys, spoil, text):
    spoil(raw)
    assert tool.main(["--root", str(raw), "--out", str(raw / "lists")]) == 2
    assert text in capsys.readouterr().err and not (raw / "lists").exists()
