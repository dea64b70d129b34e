"""Shell completion: it offers what the parser accepts, where bash is there asked of bash itself."""
import shutil
import subprocess

import pytest

from unimo2_paddle.cli import build_parser
from unimo2_paddle.completion import command_tree, completion_script

SHELLS = ("bash", "zsh", "fish")


@pytest.fixture(scope="module")
def offered():
    """A function: the words of a command line, the last one unfinished -> what bash offers."""
    if shutil.which("bash") is None:
        pytest.skip("no bash on this machine")

    def ask(*words):
        line = " ".join(f"'{word}'" for word in words)
        script = completion_script(build_parser(), "bash") + f'COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _unimo2; printf "%s\\n" "${{COMPREPLY[@]}}"'
        result = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True)
        assert result.returncode == 0 and not result.stderr, result.stderr
        return result.stdout.split()

    return ask


def test_every_command_is_offered_first(offered):
    commands = command_tree(build_parser())["unimo2"].commands
    assert {"train", "eval", "reproduce", "completion"} <= set(commands) <= set(offered("unimo2", ""))
    assert offered("unimo2", "repr") == ["reproduce"]


def test_options_belong_to_their_command(offered):
    assert {"--config", "--override", "--resume"} <= set(offered("unimo2", "train", "--"))
    assert "--resume" not in offered("unimo2", "eval", "--")
    assert "index" in offered("unimo2", "augment", "i")
    assert all(word.startswith("-") for word in offered("unimo2", "augment", "index", "-"))


def test_a_value_is_one_of_the_choices_or_left_to_file_names(offered):
    assert offered("unimo2", "reproduce", "--paper", "") == ["unimo2", "unimo"]
    assert offered("unimo2", "completion", "z") == ["zsh"]
    assert offered("unimo2", "train", "-c", "") == []


def test_a_value_that_is_named_like_a_command_is_not_taken_for_one(offered):
    assert "--paper" in offered("unimo2", "reproduce", "--paper", "unimo2", "--p")


@pytest.mark.parametrize("shell", SHELLS)
def test_every_option_of_every_command_is_in_the_script(shell):
    script = completion_script(build_parser(), shell)
    for name, place in command_tree(build_parser()).items():
        assert name.split()[-1] in script
        for spellings, choices, _, _ in place.options:
            for word in [*choices, *(spelling.lstrip("-") for spelling in spellings)]:
                assert word in script, f"{name} {spellings}"


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_itself_reads_the_script(shell, unimo2, tmp_path):
    outcome = unimo2("completion", shell)
    assert outcome.status == 0 and outcome.out
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    (tmp_path / "script").write_text(outcome.out, encoding="utf-8")
    result = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
