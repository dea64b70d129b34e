"""A run's checks of itself: steps that are not finite, parameters without gradient, the trial checkpoint."""
import json
import shutil
from collections import namedtuple

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from unimo2_paddle.checkpoints import store
from unimo2_paddle.errors import CheckpointError, TrainingError
from unimo2_paddle.tasks.pretrain import PretrainTask
from unimo2_paddle.training.sanity import FIRST_STEPS, BadSteps, GradientCoverage, StepWitness, gradient_norms, summary, trial_save


@pytest.fixture
def spoil(monkeypatch):
    """A function: from now on the losses of these steps (counted from 1) are spoilt, "loss" itself or only its gradient."""

    def arrange(steps, what):
        calls, plain = [], PretrainTask.loss

        def loss(self, model, batch):
            calls.append(batch["corpus"])
            terms = plain(self, model, batch)
            if len(calls) in steps:
                terms["loss"] = terms["loss"] * float("nan") if what == "loss" else terms["loss"] + (model.contrastive_temperature * 0).sqrt().sum()
            return terms

        monkeypatch.setattr(PretrainTask, "loss", loss)
        return calls

    return arrange


def weights(run, step):
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_step_is_skipped_without_any_change_counted_and_written_down(pretrain_config, unimo2, spoil, tmp_path, what):
    path, run = pretrain_config({"run.skip_bad_steps": 2, "run.save_every": 1, "run.keep_last": 9, "mixture.weights": {"pairs": 1}}), tmp_path / "run"
    spoil({3}, what)
    assert unimo2("train", "-c", path).status == 0
    before, after = weights(run, 2), weights(run, 3)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert (run / "checkpoints" / "step-000002" / "optimizer.safetensors").read_bytes() == \
        (run / "checkpoints" / "step-000003" / "optimizer.safetensors").read_bytes()
    assert any(not np.array_equal(after[name], value) for name, value in weights(run, 4).items()), "training goes on"
    (dump,) = (run / "bad_steps").iterdir()
    facts = json.loads(dump.read_text())
    assert dump.name == "step-2.json" and facts["step"] == 2
    (micro,) = facts["micro_batches"]
    assert micro["corpus"] == "pairs" and len(set(micro["keys"])) == 8 and all(".tar:" in key for key in micro["keys"])
    assert facts["arrays"]["image"]["shape"] == [8, 32, 32, 3] and facts["arrays"]["image"]["not_finite"] == 0
    assert (micro["losses"]["loss"] == "nan") == (what == "loss")
    assert "cmcl_temperature" in facts["gradients_not_finite"]
    assert (what == "loss") == (len(facts["gradients_not_finite"]) > 1)
    log = (run / "train.log").read_text()
    assert "warning: step 2: " in log and "skipped, 1 of 2" in log
    assert [r["step"] for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())] == [1, 2, 4, 5, 6], "its nan is in no mean"
    assert json.loads((run / "checkpoints" / "step-000006" / "state.json").read_text())["bad_steps"] == 1


def test_the_limit_counts_over_the_whole_run_also_after_resuming(pretrain_config, unimo2, spoil, tmp_path):
    path, run = pretrain_config({"run.skip_bad_steps": 1, "run.save_every": 1, "run.keep_last": 9}), tmp_path / "run"
    spoil({2, 4}, "loss")
    outcome = unimo2("train", "-c", path)
    assert outcome.status == 1
    assert "step 3: the loss is nan" in outcome.err and "(1 such steps were skipped before, run.skip_bad_steps allows no more)" in outcome.err
    assert str(run / "bad_steps" / "step-3.json") in outcome.err
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000001", "step-000002", "step-000003"]
    spoil({1}, "loss")
    assert unimo2("train", "-c", path, "--resume", "auto").status == 1


def test_without_a_limit_the_first_bad_gradient_ends_the_run(pretrain_config, unimo2, spoil, tmp_path):
    spoil({2}, "gradient")
    outcome = unimo2("train", "-c", pretrain_config())
    assert outcome.status == 1 and "step 1: 1 gradients are not finite (cmcl_temperature)" in outcome.err


def test_a_bad_step_of_another_worker_is_named_as_such(tmp_path):
    bad, witness = BadSteps(str(tmp_path), 1, rank=1), StepWitness()
    witness.take({"corpus": "texts", "keys": ["a"], "input_ids": np.zeros([1, 2])}, {"loss": 1.0})
    assert "another worker's gradients are not finite; skipped, 1 of 1" in bad.note(7, {"loss": 1.0}, {"p": 2.0}, witness)
    assert (tmp_path / "step-7.worker-1.json").is_file()
    with pytest.raises(TrainingError, match="step 8"):
        bad.note(8, {"loss": 1.0}, {"p": 2.0}, witness)


