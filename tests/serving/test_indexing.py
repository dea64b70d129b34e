"""An index follows its folder, encodes only what is new, and finds what the model ranks first."""
import json
import os
import shutil

import numpy as np
import pytest

from unimo2_paddle import Predictor
from unimo2_paddle.data.images import decode_image
from unimo2_paddle.errors import DataError, UserInputError
from unimo2_paddle.serving import indexing
from unimo2_paddle.serving.index import RetrievalIndex
from unimo2_paddle.serving.indexing import IndexOptions, update_index
from unimo2_paddle.vector_search import VectorSearch

QUERY = "a small red ring left of a blue box"


@pytest.fixture
def predictor(grounded):
    return Predictor(grounded.directory)


def counts(changes):
    told = changes.to_json()
    return tuple(told[name] for name in ("items", "new", "changed", "unchanged", "removed", "skipped"))


def test_only_new_and_changed_pictures_are_encoded(predictor, folder, tmp_path, monkeypatch):
    out = tmp_path / "index"
    (folder / "broken.jpg").write_bytes(b"no picture")
    first, changes = update_index(predictor, folder, out)
    assert counts(changes) == (6, 6, 0, 0, 0, 1) and first.items[-1] == os.path.join("deep", "5.jpg")
    read = []
    plain = indexing.read_picture
    monkeypatch.setattr(indexing, "read_picture", lambda path: read.append(os.path.basename(path)) or plain(path))
    assert counts(update_index(predictor, folder, out)[1]) == (6, 0, 0, 6, 0, 1) and read == []
    shutil.copy(folder / "4.jpg", folder / "new.jpg")
    shutil.copy(folder / "3.jpg", folder / "0.jpg")
    os.utime(folder / "0.jpg", ns=(1, 1))
    (folder / "1.jpg").unlink()
    index, changes = update_index(predictor, folder, out)
    assert counts(changes) == (6, 1, 1, 4, 1, 1) and sorted(read) == ["0.jpg", "new.jpg"]
    again = RetrievalIndex.build(predictor, "images", [index.path(place) for place in range(len(index))])
    np.testing.assert_allclose(index.features, again.features, atol=1e-5)
    assert [entry["item"] for entry in RetrievalIndex.load(out).about["skipped"]] == ["broken.jpg"]


