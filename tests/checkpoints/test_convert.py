"""Conversion between the three kinds of checkpoint, description, and whole models from and to disk."""
import json
import logging
import os
import struct
from pathlib import Path

import numpy as np
import paddle
import pytest

from unimo2_paddle.checkpoints.convert import convert, describe, read_checkpoint, write_checkpoint
from unimo2_paddle.checkpoints.fitting import fit_config
from unimo2_paddle.checkpoints.pretrained import from_pretrained, save_pretrained
from unimo2_paddle.checkpoints.released import parameter_arrays, read_released, write_released
from unimo2_paddle.cli import main
from unimo2_paddle.errors import CheckpointError, ConfigError
from unimo2_paddle.models.configuration import Unimo2Config
from unimo2_paddle.models.unimo2 import Unimo2Model

DATA = Path(__file__).parents[1] / "data"
TINY, TINY_CONFIG = str(DATA / "tiny_release"), str(DATA / "golden" / "tiny_config.json")


def build(config=None, **parts):
    with paddle.utils.unique_name.guard():
        return Unimo2Model(config or Unimo2Config.from_json(TINY_CONFIG), **parts)


def wide_config(**changes):
    """A small config with heads of 64, which shapes alone can tell."""
    return Unimo2Config(**{**dict(
        hidden_size=128, num_hidden_layers=1, text_num_hidden_layers=2, vit_num_hidden_layers=1, num_attention_heads=2,
        text_num_attention_heads=2, vit_num_attention_heads=2, text_vocab_size=40, text_max_position_embeddings=30,
        num_codebook=32, topk_value=32, image_size=32, resolution=8, position_grid=4), **changes})


def same_files(one, two):
    names = sorted(os.listdir(one))
    assert names == sorted(os.listdir(two))
    for name in names:
        assert Path(one, name).read_bytes() == Path(two, name).read_bytes(), name


def same_arrays(one, two):
    assert sorted(one) == sorted(two)
    for name in one:
        assert one[name].dtype == two[name].dtype and one[name].shape == two[name].shape
        assert one[name].tobytes() == two[name].tobytes(), name


# ---- convert ----


def test_a_release_through_both_other_formats_is_byte_identical(tmp_path):
    one, two, three = (str(tmp_path / name) for name in ("one", "two", "three"))
    convert(TINY, one, "safetensors")
    convert(one, two, "pdparams")
    summary = convert(two, three, "released")
    same_files(TINY, three)
    assert "151 variables" in summary and sorted(os.listdir(tmp_path)) == ["one", "three", "two"]


@pytest.mark.parametrize("first", ["released", "safetensors", "pdparams"])
@pytest.mark.parametrize("second", ["released", "safetensors", "pdparams"])
def test_every_direction_keeps_every_value_and_type(tmp_path, first, second):
    arrays = {"text.a": np.arange(6, dtype="float16").reshape(2, 3), "vq_emb": np.ones((2, 2)), "text.b": np.array([1, 2]),
              "text.c": np.array(3, "float32"), "text.d": np.array([True, False])}
    source, middle, target = (str(tmp_path / name) for name in ("source", "middle", "target"))
    write_released(source, arrays)
    convert(source, middle, first)
    convert(middle, target, second)
    found, _, kind = read_checkpoint(target)
    same_arrays(found, arrays)
    assert kind == second


def test_the_config_travels_with_the_weights(tmp_path):
    model = build()
    save_pretrained(model, str(tmp_path / "own"))
    convert(str(tmp_path / "own"), str(tmp_path / "pd"), "pdparams")
    assert read_checkpoint(str(tmp_path / "pd")).config == model.config.to_dict()
    convert(TINY, str(tmp_path / "named"), config=TINY_CONFIG)
    assert from_pretrained(str(tmp_path / "named")).config == model.config


def test_a_config_that_shapes_tell_is_written_and_its_assumption_said(tmp_path):
    write_released(str(tmp_path / "release"), parameter_arrays(build(wide_config())))
    summary = convert(str(tmp_path / "release"), str(tmp_path / "own"))
    assert Unimo2Config.from_json(str(tmp_path / "own" / "config.json")) == wide_config()
    assert "attention heads of 64" in summary
    summary = convert(TINY, str(tmp_path / "tiny"))
    assert os.listdir(tmp_path / "tiny") == ["model.safetensors"] and "no config.json is written" in summary


