"""Commands in README and docs: those marked to run are run in small, all others must be commands that exist, with options and files that exist.

A block of commands in a document is fenced as ``bash`` (or not at all named, when a line of it starts like a command of ours). The line before it can be
``<!-- test: run -->`` (run here, in order, with a tiny model and few steps) or ``<!-- needs: ... -->`` (what a reader needs besides the repository).
"""
import argparse
import ast
import os
import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from unimo2_paddle.cli import build_parser
from unimo2_paddle.config import load_run_config
from unimo2_paddle.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "model_zoo/README.md")] + sorted((ROOT / "docs").rglob("*.md"))
OURS = ("unimo2 ", "python tools/", "python examples/", "python -m paddle.distributed.launch", "bash tools/", "tools/")
FOREIGN = {"pip", "git", "visualdl", "curl", "mkdocs", "pytest", "pre-commit", "docker", "img2dataset", "source", ".", "cd", "export", "eval", "mypy", "sbatch",
           "kubectl", "apt-get"}
OTHER_MODULES = {"pytest", "pip", "mkdocs", "http.server", "venv"}  # after python -m
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_]+\b|\.\.\.|^\w+\.yaml$")  # CONFIG, my.yaml: the reader's own


@dataclass
class Block:
    """A fenced block: its document, line, language, note (``test: run``, ``needs: gpu`` or nothing) and text."""

    document: Path
    line: int
    language: str
    note: str
    text: str

    @property
    def where(self):
        return f"{self.document.relative_to(ROOT).as_posix()}:{self.line}"


def blocks_of(document):
    lines, found, number = document.read_text(encoding="utf-8").splitlines(), [], 0
    while number < len(lines):
        fence = re.match(r"\s*```(\w*)\s*$", lines[number])
        if not fence:
            number += 1
            continue
        end = next(place for place in range(number + 1, len(lines)) if lines[place].strip() == "```")
        note = re.match(r"<!-- ((?:test|needs): .*?) -->", lines[number - 1]) if number else None
        text = textwrap.dedent("\n".join(lines[number + 1:end]))
        found.append(Block(document, number + 1, fence.group(1), note.group(1) if note else "", text))
        number = end + 1
    return found


def commands_of(block):
    """The commands of a block, one text each; comments gone, continued lines joined, `a && b` and pipes taken apart."""
    text, found = re.sub(r"\\\n\s*", " ", block.text), []
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        command = []
        for word in [*words, "&&"]:
            if word in ("&&", "||", "|", ";", "&"):
                if command:
                    found.append(command)
                command = []
            else:
                command.append(word)
    return found


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]
SHELL = [block for block in BLOCKS if block.language in ("bash", "sh", "shell")
         or (not block.language and any(line.startswith(OURS) for line in block.text.splitlines()))]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def checked(words, where):
    """Fail unless the command exists with these options; its configuration and keys are checked too."""
    words = [word for word in words if not re.fullmatch(r"\d?>&?\d?.*", word)]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]  # VARIABLE=value before a command
    if not words or words[0] in FOREIGN:
        return _checked_extras(words, where)
    if words[0] == "unimo2":
        return _checked_unimo2(words[1:], where)
    if words[0] in ("python", "python3", ".venv/bin/python") and words[1] == "-m":
        if words[2] == "paddle.distributed.launch":
            place = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
            assert place is not None, f"{where}: what is to be launched?"
            return checked(["python", *words[place:]], where)
        assert words[2] in OTHER_MODULES, f"{where}: python -m {words[2]} is not known to this test"
        return None
    if words[0] in ("python", "python3", "bash", ".venv/bin/python") or words[0].startswith("tools/"):
        script = words[0] if words[0].startswith("tools/") else words[1]
        assert (ROOT / script).is_file(), f"{where}: {script} does not exist"
        return _checked_script(script, words[words.index(script) + 1:], where)
    assert words[0].startswith((".venv/bin/", "$")), f"{where}: {words[0]} is not known to this test; add it to FOREIGN if it is right"
    return None


