"""GLUE finetuning: packing, losses, evaluation per part, server files, the grid, and the commands end to end."""
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from unimo2_paddle import Predictor
from unimo2_paddle.config import load_run_config
from unimo2_paddle.data.demo_tasks.glue import write
from unimo2_paddle.data.formats.glue import GLUE, check_submission
from unimo2_paddle.data.tokenizer import Tokenizer
from unimo2_paddle.errors import ConfigError, DataError
from unimo2_paddle.tasks.base import to_tensors
from unimo2_paddle.tasks.glue import GlueTask, encode_text

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = {
    "config": "unimo2_demo", "hidden_size": 16, "text_hidden_size": 16, "vit_hidden_size": 16, "num_attention_heads": 2, "text_num_attention_heads": 2,
    "vit_num_attention_heads": 2, "num_hidden_layers": 1, "text_num_hidden_layers": 1, "vit_num_hidden_layers": 1, "num_codebook": 16, "topk_value": 4,
    "initializer_range": 0.2,
}
TITLES = {"sst2": "SST-2", "mnli": "MNLI", "cola": "CoLA", "stsb": "STS-B"}


@pytest.fixture(scope="module")
def glue_data(demo_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("glue")
    write(str(out), str(demo_data), 1)
    return out


@pytest.fixture
def config(glue_data, demo_data, tmp_path):
    """A function that writes a tiny run configuration of a data set and returns its path."""

    def make(dataset, changes=None):
        values = {
            "task": "glue", "model": dict(MODEL),
            "data": {"dataset": dataset, "directory": str(glue_data / TITLES[dataset]), "answers": str(glue_data / "answers"),
                     "vocab": str(demo_data / "vocab"), "max_text_len": 64},
            "train": {"epochs": 1, "batch_size": 16}, "optim": {"learning_rate": 3e-3},
            "eval": {"split": "val", "batch_size": 16},
            "run": {"output": str(tmp_path / f"run_{dataset}"), "progress": False},
        }
        for path, value in (changes or {}).items():
            group, _, key = path.partition(".")
            values[group][key] = value
        path = tmp_path / f"{dataset}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    return make


def task_of(path, *overrides):
    return GlueTask(load_run_config(path, overrides))


def test_one_separator_stands_between_the_texts(demo_data):
    tokenizer = Tokenizer.from_directory(demo_data / "vocab")
    one, two = tokenizer.encode("a red ring"), tokenizer.encode("a box")
    assert encode_text(tokenizer, "a red ring", None, 64) == [tokenizer.cls_id, *one, tokenizer.sep_id]
    assert encode_text(tokenizer, "a red ring", "a box", 64) == [tokenizer.cls_id, *one, tokenizer.sep_id, *two, tokenizer.sep_id]


@pytest.mark.parametrize("longest", range(5, 16))
def test_too_long_pairs_lose_the_end_of_the_longer_text(demo_data, longest):
    tokenizer = Tokenizer.from_directory(demo_data / "vocab")
    one, two = tokenizer.encode("a red ring above a blue box"), tokenizer.encode("a small box")
    a, b = list(one), list(two)
    while len(a) + len(b) > longest - 3:  # token by token, as the authors' reader pops
        (a if len(a) > len(b) else b).pop()
    found = encode_text(tokenizer, "a red ring above a blue box", "a small box", longest)
    assert found == [tokenizer.cls_id, *a, tokenizer.sep_id, *b, tokenizer.sep_id] and len(found) <= longest
    assert encode_text(tokenizer, "a red ring above a blue box", None, 5) == [tokenizer.cls_id, *one[:3], tokenizer.sep_id]


@pytest.mark.parametrize("dataset", list(GLUE))
def test_the_loss_is_cross_entropy_or_the_mean_squared_error_on_raw_scores(config, dataset):
    task = task_of(config(dataset))
    data = task.split("train")
    batch = to_tensors(task.collate([data.sample(i, None) for i in range(6)]))
    model = task.build_model()
    model.eval()
    loss = float(task.loss(model, batch)["loss"])
    logits = model(**{key: batch[key] for key in ("input_ids", "position_ids", "text_mask")}).numpy().astype("float64")
    labels = data.labels[:6]
    if dataset == "stsb":
        assert logits.shape == (6, 1) and data.labels.dtype == np.float32
        assert loss == pytest.approx(np.mean((logits[:, 0] - labels) ** 2), rel=1e-4)
    else:
        assert logits.shape == (6, 3 if dataset == "mnli" else 2)
        rows = [math.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, labels)]
        assert loss == pytest.approx(np.mean(rows), rel=1e-4)


