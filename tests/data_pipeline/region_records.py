"""Made-up region records that several test files use."""
from dataclasses import replace

import numpy as np

from unimo2_paddle.data.formats.regions import RegionRecord, RegionText


def record(number=1, boxes=3, width=640, height=480, features=6, seed=0, **more):
    rng = np.random.default_rng([seed, number])
    corners = rng.uniform(0, [[width / 2, height / 2]], (boxes, 2))
    found = np.concatenate([corners, corners + rng.uniform(0, [[width / 2, height / 2]], (boxes, 2))], axis=1).astype(np.float32)
    return RegionRecord(str(number), width, height, found, rng.standard_normal((boxes, features)).astype(np.float32), **more)


def with_objects(plain, seed=0):
    rng, count = np.random.default_rng(seed), len(plain.boxes)
    return replace(plain, object_ids=rng.integers(0, 7, count), object_confidence=rng.random(count, np.float32),
                   attribute_ids=rng.integers(0, 5, count), attribute_confidence=rng.random(count, np.float32))


def with_probabilities(plain):
    rng, count = np.random.default_rng(len(plain.boxes)), len(plain.boxes)
    objects, attributes = rng.random((count, 8), np.float32), rng.random((count, 6), np.float32)
    return replace(plain, object_probs=objects, object_ids=objects[:, 1:].argmax(1), object_confidence=objects[:, 1:].max(1),
                   attribute_probs=attributes, attribute_ids=attributes[:, 1:].argmax(1), attribute_confidence=attributes[:, 1:].max(1))


CAPTION = RegionText("4", "1", (0, 7, 8, 2), (0, 0, 0, 0), (2, 3, 4, 5), (-1, 0, 1, -1))
HYPOTHESIS = RegionText("h.5", "2", (0, 7, 8, 2), (0, 0, 0, 0), (2, 3, 4, 5))
