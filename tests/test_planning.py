"""The plan of a step against the step itself: memory as Paddle counts it, parameters, operations, what is sent."""
import gc

import numpy as np
import paddle
import pytest

from unimo2_paddle import planning
from unimo2_paddle.config import load_run_config
from unimo2_paddle.errors import UserInputError
from unimo2_paddle.models.memory import encoder_memory, step_peak
from unimo2_paddle.models.transformer import Encoder
from unimo2_paddle.tasks.base import Shard, task_class, to_tensors
from unimo2_paddle.tasks.work import pretraining_passes, pretraining_work
from unimo2_paddle.training.optim import build_optimizer

COUNTED = hasattr(paddle.base.core, "host_memory_stat_reset_peak_value")
needs_counter = pytest.mark.skipif(not COUNTED, reason="this Paddle does not count the memory of the CPU")


def allocated():
    return paddle.base.core.host_memory_stat_current_value("Allocated", 0)


def peak_of(work):
    """The most bytes allocated while ``work()`` runs, over those before, and its result."""
    paddle.base.core.host_memory_stat_reset_peak_value("Allocated", 0)
    before = allocated()
    found = work()
    return paddle.base.core.host_memory_stat_peak_value("Allocated", 0) - before, found


@pytest.fixture
def plain_kernels(monkeypatch):
    """The plan is of the layers as they are written, which GPUs run; the fused CPU layers keep less."""
    monkeypatch.setenv("UNIMO2_KERNELS", "plain")


@needs_counter
@pytest.mark.parametrize("pre_norm, dropout, rows", [(False, 0.1, None), (True, 0.0, None), (False, 0.0, 2)])
def test_a_stack_keeps_what_is_planned(plain_kernels, pre_norm, dropout, rows):
    with paddle.utils.unique_name.guard():
        stack = Encoder("text", range(3), 64, 4, "gelu", dropout, dropout, 0.02, pre_norm=pre_norm)
    states, mask = paddle.randn([2, 50, 64]), paddle.ones([2, 50, 50])
    states.stop_gradient = False
    before = allocated()
    out = stack(states, mask, None if rows is None else paddle.arange(rows))
    kept = allocated() - before + 4 * states.size  # the plan counts the input too
    planned = encoder_memory(2, 50, 64, 4, 3, dropout, dropout, rows).kept
    assert planned == pytest.approx(kept, rel=0.03) and out.shape[1] == (rows or 50)


# larger than the tiny model, whose small tensors are no less than its large ones
LARGER = {"model.hidden_size": 64, "model.text_hidden_size": 64, "model.vit_hidden_size": 64, "model.image_size": 64, "model.position_grid": 4,
          "mixture.global_batch": {"pairs": 8, "images": 8, "texts": 8}}
CASES = {
    "pairs": {}, "recomputed": {"run.recompute": True, "model.num_hidden_layers": 5, "model.text_num_hidden_layers": 3, "model.vit_num_hidden_layers": 3},
    "texts": {"mixture.weights": {"texts": 1.0}}, "images": {"mixture.weights": {"images": 1.0}},
    "no dropout": {"model.hidden_dropout_prob": 0.0, "train.text_for_matching": "masked"},
}


@needs_counter
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_peak_of_a_training_step_is_within_15_percent_of_the_plan(plain_kernels, pretrain_config, changes):
    dropout = {f"model.{part}{kind}_dropout_prob": 0.1 for part in ("", "text_") for kind in ("hidden", "attention_probs")}
    config = load_run_config(pretrain_config({"mixture.weights": {"pairs": 1.0}, **LARGER, **dropout, **changes}))
    task = task_class("pretrain")(config)
    gc.collect()
    empty = allocated()
    model = task.build_model()
    model.train()
    model.set_recompute(config.run.recompute)
    optimizer = build_optimizer(model.parameters(), config.optim)
    batches = task.train_batches(Shard())

    def step():
        batch = next(batches)
        task.loss(model, to_tensors(batch))["loss"].backward()
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        return batch

    step()  # makes the optimizer's state
    standing = allocated() - empty
    peak, batch = peak_of(step)
    batches.close()
    parameters = int(sum(np.prod(p.shape) for p in model.parameters()))
    passes = pretraining_passes(model.config, batch, config.train)
    planned = step_peak(model.config, parameters, passes, config.run.recompute)
    kept_throughout = planned["parameters"] + planned["optimizer"]
    assert planned["peak"] - kept_throughout == pytest.approx(peak, rel=0.15)
    if batch["corpus"] == "pairs":  # other steps do not train every parameter
        assert kept_throughout == pytest.approx(standing, rel=0.05) and planned["peak"] == pytest.approx(standing + peak, rel=0.1)


def test_parameters_are_those_of_the_model(tiny_config):
    with paddle.utils.unique_name.guard():
        from unimo2_paddle import Unimo2Model

        expected = sum(int(np.prod(p.shape)) for p in Unimo2Model(tiny_config).parameters())
    assert planning.count_parameters(tiny_config) == expected


def test_operations_are_those_the_log_counts(pretrain_config):
    config = load_run_config(pretrain_config({"mixture.weights": {"pairs": 1.0}}))
    (step,), _ = planning.plan(config, 2, planning.Assumptions(words=20))
    batch = planning.example_batch(config, "pairs", 4, 20)
    assert step.samples == 4 and step.flops == pretraining_work(config.model.model_config(), batch, config.train)[1] > 0


def test_what_is_sent_grows_to_twice_the_gradients_and_sharding_adds_a_half(pretrain_config):
    config = load_run_config(pretrain_config({"mixture.weights": {"texts": 1.0}, "mixture.global_batch": {"texts": 64}}))
    one, two, many = (planning.plan(config, devices, planning.Assumptions())[0][0] for devices in (1, 2, 64))
    gradients = one.memory["gradients"]
    assert one.sent == 0 and one.memory["optimizer"] == 2 * gradients
    assert gradients < two.sent < 1.2 * gradients and 1.9 * gradients < many.sent < 2.3 * gradients
    config.run.sharding = 1
    sharded = planning.plan(config, 64, planning.Assumptions())[0][0]
    assert sharded.sent - many.sent == pytest.approx(gradients * 63 / 64) and sharded.memory["optimizer"] == pytest.approx(2 * gradients / 64)


def test_the_command_prints_a_row_per_corpus(unimo2, pretrain_config):
    outcome = unimo2("plan", "-c", pretrain_config(), "--devices", 2)
    assert outcome.status == 0, outcome.err
    assert [line.split()[:2] for line in outcome.out.splitlines()[2:5]] == [["pairs", "4"], ["images", "2"], ["texts", "4"]]


@pytest.mark.parametrize("arguments, told", [
    (("--devices", 3), "mixture.global_batch.pairs: 8 samples cannot be shared by 3 devices"),
    (("--devices", 0), "--devices: must be at least 1"),
    (("--utilisation", 0), "--utilisation: must be above 0"),
])
def test_what_cannot_be_planned_is_refused(unimo2, pretrain_config, arguments, told):
    outcome = unimo2("plan", "-c", pretrain_config(), *arguments)
    assert outcome.status == 2 and told in outcome.err


def test_another_task_is_refused():
    class Config:
        task = "glue"

    with pytest.raises(UserInputError, match="the config's task is glue"):
        planning.plan(Config, 1, planning.Assumptions())
