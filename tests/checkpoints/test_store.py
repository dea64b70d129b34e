"""Training checkpoints: complete or not there, verified before anything changes, exact."""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

from unimo2_paddle.checkpoints import store
from unimo2_paddle.checkpoints.pretrained import from_pretrained
from unimo2_paddle.errors import CheckpointError
from unimo2_paddle.models.unimo2 import Unimo2Model
from unimo2_paddle.training.optim import OptimConfig, build_optimizer

STATE = {"step": 3, "data": {"step": 3, "read": {"pairs": [24]}}, "best": {"step": 2, "metric": "val/recall_mean", "value": 12.5}}


class Run:
    """A model with its optimizer, as the loop has them."""

    def __init__(self, config, seed=0):
        paddle.seed(seed)
        with paddle.utils.unique_name.guard():
            self.model = Unimo2Model(config)
        self.optimizer = build_optimizer(self.model.parameters(), OptimConfig(learning_rate=1e-2))

    def train(self, steps, first=0):
        """Steps that give only some parameters a gradient, other ones every time."""
        for step in range(first, first + steps):
            parameters = list(self.model.parameters())
            loss = sum((p * (step + 1.5 + i % 7)).sum() for i, p in enumerate(parameters) if (i + step) % 3)
            loss.backward()
            self.optimizer.step()
            self.optimizer.clear_grad(set_to_zero=False)

    def arrays(self):
        weights = {p.name: p.numpy() for p in self.model.parameters()}
        return {**weights, **store.optimizer_arrays(self.optimizer)}


@pytest.fixture(autouse=True)
def numbered_accumulators():
    """As in the loop: the names of accumulators start from 0."""
    with paddle.utils.unique_name.guard():
        yield


@pytest.fixture
def saved(tiny_config, tmp_path):
    """(run, path of its checkpoint at step 3)."""
    run = Run(tiny_config)
    run.train(3)
    return run, Path(store.save_checkpoint(str(tmp_path / "checkpoints"), 3, run.model, run.optimizer, STATE))


def fresh(config):
    with paddle.utils.unique_name.guard():
        return Run(config, seed=9)


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) and first[key].dtype == second[key].dtype
                                                 for key in first)


def test_a_checkpoint_holds_everything_with_its_hash(saved):
    _, path = saved
    assert path.name == "step-000003"
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest) == {"config.json", "model.safetensors", "optimizer.safetensors", "state.json"}
    assert {p.name for p in path.iterdir()} == {*manifest, "manifest.json"}
    assert all(facts["bytes"] == (path / name).stat().st_size and len(facts["sha256"]) == 64 for name, facts in manifest.items())
    assert not list(path.parent.glob("*.tmp"))


def test_loading_restores_weights_accumulators_and_state_bit_for_bit(saved, tiny_config):
    run, path = saved
    with paddle.utils.unique_name.guard():
        other = Run(tiny_config, seed=9)
        assert store.load_checkpoint(str(path), other.model, other.optimizer) == STATE
        for p in other.model.parameters():
            assert np.array_equal(p.numpy(), run.arrays()[p.name])
        other.train(2, first=3)
    run.train(2, first=3)
    assert same(other.arrays(), run.arrays())


def test_parameters_that_never_had_a_gradient_have_no_accumulators(tiny_config, tmp_path):
    run = Run(tiny_config)
    run.model.text.words.weight.sum().backward()
    run.optimizer.step()
    assert {key.split("|")[0] for key in store.optimizer_arrays(run.optimizer)} == {"text.word_embedding"}
    path = store.save_checkpoint(str(tmp_path / "c"), 1, run.model, run.optimizer, STATE)
    with paddle.utils.unique_name.guard():
        other = Run(tiny_config, seed=9)
        store.load_checkpoint(path, other.model, other.optimizer)
        other.train(1)
    run.optimizer.clear_grad(set_to_zero=False)
    run.train(1)
    assert same(other.arrays(), run.arrays())


def test_a_checkpoint_is_also_a_model_directory(saved):
    run, path = saved
    model = from_pretrained(path)
    assert same({p.name: p.numpy() for p in model.parameters()}, {p.name: p.numpy() for p in run.model.parameters()})


def test_the_newest_are_kept_and_listed_in_order_of_steps(tiny_config, tmp_path):
    run, directory = Run(tiny_config), tmp_path / "checkpoints"
    for step in (1, 2, 10, 1000000, 9):
        store.save_checkpoint(str(directory), step, run.model, run.optimizer, STATE, keep_last=3)
    assert [os.path.basename(p) for p in store.complete_checkpoints(str(directory))] == ["step-000009", "step-000010", "step-1000000"]
    assert store.complete_checkpoints(str(tmp_path / "nowhere")) == []


def test_what_a_killed_run_left_is_neither_listed_nor_kept(saved, tiny_config):
    run, path = saved
    directory = path.parent
    for name in ("step-000003.tmp", "step-000007.tmp", "step-000002.old"):
        (directory / name).mkdir()
        (directory / name / "manifest.json").write_text("{}")
    (directory / "step-000008").mkdir()  # no manifest: renamed by hand, or copied in part
    (directory / "notes.tmp").write_text("mine")
    assert store.complete_checkpoints(str(directory)) == [str(path)]
    store.save_checkpoint(str(directory), 3, run.model, run.optimizer, STATE)
    assert sorted(p.name for p in directory.iterdir()) == ["notes.tmp", "step-000003", "step-000008"]
    other = fresh(tiny_config)
    assert store.load_checkpoint(str(path), other.model, other.optimizer) == STATE


