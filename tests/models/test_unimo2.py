"""Properties of the UNIMO-2 model: who sees whom, what a score may depend on, names, counts, gradients."""
import csv
from pathlib import Path

import numpy as np
import paddle
import pytest

from unimo2_paddle import Unimo2Config, Unimo2Model
from unimo2_paddle.errors import UserInputError
from unimo2_paddle.models.grounding import Grounding
from unimo2_paddle.models.heads import ClassificationHead
from unimo2_paddle.models.losses import contrastive_loss
from unimo2_paddle.models.vision import resize_position_embeddings

ROOT = Path(__file__).resolve().parents[2]
PAD = 1
VARIANTS = {
    "grounded": {}, "nearest": {"grounding_method": "normal"}, "baseline": {"model_type": "baseline"},
    "positions": {"with_grounding_pos": True},
    "projections": {"with_grounding_projection": True, "with_cmcl_projection": True},
    "shared": {"with_grounding_projection": True, "with_cmcl_projection": True, "cmcl_share_parameters": True},
}


def tiny_config(**overrides):
    values = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, text_num_hidden_layers=2, text_num_attention_heads=2,
        vit_num_hidden_layers=2, vit_num_attention_heads=2, text_vocab_size=60, text_max_position_embeddings=40,
        resolution=8, image_size=24, position_grid=3, num_codebook=30, topk_value=5, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, text_hidden_dropout_prob=0.0, text_attention_probs_dropout_prob=0.0)
    return Unimo2Config.from_dict({**values, **overrides})


def tiny_model(seed=1, heads=None, vision=True, **overrides):
    """A model with random weights so large that everything influences everything it is connected to."""
    with paddle.utils.unique_name.guard():
        model = Unimo2Model(tiny_config(**overrides), vision=vision, heads=heads)
    rng = np.random.default_rng(seed)
    for parameter in sorted(model.parameters(), key=lambda p: p.name):
        if parameter.name == "topk_temperature":
            parameter.set_value(np.array([1.5], "float32"))
        elif parameter.name != "cmcl_temperature":
            mean = 1.0 if parameter.name.endswith("_scale") else 0.0
            parameter.set_value(rng.normal(mean, 0.3, parameter.shape).astype("float32"))
    model.eval()
    return model


def pictures(count, seed=1, size=24):
    return np.random.default_rng(seed).uniform(-1, 1, (count, size, size, 3)).astype("float32")


def texts(lengths, length=None, seed=2, padding=PAD):
    """Random captions of given lengths, padded to ``length``: ids, positions, mask."""
    rng = np.random.default_rng(seed)
    length = length or max(lengths)
    ids, positions = np.full((len(lengths), length), padding), np.full((len(lengths), length), 1)
    mask = np.zeros((len(lengths), length), "float32")
    for row, count in enumerate(lengths):
        ids[row, :count], positions[row, :count], mask[row, :count] = rng.integers(5, 60, count), np.arange(2, 2 + count), 1
    return ids, positions, mask


def tensors(*arrays):
    return [paddle.to_tensor(array) for array in arrays]


def forward(model, image=None, text=None, layout="pair", **extra):
    arguments = {} if image is None else {"image": paddle.to_tensor(image)}
    if text is not None:
        arguments.update(zip(("input_ids", "position_ids", "text_mask"), tensors(*text)))
    with paddle.no_grad():
        return model(layout=layout, **arguments, **extra)


def difference(a, b):
    return float((a - b).abs().max())


def seq2seq_mask(lengths, sources, length):
    """``[B, L, L]``: everybody sees the source tokens; target tokens see earlier target tokens and themselves."""
    mask = np.zeros((len(lengths), length, length), "float32")
    for row, (count, source) in enumerate(zip(lengths, sources)):
        mask[row, :count, :source] = 1
        mask[row, source:count, source:count] = np.tril(np.ones((count - source, count - source)))
    return mask


@pytest.mark.parametrize("variant", VARIANTS)
def test_pair_score_does_not_depend_on_batch_padding_or_neighbours(variant):
    model, lengths = tiny_model(**VARIANTS[variant]), [4, 9, 6]
    image, text = pictures(3), texts([4, 9, 6])
    together = model.retrieval_score(forward(model, image, text))
    assert float(together.std()) > 1e-3
    for row, count in enumerate(lengths):
        alone = [array[row: row + 1, :count] for array in text]
        out = forward(model, image[row: row + 1], alone)
        assert difference(model.retrieval_score(out), together[row: row + 1]) < 1e-5
    other_padding = texts(lengths, 14, padding=33)
    assert difference(model.retrieval_score(forward(model, image, other_padding)), together) < 1e-5


