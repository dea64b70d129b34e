"""Type hints of the public API: every argument and result has one, type checkers see every name, and mypy refuses wrong calls."""
import ast
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import unimo2_paddle

ROOT = Path(__file__).resolve().parent.parent
NAMES = [name for name in unimo2_paddle.__all__ if name != "__version__"]

RIGHT = """
from pathlib import Path
from unimo2_paddle import LoadReport, Predictor, Tokenizer, Unimo2Config, Unimo2Model, load_image, load_released
config: Unimo2Config = Unimo2Config.from_json(Path("config.json"), topk_value=10)
report: LoadReport = load_released(Unimo2Model(config), "directory", allow_missing=["grounded.mask_g_*"])
ids: list[int] = Tokenizer("vocab.txt", "encoder.json", "vocab.bpe").encode("a red circle")
pixels = load_image(b"", 224).shape
text: str = Predictor("best").task or config.to_json()
"""
WRONG = """
from unimo2_paddle import Tokenizer, Unimo2Model, load_image, load_released
load_image("a.jpg", "224")
Tokenizer("vocab.txt", "encoder.json", "vocab.bpe").encode(3)
Unimo2Model("unimo2_base")
load_released()
"""


def public_functions():
    """(shown name, function) of every public function, and of every public method that a public class defines or inherits from this package."""
    for name in NAMES:
        thing = getattr(unimo2_paddle, name)
        if not inspect.isclass(thing):
            yield name, thing
            continue
        for owner in (one for one in thing.__mro__ if one.__module__.startswith("unimo2_paddle")):
            for method, value in vars(owner).items():
                value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                written = inspect.isfunction(value) and value.__code__.co_filename.endswith(".py")  # not a dataclass' own
                if written and (not method.startswith("_") or method in ("__init__", "__call__", "__str__")):
                    yield f"{name}.{method}", value


def test_every_public_argument_and_result_has_a_type():
    functions = dict(public_functions())
    assert len(functions) > 40
    for name, function in functions.items():
        signature = inspect.signature(function)
        arguments = [argument for argument in signature.parameters.values() if argument.name not in ("self", "cls")]
        untyped = [argument.name for argument in arguments if argument.annotation is inspect.Parameter.empty]
        assert not untyped and signature.return_annotation is not inspect.Signature.empty, f"{name}: {untyped or 'result'} without a type"


def test_types_can_be_read_at_run_time():
    for name, function in public_functions():
        if name not in ("load_released", "save_released"):  # numpy alone: paddle's Layer is named for type checkers only
            typing.get_type_hints(function)


def test_type_checkers_see_every_public_name():
    tree = ast.parse(Path(unimo2_paddle.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert sorted(alias.asname for node in block.body for alias in node.names) == sorted(NAMES)
    assert {alias.asname: node.module for node in block.body for alias in node.names} == unimo2_paddle._PUBLIC
    assert (Path(unimo2_paddle.__file__).parent / "py.typed").is_file()


def mypy(text, folder):
    (folder / "use.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(folder / "cache"), str(folder / "use.py")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_mypy_accepts_right_calls_and_refuses_wrong_ones(tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed (it needs Python 3.10 or newer)")
    right, wrong = mypy(RIGHT, tmp_path), mypy(WRONG, tmp_path)
    assert right.returncode == 0, right.stdout + right.stderr
    assert {int(line.split(":")[1]) for line in wrong.stdout.splitlines() if ": error:" in line} == {3, 4, 5, 6}, wrong.stdout


@pytest.mark.slow
def test_the_code_passes_the_linter():
    pytest.importorskip("ruff", reason="ruff is not installed")
    result = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_linter_of_the_hook_is_the_pinned_one():
    pinned = next(line.split()[0] for line in (ROOT / "requirements-test.txt").read_text(encoding="utf-8").splitlines() if line.startswith("ruff=="))
    assert f"[{pinned}]" in (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
