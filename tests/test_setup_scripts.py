"""tools/setup_env.sh, with a stand-in for Python: what it installs, when it does so again, and what it refuses."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Answers the few questions the script asks and writes down every call of pip.
FAKE_PYTHON = r"""#!/usr/bin/env bash
case "$*" in
    *python_version*) echo "$FAKE_VERSION" ;;
    *version_info*) case $FAKE_VERSION in 3.9.* | 3.10.* | 3.11.*) exit 0 ;; *) exit 1 ;; esac ;;
    *base_prefix*) [ -f "$(dirname "$0")/../pyvenv.cfg" ] ;;
    *_base_executable*) echo "$0" ;;
    *ensurepip*) exit "${FAKE_NO_VENV:-0}" ;;
    '-m venv '*) mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp "$0" "$3/bin/python" ;;
    *'import cv2'*) [ -z "${FAKE_NO_LIBGL-}" ] || grep -q opencv-python-headless== "$FAKE_LOG" ;;
    '-m pip --version') ;;
    '-m pip '*) echo "$0 $*" >>"$FAKE_LOG"; [[ $* != *"${FAKE_FAILING-nothing}"* ]] ;;
    *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""


class Checkout:
    """A copy of what the script reads, at a path with a space, with the stand-in as its Python."""

    def __init__(self, base):
        self.root = base / "my clone"
        (self.root / "tools").mkdir(parents=True)
        for path in [*ROOT.glob("requirements*.txt"), ROOT / "setup.py", ROOT / "pyproject.toml"]:
            shutil.copy(path, self.root)
        for name in ("setup_env.sh", "demo.sh", "test.sh"):
            shutil.copy(ROOT / "tools" / name, self.root / "tools")
        self.python = base / "python with space"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        self.log = base / "pip.log"
        self.log.touch()

    def run(self, *arguments, script="setup_env.sh", **environment):
        """Run a script from elsewhere; returns the finished process."""
        settings = {"PYTHON": str(self.python), "FAKE_VERSION": "3.11.4", "FAKE_LOG": str(self.log), **environment}
        return subprocess.run(["bash", str(self.root / "tools" / script), *arguments], cwd=self.root.parent,
                              env={**os.environ, **settings}, capture_output=True, text=True)

    def pip_calls(self):
        """The calls of pip since the last question."""
        calls = self.log.read_text().splitlines()
        self.log.write_text("")
        assert all(call.startswith(f"{self.root}/.venv") for call in calls), "pip must never run outside of the environment"
        return calls


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_first_run_installs_and_second_does_nothing(checkout):
    first = checkout.run()
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{checkout.root}/.venv\n"
    assert any(f"--editable {checkout.root}" in call for call in checkout.pip_calls())
    second = checkout.run()
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert checkout.pip_calls() == []


def test_a_changed_requirement_is_installed(checkout):
    checkout.run()
    checkout.pip_calls()
    with open(checkout.root / "requirements.txt", "a") as file:
        file.write("pycocoevalcap==1.2  # caption metrics\n")
    assert checkout.run().returncode == 0
    assert any("install" in call for call in checkout.pip_calls())
    assert "pycocoevalcap==1.2" in (checkout.root / ".venv" / "requirements.txt").read_text()


@pytest.mark.parametrize("failing", ["--constraint", "--no-build-isolation -r", "--editable"])
def test_an_interrupted_installation_is_redone(checkout, failing):
    broken = checkout.run(FAKE_FAILING=failing)
    assert broken.returncode == 1
    assert "Run the command again" in broken.stderr
    checkout.pip_calls()
    assert checkout.run().returncode == 0
    assert any("--editable" in call for call in checkout.pip_calls())


@pytest.mark.parametrize("lost", ["pyvenv.cfg", "bin/python"])
def test_a_damaged_environment_is_made_anew(checkout, lost):
    # Without pyvenv.cfg its Python is the system's, and pip would install there.
    checkout.run()
    checkout.pip_calls()
    (checkout.root / ".venv" / lost).unlink()
    result = checkout.run()
    assert result.returncode == 0 and "Making" in result.stderr
    assert any("--editable" in call for call in checkout.pip_calls())
    assert [path.name for path in checkout.root.glob(".venv*")] == [".venv"]


