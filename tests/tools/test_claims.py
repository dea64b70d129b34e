"""The experiment on the papers' claims: same compute for all arms, choices on the development split, resumption, statistics, and all of it in small."""
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from unimo2_paddle.config import load_run_config
from unimo2_paddle.errors import UserInputError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # the parts of the tool import one another by name


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


report, claims = load("claims_report"), load("claims")


@pytest.fixture(scope="module")
def sweep():
    return claims.Sweep.read(ROOT / "tools" / "claims.yaml")


def result(arm, size, rate, seed, dev, test, select="r1", **more):
    run = claims.Run(claims.Arm(arm, select=select), size, rate, seed)
    return {**claims.describe(run), "settings": "", "processor_seconds": 1.0, "dev": {select: dev}, "test": {"ir_r1": test, **more}}


def test_arms_differ_in_their_keys_alone_and_do_the_same_work(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    experiment = claims.Experiment(sweep, claims.Results(tmp_path))
    arms = [arm for arms in dict.fromkeys(claims.CLAIMS.values()) for arm in arms if arm.trained]
    configs = {arm.name: load_run_config(sweep.config, [*experiment.keys(claims.Run(arm, 400, 1e-3, 2)), "model.init="]) for arm in arms}
    assert len(configs) == len(arms) == 15
    assert {(c.train.steps, c.run.seed, c.optim.learning_rate, str(c.mixture.global_batch)) for c in configs.values()} == {
        (320, 2, 1e-3, "{'pairs': 32, 'images': 56, 'texts': 28}")}
    assert {c.data.pairs[0].shards for c in configs.values()} == {sweep.pairs[400]}
    assert configs["baseline-all"].model.model_config().model_type == "baseline"
    assert configs["baseline-pairs"].mixture.weights == {"pairs": 1.0} == configs["grounded-pairs"].mixture.weights
    whole = configs["grounded-all"]
    for arm in claims.ABLATIONS:
        assert configs[arm.name].mixture == whole.mixture and configs[arm.name].resolved() != whole.resolved()


def test_the_grid_is_tried_with_seed_1_and_what_the_development_split_prefers_goes_on(sweep, tmp_path):
    results = claims.Results(tmp_path / "results")
    experiment = claims.Experiment(sweep, results)
    carried_out = []
    for run in experiment.plan(["dictionary", "unpaired", "skills"], seeds=2):
        carried_out.append(run)
        score = run.rate if run.arm.name.startswith("grounded") else -run.rate  # the larger rate helps the grounded arms alone
        results.write(run, {**claims.describe(run), "settings": experiment.settings(run), "dev": {"r1": score, "text_loss": -score, "classes": score}})
    main = [run for run in carried_out if run.arm in claims.MAIN]
    assert len(main) == 4 * (2 + 1 + 1 + 3), "two rates with seed 1 in the middle, else one"
    assert len(carried_out) == len(main) + 2 * 3 + 2, "two arms of one size, and the weights nobody trained"
    for run in main:
        if run.seed == 2 or run.size != 400:
            assert run.rate == (4e-3 if run.arm.name.startswith("grounded") else 2e-3)
    assert [(run.size, run.seed) for run in main] == [
        cell for size in (400, 100, 1600) for seed, runs in ((1, 8 if size == 400 else 4), (2, 4)) for cell in [(size, seed)] * runs], "all arms first"
    assert not list(experiment.plan(["dictionary"], seeds=2)), "what is there is not done again"
    assert {run.seed for run in experiment.plan(["dictionary"], seeds=3)} == {3}


def test_results_of_other_settings_are_not_mixed(sweep, tmp_path):
    results, run = claims.Results(tmp_path), claims.Run(claims.MAIN[0], 100, 1e-3, 1)
    experiment = claims.Experiment(sweep, results)
    results.write(run, {**claims.describe(run), "settings": experiment.settings(run), "dev": {"r1": 1.0}})
    assert results.read(run, experiment.settings(run))["dev"] == {"r1": 1.0}
    other = claims.Experiment(claims.Sweep(**{**vars(sweep), "options": ["train.steps=7"]}), results)
    with pytest.raises(UserInputError, match="other settings"):
        results.read(run, other.settings(run))
    Path(results.path(run)).write_text("{")
    with pytest.raises(UserInputError, match="not a result"):
        results.read(run)


def test_the_t_interval_is_that_of_the_books():
    mean, half = report.interval([10.0, 12.0, 14.0])
    assert mean == 12.0 and half == pytest.approx(4.3027 * 2 / math.sqrt(3), abs=1e-3)
    assert math.isnan(report.interval([1.0])[1]) and report.told([1.0]) == "1.00 (1)" and report.told([]) == "-"


def test_differences_are_paired_by_seed_and_test_figures_choose_nothing():
    results = [result("grounded-pairs", 100, 1e-3, 1, 30.0, 10.0), result("grounded-pairs", 100, 3e-3, 1, 20.0, 90.0),
               result("grounded-pairs", 100, 1e-3, 2, 1.0, 13.0), result("baseline-pairs", 100, 1e-3, 1, 1.0, 8.0),
               result("baseline-pairs", 100, 1e-3, 2, 1.0, 9.0), result("baseline-pairs", 100, 1e-3, 3, 1.0, 50.0)]
    picked = report.chosen(results)
    assert {seed: r["test"]["ir_r1"] for seed, r in picked["grounded-pairs", 100].items()} == {1: 10.0, 2: 13.0}
    assert report.paired(picked["grounded-pairs", 100], picked["baseline-pairs", 100], "ir_r1") == {1: 2.0, 2: 4.0}
    line = next(line for line in report.difference_table(picked).splitlines() if line.startswith("| 1: grounded - baseline, pairs only"))
    assert line.split(" | ")[2] == "+3.00 ± 12.71 (2)", "seed 3 has no partner"


def test_of_a_loss_the_smaller_one_is_chosen():
    results = [result("texts-only", 100, rate, 1, loss, 0.0, select="text_loss") for rate, loss in ((1e-3, 3.0), (3e-3, 2.0))]
    assert report.chosen(results)["texts-only", 100][1]["learning_rate"] == 3e-3


def test_means_over_sizes_are_of_the_seeds_that_all_sizes_have():
    assert report.over_sizes([{1: 1.0, 2: 5.0}, {1: 3.0}]) == [2.0] and report.over_sizes([]) == []


def test_the_results_of_a_page_are_replaced_and_the_rest_stays(tmp_path):
    page = tmp_path / "claims.md"
    page.write_text(f"before\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nafter\n")
    report.replace_results(page, "new")
    assert page.read_text() == f"before\n{report.MARKS[0]}\n\nnew\n\n{report.MARKS[1]}\nafter\n"
    report.replace_results(tmp_path / "none.md", "new")
    assert not (tmp_path / "none.md").exists()
    page.write_text("no marks")
    with pytest.raises(UserInputError, match="each of which must be there once"):
        report.replace_results(page, "new")


@pytest.mark.parametrize("content, message", [
    ("config: a\noutput: b\nlearning_rates: [1]\n", "pairs is missing"),
    ("config: a\noutput: b\npairs: {1: x}\nlearning_rates: [1]\nsteps: 3\n", "unknown key steps"),
    ("config: a\noutput: b\npairs: [x]\nlearning_rates: [1]\n", "pairs must be numbers of pairs"),
])
def test_a_wrong_sweep_is_status_2(tmp_path, capsys, content, message):
    (tmp_path / "sweep.yaml").write_text(content)
    assert claims.main(["--sweep", str(tmp_path / "sweep.yaml"), "--results", str(tmp_path / "results")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_a_report_without_results_and_no_seed_are_status_2(tmp_path, capsys):
    assert claims.main(["--report", "--results", str(tmp_path / "none")]) == 2
    assert "holds no results yet" in capsys.readouterr().err
    assert claims.main(["--seeds", "0"]) == 2


def test_the_committed_results_are_read():
    directory = ROOT / "docs" / "claims" / "results"
    results = report.read_results(directory)
    assert results and all(r["test"]["ir_r1"] >= 0 and r["dev"] for r in results)
    assert all(json.dumps(r).count("/") < 20 for r in results), "no paths"


def test_everything_runs_in_small_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(claims.tempfile, "tempdir", None)
    monkeypatch.chdir(tmp_path)
    assert claims.main(["--smoke"]) == 0
    told = capsys.readouterr().out
    for title in ("all arms", "paired differences", "Mechanism", "Claim 3", "Ablations"):
        assert f"{title}" in told
    assert not list(tmp_path.iterdir())
