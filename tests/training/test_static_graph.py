"""Static Programs train as the dynamic graph does: losses, weights, optimizer state, in every task."""
import json
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml
from safetensors.numpy import load_file

from unimo2_paddle.checkpoints.released import load_released
from unimo2_paddle.config import load_run_config
from unimo2_paddle.data.demo_tasks import captioning, classes, entailment, glue, vqa
from unimo2_paddle.errors import UserInputError
from unimo2_paddle.tasks.base import Shard, task_class, to_tensors
from unimo2_paddle.training import static
from unimo2_paddle.training.optim import build_optimizer
from unimo2_paddle.training.static import StaticGraph

pytestmark = pytest.mark.skipif(paddle.__version__.startswith("2."), reason="run.graph needs Paddle 3")

TOLERANCE = 1e-6  # relative
DROPOUT = {f"{prefix}{kind}_dropout_prob": 0.1 for prefix in ("", "text_", "vit_") for kind in ("hidden", "attention_probs")}
TINY = {
    "config": "unimo2_demo", "hidden_size": 16, "text_hidden_size": 16, "vit_hidden_size": 16, "num_attention_heads": 2, "text_num_attention_heads": 2,
    "vit_num_attention_heads": 2, "num_hidden_layers": 2, "text_num_hidden_layers": 1, "vit_num_hidden_layers": 1, "image_size": 32,
    "resolution": 16, "position_grid": 2, "num_codebook": 16, "topk_value": 4, **DROPOUT,
}


@pytest.fixture(scope="module")
def task_data(demo_data, tmp_path_factory):
    """A function: task -> folder of its demo data, written once."""
    writers, made = {"captioning": captioning, "glue": glue, "vqa": vqa, "entailment": entailment, "imagenet": classes}, {}

    def folder(task):
        if task not in made:
            made[task] = tmp_path_factory.mktemp(task) / "data"
            writers[task].write(str(made[task]), str(demo_data), 1)
        return made[task]

    return folder


@pytest.fixture
def values_of(demo_data, task_data, tiny_pretrain, tmp_path):
    """A function: task -> the nested values of a run of 30 steps with dropout."""

    def values(task):
        if task == "pretrain":
            found = tiny_pretrain(tmp_path / "run")
            found["model"].update(DROPOUT)
            found["train"].update(steps=30)
            found["mixture"]["weights"] = {"pairs": 1, "images": 1, "texts": 1}
            return found
        out, vocab, data = task_data(task) if task != "retrieval" else demo_data / "retrieval", str(demo_data / "vocab"), {}
        train = {"max_steps": 30, "batch_size": 8}
        if task == "retrieval":
            data = {"annotations": str(out / "dataset_shapes.json"), "images": str(out / "images"), "max_text_len": 40}
            train = {"max_steps": 30, "batch_size": 2, "image_negatives": 2, "caption_negatives": 3}
        elif task == "captioning":
            data = {"annotations": str(out / "dataset_shapes.json"), "images": str(out), "max_text_len": 40}
        elif task == "glue":
            data = {"dataset": "sst2", "directory": str(out / "SST-2"), "max_text_len": 64}
        elif task == "entailment":
            data = {"annotations": str(out / "snli_ve_{split}.jsonl"), "images": str(out / "flickr30k-images"), "max_text_len": 40}
        elif task == "vqa":
            names = {"train": "train2014", "val": "val2014"}
            data = {"questions": {s: str(out / f"v2_OpenEnded_mscoco_{n}_questions.json") for s, n in names.items()},
                    "annotations": {s: str(out / f"v2_mscoco_{n}_annotations.json") for s, n in names.items()},
                    "answers_from": ["train"], "min_answer_count": 2, "images": str(out), "max_text_len": 40}
        elif task == "imagenet":
            data = {"images": str(out / "digits")}
        if task != "imagenet":
            data["vocab"] = vocab
        return {"task": task, "model": dict(TINY), "data": data, "train": train, "optim": {"learning_rate": 1e-3}, "eval": {"split": "val"},
                "run": {"progress": False, "log_every": 1, "evaluate_at_end": False, "trial_save": False}}

    return values


@pytest.fixture
def train(values_of, unimo2, tmp_path):
    """A function that trains a task with changes ({"group.key": value}) into ``tmp_path / name``; returns that directory."""

    def run(task, name, changes=None, *arguments):
        values = values_of(task)
        # plain layers draw the dropout masks that a static Program draws
        for path, value in {"run.output": str(tmp_path / name), "run.kernels": "plain", "eval.every_epochs": 0, **(changes or {})}.items():
            group, key = path.split(".")
            if path != "eval.every_epochs" or task != "pretrain":
                values.setdefault(group, {})[key] = value
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        run.outcome = unimo2("train", "-c", tmp_path / f"{name}.yaml", *arguments)
        return tmp_path / name

    def checked(*arguments):
        directory = run(*arguments)
        assert run.outcome.status == 0, run.outcome.err
        return directory

    checked.unchecked = run
    return checked