def test_dictionary_loss_is_the_mean_of_the_samples_own_losses():
    for variant in ("grounded", "nearest"):
        model, text = tiny_model(**VARIANTS[variant]), texts([4, 9])
        together = float(forward(model, pictures(2), text).grounding_loss)
        alone = [float(forward(model, pictures(2)[i: i + 1], [a[i: i + 1, :n] for a in text]).grounding_loss) for i, n in ((0, 4), (1, 9))]
        assert together == pytest.approx(np.mean(alone), rel=1e-5)


def test_counting_padding_as_the_authors_do_makes_a_score_depend_on_its_batch():
    model = tiny_model(grounding_counts_padding=True)
    short, padded = texts([4]), texts([4], 30)
    assert difference(model.retrieval_score(forward(model, pictures(1), short)),
                      model.retrieval_score(forward(model, pictures(1), padded))) > 1e-4


def test_single_modality_features_do_not_depend_on_batch_padding():
    model = tiny_model()
    text = texts([4, 9])
    together = model.pool_text(forward(model, text=text))
    alone = model.pool_text(forward(model, text=[array[:1, :4] for array in text]))
    assert difference(together[:1], alone) < 1e-5
    images = pictures(3)
    assert difference(model.pool_image(forward(model, images))[2:], model.pool_image(forward(model, images[2:]))) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_of_every_layout(variant):
    model, (b, p, length, h) = tiny_model(**VARIANTS[variant]), (2, 9, 7, 16)
    image, text = pictures(b), texts([5, 7])
    causal = [*text[:2], seq2seq_mask([5, 7], [2, 3], length)]

    def codes(patches, tokens):
        return {"baseline": None, "nearest": patches + tokens}.get(variant, 5)

    for out, count in ((forward(model, image), codes(p, 0)), (forward(model, text=text), codes(0, length - 1)),
                       (forward(model, image, text), codes(p, length - 1)), (forward(model, image, causal, "caption"), codes(p, 0))):
        with_image, with_text = out.image_states is not None, out.text_states is not None
        for part, present, rows in ((out.image_states, with_image, 1 + p), (out.fused_image, with_image, 1 + p),
                                    (out.text_states, with_text, length), (out.fused_text, with_text, length),
                                    (out.grounded_tokens, count, count), (out.fused_grounded, count, count)):
            assert part is None if not present else part.shape == [b, rows, h]
        assert out.grounded_ids is None if not count else out.grounded_ids.shape == [b, count]
        assert out.grounding_loss is None if not count else out.grounding_loss.shape == []
        assert with_image or with_text
    pair = forward(model, image, text)
    assert model.pool_text(pair).shape == model.pool_image(pair).shape == [b, h]
    assert model.matching_logits(pair).shape == [b, 2]
    assert model.retrieval_score(pair).shape == model.contrastive_score(pair).shape == [b]
    assert model.mlm_logits(pair.fused_text[:, 0]).shape == [b, 60]


def pair_with_fixed_tokens(model, image, text):
    """Fuse image and text with given grounded tokens, so that the choice of tokens carries nothing from side to side."""
    tokens = paddle.to_tensor(np.random.default_rng(9).normal(size=(2, 5, 16)).astype("float32"))
    fixed = Grounding(tokens, paddle.zeros([2, 5], dtype="int64"), paddle.ones([2, 5]))
    with paddle.no_grad():
        ids, positions, mask = tensors(*text)
        return model.fuse(model.encode_image(paddle.to_tensor(image)), model.encode_text(ids, positions, mask), mask, grounding=fixed)


