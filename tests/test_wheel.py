"""The wheel: what is in it, and that it works outside of the repository."""
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from unimo2_paddle.config import bundled_config, load_run_config
from unimo2_paddle.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


def data_files():
    """Every file a wheel must hold, as named in it: the package's own, the run configs and the model zoo's registry."""
    package = [path for path in (ROOT / "unimo2_paddle").rglob("*") if path.suffix in (".py", ".yaml", ".json", ".txt", ".typed", ".html", ".js", ".css")]
    configs = {f"unimo2_paddle/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "run_configs").rglob("*.yaml")}
    zoo = {f"unimo2_paddle/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "model_zoo").iterdir()}
    return configs | zoo | {path.relative_to(ROOT).as_posix() for path in package}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this checkout, built without network from a copy, so that no build directory is left."""
    pytest.importorskip("setuptools")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = subprocess.run(["git", "ls-files", "-z", "setup.py", "pyproject.toml", "README.md", "LICENSE", "unimo2_paddle", "run_configs", "model_zoo"],
                           cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, names.stdout.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    result = subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check",
                             "-w", str(out), str(copy)], capture_output=True, text=True)
    if "invalid command 'bdist_wheel'" in result.stderr + result.stdout:
        pytest.skip("this setuptools cannot build a wheel by itself (the pinned one can)")
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
def test_a_wheel_holds_every_module_config_and_template(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert data_files() <= names, sorted(data_files() - names)
    assert not [name for name in names if name.startswith(("tests", "tools", "docs", "run_configs", "model_zoo"))]
    assert any(name.endswith("LICENSE") for name in names)


@pytest.mark.slow
def test_an_installed_wheel_works_outside_of_the_repository(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run([sys.executable, "-m", "unimo2_paddle.cli", *arguments], cwd=work, env=environment, capture_output=True, text=True)

    shown = run("reproduce", "--table", "1")
    assert shown.returncode == 0 and "72.70 / 91.18" in shown.stdout, shown.stderr
    valid = run("validate", "-c", "run_configs/retrieval/demo.yaml")
    assert valid.returncode == 0 and "task: retrieval" in valid.stdout, valid.stderr
    demo = run("demo-data", "--out", "data", "--size", "24", "--corpora-only")
    assert demo.returncode == 0 and (work / "data" / "vocab").is_dir(), demo.stderr
    script = "import unimo2_paddle as u; from unimo2_paddle.data.prompts import read_templates; print(u.__file__, len(read_templates('photos')))"
    templates = subprocess.run([sys.executable, "-c", script], cwd=work, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert templates.returncode == 0 and templates.stdout.startswith(str(site)), templates.stderr


def test_the_projects_configs_are_found_from_every_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_run_config("run_configs/retrieval/demo.yaml").task == "retrieval"
    assert Path(bundled_config("retrieval/demo.yaml")).samefile(ROOT / "run_configs" / "retrieval" / "demo.yaml")


def test_an_own_config_of_the_same_name_comes_first(tmp_path, monkeypatch):
    (tmp_path / "run_configs" / "retrieval").mkdir(parents=True)
    (tmp_path / "run_configs" / "retrieval" / "demo.yaml").write_text("task: nonsense\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="nonsense"):
        load_run_config("run_configs/retrieval/demo.yaml")


@pytest.mark.parametrize("path", ["run_configs/retrieval/nowhere.yaml", "elsewhere/retrieval/demo.yaml", "run_configs"])
def test_a_missing_config_is_reported_as_it_was_given(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"{path}: cannot read"):
        load_run_config(path)