def test_the_arrays_written_down_are_those_of_the_first_bad_micro_batch():
    witness = StepWitness()
    for number, loss in enumerate([1.0, float("inf"), float("nan")]):
        witness.take({"keys": [f"r{number}"], "x": np.full([2], float(number))}, {"loss": loss})
    facts = witness.facts()
    assert facts["arrays_of_micro_batch"] == 1 and facts["arrays"]["x"]["mean"] == 1.0
    assert [m["keys"] for m in facts["micro_batches"]] == [["r0"], ["r1"], ["r2"]]
    json.loads(json.dumps(facts, allow_nan=False))


def test_a_summary_survives_values_that_are_not_finite_and_empty_arrays():
    assert summary(np.array([1.0, np.nan, 3.0, np.inf])) == {"shape": [4], "dtype": "float64", "not_finite": 2, "min": 1.0, "max": 3.0, "mean": 2.0}
    assert summary(np.zeros([0, 3], "int64")) == {"shape": [0, 3], "dtype": "int64"}
    assert summary(paddle.to_tensor([True, False]))["mean"] == 0.5


def test_gradient_norms_are_those_of_numpy_without_the_loss_scale():
    layer = paddle.nn.Linear(3, 2)
    (layer(paddle.ones([4, 3])).square().sum() * 8.0).backward()
    norms = gradient_norms(layer.parameters() + paddle.nn.Linear(2, 2).parameters(), scale=8.0)
    assert norms == pytest.approx({p.name: float(np.linalg.norm(p.grad.numpy())) / 8 for p in layer.parameters()})


Parameter = namedtuple("Parameter", "name stop_gradient")


def test_a_parameter_no_kind_of_step_trains_is_reported_once_all_kinds_were_seen():
    coverage = GradientCoverage([Parameter(name, name == "frozen") for name in ("a", "b", "c", "zero", "frozen")], ["pairs", "texts"])
    for _ in range(FIRST_STEPS + 2):
        assert coverage.note("pairs", {"a": 1.0, "zero": 0.0}) is None, "the other kind may still train it"
    for _ in range(FIRST_STEPS - 1):
        assert coverage.note("texts", {"b": 1.0}) is None
    text = coverage.note("texts", {"b": 1.0})
    assert "2 of 4 trainable parameters got no gradient in the first steps (pairs, texts)" in text and text.endswith("c, zero")
    assert coverage.note("texts", {}) is None


def test_a_run_names_what_its_corpora_do_not_train(pretrain_config, unimo2, tmp_path):
    assert unimo2("train", "-c", pretrain_config({"mixture.weights": {"texts": 1}})).status == 0
    (line,) = [line for line in (tmp_path / "run" / "train.log").read_text().splitlines() if "got no gradient" in line]
    assert "vit.cls_token_embeddings" in line or "more" in line
    assert unimo2("train", "-c", pretrain_config({"run.output": str(tmp_path / "pairs"), "mixture.weights": {"pairs": 1}})).status == 0
    line = [line for line in (tmp_path / "pairs" / "train.log").read_text().splitlines() if "got no gradient" in line]
    assert not any("vit." in part for part in line)


def test_the_trial_checkpoint_changes_nothing_and_leaves_nothing(pretrain_config, unimo2, tmp_path):
    for name, trial in (("with", True), ("without", False)):
        assert unimo2("train", "-c", pretrain_config({"run.output": str(tmp_path / name), "run.trial_save": trial}, f"{name}.yaml")).status == 0
    first, second = (load_file(tmp_path / name / "checkpoints" / "step-000006" / "model.safetensors") for name in ("with", "without"))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not (tmp_path / "with" / ".trial").exists()


def test_a_checkpoint_that_cannot_be_written_stops_the_run_before_its_first_step(pretrain_config, unimo2, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_safetensors", full)
    outcome = unimo2("train", "-c", pretrain_config())
    assert outcome.status == 2 and "cannot write the checkpoint" in outcome.err and "No space left on device" in outcome.err
    assert not (tmp_path / "run" / "train.log").exists() and not (tmp_path / "run" / ".trial").exists()
    monkeypatch.undo()
    assert unimo2("train", "-c", pretrain_config()).status == 0, "the directory is not taken by a run that never began"


class _Model:
    def __init__(self):
        self.config = self

    def parameters(self):
        return [self.weight]

    def to_dict(self):
        return {}


def test_a_disk_that_loses_data_or_is_nearly_full_is_found_by_the_trial(monkeypatch, tmp_path):
    layer = paddle.nn.Linear(2, 2)
    model = _Model()
    model.parameters = layer.parameters
    optimizer = paddle.optimizer.AdamW(parameters=layer.parameters())

    def save(directory):
        return store.save_checkpoint(directory, 0, model, optimizer, {"step": 0, "data": None, "best": None})

    assert trial_save(str(tmp_path), save, model, lambda directory: None) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(100))
    assert "make room or lower run.keep_last" in trial_save(str(tmp_path), save, model, lambda directory: None)

    def lossy(directory):
        path = save(directory)
        layer.weight.set_value(layer.weight + 1)
        return path

    with pytest.raises(CheckpointError, match="reads back differently"):
        trial_save(str(tmp_path), lossy, model, lambda directory: None)
    assert list(tmp_path.iterdir()) == []
