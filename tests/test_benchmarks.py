"""The benchmarks' own arithmetic, their list of rows, and the page that is made from the results."""
import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "tools" / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A function that imports a module of ``tools/benchmarks``."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in [name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).startswith(str(BENCHMARKS))]:
        del sys.modules[name]


def test_every_row_has_a_module_that_measures(load):
    for row in load("run").ROWS:
        assert "def measure(options):" in (BENCHMARKS / f"{row}.py").read_text(encoding="utf-8"), row


def test_a_ratio_is_the_median_of_the_rounds_and_the_bar_is_judged_by_it(load):
    line = load("bench").compare("work", [1.0, 2.0, 1.0], [3.0, 3.0, 2.0], at_least=1.9)
    assert (line.ratio, line.low, line.high, line.ours, line.other) == (2.0, 1.5, 3.0, 1.0, 3.0)
    assert line.reached and not load("bench").compare("work", [1.0], [1.5], at_least=1.9).reached
    assert load("bench").compare("work", [2.0], [4.0], amount=10).ours == 5.0  # per second


def test_a_row_is_stored_with_its_circumstances_and_read_back(load, tmp_path):
    bench, run = load("bench"), load("run")
    record = bench.record_of("startup", bench.Options(), lambda options: [bench.Line("a", 1.0, "s", 2.0, 2.0, 1.9, 2.1, ">= 1x", True)])
    run.store(tmp_path / "startup-tiny.json", record)
    (found,) = run.read(tmp_path)
    assert found == json.loads(json.dumps(record)) and found["machine"] and len(found["load"]) == 2 and "Python" in found["versions"]
    page = load("page").markdown([found])
    assert "| a | 1 s | 2 s | 2.00 (1.90 to 2.10) | >= 1x: reached |" in page
    skipped = bench.record_of("startup", bench.Options(), lambda options: "no PyTorch")
    assert "`startup` was skipped: no PyTorch" in load("page").markdown([skipped])


def test_rows_that_have_a_result_are_left_out_when_only_missing_ones_are_wanted(load, tmp_path, monkeypatch):
    run, started = load("run"), []
    monkeypatch.setattr(run, "run_row", lambda row, args: not started.append(row) and row != "pictures")
    run.store(tmp_path / "tokenizer-tiny.json", {})
    arguments = ["--missing", "--results", str(tmp_path), "--only", "startup", "--only", "tokenizer"]
    assert run.main(arguments) == 0 and started == ["startup"]
    assert run.main([*arguments, "--only", "pictures"]) == 1  # a row that fails does not stop the others, but the status tells


def test_the_page_is_made_from_the_results(load):
    made = load("page").markdown(load("run").read(BENCHMARKS / "results"))
    assert (BENCHMARKS.parents[1] / "docs" / "performance.md").read_text(encoding="utf-8") == made, "run: python tools/benchmarks/run.py --page"
