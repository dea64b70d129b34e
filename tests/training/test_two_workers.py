"""Two and four gloo workers compute what one process computes at the same global batch: data parallel, sharded, resumed."""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml
from safetensors.numpy import load_file

from unimo2_paddle.cli import main

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5
STEPS = 20


def launch(config, logs, *arguments, workers=2, timeout=300):
    """``python -m paddle.distributed.launch --nproc_per_node 2 tools/train.py ...``; returns (exit status, all output)."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PADDLE_", "FLAGS_"))}
    environment.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(workers), "--log_dir", str(logs),
               str(ROOT / "tools" / "train.py"), "-c", str(config), *map(str, arguments)]
    # a session of its own, so that everything it started ends with it; the launcher finds free ports by itself
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    return process.returncode, output + "".join(path.read_text(errors="replace") for path in sorted(Path(logs).glob("workerlog.*")))


class Pair:
    """The same run in one process and in two."""

    def __init__(self, directory, values, **changes):
        self.directory, self.one, self.two = directory, directory / "one", directory / "two"
        for group, part in changes.items():
            values[group].update(part)
        self.config = directory / "run.yaml"
        self.config.write_text(yaml.safe_dump(values), encoding="utf-8")
        assert main(["train", "-c", str(self.config), "-o", f"run.output={self.one}"]) == 0
        status, self.output = launch(self.config, directory / "logs", "-o", f"run.output={self.two}")
        assert status == 0, self.output[-3000:]


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "/" in key or key in ("step", "loss", "lr")} for line in lines]


def assert_equal_runs(first, second):
    assert len(losses(first)) == len(losses(second)) > 0
    for one, two in zip(losses(first), losses(second)):
        assert one.keys() == two.keys()
        for key in one:
            assert two[key] == pytest.approx(one[key], rel=3e-6, abs=TOLERANCE), (one["step"], key)  # the whole loss is above 10: float32 has 1e-6 there
    one, two = (load_file(run / "best" / "model.safetensors") for run in (first, second))
    assert one.keys() == two.keys()
    assert max(float(np.abs(one[name] - two[name]).max()) for name in one) <= TOLERANCE


@pytest.fixture(scope="module")
def pair(tiny_pretrain, tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    return Pair(directory, tiny_pretrain(directory / "run"), run={"save_every": 3}, mixture={"weights": {"pairs": 1, "images": 1, "texts": 1}},
                data={"view_augmentation": {"crop": 1.0, "jitter": 1.0}})


def test_two_workers_have_the_losses_and_weights_of_one(pair):
    corpora = {key.split("/")[0] for record in losses(pair.one) for key in record if "/" in key}
    assert corpora == {"pairs", "images", "texts"}
    assert_equal_runs(pair.one, pair.two)


@pytest.mark.slow
def test_two_workers_pretrain_unimo_as_one_does(tiny_unimo_pretrain, tmp_path):
    """Retrieved companions are gathered from all workers; masked words and regions are counted over all."""
    found = Pair(tmp_path, tiny_unimo_pretrain(tmp_path / "run"), mixture={"weights": {"pairs": 1, "images": 1, "texts": 1}},
                 train={"pairs": {"caption": 1.0}, "steps": 8})
    assert {key.split("/")[0] for record in losses(found.one) for key in record if "/" in key} == {"pairs", "images", "texts"}
    assert_equal_runs(found.one, found.two)


def test_only_the_first_worker_writes(pair):
    assert sorted(p.name for p in pair.two.iterdir()) == sorted(p.name for p in pair.one.iterdir())
    log = (pair.two / "train.log").read_text()
    assert log.count("2 worker(s)") == 1 and log.count("step 6/6") == 1
    second = (pair.directory / "logs" / "workerlog.1").read_text()
    assert "done: model in" in pair.output and "done: model in" not in second and "loss" not in second
    assert len(list((pair.two / "vdl").iterdir())) == 1


def test_one_worker_goes_on_with_the_checkpoint_of_two(pair, tmp_path):
    checkpoint = pair.two / "checkpoints" / "step-000003"
    assert main(["train", "-c", str(pair.config), "-o", f"run.output={tmp_path / 'resumed'}", "--resume", str(checkpoint)]) == 0
    assert [record["step"] for record in losses(tmp_path / "resumed")] == [4, 5, 6]
    one, two = (load_file(run / "best" / "model.safetensors") for run in (pair.two, tmp_path / "resumed"))
    assert max(float(np.abs(one[name] - two[name]).max()) for name in one) <= TOLERANCE


@pytest.mark.slow
def test_two_workers_resume_their_own_run_bit_for_bit(pair, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pair.two, run)
    shutil.rmtree(run / "checkpoints" / "step-000006")
    status, output = launch(pair.config, tmp_path / "logs", "-o", f"run.output={run}", "--resume", "auto")
    assert status == 0, output[-3000:]
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (run / "checkpoints" / "step-000006" / name).read_bytes() == (pair.two / "checkpoints" / "step-000006" / name).read_bytes()


@pytest.mark.slow
def test_every_objective_with_accumulation_recomputation_and_data_workers_is_equal_too(tiny_pretrain, tmp_path):
    made = Pair(tmp_path, tiny_pretrain(tmp_path / "run"), model={"with_grounding_mask": True, "with_cmcl_projection": True},
                train={"steps": 9, "accumulate": 2, "matching_group": 2, "pairs": {"caption": 0.5, "masked_grounding": 0.5},
                       "images": {"masked_grounding": 0.5}, "texts": {"seq2seq": 0.5}},
                mixture={"weights": {"pairs": 1, "images": 1, "texts": 1}}, run={"recompute": True}, data={"num_workers": 1})
    assert_equal_runs(made.one, made.two)


@pytest.mark.slow
@pytest.mark.skipif(paddle.__version__.startswith("2."), reason="run.graph needs Paddle 3")
def test_traced_encoders_are_equal_too(tiny_pretrain, tmp_path):
    made = Pair(tmp_path, tiny_pretrain(tmp_path / "run"), run={"graph": "to_static"}, mixture={"weights": {"pairs": 1, "images": 1, "texts": 1}})
    assert_equal_runs(made.one, made.two)


@pytest.mark.slow
def test_the_baseline_model_is_equal_too(tiny_pretrain, tmp_path):
    made = Pair(tmp_path, tiny_pretrain(tmp_path / "run"), model={"model_type": "baseline"})
    assert_equal_runs(made.one, made.two)


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_out_is_explained(tiny_pretrain, tmp_path):
    values = tiny_pretrain(tmp_path / "run")
    values["mixture"]["global_batch"]["pairs"] = 12
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    status, output = launch(config, tmp_path / "logs")
    assert status != 0
    assert "12 samples per micro-batch cannot be shared by 2 workers in groups of 4; use a multiple of 8" in output
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def run(tiny_pretrain, tmp_path_factory):
    """A run of 20 steps over all corpora in one process, and a function that trains it with several workers."""
    directory = tmp_path_factory.mktemp("equality")
    values = tiny_pretrain(directory / "one")
    values["train"].update(steps=STEPS, matching_group=2, accumulate=2)
    values["mixture"].update(weights={"pairs": 1, "images": 1, "texts": 1}, global_batch={"pairs": 16, "images": 8, "texts": 16})
    values["optim"]["weight_decay"] = 0.1
    values["run"].update(save_every=10, keep_last=9)
    config = directory / "run.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["train", "-c", str(config)]) == 0

    def train(name, workers, *arguments):
        status, output = launch(config, directory / f"logs-{name}", "-o", f"run.output={directory / name}", *arguments, workers=workers)
        assert status == 0, output[-3000:]
        return directory / name

    train.one, train.directory, train.config = directory / "one", directory, config
    return train


@pytest.fixture(scope="module")
def sharded(run):
    """The same run by two workers that share out the optimizer's state."""
    return run("sharded", 2, "-o", "run.sharding=1", "-o", "run.check_workers_every=5")


