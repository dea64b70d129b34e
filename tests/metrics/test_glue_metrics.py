"""GLUE's metrics against slow definitions of our own, with ties, constant answers and more than two classes."""
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimo2_paddle.errors import DataError
from unimo2_paddle.metrics import glue


def slow_pearson(x, y):
    mx, my = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mx) * (b - my) for a, b in zip(x, y))
    below = math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))
    return 100 * above / below if below else 0.0


def slow_ranks(values):
    """1-based ranks; equal values share the mean of their ranks."""
    return [sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values]


def slow_matthews(predictions, labels):
    """The two-class formula on counts."""
    pairs = list(zip(predictions, labels))
    tp, tn, fp, fn = (pairs.count(pair) for pair in ((1, 1), (0, 0), (1, 0), (0, 1)))
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return 100 * (tp * tn - fp * fn) / below if below else 0.0


pairs_of_scores = st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=2, max_size=30)
pairs_of_classes = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)


@given(pairs_of_scores)
def test_correlations_equal_their_definitions_with_ties(pairs):
    x, y = ([value / 2 for value in side] for side in zip(*pairs))
    assert glue.pearson(x, y) == pytest.approx(slow_pearson(x, y), abs=1e-6)
    assert glue.spearman(x, y) == pytest.approx(slow_pearson(slow_ranks(x), slow_ranks(y)), abs=1e-6)


@given(pairs_of_classes)
def test_matthews_and_accuracy_equal_their_definitions(pairs):
    predictions, labels = zip(*pairs)
    assert glue.matthews(predictions, labels) == pytest.approx(slow_matthews(predictions, labels), abs=1e-6)
    assert glue.accuracy(predictions, labels) == pytest.approx(100 * sum(one == other for one, other in pairs) / len(pairs))


def test_matthews_of_three_classes_is_the_correlation_of_the_confusion_matrix():
    # Gorodkin's formula on the counts [[2, 0, 0], [1, 1, 0], [0, 1, 1]]
    predictions, labels = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]
    right, total, truth, told = 4, 6, [2, 2, 2], [3, 2, 1]
    above = right * total - sum(a * b for a, b in zip(truth, told))
    below = math.sqrt((total ** 2 - sum(b * b for b in told)) * (total ** 2 - sum(a * a for a in truth)))
    assert glue.matthews(predictions, labels) == pytest.approx(100 * above / below)


@pytest.mark.parametrize("metric", [glue.pearson, glue.spearman, glue.matthews])
def test_a_constant_answer_correlates_with_nothing(metric):
    assert metric([1, 1, 1], [0, 1, 2]) == 0.0
    assert metric([0, 1, 2], [1, 1, 1]) == 0.0


def test_perfect_and_reversed_scores():
    assert glue.glue_metrics(glue.METRICS["stsb"], [1.0, 2.0, 3.0], [0.0, 2.5, 5.0]) == pytest.approx(
        {"pearson": 100.0, "spearman": 100.0, "pearson_spearman": 100.0})
    assert glue.pearson([3, 2, 1], [1, 2, 3]) == pytest.approx(-100)


def test_baselines():
    assert glue.majority_accuracy([2, 2, 0, 1]) == 50.0
    assert glue.shared_words("A red ring.", "a red box") == 0.5
    assert glue.shared_words("", "") == 1.0 and glue.shared_words("é", "e") == 0.0


@pytest.mark.parametrize("predictions, labels", [([], []), ([1], [1, 2]), ([[1]], [[1]]), ([float("nan")], [1.0])])
def test_what_cannot_be_compared_is_an_error(predictions, labels):
    with pytest.raises(DataError):
        glue.accuracy(np.array(predictions), np.array(labels))
