"""Metrics of classifiers, in percent, from predicted and true class numbers. Pure numpy."""
import numpy as np


def _checked(predicted, labels):
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape or predicted.ndim != 1 or not len(labels):
        raise ValueError(f"predictions {predicted.shape} and labels {labels.shape} must be equally long and not empty")
    return predicted, labels


def accuracy(predicted, labels):
    """Percent of predictions that equal the label.

    >>> accuracy([0, 1, 1, 2], [0, 1, 2, 2])
    75.0
    """
    predicted, labels = _checked(predicted, labels)
    return float(100.0 * np.mean(predicted == labels))


def topk_accuracy(logits, labels, k):
    """Percent of samples whose label is among the ``k`` highest logits ``[N, C]``; of equal logits the smaller class number counts first."""
    logits = np.asarray(logits)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    labels = np.asarray(labels)
    if logits.ndim != 2 or len(logits) != len(labels) or not len(labels):
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} must be equally long and not empty")
    return float(100.0 * np.mean((order == labels[:, None]).any(axis=1)))


def confusion_matrix(predicted, labels, classes):
    """Counts ``[classes, classes]``: row = true class, column = predicted class."""
    predicted, labels = _checked(predicted, labels)
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def class_recalls(matrix):
    """Percent of every true class that was recognised, from :func:`confusion_matrix`; NaN for a class that does not occur."""
    totals = matrix.sum(axis=1)
    return np.where(totals > 0, 100.0 * np.diag(matrix) / np.maximum(totals, 1), np.nan)


def majority_accuracy(labels):
    """Percent reached by always predicting the most frequent label."""
    labels = np.asarray(labels)
    return float(100.0 * np.bincount(labels).max() / len(labels))
