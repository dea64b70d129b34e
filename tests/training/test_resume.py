"""A resumed run equals the uninterrupted one bit for bit, wherever it stopped."""
import json
import shutil
from pathlib import Path

import pytest

DROPOUT = {f"model.{prefix}{kind}_dropout_prob": 0.1 for prefix in ("", "text_", "vit_") for kind in ("hidden", "attention_probs")}
STEPS = 8


@pytest.fixture
def straight(pretrain_config, unimo2, tmp_path):
    """(config, directory) of a finished run of 8 steps with dropout and accumulation, with all its checkpoints."""
    path = pretrain_config({**DROPOUT, "train.steps": STEPS, "run.save_every": 1, "run.keep_last": 20, "train.accumulate": 2,
                            "train.matching_group": 2, "mixture.weights": {"pairs": 1, "images": 1, "texts": 1}})
    assert unimo2("train", "-c", path).status == 0
    return path, tmp_path / "run"


def stopped(run, step, target):
    """A copy of a run as if it had been killed right after the checkpoint of ``step``."""
    shutil.copytree(run, target)
    for checkpoint in (target / "checkpoints").iterdir():
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(target / "best")
    return target


def state(run, step=STEPS):
    """The bytes of everything in a checkpoint; the manifest holds their hashes."""
    return {p.name: p.read_bytes() for p in (Path(run) / "checkpoints" / f"step-{step:06d}").iterdir()}


def test_the_run_reads_all_three_corpora(straight):
    _, run = straight
    corpora = [key.split("/")[0] for line in (run / "metrics.jsonl").read_text().splitlines() for key in json.loads(line) if "/dict" in key]
    assert set(corpora) == {"pairs", "images", "texts"} and len(corpora) == STEPS


def test_resuming_from_any_step_gives_the_same_weights_and_optimizer(straight, unimo2, tmp_path):
    path, run = straight
    for step in range(1, STEPS):
        copy = stopped(run, step, tmp_path / f"from{step}")
        outcome = unimo2("train", "-c", path, "-o", f"run.output={copy}", "--resume", "auto")
        assert outcome.status == 0 and f"resumed from {copy / 'checkpoints' / f'step-{step:06d}'}" in outcome.out
        assert state(copy) == state(run), f"resumed at step {step}"
        assert (copy / "best" / "model.safetensors").read_bytes() == (run / "best" / "model.safetensors").read_bytes()
        steps = [json.loads(line)["step"] for line in (copy / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, STEPS + 1)) + list(range(step + 1, STEPS + 1)), "old records are kept"


def test_resuming_with_worker_processes_is_as_exact(straight, unimo2, tmp_path):
    path, run = straight
    copy = stopped(run, 3, tmp_path / "copy")
    assert unimo2("train", "-c", path, "-o", f"run.output={copy}", "-o", "data.num_workers=2", "--resume", "auto").status == 0
    assert state(copy) == state(run)


def test_a_checkpoint_can_be_continued_into_another_directory(straight, unimo2, tmp_path):
    path, run = straight
    outcome = unimo2("train", "-c", path, "-o", f"run.output={tmp_path / 'new'}", "--resume", run / "checkpoints" / "step-000005")
    assert outcome.status == 0
    assert state(tmp_path / "new") == state(run)


def test_auto_starts_from_the_beginning_when_there_is_nothing(straight, unimo2, tmp_path):
    path, run = straight
    assert unimo2("train", "-c", path, "-o", f"run.output={tmp_path / 'new'}", "--resume", "auto").status == 0
    assert state(tmp_path / "new") == state(run)


def test_an_unfinished_checkpoint_is_passed_over(straight, unimo2, tmp_path):
    path, run = straight
    copy = stopped(run, 4, tmp_path / "copy")
    shutil.copytree(copy / "checkpoints" / "step-000004", copy / "checkpoints" / "step-000006.tmp")
    (copy / "checkpoints" / "step-000006.tmp" / "model.safetensors").write_bytes(b"half")
    outcome = unimo2("train", "-c", path, "-o", f"run.output={copy}", "--resume", "auto")
    assert outcome.status == 0 and "step-000004" in outcome.out
    assert state(copy) == state(run)


def test_a_finished_run_stays_finished(straight, unimo2):
    path, run = straight
    before = state(run)
    assert unimo2("train", "-c", path, "--resume", "auto").status == 0
    assert state(run) == before


def test_more_steps_continue_a_finished_run(straight, unimo2):
    path, run = straight
    assert unimo2("train", "-c", path, "-o", f"train.steps={STEPS + 2}", "--resume", "auto").status == 0
    assert (run / "checkpoints" / f"step-{STEPS + 2:06d}" / "manifest.json").is_file()


@pytest.mark.parametrize("damage, complaint", [
    (lambda run: (run / "checkpoints" / f"step-{STEPS:06d}" / "optimizer.safetensors").write_bytes(b"x"), "optimizer.safetensors is damaged"),
    (lambda run: (run / "checkpoints" / f"step-{STEPS:06d}" / "state.json").unlink(), "state.json is missing"),
])
def test_a_damaged_checkpoint_is_refused_and_nothing_is_written(straight, unimo2, damage, complaint):
    path, run = straight
    damage(run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    outcome = unimo2("train", "-c", path, "--resume", "auto")
    assert outcome.status == 2 and complaint in outcome.err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("changes, complaint", [
    (["model.num_codebook=16"], "vq_emb"), (["train.steps=4"], "is at step 8, this run ends at step 4"),
    (["mixture.weights={pairs: 1}"], "the data position to resume from has the shard sets"),
])
def test_a_checkpoint_of_another_run_is_refused(straight, unimo2, tmp_path, changes, complaint):
    path, run = straight
    overrides = [part for change in [*changes, f"run.output={tmp_path / 'new'}"] for part in ("-o", change)]
    outcome = unimo2("train", "-c", path, *overrides, "--resume", run / "checkpoints" / f"step-{STEPS:06d}")
    assert outcome.status == 2 and complaint in outcome.err
    assert not (tmp_path / "new").exists()
