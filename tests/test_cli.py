"""The command line: help, exit statuses, and how little it imports."""
import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from unimo2_paddle import cli
from unimo2_paddle.errors import ConfigError, DataError, TrainingError

ROOT = Path(__file__).resolve().parent.parent


def command_names():
    """The names of all commands, asked from the parser itself."""
    parser = cli.build_parser()
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return sorted(subparsers.choices)


def exit_status(argv):
    """The status with which ``unimo2 ARGV`` would end."""
    try:
        return cli.main(argv)
    except SystemExit as error:  # argparse's way out
        return error.code


@pytest.mark.parametrize("name", command_names())
def test_every_command_explains_itself(name, capsys):
    assert exit_status([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: unimo2 {name}" in text
    assert "--help" in text


def test_help_lists_every_command(capsys):
    assert exit_status(["--help"]) == 0
    text = capsys.readouterr().out
    for name in command_names():
        assert f"\n    {name}" in text


@pytest.mark.parametrize("argv", [["no-such-command"], [], ["train"], ["convert", "--from", "a", "--to", "b", "--format", "onnx"]])
def test_wrong_usage_ends_with_status_2_and_says_why(argv, capsys):
    assert exit_status(argv) == 2
    assert "usage: unimo2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "raised, status",
    [
        (None, 0),
        (ConfigError("optim.learning_rat: unknown key, did you mean learning_rate?", "run.yaml"), 2),
        (DataError("captions.json: empty"), 2),
        (TrainingError("loss is not finite at step 3"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_status_tells_whose_fault_it_was(monkeypatch, capsys, raised, status):
    def command(args):
        if raised is not None:
            raise raised

    monkeypatch.setattr(cli, "_validate", command)
    assert cli.main(["validate", "-c", "run.yaml"]) == status
    message = capsys.readouterr().err
    assert "Traceback" not in message
    if isinstance(raised, Exception):
        assert message.strip() == f"unimo2 validate: {raised}"


def test_a_programming_error_is_not_swallowed(monkeypatch):
    def broken(args):
        raise KeyError("surprise")

    monkeypatch.setattr(cli, "_validate", broken)
    with pytest.raises(KeyError):
        cli.main(["validate", "-c", "run.yaml"])


def test_overrides_and_config_reach_the_command(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_train", seen.append)
    assert cli.main(["train", "-c", "run.yaml", "-o", "train.batch_size=8", "-o", "run.seed=2", "--resume", "auto"]) == 0
    (args,) = seen
    assert (args.config, args.override, args.resume) == ("run.yaml", ["train.batch_size=8", "run.seed=2"], "auto")


def test_help_needs_neither_paddle_nor_any_other_heavy_import():
    script = (
        "import sys\n"
        "from unimo2_paddle import cli\n"
        "try:\n"
        "    cli.main(['--help'])\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'paddle', 'paddlenlp', 'paddleclas', 'numpy', 'cv2', 'visualdl', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["train", "eval"])
def test_tools_are_the_commands_and_need_no_installation(name, tmp_path):
    # -S hides site-packages, so only the checkout itself can provide the package.
    tool = subprocess.run(
        [sys.executable, "-S", str(ROOT / "tools" / f"{name}.py"), "--help"], cwd=tmp_path, capture_output=True, text=True)
    command = subprocess.run(
        [sys.executable, "-m", "unimo2_paddle.cli", name, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert tool.returncode == 0, tool.stderr
    assert tool.stdout == command.stdout


@pytest.mark.parametrize("name", ["train", "eval"])
def test_tools_pass_the_exit_status_on(name, tmp_path):
    tool = subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{name}.py"), "--no-such-option"], cwd=tmp_path, capture_output=True, text=True)
    assert tool.returncode == 2
