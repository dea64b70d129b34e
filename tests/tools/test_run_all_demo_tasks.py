"""The tool that runs every demo task, with fakes for training and evaluation."""
import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from tests.data_pipeline.region_records import record
from unimo2_paddle.data.formats.bottom_up import BOTTOM_UP
from unimo2_paddle.data.formats.regions import format_regions
from unimo2_paddle.data.region_store import RegionStore

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("run_all_demo_tasks", ROOT / "tools" / "run_all_demo_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Evaluator:
    def __init__(self, name, baselines=None):
        self.name = name
        if baselines is not None:
            self.baselines = baselines


class Fakes:
    """Training and evaluation that only take notes; every metric of every demo reaches ``value``."""

    def __init__(self, value=99.0, fail_on=()):
        self.value, self.fail_on, self.trained, self.judged = value, fail_on, [], []

    def train(self, config, resume):
        assert resume == "auto"
        self.trained.append(Path(config).name)
        if any(text in config for text in self.fail_on):
            raise RuntimeError("out of memory")

    def judge(self, config, overrides):
        assert "eval.split=test" in overrides
        self.judged.append((Path(config).name, [o for o in overrides if o.startswith("model.init")]))
        untrained = any("pretrain" in o for o in overrides)
        value = 40.0 if untrained else self.value
        names = ("ir_r1", "tr_r1", "accuracy", "cider", "pearson", "top1")
        told = {"majority accuracy": 50.0, "most frequent answer": 35.0, "shared words pearson": 20.0, "top1": 2.0}
        first = Evaluator("test", told if "glue" not in config else lambda: told)
        return [(first, {name: value for name in names}), (Evaluator("nearest_neighbour"), {"cider": 0.7})]


@pytest.fixture
def out(tmp_path):
    best = tmp_path / "demo" / "pretrain" / "best"
    best.mkdir(parents=True)
    (best / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "demo"


def run(tool, out, fakes, *arguments):
    return tool.main(["--out", str(out), *arguments], train=fakes.train, judge=fakes.judge)


def test_every_demo_is_trained_once_and_judged_once(tool, out, capsys):
    fakes = Fakes()
    assert run(tool, out, fakes) == 0
    assert len(fakes.trained) == len(set(fakes.trained)) == 9
    judged = [name for name, _ in fakes.judged]
    assert judged.count("retrieval_demo_finetune.yaml") == 2 and len(judged) == 11  # before and after; every other test split once
    printed = capsys.readouterr().out
    assert "verdict" in printed and "MISSED" not in printed and printed.count(" met ") == len(tool.DEMOS)
    table = json.loads((out / "demo_tasks.json").read_text())["table"]
    assert [row["task"] for row in table] == [demo.name for demo in tool.DEMOS] and all(row["met"] for row in table)


def test_trained_models_are_judged_and_paths_moved_below_the_given_directory(tool, out):
    fakes = Fakes()
    run(tool, out, fakes, "--only", "digits", "--only", "shapes")
    assert fakes.judged == [("imagenet_demo_digits.yaml", [f"model.init={out}/imagenet_digits/best"]), ("imagenet_demo_zeroshot.yaml", [])]
    values = yaml.safe_load((out / "demo_configs" / "imagenet_demo_zeroshot.yaml").read_text())
    assert values["model"]["init"] == f"{out}/pretrain/best" and values["data"]["vocab"].startswith(f"{out}/data")


def test_a_second_run_keeps_what_is_finished(tool, out):
    run(tool, out, Fakes())
    again = Fakes()
    assert run(tool, out, again) == 0
    assert again.trained == again.judged == []


def test_a_failed_demo_is_told_and_run_again_next_time(tool, out, capsys):
    broken = Fakes(fail_on=["vqa"])
    assert run(tool, out, broken) == 1
    assert "VQA" in capsys.readouterr().err and len(broken.trained) == 9
    again = Fakes()
    assert run(tool, out, again) == 0
    assert again.trained == ["vqa_demo.yaml"]


def test_a_missed_bar_makes_the_status_1(tool, out, capsys):
    assert run(tool, out, Fakes(value=64.9), "--only", "SST-2") == 1
    assert "MISSED" in capsys.readouterr().out


def test_a_changed_model_is_not_mixed_with_old_results(tool, out, capsys):
    run(tool, out, Fakes(), "--only", "digits")
    (out / "pretrain" / "best" / "model.safetensors").write_bytes(b"other weights")
    assert run(tool, out, Fakes(), "--only", "digits") == 1
    assert "changed since it was run; move" in capsys.readouterr().err


@pytest.mark.parametrize("break_it, text", [
    (lambda out: (out / "pretrain" / "best" / "model.safetensors").unlink(), "make the demo's data and model first"),
    (lambda out: (out / "demo_tasks.json").write_text("[1"), "not a result file of this tool"),
])
def test_wrong_surroundings_are_told_before_any_work(tool, out, capsys, break_it, text):
    break_it(out)
    fakes = Fakes()
    assert run(tool, out, fakes) == 2 and not fakes.trained
    assert text in capsys.readouterr().err


def test_an_unknown_demo_lists_the_known_ones(tool, out, capsys):
    assert run(tool, out, Fakes(), "--only", "chess") == 2
    assert "visual entailment" in capsys.readouterr().err


@pytest.mark.parametrize("bar, baseline, needed", [
    (("at least", 70.0), 33.0, 70.0), (("points above", 15.0), 50.0, 65.0), (("times", 5.0), 2.0, 10.0), (("errors gone", 1 / 3), 40.0, 60.0),
    (("at least and above", 1.0), 0.7, 1.0), (("at least and above", 1.0), 1.2, 1.2),
])
def test_bars_follow_from_their_baseline(tool, bar, baseline, needed):
    assert tool.threshold(bar, baseline) == pytest.approx(needed)
    assert tool.is_met(bar, needed + 1e-9, baseline) and not tool.is_met(bar, needed - 1e-6, baseline)


def test_a_tie_with_the_baseline_is_not_above_it(tool):
    assert not tool.is_met(("at least and above", 1.0), 1.2, 1.2)


def test_unimos_texts_start_from_scratch_and_beat_the_better_of_two_baselines(tool, tmp_path, capsys):
    class Texts(Fakes):
        def judge(self, config, overrides):
            judged = super().judge(config, overrides)
            metrics = {name: self.value for name in ("rouge_l", "bleu_4", "f1", "accuracy", "pearson")}
            told = {f"{name} {metric}": value for metric in ("rouge_l", "bleu_4", "f1")
                    for name, value in (("first sentence", 30.0), ("most frequent target", 45.0))}
            return [(Evaluator("test", {**judged[0][0].baselines, **told} if "glue" not in config else judged[0][0].baselines), metrics)]

    fakes = Texts(value=61.0)
    out = tmp_path / "nothing_pretrained"
    assert run(tool, out, fakes, "--family", "unimo", "--only", "CoQA", "--only", "headlines") == 0
    assert [name for name, _ in fakes.judged] == ["unimo_seq2seq_demo_gigaword.yaml", "unimo_seq2seq_demo_coqa.yaml"]
    rows = json.loads((out / "demo_tasks.json").read_text())["table"]
    assert {row["needed"] for row in rows} == {60.0} and all(row["met"] for row in rows)
    assert run(tool, tmp_path / "again", Texts(value=59.0), "--family", "unimo", "--only", "CoQA") == 1


def test_unimos_pictures_start_from_its_own_pretraining_which_comes_first(tool, tmp_path, monkeypatch, capsys):
    class Pretraining(Fakes):
        def judge(self, config, overrides):
            judged = super().judge(config, overrides)
            judged[0][1].update(alone_ir_r1=40.0, alone_tr_r1=70.0)
            return judged

        def train(self, config, resume):
            super().train(config, resume)
            if "pretrain" in config:
                best = tmp_path / "unimo" / "pretrain" / "best"
                best.mkdir(parents=True)
                (best / "model.safetensors").write_bytes(b"weights")

    prepared = []
    monkeypatch.setattr(tool, "prepare", lambda kind, out: prepared.append(kind))
    fakes = Pretraining(value=80.0)
    assert run(tool, tmp_path, fakes, "--family", "unimo", "--only", "retrieval") == 2, "nothing is pre-trained yet"
    assert "--only zero-shot" in capsys.readouterr().err
    assert run(tool, tmp_path, fakes, "--family", "unimo", "--only", "zero-shot", "--only", "retrieval") == 0
    assert fakes.trained == ["unimo_pretrain_demo.yaml", "unimo_retrieval_demo.yaml"] and prepared[0] == "all" and "bottom_up" in prepared
    assert len(fakes.judged) == 2
    rows = json.loads((tmp_path / "demo_tasks.json").read_text())["table"]
    assert [row["needed"] for row in rows] == pytest.approx([10 / 3, 10 / 3, 60.0, 80.0]) and rows[0]["processor_minutes"] is not None


def test_every_demo_names_a_config_of_ours(tool):
    for demo in tool.FAMILIES["all"]:
        values = yaml.safe_load((ROOT / "run_configs" / demo.config).read_text())
        assert values["run"]["output"].startswith(tool.CONFIG_OUTPUT) and ("train" in values or "optim" in values) == demo.train


def test_missing_stores_of_region_features_are_made_from_the_demo_data(tool, tmp_path):
    files = tmp_path / "data" / "regions" / "bottom_up"
    files.mkdir(parents=True)
    for name in ("objects", "attributes"):
        (files.parent / f"{name}_vocab.txt").write_text("thing\n")
    for number, split in enumerate(("train", "dev"), 1):
        (files / f"{split}.tsv").write_text(format_regions(record(number), BOTTOM_UP) + "\n")
    tool.prepare("bottom_up", str(tmp_path))
    tool.prepare("bottom_up", str(tmp_path))  # what is there is kept
    found = {split: list(RegionStore(tmp_path / "unimo" / "regions" / split)) for split in ("train", "val")}
    assert found == {"train": ["1"], "val": ["2"]} and not (tmp_path / "unimo" / "regions" / "test").exists()