def test_a_prediction_does_not_depend_on_the_other_sentences_of_its_batch(config):
    task = task_of(config("mnli"))
    data, model = task.split("train"), task.build_model()
    model.eval()
    samples = [data.sample(i, None) for i in range(5)]

    def logits(chosen):
        batch = to_tensors(task.collate(chosen))
        return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], text_mask=batch["text_mask"]).numpy()

    assert np.abs(logits(samples)[0] - logits(samples[:1])[0]).max() < 1e-5


def test_the_dictionary_free_model_has_no_codebook_and_trains(config):
    task = task_of(config("sst2", {"model.model_type": "baseline"}))
    model = task.build_model()
    names = {parameter.name for parameter in model.parameters()}
    assert "vq_emb" not in names and not any(name.startswith("vit.") for name in names)
    batch = to_tensors(task.collate([task.split("train").sample(i, None) for i in range(4)]))
    loss = task.loss(model, batch)["loss"]
    loss.backward()
    assert any(float(p.grad.abs().max()) > 0 for p in model.parameters() if p.grad is not None)


def test_mnli_judges_both_development_sets_and_chooses_on_the_matched_one(config):
    task = task_of(config("mnli"))
    assert [judge.name for judge in task.evaluators()] == ["val_matched", "val_mismatched"]
    assert task.selection == "val_matched/accuracy"
    assert [judge.name for judge in task_of(config("mnli"), "eval.split=test").evaluators()] == ["test_matched", "test_mismatched", "test_ax"]
    assert {name: task_of(config(name)).selection for name in ("sst2", "cola", "stsb")} == {
        "sst2": "val/accuracy", "cola": "val/matthews", "stsb": "val/pearson_spearman"}


@pytest.mark.parametrize("dataset", list(GLUE))
def test_train_then_judge_the_test_split_once(config, unimo2, dataset, tmp_path):
    path = config(dataset)
    outcome = unimo2("train", "-c", path)
    assert outcome.status == 0, outcome.err
    best = tmp_path / f"run_{dataset}" / "best"
    about = json.loads((best / "task.json").read_text())
    assert about["task"] == "glue" and about["dataset"] == dataset and about["labels"] == list(GLUE[dataset].labels)
    assert (best / "vocab" / "vocab.txt").is_file() and (best / "model.safetensors").is_file()
    outcome = unimo2("eval", "-c", path, "-o", f"model.init={best}", "-o", "eval.split=test", "-o", f"run.output={tmp_path / 'test'}")
    assert outcome.status == 0, outcome.err
    assert "baseline: " in outcome.out and ("shared words pearson" if dataset == "stsb" else "majority accuracy") in outcome.out
    predictor = Predictor(best)
    for part, (name, _) in GLUE[dataset].submissions.items():
        count = check_submission(str(tmp_path / "test" / "predictions" / "submission" / name), dataset, part, size=0)
        label = "_".join(filter(None, ("test", part)))
        rows = [json.loads(line) for line in (tmp_path / "test" / "predictions" / f"{label}.jsonl").read_text().splitlines()]
        assert len(rows) == count and {"text_a", "prediction", "label", "correct"} <= set(rows[0])
        assert (tmp_path / "test" / "predictions" / f"{label}.html").is_file()
        again = predictor.predict_batch([{key: row[key] for key in ("text_a", "text_b") if key in row} for row in rows[:5]])
        for row, result in zip(rows, again):
            if dataset == "stsb":
                assert result.score == pytest.approx(row["prediction"], abs=1e-3)
            else:
                assert result.probabilities == pytest.approx(row["probabilities"], abs=2e-4)


def test_test_sentences_without_answers_are_predicted_only(config, unimo2, tmp_path):
    path = config("cola", {"data.answers": ""})
    task = task_of(path)
    judge = task_of(path, "eval.split=test").evaluators()[0]
    assert judge.run(task.build_model()) == {}
    assert "predictions only" in judge.table()
    judge.write_report(str(tmp_path))
    assert check_submission(str(tmp_path / "submission" / "CoLA.tsv"), "cola", size=0) == len(judge.dataset)
    assert "label" not in json.loads((tmp_path / "test.jsonl").read_text().splitlines()[0])


def test_stsb_starts_from_an_mnli_model_with_a_new_head(config, unimo2, tmp_path):
    assert unimo2("train", "-c", config("mnli", {"train.max_steps": 1})).status == 0
    init = tmp_path / "run_mnli" / "best"
    outcome = unimo2("train", "-c", config("stsb", {"model.init": str(init), "train.max_steps": 1}))
    assert outcome.status == 0, outcome.err
    outcome = unimo2("eval", "-c", config("stsb", {"model.init": str(init)}), "-o", f"run.output={tmp_path / 'judged'}")
    assert outcome.status == 2 and "cls_out" in outcome.err, "an evaluation needs the task's own head"


