"""The image-classification recipe: RandAugment, mixup, CutMix, label smoothing."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimo2_paddle.data import randaugment
from unimo2_paddle.data.mixing import Mixing, mix_batch, smooth_targets
from unimo2_paddle.data.randaugment import RandAugment, rand_augment


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)


@pytest.mark.parametrize("operation", randaugment._OPERATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("strength, sign", [(0.0, 1), (0.5, -1), (1.0, 1), (1.0, -1)])
def test_every_operation_keeps_type_size_and_its_input(image, operation, strength, sign):
    before = image.copy()
    result = operation(image, strength, sign)
    assert result.dtype == np.uint8 and result.shape == image.shape
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y", "colour", "contrast", "brightness", "sharpness",
                                  "solarise", "posterise", "identity"])
def test_strength_zero_changes_nothing(image, name):
    result = getattr(randaugment, name)(image, 0.0, 1).astype(int)
    assert np.abs(result - image).max() <= 1


def test_operations_do_what_they_say(image):
    np.testing.assert_array_equal(randaugment.solarise(image, 1.0, 1), 255 - image)
    assert set(np.unique(randaugment.posterise(image, 1.0, 1) % 16)) == {0}
    moved = randaugment.translate_x(image, 1 / 9, 1)  # 0.05 of 20 pixels: one to the right
    np.testing.assert_array_equal(moved[:, 1:], image[:, :-1])
    np.testing.assert_array_equal(moved[:, 0], np.full((24, 3), 128))
    dark = image // 4 + 20
    stretched = randaugment.auto_contrast(dark, 0, 1)
    assert stretched.min(axis=(0, 1)).tolist() == [0, 0, 0] and stretched.max(axis=(0, 1)).tolist() == [255, 255, 255]
    flat = np.full((5, 5, 3), 7, np.uint8)
    np.testing.assert_array_equal(randaugment.auto_contrast(flat, 0, 1), flat)


def test_augmenting_is_a_function_of_the_generator(image):
    settings = RandAugment(2, 9)
    one, same, other = (rand_augment(image, settings, np.random.default_rng(seed)) for seed in (1, 1, 5))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    np.testing.assert_array_equal(rand_augment(image, RandAugment(0), np.random.default_rng(1)), image)


@given(st.integers(1, 6), st.integers(2, 9), st.floats(0, 0.9), st.integers(0, 1000), st.sampled_from([(0.4, 0.0), (0.0, 1.0), (0.2, 1.0)]))
def test_mixed_targets_stay_distributions(batch, classes, smoothing, seed, alphas):
    rng = np.random.default_rng(seed)
    targets = smooth_targets(rng.integers(0, classes, batch), classes, smoothing)
    images = rng.integers(0, 256, (batch, 6, 6, 3), dtype=np.uint8)
    mixed, shares = mix_batch(images, targets, Mixing(*alphas), rng)
    assert mixed.dtype == np.uint8 and mixed.shape == images.shape and shares.dtype == np.float32
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, atol=1e-5)
    assert (shares >= 0).all()


def test_smoothing_follows_its_formula():
    np.testing.assert_allclose(smooth_targets([2, 0], 4, 0.2), [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]])


def test_cutmix_shares_equal_the_pixels():
    images = np.stack([np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 200, np.uint8)])
    for seed in range(20):
        mixed, targets = mix_batch(images, smooth_targets([0, 1], 2), Mixing(cutmix=1.0), np.random.default_rng(seed))
        np.testing.assert_allclose((mixed[0] == 0).mean(), targets[0, 0], atol=1e-6)
        np.testing.assert_allclose((mixed[1] == 200).mean(), targets[1, 1], atol=1e-6)


def test_mixup_shares_equal_the_brightness():
    images = np.stack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 200, np.uint8)])
    mixed, targets = mix_batch(images, smooth_targets([0, 1], 2), Mixing(mixup=0.8), np.random.default_rng(3))
    np.testing.assert_allclose(mixed[0].mean() / 200, targets[0, 1], atol=0.005)


def test_nothing_is_mixed_when_it_is_off_or_improbable():
    images, targets = np.zeros((2, 4, 4, 3), np.uint8), smooth_targets([0, 1], 2)
    for settings in (Mixing(), Mixing(mixup=1.0, probability=0.0)):
        assert mix_batch(images, targets, settings, np.random.default_rng(0))[0] is images


@pytest.mark.parametrize("settings, text", [(RandAugment(-1), "operations"), (RandAugment(2, 11), "magnitude: must be at most 10"),
                                            (Mixing(mixup=-1), "mixup"), (Mixing(probability=2), "probability")])
def test_impossible_settings_are_named(settings, text):
    assert any(text in problem for problem in settings.problems())
