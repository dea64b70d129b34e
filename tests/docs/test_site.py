"""The documentation's site: it is built without a warning, whole, and needs nothing from other servers."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

import unimo2_paddle
from unimo2_paddle.cli import build_parser
from unimo2_paddle.completion import command_tree

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; every warning (a dead link, a page of the navigation that is not there) fails the build."""
    pytest.importorskip("material", reason="mkdocs-material is not installed (pip install .[docs])")
    out = tmp_path_factory.mktemp("site")
    result = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


def test_every_page_is_built_and_can_be_reached_from_the_first(site):
    wanted = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in PAGES} | {"model_zoo.html", "changelog.html"}
    seen, waiting = set(), ["index.html"]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for link in re.findall(r'href="([^"#:]+\.html)', (site / name).read_text(encoding="utf-8")):
            target = (site / name).parent.joinpath(link).resolve().relative_to(site.resolve()).as_posix()
            waiting.append(target)
    assert wanted <= seen, wanted - seen


@pytest.mark.parametrize("listing, folder", [("mkdocs.yml", ""), ("docs/index.md", ""), ("README.md", "docs/")])
def test_every_page_is_in_the_navigation_on_the_first_page_and_in_the_readme(listing, folder):
    text = (ROOT / listing).read_text(encoding="utf-8")
    names = [folder + path.relative_to(ROOT / "docs").as_posix() for path in PAGES if f"docs/{path.name}" != listing]
    assert not [name for name in names if not re.search(rf"(?:\(|- ){re.escape(name)}[)#\s]", text)]


def test_pages_load_nothing_from_other_servers(site):
    for page in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'(?:src|srcset)="(https?:[^"]*)"', text) + re.findall(r'<link[^>]+href="(https?:[^"]*)"', text)
        loaded += re.findall(r"(?:url\(|@import )[\"']?(https?:[^\"')]*)", text)
        assert not loaded, f"{page.name}: {loaded}"


def test_the_reference_has_every_public_name_and_every_command(site):
    api, commands = ((site / name).read_text(encoding="utf-8") for name in ("api.html", "commands.html"))
    for name in set(unimo2_paddle.__all__) - {"__version__"}:
        assert f"from unimo2_paddle import {name}" in api
    for name, place in command_tree(build_parser()).items():
        assert re.search(rf"<h[23] id=\"[^\"]*\">{re.escape(name)}<", commands), name
        for spellings, *_ in place.options:
            assert spellings[-1] in commands, f"{name} {spellings}"
    assert "are put here" not in api + commands and "ForwardRef" not in api


def test_notes_to_the_tests_are_not_on_the_pages(site):
    for page in site.rglob("*.html"):
        assert not re.search(r"<!-- (?:test|needs):", page.read_text(encoding="utf-8")), page.name


def test_docstrings_become_lists_and_code():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import api_reference
    finally:
        sys.path.pop(0)
    docstring = "One ``x``.\n\nArgs:\n    a: first; b:\n        second.\n\nReturns:\n    see :func:`other`.\n\nMore::\n\n    code"
    text = "\n".join(api_reference.markdown_of(docstring))
    assert "One `x`." in text and "- `a`: first; `b`: second." in text and "- see `other`." in text and "More:\n\n    code" in text