def _checked_extras(words, where):
    """Extras of `pip install .[name]` must exist."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    extras = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "EXTRAS_REQUIRE")
    for names in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
        assert set(names.split(",")) <= set(extras), f"{where}: extras {names}"


class Refused(Exception):
    """What argparse has to say."""


def _checked_unimo2(words, where):
    if words and words[-1] == "...":  # the rest is up to the reader
        words = words[:-1]
        if not any(word.startswith("-") for word in words):
            return
    words = [part for word in words for part in word.split("|")[:1]]  # index|rewrite: one of them
    if "--help" in words:
        words = words[:words.index("--help")] + ["--help"]
    try:
        args = _parser().parse_args(words)
    except Refused as error:
        raise AssertionError(f"{where}: unimo2 {' '.join(words)}: {error}") from None
    except SystemExit as end:
        assert end.code == 0, f"{where}: unimo2 {' '.join(words)}"
        return
    if getattr(args, "config", None) and hasattr(args, "override"):
        _checked_config(args.config, args.override, where)
    elif getattr(args, "config", None) and args.config.startswith("unimo2_paddle/"):
        assert (ROOT / args.config).is_file(), f"{where}: {args.config} does not exist"


def _parser():
    parser = build_parser()
    waiting = [parser]
    while waiting:
        one = waiting.pop()
        one.error = _refuse
        waiting += [sub for action in one._actions if isinstance(action, argparse._SubParsersAction) for sub in action.choices.values()]
    return parser


def _refuse(message):
    raise Refused(message)


def _checked_config(config, overrides, where):
    """The configuration exists and takes the overrides; only what does not exist yet (checkpoints, data) is left to the run."""
    if PLACEHOLDER.search(config) or config.startswith("output/"):
        return
    assert (ROOT / config).is_file(), f"{where}: {config} does not exist"
    try:
        load_run_config(ROOT / config, overrides)
    except ConfigError as error:
        raise AssertionError(f"{where}: {error}") from None


def _checked_script(script, words, where):
    """Options of a tool must stand in its source; the tools that are unimo2 commands are checked as those."""
    same = {"tools/train.py": "train", "tools/eval.py": "eval", "tools/predict.py": "predict"}
    if script in same:
        return _checked_unimo2([same[script], *words], where)
    source = (ROOT / script).read_text(encoding="utf-8")
    options = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
    if script == "tools/launch.sh":
        options -= {"-o", "--resume", "-c"}  # passed on to unimo2 train
        configs = [word for word in words if word.endswith(".yaml")]
        if configs:
            _checked_config(configs[0], [words[number + 1] for number, word in enumerate(words) if word == "-o"], where)
    elif script.startswith("examples/"):
        assert words[0] in ("train", "eval", "validate"), where
        options -= {"-o", "-c"}
    elif script == "tools/test.sh":
        options -= {"-n", "-k", "-x", "-q", "--pdb"}  # pytest's
    missing = sorted(option for option in options if not re.search(rf"[\"'\s|(]{re.escape(option)}[\"'\s|)=]", source))
    assert not missing, f"{where}: {script} has no option {', '.join(missing)}"
    return None


def test_there_are_commands_to_check():
    assert len(SHELL) > 30 and len({block.document for block in SHELL}) > 12
    assert sum(len(commands_of(block)) for block in SHELL) > 90


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.where)
def test_commands_exist_with_their_options_configurations_and_keys(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in commands_of(block):
        if "unimo2 zoo publish" in block.text:  # a name the reader has just made
            words = [re.sub("^model.init=zoo:.*", "model.init=output/own", word) for word in words]
        checked(words, block.where)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.where)
def test_python_in_documents_compiles_and_imports_names_that_exist(block):
    if block.document.name == "add_a_task.md":
        return  # parts of a file: tests/docs/test_example_task.py
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("unimo2_paddle"):
            module = __import__(node.module, fromlist=[alias.name for alias in node.names])
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block.where}: {node.module} has no {alias.name}"


SMALL = {  # what is set besides a command's own options, so that it takes seconds
    "pretrain": {"train.steps": 2, "train.matching_group": 4, "train.fused_per_group": 4, "mixture.global_batch": "{pairs: 8, images: 4, texts: 8}",
                 "data.num_workers": 0, "eval.max_images": 4},
    "retrieval": {"eval.max_images": 4},
    "captioning": {"train.max_steps": 2, "train.batch_size": 4, "eval.max_images": 4, "eval.decoding.max_length": 8, "eval.decoding.beam_size": 2,
                   "eval.java_metrics": "false"},
}


def small(words, tiny_model):
    """The words of a command, with the overrides that make it small."""
    if words[0] == "demo-data":
        return [("24" if words[number - 1] == "--size" else word) for number, word in enumerate(words)]
    if words[0] not in ("train", "eval"):
        return words
    config = load_run_config(ROOT / words[words.index("-c") + 1])
    overrides = {**SMALL[config.task], "run.progress": "false"} if words[0] == "train" else dict(SMALL[config.task])
    if config.task == "pretrain":
        overrides.update({f"model.{key}": value for key, value in tiny_model.items()})
    known = {key for key in overrides if key.split(".")[0] in config.groups}
    return [*words, *(part for key in overrides if key in known for part in ("-o", f"{key}={overrides[key]}"))]


def test_blocks_marked_to_run_work_one_after_the_other(tiny_pretrain, unimo2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, blocks = tiny_pretrain(tmp_path)["model"], [block for block in BLOCKS if block.note == "test: run"]
    assert len(blocks) >= 4 and "python" in {block.language for block in blocks}
    for block in blocks:
        if block.language == "python":
            exec(compile(block.text, block.where, "exec"), {})
            assert "parameters" in capsys.readouterr().out
            continue
        for words in commands_of(block):
            assert words[0] == "unimo2", f"{block.where}: only unimo2 commands are run here"
            outcome = unimo2(*small(words[1:], model))
            assert outcome.status == 0, f"{block.where}: {' '.join(words)}: {outcome.err}"
    for left in ("pretrain/report.html", "pretrain/best", "retrieval/predictions/results.json", "captioning/predictions/test.html", "released"):
        assert os.path.exists(os.path.join("output", "demo", left)), left


@pytest.mark.parametrize(("text", "told"), [
    ("unimo2 train -c run_configs/nowhere.yaml", "does not exist"), ("unimo2 trian -c x.yaml", "invalid choice"),
    ("unimo2 eval -c run_configs/vqa/demo.yaml -o eval.splitt=test", "did you mean 'split'"), ("unimo2 zoo list --colour", "unrecognized"),
    ("python tools/nothing.py", "does not exist"), ("python tools/glue_grid.py --colour red", "no option --colour"), ("rm -rf output", "not known"),
    ("pip install .[nothing]", "extras nothing"),
])
def test_a_wrong_command_is_found(text, told):
    with pytest.raises(AssertionError, match=re.escape(told)):
        checked(shlex.split(text), "here")
