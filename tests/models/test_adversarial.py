"""Adversarial training in both forms; that the authors' form computes what their code computes: test_golden.py (v1_11 to v1_34)."""
import dataclasses

import numpy as np
import paddle
import pytest

from unimo2_paddle import UnimoConfig
from unimo2_paddle.models.adversarial import AdversarialConfig, adversarial_loss, climb, initial_perturbation, sample_norms, symmetric_divergence
from unimo2_paddle.models.classifier import UnimoClassifier

VILLA = AdversarialConfig(adv_type="villa", adv_step=3, adv_lr=0.2, adv_max_norm=0.1, adv_init_mag=0.3)
LABELS = paddle.to_tensor([0, 2])


@pytest.fixture(scope="module")
def world():
    """A classifier of pairs whose norms have scales other than 1, and a batch whose second sample is padded."""
    config = UnimoConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=40, max_position_embeddings=12,
                         image_embedding_size=6, initializer_range=0.15, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    paddle.seed(5)
    with paddle.utils.unique_name.guard():
        model = UnimoClassifier(config, "pair", 3, dropout=0.0)
    for parameter in model.parameters():
        if parameter.name.endswith("layer_norm_scale"):
            parameter.set_value(paddle.rand(parameter.shape) + 0.5)
    rng = np.random.RandomState(0)
    inputs = {
        "image_features": paddle.to_tensor(rng.randn(2, 3, 6).astype("float32")), "image_mask": paddle.to_tensor([[1.0] * 3, [1.0, 1.0, 0.0]]),
        "image_location": paddle.to_tensor(rng.rand(2, 3, 5).astype("float32")), "input_ids": paddle.to_tensor(rng.randint(4, 40, [2, 4])),
        "position_ids": paddle.to_tensor([[2, 3, 4, 5]] * 2), "text_mask": paddle.to_tensor([[1.0] * 4, [1.0, 1.0, 1.0, 0.0]])}
    return model, inputs


def run(world, settings, seed=0, **arguments):
    model, inputs = world
    paddle.seed(seed)
    masks = {"text": inputs["text_mask"], "image": inputs["image_mask"]}
    return adversarial_loss(model, lambda **deltas: model(**inputs, **deltas), lambda logits: paddle.nn.functional.cross_entropy(logits, LABELS),
                            masks, {"text": 16, "image": 6}, settings, **arguments)


def test_the_gradient_of_a_perturbation_is_that_of_the_plain_backward(world):
    model, inputs = world
    step = run(world, VILLA, keep_steps=True).steps[1]
    for side in ("text", "image"):
        delta = step[side]["delta"]
        delta.stop_gradient = False
        (paddle.nn.functional.cross_entropy(model(**inputs, **{f"{side}_delta": delta}), LABELS) / 3).backward()
        np.testing.assert_allclose(step[side]["gradient"].numpy(), delta.grad.numpy(), atol=1e-6)
    model.clear_gradients()


def test_training_gradients_treat_perturbations_as_constants(world):
    """Those of a plain sum over the recorded perturbations."""
    model, inputs = world
    found = run(world, VILLA, keep_steps=True)
    found.loss.backward()
    expected = {p.name: p.grad.numpy() for p in model.parameters()}
    model.clear_gradients()
    total, clean = 0.0, model(**inputs)
    for step in found.steps:
        total += paddle.nn.functional.cross_entropy(clean, LABELS) / 3
        for side in ("text", "image"):
            logits = model(**inputs, **{f"{side}_delta": step[side]["delta"].detach()})
            total += paddle.nn.functional.cross_entropy(logits, LABELS) / 3 + symmetric_divergence(clean, logits)
    total.backward()
    assert float(total) == pytest.approx(float(found.loss), abs=1e-5)
    for parameter in model.parameters():
        np.testing.assert_allclose(parameter.grad.numpy(), expected[parameter.name], rtol=1e-5, atol=1e-5, err_msg=parameter.name)
    model.clear_gradients()


def test_perturbations_and_their_gradients_leave_parameter_gradients_alone(world):
    run(world, VILLA)
    assert all(p.grad is None or not p.grad.abs().max() for p in world[0].parameters())


def test_padded_positions_are_never_perturbed(world):
    for step in run(world, VILLA, keep_steps=True).steps:
        assert float(step["text"]["delta"][1, 3].abs().max()) < 1e-20
        assert float(step["image"]["delta"][1, 2].abs().max()) < 1e-20


