"""report.html: every run ends with one that is complete in itself; what it says is what the run's files say."""
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from unimo2_paddle.reports import charts, expected, page, runs
from unimo2_paddle.tasks.reporting import examples_of, write_html_report

ROOT = Path(__file__).resolve().parent.parent.parent
VOID = {"meta", "img", "br"}
CLOSED_BY_THEMSELVES = {"td", "th", "tr", "p", "html"}


class Checker(HTMLParser):
    """Tags that are opened and closed; everything a page would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.wrong = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in VOID | CLOSED_BY_THEMSELVES:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag):
        if tag not in CLOSED_BY_THEMSELVES and (not self.open or self.open.pop() != tag):
            self.wrong.append(tag)


def checked(path):
    """The text of a page that is well-formed and loads nothing."""
    text = Path(path).read_text(encoding="utf-8")
    parts = Checker(text)
    assert not parts.open and not parts.wrong, (parts.open, parts.wrong)
    assert all(value.startswith("data:") for value in parts.loads), parts.loads
    assert "url(" not in text and "@import" not in text and "<script" not in text
    return text


@pytest.fixture
def written(tmp_path):
    """A function that writes the files of a finished captioning run by hand and returns its directory."""

    def write(name="run", source="run_configs/captioning/demo.yaml", steps=(10, 20, 30), **config):
        run = tmp_path / name
        run.mkdir()
        header = [f"# source: {source}", "# Captioning & more, in short.", "# expected: CIDEr 1.51 on test;", "#           a second line",
                  "# run:      never mind"]
        values = {"task": "captioning", "model": {"init": "a<b>"}, "run": {"output": str(run)}, **config}
        (run / "config.yaml").write_text("\n".join(header) + "\n" + yaml.safe_dump(values))
        records = [{"step": step, "kind": "train", "loss": 30.0 / step, "lr": 1e-3, "ips": 100.0, "epoch": 1.0} for step in steps]
        records += [{"step": step, "kind": "val", "cider": step / 20, "bleu_4": 0.3} for step in steps[1:]]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        status = {"state": "finished", "step": steps[-1], "total_steps": 30, "started": 100.0, "updated": 190.0, "workers": 1,
                  "best": {"step": steps[1], "metric": "val/cider", "value": steps[1] / 20}, "environment": {"paddle": "3.3.1", "command": "unimo2 train"}}
        (run / "status.json").write_text(json.dumps(status))
        return run

    return write


def test_training_ends_with_a_report_of_its_own_figures(pretrain_config, demo_data, unimo2, tmp_path):
    annotations = str(demo_data / "retrieval" / "dataset_shapes.json")
    path = pretrain_config({"eval.annotations": annotations, "eval.images": str(demo_data / "retrieval" / "images"), "eval.max_images": 4,
                            "eval.every_steps": 3})
    outcome = unimo2("train", "-c", path)
    assert outcome.status == 0, outcome.err
    text = checked(tmp_path / "run" / "report.html")
    assert f"report: {tmp_path / 'run' / 'report.html'}" in outcome.out
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "train"][-1]
    assert f"{charts.shown(last['loss'])} at step 6" in text
    for name in {name for record in records for name in record} - {"step", "kind"}:
        assert re.search(rf">(val/)?{re.escape(name)}( \(logarithmic\))?</figcaption>", text) or name.startswith("epoch") or name in text, name
    for fact in ("finished", "6 of 6", "Environment", "numpy", "matching_group", "Judged during training"):
        assert fact in text, fact


def test_a_run_that_fails_leaves_a_report_that_says_so(pretrain_config, unimo2, tmp_path):
    path = pretrain_config({"optim.learning_rate": 1e30, "optim.clip_norm": 0.0})
    outcome = unimo2("train", "-c", path)
    assert outcome.status == 1
    text = checked(tmp_path / "run" / "report.html")
    assert "failed" in text and "error" in text


def test_a_report_that_cannot_be_written_does_not_fail_the_run(pretrain_config, unimo2, tmp_path):
    (tmp_path / "run" / "report.html.tmp").mkdir(parents=True)
    outcome = unimo2("train", "-c", pretrain_config())
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "run" / "best").is_dir() and not (tmp_path / "run" / "report.html").exists()


def test_an_evaluation_ends_with_a_report_of_its_figures_and_examples(pretrain_config, demo_data, unimo2, tmp_path):
    assert unimo2("train", "-c", pretrain_config()).status == 0
    values = {"task": "retrieval", "model": {"init": str(tmp_path / "run" / "best")},
              "data": {"format": "karpathy", "annotations": str(demo_data / "retrieval" / "dataset_shapes.json"),
                       "images": str(demo_data / "retrieval" / "images"), "vocab": str(demo_data / "vocab")},
              "eval": {"split": "test", "max_images": 4}, "run": {"output": str(tmp_path / "judged")}}
    (tmp_path / "eval.yaml").write_text("# Only here.\n# chance: 25 of 100\n" + yaml.safe_dump(values))
    outcome = unimo2("eval", "-c", tmp_path / "eval.yaml")
    assert outcome.status == 0, outcome.err
    text = checked(tmp_path / "judged" / "report.html")
    results = json.loads((tmp_path / "judged" / "predictions" / "results.json").read_text())
    assert f"<td>test</td><td>ir_r1</td><td>{charts.shown(results['metrics']['ir_r1'])}</td>" in text
    assert "25 of 100" in text and "Examples: retrieval" in text and text.count("data:image/jpeg;base64,") > 0 and "Environment" in text
    again = unimo2("report", tmp_path / "judged", "--out", tmp_path / "again.html")
    assert again.status == 0 and (tmp_path / "again.html").read_text() == text


def test_a_runs_config_keeps_where_it_came_from_and_what_it_says(pretrain_config, unimo2, tmp_path):
    path = Path(pretrain_config({"train.steps": 1}))
    path.write_text("# A run in small.\n# expected: nothing\n" + path.read_text())
    assert unimo2("train", "-c", path).status == 0
    lines = (tmp_path / "run" / "config.yaml").read_text().splitlines()
    assert lines[:3] == [f"# source: {path}", "# A run in small.", "# expected: nothing"]
    assert unimo2("train", "-c", tmp_path / "run" / "config.yaml", "-o", f"run.output={tmp_path / 'two'}").status == 0
    assert (tmp_path / "two" / "config.yaml").read_text().splitlines()[:3] == lines[:3]


def test_figures_stand_beside_those_that_are_expected(written):
    run = written()
    text = checked(page.write_run_report(run))
    assert "CIDEr 1.51 on test; a second line" in text and "never mind" not in text.split("<pre>")[0]
    assert re.search(r"<td>CIDEr</td><td>1\.51</td><td>[^<]*</td><td>1 \(val\)</td><td>-0\.51</td>", text)
    assert "a&lt;b&gt;" in text and "a<b>" not in text


def test_the_papers_figures_are_compared_on_the_papers_scale(written):
    run = runs.read_run(written(source="here/run_configs/captioning/coco.yaml"))
    found = {(one.name, one.source): one for one in expected.comparisons(run)}
    cider = found["COCO caption, CIDEr", "UNIMO-2 in UNIMO-2 table 1"]
    assert (cider.expected, cider.measured, cider.evaluator) == (131.2, 100.0, "val")
    baseline = runs.read_run(written("baseline", source="run_configs/captioning/coco.yaml", model={"model_type": "baseline"}))
    assert {one.source for one in expected.comparisons(baseline)} == {"Our Baseline in UNIMO-2 table 1"}


def test_a_test_split_counts_more_than_the_split_that_chose_and_baselines_count_nothing(written):
    directory = written()
    (directory / "predictions").mkdir()
    for name, value in (("test", 1.4), ("nearest_neighbour", 9.0)):
        known = runs._read_json(directory / "predictions" / "evaluations.json")
        (directory / "predictions" / "evaluations.json").write_text(json.dumps({**known, name: {"metrics": {"cider": value}}}))
    assert expected.find_measured(runs.read_run(directory), "cider") == (1.4, "test")
    assert expected.find_measured(runs.read_run(directory), "nearest_*/cider") == (9.0, "nearest_neighbour")
    assert expected.find_measured(runs.read_run(directory), "spice") == (None, "")


def test_every_key_of_an_expected_figure_belongs_to_one():
    facts = expected.read_facts()
    for about in facts["papers"].values():
        for table in about["tables"].values():
            for column in table["columns"].values():
                assert len(expected._parts(column)) == column["metric"].count("/") + 1 - column["metric"].count("R@1/"), column
                assert "keys" in column or column["task"] == "vqa"
                assert len(column.get("keys", ())) in (0, len(expected._parts(column)))
    for toys in facts["toy"].values():
        for task, toy in toys.items():
            if "measured" in toy:
                figures = expected._figures(toy["measured"])[1]
                assert None not in figures and 1 <= len(figures) <= len(facts["tasks"][task]["demo_keys"]), toy


def test_steps_that_a_resumed_run_does_again_count_as_the_last_time(tmp_path):
    lines = [{"step": step, "kind": "train", "loss": value} for step, value in ((1, 5.0), (2, 4.0), (3, 3.0), (2, 40.0))]
    lines += [{"step": 3, "kind": "val", "accuracy": 50.0}, {"step": 3, "kind": "train", "loss": float("nan")}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "kind": "tr')
    assert runs.read_curves(tmp_path / "metrics.jsonl") == {"train": {"loss": [(1, 5.0), (2, 40.0)]}, "val": {"accuracy": [(3, 50.0)]}}


def test_a_directory_without_a_run_is_refused(unimo2, tmp_path):
    outcome = unimo2("report", tmp_path)
    assert outcome.status == 2 and "holds no run" in outcome.err and list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named(unimo2, written):
    run = written()
    (run / "status.json").write_text("[1")
    outcome = unimo2("report", run)
    assert outcome.status == 2 and "status.json" in outcome.err


def test_examples_of_a_page_are_those_it_was_written_with(tmp_path):
    rows = [{"correct": False, "text": "one <x>"}, {"correct": True, "text": "two"}]
    write_html_report(tmp_path / "test.html", "Title", {"accuracy": 50.0}, rows, tables=[("Table", ["a"], [["b"]])])
    found = examples_of(tmp_path / "test.html")
    assert "one &lt;x&gt;" in found and "two" in found and "Title" not in found and "Table" not in found
    (tmp_path / "foreign.html").write_text("<p>no marker</p>")
    assert examples_of(tmp_path / "foreign.html") == ""


@pytest.mark.parametrize("points", [[(1, 0.0)], [(1, 2.0), (2, 2.0)], [(0, -1e-9), (10 ** 7, 1e9)], [(1, 1e-7), (2, 1.0)]])
def test_charts_stay_inside_their_frame(points):
    text = charts.chart("a & b", [("", 0, points)])
    places = [tuple(map(float, place.split(","))) for place in re.search(r'polyline points="([^"]*)"', text).group(1).split()]
    assert len(places) == len(points)
    for x, y in places:
        assert charts.LEFT - 0.1 <= x <= charts.WIDTH - charts.RIGHT + 0.1 and charts.TOP - 0.1 <= y <= charts.HEIGHT - charts.BOTTOM + 0.1
    assert "a &amp; b" in text


def test_long_curves_are_thinned_to_means():
    points = [(step, float(step % 2)) for step in range(10 ** 4)]
    thin = charts.thinned(points)
    assert len(thin) <= charts.MOST_POINTS and thin[-1][0] == points[-1][0]
    assert sum(value for _, value in thin) / len(thin) == pytest.approx(0.5, abs=0.01)
