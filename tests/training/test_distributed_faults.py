"""A worker that is killed, that never comes, that computes something else: the others notice, say so, and the run goes on."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from unimo2_paddle.cli import main

ROOT = Path(__file__).resolve().parents[2]

# Python imports this before anything else in every process of a run: it is how a test reaches into one worker.
KILL_ONCE = """
import os, threading, time
def wait(path="{path}", marker="{marker}"):
    while not os.path.exists(path):
        time.sleep(0.02)
    if not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), 9)
if os.environ.get("PADDLE_TRAINER_ID") == "1":
    threading.Thread(target=wait, daemon=True).start()
"""
NEVER_ARRIVE = """
import os, time
if os.environ.get("PADDLE_TRAINER_ID") == "1":
    time.sleep(600)
"""
DISAGREE = """
import numpy as np
import paddle
from unimo2_paddle.errors import Unimo2Error
from unimo2_paddle.training import distributed, sharding
shard = distributed.start(timeout=60)
layer = paddle.nn.Linear(2, 2, weight_attr=paddle.ParamAttr(name="w", initializer=paddle.nn.initializer.Constant(1.0)),
                         bias_attr=paddle.ParamAttr(name="b"))
assert distributed.any_worker(shard.rank == 1, shard) is True and distributed.any_worker(False, shard) is False
if shard.rank == 1:
    layer.weight.grad = paddle.ones([2, 2])
assert [p.name for p in sharding.with_gradient(layer.parameters())] == ["w"]
distributed.check_identical(layer.parameters(), shard, 6)
layer.weight.set_value(np.full([2, 2], 1.0 + shard.rank * 2.0 ** -23, "float32"))
distributed.check_identical([layer.bias], shard, 7)
try:
    distributed.check_identical(layer.parameters(), shard, 7)
except Unimo2Error as error:
    print(shard.rank, error, flush=True)
distributed.barrier(shard)
distributed.leave()
"""


def run_to_end(command, directory, intrusion=""):
    """(exit status, everything that was printed, the workers' logs) of a launch with a ``sitecustomize`` in all its processes."""
    (directory / "site").mkdir(exist_ok=True)
    (directory / "site" / "sitecustomize.py").write_text(intrusion)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PADDLE_", "FLAGS_"))}
    environment.update(OMP_NUM_THREADS="1", PYTHONPATH=f"{directory / 'site'}:{ROOT}", PYTHON=sys.executable, WORKERS="2")
    process = subprocess.Popen(list(map(str, command)), env=environment, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    return process.returncode, output, {path.name: path.read_text(errors="replace") for path in (directory / "log").glob("workerlog.*")}


@pytest.fixture
def config(tiny_pretrain, tmp_path):
    values = tiny_pretrain(tmp_path / "run")
    values["run"].update(save_every=2, worker_timeout=60)
    values["data"]["num_workers"] = 1
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


LAUNCH = ["bash", ROOT / "tools" / "launch.sh"]


def test_a_killed_worker_ends_the_launch_and_a_retry_finishes_the_run(config, tmp_path):
    # more than one retry: on a busy machine gloo sometimes cannot connect at a start
    intrusion = KILL_ONCE.format(path=tmp_path / "run" / "checkpoints" / "step-000002" / "manifest.json", marker=tmp_path / "killed")
    status, output, _ = run_to_end([*LAUNCH, "--retries", 3, config], tmp_path, intrusion)
    assert status == 0, output[-3000:]
    assert (tmp_path / "killed").exists() and "starting again with --resume auto (retry 1 of 3)" in output
    assert "resumed from" in output and "done: model in" in output
    assert main(["train", "-c", str(config), "-o", f"run.output={tmp_path / 'straight'}"]) == 0
    one, two = (load_file(run / "best" / "model.safetensors") for run in (tmp_path / "straight", tmp_path / "run"))
    assert max(float(np.abs(one[name] - two[name]).max()) for name in one) <= 1e-5


def test_a_worker_that_never_arrives_is_named_and_the_launch_ends(config, tmp_path):
    status, output, logs = run_to_end([*LAUNCH, config, "-o", "run.worker_timeout=2"], tmp_path, NEVER_ARRIVE)
    assert status == 1
    assert "did not arrive within 2 s" in logs["workerlog.0"] and "unimo2 train: worker 1 (" in logs["workerlog.0"]
    assert output.splitlines()[-1].endswith("-o run.worker_timeout=2 --resume auto")
    assert not (tmp_path / "run").exists()


def test_weights_that_differ_on_one_worker_are_found_with_their_name(tmp_path):
    (tmp_path / "disagree.py").write_text(DISAGREE)
    status, output, logs = run_to_end([sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", 2, "disagree.py"], tmp_path)
    assert status == 0, output[-3000:]
    for rank in range(2):
        (line,) = [line for line in logs[f"workerlog.{rank}"].splitlines() if line.startswith(f"{rank} ")]
        assert line.startswith(f"{rank} step 7: the workers no longer have the same weights: worker 1 differs in w (of 2 parameters)")


@pytest.mark.slow
def test_the_death_of_a_worker_is_told_in_the_logs_of_the_others(config, tmp_path):
    intrusion = KILL_ONCE.format(path=tmp_path / "run" / "checkpoints" / "step-000002" / "manifest.json", marker=tmp_path / "killed")
    status, output, logs = run_to_end([*LAUNCH, config, "-o", "train.steps=2000"], tmp_path, intrusion)
    assert status == 1 and "worker 1 (" in logs["workerlog.0"] and "has died" in logs["workerlog.0"]
    assert "Resume with:" in output.splitlines()[-1]
    assert json.loads((tmp_path / "run" / "checkpoints" / "step-000002" / "state.json").read_text())["step"] == 2
