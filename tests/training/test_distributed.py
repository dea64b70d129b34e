"""What workers check about each other, and half precision as far as a CPU can show it."""
import json

import numpy as np
import paddle
import pytest

from unimo2_paddle.checkpoints import store
from unimo2_paddle.checkpoints.released import assign_parameters, match_parameters, parameter_arrays
from unimo2_paddle.config import load_run_config
from unimo2_paddle.errors import TrainingError, UserInputError
from unimo2_paddle.tasks.base import Shard
from unimo2_paddle.training import distributed, precision
from unimo2_paddle.training.precision import Precision

NAMES = ["text.word_embedding", "vit.cls", "pooler.w", "pooler.b", "mlm_bias"]


def test_workers_that_agree_are_in_order():
    assert distributed.describe_differences(NAMES, np.tile(np.arange(5), (4, 1))) == ""


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_worker_and_the_parameters_that_differ_are_named(rank):
    digests = np.tile(np.arange(5), (4, 1))
    digests[rank, 2] = 77
    assert distributed.describe_differences(NAMES, digests) == f"worker {rank} differs in pooler.w (of 5 parameters)"
    digests[rank] += 100
    assert distributed.describe_differences(NAMES, digests) == f"worker {rank} differs in text.word_embedding, vit.cls, pooler.w and 2 more (of 5 parameters)"


def test_a_majority_decides_against_the_first_worker():
    digests = np.tile(np.arange(5), (3, 1))
    digests[0, 1] = 9
    assert distributed.describe_differences(NAMES, digests).startswith("worker 0 differs in vit.cls")


def test_two_workers_that_disagree_are_both_told_about_the_second():
    assert distributed.describe_differences(NAMES, [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]) == "worker 1 differs in mlm_bias (of 5 parameters)"


def test_one_process_has_nobody_to_agree_with():
    alone, parameters = Shard(), [paddle.ones([2])]
    assert distributed.any_worker(True, alone) is True and distributed.any_worker(0, alone) is False
    distributed.check_identical(parameters, alone, 1)
    distributed.collect_state(object())
    distributed.leave()


class HalfPrecisionOptimizer:
    """The state of Paddle's AdamW over one bfloat16 and one float32 parameter, as it names things on a GPU."""

    _beta1, _beta2 = 0.9, 0.98

    def state_dict(self):
        state = {f"{name}_{kind}_0": paddle.full([2], 0.25) for name in ("w_fp32_master_0", "b") for kind in ("moment1", "moment2")}
        state.update({f"{name}_{kind}_pow_acc_0": paddle.full([1], 0.5) for name in ("w_fp32_master_0", "b") for kind in ("beta1", "beta2")})
        return {**state, "master_weights": {"w": paddle.full([2], 1.0 + 2.0 ** -20)}}


def test_float32_copies_of_half_precision_parameters_are_saved_and_loaded_with_the_optimizer():
    arrays = store.optimizer_arrays(HalfPrecisionOptimizer())
    kinds = ("moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc")
    assert set(arrays) == {f"{name}|{kind}" for name in "wb" for kind in kinds} | {"w|master"}
    state, first = store.optimizer_state(arrays), HalfPrecisionOptimizer().state_dict()
    assert state.keys() == first.keys() and (state["master_weights"]["w"] == first["master_weights"]["w"]).all()
    assert {store.parameter_of(key) for key in state} == {"w", "b", None}


def test_a_model_in_bfloat16_is_saved_in_float32_and_read_back_as_it_was():
    with paddle.utils.unique_name.guard():
        layer = paddle.nn.Linear(3, 3)
    layer.to(dtype="bfloat16")
    arrays = parameter_arrays(layer)
    assert all(array.dtype == np.float32 for array in arrays.values())
    before = layer.weight.astype("float32").numpy()
    assign_parameters(layer, {name: array * 2 for name, array in arrays.items()})
    assert layer.weight.dtype == paddle.bfloat16 and np.array_equal(layer.weight.astype("float32").numpy(), before * 2)
    assert match_parameters(layer, {name: (a.shape, a.dtype) for name, a in arrays.items()}, "memory").missing == []


@pytest.mark.parametrize("change, complaint", [
    ("run.amp=O1", "run.amp=O1: Paddle trains in half precision on GPU only"), ("run.amp=O2", "set run.amp=off, or train on a GPU"),
    ("run.sharding=2", "run.sharding=2: sharded gradients and parameters are not available"), ("run.sharding=3", "use run.sharding=1"),
    ("run.sharding=4", "run.sharding: 4 is not one of 0, 1, 2, 3"), ("run.amp=true", "run.amp: 'true' is not one of off, O1, O2"),
    ("run.amp_dtype=float8", "run.amp_dtype: 'float8' is not one of bfloat16, float16"), ("run.worker_timeout=0", "worker_timeout: must be at least 1"),
    ("run.check_workers_every=-1", "check_workers_every: must be at least 0"),
])
@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="a GPU has half precision")
def test_what_a_cpu_cannot_do_is_refused_before_anything_is_written(pretrain_config, unimo2, tmp_path, change, complaint):
    outcome = unimo2("train", "-c", pretrain_config(), "-o", change)
    assert outcome.status == 2 and complaint in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_bare_off_in_yaml_means_off(pretrain_config, tmp_path):
    path = pretrain_config()
    with open(path, "a", encoding="utf-8") as file:
        file.write("# the last group is run\n")
    text = (tmp_path / "run.yaml").read_text().replace("run:\n", "run:\n  amp: off\n")
    (tmp_path / "run.yaml").write_text(text)
    config = load_run_config(path)
    assert config.run.amp == "off"
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_run_config(tmp_path / "again.yaml").resolved() == config.resolved()


