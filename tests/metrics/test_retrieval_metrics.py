"""Recall and ranks agree with a slow count, ties included, and refuse scores that have no answer."""
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimo2_paddle.errors import DataError
from unimo2_paddle.metrics import retrieval
from unimo2_paddle.metrics.retrieval import chance_metrics, retrieval_metrics, retrieval_ranks


def slow_ranks(scores, text_image):
    """Sort every query's answers, wrong ones first among equals, and look where the first right one stands."""
    texts, images = len(scores), len(scores[0])
    text_ranks, image_ranks = [], []
    for t in range(texts):
        order = sorted(range(images), key=lambda i: (-scores[t][i], i == text_image[t]))
        text_ranks.append(order.index(text_image[t]) + 1)
    for i in range(images):
        order = sorted(range(texts), key=lambda t: (-scores[t][i], text_image[t] == i))
        image_ranks.append(next(place for place, t in enumerate(order, 1) if text_image[t] == i))
    return text_ranks, image_ranks


@st.composite
def retrieval_problems(draw):
    """Scores with many ties, every image with one to three texts, texts in any order."""
    images = draw(st.integers(1, 7))
    counts = draw(st.lists(st.integers(1, 3), min_size=images, max_size=images))
    text_image = draw(st.permutations([i for i, count in enumerate(counts) for _ in range(count)]))
    values = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 0.5000001, 2.0])
    scores = draw(st.lists(values, min_size=len(text_image) * images, max_size=len(text_image) * images))
    return np.array(scores).reshape(len(text_image), images), np.array(text_image)


@given(retrieval_problems())
def test_ranks_equal_a_slow_count_with_ties(problem):
    scores, text_image = problem
    text_ranks, image_ranks = retrieval_ranks(scores, text_image)
    slow_text, slow_image = slow_ranks(scores.tolist(), text_image.tolist())
    assert text_ranks.tolist() == slow_text
    assert image_ranks.tolist() == slow_image


@given(retrieval_problems())
def test_metrics_are_shares_and_averages_of_the_ranks(problem):
    scores, text_image = problem
    metrics = retrieval_metrics(scores, text_image)
    recalls = []
    for direction, ranks in zip(("ir", "tr"), slow_ranks(scores.tolist(), text_image.tolist())):
        for k in (1, 5, 10):
            expected = 100 * sum(rank <= k for rank in ranks) / len(ranks)
            assert metrics[f"{direction}_r{k}"] == pytest.approx(expected)
            recalls.append(expected)
        assert metrics[f"{direction}_median_rank"] == np.median(ranks)
        assert metrics[f"{direction}_mean_rank"] == pytest.approx(np.mean(ranks))
    assert metrics["recall_mean"] == pytest.approx(np.mean(recalls))
    assert all(type(value) is float for value in metrics.values())
    assert metrics.keys() == chance_metrics(text_image, scores.shape[1]).keys()


def test_work_in_blocks_changes_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    scores, text_image = rng.integers(0, 4, (30, 10)).astype("float32"), np.repeat(np.arange(10), 3)
    whole = retrieval_metrics(scores, text_image)
    monkeypatch.setattr(retrieval, "_BLOCK", 35)
    assert retrieval_metrics(scores, text_image) == whole


def test_a_constant_scorer_gets_the_last_rank():
    metrics = retrieval_metrics(np.zeros((20, 20), "float32"), np.arange(20))
    assert metrics["ir_median_rank"] == metrics["tr_median_rank"] == 20
    assert metrics["recall_mean"] == 0


def test_one_image_is_always_found():
    metrics = retrieval_metrics([[0.3], [0.3]], [0, 0])
    assert metrics["recall_mean"] == 100
    assert metrics["ir_median_rank"] == metrics["tr_median_rank"] == 1


def test_sister_captions_do_not_push_an_image_down():
    scores = np.zeros((6, 2))
    scores[:5, 0], scores[5, 0] = 1.0, 0.9
    assert retrieval_ranks(scores, [0, 0, 0, 0, 0, 1])[1].tolist() == [1, 6]  # image 1 ties with the five captions of image 0


def test_chance_is_the_average_over_all_orders():
    text_image = [0, 0, 1]
    totals = {}
    orders = list(itertools.permutations(range(6)))
    for order in orders:
        for key, value in retrieval_metrics(np.array(order, "float64").reshape(3, 2), text_image).items():
            totals[key] = totals.get(key, 0) + value / len(orders)
    chance = chance_metrics(text_image, 2)
    for key in ("ir_r1", "tr_r1", "ir_mean_rank", "tr_mean_rank", "recall_mean"):
        assert chance[key] == pytest.approx(totals[key])


@pytest.mark.parametrize("scores, text_image, message", [
    (np.zeros((0, 3)), [], "at least one of each"),
    (np.zeros(3), [0, 0, 0], "a matrix"),
    (np.zeros((2, 2)), [0], "one whole number for each of the 2 texts"),
    (np.zeros((2, 2)), [0.0, 1.0], "one whole number"),
    (np.zeros((2, 2)), [0, 2], "names image 2, there are 2"),
    (np.zeros((2, 2)), [0, -1], "names image -1"),
    (np.zeros((2, 3)), [0, 2], "1 of 3 images have no text (the first is image 1)"),
    ([[0.0, 1.0], [np.nan, 0.0]], [0, 1], "text 1 with image 0 is not a number"),
])
def test_scores_without_an_answer_are_refused(scores, text_image, message):
    with pytest.raises(DataError) as caught:
        retrieval_metrics(scores, np.array(text_image) if len(text_image) else np.zeros(0, int))
    assert message in str(caught.value)
