"""The model config reads the authors' keys, refuses what cannot work and says everything that is wrong at once."""
import json
from pathlib import Path

import pytest

from unimo2_paddle import Unimo2Config
from unimo2_paddle.errors import ConfigError
from unimo2_paddle.models.configuration import config_class, parse_layers

ROOT = Path(__file__).resolve().parents[2]
AUTHORS_FORM = ROOT / "tests/data/golden/tiny_config.json"


def problems(**values):
    with pytest.raises(ConfigError) as caught:
        Unimo2Config.from_dict(values)
    return caught.value.problems


def test_a_file_of_the_authors_form_is_read_key_by_key():
    values = json.loads(AUTHORS_FORM.read_text())
    config = Unimo2Config.from_json(AUTHORS_FORM)
    assert {key: getattr(config, key) for key in values} == values
    assert Unimo2Config.from_json(AUTHORS_FORM, topk_value=3, model_type="baseline").topk_value == 3


@pytest.mark.parametrize("path", sorted((ROOT / "unimo2_paddle/models/configs").glob("*.json")), ids=lambda p: p.stem)
def test_every_bundled_config_is_valid(path):
    assert config_class(json.loads(path.read_text())).from_json(path).hidden_size > 0


def test_writing_and_reading_gives_the_same_config(tmp_path):
    config = Unimo2Config(text_enc_layers="0-2", grounding_enc_layers=[1, 3], topk_value=7, grounding_counts_padding=True)
    text = config.to_json(tmp_path / "config.json")
    assert Unimo2Config.from_json(tmp_path / "config.json") == config
    assert Unimo2Config.from_dict(json.loads(text)) == Unimo2Config.from_dict(config.to_dict()) == config


def test_defaults_are_the_base_model():
    config = Unimo2Config()
    assert (config.hidden_size, config.num_hidden_layers, config.text_vocab_size, config.num_codebook, config.topk_value) == (
        768, 12, 50265, 2048, 100)
    assert (config.grid, config.num_patches) == (14, 196)
    assert Unimo2Config(image_size=384).num_patches == 576
    assert config.grounding_counts_padding is False


def test_unknown_keys_are_named_with_the_nearest_known_one():
    found = problems(hiden_size=32, topk_values=3, zzz=1)
    assert found == ["unknown key 'hiden_size'; did you mean 'hidden_size'?", "unknown key 'topk_values'; did you mean 'topk_value'?",
                     "unknown key 'zzz'"]


def test_all_wrong_combinations_are_reported_at_once():
    found = problems(hidden_size=30, num_attention_heads=4, text_num_attention_heads=5, vit_num_attention_heads=7, text_hidden_size=32,
                     image_size=100, resolution=16, topk_value=50, num_codebook=40, cmcl_share_parameters=True,
                     with_cmcl_projection=True, with_grounding_pos=True, text_max_position_embeddings=51)
    text = "\n".join(found)
    assert len(found) == 7
    for part in ("num_attention_heads: 4 does not divide hidden_size 30", "vit_num_attention_heads: 7 does not divide",
                 "text_hidden_size: must equal hidden_size 30", "image_size: 100 is not a multiple of the patch size (resolution) 16; for "
                 "example 96 is", "topk_value: 50 is larger than the codebook (num_codebook 40)", "with_grounding_projection must be true",
                 "with_grounding_pos: 50 grounded tokens need 52 text positions"):
        assert part in text


def test_all_wrong_values_are_reported_at_once():
    found = problems(hidden_act="swish", model_type="big", topk_value=0, num_labels=-1, hidden_dropout_prob=1.0, grounding_mask_ratio=-0.1)
    assert sorted(problem.split(":")[0] for problem in found) == [
        "grounding_mask_ratio", "hidden_act", "hidden_dropout_prob", "model_type", "num_labels", "topk_value"]


def test_all_wrong_types_are_reported_at_once():
    found = problems(hidden_size="32", topk_value=True, weight_sharing=1, hidden_act=None, initializer_range="0.1")
    assert sorted(problem.split(":")[0] for problem in found) == [
        "hidden_act", "hidden_size", "initializer_range", "topk_value", "weight_sharing"]


def test_unknown_keys_wrong_values_and_wrong_layers_come_together():
    found = problems(hiden_size=32, image_size=100, text_enc_layers="0,12", grounding_enc_layers=[0, 0])
    assert [problem.split(":")[0] for problem in found] == [
        "unknown key 'hiden_size'; did you mean 'hidden_size'?", "image_size", "text_enc_layers", "grounding_enc_layers"]


def test_whole_numbers_are_taken_for_floats():
    assert Unimo2Config(hidden_dropout_prob=0).hidden_dropout_prob == 0.0
    assert type(Unimo2Config(cmcl_score_weight=1).cmcl_score_weight) is float


def test_a_baseline_needs_no_codebook_of_topk_entries():
    assert Unimo2Config(model_type="baseline", topk_value=100, num_codebook=8).model_type == "baseline"


def test_a_codebook_of_exactly_topk_entries_is_allowed():
    assert Unimo2Config(topk_value=8, num_codebook=8).topk_value == 8


@pytest.mark.parametrize("value, expected", [
    (None, [0, 1, 2, 3]), ("", [0, 1, 2, 3]), ("0,2", [0, 2]), ("1-3", [1, 2, 3]), ("0, 2-3", [0, 2, 3]), ([3, 1], [3, 1]),
])
def test_layer_lists_have_several_forms(value, expected):
    assert parse_layers(value, 4, "text_enc_layers") == expected


@pytest.mark.parametrize("value", ["a", "0,,1", "4", "-1", [0, 0], [], "2-1", [0.5, "x"], 3])
def test_unreadable_layer_lists_are_refused_by_key(value):
    with pytest.raises(ConfigError, match="^text_enc_layers: "):
        parse_layers(value, 4, "text_enc_layers")


@pytest.mark.parametrize("content, message", [
    (None, "cannot read the model config"), ("{", "not a JSON file"), ("[1]", "must be a JSON object"),
    ('{"topk_valu": 3}', "did you mean 'topk_value'"), ('{"topk_value": 3000}', "larger than the codebook"),
])
def test_files_that_cannot_be_used_are_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        Unimo2Config.from_json(path)
    assert message in str(caught.value) and str(caught.value).startswith(str(path))