def test_in_a_pair_image_and_text_meet_only_through_grounded_tokens():
    model = tiny_model(num_hidden_layers=1)
    base = pair_with_fixed_tokens(model, pictures(2), texts([5, 7]))
    other_text = pair_with_fixed_tokens(model, pictures(2), texts([5, 7], seed=8))
    other_image = pair_with_fixed_tokens(model, pictures(2, seed=8), texts([5, 7]))
    assert difference(base.fused_image, other_text.fused_image) == 0
    assert difference(base.fused_text[1], other_image.fused_text[1]) == 0
    assert difference(base.fused_text[0, :5], other_image.fused_text[0, :5]) == 0  # a padded row sees everything, but nobody sees it
    assert difference(base.fused_grounded, other_text.fused_grounded) > 1e-2
    assert difference(base.fused_grounded, other_image.fused_grounded) > 1e-2
    deep = tiny_model(num_hidden_layers=2)
    assert difference(pair_with_fixed_tokens(deep, pictures(2), texts([5, 7])).fused_image,
                      pair_with_fixed_tokens(deep, pictures(2), texts([5, 7], seed=8)).fused_image) > 1e-3


def test_the_text_takes_part_in_choosing_the_grounded_tokens_of_a_pair():
    model = tiny_model()
    base, other = forward(model, pictures(2), texts([5, 7])), forward(model, pictures(2), texts([5, 7], seed=8))
    assert base.grounded_ids.tolist() != other.grounded_ids.tolist()


def test_in_the_baseline_image_and_text_see_each_other():
    model = tiny_model(model_type="baseline", num_hidden_layers=1)
    base, other = forward(model, pictures(2), texts([5, 7])), forward(model, pictures(2), texts([5, 7], seed=8))
    assert difference(base.fused_image, other.fused_image) > 1e-3


@pytest.mark.parametrize("variant", ["grounded", "baseline", "nearest"])
def test_in_captioning_image_and_grounded_rows_do_not_depend_on_the_text(variant):
    model = tiny_model(**VARIANTS[variant])
    mask = seq2seq_mask([5, 7], [1, 3], 7)
    base = forward(model, pictures(2), [*texts([5, 7])[:2], mask], "caption")
    other = forward(model, pictures(2), [*texts([5, 7], seed=8)[:2], mask], "caption")
    assert difference(base.fused_image, other.fused_image) == 0
    if variant != "baseline":
        assert difference(base.fused_grounded, other.fused_grounded) == 0
        assert base.grounded_ids.tolist() == other.grounded_ids.tolist()
    third = forward(model, pictures(2, seed=8), [*texts([5, 7])[:2], mask], "caption")
    assert difference(base.fused_text, third.fused_text) > 1e-2


@pytest.mark.parametrize("variant", ["grounded", "baseline", "nearest"])
@pytest.mark.parametrize("layout", ["caption", "text only"])
def test_a_later_token_never_changes_earlier_states_under_a_seq2seq_mask(variant, layout):
    model = tiny_model(**VARIANTS[variant])
    ids, positions, _ = texts([8, 8])
    mask = seq2seq_mask([8, 8], [3, 2], 8)
    image = pictures(2) if layout == "caption" else None
    base = forward(model, image, (ids, positions, mask), "caption" if image is not None else "pair")
    for place in range(3, 8):
        changed = ids.copy()
        changed[:, place] = (changed[:, place] + 7) % 60
        out = forward(model, image, (changed, positions, mask), "caption" if image is not None else "pair")
        assert difference(base.fused_text[:, :place], out.fused_text[:, :place]) == 0
        assert difference(base.fused_text[:, place:], out.fused_text[:, place:]) > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_first_only_equals_the_full_forward(variant):
    model = tiny_model(**VARIANTS[variant])
    image, (ids, positions, mask) = paddle.to_tensor(pictures(2)), tensors(*texts([5, 7]))
    with paddle.no_grad():
        image_states, text_states = model.encode_image(image), model.encode_text(ids, positions, mask)
        for arguments in ((image_states, text_states, mask), (image_states,), (None, text_states, mask)):
            full, first = model.fuse(*arguments), model.fuse(*arguments, first_only=True, with_grounding_loss=False)
            if arguments[0] is not None:
                assert first.fused_image.shape == [2, 1, 16]
                assert difference(full.fused_image[:, :1], first.fused_image) < 1e-5
            if len(arguments) > 1:
                assert first.fused_text.shape == [2, 1, 16]
                assert difference(full.fused_text[:, :1], first.fused_text) < 1e-5
            assert first.fused_grounded is None and first.grounding_loss is None


