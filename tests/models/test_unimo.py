"""UNIMO's model: segments, masks, heads, names, bad input. That it computes what the authors' code computes: test_golden.py."""
import dataclasses
import json
from pathlib import Path

import numpy as np
import paddle
import pytest

from unimo2_paddle import UnimoConfig, UnimoModel
from unimo2_paddle.errors import ConfigError, UserInputError
from unimo2_paddle.models.classifier import UnimoClassifier
from unimo2_paddle.models.flops import unimo_flops
from unimo2_paddle.models.unimo import joint_visibility

CONFIGS = Path(__file__).resolve().parents[2] / "unimo2_paddle/models/configs"
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=40, max_position_embeddings=24, image_embedding_size=6,
            image_class_size=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def build(cls=UnimoModel, arguments=(), seed=3, **overrides):
    parts = {key: overrides.pop(key) for key in ("vision", "heads") if key in overrides}
    paddle.seed(seed)
    with paddle.utils.unique_name.guard():
        model = cls(UnimoConfig(**{**TINY, **overrides}), *arguments, **parts)
    for parameter in model.parameters():  # the initial ones are so small that attention would hardly matter
        if parameter.ndim == 2:
            parameter.set_value(paddle.randn(parameter.shape) * 0.3)
    model.eval()
    return model


def batch(regions=4, words=5, objects=0, rows=2, padding=1, seed=0):
    """A batch whose last row has ``padding`` padded positions in every segment."""
    rng = np.random.RandomState(seed)

    def mask(size):
        values = np.ones([rows, size], "float32")
        values[-1, size - padding:] = 0.0 if padding else 1.0
        return paddle.to_tensor(values)

    def ids(size):
        return {"ids": paddle.to_tensor(rng.randint(4, 40, [rows, size])), "positions": paddle.arange(2, 2 + size).expand([rows, size])}

    inputs = {}
    if regions:
        inputs.update(image_features=paddle.to_tensor(rng.randn(rows, regions, 6).astype("float32")), image_mask=mask(regions),
                      image_location=paddle.to_tensor(rng.rand(rows, regions, 5).astype("float32")))
    if objects:
        tags = ids(objects)
        inputs.update(object_ids=tags["ids"], object_positions=tags["positions"], object_mask=mask(objects))
    if words:
        text = ids(words)
        inputs.update(input_ids=text["ids"], position_ids=text["positions"], text_mask=mask(words))
    return inputs


def causal(rows, size):
    return paddle.to_tensor(np.tril(np.ones([size, size], "float32"))).expand([rows, size, size])


def test_every_segment_comes_back_with_its_own_length():
    out = build()(**batch(regions=4, objects=3, words=5))
    assert [tuple(part.shape) for part in (out.image_states, out.object_states, out.text_states)] == [(2, 4, 16), (2, 3, 16), (2, 5, 16)]
    out = build()(**batch(regions=4, words=0))
    assert out.image_states.shape == [2, 4, 16] and out.object_states is None and out.text_states is None


def test_what_is_padded_reaches_no_real_position():
    model, inputs = build(), batch(objects=3)
    before = model(**inputs)
    for key in ("image_features", "image_location", "object_ids", "input_ids"):
        changed = inputs[key].numpy().copy()
        changed[-1, -1:] = changed[-1, -1:] // 2 + 3
        inputs[key] = paddle.to_tensor(changed)
    after = model(**inputs)
    for name in ("image_states", "object_states", "text_states"):
        a, b = getattr(before, name).numpy(), getattr(after, name).numpy()
        np.testing.assert_allclose(a[0], b[0], atol=1e-6)
        np.testing.assert_allclose(a[1, :-1], b[1, :-1], atol=1e-6)


def test_with_a_sequence_mask_no_later_word_is_seen_and_the_picture_sees_no_word():
    model, inputs = build(), batch(objects=3, padding=0)
    inputs["text_mask"] = causal(2, 5)
    before = model(**inputs)
    ids = inputs["input_ids"].numpy().copy()
    ids[:, 3] = 39
    after = model(**{**inputs, "input_ids": paddle.to_tensor(ids)})
    np.testing.assert_array_equal(before.image_states.numpy(), after.image_states.numpy())
    np.testing.assert_array_equal(before.object_states.numpy(), after.object_states.numpy())
    np.testing.assert_allclose(before.text_states.numpy()[:, :3], after.text_states.numpy()[:, :3], atol=1e-6)
    assert np.abs(before.text_states.numpy() - after.text_states.numpy())[:, 3:].max() > 1e-3


