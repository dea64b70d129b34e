"""Masking regions for pre-training: a region goes together with those that show the same place (UNIMO, arXiv 2012.15409, section 3.1).

A detector reports the same thing several times. If only one of such boxes were hidden, its features could be copied from the others, so
everything that overlaps a drawn region by more than a threshold is hidden with it.
"""
import numpy as np


def overlaps(boxes):
    """Intersection over union of all boxes with each other.

    Args:
        boxes: float [N, 4] (x1, y1, x2, y2).

    Returns:
        float64 [N, N]; boxes without area overlap nothing.
    """
    boxes = np.asarray(boxes, np.float64)
    sides = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    shared = np.clip(sides, 0, None).prod(axis=2)
    area = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1)
    union = area[:, None] + area[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def mask_regions(boxes, rng, ratio=0.15, threshold=0.4):
    """Choose the regions of a picture that are hidden and, of these, those to predict.

    Regions are drawn in a random order, each with all that overlap it by more than ``threshold``, until ``ratio`` of the regions (at least
    one) is hidden. What was hidden beside a drawn region may itself overlap a region that still shows; it is not predicted, since it
    could be copied.

    Args:
        boxes: float [N, 4], N at least 1; rng: ``numpy.random.Generator``; ratio: share to hide.
        threshold: intersection over union above which two regions show the same (the authors' ``overlap_ratio``: 0.4 base, 0.3 large).

    Returns:
        (hidden bool [N], predicted bool [N]).
    """
    together = overlaps(boxes) > threshold
    np.fill_diagonal(together, True)
    hidden, budget = np.zeros(len(together), bool), max(1, int(round(ratio * len(together))))
    for region in rng.permutation(len(together)):
        if hidden.sum() >= budget:
            break
        if not hidden[region]:
            hidden |= together[region]
    return hidden, hidden & ~(together[:, ~hidden].any(axis=1))

