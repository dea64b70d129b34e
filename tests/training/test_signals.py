"""SIGTERM and SIGINT: the step is finished, everything is saved, and the resumed run equals the uninterrupted one."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unimo2_paddle.tasks.pretrain import PretrainTask
from unimo2_paddle.training.signals import REPEATS, StopSignals

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def signal_at(monkeypatch):
    """A function: the next run gets a signal while it computes the loss of a step (counted from 1)."""

    def arrange(step, number):
        calls, plain = [], PretrainTask.loss

        def loss(self, model, batch):
            calls.append(batch)
            if len(calls) == step:
                os.kill(os.getpid(), number)
            return plain(self, model, batch)

        monkeypatch.setattr(PretrainTask, "loss", loss)

    return arrange


def state(run, step):
    return {p.name: p.read_bytes() for p in (run / "checkpoints" / f"step-{step:06d}").iterdir()}


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_a_saved_step_and_resuming_equals_the_straight_run(
        pretrain_config, unimo2, signal_at, tmp_path, number, status):
    straight = pretrain_config({"run.output": str(tmp_path / "straight")}, "straight.yaml")
    assert unimo2("train", "-c", straight).status == 0
    path, run, name = pretrain_config(), tmp_path / "run", signal.Signals(number).name
    before = signal.getsignal(number)
    signal_at(3, number)
    outcome = unimo2("train", "-c", path)
    assert outcome.status == status
    assert signal.getsignal(number) is before
    assert f"stopped by {name} after step 3 of 6" in outcome.out
    assert f"unimo2 train -c {run / 'config.yaml'} --resume auto" in outcome.out
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000003"]
    assert re.search(r"epoch \d+, step 3/6", (run / "train.log").read_text())
    assert unimo2("train", "-c", run / "config.yaml", "--resume", "auto").status == 0
    assert state(run, 6) == state(tmp_path / "straight", 6)


def test_an_evaluation_that_was_due_when_the_signal_came_runs_after_resuming(pretrain_config, unimo2, signal_at, demo_data, tmp_path):
    judged = {"eval.annotations": str(demo_data / "retrieval" / "dataset_shapes.json"), "eval.images": str(demo_data / "retrieval" / "images"),
              "eval.max_images": 4, "eval.captions_per_image": 1, "eval.every_steps": 3}
    straight = pretrain_config({**judged, "run.output": str(tmp_path / "straight")}, "straight.yaml")
    assert unimo2("train", "-c", straight).status == 0
    path, run = pretrain_config(judged), tmp_path / "run"
    signal_at(3, signal.SIGTERM)
    assert unimo2("train", "-c", path).status == 0
    assert not (run / "best").exists(), "stopping does not wait for an evaluation"
    assert unimo2("train", "-c", path, "--resume", "auto").status == 0
    assert state(run, 6) == state(tmp_path / "straight", 6)
    assert (run / "best" / "model.safetensors").read_bytes() == (tmp_path / "straight" / "best" / "model.safetensors").read_bytes()


def test_a_signal_in_the_last_step_leaves_only_the_evaluation_to_do(pretrain_config, unimo2, signal_at, demo_data, tmp_path):
    path = pretrain_config({"eval.annotations": str(demo_data / "retrieval" / "dataset_shapes.json"), "eval.max_images": 4,
                            "eval.images": str(demo_data / "retrieval" / "images"), "eval.captions_per_image": 1})
    signal_at(6, signal.SIGTERM)
    assert unimo2("train", "-c", path).status == 0
    outcome = unimo2("train", "-c", path, "--resume", "auto")
    assert outcome.status == 0 and "best val/recall_mean" in outcome.out
    assert not re.search(rb'"unjudged": true', state(tmp_path / "run", 6)["state.json"])


def test_data_workers_do_not_mind_a_signal_to_the_whole_process_group(pretrain_config, tmp_path):
    path = pretrain_config({"data.num_workers": 2, "train.steps": 4000, "optim.schedule": "constant"})
    process = subprocess.Popen([sys.executable, str(ROOT / "tools" / "train.py"), "-c", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        for line in process.stdout:
            if ", step 3/" in line:
                os.killpg(process.pid, signal.SIGTERM)
                break
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "stopped by SIGTERM after step" in output
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


STUBBORN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from unimo2_paddle.training.signals import StopSignals
with StopSignals() as signals:
    print("ready", flush=True)
    # every signal wakes a sleep, the next keeps the main thread away from its handlers, as a collective that waits for a lost worker
    import ctypes
    for _ in range(9):
        ctypes.CDLL(None).sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once_and_the_launchers_repeats_are_one_request(number):
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        for _ in range(3):
            process.send_signal(number)
            time.sleep(0.1)
        assert process.poll() is None
        time.sleep(REPEATS)
        process.send_signal(number)
        assert process.wait(timeout=30) == 128 + number
        assert process.stderr.read().count("a second signal ends the run at once") == 1
    finally:
        process.kill()
        process.communicate()


def test_nothing_remains_of_the_signal_handling():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    descriptors = len(os.listdir("/proc/self/fd"))
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGTERM"
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.set_wakeup_fd(-1) == -1
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.slow
def test_a_signal_to_one_worker_stops_all_of_them_after_the_same_saved_step(pretrain_config, tmp_path):
    path, run = pretrain_config({"train.steps": 4000, "optim.schedule": "constant", "run.log_every": 1}), tmp_path / "run"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PADDLE_", "FLAGS_"))}
    command = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--log_dir", str(tmp_path / "logs"),
               str(ROOT / "tools" / "train.py"), "-c", path]
    process = subprocess.Popen(command, env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        for line in process.stdout:
            if ", step 3/" in line:
                break
        first = json.loads((run / "status.json").read_text())["pid"]
        os.kill(first, signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
        output += "".join(p.read_text() for p in (tmp_path / "logs").glob("workerlog.*"))
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    assert process.returncode == 0, output[-3000:]
    step = int(re.search(r"stopped by SIGTERM after step (\d+) of 4000", output)[1])
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{step:06d}"]
    state = json.loads((run / "checkpoints" / f"step-{step:06d}" / "state.json").read_text())
    assert state["step"] == step == state["data"]["step"]
