"""``unimo2 compare``: what differs between runs is shown, what does not is not; the page has a line per run."""
import json
import re

import pytest
import yaml

from unimo2_paddle.reports import compare


@pytest.fixture
def made(tmp_path):
    """A function that writes a run of a few records and returns its directory."""

    def make(name, loss, accuracy=None, task="vqa", **config):
        run = tmp_path / "output" / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump({"task": task, "run": {"output": str(run), "seed": 1}, **config}))
        records = [{"step": step, "kind": "train", "loss": loss / step, "ips": 10.0 * loss, "peak_memory_mb": 100.0 + step} for step in (1, 2, 3)]
        if accuracy is not None:
            records.append({"step": 3, "kind": "val", "accuracy": accuracy})
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return run

    return make


def test_differing_keys_figures_and_speed_are_listed_and_nothing_else(made, unimo2, tmp_path):
    runs = [made("small", 3.0, 40.0, optim={"learning_rate": 0.1, "beta1": 0.9}), made("large", 6.0, 60.0, optim={"learning_rate": 0.2, "beta1": 0.9})]
    outcome = unimo2("compare", *runs)
    assert outcome.status == 0, outcome.err
    rows = [re.split(r"\s{2,}", line) for line in outcome.out.splitlines()]
    for row in (["optim.learning_rate", "0.1", "0.2"], ["val/accuracy best model (last)", "(40)", "(60)"], ["training loss, last", "1", "2"],
                ["samples a second", "30", "60"], ["peak memory, MB", "103", "103"]):
        assert row in rows
    assert "beta1" not in outcome.out and "seed" not in outcome.out and "run.output" not in outcome.out
    page = (tmp_path / "output" / "compare.html").read_text()
    assert f"page with curves: {tmp_path / 'output' / 'compare.html'}" in outcome.out
    (chart,) = re.findall(r"<figure><figcaption>loss.*?</figure>", page)
    assert chart.count("<polyline") == 2 and "small: 3 at step 1, 1 at step 3" in chart and "large: 6 at step 1, 2 at step 3" in chart


def test_of_different_tasks_only_shared_keys_are_compared(made):
    runs = [compare.read_run(made("a", 1.0, train={"epochs": 1, "own": 5})), compare.read_run(made("b", 1.0, task="glue", train={"epochs": 2}))]
    assert [row[0] for row in compare.differing_keys(runs)] == ["task", "train.epochs"]


def test_equal_configurations_are_said_to_be_equal(made, unimo2, tmp_path):
    outcome = unimo2("compare", made("a", 1.0), made("b", 2.0), made("c", 3.0), "--out", tmp_path / "page.html")
    assert outcome.status == 0 and "do not differ" in outcome.out
    assert (tmp_path / "page.html").is_file() and not (tmp_path / "output" / "compare.html").exists()


def test_one_run_or_the_same_one_twice_cannot_be_compared(made, unimo2):
    run = made("a", 1.0)
    for arguments in ([run], [run, f"{run}/"]):
        outcome = unimo2("compare", *arguments)
        assert outcome.status == 2 and "two or more different runs" in outcome.err


def test_a_place_that_cannot_be_written_is_named(made, unimo2, tmp_path):
    outcome = unimo2("compare", made("a", 1.0), made("b", 2.0), "--out", tmp_path / "nowhere" / "page.html")
    assert outcome.status == 2 and "page.html cannot be written" in outcome.err


def test_names_are_shortened_as_far_as_they_stay_different():
    assert compare.short_names(["out/a/x", "out/b/x"]) == ["a/x", "b/x"]
    assert compare.short_names(["a", "a/b"]) == ["a", "a/b"]