def test_an_existing_target_an_unknown_format_and_a_bad_source_write_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    for source, target, format, message in (
            (TINY, "taken", "safetensors", "exists already"),
            (TINY, "new", "onnx", "choose one of released, safetensors, pdparams"),
            ("nowhere", "new", "released", "nowhere does not exist"),
            (TINY_CONFIG, "new", "released", "is a file, but neither")):
        with pytest.raises(CheckpointError, match=message):
            convert(source, str(tmp_path / target), format)
    assert os.listdir(tmp_path) == ["taken"] and os.listdir(tmp_path / "taken") == []


@pytest.mark.parametrize("content", [
    b"", b"junk", struct.pack("<Q", 2 ** 60) + b"{}", struct.pack("<Q", 2) + b"{}",
    struct.pack("<Q", 62) + b'{"w":{"dtype":"F32","shape":[9,9],"data_offsets":[0,324]}}     ' + b"\0" * 8])
def test_damaged_safetensors_are_named(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="model.safetensors"):
        read_checkpoint(str(tmp_path))


def test_bfloat16_safetensors_are_widened(tmp_path):
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
                         "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}).encode()
    data = b"\x80\x3f\x00\xc0" + b"\0\0\x80\x3f"
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    arrays = read_checkpoint(str(tmp_path)).arrays
    assert arrays["a"].dtype == np.float32 and arrays["a"].tolist() == [1.0, -2.0] and arrays["b"].tolist() == [1.0]


def test_a_sharded_directory_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="name the file wanted"):
        read_checkpoint(str(tmp_path))


def test_structured_names_become_the_authors_names(tmp_path):
    model = build()
    paddle.save(model.state_dict(), str(tmp_path / "model_state.pdparams"))
    same_arrays(read_checkpoint(str(tmp_path)).arrays, parameter_arrays(model))
    same_arrays(read_checkpoint(str(tmp_path / "model_state.pdparams")).arrays, parameter_arrays(model))


# ---- describe ----


def test_describe_shows_every_variable_the_totals_and_the_config_it_fits():
    text = describe(TINY)
    assert "vit.position_embeddings" in text and "1x197x32" in text and "25,216" in text
    assert "151 variables, 136,828 parameters" in text
    assert ("fits: UNIMO-2 grounded, hidden 32, layers vit 3 / text 2 / grounded 2, vocabulary 120, text positions 64, "
            "codebook 64, position grid 14x14, patch 16x16") in text
    assert "contrastive projection" in text.split("present: ")[1].splitlines()[0]
    assert "absent: classifier" in text and "config.json: none" in text


def test_describe_says_when_the_config_disagrees(tmp_path):
    arrays = read_released(TINY)
    write_checkpoint(str(tmp_path / "right"), arrays, Unimo2Config.from_json(TINY_CONFIG).to_dict())
    assert "config.json: there, agrees" in describe(str(tmp_path / "right"))
    write_checkpoint(str(tmp_path / "wrong"), arrays, {"hidden_size": 64, "num_codebook": 64})
    assert "DISAGREES with the weights: hidden_size is 64, the shapes say 32" in describe(str(tmp_path / "wrong"))


def test_foreign_weights_are_described_as_such(tmp_path):
    paddle.save(paddle.nn.Linear(2, 3).state_dict(), str(tmp_path / "x.pdparams"))
    assert "fits no UNIMO-2 config" in describe(str(tmp_path / "x.pdparams"))
    write_released(str(tmp_path / "d"), {"vq_emb": np.ones((4, 2), "f4"), "duplicated_trigram_blocking_x": np.ones(1, "f4")})
    assert "not UNIMO-2 variables: duplicated_trigram_blocking_x" in describe(str(tmp_path / "d"))


def test_the_base_model_is_recognised_and_its_config_found_from_shapes():
    config = Unimo2Config()
    shapes = {"text.word_embedding": (50265, 768), "text.pos_embedding": (514, 768), "vq_emb": (2048, 768),
              "vit.position_embeddings": (1, 197, 768), "vit.patch_embeddings_projection_weight": (768, 3, 16, 16)}
    shapes.update({f"{room}.encoder_layer_{i}_ffn_fc_0.b_0": (3072,)
                   for room in ("vit", "text", "grounded") for i in range(12)})
    fit = fit_config(shapes)
    assert fit.is_base and "= UNIMO-2 base" in str(fit)
    assert Unimo2Config.from_dict(fit.values) == config
    shapes.pop("text.encoder_layer_11_ffn_fc_0.b_0")
    assert not fit_config(shapes).is_base