def records(run):
    return [r for r in map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "train"]


def newest(run):
    return sorted((Path(run) / "checkpoints").iterdir())[-1]


def assert_equal_runs(first, second):
    """Losses, weights and optimizer state of two runs."""
    assert len(records(first)) == len(records(second)) > 0
    for one, two in zip(records(first), records(second)):
        names = [key for key in one if key == "loss" or "/" in key or "accuracy" in key or "negatives" in key]
        assert names and one.keys() == two.keys()
        for name in names:
            assert two[name] == pytest.approx(one[name], rel=TOLERANCE, abs=1e-9), (one["step"], name)
    assert one["loss"] != records(first)[0]["loss"]
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = (load_file(newest(run) / name) for run in (first, second))
        assert one.keys() == two.keys()
        assert max(float(np.abs(one[key] - two[key]).max()) for key in one) <= TOLERANCE


SLOW = [pytest.param(task, marks=pytest.mark.slow) for task in ("pretrain", "retrieval", "captioning", "vqa", "entailment", "imagenet")]


@pytest.mark.parametrize("task", ["glue", *SLOW])
def test_thirty_static_steps_equal_thirty_dynamic_ones(train, task):
    assert_equal_runs(train(task, "dynamic"), train(task, "static", {"run.graph": "static"}))


@pytest.mark.slow
def test_every_pretraining_objective_is_equal_with_accumulation_and_recomputation(train):
    changes = {"model.with_grounding_mask": True, "model.with_cmcl_projection": True, "train.steps": 12, "train.accumulate": 2, "train.matching_group": 2,
               "train.pairs": {"caption": 0.5, "masked_grounding": 0.5}, "train.images": {"masked_grounding": 0.5}, "train.texts": {"seq2seq": 0.5}}
    assert_equal_runs(train("pretrain", "dynamic", changes), train("pretrain", "static", {**changes, "run.graph": "static", "run.recompute": True}))


def test_accumulation_clipping_layer_rates_averages_and_recomputation_are_the_dynamic_ones(train):
    changes = {"train.max_steps": 6, "train.accumulate": 3, "optim.clip_norm": 0.1, "optim.layer_decay": 0.8, "optim.ema": 0.9, "optim.warmup_steps": 2,
               "run.save_every": 3}
    dynamic, static = train("glue", "dynamic", changes), train("glue", "static", {**changes, "run.graph": "static", "run.recompute": True})
    assert_equal_runs(dynamic, static)
    one, two = (load_file(newest(run) / "average.safetensors") for run in (dynamic, static))
    assert max(float(np.abs(one[key] - two[key]).max()) for key in one) <= TOLERANCE


@pytest.mark.parametrize("first, second", [("dynamic", "static"), ("static", "dynamic")])
def test_a_checkpoint_of_one_mode_resumes_in_the_other_bit_for_bit(train, first, second):
    changes = {"train.max_steps": 6, "optim.schedule": "constant", "run.save_every": 3}
    straight = train("glue", "straight", {**changes, "run.graph": second})
    begun = train("glue", "begun", {**changes, "run.graph": first, "train.max_steps": 3})
    train("glue", "resumed", {**changes, "run.graph": second}, "--resume", begun / "checkpoints" / "step-000003")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (begun / "checkpoints" / "step-000003" / name).read_bytes() == (straight / "checkpoints" / "step-000003" / name).read_bytes()
        assert (newest(straight.parent / "resumed") / name).read_bytes() == (newest(straight) / name).read_bytes()


