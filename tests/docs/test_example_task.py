"""docs/add_a_task.md: its code is the example's, and the example trains, evaluates and reports through the commands."""
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from unimo2_paddle.data.demo_tasks import captioning
from unimo2_paddle.tasks.base import TASKS
from unimo2_paddle.training.status import read_status

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLE = ROOT / "examples" / "counting"
PAGE = (ROOT / "docs" / "add_a_task.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pictures(demo_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("captioning")
    captioning.write(str(out), str(demo_data), 1)
    return out


@pytest.fixture
def counting(demo_data, pictures, tiny_pretrain, tmp_path, monkeypatch, capsys):
    """A function that runs a command of the page on the tiny data and model; returns its exit status, ``.err`` has its messages."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.setitem(TASKS, "counting", "")  # so that it is taken away afterwards
    small = {"data.annotations": pictures / "dataset_shapes.json", "data.images": pictures, "data.scenes": demo_data / "scenes", "train.max_steps": 3,
             "train.batch_size": 4, "run.output": tmp_path / "run", "run.progress": "false", "run.log_every": 1}
    model = {"model.init": "", **{f"model.{key}": value for key, value in tiny_pretrain(tmp_path)["model"].items()}}

    def run(command):
        first, *others = shlex.split(command.replace("output/demo/counting", str(tmp_path / "run")))[2:]
        overrides = {**small, **({} if "model.init" in command else model)}
        words = [str(ROOT / word) if word.startswith("examples/") else word for word in others]
        monkeypatch.setattr(sys, "argv", ["counting.py", first, *(part for key, value in overrides.items() for part in ("-o", f"{key}={value}")), *words])
        sys.modules.pop("counting", None)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(EXAMPLE / "counting.py"), run_name="__main__")
        run.err = capsys.readouterr().err
        return end.value.code

    return run


def test_all_code_of_the_page_is_in_the_example():
    example = (EXAMPLE / "counting.py").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) >= 8
    for block in blocks:
        assert block in example, block


def test_the_commands_of_the_page_train_and_judge_the_task(counting, tmp_path):
    commands = [line for line in PAGE.splitlines() if line.startswith("python examples/counting/counting.py")]
    assert [command.split()[2] for command in commands] == ["validate", "train", "eval"]
    for command in commands:
        assert counting(command) == 0, counting.err
    status, run = read_status(tmp_path / "run"), tmp_path / "run"
    assert (status["state"], status["step"], status["task"]) == ("finished", 3, "counting")
    metrics = json.loads((run / "predictions" / "test.json").read_text())
    assert set(metrics) == {"accuracy", "most_frequent", "off_by"} and 0 <= metrics["accuracy"] <= 100 and metrics["off_by"] <= 8
    rows = [json.loads(line) for line in (run / "predictions" / "test.jsonl").read_text().splitlines()]
    assert {row["objects"] for row in rows} <= {2, 3} and metrics["accuracy"] == pytest.approx(100 * sum(row["correct"] for row in rows) / len(rows))
    report = (run / "report.html").read_text()
    assert "Examples: test" in report and "data:image/jpeg" in report and "most_frequent" in report


def test_wrong_keys_and_data_are_one_message_with_the_remedy(counting, tmp_path):
    assert counting("python x validate -c examples/counting/demo.yaml -o data.scene=x") == 2 and "did you mean 'scenes'" in counting.err
    (tmp_path / "train.jsonl").write_text('{"key": "pair0000000", "objects": []}\n')
    assert counting(f"python x train -c examples/counting/demo.yaml -o data.scenes={tmp_path}") == 2
    assert "train.jsonl: no scene of" in counting.err and not (tmp_path / "run").exists()