def test_hidden_grounded_tokens_have_no_influence_left():
    model = tiny_model()
    mask = paddle.to_tensor([[0.0, 1, 0, 0, 1]])
    states = paddle.to_tensor(np.random.default_rng(4).normal(size=(1, 10, 16)).astype("float32"))

    def fused(codes):
        grounding = Grounding(paddle.to_tensor(codes), paddle.zeros([1, 5], dtype="int64"), paddle.ones([1, 5]))
        with paddle.no_grad():
            return model.fuse(states, grounding=grounding, token_mask=mask).fused_image

    codes = np.random.default_rng(5).normal(size=(1, 5, 16)).astype("float32")
    hidden, shown = codes.copy(), codes.copy()
    hidden[0, [1, 4]] *= -1.0
    shown[0, 2] *= -1.0
    assert difference(fused(codes), fused(hidden)) == 0
    assert difference(fused(codes), fused(shown)) > 1e-3


def test_code_scores_add_up_over_both_sides_and_the_best_codes_come_first():
    model = tiny_model()
    ids, positions, mask = tensors(*texts([5, 7]))
    with paddle.no_grad():
        image, text, dictionary = model.encode_image(paddle.to_tensor(pictures(2))), model.encode_text(ids, positions, mask), model.dictionary
        both = dictionary.code_scores(*dictionary.inputs(image, text, mask))
        apart = dictionary.code_scores(*dictionary.inputs(image)) + dictionary.code_scores(*dictionary.inputs(None, text, mask))
        chosen = model.ground(image, text, mask)
    assert difference(both, apart) < 1e-5
    assert chosen.ids.tolist() == np.argsort(-both.numpy(), axis=1, kind="stable")[:, :5].tolist()
    np.testing.assert_array_equal(chosen.tokens.numpy(), dictionary.codebook.numpy()[chosen.ids.numpy()])


def test_nearest_codes_are_the_nearest():
    model = tiny_model(grounding_method="normal")
    out = forward(model, pictures(2))
    states, codes = out.image_states.numpy()[:, 1:], model.dictionary.codebook.numpy()
    distances = ((states[:, :, None] - codes) ** 2).sum(axis=-1)
    assert out.grounded_ids.tolist() == distances.argmin(axis=-1).tolist()


def everything(model):
    """Sum of all heads and losses on one pair batch; a parameter without a gradient here is used by nothing."""
    image, (ids, positions, mask) = paddle.to_tensor(pictures(3)), tensors(*texts([5, 9, 7]))
    out = model(image, ids, positions, mask)
    features = model.contrastive_features(out.image_states, out.text_states)
    total = model.matching_logits(out)[:, 1].sum() + contrastive_loss(*features, model.temperature())[0]
    total += model.mlm_logits(out.fused_text[:, 1]).square().mean()
    if out.grounding_loss is not None:
        total += out.grounding_loss
    if "masked_grounding" in model.heads:
        total += model.masked_grounding_logits(out.fused_grounded[:, 0]).square().mean()
    return total


WITHOUT_GRADIENT = {"nearest": {"topk_temperature"}}  # nearest codes are chosen without relevance


@pytest.mark.parametrize("variant", [*VARIANTS, "untied"])
def test_every_parameter_receives_a_gradient_from_the_sum_of_all_heads(variant):
    overrides = {"weight_sharing": False} if variant == "untied" else VARIANTS[variant]
    model = tiny_model(**overrides, with_grounding_mask=variant != "baseline")
    everything(model).backward()
    # the softmax does not see a key bias: its gradient is zero but for rounding
    dead = {p.name for p in model.parameters()
            if p.grad is None or (float(p.grad.abs().max()) < 1e-9 and not p.name.endswith("key_fc.b_0"))}
    assert dead == WITHOUT_GRADIENT.get(variant, set())


