"""A resumed run equals the uninterrupted one bit for bit, wherever it stopped."""
import json
import re
import shutil
from pathlib import Path

import pytest

from unimo2_paddle.checkpoints import store

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


DAMAGES = [
    (lambda checkpoint: (checkpoint / "optimizer.safetensors").write_bytes(b"x"), "optimizer.safetensors is damaged"),
    (lambda checkpoint: (checkpoint / "state.json").unlink(), "state.json is missing"),
    (lambda checkpoint: (checkpoint / "manifest.json").write_text("{"), "manifest.json is not a JSON file"),
]


@pytest.mark.parametrize("damage, complaint", DAMAGES)
def test_a_damaged_checkpoint_that_was_asked_for_is_refused_and_nothing_is_written(straight, unimo2, damage, complaint):
    path, run = straight
    checkpoint = run / "checkpoints" / f"step-{STEPS:06d}"
    damage(checkpoint)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    outcome = unimo2("train", "-c", path, "--resume", checkpoint)
    assert outcome.status == 2 and complaint in outcome.err and "use another checkpoint" in outcome.err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_auto_falls_back_behind_damaged_checkpoints_saying_so_and_keeps_them(straight, unimo2):
    path, run = straight
    whole = state(run)
    for step, (damage, _) in zip((8, 7, 6), DAMAGES):
        damage(run / "checkpoints" / f"step-{step:06d}")
    outcome = unimo2("train", "-c", path, "--resume", "auto")
    assert outcome.status == 0 and f"resumed from {run / 'checkpoints' / 'step-000005'}" in outcome.out
    for _, complaint in DAMAGES:
        assert complaint in outcome.out
    assert "later checkpoints are kept as step-000008.aside, step-000007.aside, step-000006.aside" in outcome.out
    assert state(run) == whole, "and the result is that of the uninterrupted run"
    assert (run / "checkpoints" / "step-000008.aside" / "optimizer.safetensors").read_bytes() == b"x"


def test_when_every_checkpoint_is_damaged_nothing_is_overwritten(straight, unimo2):
    path, run = straight
    for checkpoint in (run / "checkpoints").iterdir():
        DAMAGES[0][0](checkpoint)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    outcome = unimo2("train", "-c", path, "--resume", "auto")
    assert outcome.status == 2 and "holds no usable checkpoint" in outcome.err and outcome.err.count("optimizer.safetensors is damaged") == STEPS
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_going_back_keeps_what_came_after_and_does_not_jump_to_it_later(straight, unimo2):
    path, run = straight
    outcome = unimo2("train", "-c", path, "-o", "optim.learning_rate=0.002", "-o", "train.steps=6", "--resume", run / "checkpoints" / "step-000004")
    assert outcome.status == 0 and "later checkpoints are kept as step-000008.aside" in outcome.out
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert [name for name in names if int(name[5:11]) > 4] == [
        "step-000005", "step-000005.aside", "step-000006", "step-000006.aside", "step-000007.aside", "step-000008.aside"]
    outcome = unimo2("train", "-c", path, "-o", "optim.learning_rate=0.002", "-o", "train.steps=6", "--resume", "auto")
    assert outcome.status == 0 and "resumed from" in outcome.out and "steps 6 to 6" in outcome.out


def test_the_checkpoint_of_one_run_does_not_continue_in_the_directory_of_another(straight, unimo2, tmp_path):
    path, run = straight
    copy = stopped(run, 2, tmp_path / "other")
    outcome = unimo2("train", "-c", path, "-o", f"run.output={copy}", "--resume", run / "checkpoints" / "step-000005")
    assert outcome.status == 2 and "already holds another run (its newest complete checkpoint: step-000002)" in outcome.err


def test_waiting_for_every_checkpoint_gives_the_same_files(straight, unimo2, tmp_path):
    path, run = straight
    assert unimo2("train", "-c", path, "-o", f"run.output={tmp_path / 'new'}", "-o", "run.async_save=false").status == 0
    assert state(tmp_path / "new") == state(run)


def resumed_until(step, unimo2, path, copy):
    """Resume, and let the write of the checkpoint after ``step`` fail."""
    fill = store._fill

    def full(directory, snapshot):
        fill(directory, snapshot)
        if snapshot.state["step"] == step + 1:
            raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_fill", full)
        return unimo2("train", "-c", path, "-o", f"run.output={copy}", "--resume", "auto")


def test_a_write_that_fails_in_the_background_ends_the_run_and_keeps_the_earlier_checkpoints(straight, unimo2, tmp_path):
    path, run = straight
    copy = stopped(run, 3, tmp_path / "copy")
    outcome = resumed_until(5, unimo2, path, copy)
    assert outcome.status == 2
    assert re.search("cannot write the checkpoint .*step-000006 .*No space left on device; earlier checkpoints are untouched", outcome.err)
    assert "Traceback" not in outcome.err
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == [f"step-{step:06d}" for step in range(1, 6)]


def test_resuming_again_before_every_parameter_had_a_gradient_loses_nothing(straight, unimo2, tmp_path):
    """Steps 4 and 5 train other corpora than step 6: their checkpoints hold accumulators that no step has touched since the resuming."""
    path, run = straight
    copy = stopped(run, 3, tmp_path / "copy")
    for last in (4, 5, 7):
        assert resumed_until(last, unimo2, path, copy).status == 2
        assert state(copy, last) == state(run, last)
    assert unimo2("train", "-c", path, "-o", f"run.output={copy}", "--resume", "auto").status == 0
    assert state(copy) == state(run)


def test_a_run_killed_between_its_last_model_and_its_last_checkpoint_ends_with_both(straight, unimo2, tmp_path):
    path, run = straight
    copy = stopped(run, STEPS - 1, tmp_path / "copy")
    shutil.copytree(run / "best", copy / ".best.old")  # it died between the two renamings of the last model
    assert unimo2("train", "-c", path, "-o", f"run.output={copy}", "--resume", "auto").status == 0
    assert (copy / "best" / "model.safetensors").read_bytes() == (run / "best" / "model.safetensors").read_bytes()
    assert not (copy / ".best.old").exists() and state(copy) == state(run)


def test_a_run_that_stopped_early_stays_stopped(pretrain_config, unimo2, demo_data, tmp_path):
    path = pretrain_config({"eval.annotations": str(demo_data / "retrieval" / "dataset_shapes.json"), "eval.images": str(demo_data / "retrieval" / "images"),
                            "eval.max_images": 4, "eval.captions_per_image": 1, "eval.every_steps": 1, "run.early_stop": 1, "optim.learning_rate": 0.0})
    assert "stopped early" in unimo2("train", "-c", path).out
    before = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    outcome = unimo2("train", "-c", path, "--resume", "auto")
    assert outcome.status == 0 and "has stopped early before; raise run.early_stop to go on" in outcome.out
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == before


@pytest.mark.parametrize("changes, complaint", [
    (["model.num_codebook=16"], "vq_emb"), (["model.num_hidden_layers=1"], "of another model"), (["train.steps=4"], "is at step 8, this run ends at step 4"),
    (["mixture.weights={pairs: 1}"], "the data position to resume from has the shard sets"),
])
def test_a_checkpoint_of_another_run_is_refused(straight, unimo2, tmp_path, changes, complaint):
    path, run = straight
    overrides = [part for change in [*changes, f"run.output={tmp_path / 'new'}"] for part in ("-o", change)]
    outcome = unimo2("train", "-c", path, *overrides, "--resume", run / "checkpoints" / f"step-{STEPS:06d}")
    assert outcome.status == 2 and complaint in outcome.err
    assert not (tmp_path / "new").exists()
