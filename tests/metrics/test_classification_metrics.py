"""Classifier metrics against scikit-learn."""
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from unimo2_paddle.metrics import classification


@pytest.fixture
def drawn():
    rng = np.random.default_rng(3)
    return rng.integers(0, 4, 200), rng.integers(0, 3, 200)


def test_accuracy_matrix_and_recalls_equal_scikit_learn(drawn):
    predicted, labels = drawn
    matrix = classification.confusion_matrix(predicted, labels, 4)
    assert classification.accuracy(predicted, labels) == pytest.approx(100 * sklearn_metrics.accuracy_score(labels, predicted))
    np.testing.assert_array_equal(matrix, sklearn_metrics.confusion_matrix(labels, predicted, labels=range(4)))
    wanted = 100 * sklearn_metrics.recall_score(labels, predicted, labels=range(3), average=None)
    recalls = classification.class_recalls(matrix)
    np.testing.assert_allclose(recalls[:3], wanted)
    assert np.isnan(recalls[3])  # no sample has this class


def test_topk_accuracy_equals_scikit_learn_and_breaks_ties_by_class_number():
    rng = np.random.default_rng(4)
    logits, labels = rng.normal(size=(100, 6)), rng.integers(0, 6, 100)
    for k in (1, 5):
        wanted = 100 * sklearn_metrics.top_k_accuracy_score(labels, logits, k=k, labels=range(6))
        assert classification.topk_accuracy(logits, labels, k) == pytest.approx(wanted)
    assert classification.topk_accuracy(np.zeros((3, 4)), [0, 1, 2], 2) == pytest.approx(200 / 3)


def test_majority_is_the_share_of_the_most_frequent_label():
    assert classification.majority_accuracy([0, 2, 2, 1]) == 50.0


def test_empty_or_unequal_inputs_are_refused():
    for predicted, labels in (([], []), ([1], [1, 2])):
        with pytest.raises(ValueError, match="equally long"):
            classification.accuracy(predicted, labels)