@pytest.mark.skipif(paddle.__version__.startswith("2."), reason="Paddle 2.6.2 cannot keep the random state of its recompute on CPU")
def test_recompute_gives_equal_gradients_with_dropout():
    gradients = []
    for enabled in (False, True):
        model = tiny_model(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2, text_hidden_dropout_prob=0.2)
        model.set_recompute(enabled)
        model.train()
        paddle.seed(5)
        everything(model).backward()
        gradients.append({p.name: p.grad.numpy() for p in model.parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(gradients[1][name], gradient, atol=1e-6, err_msg=name)


def slow_bicubic(table, grid):
    """Bicubic resizing of ``[G, G, H]``: A = -0.75, half-pixel centres, borders repeated, no antialiasing."""
    side = table.shape[0]

    def kernel(t):
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t ** 3 - (a + 3) * t ** 2 + 1
        return a * t ** 3 - 5 * a * t ** 2 + 8 * a * t - 4 * a if t < 2 else 0.0

    weights = np.zeros((grid, side))
    for target in range(grid):
        source = (target + 0.5) * side / grid - 0.5
        for tap in range(int(np.floor(source)) - 1, int(np.floor(source)) + 3):
            weights[target, min(max(tap, 0), side - 1)] += kernel(source - tap)
    return np.einsum("ui,vj,ijh->uvh", weights, weights, table)


@pytest.mark.parametrize("grid", [2, 3, 4, 7])
def test_position_table_is_resized_up_and_down(grid):
    table = np.random.default_rng(3).normal(size=(1, 10, 4)).astype("float32")
    resized = resize_position_embeddings(paddle.to_tensor(table), grid).numpy()
    np.testing.assert_allclose(resized[:, :1], table[:, :1])
    expected = slow_bicubic(table[0, 1:].reshape(3, 3, 4).astype(float), grid)
    np.testing.assert_allclose(resized[0, 1:], expected.reshape(-1, 4), atol=1e-5)


@pytest.mark.parametrize("size", [16, 40])
def test_pictures_of_another_size_work_and_train_the_stored_table(size):
    model = tiny_model(image_size=size)
    out = model(paddle.to_tensor(pictures(1, size=size)))
    assert out.image_states.shape == [1, 1 + (size // 8) ** 2, 16]
    out.fused_image.square().mean().backward()
    assert model.vision.positions.shape == [1, 10, 16]
    assert (model.vision.positions.grad.abs().sum(axis=-1) > 0).all()


def test_the_far_border_of_a_picture_is_never_read():
    model, image = tiny_model(), pictures(1)
    changed = image.copy()
    changed[:, 21:], changed[:, :, 21:] = 9.0, 9.0  # patches of 8 start 3 pixels before the picture, so they end at pixel 20
    assert difference(forward(model, image).image_states, forward(model, changed).image_states) == 0
    changed[:, 20, 20] += 1.0
    assert difference(forward(model, image).image_states, forward(model, changed).image_states) > 0


def test_layer_subsets_keep_their_indices_and_load_the_right_weights():
    full = tiny_model(text_num_hidden_layers=3, num_hidden_layers=3)
    part = tiny_model(seed=2, text_num_hidden_layers=3, num_hidden_layers=3, text_enc_layers="0,2", grounding_enc_layers=[1])
    names = {p.name for p in part.parameters()}
    assert {n.split("_")[2].split(".")[0] for n in names if n.startswith("text.encoder_layer")} == {"0", "2"}
    assert {n.split("_")[2].split(".")[0] for n in names if n.startswith("grounded.encoder_layer")} == {"1"}
    stored = {p.name: p for p in full.parameters()}
    assert names < set(stored)
    for parameter in part.parameters():
        parameter.set_value(stored[parameter.name])
    del full.text.encoder.layers[1]
    del full.grounded_encoder.layers[2], full.grounded_encoder.layers[0]
    image, text = pictures(2), texts([5, 7])
    assert difference(full.retrieval_score(forward(full, image, text)), part.retrieval_score(forward(part, image, text))) == 0


def test_several_models_live_in_one_process_under_the_guard():
    first, second = tiny_model(seed=1), tiny_model(seed=2)
    assert [p.name for p in first.parameters()] == [p.name for p in second.parameters()]
    before = {p.name: p.numpy().copy() for p in second.parameters()}
    optimizer = paddle.optimizer.SGD(0.1, parameters=first.parameters())
    everything(first).backward()
    optimizer.step()
    assert any(difference(p, q) > 0 for p, q in zip(first.parameters(), tiny_model(seed=1).parameters()))
    assert all((p.numpy() == before[p.name]).all() for p in second.parameters())


def test_fusion_by_product_and_by_sum_and_the_clipped_temperature():
    model = tiny_model()
    out = forward(model, pictures(2), texts([5, 7]))
    text, image = model.pool_text(out).numpy(), model.pool_image(out).numpy()
    np.testing.assert_allclose(model.fused_features(out).numpy(), text * image, rtol=1e-6)
    np.testing.assert_allclose(model.fused_features(out, "sum").numpy(), text + image, rtol=1e-6)
    for value, expected in ((3.0, 0.5), (-1.0, 0.001), (0.07, 0.07)):
        model.contrastive_temperature.set_value(np.array([value], "float32"))
        assert float(model.temperature()) == pytest.approx(expected)


def test_contrastive_features_are_normalised_as_the_released_weights_want():
    def norms(model, **arguments):
        out = forward(model, pictures(2), texts([5, 7]))
        return [float(feature.norm(axis=-1).mean()) for feature in model.contrastive_features(out.image_states, out.text_states, **arguments)]

    plain, projected = tiny_model(), tiny_model(with_cmcl_projection=True)
    assert norms(plain)[0] == pytest.approx(1, abs=1e-5) and norms(plain)[1] > 1.5
    assert min(norms(plain, normalise="none")) > 1.5
    assert norms(projected) == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize("arguments, message", [
    ({}, "give an image, input_ids, or both"),
    ({"image": 1, "layout": "both"}, "layout 'both' is not one of pair, caption"),
    ({"input_ids": 1}, "input_ids need position_ids and text_mask"),
    ({"input_ids": 1, "position_ids": 1}, "input_ids need"),
])
def test_incomplete_inputs_are_refused(arguments, message):
    with pytest.raises(UserInputError, match=message):
        tiny_model()(**arguments)


def test_unknown_heads_and_pictures_for_a_text_model_are_refused():
    with pytest.raises(UserInputError, match=r"unknown heads \['poling'\]; known: pooling"):
        tiny_model(heads=["poling"])
    with pytest.raises(UserInputError, match="without its visual Transformer"):
        forward(tiny_model(vision=False), pictures(1))


BASE_PROGRAMS = {  # column of the authors' table -> what builds the same parameters; a 3-way classification head comes apart
    "retrieval": (297_664_516, {}, {"heads": ("pooling", "matching")}),
    "retrieval_proj": (300_026_884, {"with_grounding_projection": True, "with_cmcl_projection": True}, {"heads": ("pooling", "matching")}),
    "retrieval_proj_shared": (298_845_700, {"with_grounding_projection": True, "with_cmcl_projection": True,
                                            "cmcl_share_parameters": True}, {"heads": ("pooling", "matching")}),
    "retrieval_baseline": (296_090_115, {"model_type": "baseline"}, {"heads": ("pooling", "matching")}),
    "classification": (211_276_037, {}, {"heads": ("pooling",), "vision": False, "prefix": "cls_out"}),
    "classification_base_mnli": (211_276_037, {}, {"heads": ("pooling",), "vision": False, "prefix": "cls_out_new"}),
    "caption_train": (297_124_186, {}, {"heads": ("masked_lm",)}),
    "pretrain_heads": (298_901_085, {"with_grounding_mask": True}, {}),
    "pretrain_heads_nosharing": (339_077_469, {"with_grounding_mask": True, "weight_sharing": False}, {}),
    "pretrain_heads_baseline": (297_913_692, {"model_type": "baseline", "with_cmcl_projection": True}, {}),
}


@pytest.mark.parametrize("program", BASE_PROGRAMS)
def test_names_shapes_and_counts_of_the_base_model_are_the_authors(program):
    total, overrides, parts = BASE_PROGRAMS[program]
    prefix = parts.get("prefix")
    with paddle.LazyGuard(), paddle.utils.unique_name.guard():  # allocates nothing
        model = Unimo2Model(Unimo2Config(**overrides), vision=parts.get("vision", True), heads=parts.get("heads"))
        layers = [model] + ([ClassificationHead(768, 3, prefix=prefix)] if prefix else [])
    ours = {p.name: tuple(p.shape) for layer in layers for p in layer.parameters()}
    with open(ROOT / "tests/data/unimo2_params_base.tsv", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row[program] == "1"]
    authors = {row["name"]: tuple(int(n) for n in row["shape"].split("x")) for row in rows}
    if program == "caption_train":
        ours.pop("cmcl_temperature")  # their captioning program has none
    assert ours == authors
    assert sum(int(np.prod(shape)) for shape in ours.values()) == total
