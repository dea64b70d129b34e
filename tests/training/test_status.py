"""``unimo2 status``: what the files of a run say about it, alive or dead."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unimo2_paddle.errors import UserInputError
from unimo2_paddle.tasks.pretrain import PretrainTask
from unimo2_paddle.training import status
from unimo2_paddle.training.status import Heartbeat, duration, format_status, process_started, read_status

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path):
    """The directory of a run in this process that is at step 40 of 100."""
    with Heartbeat(str(tmp_path), True, task="pretrain", workers=2, total_steps=100, step=0, bad_steps=1) as heartbeat:
        heartbeat.tell(state="running", step=40, epoch=1.25, ips=12.5, batch_cost=0.5, reader_cost=0.1, eta=30,
                       best={"metric": "val/recall_mean", "value": 61.234, "step": 20})
        with open(tmp_path / "metrics.jsonl", "w") as file:
            for step in range(1, 41):
                file.write(json.dumps({"step": step, "kind": "train", "loss": 4.0 if step <= 20 else 3.0, "pairs/matching": 0.5, "lr": 1}) + "\n")
            file.write(json.dumps({"step": 40, "kind": "val", "recall_mean": 61.0}) + "\n" + '{"step": 41, "kind": "tr')
        checkpoint = tmp_path / "checkpoints" / "step-000030"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
        os.utime(checkpoint / "manifest.json", (time.time() - 90, time.time() - 90))
        (tmp_path / "checkpoints" / "step-000040.tmp").mkdir()
        (tmp_path / "bad_records.jsonl").write_text("{}\n{}\n")
        (tmp_path / "bad_records.1.jsonl").write_text("{}\n")
        yield tmp_path


def change(run, **facts):
    path = run / status.FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def test_the_table_says_how_far_the_run_is_and_what_it_has(run, unimo2):
    outcome = unimo2("status", run)
    assert outcome.status == 0
    rows = dict(line.split(None, 1) for line in outcome.out.splitlines())
    assert rows["state"].startswith("running; alive")
    assert f"{os.getpid()} on " in rows["process"] and "2 worker(s)" in rows["process"]
    assert rows["step"] == "40 of 100 (40.0 %), epoch 1.25"
    assert rows["speed"] == "12.50 samples/s, 0.500 s a step of which 0.100 s reading"
    assert rows["loss"] == "3.0000  (-25.0 %)" and rows["pairs/matching"] == "0.5000  (+0.0 %)"
    assert rows["best"] == "val/recall_mean 61.23 at step 20"
    assert rows["checkpoint"].startswith("step-000030, 1:3") and rows["bad"] == "1 step(s) skipped, 3 record(s) left out"
    assert "eta" in rows and "recall_mean" not in rows


def test_a_run_that_is_gone_without_a_word_is_shown_as_dead(run, unimo2):
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    change(run, pid=process.pid, process_started=1)
    out = unimo2("status", run).out
    assert "running; DEAD: gone without a word" in out and "--resume auto" in out and "eta" not in out


def test_another_process_with_the_same_number_is_not_the_run(run):
    change(run, process_started=process_started(os.getpid()) + 1)
    assert not read_status(str(run))["alive"]


def test_a_run_on_another_machine_lives_as_long_as_its_heart_beats(run):
    change(run, host="elsewhere", pid=1)
    assert read_status(str(run))["alive"]
    change(run, updated=time.time() - status.SILENT - 1)
    assert not read_status(str(run))["alive"]


def test_a_clock_that_was_set_back_shows_no_negative_age(run):
    change(run, updated=time.time() + 3600, started=time.time() + 3000)
    facts = read_status(str(run))
    assert facts["age"] == 0 and "-" not in format_status(str(run), facts).splitlines()[1]


def test_the_status_follows_a_run_to_its_end(pretrain_config, unimo2, tmp_path, monkeypatch):
    seen, plain = [], PretrainTask.loss
    monkeypatch.setattr(status, "BEAT", 0.0)

    def loss(self, model, batch):
        seen.append(read_status(str(tmp_path / "run")))
        return plain(self, model, batch)

    monkeypatch.setattr(PretrainTask, "loss", loss)
    path = pretrain_config({"run.save_every": 2, "run.async_save": False})
    assert unimo2("train", "-c", path).status == 0
    assert [facts["step"] for facts in seen] == [0, 1, 2, 3, 4, 5] and all(facts["alive"] and facts["state"] == "running" for facts in seen)
    assert [facts["checkpoint"] and facts["checkpoint"][0] for facts in seen] == [None, None] + 2 * ["step-000002"] + 2 * ["step-000004"]
    assert all("ips" in facts and facts["terms"]["loss"][0] > 0 for facts in seen[1:])
    end = read_status(str(tmp_path / "run"))
    assert end["state"] == "finished" and not end["alive"] and end["step"] == 6
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.parametrize("how, state", [(signal.SIGTERM, "stopped"), (RuntimeError("out of luck"), "failed")])
def test_the_status_says_how_a_run_ended(pretrain_config, unimo2, tmp_path, monkeypatch, how, state):
    def loss(self, model, batch):
        if isinstance(how, Exception):
            raise how
        os.kill(os.getpid(), how)
        return plain(self, model, batch)

    plain = PretrainTask.loss
    monkeypatch.setattr(PretrainTask, "loss", loss)
    if isinstance(how, Exception):
        with pytest.raises(RuntimeError):
            unimo2("train", "-c", pretrain_config())
    else:
        assert unimo2("train", "-c", pretrain_config()).status == 0
    out = unimo2("status", tmp_path / "run").out
    assert f"{state}; ended" in out and ("out of luck" in out) == (state == "failed")


def test_watching_ends_with_the_run(run, unimo2):
    change(run, state="finished")
    assert unimo2("status", run, "--watch", "0.1").out.count("state") == 1


@pytest.mark.parametrize("content", [None, "{", "[]", '{"state": "running"}'])
def test_a_directory_without_a_readable_status_is_one_clear_error(tmp_path, unimo2, content):
    if content is not None:
        (tmp_path / status.FILE).write_text(content)
    outcome = unimo2("status", tmp_path)
    assert outcome.status == 2 and status.FILE in outcome.err and len(outcome.err.splitlines()) == 1


def test_a_missing_directory_is_an_input_error(tmp_path):
    with pytest.raises(UserInputError, match="give the run.output of a run"):
        read_status(str(tmp_path / "nothing"))


def test_a_full_disk_does_not_stop_a_run_for_its_status(tmp_path):
    with Heartbeat(str(tmp_path / "not there"), True) as heartbeat:
        heartbeat.beat(step=1)


def test_looking_at_a_run_does_without_paddle():
    code = "import sys; from unimo2_paddle.training.status import read_status; assert 'paddle' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_durations_are_written_as_people_read_them():
    assert [duration(s) for s in (-3, 0, 59.9, 60, 3599, 3600, 86399, 90000)] == \
        ["0 s", "0 s", "59 s", "1:00 min", "59:59 min", "1:00 h", "23:59 h", "1 d 1 h"]