class FakeScaler:
    """Dynamic loss scaling over a list of what each step's gradients are: finite or not. The interface of ``paddle.amp.GradScaler``."""

    def __init__(self, finite, scale=4.0):
        self.finite, self.taken = list(finite), 0
        self.state = {"scale": np.array([scale], "float32"), "incr_ratio": 2.0, "decr_ratio": 0.5, "incr_every_n_steps": 3, "decr_every_n_nan_or_inf": 1,
                      "incr_count": 0, "decr_count": 0, "use_dynamic_loss_scaling": True}

    def scale(self, loss):
        return loss * float(self.state["scale"][0])

    def step(self, optimizer):
        self.good = self.finite.pop(0)
        self.taken += self.good

    def update(self):
        state = self.state
        if not self.good:
            state.update(incr_count=0, scale=np.maximum(state["scale"] * state["decr_ratio"], 1).astype("float32"))
        elif state["incr_count"] + 1 == state["incr_every_n_steps"]:
            state.update(incr_count=0, scale=state["scale"] * 2)
        else:
            state["incr_count"] += 1

    def state_dict(self):
        return dict(self.state)

    def load_state_dict(self, state):
        assert isinstance(state["scale"], np.ndarray) and set(state) == set(self.state)
        self.state = dict(state)


def test_a_step_that_overflows_is_left_out_and_counted():
    half = Precision(scaler=FakeScaler([True, False, True, True, True, False, True]))
    taken, scales = [], []
    for _ in range(7):
        taken.append(half.step(None))
        scales.append(half.scale())
    assert taken == [True, False, True, True, True, False, True] and half.skipped == 2 and half.scaler.taken == 5
    assert scales == [4, 2, 2, 2, 4, 2, 2]


def test_the_loss_is_scaled_and_only_in_float16():
    assert float(Precision(scaler=FakeScaler([])).scaled(paddle.to_tensor(1.5))) == 6.0
    assert float(Precision().scaled(paddle.to_tensor(1.5))) == 1.5
    assert Precision().scale() == 1.0 and Precision().state_dict() is None


def test_gradients_that_overflow_at_the_lowest_scale_end_the_run():
    half = Precision(scaler=FakeScaler([False] * 4))
    assert [half.step(None) for _ in range(2)] == [False, False] and half.scale() == 1.0
    with pytest.raises(TrainingError, match="not finite even with a loss scale of 1.*optim.learning_rate"):
        half.step(None)


def test_a_resumed_scaler_goes_on_as_the_uninterrupted_one():
    fate = [True, False, True, True, False, True, True, True]
    straight = Precision(scaler=FakeScaler(fate))
    for _ in fate:
        straight.step(None)
    first, second = Precision(scaler=FakeScaler(fate[:4])), Precision(scaler=FakeScaler(fate[4:]))
    for _ in range(4):
        first.step(None)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(4):
        second.step(None)
    assert second.state_dict() == straight.state_dict()


def test_a_checkpoint_without_a_scale_and_a_run_without_one_fit():
    fresh = Precision(scaler=FakeScaler([]))
    fresh.load_state_dict(None)
    assert fresh.scale() == 4.0
    Precision().load_state_dict(fresh.state_dict())


@pytest.mark.filterwarnings("ignore:AmpScaler can only be enabled")
def test_only_float16_takes_paddles_dynamic_scaler(monkeypatch):
    monkeypatch.setattr(precision, "check_amp", lambda level, dtype: None)
    assert isinstance(Precision("O1", "float16").scaler, paddle.amp.GradScaler)
    assert Precision("O1", "bfloat16").scaler is None and Precision("off", "float16").scaler is None


def test_the_store_of_a_run_in_float32_says_that_there_is_no_scale(pretrain_config, unimo2, tmp_path):
    assert unimo2("train", "-c", pretrain_config({"train.steps": 1})).status == 0
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000001" / "state.json").read_text())
    assert state["scaler"] is None


def test_a_gpu_without_bfloat16_is_told_what_to_use(monkeypatch):
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(paddle.amp, "is_bfloat16_supported", lambda: False)
    with pytest.raises(UserInputError, match="run.amp_dtype=float16"):
        Precision("O1", "bfloat16")