@pytest.mark.parametrize("changes, told", [
    ({"data.dataset": "qqp"}, "'qqp' is not one of sst2"),
    ({"data.labels": ["0", "2"]}, "labels: 0, 2 must be 0, 1"),
    ({"data.max_text_len": 4}, "max_text_len: must be at least 5"),
    ({"train.dropout": 1.0}, "dropout: must be in"),
    ({"data.folder": "x"}, "unknown key"),
])
def test_wrong_keys_are_told(config, changes, told):
    with pytest.raises(ConfigError, match=told):
        load_run_config(config("sst2", changes))


def test_texts_longer_than_the_model_are_refused(config):
    with pytest.raises(ConfigError, match="positions for 64 tokens"):
        task_of(config("sst2", {"data.max_text_len": 65}))


def test_answers_of_other_data_are_refused(config, glue_data, tmp_path):
    shutil.copytree(glue_data / "answers", tmp_path / "answers")
    (tmp_path / "answers" / "SST-2.tsv").write_text("index\tprediction\n0\t1\n")
    with pytest.raises(DataError, match="no answer for test sentence 1"):
        task_of(config("sst2", {"data.answers": str(tmp_path / "answers"), "eval.split": "test"})).evaluators()


@pytest.fixture
def grid(monkeypatch):
    """The grid tool, training in this process instead of in a new one."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import glue_grid

    from unimo2_paddle.cli import main

    calls = []

    def run(command):
        words = [str(word) for word in command]
        calls.append(words)
        return type("Done", (), {"returncode": main([Path(words[1]).stem, *words[2:]])})

    monkeypatch.setattr(glue_grid.subprocess, "run", run)
    glue_grid.calls = calls
    yield glue_grid
    sys.modules.pop("glue_grid", None)


def test_a_grid_is_one_command_that_resumes_and_summarises(config, grid, capsys, tmp_path):
    path = config("cola", {"train.max_steps": 2, "run.output": str(tmp_path / "cola")})
    arguments = ["-c", path, "--learning-rates", "1e-3,1e-2", "--seeds", "1,2"]
    assert grid.main(arguments) == 0 and len(grid.calls) == 4
    root = tmp_path / "cola_grid"
    table = (root / "grid.md").read_text()
    assert "| 0.001 | 16 | 2 |" in table and "| 0.01 | 16 | 2 |" in table and "chosen: learning rate" in table
    runs = json.loads((root / "grid.json").read_text())["runs"]
    assert [run["value"] for run in runs] == sorted((run["value"] for run in runs), reverse=True)
    assert not list(root.glob("*/checkpoints")) and len(list(root.glob("*/best/model.safetensors"))) == 4
    (root / "lr0.01_bs16_seed2" / "result.json").unlink()  # as if it had been interrupted at its very end
    shutil.rmtree(root / "lr0.01_bs16_seed2")
    assert grid.main([*arguments, "--test"]) == 0 and len(grid.calls) == 6, "one run again, and the test"
    assert (root / "test" / "predictions" / "submission" / "CoLA.tsv").is_file()
    assert grid.main([*arguments, "--test"]) == 0 and len(grid.calls) == 6, "the test split is judged once"
    assert grid.main([*arguments, "-o", "train.max_steps=1"]) == 2
    assert "another configuration" in capsys.readouterr().err


def test_the_table_has_best_mean_and_deviation(grid):
    results = [{"learning_rate": rate, "batch_size": 16, "seed": seed, "value": value, "step": 5, "metrics": {"val/matthews": value}}
               for rate, seed, value in ((2e-5, 1, 62.0), (1e-5, 2, 61.0), (1e-5, 1, 59.0))]
    lines = grid.summary(results, "val/matthews").splitlines()
    assert lines[2:5] == ["| 1e-05 | 16 | 2 | 61.00 | 60.00 | 1.41 |", "| 2e-05 | 16 | 1 | 62.00 | 62.00 | - |", "| all | all | 3 | 62.00 | 60.67 | 1.53 |"]
    assert "seed 1, step 5: val/matthews 62.00" in lines[-1]


def test_a_folder_for_the_server_is_checked_and_packed(glue_data, monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import glue_submission

    assert glue_submission.main([str(glue_data / "answers"), "--any-size", "--zip", str(tmp_path / "glue.zip")]) == 0
    assert "MNLI-m.tsv" in capsys.readouterr().out and (tmp_path / "glue.zip").stat().st_size > 100
    assert glue_submission.main([str(glue_data / "answers")]) == 2
    assert "the test set has 1821" in capsys.readouterr().err
