"""A run that is killed at random moments and resumed ends with the bytes of one that nobody killed; and the tool that says so can say no."""
import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unimo2_paddle.checkpoints import store

ROOT = Path(__file__).resolve().parents[2]


def torture(*arguments):
    """``python tools/torture.py ...``; returns (exit status, what it printed)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, ROOT / "tools" / "torture.py", *map(str, arguments)], env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("torture", ROOT / "tools" / "torture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_killed_twice_ends_with_the_same_bytes():
    status, text = torture("--kills", 2, "--per-run", 2, "--steps", 9, "--seed", 4)
    assert status == 0, text
    assert "run 1: bit-identical to the undisturbed run" in text and "2 kills, " in text and "all bit-identical" in text


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--sync",)], ids=["background", "waiting"])
def test_a_run_killed_twenty_times_ends_with_the_same_bytes(options):
    status, text = torture("--kills", 20, *options)
    assert status == 0 and "all bit-identical" in text, text


@pytest.mark.slow
def test_two_workers_killed_together_or_one_at_a_time_end_with_the_same_bytes():
    status, text = torture("--kills", 6, "--workers", 2, "--steps", 24, "--per-run", 3)
    assert status == 0 and "all bit-identical" in text, text


@pytest.fixture
def run(tool, tmp_path):
    """A run's directory with checkpoints 3 and 6, without processes."""
    made = tool.Run(tmp_path / "run.yaml", tmp_path / "run", workers=1)
    for step in (3, 6):
        state = {"step": step, "data": None, "best": None, "made_by": {"format": store.FORMAT}}
        store.write_snapshot(str(made.checkpoints), step, store.Snapshot({}, {"w": np.zeros(2, "float32")}, {}, state))
    made.offset = 0
    return made


def test_the_table_says_what_a_frozen_run_was_doing(run):
    assert run.phase() == "starting" and run.newest() == 6
    (run.output / "metrics.jsonl").write_text('{"step": 7, "kind": "train"}\n{"step": 8')
    assert run.trained() == 7 and run.phase() == "training" and not run.writing()
    (run.output / ".best.new").mkdir()
    assert run.phase() == "writing best/"
    (run.checkpoints / "step-000006.old").mkdir()
    assert run.phase() == "replacing a checkpoint"
    (run.checkpoints / "step-000009.tmp").mkdir()
    assert run.phase() == "writing step-000009: just begun" and run.writing()
    for name in ("model.safetensors", "optimizer.safetensors"):
        (run.checkpoints / "step-000009.tmp" / name).write_text("")
    assert run.phase() == "writing step-000009: at optimizer.safetensors"


@pytest.mark.parametrize("fault, said", [
    (None, "all bit-identical"), ("weights", "DIFFERS: step-000006/model.safetensors"), ("lost", "LOST: newest 3, was 6"), ("damaged", "DAMAGED: "),
])
def test_a_difference_or_a_damaged_or_lost_checkpoint_is_found(tool, run, monkeypatch, tmp_path, capsys, fault, said):
    """The processes are stand-ins: every launch ends at once, and the fault is what it leaves."""
    wanted = run.result()

    class Ended:
        returncode, pid = 0, -1

        @staticmethod
        def poll():
            return None

    class Faked(tool.Run):
        def __init__(self, config, output, workers):
            super().__init__(config, run.output, workers)

        def launch(self):
            self.process, self.offset, self.started = Ended, 0, 0.0

        def wait(self, happened):
            return True

        def kill(self, victim):
            newest = self.checkpoints / "step-000006"
            if fault == "lost":
                os.rename(newest, tmp_path / "gone")
            elif fault == "damaged":
                (newest / "state.json").write_text("{}")
            elif fault == "weights":
                (newest / "model.safetensors").write_bytes(b"other")
            return 7, "training", "it"

    (run.output / "train.log").write_text("")
    monkeypatch.setattr(tool, "Run", Faked)
    monkeypatch.setattr(tool, "write_config", lambda *_: tmp_path / "run.yaml")
    monkeypatch.setattr(tool, "train_in_peace", lambda _: (wanted, 0.0, 0.0, 0.0))
    arguments = argparse.Namespace(kills=1, workers=1, steps=9, per_run=1, sync=False, seed=1)
    assert tool.torture(tmp_path, arguments) == (fault is None)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--kills", "0"], ["--steps", "2"], ["--keep", str(ROOT)]])
def test_impossible_wishes_are_refused(tool, arguments):
    with pytest.raises(SystemExit) as caught:
        tool.main(arguments)
    assert caught.value.code == 2
