"""``unimo2 eval`` through oneDNN tells how far its states and metrics are from those of the dynamic graph."""
import paddle
import pytest
import yaml

from unimo2_paddle import Unimo2Model
from unimo2_paddle.checkpoints.pretrained import save_pretrained
from unimo2_paddle.training.loop import evaluate_from_config, precision_lines


@pytest.fixture
def evaluation(tmp_path, demo_data, tiny_config):
    """A run config that judges an untrained model by retrieval among the demo's pictures."""
    paddle.seed(3)
    with paddle.utils.unique_name.guard():
        model = Unimo2Model(tiny_config)
    save_pretrained(model, tmp_path / "model")
    values = {"task": "retrieval", "model": {"init": str(tmp_path / "model")},
              "data": {"annotations": str(demo_data / "retrieval" / "dataset_shapes.json"), "images": str(demo_data / "retrieval" / "images"),
                       "vocab": str(demo_data / "vocab"), "max_text_len": 40},
              "eval": {"split": "test", "max_images": 6, "captions_per_image": 1}, "run": {"output": str(tmp_path / "out"), "progress": False}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "run.yaml")


def test_metrics_of_float32_are_those_of_the_dynamic_graph(evaluation, capsys):
    found = evaluate_from_config(evaluation, ["run.precision=fp32", "run.compare_precision=true"])
    told = capsys.readouterr().out
    assert "precision fp32 (oneDNN): states of the first sample differ by" in told and "no metric differs from dynamic" in told
    assert found == evaluate_from_config(evaluation)
    assert "precision" not in capsys.readouterr().out


def test_metrics_that_change_are_listed():
    lines = precision_lines("bf16", {"vision": 0.004}, {"ir_r1": 50.0, "tr_r1": 20.0}, {"ir_r1": 52.5, "tr_r1": 20.0})
    assert "0.4 % (vision)" in lines[0] and len(lines) == 3 and lines[2].split() == ["ir_r1", "52.5000", "50.0000", "-2.5000"]


def test_an_unknown_precision_is_a_config_error(evaluation, unimo2):
    outcome = unimo2("eval", "-c", evaluation, "-o", "run.precision=int8")
    assert outcome.status == 2 and "run.precision: 'int8' is not one of dynamic, fp32, bf16" in outcome.err