@pytest.mark.parametrize("name", ["config.json", "state.json", "model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_or_missing_file_is_named_and_changes_nothing(saved, tiny_config, name, damage):
    _, path = saved
    file = path / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-1])
    else:
        file.unlink()
    other = fresh(tiny_config)
    before = other.arrays()
    with pytest.raises(CheckpointError, match=f"{name}.*use another checkpoint"):
        store.load_checkpoint(str(path), other.model, other.optimizer)
    assert same(other.arrays(), before)


@pytest.mark.parametrize("manifest", ["{}", "[]", "no", '{"config.json": 5}', '{"../other": {"bytes": 1, "sha256": "x"}}'])
def test_a_damaged_manifest_is_refused(saved, tiny_config, manifest):
    _, path = saved
    (path / "manifest.json").write_text(manifest)
    other = fresh(tiny_config)
    with pytest.raises(CheckpointError, match="manifest.json"):
        store.load_checkpoint(str(path), other.model, other.optimizer)


def reseal(path):
    """Make the manifest agree with changed files, as a foreign but intact checkpoint would have it."""
    names = [p.name for p in path.iterdir() if p.name != "manifest.json"]
    (path / "manifest.json").write_text(json.dumps(
        {name: {"sha256": store._sha256(path / name), "bytes": (path / name).stat().st_size} for name in names}))


@pytest.mark.parametrize("state", [{}, {"step": "3", "data": None, "best": None}, {"step": 3, "data": None}])
def test_a_state_of_another_program_is_refused(saved, tiny_config, state):
    _, path = saved
    (path / "state.json").write_text(json.dumps(state))
    reseal(path)
    other = fresh(tiny_config)
    before = other.arrays()
    with pytest.raises(CheckpointError, match="state.json"):
        store.load_checkpoint(str(path), other.model, other.optimizer)
    assert same(other.arrays(), before)


def test_weights_of_another_size_are_refused_and_change_nothing(saved, tiny_config):
    from unimo2_paddle.models.configuration import Unimo2Config

    _, path = saved
    other = fresh(Unimo2Config.from_dict({**tiny_config.to_dict(), "num_codebook": 16, "vit_num_hidden_layers": 2}))
    before = other.arrays()
    with pytest.raises(CheckpointError) as error:
        store.load_checkpoint(str(path), other.model, other.optimizer)
    assert "vq_emb" in str(error.value) and "vit.encoder_layer_1" in str(error.value)
    assert same(other.arrays(), before)


@pytest.mark.parametrize("key, shape", [("text.word_embedding|moment1", [3, 4]), ("cmcl_temperature|beta1_pow_acc", [2]), ("elsewhere|moment1", [1])])
def test_accumulators_of_another_model_are_refused_and_change_nothing(saved, tiny_config, key, shape):
    from unimo2_paddle.checkpoints.convert import read_safetensors, write_safetensors

    _, path = saved
    arrays = read_safetensors(str(path / "optimizer.safetensors"))
    arrays[key] = np.zeros(shape, dtype="float32")
    write_safetensors(str(path / "optimizer.safetensors"), arrays)
    reseal(path)
    other = fresh(tiny_config)
    before = other.arrays()
    with pytest.raises(CheckpointError) as error:
        store.load_checkpoint(str(path), other.model, other.optimizer)
    assert key in str(error.value)
    assert same(other.arrays(), before)


def test_a_failed_write_leaves_earlier_checkpoints_and_nothing_half_written(saved, monkeypatch):
    run, path = saved
    before = {p.name: p.read_bytes() for p in path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_sync", full)
    for step in (3, 4):
        with pytest.raises(CheckpointError, match="No space left on device; earlier checkpoints are untouched"):
            store.save_checkpoint(str(path.parent), step, run.model, run.optimizer, STATE)
    assert [p.name for p in path.parent.iterdir()] == ["step-000003"]
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


class Killed(BaseException):
    """Stands in for a process that dies."""


@pytest.mark.parametrize("moment", range(7))
def test_whenever_a_run_dies_every_listed_checkpoint_is_whole(saved, tiny_config, monkeypatch, moment):
    run, path = saved
    calls, sync = iter(range(100)), store._sync

    def dying(target):
        if next(calls) == moment:
            raise Killed
        sync(target)

    monkeypatch.setattr(store, "_sync", dying)
    with pytest.raises(Killed):
        store.save_checkpoint(str(path.parent), 4, run.model, run.optimizer, STATE)
    monkeypatch.undo()
    whole = store.complete_checkpoints(str(path.parent))
    assert [os.path.basename(p) for p in whole] == ["step-000003"] + ["step-000004"] * (moment == 6), "the last sync follows the renaming"
    for checkpoint in whole:
        store.verify_checkpoint(checkpoint)
    store.save_checkpoint(str(path.parent), 4, run.model, run.optimizer, STATE)
    assert sorted(p.name for p in path.parent.iterdir()) == ["step-000003", "step-000004"]


def test_saving_into_a_file_is_refused(saved, tmp_path):
    run, _ = saved
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        store.save_checkpoint(str(tmp_path / "file"), 1, run.model, run.optimizer, STATE)


@pytest.mark.parametrize("path", ["nowhere", "empty", "file"])
def test_a_path_that_is_no_checkpoint_is_explained(tmp_path, path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not a complete training checkpoint"):
        store.verify_checkpoint(str(tmp_path / path))


def test_a_copy_elsewhere_is_as_good(saved, tiny_config, tmp_path):
    _, path = saved
    shutil.copytree(path, tmp_path / "mine")
    other = fresh(tiny_config)
    assert store.load_checkpoint(str(tmp_path / "mine"), other.model, other.optimizer) == STATE
    assert store.step_of(str(path) + "/") == 3 and store.step_of("mine") is None
