"""Losses equal slow numpy versions written from their definitions."""
from pathlib import Path

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimo2_paddle.models import losses
from unimo2_paddle.models.losses import (
    circle_loss,
    contrastive_loss,
    log_softmax,
    masked_mean,
    masked_region_losses,
    multi_positive_contrastive_loss,
    retrieval_circle_loss,
    smoothed_cross_entropy,
    visual_contrastive_loss,
)


def cross_entropy(scores, right):
    """-log softmax(scores)[right] of one row."""
    largest = max(scores)
    return largest + np.log(sum(np.exp(s - largest) for s in scores)) - scores[right]


def unit(rng, *shape):
    features = rng.normal(size=shape)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def tensor(array):
    return paddle.to_tensor(np.asarray(array, "float32"))


def slow_contrastive(image, text, temperature, weights):
    total = 0.0
    for i in range(len(image)):
        to_text = cross_entropy([image[i] @ t / temperature for t in text], i)
        to_image = cross_entropy([text[i] @ v / temperature for v in image], i)
        total += weights[i] * (to_text + to_image) / 2
    return total / len(image)


@settings(max_examples=25)
@given(st.integers(1, 6), st.floats(0.05, 0.5), st.integers(0, 1000))
def test_contrastive_loss_is_the_mean_of_both_directions(size, temperature, seed):
    rng = np.random.default_rng(seed)
    image, text, weights = unit(rng, size, 5), rng.normal(size=(size, 5)), rng.integers(0, 2, size).astype(float)
    loss, to_text, to_image = contrastive_loss(tensor(image), tensor(text), tensor([temperature]), tensor(weights))
    assert float(loss) == pytest.approx(slow_contrastive(image, text, temperature, weights), rel=1e-4, abs=1e-4)
    np.testing.assert_allclose(to_text.numpy(), image @ text.T / temperature, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(to_image.numpy(), text @ image.T / temperature, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("workers", [2, 3])
def test_contrastive_losses_of_workers_average_to_the_loss_of_one(workers):
    rng = np.random.default_rng(workers)
    image, text, size = unit(rng, 6, 4), unit(rng, 6, 4), 6 // workers
    temperature, weights = tensor([0.1]), np.array([1.0, 0, 1, 1, 1, 0])
    whole = contrastive_loss(tensor(image), tensor(text), temperature, tensor(weights))[0]
    parts = []
    for start in range(0, 6, size):
        own = slice(start, start + size)
        loss, logits, _ = contrastive_loss(tensor(image[own]), tensor(text[own]), temperature, tensor(weights[own]),
                                           all_image=tensor(image), all_text=tensor(text), offset=start)
        assert logits.shape == [size, 6]
        parts.append(float(loss))
    assert np.mean(parts) == pytest.approx(float(whole), rel=1e-5)


def slow_visual(first, second, temperature):
    views, losses = np.concatenate([first, second]), []
    for i in range(len(views)):
        partner = (i + len(first)) % len(views)
        others = [j for j in range(len(views)) if j != i]
        losses.append(cross_entropy([views[i] @ views[j] / temperature for j in others], others.index(partner)))
    return np.mean(losses)


@settings(max_examples=25)
@given(st.integers(1, 6), st.floats(0.05, 0.5), st.integers(0, 1000))
def test_visual_contrastive_loss_has_the_other_view_as_positive_and_itself_as_no_candidate(size, temperature, seed):
    rng = np.random.default_rng(seed)
    first, second = unit(rng, size, 5), unit(rng, size, 5)
    loss = visual_contrastive_loss(tensor(first), tensor(second), temperature)
    assert float(loss) == pytest.approx(slow_visual(first, second, temperature), rel=1e-4, abs=1e-4)


def test_visual_contrastive_losses_of_workers_average_to_the_loss_of_one():
    rng = np.random.default_rng(5)
    first, second = unit(rng, 6, 4), unit(rng, 6, 4)
    parts = [float(visual_contrastive_loss(tensor(first[s: s + 2]), tensor(second[s: s + 2]), 0.1, tensor(first), tensor(second), s))
             for s in (0, 2, 4)]
    assert np.mean(parts) == pytest.approx(slow_visual(first, second, 0.1), rel=1e-5)


def slow_circle(positive, negatives, margin, scale):
    losses = []
    for p, row in zip(positive, negatives):
        weight = max(0.0, 1 + margin - p)
        right = np.exp(-scale * weight * (p - (1 - margin)))
        wrong = sum(np.exp(scale * max(0.0, n + margin) * (n - margin)) for n in row)
        losses.append(np.log(1 + wrong * right))
    return np.mean(losses)


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([(0.2, 1.0), (0.25, 32.0), (0.0, 4.0)]), st.integers(0, 1000))
def test_circle_loss_equals_its_formula(size, count, setting, seed):
    rng = np.random.default_rng(seed)
    scores = rng.uniform(-1.0, 1.5, size=(size, 1 + 2 * count)).astype("float32")
    total, caption, image = retrieval_circle_loss(tensor(scores), *setting)
    expected = [slow_circle(scores[:, 0].astype(float), part.astype(float), *setting)
                for part in (scores[:, 1 + count:], scores[:, 1: 1 + count])]
    assert float(caption) == pytest.approx(expected[0], rel=1e-4, abs=1e-5)
    assert float(image) == pytest.approx(expected[1], rel=1e-4, abs=1e-5)
    assert float(total) == pytest.approx(np.mean(expected), rel=1e-4, abs=1e-5)
    assert total.dtype == paddle.float32


def test_circle_loss_survives_large_scores():
    # 32 * 4.25 * 3.75 on either side: their exponentials multiplied overflow even float64
    assert float(circle_loss(tensor([[-3.0]]), tensor([[4.0]]), 0.25, 32.0)) == pytest.approx(1020)


def test_circle_weights_get_no_gradient():
    scores = tensor([[0.5, 0.3, 0.1]])
    scores.stop_gradient = False
    retrieval_circle_loss(scores, 0.2, 1.0)[0].backward()

    def value(row):
        right = np.exp(-1.0 * 0.7 * (row[0] - 0.8))
        return np.mean([np.log(1 + np.exp(w * (n - 0.2)) * right) for w, n in ((0.5, row[1]), (0.3, row[2]))])

    for column in range(3):
        step = np.eye(3)[column] * 1e-5
        slope = (value(np.array([0.5, 0.3, 0.1]) + step) - value(np.array([0.5, 0.3, 0.1]) - step)) / 2e-5
        assert float(scores.grad[0, column]) == pytest.approx(slope, abs=1e-5)


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(2, 7), st.sampled_from([0.0, 0.1, 0.5]), st.integers(0, 1000))
def test_smoothed_cross_entropy_spreads_its_share_over_all_classes(size, classes, smoothing, seed):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(scale=3, size=(size, classes)), rng.integers(0, classes, size)
    each = [(1 - smoothing) * cross_entropy(row, label) + smoothing * np.mean([cross_entropy(row, c) for c in range(classes)])
            for row, label in zip(logits, labels)]
    loss = smoothed_cross_entropy(tensor(logits), paddle.to_tensor(labels), smoothing, reduction="none")
    np.testing.assert_allclose(loss.numpy(), each, rtol=1e-4, atol=1e-4)
    assert float(smoothed_cross_entropy(tensor(logits), paddle.to_tensor(labels), smoothing)) == pytest.approx(
        np.mean(each), rel=1e-4, abs=1e-4)


