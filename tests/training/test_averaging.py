"""Averaged weights and layer-wise rates: the arithmetic, the exchange for judging, and exact resuming."""
import json

import numpy as np
import paddle
import pytest

from unimo2_paddle.checkpoints.convert import read_safetensors
from unimo2_paddle.errors import CheckpointError, ConfigError
from unimo2_paddle.training.averaging import WeightAverage
from unimo2_paddle.training.loop import train_from_config
from unimo2_paddle.training.optim import OptimConfig, build_optimizer, layer_scales


@pytest.fixture
def layer():
    with paddle.utils.unique_name.guard():
        return paddle.nn.Linear(2, 2)


def test_the_average_follows_its_formula_and_starts_with_a_short_memory(layer):
    average = WeightAverage(layer.parameters(), 0.5)
    expected = layer.weight.numpy().copy()
    for step in range(12):
        layer.weight.set_value(layer.weight.numpy() + 1.0)
        average.update(step)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * layer.weight.numpy()
    np.testing.assert_allclose(average.arrays()[layer.weight.name], expected, rtol=1e-5)


def test_judging_borrows_the_averaged_weights_and_gives_the_own_ones_back(layer):
    average = WeightAverage(layer.parameters(), 0.9)
    first = layer.weight.numpy().copy()
    layer.weight.set_value(first + 1.0)
    with pytest.raises(RuntimeError), average.applied():
        np.testing.assert_array_equal(layer.weight.numpy(), first)
        raise RuntimeError("an evaluator fails")
    np.testing.assert_array_equal(layer.weight.numpy(), first + 1.0)
    np.testing.assert_array_equal(average.arrays()[layer.weight.name], first)


def test_layers_are_counted_from_the_head_down_over_both_encoders():
    scales = layer_scales(["cls_out_w", "grounded.pooled_fc_image.w_0", "grounded.encoder_layer_1_ffn_fc_0.w_0", "grounded.encoder_layer_0_ffn_fc_0.w_0",
                           "vq_emb", "vit.post_encoder_layer_norm_scale", "vit.encoder_layer_2_ffn_fc_0.w_0", "vit.encoder_layer_0_ffn_fc_0.w_0",
                           "text.encoder_layer_0_ffn_fc_0.w_0", "vit.patch_embeddings_projection_weight", "text.word_embedding"], 0.5)
    assert [round(-np.log2(v)) for v in scales.values()] == [0, 0, 1, 2, 3, 3, 3, 5, 3, 6, 6]


def test_layers_of_unimo_are_counted_over_its_one_encoder():
    scales = layer_scales(["cls_out_3_w", "pooled_fc_text.w_0", "encoder_layer_1_ffn_fc_0.w_0", "encoder_layer_0_post_att_layer_norm_bias",
                           "word_embedding", "v_pre_encoder_layer_norm_scale", "image_emb.w_0", "turn_embedding"], 0.5)
    assert [round(-np.log2(v)) for v in scales.values()] == [0, 0, 1, 2, 3, 3, 3, 3]


def test_a_first_step_moves_every_parameter_by_its_share_of_the_rate(tiny_config):
    from unimo2_paddle.models.classifier import Unimo2Classifier

    with paddle.utils.unique_name.guard():
        model = Unimo2Classifier(tiny_config, "image", 3, dropout=0.0)
        optimizer = build_optimizer(model.parameters(), OptimConfig(layer_decay=0.5, weight_decay=0.0, clip_norm=0, epsilon=1e-12))
    before = {p.name: p.numpy().copy() for p in model.parameters()}
    model(paddle.rand([4, 32, 32, 3])).square().sum().backward()
    gradients = {p.name: p.grad.numpy() for p in model.parameters() if p.grad is not None}
    optimizer.set_lr(0.01)
    optimizer.step()
    scales = layer_scales(before, 0.5)
    for p in model.parameters():
        if p.name in gradients and np.abs(gradients[p.name]).max() > 1e-4:
            assert np.abs(p.numpy() - before[p.name]).max() == pytest.approx(0.01 * scales[p.name], rel=0.02), p.name
    assert len(set(scales.values())) == 5  # heads, two grounded layers, one visual layer, embeddings


def test_an_averaging_run_resumes_as_if_it_had_not_stopped(pretrain_config, tmp_path):
    changes = {"optim.ema": 0.9, "run.save_every": 3, "data.images": [], "mixture.weights": {"pairs": 1.0}, "mixture.global_batch": {"pairs": 4}}
    path = pretrain_config(changes)
    train_from_config(path)
    train_from_config(path, [f"run.output={tmp_path / 'again'}"], resume=str(tmp_path / "run" / "checkpoints" / "step-000003"))
    for name in ("model.safetensors", "average.safetensors", "optimizer.safetensors"):
        whole, resumed = (read_safetensors(str(tmp_path / run / "checkpoints" / "step-000006" / name)) for run in ("run", "again"))
        assert all(np.array_equal(whole[key], resumed[key]) for key in whole) and set(whole) == set(resumed)
    kept = read_safetensors(str(tmp_path / "run" / "best" / "model.safetensors"))
    averages = read_safetensors(str(tmp_path / "run" / "checkpoints" / "step-000006" / "average.safetensors"))
    assert all(np.array_equal(kept[key], averages[key]) for key in kept)


def test_averaging_cannot_start_in_the_middle_of_a_run(pretrain_config, tmp_path):
    path = pretrain_config({"train.steps": 1})
    train_from_config(path)
    newest = tmp_path / "run" / "checkpoints" / "step-000001"
    assert "average.safetensors" not in json.loads((newest / "manifest.json").read_text())
    with pytest.raises(CheckpointError, match="did not average weights; resume with optim.ema=0"):
        train_from_config(path, ["optim.ema=0.9", "train.steps=2"], resume="auto")


def test_impossible_values_are_refused_by_key(pretrain_config):
    from unimo2_paddle.config import load_run_config

    with pytest.raises(ConfigError) as caught:
        load_run_config(pretrain_config({"optim.ema": 1.0, "optim.layer_decay": 0}))
    assert "optim.ema: must be in [0, 1), is 1.0" in str(caught.value) and "optim.layer_decay: must be above 0" in str(caught.value)
