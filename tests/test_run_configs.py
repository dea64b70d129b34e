"""Every run configuration we ship: its header, its keys, and for pre-training two steps of it in small."""
import dataclasses
import json
import re
from pathlib import Path

import paddle
import pytest
import yaml

from unimo2_paddle.cli import build_parser
from unimo2_paddle.config import load_run_config
from unimo2_paddle.tasks import base

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "run_configs").rglob("*.yaml"))
PRETRAIN = [path for path in CONFIGS if path.parent.name == "pretrain"]


def shown(path):
    return path.relative_to(ROOT / "run_configs").as_posix()


def header(path):
    """The comment lines before the first key, as one text."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:end])


def test_there_are_configs_for_pretraining_and_retrieval():
    assert {"pretrain", "retrieval"} <= {path.parent.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=shown)
def test_a_config_is_valid_without_its_data(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = load_run_config(path)
    assert config.run.output.startswith("output/"), "relative, so that it works on every machine"


@pytest.mark.parametrize("path", CONFIGS, ids=shown)
def test_a_header_says_how_to_run_what_it_needs_and_what_to_expect(path):
    text = header(path)
    assert re.match(r"# [A-Z]\S+ .{20,}\.\n", text), "the first line says what it is"
    for line in ("run", "data"):
        assert re.search(rf"^# {line}: +\S", text, re.M), f"no line '# {line}:'"
    assert re.search(r"^# (expected|authors|chance): +\S", text, re.M), "no line '# expected:' (or the authors' figures, or chance)"
    assert f"run_configs/{shown(path)}" in text, "the command names this file"


@pytest.mark.parametrize("path", CONFIGS, ids=shown)
def test_the_commands_of_a_header_are_real(path):
    commands = re.findall(r"\bunimo2 ((?:train|eval|init|demo-data)\b(?: +(?:-\S+|[^\s()&,;]+))*)", header(path))
    for command in commands:
        build_parser().parse_args(command.split())


OPTION = r"-o +(?:\"[^\"]+\"|[\w.]+=(?:\[[^\]]*\]|[^\s,;()]*))"


@pytest.mark.parametrize("path", CONFIGS, ids=shown)
def test_options_shown_in_a_header_are_keys(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = re.sub(r"\s*\n# *", " ", header(path))
    for options in re.findall(rf"{OPTION}(?: +{OPTION})*", text):  # those that stand together belong together
        load_run_config(path, [part.strip('"') for part in re.split(r" *-o +", options)[1:]])


@pytest.mark.parametrize("path", PRETRAIN, ids=shown)
def test_a_pretraining_config_runs_two_steps_in_small(path, demo_data, tiny_pretrain, tmp_path, unimo2):
    values, tiny = yaml.safe_load(path.read_text(encoding="utf-8")), tiny_pretrain(tmp_path / "run")
    sizes = {key: value for key, value in tiny["model"].items() if key != "config"}
    values["model"] = {**values["model"], **sizes, "init": "", "text_vocab_size": 512}
    values["data"].update(vocab=tiny["data"]["vocab"], cache_dir=str(tmp_path / "index"), num_workers=0)
    for corpus in ("pairs", "images", "texts"):
        for source in values["data"].get(corpus, []):
            source["shards"] = str(demo_data / corpus / "*.tar")
    group = values["train"].get("matching_group", 16)
    values["mixture"]["global_batch"] = {"pairs": group, "images": 4, "texts": 8}
    values["train"]["steps"] = 2
    if values.get("eval", {}).get("annotations"):
        values["eval"].update(annotations=str(demo_data / "retrieval" / "dataset_shapes.json"), images=str(demo_data / "retrieval" / "images"),
                              max_images=4)
    values["run"].update(output=str(tmp_path / "run"), progress=False, log_every=1)
    if paddle.__version__.startswith("2."):
        values["run"]["recompute"] = False  # Paddle 2.6.2 cannot recompute on CPU
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    outcome = unimo2("train", "-c", tmp_path / "small.yaml")
    assert outcome.status == 0, outcome.err
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("train") == 2 and (len(kinds) > 2) == bool(values.get("eval", {}).get("annotations"))


def groups_of(cls):
    """A config group and all groups inside it."""
    yield cls
    for field in dataclasses.fields(cls):
        inner = field.default_factory if isinstance(field.default_factory, type) else None
        if inner and dataclasses.is_dataclass(inner):
            yield from groups_of(inner)


def test_every_config_key_is_read_somewhere():
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "unimo2_paddle").rglob("*.py")}
    unread, tasks = set(), {yaml.safe_load(path.read_text(encoding="utf-8"))["task"] for path in CONFIGS}
    for task in sorted(tasks):
        for section in base.task_class(task).sections.values():
            for group in groups_of(section):
                for field in dataclasses.fields(group):
                    # as an attribute, or by its name as a text (getattr, a table of checks)
                    pattern = re.compile(rf"\.{field.name}\b(?!\s*:)|[\"']{field.name}[\"']")
                    if not any(pattern.search(text) for text in sources.values()):
                        unread.add(f"{group.__name__}.{field.name}")
    assert not unread, f"keys that nothing reads: {sorted(unread)}"