def same_files(first, second, step=STEPS):
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = (path / "checkpoints" / f"step-{step:06d}" / name for path in (first, second))
        assert one.read_bytes() == two.read_bytes(), name


def optimizer(path, step=STEPS):
    return load_file(path / "checkpoints" / f"step-{step:06d}" / "optimizer.safetensors")


def test_two_sharded_workers_have_the_losses_and_weights_of_one(run, sharded):
    corpora = {key.split("/")[0] for record in losses(sharded) for key in record if "/" in key}
    assert corpora == {"pairs", "images", "texts"}, "so in every step some parameters have no gradient"
    assert_equal_runs(run.one, sharded)


def test_the_saved_optimizer_is_whole_whatever_the_number_of_workers(run, sharded):
    one, spread = optimizer(run.one), optimizer(sharded)
    assert {name: array.shape for name, array in one.items()} == {name: array.shape for name, array in spread.items()}
    assert max(float(abs(one[name] - spread[name]).max()) for name in one) <= TOLERANCE


def test_one_process_goes_on_with_the_checkpoint_of_sharded_workers(run, sharded, tmp_path):
    checkpoint = sharded / "checkpoints" / "step-000010"
    assert main(["train", "-c", str(run.config), "-o", f"run.output={tmp_path / 'on'}", "--resume", str(checkpoint)]) == 0
    for name, array in optimizer(tmp_path / "on").items():
        assert abs(array - optimizer(sharded)[name]).max() <= TOLERANCE


def test_sharded_workers_resume_bit_for_bit(run, sharded):
    copy = run.directory / "resumed"
    shutil.copytree(sharded, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:06d}")
    run("resumed", 2, "-o", "run.sharding=1", "--resume", "auto")
    same_files(copy, sharded)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [0, 1])
def test_four_workers_have_the_losses_and_weights_of_one(run, sharding):
    assert_equal_runs(run.one, run(f"four{sharding}", 4, "-o", f"run.sharding={sharding}", "-o", "run.check_workers_every=20"))


@pytest.mark.slow
def test_two_workers_have_the_losses_and_weights_of_one_over_20_steps(run):
    assert_equal_runs(run.one, run("two", 2))


@pytest.mark.slow
def test_sharded_workers_recompute_too(run, sharded):
    assert_equal_runs(sharded, run("recomputed", 2, "-o", "run.sharding=1", "-o", "run.recompute=true"))
