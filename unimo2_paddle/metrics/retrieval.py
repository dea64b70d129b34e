"""Recall at K and ranks of image-text retrieval, from one matrix of scores. Numpy only."""
from math import lgamma

import numpy as np

from unimo2_paddle.errors import DataError

RECALL_AT = (1, 5, 10)
_BLOCK = 1 << 24  # scores compared at once: bounds the temporary arrays to a few tens of megabytes


def retrieval_ranks(scores, text_image):
    """Rank (1 = best) of the right answer of every query, in both directions.

    A tie counts against us: an answer is ranked behind every wrong one with the same score, so that a constant scorer gets the
    last rank and not the first. Of several captions of an image the best-ranked one counts; its sister captions never push it
    down.

    Args:
        scores: ``[T, I]``, higher = text t and image i fit better.
        text_image: int ``[T]``, the index of the image that text t describes.

    Returns:
        (rank of the right image for every text, int64 ``[T]``; rank of the best right text for every image, int64 ``[I]``).

    Raises:
        DataError: shapes or indices do not fit, a score is NaN, or an image has no text.
    """
    scores, text_image = np.asarray(scores), np.asarray(text_image)
    _check(scores, text_image)
    texts, images = scores.shape
    own = scores[np.arange(texts), text_image]
    best_own = np.full(images, -np.inf, dtype=scores.dtype)
    np.maximum.at(best_own, text_image, own)
    text_ranks = np.empty(texts, dtype="int64")
    image_ranks = np.ones(images, dtype="int64")
    step = max(1, _BLOCK // images)
    for start in range(0, texts, step):
        block, right = scores[start: start + step], text_image[start: start + step]
        text_ranks[start: start + step] = (block >= own[start: start + step, None]).sum(axis=1)  # the right one counts itself
        beats = block >= best_own
        beats[np.arange(len(right)), right] = False
        image_ranks += beats.sum(axis=0)
    return text_ranks, image_ranks


def retrieval_metrics(scores, text_image):
    """Recall at 1, 5 and 10 (percent), median and mean rank, both ways.

    Args and Raises: as :func:`retrieval_ranks`.

    Returns:
        dict of floats: ``ir_r1 ir_r5 ir_r10 ir_median_rank ir_mean_rank`` (a text asks for its image, the paper's IR), the same
        with ``tr_`` (an image asks for a text), and ``recall_mean``, the mean of the six recalls.

    Example:
        >>> retrieval_metrics([[0.9, 0.1], [0.8, 0.2]], [0, 1])["ir_r1"]
        50.0
    """
    text_ranks, image_ranks = retrieval_ranks(scores, text_image)
    metrics = {}
    for direction, ranks in (("ir", text_ranks), ("tr", image_ranks)):
        for k in RECALL_AT:
            metrics[f"{direction}_r{k}"] = 100.0 * float((ranks <= k).mean())
        metrics[f"{direction}_median_rank"] = float(np.median(ranks))
        metrics[f"{direction}_mean_rank"] = float(ranks.mean())
    metrics["recall_mean"] = _recall_mean(metrics)
    return metrics


def chance_metrics(text_image, images):
    """What a random order scores on average: the recalls of :func:`retrieval_metrics` and the expected ranks.

    Args:
        text_image: int ``[T]``, the image of every text; images: number of images.

    Returns:
        dict of floats with the keys of :func:`retrieval_metrics`; the ``median_rank`` entries hold the mean rank too, which for
        one right answer is also the median.
    """
    texts = len(text_image)
    captions = np.bincount(np.asarray(text_image), minlength=images)
    metrics = {}
    for k in RECALL_AT:
        metrics[f"ir_r{k}"] = 100.0 * min(k, images) / images
        metrics[f"tr_r{k}"] = 100.0 * float(np.mean([1.0 - _none_of(k, c, texts) for c in captions.tolist()]))
    for key in ("median_rank", "mean_rank"):
        metrics[f"ir_{key}"] = (images + 1) / 2
        metrics[f"tr_{key}"] = float(np.mean((texts - captions) / (captions + 1) + 1))
    metrics["recall_mean"] = _recall_mean(metrics)
    return metrics


def _recall_mean(metrics):
    return sum(metrics[f"{direction}_r{k}"] for direction in ("ir", "tr") for k in RECALL_AT) / (2 * len(RECALL_AT))


def _none_of(draws, right, total):
    """Probability that ``draws`` of ``total`` items, drawn without putting back, hold none of the ``right`` ones."""
    draws, wrong = min(draws, total), total - right
    if draws > wrong:
        return 0.0
    return float(np.exp(lgamma(wrong + 1) - lgamma(wrong - draws + 1) - lgamma(total + 1) + lgamma(total - draws + 1)))


def _check(scores, text_image):
    if scores.ndim != 2 or not scores.size:
        raise DataError("retrieval scores: a matrix [texts, images] with at least one of each is needed, "
                        f"the shape is {list(scores.shape)}")
    texts, images = scores.shape
    if text_image.shape != (texts,) or text_image.dtype.kind not in "iu":
        raise DataError(f"retrieval scores: text_image must hold one whole number for each of the {texts} texts, "
                        f"it is {text_image.dtype} {list(text_image.shape)}")
    outside = text_image[(text_image < 0) | (text_image >= images)]
    if outside.size:
        raise DataError(f"retrieval scores: text_image names image {outside[0]}, there are {images} images")
    step = max(1, _BLOCK // images)
    for start in range(0, texts, step):
        wrong = np.isnan(scores[start: start + step])
        if wrong.any():
            text, image = np.argwhere(wrong)[0]
            raise DataError(f"retrieval scores: the score of text {start + text} with image {image} is not a number; "
                            "the model's weights may hold NaN")
    alone = np.flatnonzero(np.bincount(text_image, minlength=images) == 0)
    if alone.size:
        raise DataError(f"retrieval scores: {alone.size} of {images} images have no text (the first is image {alone[0]}); "
                        "leave such images out")
