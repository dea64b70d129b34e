"""Embeddings of a corpus by one of our own models."""
import shutil

import numpy as np
import paddle
import pytest

from unimo2_paddle.augment.retrieval import EmbeddingIndex
from unimo2_paddle.augment.store import Augmentations
from unimo2_paddle.checkpoints.pretrained import save_pretrained
from unimo2_paddle.data.shards import ShardSet
from unimo2_paddle.models.configuration import Unimo2Config
from unimo2_paddle.models.unimo2 import Unimo2Model
from unimo2_paddle.serving.index import RetrievalIndex
from unimo2_paddle.serving.predictor import Predictor


@pytest.fixture(scope="module")
def model(demo_data, tiny_config, tmp_path_factory):
    """Directory of a tiny untrained model with the demo's vocabulary."""
    directory = tmp_path_factory.mktemp("model") / "model"
    paddle.seed(1)
    with paddle.utils.unique_name.guard():
        save_pretrained(Unimo2Model(Unimo2Config.from_dict(tiny_config.to_dict()), heads=("pooling", "matching")), str(directory))
    shutil.copytree(demo_data / "vocab", directory / "vocab")
    return directory


def test_pictures_are_indexed_by_their_contrastive_features_and_retrieved(run, demo_data, model, tmp_path, unimo2):
    for name, corpus in (("queries", "pairs"), ("pictures", "images")):
        run("index", "--kind", "images", "--source", demo_data / corpus / "*.tar", "--model", model, "--out", tmp_path / name)
    index = EmbeddingIndex(tmp_path / "pictures")
    assert len(index) == 12 and index.record_of(3) == ("images-00000", "image0000003")
    record = ShardSet([str(demo_data / "images" / "*.tar")], "images").read(3)
    expected = RetrievalIndex.build(Predictor(model), "images", [record.image]).features
    assert index.search(expected, 1)[0][0].tolist() == [3] and index.search(expected, 1)[0][1][0] == pytest.approx(1, abs=1e-5)

    run("retrieve", "--queries", tmp_path / "queries", "--index", tmp_path / "pictures", "--out", tmp_path / "out", "--top", "3")
    images = Augmentations(tmp_path / "out").get("pair0000000", "pairs-00000.tar").images
    assert len(images) == 3 and all(row["shard"] == "images-00000" for row in images)
    outcome = unimo2("augment", "report", "--augmentations", tmp_path / "out", "--samples", "2", "--pictures",
                     demo_data / "pairs" / "*.tar", demo_data / "images" / "*.tar")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert outcome.status == 0 and page.count("<img") == 2 * (1 + 3) and "related pictures" in page


def test_indices_of_two_models_are_not_compared(run, demo_data, model, tmp_path, unimo2):
    run("index", "--source", demo_data / "pairs" / "*.tar", "--model", model, "--out", tmp_path / "captions")
    assert EmbeddingIndex(tmp_path / "captions").texts[0]
    np.save(tmp_path / "other.npy", np.ones((1, 32), np.float32))
    (tmp_path / "keys.txt").write_text("a\n")
    run("index", "--features", tmp_path / "other.npy", "--keys", tmp_path / "keys.txt", "--kind", "images", "--out", tmp_path / "other")
    outcome = unimo2("augment", "retrieve", "--queries", tmp_path / "captions", "--index", tmp_path / "other", "--out", tmp_path / "out")
    assert outcome.status == 2 and "another model" in outcome.err and not (tmp_path / "out").exists()
