"""Rules that hold for the repository as a whole: pins, portability, import boundaries, size."""
import ast
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "unimo2_paddle"
SOURCES = sorted(path for room in ("unimo2_paddle", "tools", "examples", "tests") for path in (ROOT / room).rglob("*.py"))
PYTHONS = ("3.9", "3.10", "3.11")
REQUIREMENT_FILES = sorted(ROOT.glob("requirements*.txt"))
MAX_LINES = 600

# Written so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.~$)}\]>*-])/(?:wo[r]k|ro[o]t|t[m]p|ho[m]e|U[s]ers)/")
REGISTRY_HOST = re.compile(r"pypi\.o[r]g|pythonhos[t]ed|pypi\.tuna|npmj[s]|mirrors?\.(?:ali|tencent)|mirror\.bai[d]u")


def shown(path):
    return path.relative_to(ROOT).as_posix()


def tracked_texts():
    """(path, text) of every text file that git knows."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    for name in listing.stdout.decode().split("\0"):
        path = ROOT / name
        if not name or not path.is_file():
            continue
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures, weights


def requirement_lines(path):
    """(line, requirement, reason) of every line that names a package."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            spec, _, reason = line.partition("  # ")
            yield line, Requirement(spec), reason


def pins(*names):
    """name -> Requirement of the named requirement files; the first file that mentions a package wins."""
    found = {}
    for name in names:
        for _, requirement, _ in requirement_lines(ROOT / name):
            found.setdefault(requirement.name, requirement)
    return found


def setup_constant(name):
    """The value of a constant of setup.py, read without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py has no constant {name}")


def run_python(script):
    """Run a script in a fresh interpreter at the root; its message is the assertion message."""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_no_tracked_file_names_a_place_of_one_machine():
    found = []
    for path, text in tracked_texts():
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE_PATH.search(line) or REGISTRY_HOST.search(line):
                found.append(f"{shown(path)}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", REQUIREMENT_FILES, ids=shown)
def test_every_requirement_is_pinned_once_with_a_reason(path):
    names = []
    for line, requirement, reason in requirement_lines(path):
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), f"not pinned: {line}"
        assert len(reason) >= 6, f"no reason: {line}"
        names += [(requirement.name, python) for python in PYTHONS
                  if requirement.marker is None or requirement.marker.evaluate({"python_version": python})]
    assert names and len(names) == len(set(names))


def test_every_via_reason_names_a_pinned_package():
    known = set(pins(*(path.name for path in REQUIREMENT_FILES)))
    for path in REQUIREMENT_FILES:
        for line, _, reason in requirement_lines(path):
            if reason.startswith("via "):
                users = set(re.split(r", ", reason[len("via "):].split(";")[0]))
                assert users <= known, f"{sorted(users - known)} not pinned: {line}"


@pytest.mark.parametrize("lists", [
    ("requirements.txt", "requirements-test.txt"),
    ("requirements-paddle-2.6.2.txt", "requirements.txt", "requirements-test.txt"),
], ids=["paddle-3.3.1", "paddle-2.6.2"])
def test_pins_lie_in_the_ranges_of_setup_py(lists):
    pinned = pins(*lists)
    extras = setup_constant("EXTRAS_REQUIRE")
    wanted = setup_constant("INSTALL_REQUIRES") + extras["cpu"] + extras["pretrained"] + extras["docs"] + extras["test"]
    for requirement in map(Requirement, wanted):
        version = str(pinned[requirement.name].specifier)[len("=="):]
        assert requirement.specifier.contains(version), f"{requirement} excludes the pinned {version}"


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_source_is_python_3_9(path):
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=shown(path), feature_version=(3, 9))
    postponed = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            strict_zip = getattr(node.func, "id", "") == "zip" and any(word.arg == "strict" for word in node.keywords)
            assert not strict_zip, f"{shown(path)}:{node.lineno}: zip(strict=) came with Python 3.10"
        annotation = getattr(node, "annotation", None) or getattr(node, "returns", None)
        if annotation is not None and not postponed:
            union = any(isinstance(part, ast.BinOp) and isinstance(part.op, ast.BitOr) for part in ast.walk(annotation))
            assert not union, f"{shown(path)}:{annotation.lineno}: X | Y as a type came with Python 3.10"


def test_formats_metrics_and_config_do_without_paddle():
    run_python(
        "import importlib, pathlib, sys\n"
        "root = pathlib.Path('unimo2_paddle')\n"
        "files = [*root.glob('data/formats/*.py'), *root.glob('metrics/*.py'), *root.glob('config.py')]\n"
        "for file in files:\n"
        "    importlib.import_module('.'.join(file.with_suffix('').parts))\n"
        "    assert 'paddle' not in sys.modules, f'{file} imports paddle'\n"
        "assert len(files) >= 2\n"
    )


def test_importing_every_module_imports_neither_paddlenlp_nor_paddleclas():
    run_python(
        "import importlib, pkgutil, sys\n"
        "import unimo2_paddle\n"
        "assert 'paddle' not in sys.modules, 'import unimo2_paddle imports paddle'\n"
        "for module in pkgutil.walk_packages(unimo2_paddle.__path__, 'unimo2_paddle.'):\n"
        "    importlib.import_module(module.name)\n"
        "    for heavy in ('paddlenlp', 'paddleclas'):\n"
        "        assert heavy not in sys.modules, f'{module.name} imports {heavy}'\n"
    )


def test_every_public_name_exists():
    run_python(
        "import unimo2_paddle\n"
        "for name in unimo2_paddle.__all__:\n"
        "    assert getattr(unimo2_paddle, name) is not None, name\n"
    )


def test_every_directory_of_modules_is_a_package():
    # find_packages leaves out what has no __init__.py: it would work in a checkout and be missing once installed.
    for path in PACKAGE.rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), f"{shown(path.parent)} has no __init__.py"


def test_no_module_outgrows_its_idea():
    long = {shown(path): lines for path in PACKAGE.rglob("*.py")
            if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES}
    assert not long, f"split these (limit {MAX_LINES} lines): {long}"


@pytest.mark.parametrize("call", ["connect", "connect_ex"])
def test_tests_cannot_leave_this_machine(call):
    with socket.socket() as outside, pytest.raises(RuntimeError, match="192.0.2.1"):
        getattr(outside, call)(("192.0.2.1", 80))  # an address reserved for documentation
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
