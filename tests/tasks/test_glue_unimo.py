"""GLUE with UNIMO, the first system: the same task, chosen by the model's config."""
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from unimo2_paddle import Predictor
from unimo2_paddle.config import load_run_config
from unimo2_paddle.data.demo_tasks.glue import write
from unimo2_paddle.errors import ConfigError
from unimo2_paddle.models.configuration import UnimoConfig
from unimo2_paddle.tasks.base import ModelSection, to_tensors
from unimo2_paddle.tasks.glue import GlueTask

MODEL = {"config": "unimo_demo", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def glue_data(demo_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("glue")
    write(str(out), str(demo_data), 1)
    return out


@pytest.fixture
def config(glue_data, demo_data, tmp_path):
    """A function that writes a tiny run of a data set and returns its path."""

    def make(dataset, title, **model):
        values = {
            "task": "glue", "model": {**MODEL, **model},
            "data": {"dataset": dataset, "directory": str(glue_data / title), "answers": str(glue_data / "answers"),
                     "vocab": str(demo_data / "vocab"), "max_text_len": 64},
            "train": {"epochs": 1, "batch_size": 16}, "optim": {"learning_rate": 3e-3}, "eval": {"split": "val", "batch_size": 16},
            "run": {"output": str(tmp_path / f"run_{dataset}"), "progress": False},
        }
        path = tmp_path / f"{dataset}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    return make


@pytest.mark.parametrize("dataset, title, head", [("cola", "CoLA", "cls_out_2_w"), ("mnli", "MNLI", "cls_out_3_w"), ("stsb", "STS-B", "cls_out_1_w")])
def test_the_model_is_unimos_text_side_with_the_authors_names(config, dataset, title, head):
    task = GlueTask(load_run_config(config(dataset, title)))
    model = task.build_model()
    names = {parameter.name for parameter in model.parameters()}
    assert {head, "word_embedding", "pooled_fc_text.w_0", "encoder_layer_0_ffn_fc_1.b_0"} <= names
    assert not any(name.startswith(("image_", "pooled_fc_image", "vq_emb", "text.", "mask_lm")) for name in names)
    data = task.split("train")
    batch = to_tensors(task.collate([data.sample(i, None) for i in range(4)]))
    task.loss(model, batch)["loss"].backward()
    tokens, flops = task.work({key: value.numpy() for key, value in batch.items()})
    assert tokens == int(batch["text_mask"].sum()) and flops > 3 * 4 * 16 * 16 * tokens
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_training_evaluation_and_prediction_go_through_the_same_commands(config, unimo2, tmp_path):
    path = config("cola", "CoLA")
    trained = unimo2("train", "-c", path)
    assert trained.status == 0, trained.err
    best = tmp_path / "run_cola" / "best"
    judged = unimo2("eval", "-c", path, "-o", f"model.init={best}", "-o", "model.config=", "-o", "eval.split=test",
                    "-o", f"run.output={tmp_path / 'judged'}")
    assert judged.status == 0, judged.err
    assert "matthews" in judged.out and "majority accuracy" in judged.out
    row = json.loads((tmp_path / "judged" / "predictions" / "test.jsonl").read_text().splitlines()[0])
    found = Predictor(str(best))(text=row["text_a"])
    assert found.label == row["prediction"] and found.probability == pytest.approx(max(row["probabilities"].values()), abs=1e-3)


def test_a_model_finetuned_on_mnli_starts_sts_b_with_a_new_head(config, unimo2, tmp_path):
    assert unimo2("train", "-c", config("mnli", "MNLI")).status == 0
    task = GlueTask(load_run_config(config("stsb", "STS-B", init=str(tmp_path / "run_mnli" / "best"))))
    task.split("train")
    from unimo2_paddle.checkpoints.convert import read_checkpoint
    stored = read_checkpoint(str(tmp_path / "run_mnli" / "best")).arrays
    model = task.build_model()
    values = {parameter.name: parameter.numpy() for parameter in model.parameters()}
    np.testing.assert_array_equal(values["word_embedding"], stored["word_embedding"])
    assert values["cls_out_1_w"].shape == (16, 1) and "cls_out_3_w" in stored


def test_the_config_file_says_which_system_a_model_is():
    assert isinstance(ModelSection("unimo_demo").model_config(), UnimoConfig)
    assert ModelSection("unimo_base", overrides={"role_type_size": 3, "turn_type_size": 16}).model_config().dialog
    with pytest.raises(ConfigError, match="unimo_demo.json: unknown key 'num_codebook'"):
        ModelSection("unimo_demo", overrides={"num_codebook": 16}).model_config()


def test_a_key_of_the_other_system_is_refused_when_the_config_is_read(config):
    with pytest.raises(ConfigError, match="unknown key 'topk_value'"):
        load_run_config(config("cola", "CoLA", topk_value=4))


def test_a_task_of_unimo_2_refuses_a_model_of_unimo(pretrain_config, unimo2, tmp_path):
    path = Path(pretrain_config())
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, "model": {"config": "unimo_demo"}}))
    outcome = unimo2("validate", "-c", path)
    assert outcome.status == 2 and "unimo_demo is a model of UNIMO, this task takes one of UNIMO-2" in outcome.err


def test_the_vocabulary_error_names_the_key_of_its_system(config):
    with pytest.raises(Exception, match="the model's vocab_size is 600.*set model.vocab_size"):
        GlueTask(load_run_config(config("cola", "CoLA", vocab_size=600)))