def test_log_probabilities_sum_to_one_and_carry_their_gradient():
    values = np.random.default_rng(0).standard_normal([3, 7]) * 30
    logits = paddle.to_tensor(values.astype("float32"), stop_gradient=False)
    found = log_softmax(logits)
    expected = values - values.max(axis=1, keepdims=True)
    expected = expected - np.log(np.exp(expected).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
    found[:, 2].sum().backward()
    np.testing.assert_allclose(logits.grad.numpy(), np.eye(7)[2] - np.exp(expected), atol=1e-6)


def test_paddles_log_softmax_which_takes_the_square_of_the_classes_on_cpu_is_nowhere_used():
    package = Path(losses.__file__).resolve().parents[1]
    used = [str(path) for path in package.rglob("*.py") if "F.log_softmax(" in path.read_text(encoding="utf-8")]
    assert not used, f"take models.losses.log_softmax: {used}"


def test_masked_mean_weighs_and_is_zero_without_weights():
    assert float(masked_mean(tensor([1.0, 5.0, 9.0]), tensor([1.0, 0.0, 3.0]))) == pytest.approx(7.0)
    assert float(masked_mean(tensor([1.0, 5.0]), tensor([0.0, 0.0]))) == 0.0


def test_several_positives_share_the_numerator_and_padding_counts_nowhere():
    scores = tensor([[2.0, 1.0, -1.0, 9.0], [0.5, 3.0, 1.0, 0.0]])
    positives, candidates = tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]), tensor([[1.0, 1.0, 1.0, 0.0], [1.0] * 4])
    e = np.exp
    expected = [-np.log((e(2) + e(1)) / (e(2) + e(1) + e(-1))), -np.log(e(3) / (e(0.5) + e(3) + e(1) + 1))]
    assert float(multi_positive_contrastive_loss(scores, positives, candidates)) == pytest.approx(np.mean(expected), abs=1e-5)


def test_one_positive_is_the_usual_contrastive_loss():
    scores = np.random.default_rng(0).normal(size=(3, 5))
    positives = np.eye(5)[[1, 4, 0]]
    expected = np.mean([cross_entropy(row, label) for row, label in zip(scores, [1, 4, 0])])
    assert float(multi_positive_contrastive_loss(tensor(scores), tensor(positives))) == pytest.approx(expected, abs=1e-5)


def test_masked_regions_are_judged_by_class_distribution_and_feature():
    rng = np.random.default_rng(1)
    logits, labels, features, targets = rng.normal(size=(3, 4)), rng.dirichlet(np.ones(4), 3), rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    classes, regression = masked_region_losses(tensor(logits), tensor(features), tensor(labels), tensor(targets))
    expected = np.mean([sum(p * cross_entropy(row, c) for c, p in enumerate(label)) for row, label in zip(logits, labels)])
    assert float(classes) == pytest.approx(expected, rel=1e-4)
    assert float(regression) == pytest.approx(((features - targets) ** 2).mean(), rel=1e-4)
    hard = masked_region_losses(tensor(logits), None, paddle.to_tensor([0, 1, 3]), None)
    assert float(hard[0]) == pytest.approx(np.mean([cross_entropy(row, c) for row, c in zip(logits, [0, 1, 3])]), rel=1e-4)
    assert hard[1] is None


@pytest.mark.skipif(paddle.__version__.startswith("2."), reason="Paddle 2.6.2 cannot sum an empty tensor")
def test_a_batch_without_masked_regions_has_no_region_loss():
    none = paddle.zeros([0, 4])
    assert [float(part) for part in masked_region_losses(none, none, none, none)] == [0.0, 0.0]
    assert masked_region_losses(None, none, none, none)[0] is None
