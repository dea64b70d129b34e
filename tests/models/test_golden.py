"""The model equals the authors' code on golden vectors made with it (tests/data/golden: UNIMO-2,
golden_unimo: UNIMO; see tools/check_golden.py)."""
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = [path for family in ("golden", "golden_unimo") for path in sorted((ROOT / "tests/data" / family).glob("*.npz"))]
spec = importlib.util.spec_from_file_location("check_golden", ROOT / "tools/check_golden.py")
check_golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_golden)


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_every_quantity_of_the_case_is_within_tolerance(path):
    rows = check_golden.check_case(path)
    assert rows, "nothing was compared"
    assert [r for r in rows if not r[1] <= r[2]] == []


def test_a_changed_parameter_is_noticed(tmp_path):
    import numpy as np

    source = ROOT / "tests/data/golden/case02_text_only.npz"
    arrays = dict(np.load(source))
    arrays["param/vq_emb"] = arrays["param/vq_emb"][::-1].copy()
    np.savez(tmp_path / "case02_changed.npz", **arrays)
    rows = check_golden.check_case(tmp_path / "case02_changed.npz", ROOT / "tests/data/golden/tiny_config.json")
    assert any(error > tolerance for _, error, tolerance in rows)


def test_the_command_prints_a_table_and_reports_failure_by_exit_status(tmp_path, capsys):
    directory = ROOT / "tests/data/golden"
    assert check_golden.main([str(directory), "--only", "case08a"]) == 0
    assert "loss_total_m0.2_s1" in capsys.readouterr().out
    assert check_golden.main([str(tmp_path)]) == 2
