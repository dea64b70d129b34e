"""Searching captions and embeddings, and what counts as a neighbour."""
import json
import math
import sys
from collections import Counter

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer

from unimo2_paddle.augment.retrieval import EmbeddingIndex, RetrieveOptions, TextSearch, neighbours
from unimo2_paddle.augment.sources import AugmentRecord
from unimo2_paddle.augment.store import Augmentations
from unimo2_paddle.augment.text_index import TextIndex, words
from unimo2_paddle.errors import DataError, UserInputError

QUERIES = ("A large red dog above a cat", "bird bird boat", "There is a green horse and a brown cow near them.", "unseen words only", "")


@pytest.fixture(scope="module")
def index(corpus):
    return TextIndex(corpus[1])


def ranked(scores):
    """(positions, scores) of everything above zero, best first, equal ones in order."""
    order = [i for i in np.argsort(-np.round(scores, 5), kind="stable") if scores[i] > 0]
    return order, scores[order]


def plain_bm25(texts, query, k1=1.2, b=0.75):
    bags = [Counter(words(text)) for text in texts]
    lengths = np.array([sum(bag.values()) for bag in bags])
    scores = np.zeros(len(texts))
    for term, times in Counter(words(query)).items():
        n = sum(term in bag for bag in bags)
        idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
        for i, bag in enumerate(bags):
            scores[i] += times * idf * bag[term] * (k1 + 1) / (bag[term] + k1 * (1 - b + b * lengths[i] / lengths.mean()))
    return scores


@pytest.mark.parametrize("query", QUERIES)
def test_bm25_equals_a_plain_computation(index, query):
    texts = [index.texts[i] for i in range(len(index))]
    order, expected = ranked(plain_bm25(texts, query))
    found, scores = index.bm25(query, len(texts))
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    assert sorted(found.tolist()) == sorted(order)


@pytest.mark.parametrize("query", QUERIES)
def test_tfidf_equals_scikit_learn(index, query):
    texts = [index.texts[i] for i in range(len(index))]
    model = TfidfVectorizer(analyzer=lambda text: words(text) + [f"{a} {b}" for a, b in zip(words(text), words(text)[1:])], sublinear_tf=True)
    matrix = model.fit_transform(texts)
    # scikit-learn's query norm knows only the corpus' terms; ours all of them: compare up to a factor
    order, expected = ranked((matrix @ model.transform([query]).T).toarray().ravel())
    found, scores = index.tfidf(query, len(texts))
    assert sorted(found.tolist()) == sorted(order)
    if len(scores):
        np.testing.assert_allclose(scores / scores[0], expected / expected[0], rtol=1e-4)


def test_a_small_budget_still_scores_what_it_finds_exactly(corpus, index):
    frugal = TextIndex(corpus[1], budget=1)
    for query in QUERIES[:3]:
        exact = dict(zip(*(values.tolist() for values in index.bm25(query, len(index)))))
        found, scores = frugal.bm25(query, 5)
        assert len(found) == 5
        np.testing.assert_allclose(scores, [exact[i] for i in found], rtol=1e-5)


def test_searches_leave_nothing_behind_and_ties_keep_the_order_of_the_index(index):
    first = [index.bm25(query, 7) for query in QUERIES]
    again = [index.bm25(query, 7) for query in QUERIES]
    for (one, scores), (other, same) in zip(first, again):
        assert one.tolist() == other.tolist() and scores.tolist() == same.tolist()
        assert all(a < b for a, b, s, t in zip(one, one[1:], scores, scores[1:]) if s == t)


def test_no_record_is_its_own_neighbour(index):
    record = AugmentRecord(*reversed(index.record_of(4)), [index.texts[4], index.texts[5]])
    found = neighbours(TextSearch(index), record, RetrieveOptions(top=30))
    assert len(found) == 30 and record.key not in [row["key"] for row in found]
    asked = [words(text) for text in record.captions]
    assert not [row for row in found if words(row["text"]) in asked]
    assert len({row["text"] for row in found}) == 30
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)


def test_own_captions_are_neighbours_only_when_asked_for(index):
    record = AugmentRecord(*reversed(index.record_of(4)), [index.texts[4]])  # its other caption is index.texts[5]
    texts = {own: [row["text"] for row in neighbours(TextSearch(index), record, RetrieveOptions(top=40, own_captions=own))] for own in (False, True)}
    assert index.texts[5] in texts[True] and index.texts[5] not in texts[False] and index.texts[4] not in texts[True]


def imported(run, directory, features, keys, kind="images"):
    directory.mkdir()
    np.save(directory / "features.npy", features)
    (directory / "keys.txt").write_text("".join(key + "\n" for key in keys), encoding="utf-8")
    run("index", "--features", directory / "features.npy", "--keys", directory / "keys.txt", "--kind", kind, "--out", directory / "index")
    return directory / "index"


