"""tools/launch.sh: what it starts, what it starts again, and what it says at the end. A stand-in for Python notes its arguments and fails as told."""
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from unimo2_paddle.config import load_run_config

ROOT = Path(__file__).resolve().parents[2]

# Arguments go to calls.txt; each call takes the next line of script.txt: the workers' statuses (a dash: killed), then its own.
STAND_IN = """#!/usr/bin/env bash
cd "$(dirname "$0")"
echo "$*" >> calls.txt
read -r own workers <<< "$(sed -n "$(wc -l < calls.txt)p" script.txt)"
rank=0
for status in $workers; do echo "${status/-/running}" > "$UNIMO2_STATUS_DIR/$rank"; rank=$((rank + 1)); done
if [ "$own" = wait ]; then
    trap 'for file in "$UNIMO2_STATUS_DIR"/*; do echo 0 > "$file"; done; exit 15' TERM
    touch waiting
    while :; do sleep 0.05; done
fi
exit "$own"
"""


@pytest.fixture
def launch(tmp_path):
    """Runs launch.sh with the stand-in; ``script`` is one line for each call: its own status, then the workers'."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    (tmp_path / "run.yaml").write_text("task: pretrain\n")
    (tmp_path / "bin").mkdir()
    sleep = tmp_path / "bin" / "sleep"  # no waiting between attempts
    sleep.write_text("#!/bin/sh\n[ \"$1\" = 3 ] || exec /bin/sleep \"$1\"\n")
    sleep.chmod(0o755)

    def run(*arguments, script="0 0", workers=2, kill=None):
        (tmp_path / "script.txt").write_text(script + "\n")
        environment = {**os.environ, "PYTHON": str(python), "WORKERS": str(workers), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        process = subprocess.Popen(["bash", str(ROOT / "tools" / "launch.sh"), *map(str, arguments)], env=environment, cwd=tmp_path, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                   # tests run in the background of a script inherit that Ctrl-C is ignored, and bash could not trap it
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        if kill:
            while not (tmp_path / "waiting").exists() and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(kill)
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        calls = tmp_path / "calls.txt"
        return process.returncode, output, calls.read_text().splitlines() if calls.exists() else []

    return run


TRAIN = f"{ROOT / 'tools' / 'train.py'} -c run.yaml"


def test_several_workers_go_through_paddles_launcher_and_one_does_not(launch):
    assert launch("run.yaml", "-o", "run.seed=2") == (0, "", [f"-m paddle.distributed.launch --nproc_per_node 2 {TRAIN} -o run.seed=2"])


def test_one_worker_is_a_plain_process(launch):
    assert launch("run.yaml", workers=1)[2] == [TRAIN]


def test_launcher_options_are_passed_on(launch):
    _, _, calls = launch("--master", "10.0.0.1:4000", "--nnodes=2", "--log_dir", "logs", "run.yaml", workers=1)
    assert calls == [f"-m paddle.distributed.launch --nproc_per_node 1 --master 10.0.0.1:4000 --nnodes=2 --log_dir logs {TRAIN}"]


def test_chosen_devices_decide_the_number_of_workers(launch):
    assert launch("--devices", "0,1", "run.yaml", workers=8)[2] == [f"-m paddle.distributed.launch --devices 0,1 {TRAIN}"]


def test_without_retries_a_failure_says_how_to_resume(launch):
    status, output, calls = launch("run.yaml", "-o", "run.output=my run", script="241 - 1")
    assert status == 1 and len(calls) == 1
    last = output.splitlines()[-1]
    assert "Resume with: WORKERS=2 bash" in last and last.endswith(r"run.yaml -o run.output=my\ run --resume auto")


def test_a_failure_is_started_again_with_resume_auto(launch):
    status, output, calls = launch("--retries", 3, "run.yaml", script="241 - 1\n1 1 1\n0 0 0")
    assert status == 0 and output.count("starting again") == 2 and "Resume with" not in output
    assert [call.endswith("--resume auto") for call in calls] == [False, True, True] and calls[2].count("--resume") == 1


def test_retries_are_counted(launch):
    status, output, calls = launch("--retries", 2, "run.yaml", "--resume", "auto", script="1 1\n1 1\n1 1\n0 0")
    assert status == 1 and len(calls) == 3 and "Resume with" in output
    assert all(call.count("--resume") == 1 for call in calls)


@pytest.mark.parametrize("script", ["2 2 2", "241 running 2", "2"])
def test_wrong_input_is_not_started_again(launch, script):
    status, output, calls = launch("--retries", 5, "run.yaml", script=script)
    assert status == 2 and len(calls) == 1 and "Resume with" not in output


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGINT])
def test_a_run_asked_to_stop_ends_in_order_and_is_not_started_again(launch, kill):
    status, output, calls = launch("--retries", 5, "run.yaml", script="wait - -", kill=kill)
    assert (status, len(calls)) == (0, 1), output


@pytest.mark.parametrize("arguments, complaint", [
    ([], "give a run configuration"), (["missing.yaml"], "missing.yaml does not exist"), (["--retries", "x", "run.yaml"], "--retries needs a number, is 'x'"),
    (["--master"], "--master needs a value"), (["--retries", "2", "run.yaml", "--resume", "output/a/checkpoints/step-000010"], "give --resume auto"),
    (["--retries", "2", "run.yaml", "--resume=step-000010"], "not from step-000010"),
])
def test_wrong_arguments_are_refused_without_starting_anything(launch, arguments, complaint):
    status, output, calls = launch(*arguments)
    assert status == 2 and complaint in output and calls == []


def test_help_is_the_header(launch):
    status, output, calls = launch("--help")
    assert status == 0 and "--retries N" in output and "set -" not in output and calls == []


def test_a_cluster_that_names_several_machines_is_believed(launch, monkeypatch):
    monkeypatch.setenv("PADDLE_NNODES", "4")
    assert launch("run.yaml", workers=1)[2] == [f"-m paddle.distributed.launch --nproc_per_node 1 {TRAIN}"]


@pytest.mark.parametrize("name", ["paddlejob.yaml", "slurm.sh"])
def test_cluster_examples_start_configs_and_options_that_exist(name):
    text = (ROOT / "tools" / "cluster" / name).read_text()
    (config,) = set(re.findall(r"run_configs/[\w/]+\.yaml", text))
    load_run_config(ROOT / config, re.findall(r"run\.output=[\w/]+", text)[:1])
    assert "tools/launch.sh" in text and "--resume" in text and "--retries" in text
    if name.endswith(".yaml"):
        (container,) = yaml.safe_load(text)["spec"]["paddleReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
        assert container["command"][1] == "tools/launch.sh" and container["args"][0] == config
    else:
        assert subprocess.run(["bash", "-n", str(ROOT / "tools" / "cluster" / name)], check=False).returncode == 0