@pytest.fixture
def graph_of(values_of, tmp_path):
    """A function: task, its changed values -> (task, StaticGraph, next batch)."""

    def build(name, recompute=False, **groups):
        values = values_of(name)
        values["run"]["output"] = str(tmp_path / "run")
        for group, keys in groups.items():
            values[group].update(keys)
        (tmp_path / "graph.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        config = load_run_config(tmp_path / "graph.yaml")
        task = task_class(name)(config)
        task.total_steps()
        model = task.build_model()
        model.set_recompute(recompute)
        model.train()
        batches = task.train_batches(Shard())
        optimizer = build_optimizer(model.parameters(), config.optim)
        return task, StaticGraph(task, model, optimizer, config.optim, recompute=recompute), lambda: next(batches)

    return build


def test_sizes_that_vary_are_opened_so_that_one_program_serves_them(graph_of):
    _, graph, batch = graph_of("glue")
    lengths = set()
    for _ in range(8):
        own = batch()
        lengths.add(own["input_ids"].shape[1])
        graph.backward(own)
        graph.optimizer.clear_grad()
    assert len(lengths) > 2 and len(graph.programs) == 1
    assert graph.programs[0].shapes["input_ids"] == [8, None] and graph.programs[0].shapes["label"] == [8]


def test_gradients_lie_in_the_dynamic_parameters_until_they_are_cleared(graph_of):
    task, graph, batch = graph_of("glue")
    own = batch()
    paddle.seed(3)
    task.loss(graph.model, to_tensors(own))["loss"].backward()
    expected = {p.name: p.grad.numpy() for p in graph.model.parameters() if p.grad is not None}
    graph.optimizer.clear_grad()
    paddle.seed(3)
    graph.backward(own)
    found = {p.name: p.grad.numpy() for p in graph.model.parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-9, err_msg=name)
    before = {p.name: p.numpy() for p in graph.model.parameters()}
    graph.optimizer.clear_grad()
    assert all(p.grad is None for p in graph.model.parameters())
    graph.optimizer.set_lr(0.1)
    graph.backward(own)
    graph.optimizer.step()
    assert max(float(np.abs(p.numpy() - before[p.name]).max()) for p in graph.model.parameters()) > 0.01


def test_save_vars_writes_files_that_load_released_reads(graph_of, tmp_path):
    task, graph, batch = graph_of("glue")
    with pytest.raises(UserInputError, match="train a step first"):
        graph.save_vars(str(tmp_path / "none"))
    graph.backward(batch())
    graph.optimizer.set_lr(0.01)
    graph.optimizer.step()
    graph.save_vars(str(tmp_path / "vars"))
    own = {p.name: p.numpy() for p in graph.model.parameters()}
    assert {path.name for path in (tmp_path / "vars").iterdir()} == set(own)
    fresh = task.build_model()
    report = load_released(fresh, str(tmp_path / "vars"))
    assert not (report.missing or report.unexpected or report.mismatched)
    for parameter in fresh.parameters():
        np.testing.assert_array_equal(parameter.numpy(), own[parameter.name])


def test_recomputation_keeps_less_for_the_backward_part(graph_of, monkeypatch):
    _, graph, batch = graph_of("glue", recompute=True)
    real, kept = static.recompute_segments, []

    def read_by_backward(program, forward):
        """How many results of the first ``forward`` operations (the forward part) the others read."""
        operations = list(program.global_block().ops)
        made = {value.id for op in forward for value in op.results() if value.initialized() and value.is_dense_tensor_type()}
        own = {op.id() for op in forward}
        return len({v.id for op in operations if op.id() not in own for v in op.operands_source() if v.initialized() and v.id in made})

    def spy(program, segments, count):
        forward = list(program.global_block().ops)[:count]
        kept.append(read_by_backward(program, forward))
        real(program, segments, count)
        kept.append(read_by_backward(program, forward))

    monkeypatch.setattr(static, "recompute_segments", spy)
    graph.backward(batch())
    assert kept[1] < 0.7 * kept[0]


def test_a_loss_that_is_not_finite_changes_nothing(train):
    changes = {"train.max_steps": 3, "optim.learning_rate": 1e35, "optim.clip_norm": 0, "optim.warmup_steps": 0, "optim.schedule": "constant",
               "run.graph": "static", "run.save_every": 1}
    run = train.unchecked("glue", "run", changes)
    assert train.unchecked.outcome.status == 1
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.parametrize("task, changes, workers, problem", [
    ("glue", {"run.graph": "static"}, 2, "run.graph=static trains in one process, this run has 2 workers: Paddle has no collective"),
    ("glue", {"run.graph": "frozen"}, 1, "run.graph: 'frozen' is not one of dynamic, static, to_static"),
    ("glue", {"run.graph": "to_static", "run.recompute": True}, 1, "a traced encoder keeps its activations"),
    ("captioning", {"run.graph": "static", "train.scst": True}, 1, "train.scst: draws captions step by step"),
])
def test_what_cannot_be_trained_so_is_refused_with_the_way_out(train, monkeypatch, task, changes, workers, problem):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(workers))
    run = train.unchecked(task, "run", changes)
    outcome = train.unchecked.outcome
    assert outcome.status == 2 and problem in outcome.err and ("dynamic" in outcome.err)
    assert not run.exists()


def test_a_loss_that_reads_values_while_it_is_traced_is_refused(graph_of):
    task, graph, batch = graph_of("glue")
    loss = task.loss
    task.loss = lambda model, batch: {"loss": loss(model, batch)["loss"] * float(batch["text_mask"].sum())}
    with pytest.raises(UserInputError, match="cannot trace the loss of GlueTask .*set run.graph=dynamic"):
        graph.backward(batch())
    assert paddle.in_dynamic_mode()
    task.loss = loss
    assert np.isfinite(float(task.loss(graph.model, to_tensors(batch()))["loss"])), "the model has its own parameters again"


def test_traced_encoders_in_the_dynamic_loop_compute_the_same(train):
    changes = {"train.max_steps": 8, "optim.layer_decay": 0.8}
    assert_equal_runs(train("glue", "dynamic", changes), train("glue", "to_static", {**changes, "run.graph": "to_static"}))
