"""RandAugment (arXiv 1909.13719): a few operations drawn from fourteen, all at one strength. uint8 RGB in, uint8 RGB out."""
from dataclasses import dataclass

import cv2
import numpy as np

STRONGEST = 10.0
FILL = (128, 128, 128)  # what comes in from outside: 0 after normalisation


@dataclass
class RandAugment:
    """How many operations, how strong (0 to 10), and how much the strength varies (standard deviation); ``operations: 0`` is off."""

    operations: int = 0
    magnitude: float = 9.0
    magnitude_std: float = 0.5

    def problems(self):
        found = [f"{key}: must not be negative, is {getattr(self, key)}"
                 for key in ("operations", "magnitude", "magnitude_std") if getattr(self, key) < 0]
        return found + ([f"magnitude: must be at most {STRONGEST:g}, is {self.magnitude}"] if self.magnitude > STRONGEST else [])


def rand_augment(image, settings, rng):
    """A picture after ``settings.operations`` random operations; ``image`` is not changed.

    Args:
        image: uint8 ``[H, W, 3]``, RGB; settings: a :class:`RandAugment`; rng: the only source of randomness.

    Returns:
        uint8 ndarray ``[H, W, 3]``.
    """
    for _ in range(settings.operations):
        operation = _OPERATIONS[rng.integers(len(_OPERATIONS))]
        strength = np.clip(rng.normal(settings.magnitude, settings.magnitude_std), 0, STRONGEST) / STRONGEST
        image = operation(image, float(strength), 1 if rng.random() < 0.5 else -1)
    return image


def _table(image, values):
    return cv2.LUT(image, np.clip(np.round(values), 0, 255).astype(np.uint8))


def _blend(image, other, factor):
    """``factor`` of the picture and the rest of ``other``; above 1 away from ``other``."""
    return cv2.addWeighted(image, factor, other, 1 - factor, 0)


def _grey(image):
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _warp(image, matrix):
    """Affine map around the centre; ``matrix`` is 2 x 3 in units of the picture's side."""
    height, width = image.shape[:2]
    centre, matrix = np.array([(width - 1) / 2, (height - 1) / 2]), np.array(matrix, dtype=np.float64)
    shift = centre - matrix[:, :2] @ centre + matrix[:, 2] * (width, height)
    return cv2.warpAffine(image, np.column_stack([matrix[:, :2], shift]), (width, height), flags=cv2.INTER_LINEAR, borderValue=FILL)


def identity(image, strength, sign):
    """The picture as it is."""
    return image


def auto_contrast(image, strength, sign):
    """Every channel stretched to 0..255."""
    channels = []
    for channel in cv2.split(image):
        low, high = int(channel.min()), int(channel.max())
        channels.append(channel if high == low else _table(channel, (np.arange(256) - low) * (255.0 / (high - low))))
    return cv2.merge(channels)


def equalise(image, strength, sign):
    """Every channel with an even histogram."""
    return cv2.merge([cv2.equalizeHist(channel) for channel in cv2.split(image)])


def solarise(image, strength, sign):
    """Pixels at least as bright as ``256 * (1 - strength)`` inverted."""
    levels = np.arange(256)
    return _table(image, np.where(levels < 256 * (1 - strength), levels, 255 - levels))


def posterise(image, strength, sign):
    """Fewer grey levels: 8 bits down to 4."""
    bits = 8 - int(round(4 * strength))
    return image & np.uint8(256 - 2 ** (8 - bits))


def colour(image, strength, sign):
    """Saturation times ``1 +- 0.9 strength``."""
    return _blend(image, _grey(image), 1 + 0.9 * strength * sign)


def contrast(image, strength, sign):
    """Contrast around the mean brightness times ``1 +- 0.9 strength``."""
    mean = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean()
    return _table(image, mean + (np.arange(256) - mean) * (1 + 0.9 * strength * sign))


def brightness(image, strength, sign):
    """Brightness times ``1 +- 0.9 strength``."""
    return _table(image, np.arange(256) * (1 + 0.9 * strength * sign))


def sharpness(image, strength, sign):
    """Sharper or softer than the picture, by its difference to a smoothed one."""
    return _blend(image, cv2.GaussianBlur(image, (3, 3), 0), 1 + 0.9 * strength * sign)


def rotate(image, strength, sign):
    """Turned by up to 30 degrees."""
    angle = np.deg2rad(30 * strength * sign)
    return _warp(image, [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]])


def shear_x(image, strength, sign):
    """Sheared sideways by up to 0.3."""
    return _warp(image, [[1, 0.3 * strength * sign, 0], [0, 1, 0]])


def shear_y(image, strength, sign):
    """Sheared upwards by up to 0.3."""
    return _warp(image, [[1, 0, 0], [0.3 * strength * sign, 1, 0]])


def translate_x(image, strength, sign):
    """Moved sideways by up to 0.45 of the width."""
    return _warp(image, [[1, 0, 0.45 * strength * sign], [0, 1, 0]])


def translate_y(image, strength, sign):
    """Moved up or down by up to 0.45 of the height."""
    return _warp(image, [[1, 0, 0], [0, 1, 0.45 * strength * sign]])


_OPERATIONS = (identity, auto_contrast, equalise, rotate, solarise, colour, posterise, contrast, brightness, sharpness, shear_x, shear_y,
               translate_x, translate_y)
