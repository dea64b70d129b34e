"""Region batches: the authors' numbers, padding that says so."""
from dataclasses import replace

import numpy as np
import pytest

from tests.data_pipeline.region_records import record
from unimo2_paddle.data.region_inputs import encode_boxes, region_arrays, with_global_region
from unimo2_paddle.errors import DataError


def test_a_box_is_its_fractions_and_its_share_of_the_area():
    found = encode_boxes([[64, 48, 320, 480], [0, 0, 640, 480]], 640, 480)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array([[0.1, 0.1, 0.5, 1.0, 256 * 432 / (640 * 480)], [0, 0, 1, 1, 1]], np.float32))


def test_the_global_region_stands_first_with_the_mean_of_all_regions():
    one = record(1, boxes=7)
    features, location = with_global_region(one.features, one.boxes, one.width, one.height)
    assert features.shape == (8, 6) and location[0].tolist() == [0, 0, 1, 1, 1]
    np.testing.assert_array_equal(features[0], one.features.sum(axis=0) / np.float32(7))
    np.testing.assert_array_equal(features[1:], one.features)
    cut, short = with_global_region(one.features, one.boxes, one.width, one.height, max_regions=3)
    np.testing.assert_array_equal(cut, features[:3])
    np.testing.assert_array_equal(short, location[:3])


def test_a_picture_gets_the_same_rows_in_any_batch_and_padding_is_zero():
    short, long = record(1, boxes=2), record(2, boxes=5)
    batch = region_arrays([short, None, long])
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        "image_features": ((3, 6, 6), np.float32), "image_location": ((3, 6, 5), np.float32), "image_mask": ((3, 6), np.float32)}
    assert batch["image_mask"].tolist() == [[1] * 3 + [0] * 3, [0] * 6, [1] * 6]
    alone = region_arrays([short])
    for name in batch:
        np.testing.assert_array_equal(batch[name][0, :3], alone[name][0])
        assert not batch[name][0, 3:].any() and not batch[name][1].any()


def test_batches_that_cannot_be_are_refused():
    with pytest.raises(DataError, match="empty batch"):
        region_arrays([])
    with pytest.raises(DataError, match="empty batch"):
        region_arrays([None])
    assert region_arrays([None], feature_size=6)["image_features"].shape == (1, 1, 6)
    with pytest.raises(DataError, match="different widths meet in one batch: 6, 7"):
        region_arrays([record(1), record(2, features=7)])
    with pytest.raises(DataError, match="has no regions"):
        region_arrays([replace(record(1), features=np.zeros((0, 6), np.float32))])