@pytest.fixture(scope="module")
def pictures(run, tmp_path_factory):
    """An index of 300 features in two shards, a third of them equal to others."""
    features = np.random.default_rng(3).standard_normal((300, 24)).astype(np.float32)
    features[200:] = features[50] * np.linspace(1, 3, 100, dtype=np.float32)[:, None]
    return imported(run, tmp_path_factory.mktemp("pictures") / "made", features, [f"{'ab'[n // 150]}\tpicture{n}" for n in range(300)])


def test_faiss_and_numpy_give_identical_neighbours(pictures):
    pytest.importorskip("faiss")
    queries = np.random.default_rng(4).standard_normal((20, 24)).astype(np.float32)
    queries[0] = np.load(pictures.parent / "features.npy")[50]  # a hundred equally good answers
    one, other = (EmbeddingIndex(pictures, backend).search(queries, 10) for backend in ("faiss", "numpy"))
    for (items, scores), (same, equal) in zip(one, other):
        assert items.tolist() == same.tolist() and scores.tolist() == equal.tolist()
    assert one[0][0].tolist() == [50, *range(200, 209)]


def test_search_equals_a_plain_computation(pictures, monkeypatch):
    monkeypatch.setattr("unimo2_paddle.vector_search._ROWS", 64)
    features = np.load(pictures.parent / "features.npy").astype(np.float64)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    for query, (items, scores) in zip(features[:20], EmbeddingIndex(pictures, "numpy").search(features[:20], 300)):
        np.testing.assert_allclose(scores, np.sort(features @ query)[::-1], atol=2e-6)
        assert sorted(items.tolist()) == list(range(300))


def test_faiss_that_is_missing_is_replaced_or_named(pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert len(EmbeddingIndex(pictures, "auto").search(np.ones((1, 24)), 3)[0][0]) == 3
    with pytest.raises(UserInputError, match="pip install faiss-cpu"):
        EmbeddingIndex(pictures, "faiss")


def test_related_pictures_are_written_per_shard_without_the_picture_itself(run, pictures, tmp_path):
    run("retrieve", "--queries", pictures, "--index", pictures, "--out", tmp_path, "--top", "5")
    store = Augmentations(tmp_path)
    assert store.shards() == ["a", "b"] and len(store.keys("a")) == 150
    for number in (0, 50, 299):
        images = store.get(f"picture{number}").images
        assert len(images) == 5 and f"picture{number}" not in [row["key"] for row in images]
    assert store.get("picture50").images[0] == {"shard": "b", "key": "picture200", "score": 1.0}


def test_text_embeddings_bring_their_texts(run, tmp_path):
    texts = ["a dog", "a puppy", "a car", "a truck"]
    features = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
    index = imported(run, tmp_path / "texts", features, [f"s\tk{n // 2}\t{text}" for n, text in enumerate(texts)], "texts")
    run("retrieve", "--queries", index, "--index", index, "--out", tmp_path / "out", "--top", "3")
    assert [row["text"] for row in Augmentations(tmp_path / "out").get("k0").texts] == ["a truck", "a car"]


@pytest.mark.parametrize("features, keys, says", [
    (np.zeros((3, 2)), ["a", "b"], "does not fit 2 lines"), (np.zeros(3), ["a", "b", "c"], "does not fit"), (np.ones((1, 2)), ["a\tb\tc\td"], "keys.txt:1"),
    (np.full((1, 2), np.nan), ["a"], "finite"),
])
def test_features_that_do_not_fit_are_refused(run, tmp_path, features, keys, says):
    with pytest.raises(DataError, match=says):
        imported(run, tmp_path / "made", features, keys)
    assert not (tmp_path / "made" / "index").exists()


def test_features_of_another_width_are_refused(run, pictures, tmp_path):
    other = imported(run, tmp_path / "made", np.ones((2, 5)), ["a", "b"])
    with pytest.raises(UserInputError, match="width 24, the queries 5"):
        run("retrieve", "--queries", other, "--index", pictures, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_demo_paraphrases_are_of_every_pair_and_true_to_the_parser(demo_data, tmp_path, run):
    from unimo2_paddle.data.demo_tasks.rewrites import write

    assert "3 paraphrases of each of 24 pairs" in write(tmp_path / "rewrites", demo_data, 1)
    rows = [json.loads(line) for line in (tmp_path / "rewrites" / "paraphrases.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in rows}) == 24 and all(len(set(row["paraphrases"])) == 3 for row in rows)
    source = demo_data / "pairs" / "*.tar"
    run("index", "--source", source, "--out", tmp_path / "index", "--synonyms", tmp_path / "rewrites" / "synonyms.txt")
    run("rewrite", "--source", source, "--index", tmp_path / "index", "--out", tmp_path / "out", "--levels", "word",
        "--paraphrases", tmp_path / "rewrites" / "paraphrases.jsonl")
    store = Augmentations(tmp_path / "out")
    counts = store.manifests["rewrites"]["counts"]
    assert counts["captions"] == 120 and counts["captions_without_content"] == 0 and counts["positives"] > 300
