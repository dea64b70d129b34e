"""GLUE's metrics in percent: accuracy, Matthews correlation, Pearson and Spearman correlation (scikit-learn and scipy)."""
import numpy as np

from unimo2_paddle.errors import DataError

METRICS = {"sst2": ("accuracy",), "mnli": ("accuracy",), "ax": ("matthews", "accuracy"), "cola": ("matthews", "accuracy"),
           "stsb": ("pearson", "spearman", "pearson_spearman")}
SELECTION = {"sst2": "accuracy", "mnli": "accuracy", "cola": "matthews", "stsb": "pearson_spearman"}


def accuracy(predictions, labels):
    """Share of equal entries in percent.

    >>> accuracy([1, 0, 1, 1], [1, 1, 1, 1])
    75.0
    """
    predictions, labels = _checked(predictions, labels)
    return 100.0 * float(np.mean(predictions == labels))


def matthews(predictions, labels):
    """Matthews correlation times 100, for any number of classes; 0 when one side is constant.

    >>> matthews([1, 1, 1, 1], [1, 0, 1, 0])
    0.0
    """
    from sklearn.metrics import matthews_corrcoef

    predictions, labels = _checked(predictions, labels)
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return 100.0 * float(matthews_corrcoef(labels, predictions))


def pearson(predictions, labels):
    """Pearson correlation times 100; 0 when one side is constant."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, labels)


def spearman(predictions, labels):
    """Spearman's rank correlation times 100, ties ranked by their mean; 0 when one side is constant."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, labels)


def glue_metrics(names, predictions, labels):
    """The named metrics (a tuple of ``METRICS``) as ``{name: percent}``.

    Raises:
        DataError: the lengths differ, nothing to compare, or a value is not finite.
    """
    values = {}
    for name in names:
        if name == "pearson_spearman":  # the authors' key for choosing a checkpoint
            values[name] = (values["pearson"] + values["spearman"]) / 2
        else:
            values[name] = {"accuracy": accuracy, "matthews": matthews, "pearson": pearson, "spearman": spearman}[name](predictions, labels)
    return values


def majority_accuracy(labels):
    """Accuracy in percent of always answering the most frequent label.

    >>> majority_accuracy([0, 1, 1, 1])
    75.0
    """
    _, counts = np.unique(np.asarray(labels), return_counts=True)
    return 100.0 * float(counts.max() / counts.sum())


def shared_words(first, second):
    """How alike two texts look by their words alone: shared words over all words, 0 to 1; the baseline of graded similarity.

    >>> shared_words("a red ring", "A red box")
    0.5
    """
    one, two = (set(text.lower().replace(".", " ").replace(",", " ").split()) for text in (first, second))
    return len(one & two) / len(one | two) if one | two else 1.0


def _correlation(function, predictions, labels):
    predictions, labels = _checked(predictions, labels)
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    value = float(function(predictions.astype("float64"), labels.astype("float64"))[0])
    return 100.0 * value if np.isfinite(value) else 0.0


def _checked(predictions, labels):
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or predictions.ndim != 1 or not predictions.size:
        raise DataError(f"predictions {list(predictions.shape)} and labels {list(labels.shape)} must be equally long lists with at least one entry")
    if not (np.isfinite(predictions).all() and np.isfinite(labels).all()):
        raise DataError("a prediction or label is not a finite number")
    return predictions, labels
