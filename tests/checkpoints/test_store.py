"""Training checkpoints: complete or not there, verified before anything changes, exact."""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest

from unimo2_paddle.checkpoints import store
from unimo2_paddle.checkpoints.convert import read_safetensors, write_safetensors
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


def load(path, run):
    """The state that was saved, without what the store adds."""
    state = store.load_checkpoint(str(path), run.model, run.optimizer)
    assert state.pop("made_by") == store.made_by(run.optimizer)
    return state


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
        assert load(path, other) == STATE
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
    for name in ("step-000003.tmp", "step-000007.tmp", "step-000003.old", "step-000002.gone"):
        (directory / name).mkdir()
        (directory / name / "manifest.json").write_text("{}")
    (directory / "step-000008").mkdir()  # no manifest: renamed by hand, or copied in part
    (directory / "notes.tmp").write_text("mine")
    assert store.complete_checkpoints(str(directory)) == [str(path)]
    store.save_checkpoint(str(directory), 3, run.model, run.optimizer, STATE)
    assert sorted(p.name for p in directory.iterdir()) == ["notes.tmp", "step-000003", "step-000008"]
    other = fresh(tiny_config)
    assert load(path, other) == STATE


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


def test_a_file_that_was_not_written_with_the_checkpoint_is_refused_but_hidden_ones_are_not(saved, tiny_config):
    _, path = saved
    (path / ".nfs0001").write_text("")
    assert load(path, fresh(tiny_config)) == STATE
    (path / "average.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="average.safetensors was not written with it"):
        store.verify_checkpoint(str(path))


def rewrite_state(path, **made_by):
    state = json.loads((path / "state.json").read_text())
    state["made_by"].update(made_by)
    (path / "state.json").write_text(json.dumps(state))
    reseal(path)
    return state


@pytest.mark.parametrize("made_by, complaint", [
    ({"format": 2, "unimo2_paddle": "9.1"}, r"has format 2 \(written by unimo2_paddle 9.1\), this is unimo2_paddle .* with format 1"),
    ({"optimizer": "Lamb"}, "the optimizer state is of Lamb, this run has AdamW"),
])
def test_another_format_or_optimizer_is_refused_with_what_differs(saved, tiny_config, made_by, complaint):
    _, path = saved
    rewrite_state(path, **made_by)
    other = fresh(tiny_config)
    before = other.arrays()
    with pytest.raises(CheckpointError, match=complaint):
        load(path, other)
    assert same(other.arrays(), before)


def test_another_version_of_the_same_format_is_loaded_and_told(saved, tiny_config):
    _, path = saved
    other = fresh(tiny_config)
    assert store.changes_since(store.load_checkpoint(str(path), other.model, other.optimizer), seed=1) == []
    state = {**rewrite_state(path, unimo2_paddle="0.0.9", paddle="1.8.5"), "seed": 5}
    other = fresh(tiny_config)
    assert store.load_checkpoint(str(path), other.model, other.optimizer)["made_by"]["paddle"] == "1.8.5"
    changes = store.changes_since(state, seed=1, workers=2)
    assert len(changes) == 3 and changes[0].startswith("unimo2_paddle 0.0.9, now ") and changes[2] == "seed 5, now 1"


def test_a_model_with_more_parts_or_of_another_task_is_refused(saved, tiny_config, tmp_path):
    run, path = saved
    other = fresh(tiny_config)
    with pytest.raises(CheckpointError, match="of task vqa, this one is pretrain"):
        wrote = store.save_checkpoint(str(tmp_path / "vqa"), 1, run.model, run.optimizer, {**STATE, "task": "vqa"})
        store.load_checkpoint(wrote, other.model, other.optimizer, task="pretrain")
    write_safetensors(str(path / "model.safetensors"),
                      {**read_safetensors(str(path / "model.safetensors")), "answers.w_0": np.zeros([2, 2], "float32")})
    reseal(path)
    with pytest.raises(CheckpointError, match=r"of another model: it has 1 parameters that this one lacks \(answers.w_0\)"):
        load(path, other)


def test_a_run_can_be_saved_before_its_first_step(tiny_config, tmp_path):
    run, other = Run(tiny_config), fresh(tiny_config)
    path = store.save_checkpoint(str(tmp_path / "c"), 0, run.model, run.optimizer, STATE)
    with paddle.utils.unique_name.guard():
        assert load(path, other) == STATE
        other.train(1)
    run.train(1)
    weights = [{p.name: p.numpy() for p in r.model.parameters()} for r in (run, other)]
    assert same(*weights)


def half_precision(optimizer, parameters):
    """The state that a step in half precision leaves: Paddle has its kernels on GPU only, so the accumulators are made without one."""
    optimizer._create_accumulators(paddle.static.default_main_program().global_block(), list(parameters))
    return optimizer.state_dict()


@pytest.mark.skipif(paddle.__version__.startswith("2."), reason="float32 copies are looked at as Paddle 3 makes them")
def test_parameters_in_half_precision_are_saved_and_resumed_in_full(tiny_config, tmp_path):
    run, other = Run(tiny_config), fresh(tiny_config)
    for made in (run, other):
        made.model.to(dtype="bfloat16")
        made.optimizer._multi_precision = True
    with paddle.utils.unique_name.guard():
        state = half_precision(run.optimizer, run.model.parameters())
    for number, tensor in enumerate([*state["master_weights"].values(), *(t for name, t in state.items() if "moment" in name)]):
        tensor.set_value(paddle.full(tensor.shape, 1 + number / 4096))  # not a bfloat16
    path = store.save_checkpoint(str(tmp_path / "c"), 1, run.model, run.optimizer, STATE)
    weights = read_safetensors(os.path.join(path, "model.safetensors"))
    assert {w.dtype.name for w in weights.values()} == {"float32"}
    with paddle.utils.unique_name.guard():
        assert load(path, other) == STATE
        loaded = half_precision(other.optimizer, other.model.parameters())
    assert all((loaded["master_weights"][name].numpy() == value.numpy()).all() for name, value in state["master_weights"].items())
    assert same(store.optimizer_arrays(other.optimizer), store.optimizer_arrays(run.optimizer))
    for parameter in other.model.parameters():
        assert parameter.dtype == paddle.bfloat16
        assert (parameter.astype("float32").numpy() == paddle.to_tensor(weights[parameter.name]).astype("bfloat16").astype("float32").numpy()).all()
    assert from_pretrained(path).parameters()[0].dtype == paddle.float32


def test_a_snapshot_keeps_its_values_while_training_goes_on(tiny_config, tmp_path):
    run = Run(tiny_config)
    run.train(2)
    state = {**STATE, "extras": {"scaler": {"scale": np.array([1024.5], "float32")}}, "best": {"value": 1.0}}
    snapshot, before = store.take_snapshot(run.model, run.optimizer, state), run.arrays()
    run.train(2, first=2)
    state["best"]["value"] = 2.0
    assert not same(run.arrays(), before)
    assert same({**snapshot.weights, **snapshot.accumulators}, before)
    path = store.write_snapshot(str(tmp_path / "c"), 2, snapshot)
    other = fresh(tiny_config)
    loaded = store.load_checkpoint(path, other.model, other.optimizer)
    assert loaded["extras"] == {"scaler": {"scale": [1024.5]}} and loaded["best"] == {"value": 1.0}


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
    assert load(tmp_path / "mine", other) == STATE
    assert store.step_of(str(path) + "/") == 3 and store.step_of("mine") is None
