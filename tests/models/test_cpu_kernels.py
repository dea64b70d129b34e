"""The fused CPU form of a Transformer layer equals the layer written with Paddle's operations, its slow twin."""
import os
import subprocess
import sys
import tempfile

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from unimo2_paddle.models import fused
from unimo2_paddle.models.transformer import Encoder, LayerCache
from unimo2_paddle.runtime import find_compile_cache

compiled = pytest.importorskip("unimo2_paddle.models.compiled") if fused.kernels() else None
pytestmark = pytest.mark.skipif(fused.kernels() is None, reason="numba or Paddle's MKL is not there")
HIDDEN, HEADS = 32, 4


@pytest.fixture(autouse=True)
def automatic():
    before = fused.choose("auto")
    yield
    fused.choose(before)


@pytest.fixture
def used(monkeypatch):
    """Counts the layers that ran fused."""
    calls = []
    real = fused.encoder_layer
    monkeypatch.setattr(fused, "encoder_layer", lambda *arguments: calls.append(1) or real(*arguments))
    return calls


def encoder(pre_norm=False, activation="gelu", dropout=0.0, layers=2):
    """A stack whose parameters are all random, so that each gradient says something."""
    with paddle.utils.unique_name.guard():
        stack = Encoder("part", range(layers), HIDDEN, HEADS, activation, dropout, dropout, 0.3, pre_norm=pre_norm,
                        epsilon=1e-12 if pre_norm else 1e-5)
    random = np.random.RandomState(3)
    for p in stack.parameters():
        p.set_value((random.randn(*p.shape) * 0.3 + ("scale" in p.name)).astype("float32"))
    stack.train()
    return stack


def visibility(batch, length, seed=0):
    """A random mask with one row that sees nothing, as padding does."""
    mask = (np.random.RandomState(seed).rand(batch, length, length) > 0.3).astype("float32")
    mask[0, -1] = 0.0
    return paddle.to_tensor(mask)


def clear(stack):
    for p in stack.parameters():
        p.clear_gradient(False)


def run(kind, stack, mask=None, rows=None, batch=3, length=7, seed=1):
    """Output and gradients by name, of a loss in which all of the output counts."""
    fused.choose(kind)
    random = np.random.RandomState(seed)
    states = paddle.to_tensor(random.randn(batch, length, HIDDEN).astype("float32"), stop_gradient=False)
    out = stack(states, mask, rows=None if rows is None else paddle.to_tensor(rows))
    (out * paddle.to_tensor(random.randn(*out.shape).astype("float32"))).sum().backward()
    results = {"out": out.numpy(), "states": states.grad.numpy()}
    # a bias of the keys moves all scores of a query alike: its gradient is 0 but for rounding
    results.update({p.name: p.grad.numpy() for p in stack.parameters() if p.grad is not None and "key_fc.b" not in p.name})
    clear(stack)
    return results


