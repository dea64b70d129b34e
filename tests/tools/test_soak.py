"""tools/soak.py: what it calls growth, and a short soak of the real loop with data workers and a restart."""
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", ROOT / "tools" / "soak.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def samples(soak, **series):
    flat = dict.fromkeys(soak.ALLOWED, [5.0] * 10)
    flat.update(series)
    return [{"step": 100 * number, **{name: values[number] for name, values in flat.items()}} for number in range(10)]


def test_a_line_that_rises_is_growth_and_a_step_down_or_noise_is_not(soak):
    assert all(flat for *_, flat in soak.verdicts(samples(soak)).values())
    found = soak.verdicts(samples(soak, memory_mb=[100.0 + 10 * n for n in range(10)], open_files=[5.0 + n // 2 for n in range(10)],
                                  threads=[7.0, 5, 7, 6, 5, 7, 6, 7, 5, 7], shared_memory=[9.0 - n for n in range(10)]))
    assert {name for name, (*_, flat) in found.items() if not flat} == {"memory_mb", "open_files"}
    assert found["memory_mb"][:3] == (100.0, 190.0, pytest.approx(100.0))


def test_a_short_soak_keeps_files_threads_workers_and_shared_memory(soak, tmp_path):
    others = len(soak.children())  # of earlier tests in this process
    found = soak.verdicts([s for s in soak.soak(str(tmp_path), steps=45, restart=15, every=3, workers=1) if s["step"] > 15])
    assert all(flat for name, (*_, flat) in found.items() if not name.endswith("memory_mb")), found
    assert found["children"][1] == others + 1, "one data worker, also after two restarts"
    assert found["memory_mb"][1] - found["memory_mb"][0] < 50
