"""Targets between classes: label smoothing, mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899)."""
from dataclasses import dataclass

import numpy as np


@dataclass
class Mixing:
    """``mixup`` and ``cutmix`` are the alphas of their Beta distributions (0: off); with both on, one is drawn per batch.

    ``probability``: share of the batches that are mixed at all.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0

    def problems(self):
        found = [f"{key}: must not be negative, is {getattr(self, key)}" for key in ("mixup", "cutmix") if getattr(self, key) < 0]
        return found + ([] if 0 <= self.probability <= 1 else [f"probability: must be in [0, 1], is {self.probability}"])


def smooth_targets(labels, classes, smoothing=0.0):
    """Target distributions ``(1 - s) * onehot + s / C``: float32 ``[B, C]`` of int labels ``[B]``."""
    targets = np.full((len(labels), classes), smoothing / classes, dtype=np.float32)
    targets[np.arange(len(labels)), labels] += 1.0 - smoothing
    return targets


def mix_batch(images, targets, settings, rng):
    """Every picture mixed with its mirror partner in the batch (first with last ...), targets in the same shares.

    Args:
        images: uint8 ``[B, S, S, 3]``; targets: float32 ``[B, C]``; settings: a :class:`Mixing`; rng: the only source of randomness.

    Returns:
        (uint8 images, float32 targets), new arrays when something was mixed.
    """
    kinds = [kind for kind in ("mixup", "cutmix") if getattr(settings, kind) > 0]
    if not kinds or rng.random() >= settings.probability:
        return images, targets
    kind = kinds[rng.integers(len(kinds))]
    share = float(rng.beta(getattr(settings, kind), getattr(settings, kind)))
    if kind == "mixup":
        mixed = np.rint(images * np.float32(share) + images[::-1] * np.float32(1 - share)).astype(np.uint8)
    else:
        top, bottom, left, right = _window(images.shape[1], images.shape[2], share, rng)
        mixed = images.copy()
        mixed[:, top:bottom, left:right] = images[::-1, top:bottom, left:right]
        share = 1.0 - (bottom - top) * (right - left) / (images.shape[1] * images.shape[2])  # the border may have cut the window
    return mixed, (targets * np.float32(share) + targets[::-1] * np.float32(1 - share)).astype(np.float32)


def _window(height, width, share, rng):
    """A window of area ``1 - share`` around a uniform point, cut at the border: (top, bottom, left, right)."""
    half_height, half_width = np.sqrt(1 - share) * height / 2, np.sqrt(1 - share) * width / 2
    y, x = rng.uniform(0, height), rng.uniform(0, width)
    return (int(max(0, round(y - half_height))), int(min(height, round(y + half_height))),
            int(max(0, round(x - half_width))), int(min(width, round(x + half_width))))