def check_equal(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = np.abs(got[name] - value).max() / (np.abs(value).max() + 1e-12)
        assert error <= (tolerance if name != "out" else min(tolerance, 2e-6)), name


@pytest.mark.parametrize("pre_norm, activation, masked, rows", [
    (False, "gelu", False, None), (False, "gelu", True, None), (False, "gelu", True, [0, 3]), (False, "relu", False, [0, 3]),
    (True, "gelu", False, None), (True, "gelu", True, None), (True, "relu", True, None)])
def test_output_and_every_gradient_equal_the_plain_layer(used, pre_norm, activation, masked, rows):
    stack, mask = encoder(pre_norm, activation), visibility(3, 7) if masked else None
    check_equal(run("auto", stack, mask, rows), run("plain", stack, mask, rows))
    assert len(used) == 2


def test_any_number_of_threads_gives_the_same_gradients(monkeypatch):
    stack, mask = encoder(), visibility(5, 7)
    alone = run("auto", stack, mask, batch=5)
    monkeypatch.setattr(fused, "threads", lambda: 3)
    monkeypatch.setattr(fused, "_pool", None)
    check_equal(run("auto", stack, mask, batch=5), alone, 2e-6)
    fused._pool.shutdown()
    monkeypatch.undo()


@paddle.no_grad()
def decoded(kind, stack, prefix, biased, batch=3, beams=4):
    """States of four steps of decoding after a prefix of five positions; beams are exchanged after each, and the first sample ends after two."""
    fused.choose(kind)
    random, caches, bias = np.random.RandomState(5), [LayerCache() for _ in stack.layers], None
    if prefix:
        stack(paddle.to_tensor(random.randn(batch, 5, HIDDEN).astype("float32")), caches=caches)
        bias = paddle.to_tensor(np.where(random.rand(batch, 1, 1, 5) > 0.6, -1e4, 0.0).astype("float32")) if biased else None
    found = []
    for step in range(4):
        found.append(stack.step(paddle.to_tensor(random.randn(batch, beams, HIDDEN).astype("float32")), caches, bias).numpy())
        kept = np.arange(batch)[step == 1:]
        parents = paddle.to_tensor(kept[:, None] * beams + random.randint(0, beams, [len(kept), beams]))
        for cache in caches:
            cache.select(paddle.to_tensor(kept) if len(kept) < batch else None, parents)
        bias = None if bias is None else paddle.index_select(bias, paddle.to_tensor(kept))
        batch = len(kept)
    return found


@pytest.mark.parametrize("prefix, biased, activation", [(True, True, "gelu"), (True, False, "relu"), (False, False, "gelu")])
def test_steps_of_decoding_equal_the_plain_layers(monkeypatch, prefix, biased, activation):
    stack = encoder(activation=activation)
    stack.eval()
    expected = decoded("plain", stack, prefix, biased)
    calls, step = [], fused.decoding_step
    monkeypatch.setattr(fused, "decoding_step", lambda *arguments: calls.append(1) or step(*arguments))
    for threads in (1, 2):
        monkeypatch.setattr(fused, "threads", lambda threads=threads: threads)
        monkeypatch.setattr(fused, "_pool", None)
        for got, wanted in zip(decoded("auto", stack, prefix, biased), expected):
            np.testing.assert_allclose(got, wanted, atol=2e-6 * np.abs(wanted).max())
    assert len(calls) == 2 * 4 * 2
    if fused._pool is not None:
        fused._pool.shutdown()


def test_dropout_equals_the_plain_layer_with_the_same_masks(monkeypatch):
    keep = np.float32(0.7)
    stack, batch, length = encoder(dropout=0.3), 2, 5
    paddle.seed(11)
    masks = []
    for _ in range(2):
        attention, hidden = fused.draw_seeds()
        for seed, shape in ((attention, (batch, HEADS, length, length)), (hidden, (batch, length, HIDDEN)),
                            (hidden ^ 0x5DEECE66D, (batch, length, HIDDEN))):
            values = [compiled.kept_share(position, seed, keep) for position in range(int(np.prod(shape)))]
            masks.append(paddle.to_tensor(np.array(values, np.float32).reshape(shape)))
    assert 0.6 < np.mean([float((m > 0).astype("float32").mean()) for m in masks]) < 0.8
    paddle.seed(11)
    got = run("auto", stack, visibility(batch, length), batch=batch, length=length)
    monkeypatch.setattr(F, "dropout", lambda x, p, training: x * masks.pop(0))
    check_equal(got, run("plain", stack, visibility(batch, length), batch=batch, length=length))
    assert not masks


def test_dropout_follows_the_seed_and_is_off_in_evaluation():
    stack = encoder(dropout=0.3)
    outputs = []
    for seed in (1, 1, 2):
        paddle.seed(seed)
        outputs.append(run("auto", stack)["out"])
    assert np.array_equal(outputs[0], outputs[1]) and not np.array_equal(outputs[0], outputs[2])
    stack.eval()
    check_equal(run("auto", stack), run("plain", stack))


def test_dropout_keeps_the_share_it_should_whatever_the_seed():
    for seed in (0, 1, 2 ** 40 + 7):
        kept = np.array([compiled.kept_share(position, seed, np.float32(0.9)) for position in range(20000)])
        assert set(np.unique(kept)) == {np.float32(0), np.float32(1) / np.float32(0.9)}
        assert abs((kept > 0).mean() - 0.9) < 0.01
        assert abs(np.corrcoef(kept[1:], kept[:-1])[0, 1]) < 0.03


@pytest.mark.skipif(paddle.__version__.startswith("2."), reason="Paddle 2.6.2 cannot recompute on CPU")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_layers_have_the_same_gradients_bit_for_bit(dropout):
    stack, mask = encoder(dropout=dropout), visibility(3, 7)
    paddle.seed(4)
    kept = run("auto", stack, mask)
    stack.recompute = True
    paddle.seed(4)
    again = run("auto", stack, mask)
    assert kept.keys() == again.keys()
    assert all(np.array_equal(kept[name], again[name]) for name in kept)


def test_frozen_parameters_get_no_gradient_and_the_others_the_same():
    stack = encoder()
    expected = run("plain", stack)
    frozen = [p for p in stack.parameters() if "layer_0" in p.name]
    for p in frozen:
        p.stop_gradient = True
    got = run("auto", stack)
    assert not any(p.name in got for p in frozen)
    check_equal(got, {name: value for name, value in expected.items() if name in got})


def test_states_without_gradient_still_train_the_parameters():
    stack = encoder()
    states = paddle.to_tensor(np.random.RandomState(0).randn(2, 5, HIDDEN).astype("float32"))
    gradients = []
    for kind in ("auto", "plain"):
        fused.choose(kind)
        stack(states).square().mean().backward()
        gradients.append({p.name: p.grad.numpy() for p in stack.parameters() if "key_fc.b" not in p.name})
        clear(stack)
    check_equal(*gradients)


def test_strided_inputs_and_gradients_are_read_in_their_order():
    stack, results = encoder(), []
    for kind in ("auto", "plain"):
        fused.choose(kind)
        whole = paddle.to_tensor(np.random.RandomState(2).randn(7, 3, HIDDEN).astype("float32"), stop_gradient=False)
        out = stack(whole.transpose([1, 0, 2]))
        (out.transpose([2, 1, 0]) ** 2).sum().backward()
        results.append({"out": out.numpy(), "states": whole.grad.numpy()})
    check_equal(*results)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(value):
    states = np.ones((2, 5, HIDDEN), "float32")
    states[0, 2, 3] = value
    with paddle.no_grad():
        out = encoder(pre_norm=True)(paddle.to_tensor(states)).numpy()
    assert not np.isfinite(out[0]).all() and np.isfinite(out[1]).all()


def test_extreme_numbers_have_the_same_activations():
    for x in (-1e30, -100.0, -6.0, -1e-3, 0.0, 1e-30, 0.5, 3.0, 5.6, 100.0, 1e30):
        expected = float(F.gelu(paddle.to_tensor([x], dtype="float32")))
        assert np.float32(x) * compiled.normal_cdf(np.float32(x)) == pytest.approx(expected, rel=1e-6, abs=2e-6)
    for x in np.linspace(-86, 80, 500, dtype="float32"):
        assert compiled.exponential(x) == pytest.approx(np.exp(np.float64(x)), rel=3e-7)


def test_a_traced_layer_and_the_plain_switch_do_not_use_it(used, monkeypatch):
    stack, states = encoder(), paddle.ones([2, 5, HIDDEN])
    monkeypatch.setenv("UNIMO2_KERNELS", "plain")
    stack(states)
    monkeypatch.delenv("UNIMO2_KERNELS")
    if paddle.__version__ >= "3":
        paddle.jit.to_static(stack, input_spec=[paddle.static.InputSpec([None, 5, HIDDEN])], full_graph=True)(states)
    assert used == []


def test_without_numba_the_layers_are_plain():
    code = ("import zlib, sys; sys.modules['numba'] = None; import paddle\n"
            "from unimo2_paddle.models import fused; assert fused.kernels() is None and not fused.applies(paddle.ones([2, 3, 4]))")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compiled_code_goes_where_it_can_be_written(monkeypatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    find_compile_cache()
    assert "NUMBA_CACHE_DIR" not in os.environ  # beside the source or, numba's own second choice, among the user's caches
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    find_compile_cache()
    assert os.environ["NUMBA_CACHE_DIR"].startswith(tempfile.gettempdir())
    monkeypatch.delenv("NUMBA_CACHE_DIR")
