"""The dictionary is looked at during pre-training, and parameters can be kept as they began."""
import json

import numpy as np
import paddle
import pytest

from unimo2_paddle.config import load_run_config
from unimo2_paddle.errors import ConfigError, UserInputError
from unimo2_paddle.tasks.base import task_class
from unimo2_paddle.tasks.dictionary_health import DictionaryHealth
from unimo2_paddle.training.loop import Trainer


@pytest.fixture
def watched(demo_data, pretrain_config):
    """A function: changes -> the run config of a run that looks at its dictionary every second step."""
    retrieval = demo_data / "retrieval"
    base = {"eval.annotations": str(retrieval / "dataset_shapes.json"), "eval.images": str(retrieval / "images"), "eval.dictionary_every": 2,
            "eval.max_images": 6, "eval.captions_per_image": 2, "eval.split": "val", "train.steps": 4}
    return lambda changes=None: load_run_config(pretrain_config({**base, **(changes or {})}))


def test_the_curve_is_in_the_log_and_does_not_choose_the_model(watched, tmp_path):
    config = watched()
    best = Trainer(task_class(config.task)(config), config).run()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    curve = [record for record in records if record["kind"] == "dictionary"]
    assert [record["step"] for record in curve] == [2, 4]
    assert all(0 < record["used"] <= 128 and -100 <= record["overlap_gain"] <= 100 for record in curve)
    assert best["metric"] == "val/recall_mean"


def test_a_model_without_a_choice_of_codes_is_not_looked_at(watched):
    for change in ({"model.model_type": "baseline"}, {"model.grounding_method": "normal"}, {"eval.dictionary_every": 0}):
        config = watched(change)
        assert [type(one).__name__ for one in task_class(config.task)(config).evaluators()] == ["RetrievalEvaluator"]
    config = watched({"model.model_type": "baseline"})
    task = task_class(config.task)(config)
    with pytest.raises(UserInputError, match="only be told of a grounded model"):
        DictionaryHealth(task.evaluators()[0].dataset).run(task.build_model())


def test_each_side_chooses_its_own_codes(watched, tmp_path):
    """A dictionary of two blocks of codes, one near all pictures and one near all sentences, shares nothing."""
    config = watched()
    task = task_class(config.task)(config)
    model, health = task.build_model(), task.evaluators()[1]
    model.dictionary.temperature.set_value(paddle.to_tensor([1.0]))
    codes, width = model.config.num_codebook, model.config.hidden_size
    book = np.zeros((codes, width), dtype="float32")
    book[: codes // 2, 0], book[codes // 2:, 1] = 1.0, 1.0

    def states(column):
        fixed = np.zeros(width, dtype="float32")
        fixed[column], fixed[1 - column] = 5.0, -5.0
        return paddle.to_tensor(fixed)

    model.dictionary.codebook.set_value(paddle.to_tensor(book))
    image, text = model.encode_image, model.encode_text
    model.encode_image = lambda *a: image(*a) * 0 + states(0)
    model.encode_text = lambda *a: text(*a) * 0 + states(1)
    told = health.run(model)
    assert told["overlap_true"] == told["overlap_random"] == 0
    model.encode_text = lambda *a: text(*a) * 0 + states(0)
    assert health.run(model)["overlap_true"] == 100
    health.write_report(str(tmp_path))
    assert json.loads((tmp_path / "dictionary.json").read_text())["overlap_true"] == 100 and "overlap_true 100" in health.table()


def test_frozen_parameters_keep_their_initial_values(watched):
    config = watched({"train.frozen": ["*_temperature"], "eval.annotations": ""})
    trainer = Trainer(task_class(config.task)(config), config)
    trainer.run()
    model = trainer.model
    assert float(model.contrastive_temperature) == pytest.approx(0.07) and float(model.dictionary.temperature) == 100.0
    config = watched({"train.frozen": ["*_temperatur"]})
    with pytest.raises(ConfigError, match="train.frozen: no parameter is called '\\*_temperatur'"):
        task_class(config.task)(config).build_model()