def test_an_interrupted_run_keeps_what_it_saved(predictor, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "SAVE_EVERY", 2)
    encode, calls = indexing._PictureUpdate.encode, []

    def failing(self, names):
        calls.append(names)
        if len(calls) == 3:
            raise KeyboardInterrupt
        encode(self, names)

    monkeypatch.setattr(indexing._PictureUpdate, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        update_index(predictor, folder, tmp_path / "index", IndexOptions(batch_size=2))
    assert len(RetrievalIndex.load(tmp_path / "index")) == 4
    assert counts(update_index(predictor, folder, tmp_path / "index")[1]) == (6, 2, 0, 4, 0, 0)


def test_thumbnails_are_stored_renewed_and_dropped(predictor, folder, tmp_path):
    out = tmp_path / "index"
    update_index(predictor, folder, out)
    index, _ = update_index(predictor, folder, out, IndexOptions(thumbnails=20))
    assert len(list((out / "thumbnails").iterdir())) == 6 and max(decode_image(index.thumbnail(0)).shape) == 20
    (folder / "2.jpg").unlink()
    update_index(predictor, folder, out)
    assert len(list((out / "thumbnails").iterdir())) == 5
    with pytest.raises(UserInputError, match="no picture number 5"):
        RetrievalIndex.load(out).thumbnail(5)


def test_an_index_inside_its_own_folder_does_not_index_itself(predictor, folder):
    for _ in range(2):
        index, _ = update_index(predictor, folder, folder / "index", IndexOptions(thumbnails=20))
    assert len(index) == 6


def test_codes_are_the_mean_relevance_of_patches_and_of_tokens(predictor, grounded, folder, tmp_path):
    index, _ = update_index(predictor, folder, tmp_path / "index", IndexOptions(codes=True))
    model = grounded.model
    picture = predictor.kind.picture(decode_image(index.path(2)))
    import paddle

    states = model.encode_image(paddle.to_tensor((picture[None].astype("float32") / 255 - 0.5) / 0.5))
    scores = model.dictionary.code_scores(*model.dictionary.inputs(states)).numpy()[0]
    np.testing.assert_allclose(index.arrays["codes"][2], scores / (states.shape[1] - 1), atol=1e-3)
    lines = tmp_path / "lines.txt"
    lines.write_text("A red ring.\nA blue ring.\nA red ring.\n")
    texts, changes = update_index(predictor, lines, tmp_path / "texts", IndexOptions(codes=True))
    assert changes.items == 2 and texts.about["words"] == [".", "a", "blue", "red", "ring"] and texts.about["occurrences"] == [2, 2, 1, 1, 2]
    lines.write_text("A red ring.\nA blue ring.\nA green box.\n")
    more, _ = update_index(predictor, lines, tmp_path / "texts")
    assert "box" in more.about["words"] and more.about["occurrences"][more.about["words"].index("ring")] == 2
    same, changes = update_index(predictor, lines, tmp_path / "texts")
    assert changes.unchanged == 3 and same.about["words"] == more.about["words"]
    np.testing.assert_array_equal(same.arrays["word_codes"], more.arrays["word_codes"])


def test_reranking_orders_by_the_whole_model_and_leaves_out_what_has_gone(predictor, folder, tmp_path):
    index, _ = update_index(predictor, folder, tmp_path / "index")
    scores = {place: predictor(image=index.path(place), text=QUERY).score for place in range(6)}
    found = index.search(predictor, QUERY, top=3, rerank=6)
    assert [row.place for row in found] == sorted(scores, key=lambda place: -scores[place])[:3]
    (folder / "0.jpg").unlink()
    assert 0 not in [row.place for row in index.search(predictor, QUERY, top=6)]


def test_a_damaged_write_never_leaves_half_an_index(predictor, folder, tmp_path, monkeypatch):
    out = tmp_path / "index"
    update_index(predictor, folder, out)
    (folder / "0.jpg").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("unimo2_paddle.serving.index.write_text", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserInputError, match="No space left"):
            update_index(predictor, folder, out)
    assert len(RetrievalIndex.load(out)) == 6
    assert update_index(predictor, folder, out)[1].removed == 1 and len(list(out.glob("features-*.npy"))) == 1


def test_wrong_sources_and_directories_are_refused(predictor, pair_model, folder, tmp_path):
    update_index(predictor, folder, tmp_path / "index")
    (tmp_path / "lines.txt").write_text("A ring.\n")
    with pytest.raises(UserInputError, match="is an index of"):
        update_index(predictor, tmp_path / "lines.txt", tmp_path / "index")
    other = Predictor(pair_model("other", seed=6).directory)
    with pytest.raises(UserInputError, match="give --rebuild"):
        update_index(other, folder, tmp_path / "index")
    assert update_index(other, folder, tmp_path / "index", rebuild=True)[1].new == 6
    with pytest.raises(UserInputError, match="exists and is no index"):
        update_index(predictor, folder, folder)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of 1 items can be read"):
        update_index(predictor, tmp_path / "bad", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_commands_index_search_and_write_a_page(unimo2, grounded, folder, tmp_path):
    (folder / "broken.png").write_bytes(b"")
    told = unimo2("index", folder, "-m", grounded.directory, "--out", tmp_path / "index", "--thumbnails")
    assert told.status == 0 and json.loads(told.out.splitlines()[0])["skipped"] == 1 and "broken.png" in told.out
    table = unimo2("search", QUERY, "--index", tmp_path / "index", "--top", 3, "--html", tmp_path / "found" / "page.html")
    assert table.status == 0 and len(table.out.splitlines()) == 4
    page = (tmp_path / "found" / "page.html").read_text()
    assert page.count("<li><img") == 3 and "http" not in page and QUERY in page
    rows = [json.loads(line) for line in unimo2("search", QUERY, "--index", tmp_path / "index", "--json", "--rerank", 0).out.splitlines()]
    assert len(rows) == 6 and rows[0]["contrastive"] == max(row["contrastive"] for row in rows)


@pytest.mark.parametrize("arguments, told", [
    (["index", "nowhere", "-m", "MODEL"], "nowhere: neither a folder of pictures nor a text file"),
    (["index", "nowhere", "-m", "none"], "none is not a directory"),
    (["search", "a ring", "--index", "none"], "build one with unimo2 index SOURCE --out none"),
    (["search"], "give a sentence, or a picture by --image"),
    (["index", "nowhere", "-m", "MODEL", "--batch-size", "0"], "--batch-size must be at least 1"),
])
def test_wrong_arguments_end_with_status_2(unimo2, grounded, arguments, told, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    outcome = unimo2(*(grounded.directory if a == "MODEL" else a for a in arguments))
    assert outcome.status == 2 and told in outcome.err


@pytest.mark.parametrize("backend", ["faiss", "numpy"])
def test_the_largest_products_are_found_whatever_the_length_of_the_vectors(backend):
    if backend == "faiss":
        pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    features = (rng.standard_normal((400, 16)) * rng.uniform(0.1, 30, (400, 1))).astype("float32")
    features[300:] = features[7]
    queries = (rng.standard_normal((5, 16)) * 20).astype("float32")
    for query, (rows, scores) in zip(queries, VectorSearch(features, backend).search(queries, 9)):
        products = (features.astype("float64") @ query.astype("float64")).round(6)
        order = np.lexsort((np.arange(400), -products))[:9]
        assert rows.tolist() == order.tolist() and scores.tolist() == products[order].tolist()