def test_the_textbook_form_keeps_every_perturbation_in_its_ball(world):
    strong = dataclasses.replace(VILLA, adv_lr=0.9, adv_step=4)
    textbook = run(world, dataclasses.replace(strong, form="textbook"), keep_steps=True)
    norms = [float(sample_norms(step["text"]["delta"], "l2").max()) for step in textbook.steps[1:]]
    assert max(norms) == pytest.approx(0.1, abs=1e-6)
    authors = run(world, strong, keep_steps=True)
    assert max(float(sample_norms(step["text"]["delta"], "l2").max()) for step in authors.steps[1:]) > 0.2


def test_the_textbook_form_averages_the_divergence_and_climbs_it_too(world):
    one = dataclasses.replace(VILLA, adv_max_norm=0.0, adv_lr=0.0)
    authors, textbook = run(world, one), run(world, dataclasses.replace(one, form="textbook"))
    assert float(textbook.terms["divergence"]) == pytest.approx(float(authors.terms["divergence"]) / 3, rel=1e-4)
    assert float(textbook.terms["text"]) == pytest.approx(float(authors.terms["text"]), rel=1e-5)
    steps = [run(world, dataclasses.replace(VILLA, form=form), keep_steps=True).steps[0]["text"]["gradient"] for form in ("authors", "textbook")]
    assert float((steps[0] - steps[1]).abs().max()) > 1e-5


def test_climbing_raises_the_loss_of_the_perturbed_pass(world):
    steps = run(world, dataclasses.replace(VILLA, adv_max_norm=0.0, adv_step=4), keep_steps=True).steps
    for side in ("text", "image"):
        losses = [float(paddle.nn.functional.cross_entropy(step[side]["logits"], LABELS)) for step in steps]
        assert losses[-1] > losses[0]


def test_one_side_alone_and_without_the_clean_pass(world):
    text = run(world, dataclasses.replace(VILLA, adv_type="freelb_text"))
    assert set(text.terms) == {"clean", "text", "divergence"}
    bare = run(world, dataclasses.replace(VILLA, with_pure_model=False))
    assert set(bare.terms) == {"text", "image"} and bare.logits is None
    assert float(bare.loss) == pytest.approx(sum(float(v) for v in bare.terms.values()), abs=1e-6)


def test_the_random_start_has_the_same_size_whatever_the_length():
    mask = paddle.to_tensor([[1.0] * 50, [1.0] * 5 + [0.0] * 45])
    delta = initial_perturbation(mask, 64, VILLA, paddle.ones([2, 50, 64]))
    np.testing.assert_allclose(sample_norms(delta, "l2").numpy().ravel(), 0.3, rtol=1e-5)
    inf = initial_perturbation(mask, 64, dataclasses.replace(VILLA, norm_type="inf"))
    assert 0.2 < float(sample_norms(inf, "inf").max()) <= 0.3


def test_the_largest_value_norm_is_clipped_entry_by_entry():
    settings = dataclasses.replace(VILLA, norm_type="inf", adv_lr=1.0)
    delta = climb(paddle.zeros([1, 2, 2]), paddle.to_tensor([[[0.01, -0.02], [0.0, 0.001]]]), settings)
    np.testing.assert_allclose(delta.numpy(), [[[0.1, -0.1], [0.0, 0.05]]], atol=1e-6)


def test_no_gradient_means_no_step():
    assert float(climb(paddle.zeros([1, 2, 2]), paddle.zeros([1, 2, 2]), VILLA).abs().max()) == 0.0


def test_identical_distributions_do_not_diverge():
    logits = paddle.randn([3, 5])
    assert float(symmetric_divergence(logits, logits + 2.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(symmetric_divergence(logits, -logits)) > 0.1


def test_wrong_settings_are_all_reported():
    found = AdversarialConfig(adv_type="villain", form="theirs", norm_type="l1", adv_step=0, adv_lr=-1.0).problems()
    assert [text.split(":")[0] for text in found] == ["adv_type", "form", "norm_type", "adv_lr", "adv_step"]
    assert VILLA.problems() == []


def test_recomputed_activations_give_the_same_gradients(world):
    model, gradients = world[0], []
    for recompute in (False, True):
        model.train()
        model.set_recompute(recompute)
        run(world, VILLA).loss.backward()
        gradients.append([p.grad.numpy() for p in model.parameters()])
        model.clear_gradients()
    model.set_recompute(False)
    for plain, recomputed in zip(*gradients):
        np.testing.assert_allclose(plain, recomputed, rtol=1e-5, atol=1e-6)
