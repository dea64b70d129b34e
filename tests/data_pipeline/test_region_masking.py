"""Masking regions: what shows the same place goes together, and nothing is predicted that could be copied."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimo2_paddle.data.region_masking import mask_regions, overlaps


def boxes(seed, count, clustered=True):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 100, (count, 2))
    found = np.concatenate([corners, corners + rng.uniform(5, 60, (count, 2))], axis=1)
    if clustered:  # every third box is nearly another one
        found[2::3] = found[0::3][: len(found[2::3])] + rng.normal(0, 1, found[2::3].shape)
    return found


def test_overlap_is_intersection_over_union():
    found = overlaps([[0, 0, 10, 10], [0, 0, 10, 5], [5, 5, 15, 15], [20, 20, 30, 30], [3, 3, 3, 8]])
    np.testing.assert_allclose(found[0], [1, 0.5, 25 / 175, 0, 0])
    np.testing.assert_array_equal(found, found.T)
    assert found[4, 4] == 0, "a box without area overlaps nothing, not even itself"


@given(st.integers(0, 10 ** 6), st.integers(1, 40), st.sampled_from([0.05, 0.15, 0.5]), st.sampled_from([0.3, 0.4]))
def test_nothing_that_is_predicted_overlaps_what_shows(seed, count, ratio, threshold):
    found = boxes(seed, count)
    hidden, predicted = mask_regions(found, np.random.default_rng(seed), ratio, threshold)
    together = overlaps(found) > threshold
    assert not (together & predicted[:, None] & ~hidden[None]).any()
    assert predicted.any() and not (predicted & ~hidden).any()
    assert hidden.sum() >= max(1, round(ratio * count))


@given(st.integers(0, 10 ** 6), st.integers(1, 30))
def test_without_overlaps_as_many_are_hidden_as_asked_for(seed, count):
    apart = np.arange(count)[:, None] * 10.0 + [0, 0, 8, 8]
    hidden, predicted = mask_regions(apart, np.random.default_rng(seed), 0.15, 0.4)
    assert hidden.sum() == max(1, round(0.15 * count)) and (hidden == predicted).all()


def test_a_region_goes_with_its_likes():
    found = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 1, 10, 10], [50, 50, 60, 60]])
    for seed in range(20):
        hidden, _ = mask_regions(found, np.random.default_rng(seed), 0.15, 0.4)
        assert hidden[:3].all() != hidden[3] and (hidden[:3].all() or not hidden[:3].any())


def test_every_region_is_drawn_equally_often():
    apart = np.arange(10)[:, None] * 10.0 + [0, 0, 8, 8]
    drawn = sum(mask_regions(apart, np.random.default_rng(seed), 0.2, 0.4)[0].astype(int) for seed in range(2000))
    assert np.abs(drawn - 400).max() < 80


@pytest.mark.parametrize("threshold, hidden", [(0.9, 1), (0.1, 2)])
def test_the_threshold_decides_what_is_the_same(threshold, hidden):
    found = np.array([[0, 0, 10, 10], [0, 0, 10, 5]])
    assert mask_regions(found, np.random.default_rng(1), 0.15, threshold)[0].sum() == hidden
