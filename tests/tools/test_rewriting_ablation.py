"""tools/rewriting_ablation.py: both variants cost the same, finished runs are kept, figures are means over seeds."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unimo2_paddle.augment.store import Augmentations
from unimo2_paddle.data.region_store import RegionStore

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("rewriting_ablation", ROOT / "tools" / "rewriting_ablation.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


class Loop:
    """Stands in for the training loop: notes what is asked for; a run's metrics follow from its variant and seed."""

    def __init__(self, fail_at=None):
        self.trained, self.judged, self.fail_at = [], [], fail_at

    def train(self, config, keys, resume):
        assert resume == "auto"
        if len(self.trained) == self.fail_at:
            raise KeyboardInterrupt
        self.trained.append(keys)

    def judge(self, config, keys):
        self.judged.append(keys)
        seed = next(int(key.split("=")[1]) for key in keys if key.startswith("run.seed="))
        gain = 0.0 if any("hard_negatives=0" in key for key in keys) else 10.0
        return [(None, {**{key: 50.0 + gain + seed for key in tool.METRICS}, "other": 1.0})]


def run(out, loop, *more):
    return tool.main(["--out", str(out), *more], loop.train, loop.judge)


def test_the_variants_differ_in_rewriting_alone_and_read_as_many_pairs(tmp_path):
    loop = Loop()
    assert run(tmp_path / "a", loop, "--seeds", "1", "-o", "train.steps=7") == 0
    one, other = [set(keys) for keys in loop.trained]
    assert {key.partition("=")[0] for key in one ^ other} == {
        "run.output", "train.candidates.paraphrases", "train.candidates.hard_negatives", "train.candidates.random_negatives"}
    counts = [tool.load_run_config(ROOT / tool.CONFIG, keys).train.candidates for keys in loop.trained]
    joint = [c.paraphrases + c.hard_negatives + c.random_negatives for c in counts]
    assert joint[0] == joint[1] and counts[0].rewritten and not counts[1].rewritten
    assert all("eval.split=test" in keys and "train.steps=7" in keys for keys in loop.judged)
    assert all("eval.annotations=" in keys for keys in loop.trained), "nothing is chosen on the way"


def test_an_interrupted_ablation_goes_on_where_it_was(tmp_path, capsys):
    first, second = Loop(fail_at=3), Loop()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", first)
    assert run(tmp_path / "a", second) == 0
    assert len(first.trained) == 3 == len(second.trained)
    told = json.loads((tmp_path / "a" / "results.json").read_text())
    assert sorted(told["runs"]) == ["with-1", "with-2", "with-3", "without-1", "without-2", "without-3"]
    assert told["summary"]["with rewriting"]["ir_r1"] == [62.0, 1.0] and told["summary"]["difference"]["ir_r1"] == [10.0, 0.0]
    assert "| difference | +10.0 ± 0.0 |" in capsys.readouterr().out
    again = Loop()
    assert run(tmp_path / "a", again) == 0 and not again.trained


@pytest.mark.parametrize("more, message", [
    (["--seeds", "0"], "--seeds 0: must be at least 1"),
    (["-c", str(ROOT / "run_configs" / "pretrain" / "demo.yaml")], "is a config of task pretrain"),
])
def test_wrong_input_is_status_2(tmp_path, capsys, more, message):
    assert run(tmp_path / "a", Loop(), *more) == 2
    assert message in capsys.readouterr().err


def test_results_of_other_settings_are_not_mixed(tmp_path, capsys):
    assert run(tmp_path / "a", Loop(), "--seeds", "1") == 0
    assert run(tmp_path / "a", Loop(), "--seeds", "1", "-o", "train.steps=7") == 2
    assert "other settings (train)" in capsys.readouterr().err
    (tmp_path / "a" / "results.json").write_text("{")
    assert run(tmp_path / "a", Loop()) == 2


@pytest.mark.slow
def test_the_demo_is_prepared_by_one_command_that_may_be_repeated(tmp_path):
    """Generated data of the smallest size, the stores of all splits, rewrites and retrieved texts of every pair."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    out = tmp_path / "demo"
    subprocess.run([sys.executable, "-m", "unimo2_paddle.cli", "demo-data", "--size", "24", "--out", str(out / "data")], check=True, env=environment)
    for _ in range(2):
        subprocess.run(["bash", str(ROOT / "tools" / "prepare_unimo_demo.sh"), str(out)], check=True, env=environment)
    stores = {split: RegionStore(out / "unimo" / "regions" / split) for split in ("train", "val", "test")}
    assert "pair0000000" in stores["train"] and "dev00000" in stores["val"] and "test00000" in stores["test"]
    made = Augmentations(out / "unimo" / "augmentations").get("pair0000000")
    assert made.texts and all(caption.positives and all(caption.negatives.values()) for caption in made.captions)