def test_layer_subsets_projections_and_the_baseline_are_found_from_shapes():
    for config in (wide_config(), wide_config(model_type="baseline", with_cmcl_projection=True),
                   wide_config(with_grounding_projection=True, with_grounding_mask=True, weight_sharing=False),
                   wide_config(text_enc_layers="1", position_grid=2, image_size=16)):
        values = fit_config({p.name: tuple(p.shape) for p in build(config).parameters()}).values
        expected = config.to_dict()
        if config.model_type == "baseline":  # the dictionary's size leaves no trace in a model without one
            values.update(num_codebook=32, topk_value=32)
        assert Unimo2Config.from_dict(values).to_dict() == expected


# ---- save_pretrained, from_pretrained ----


def test_a_saved_model_comes_back_equal_in_eval_mode(tmp_path):
    models = (build(), build(vision=False), build(heads=("pooling",)), build(wide_config(with_grounding_mask=True)))
    for number, model in enumerate(models):
        target = str(tmp_path / str(number))
        save_pretrained(model, target)
        assert sorted(os.listdir(target)) == ["config.json", "model.safetensors"]
        again = from_pretrained(target)
        assert not again.training and again.config == model.config
        same_arrays(parameter_arrays(again), parameter_arrays(model))


def test_the_authors_directory_loads_with_a_given_config(caplog):
    arrays = read_released(TINY)
    for config in (TINY_CONFIG, Unimo2Config.from_json(TINY_CONFIG), json.loads(Path(TINY_CONFIG).read_text())):
        model = from_pretrained(TINY, config=config)
        assert all(np.array_equal(p.numpy(), arrays[p.name]) for p in model.parameters())


def test_the_authors_directory_loads_with_the_config_its_shapes_tell(tmp_path, caplog):
    model = build(wide_config())
    write_released(str(tmp_path / "release"), parameter_arrays(model))
    with caplog.at_level(logging.WARNING):
        again = from_pretrained(str(tmp_path / "release"))
    assert again.config == model.config and "attention heads of 64" in caplog.text
    with pytest.raises(CheckpointError, match="Give the config"):
        from_pretrained(TINY)


def test_paddle_s_own_state_file_loads(tmp_path):
    model = build()
    paddle.save(model.state_dict(), str(tmp_path / "model_state.pdparams"))
    model.config.to_json(str(tmp_path / "config.json"))
    same_arrays(parameter_arrays(from_pretrained(str(tmp_path))), parameter_arrays(model))


def test_a_name_without_files_says_which_names_there_are():
    with pytest.raises(CheckpointError, match=r"neither a directory nor a file, nor a model of the zoo; did you mean 'unimo2-base'"):
        from_pretrained("unimo2-bas")


def test_what_does_not_fit_is_listed_unless_allowed(tmp_path):
    arrays = parameter_arrays(build())
    del arrays["vq_emb"]
    write_released(str(tmp_path / "release"), arrays)
    with pytest.raises(CheckpointError, match=r"1 of \d+ parameters.*\n  vq_emb: missing, the model has \[64, 32\]"):
        from_pretrained(str(tmp_path / "release"), config=TINY_CONFIG)
    model = from_pretrained(str(tmp_path / "release"), config=TINY_CONFIG, allow_missing="vq_emb")
    assert np.array_equal(model.text.words.weight.numpy(), arrays["text.word_embedding"])


def test_a_wrong_config_json_is_named(tmp_path):
    write_checkpoint(str(tmp_path / "own"), read_released(TINY), {"hiden_size": 32})
    with pytest.raises(ConfigError, match="did you mean 'hidden_size'"):
        from_pretrained(str(tmp_path / "own"))
    (tmp_path / "own" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is not a JSON file"):
        from_pretrained(str(tmp_path / "own"))


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    model = build()

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_pretrained(model, str(tmp_path / "own"))
    assert os.listdir(tmp_path) == []


# ---- commands ----


def test_commands_print_and_exit_with_their_status(tmp_path, capsys):
    assert main(["convert", "--from", TINY, "--to", str(tmp_path / "own")]) == 0
    assert main(["inspect", str(tmp_path / "own")]) == 0
    assert "151 variables, 136,828 parameters" in capsys.readouterr().out
    assert main(["convert", "--from", TINY, "--to", str(tmp_path / "own")]) == 2
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert main(["init", "--to", str(tmp_path / "new"), "--config", TINY_CONFIG]) == 2
    errors = capsys.readouterr().err
    assert "exists already" in errors and "does not exist" in errors and "nothing to start from" in errors