def test_an_environment_made_by_hand_is_kept_and_completed(checkout):
    environment = checkout.root / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "pyvenv.cfg").touch()
    shutil.copy(checkout.python, environment / "bin" / "python")
    (environment / "mine").touch()
    assert checkout.run().returncode == 0
    assert (environment / "mine").exists() and checkout.pip_calls()


def test_another_python_makes_another_environment(checkout):
    checkout.run()
    checkout.pip_calls()
    other = checkout.python.with_name("python3.9")
    other.write_text(FAKE_PYTHON.replace("$FAKE_VERSION", "3.9.18"))
    other.chmod(0o755)
    result = checkout.run(PYTHON=str(other))
    assert "Making" in result.stderr and "3.9.18" in result.stderr
    assert (checkout.root / ".venv" / "unimo2-installed").read_text().startswith("Python 3.9.18 in ")


def test_without_libgl_the_headless_opencv_of_the_same_version_is_taken(checkout):
    result = checkout.run(FAKE_NO_LIBGL="yes")
    assert result.returncode == 0, result.stderr
    calls = checkout.pip_calls()
    assert any("uninstall" in call and "opencv-python" in call for call in calls)
    pinned = next(line.split()[0] for line in (ROOT / "requirements.txt").read_text().splitlines()
                  if line.startswith("opencv-python=="))
    assert any(pinned.replace("python", "python-headless") in call.split() for call in calls)


def test_paddle_2_6_2_has_its_own_environment_and_pins(checkout):
    result = checkout.run("--paddle", "2.6.2")
    assert result.stdout == f"{checkout.root}/.venv-paddle-2.6.2\n"
    names = {}
    for line in (checkout.root / ".venv-paddle-2.6.2" / "requirements.txt").read_text().splitlines():
        name, version = line.split()[0].split("==")
        assert name not in names, f"{name} is named twice"
        names[name] = version
    assert names["paddlepaddle"] == "2.6.2"
    assert names["paddle2onnx"].startswith("1.")
    assert {"numpy", "paddlenlp", "pytest"} <= set(names)
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize("script", ["setup_env.sh", "test.sh"])
@pytest.mark.parametrize("version", ["2.5.1", ""])
def test_another_paddle_is_refused_before_anything_is_made(checkout, script, version):
    result = checkout.run("--paddle", version, script=script)
    assert result.returncode == 2
    assert "--paddle 3.3.1" in result.stderr
    assert not list(checkout.root.glob(".venv*"))


@pytest.mark.parametrize("environment, reason", [
    ({"FAKE_VERSION": "3.12.1"}, "is 3.12.1"),
    ({"FAKE_NO_VENV": "1"}, "has no venv module"),
    ({"PYTHON": "no-such-python"}, "no-such-python does not run"),
])
def test_without_a_usable_python_it_says_what_is_needed(checkout, environment, reason):
    result = checkout.run(**environment)
    assert result.returncode == 2
    assert "Python 3.9, 3.10 or 3.11" in result.stderr and reason in result.stderr
    assert not list(checkout.root.glob(".venv*")) and checkout.pip_calls() == []


def test_an_environment_of_an_unusable_python_is_not_overwritten(checkout):
    checkout.run()
    checkout.pip_calls()
    result = checkout.run(FAKE_VERSION="3.13.0")
    assert result.returncode == 2
    assert "move it away" in result.stderr
    assert checkout.pip_calls() == [] and (checkout.root / ".venv" / "bin" / "python").exists()


def test_a_moved_checkout_gets_a_new_environment(checkout, tmp_path):
    checkout.run()
    checkout.pip_calls()
    checkout.root = checkout.root.rename(tmp_path / "moved clone")
    result = checkout.run()
    assert result.stdout == f"{checkout.root}/.venv\n"
    assert "Making" in result.stderr and checkout.pip_calls()


def test_demo_passes_its_arguments_and_exit_status_on(checkout):
    checkout.run()
    command = checkout.root / ".venv" / "bin" / "unimo2"
    command.write_text('#!/usr/bin/env bash\nprintf "%s|" "$@"\nexit 2\n')
    command.chmod(0o755)
    result = checkout.run("--out", "my output", script="demo.sh")
    assert (result.returncode, result.stdout) == (2, "demo|--out|my output|"), result.stderr
