"""The oneDNN engine against the stacks' own forward, for every set of inputs, and what it leaves behind."""
import numpy as np
import paddle
import pytest

from unimo2_paddle import Unimo2Model
from unimo2_paddle.errors import UserInputError
from unimo2_paddle.models import onednn
from unimo2_paddle.models.onednn import inference_engine
from unimo2_paddle.models.transformer import Encoder

PARTS = ("image_states", "text_states", "fused_image", "fused_grounded", "fused_text")
LENGTHS = (4, 7, 5)


@pytest.fixture
def model(tiny_config):
    """Random weights so large that states depend on everything they see."""
    with paddle.utils.unique_name.guard():
        made = Unimo2Model(tiny_config)
    rng = np.random.default_rng(1)
    for parameter in sorted(made.parameters(), key=lambda p: p.name):
        if not parameter.name.endswith(("temperature", "_scale")):
            parameter.set_value(rng.normal(0, 0.15, parameter.shape).astype("float32"))
    made.eval()
    return made


def pictures(count):
    return paddle.to_tensor(np.random.default_rng(2).uniform(-1, 1, (count, 32, 32, 3)).astype("float32"))


def texts(count):
    """Ids, positions and mask of texts of 4, 7 and 5 tokens."""
    valid = np.arange(max(LENGTHS)) < np.array(LENGTHS[:count])[:, None]
    ids = np.where(valid, np.random.default_rng(3).integers(5, 500, valid.shape), 1)
    positions = np.where(valid, np.arange(2, 2 + max(LENGTHS)), 1)
    return paddle.to_tensor(ids), paddle.to_tensor(positions), paddle.to_tensor(valid.astype("float32"))


def forward(model, layout="pair", count=3):
    with paddle.no_grad():
        return model(pictures(count), *texts(count), layout)


def differences(one, other):
    """Root mean square of the difference of every part, relative to the part."""
    pairs = [(getattr(one, part).numpy(), getattr(other, part).numpy()) for part in PARTS]
    return [float(np.sqrt(((a - b) ** 2).mean() / (a ** 2).mean())) for a, b in pairs]


@pytest.mark.parametrize("layout", ["pair", "caption"])
def test_float32_states_equal_those_of_the_dynamic_graph(model, layout):
    expected = forward(model, layout)
    with inference_engine(model, "fp32") as found:
        assert max(differences(forward(model, layout), expected)) < 1e-5
        assert max(differences(forward(model, layout, 2), forward(model, layout, 2))) == 0.0  # another batch size, the same program
    assert set(found) == {"vision", "text", "grounded_encoder"} and max(found.values()) < 1e-5


def test_only_the_first_rows_are_those_of_the_whole(model):
    whole = forward(model)
    mask = texts(3)[2]
    with paddle.no_grad(), inference_engine(model, "fp32"):
        rows = model.fuse(whole.image_states, whole.text_states, mask, first_only=True)
    np.testing.assert_allclose(rows.fused_text.numpy(), whole.fused_text[:, :1].numpy(), atol=2e-5)
    np.testing.assert_allclose(rows.fused_image.numpy(), whole.fused_image[:, :1].numpy(), atol=2e-5)


def test_bfloat16_states_are_near_those_of_float32(model):
    expected = forward(model).image_states.numpy()
    try:
        with inference_engine(model, "bf16") as found, paddle.no_grad():
            states = model.encode_image(pictures(3)).numpy()
    except UserInputError as error:
        pytest.skip(str(error))
    assert 0.0 < np.sqrt(((states - expected) ** 2).mean() / (expected ** 2).mean()) < 0.05
    assert 1e-5 < found["vision"] < 0.05


def test_training_gradients_and_a_model_afterwards_use_the_stacks_themselves(model, monkeypatch):
    monkeypatch.setattr(onednn, "_Program", lambda *_: pytest.fail("the engine was used"))
    image = pictures(2)
    with inference_engine(model, "fp32"):
        model.encode_image(image).sum().backward()
        model.train()
        with paddle.no_grad():
            model.encode_image(image)
        model.eval()
    forward(model)
    assert all("forward" not in layer.__dict__ for layer in model.sublayers() if isinstance(layer, Encoder))
    assert any(parameter.grad is not None for parameter in model.vision.parameters())


def test_an_engine_that_is_entered_again_keeps_its_programs(model, monkeypatch):
    engine = onednn.InferenceEngine(model, "fp32")
    with engine:
        first = forward(model)
    monkeypatch.setattr(onednn, "_Program", lambda *_: pytest.fail("a program was made anew"))
    with engine:
        assert max(differences(forward(model), first)) == 0.0


def test_states_that_are_wrong_are_not_used(model, monkeypatch):
    run = onednn._Program.run
    monkeypatch.setattr(onednn._Program, "run", lambda self, tensors: run(self, tensors) * 1.1)
    with pytest.raises(UserInputError, match="off by 10 %"), inference_engine(model, "fp32"):
        forward(model)
    forward(model)


def test_a_processor_that_ignores_bfloat16_is_told(model, monkeypatch):
    program = onednn._Program
    monkeypatch.setattr(onednn, "_Program", lambda encoder, hidden, inputs, precision: program(encoder, hidden, inputs, "fp32"))
    with pytest.raises(UserInputError, match="no bfloat16"), inference_engine(model, "bf16"):
        forward(model)


def test_an_unknown_precision_is_refused(model):
    with pytest.raises(UserInputError, match="'fp16' is not one of dynamic, fp32, bf16"), inference_engine(model, "fp16"):
        pass