def test_with_a_plain_mask_every_token_sees_every_other():
    model, inputs = build(), batch(padding=0)
    ids = inputs["input_ids"].numpy().copy()
    ids[:, 3] = 39
    before, after = model(**inputs), model(**{**inputs, "input_ids": paddle.to_tensor(ids)})
    assert np.abs(before.image_states.numpy() - after.image_states.numpy()).max() > 1e-3


def test_padded_rows_and_columns_of_the_joint_mask_are_empty():
    context, text = paddle.to_tensor([[1.0, 1.0, 0.0]]), paddle.to_tensor([[1.0, 0.0]])
    expected = np.outer([1, 1, 0, 1, 0], [1, 1, 0, 1, 0])
    np.testing.assert_array_equal(joint_visibility(context, text).numpy()[0], expected)
    sequence = paddle.to_tensor([[[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])
    np.testing.assert_array_equal(joint_visibility(context, sequence).numpy()[0], [
        [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize("regions, words", [(4, 5), (0, 5), (4, 0)])
def test_first_positions_alone_equal_those_of_the_whole(regions, words):
    model, inputs = build(heads=("matching",)), batch(regions=regions, words=words, objects=2 if regions and words else 0)
    whole, first = model(**inputs), model(**inputs, first_only=True)
    for name in ("image_states", "text_states"):
        if getattr(whole, name) is not None:
            np.testing.assert_allclose(getattr(whole, name).numpy()[:, :1], getattr(first, name).numpy(), atol=1e-6)
    if regions and words:
        np.testing.assert_allclose(model.matching_score(whole).numpy(), model.matching_score(first).numpy(), atol=1e-6)
        assert model.matching_score(whole).shape == [2]


def test_roles_and_turns_change_the_text_and_are_asked_for():
    model, inputs = build(vision=False, role_type_size=3, turn_type_size=16), batch(regions=0)
    zeros = paddle.zeros_like(inputs["input_ids"])
    first = model(**inputs, role_ids=zeros, turn_ids=zeros).text_states.numpy()
    assert np.abs(first - model(**inputs, role_ids=zeros + 1, turn_ids=zeros).text_states.numpy()).max() > 1e-3
    assert np.abs(first - model(**inputs, role_ids=zeros, turn_ids=zeros + 5).text_states.numpy()).max() > 1e-3
    with pytest.raises(UserInputError, match="role_ids and turn_ids"):
        model(**inputs)


def test_a_perturbation_of_the_text_spares_the_object_tags():
    model, inputs = build(num_hidden_layers=1), batch(objects=3, padding=0)
    inputs["text_mask"] = causal(2, 5)  # so that nothing of the text reaches the tags
    before = model(**inputs)
    after = model(**inputs, text_delta=paddle.arange(16, dtype="float32").expand([2, 5, 16]))
    np.testing.assert_array_equal(before.object_states.numpy(), after.object_states.numpy())
    assert np.abs(before.text_states.numpy() - after.text_states.numpy()).max() > 1e-3


def test_the_masked_region_head_predicts_class_and_feature_of_every_region():
    model = build(heads=("pooling", "masked_region"))
    states = model(**batch()).image_states.reshape([-1, 16])
    classes, features = model.region_predictions(states)
    assert (classes.shape, features.shape) == ([8, 5], [8, 6])
    assert build(heads=("masked_region",), image_predict_class=False).region_predictions(states)[0] is None


@pytest.mark.skipif(paddle.__version__.startswith("2."), reason="Paddle 2.6.2 cannot keep the random state of its recompute on CPU")
def test_recomputing_gives_the_same_gradients():
    inputs = batch()
    gradients = []
    for recompute in (False, True):
        model = build()
        model.train()
        model.set_recompute(recompute)
        model.pool_image(model(**inputs)).square().sum().backward()
        gradients.append({p.name: p.grad.numpy() for p in model.parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        np.testing.assert_allclose(value, gradients[1][name], atol=1e-6, err_msg=name)


def test_operations_are_counted_from_the_matrices_and_the_lengths():
    model = build(heads=())
    matrices = sum(p.size for p in model.encoder.parameters() if p.ndim == 2)
    positions = 4 + 3 + 5
    expected = 2 * (2 * matrices * positions + 2 * 4 * positions ** 2 * 16 + 2 * 4 * (6 + 5) * 16)  # 2 samples, 2 layers
    assert unimo_flops(model.config, 2, regions=4, objects=3, length=5) == expected
    assert unimo_flops(model.config, 2, regions=4, objects=3, length=5, first_only=True) < expected


@pytest.mark.parametrize("size, classification, retrieval, entailment", [
    ("base", 124_646_402, 126_816_001, 128_396_291), ("large", 355_360_770, 358_515_713, 360_620_035)])
def test_the_released_sizes_have_the_authors_numbers_of_parameters(size, classification, retrieval, entailment):
    config = UnimoConfig.from_json(CONFIGS / f"unimo_{size}.json")

    def count(make):
        counted = dataclasses.replace(config, num_hidden_layers=1)
        with paddle.utils.unique_name.guard():
            model = make(counted)
        layer = sum(p.size for p in model.parameters() if "encoder_layer_0_" in p.name)
        return sum(p.size for p in model.parameters()) + (config.num_hidden_layers - 1) * layer

    assert count(lambda c: UnimoClassifier(c, "text", 2)) == classification
    if size == "base":
        assert count(lambda c: UnimoModel(c, heads=("matching",))) == retrieval
        assert count(lambda c: UnimoClassifier(c, "pair", 3)) == entailment


def test_a_bundled_config_is_read_key_by_key_and_written_back(tmp_path):
    values = json.loads((CONFIGS / "unimo_large.json").read_text())
    config = UnimoConfig.from_json(CONFIGS / "unimo_large.json")
    assert {key: getattr(config, key) for key in values} == values
    config.to_json(tmp_path / "config.json")
    assert UnimoConfig.from_json(tmp_path / "config.json") == config


@pytest.mark.parametrize("values, message", [
    (dict(vocab_sise=3), "did you mean 'vocab_size'"), (dict(text_vocab_size=3), "unknown key 'text_vocab_size'"),
    (dict(hidden_size=30, num_attention_heads=4), "does not divide"), (dict(role_type_size=3), "give both"),
    (dict(vocab_size=0), "must be at least 1"), (dict(hidden_act="swish"), "not one of"), (dict(overlap_ratio=1.5), "must be in"),
    (dict(max_img_len="37"), "not of type int")])
def test_configs_that_cannot_work_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        UnimoConfig.from_dict(values)


@pytest.mark.parametrize("change, message", [
    (dict(image_location=None), "image_location and image_mask"), (dict(position_ids=None), "position_ids and text_mask"),
    (dict(object_ids=paddle.ones([2, 1], dtype="int64")), "object_positions and object_mask"),
    (dict(image_features=paddle.ones([2, 4, 7])), "7 wide, the model's image_embedding_size is 6"),
    (dict(role_ids=paddle.ones([2, 5], dtype="int64")), "role_type_size and turn_type_size"),
    (dict(image_features=None, input_ids=None), "give image_features")])
def test_incomplete_batches_are_refused_by_name(change, message):
    with pytest.raises(UserInputError, match=message):
        build()(**{**batch(), **change})


def test_parts_a_model_was_built_without_are_named():
    with pytest.raises(UserInputError, match="vision=False"):
        build(vision=False)(**batch())
    with pytest.raises(UserInputError, match="matching and masked_region need an image"):
        build(vision=False, heads=("matching",))
    with pytest.raises(UserInputError, match="unknown heads"):
        build(heads=("pooler",))
    with pytest.raises(UserInputError, match="not one of pair, text"):
        build(UnimoClassifier, ("image", 2))
