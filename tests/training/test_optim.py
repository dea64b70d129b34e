"""AdamW: the update by hand, which parameters decay, clipping over all of them."""
import numpy as np
import paddle
import pytest

from unimo2_paddle.errors import ConfigError
from unimo2_paddle.models import fused
from unimo2_paddle.models.unimo2 import Unimo2Model
from unimo2_paddle.training.optim import OptimConfig, build_optimizer, decays
from unimo2_paddle.training.sanity import gradient_norms


@pytest.fixture
def names(tiny_config):
    with paddle.utils.unique_name.guard():
        return [p.name for p in Unimo2Model(tiny_config).parameters()]


class Pair:
    """A decayed and an undecayed parameter with gradients set by hand."""

    def __init__(self, **options):
        with paddle.utils.unique_name.guard():
            attributes = [paddle.ParamAttr(name=name, initializer=paddle.nn.initializer.Constant(value))
                          for name, value in (("x.w_0", 2.0), ("x.b_0", -1.0))]
            self.layer = paddle.nn.Linear(1, 1, weight_attr=attributes[0], bias_attr=attributes[1])
            self.optimizer = build_optimizer(self.layer.parameters(), OptimConfig(**options))

    def step(self, rate, weight_gradient, bias_gradient):
        (self.layer.weight * weight_gradient + self.layer.bias * bias_gradient).sum().backward()
        self.optimizer.set_lr(rate)
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)
        return float(self.layer.weight), float(self.layer.bias)


def adamw(values, gradients, rates, decay, beta1=0.9, beta2=0.98, epsilon=1e-6):
    """The update in float64: decay first, epsilon times sqrt(1 - beta2^t) as Paddle 2 and 3 have it."""
    m = v = 0.0
    for t, (gradient, rate) in enumerate(zip(gradients, rates), 1):
        values -= rate * decay * values
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient ** 2
        correction = np.sqrt(1 - beta2 ** t)
        values -= rate * correction / (1 - beta1 ** t) * m / (np.sqrt(v) + epsilon * correction)
    return values


def test_three_steps_equal_the_formula():
    pair = Pair(weight_decay=0.1, clip_norm=0.0)
    gradients, rates = [(1.0, 2e-6), (-0.5, 1e-6), (0.25, 3e-6)], [1e-2, 5e-3, 2e-2]
    for (weight, bias), rate in zip(gradients, rates):
        found = pair.step(rate, weight, bias)
    wanted = adamw(2.0, [g for g, _ in gradients], rates, 0.1), adamw(-1.0, [g for _, g in gradients], rates, 0.0)
    assert found == pytest.approx(wanted, abs=1e-6)


def test_gradients_are_clipped_by_their_common_norm():
    pair, large = Pair(weight_decay=0.0, clip_norm=1.0), Pair(weight_decay=0.0, clip_norm=0.0)
    assert pair.step(1e-2, 3e-6, 4e-6) == pytest.approx(large.step(1e-2, 3e-6, 4e-6)), "a norm below the limit stays"
    clipped, scaled = Pair(weight_decay=0.0, clip_norm=5e-6), Pair(weight_decay=0.0, clip_norm=0.0)
    assert clipped.step(1e-2, 30e-6, 40e-6) == pytest.approx(scaled.step(1e-2, 3e-6, 4e-6), abs=1e-7)


def test_decay_spares_biases_norms_and_temperatures_of_the_whole_model(names):
    spared = {name for name in names if not decays(name)}
    assert {"cmcl_temperature", "topk_temperature", "vit.patch_embeddings_projection_bias", "grounded.mask_lm_out_fc.b_0"} <= spared
    assert all("layer_norm" in n or n.endswith(("_bias", ".b_0")) or n in ("cmcl_temperature", "topk_temperature") for n in spared)
    decayed = set(names) - spared
    assert {"vq_emb", "text.word_embedding", "vit.cls_token_embeddings", "grounded.pooled_fc_text.w_0"} <= decayed
    assert not any(n.endswith(("bias", "b_0")) for n in decayed)


def test_the_authors_rule_strips_characters_from_the_end(names):
    surprises = {name for name in names if decays(name, "authors") != decays(name)}
    assert surprises == {"cmcl_temperature", "topk_temperature", "vit.patch_embeddings_projection_bias"}
    assert all(decays(name, "authors") for name in surprises)


def test_weight_decay_moves_only_what_decays():
    pair = Pair(weight_decay=0.5, clip_norm=0.0)
    assert pair.step(1e-1, 0.0, 0.0) == pytest.approx((2.0 * (1 - 0.05), -1.0))


def test_an_unknown_decay_rule_is_refused():
    with pytest.raises(ConfigError, match="decay_rule.*standard, authors"):
        build_optimizer([], OptimConfig(decay_rule="none"))


@pytest.mark.parametrize("clip_norm, layer_decay", [(0.0, 1.0), (1e-3, 0.9), (1e6, 1.0)])
def test_the_compiled_update_equals_paddles_own(tiny_config, clip_norm, layer_decay):
    results, states = [], []
    for kind in ("auto", "plain"):
        before = fused.choose(kind)
        with paddle.utils.unique_name.guard():
            paddle.seed(0)
            model = Unimo2Model(tiny_config)
            optimizer = build_optimizer(model.parameters(), OptimConfig(weight_decay=0.1, clip_norm=clip_norm, layer_decay=layer_decay))
            random = np.random.RandomState(0)
            for step in range(3):
                for number, p in enumerate(model.parameters()):
                    gradient = random.randn(*p.shape).astype("float32") * 0.01
                    if (number + step) % 5:  # some have none in a step, as in the mixture of corpora
                        (p * paddle.to_tensor(gradient)).sum().backward()
                optimizer.set_lr(1e-2 / (step + 1))
                optimizer.step()
                optimizer.clear_grad(set_to_zero=False)
        fused.choose(before)
        results.append({p.name: p.numpy() for p in model.parameters()})
        states.append({key: np.asarray(value) for key, value in optimizer.state_dict().items() if key != "LR_Scheduler"})
    for one, two in (results, states):
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_allclose(one[name], two[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_norms_of_gradients_are_the_same_in_one_pass(tiny_config):
    with paddle.utils.unique_name.guard():
        parameters = Unimo2Model(tiny_config).parameters()
    for p in parameters[1:]:
        (p * p).sum().backward()
    found = gradient_norms(parameters)
    with fused.plain():
        plain = gradient_norms(parameters)
    assert found == pytest.approx(plain, rel=1e-5) and len(plain) == len(parameters) - 1
