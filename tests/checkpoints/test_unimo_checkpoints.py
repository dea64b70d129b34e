"""UNIMO's checkpoints: the released form byte for byte, our own directory, what shapes tell, what does not fit."""
import os
from pathlib import Path

import numpy as np
import paddle
import pytest

from unimo2_paddle import UnimoConfig, UnimoModel, from_pretrained, load_released, save_pretrained, save_released
from unimo2_paddle.checkpoints.convert import convert, describe, read_checkpoint, write_checkpoint
from unimo2_paddle.checkpoints.fitting import fit_config
from unimo2_paddle.checkpoints.released import parameter_arrays, read_released, write_released
from unimo2_paddle.errors import CheckpointError

DATA = Path(__file__).parents[1] / "data"
TINY = str(DATA / "tiny_release_unimo")  # written by Paddle 1.8's own save operator
CONFIG = str(DATA / "golden_unimo" / "tiny_config.json")


def build(parts=None, **overrides):
    paddle.seed(1)
    with paddle.utils.unique_name.guard():
        return UnimoModel(UnimoConfig(**{**dict(hidden_size=64, num_attention_heads=1, num_hidden_layers=2, vocab_size=50,
                                                max_position_embeddings=20, image_embedding_size=12, image_class_size=7), **overrides}),
                          **(parts or {}))


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def files(directory):
    return {name: Path(directory, name).read_bytes() for name in sorted(os.listdir(directory)) if name != "config.json"}


@pytest.mark.parametrize("format", ["safetensors", "pdparams", "released"])
def test_a_release_converted_there_and_back_is_the_same_byte_for_byte(tmp_path, format):
    convert(TINY, str(tmp_path / "there"), format, CONFIG)
    convert(str(tmp_path / "there"), str(tmp_path / "back"), "released")
    assert files(tmp_path / "back") == files(TINY)


def test_a_release_loads_into_the_model_and_is_saved_byte_for_byte(tmp_path):
    with paddle.utils.unique_name.guard():
        model = UnimoModel(UnimoConfig.from_json(CONFIG))
    report = load_released(model, TINY)
    assert len(report.loaded) == len(files(TINY)) and not (report.missing or report.unexpected or report.mismatched)
    save_released(model, str(tmp_path / "again"))
    assert files(tmp_path / "again") == files(TINY)


def test_a_loaded_release_computes_what_the_authors_computed():
    model = from_pretrained(TINY, config=CONFIG)
    case = np.load(DATA / "golden_unimo" / "v1_02_joint_vl.npz")
    inputs = {"image_features": case["in/image_embedding"], "image_location": case["in/image_loc"], "image_mask": case["in/image_mask"][..., 0],
              "input_ids": case["in/src_ids"][..., 0], "position_ids": case["in/pos_ids"][..., 0], "text_mask": case["in/text_mask"][..., 0]}
    out = model(**{key: paddle.to_tensor(value) for key, value in inputs.items()})
    np.testing.assert_allclose(model.pool_text(out).numpy(), case["out/pooled_text"], atol=1e-5)
    np.testing.assert_allclose(model.pool_image(out).numpy(), case["out/pooled_image"], atol=1e-5)


@pytest.mark.parametrize("parts, overrides", [
    ({}, {}), (dict(vision=False, heads=("masked_lm",)), dict(role_type_size=3, turn_type_size=16)),
    (dict(heads=("pooling", "matching", "masked_lm", "masked_region")), {}), (dict(vision=False, heads=("pooling",)), {}),
    (dict(heads=("masked_lm",)), dict(weight_sharing=False))])
def test_a_saved_model_comes_back_with_its_parts(tmp_path, parts, overrides):
    model = build(parts, **overrides)
    save_pretrained(model, str(tmp_path / "own"))
    again = from_pretrained(str(tmp_path / "own"))
    assert isinstance(again, UnimoModel) and not again.training and again.config == model.config
    same(parameter_arrays(again), parameter_arrays(model))


def test_the_config_of_a_release_is_worked_out_from_its_shapes(tmp_path):
    model = build(dict(heads=("pooling", "matching", "masked_lm", "masked_region")), weight_sharing=False, role_type_size=3, turn_type_size=16,
                  image_predict_feature=False)
    arrays = parameter_arrays(model)
    fit = fit_config({name: array.shape for name, array in arrays.items()})
    assert UnimoConfig.from_dict(fit.values) == model.config and fit.foreign == []
    write_released(str(tmp_path / "release"), arrays)
    again = from_pretrained(str(tmp_path / "release"))
    assert again.config == model.config and set(again.heads) == {"pooling", "masked_lm", "matching"}


def test_describe_tells_the_system_and_its_parts(tmp_path):
    text = describe(TINY)
    assert "fits: UNIMO, hidden 32, layers encoder 2, vocabulary 120, positions 64, region features 2048" in text
    assert f"{len(files(TINY))} variables" in text and "region embedding" in text.split("present: ")[1].splitlines()[0]
    assert "matching head" in text.split("absent: ")[1].splitlines()[0]
    write_checkpoint(str(tmp_path / "wrong"), read_released(TINY), {"hidden_size": 32, "vocab_size": 99})
    assert "DISAGREES with the weights: vocab_size is 99, the shapes say 120" in describe(str(tmp_path / "wrong"))


def test_the_released_base_model_is_recognised():
    config = UnimoConfig()
    shapes = {"word_embedding": (50265, 768), "pos_embedding": (514, 768), "cls_out_2_w": (768, 2)}
    shapes.update({f"encoder_layer_{i}_ffn_fc_0.w_0": (768, 3072) for i in range(12)})
    fit = fit_config(shapes)
    assert fit.is_base and fit.is_whole and "UNIMO base" in str(fit) and fit.foreign == []
    assert UnimoConfig.from_dict(fit.values) == config


def test_structured_names_become_the_authors_names(tmp_path):
    model = build()
    paddle.save(model.state_dict(), str(tmp_path / "model_state.pdparams"))
    same(read_checkpoint(str(tmp_path)).arrays, parameter_arrays(model))


def test_what_does_not_fit_is_listed_and_nothing_is_loaded():
    model = build()
    before = parameter_arrays(model)
    with pytest.raises(CheckpointError, match=r"word_embedding: the model has \[50, 64\], the checkpoint \[120, 32\]"):
        load_released(model, TINY)
    same(before, parameter_arrays(model))
    with pytest.raises(CheckpointError, match="config cannot be worked out"):
        from_pretrained(TINY)
    with paddle.utils.unique_name.guard():
        retrieval = UnimoModel(UnimoConfig.from_json(CONFIG), heads=("matching",))
    with pytest.raises(CheckpointError, match="match_fc.w_0: missing"):
        load_released(retrieval, TINY)
    assert load_released(retrieval, TINY, allow_missing="match_fc.*").missing == ["match_fc.b_0", "match_fc.w_0"]
