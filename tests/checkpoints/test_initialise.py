"""Weights of PaddleNLP's RoBERTa and PaddleClas' ViT compute in our encoders what they compute in their own."""
import json
import os

import numpy as np
import paddle
import pytest

from unimo2_paddle.checkpoints.initialise import initialise
from unimo2_paddle.checkpoints.pretrained import from_pretrained
from unimo2_paddle.checkpoints.released import parameter_arrays
from unimo2_paddle.errors import CheckpointError
from unimo2_paddle.models.configuration import Unimo2Config, UnimoConfig

LAYERS, HIDDEN, HEADS, VOCABULARY, PIXELS = 2, 24, 4, 50, 48


def small_config(**changes):
    values = dict(hidden_size=HIDDEN, num_hidden_layers=LAYERS, text_num_hidden_layers=LAYERS, vit_num_hidden_layers=LAYERS,
                  num_attention_heads=HEADS, text_num_attention_heads=HEADS, vit_num_attention_heads=HEADS,
                  text_vocab_size=VOCABULARY, text_max_position_embeddings=20, num_codebook=16, topk_value=4, image_size=PIXELS,
                  position_grid=PIXELS // 16)
    return Unimo2Config(**{**values, **changes})


def shake(model, seed):
    """Give every parameter (biases and norms too) a value of its own, so that a forgotten one shows."""
    generator = np.random.RandomState(seed)
    for parameter in model.parameters():
        parameter.set_value((parameter.numpy() * 0 + generator.randn(*parameter.shape) * 0.2
                             + ("norm" in parameter.name)).astype("float32"))
    model.eval()
    return model


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A small random PaddleNLP RobertaForMaskedLM and the directory it was saved to, the way users get it."""
    from paddlenlp.transformers import RobertaConfig, RobertaForMaskedLM

    model = shake(RobertaForMaskedLM(RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN, max_position_embeddings=20, type_vocab_size=2, pad_token_id=1, cls_token_id=0,
        layer_norm_eps=1e-5)), 1)
    directory = str(tmp_path_factory.mktemp("roberta"))
    model.save_pretrained(directory)
    return model, directory


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A small random PaddleClas VisionTransformer and its .pdparams file."""
    model, file = _vit(PIXELS, epsilon=1e-12), str(tmp_path_factory.mktemp("vit") / "vit.pdparams")
    paddle.save(model.state_dict(), file)
    return model, file


def _vit(pixels, **options):
    from paddleclas.ppcls.arch.backbone.model_zoo.vision_transformer import VisionTransformer

    return shake(VisionTransformer(img_size=pixels, embed_dim=HIDDEN, depth=LAYERS, num_heads=HEADS, qkv_bias=True, class_num=0,
                                   **options), 2)


def states_of(vit_model, pixels_first):
    """All states after the final norm; PaddleClas itself returns the first alone."""
    seen = []
    handle = vit_model.norm.register_forward_post_hook(lambda layer, inputs, output: seen.append(output))
    vit_model.forward_features(paddle.to_tensor(pixels_first))
    handle.remove()
    return seen[0].numpy()


def shifted(images):
    """Pictures [B, S, S, 3] as an unpadded ViT needs them to cut our patches: 7 pixels down and right, channels first."""
    canvas = np.zeros_like(images)
    canvas[:, 7:, 7:] = images[:, :-7, :-7]
    return canvas.transpose(0, 3, 1, 2)


def text_batch():
    ids = np.array([[0, 5, 9, 33, 49, 2], [0, 7, 8, 2, 1, 1]], "int64")
    mask = (ids != 1).astype("float32")
    positions = np.where(ids != 1, np.arange(2, 8), 1).astype("int64")
    return paddle.to_tensor(ids), paddle.to_tensor(positions), paddle.to_tensor(mask)


def test_roberta_states_equal_ours_in_text_and_grounded_encoder(roberta, tmp_path):
    theirs, directory = roberta
    summary = initialise(str(tmp_path / "new"), small_config(), roberta=directory)
    model = from_pretrained(str(tmp_path / "new"))
    ids, positions, mask = text_batch()
    bias = (mask - 1.0).unsqueeze([1, 2]) * 1e4
    expected = theirs.roberta(ids, attention_mask=bias)[0].numpy()
    real = mask.numpy() > 0
    found = model.encode_text(ids, positions, mask).numpy()
    assert np.abs(found - expected)[real].max() < 1e-5
    embedded = model.text.norm(model.text.words(ids) + model.text.positions(positions))
    visible = paddle.matmul(mask.unsqueeze(2), mask.unsqueeze(1))
    assert np.abs(model.grounded_encoder(embedded, visible).numpy() - expected)[real].max() < 1e-5
    assert "text encoder (2 of 2 layers)" in summary and "grounded.pooled_fc_text.w_0" in summary


def unimo_config(**changes):
    return UnimoConfig(**{**dict(hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, vocab_size=VOCABULARY,
                                 max_position_embeddings=20, image_embedding_size=6), **changes})


def test_roberta_states_and_words_equal_unimo_s(roberta, tmp_path):
    theirs, directory = roberta
    summary = initialise(str(tmp_path / "new"), unimo_config(), roberta=directory)
    model = from_pretrained(str(tmp_path / "new"))
    ids, positions, mask = text_batch()
    expected = theirs.roberta(ids, attention_mask=(mask - 1.0).unsqueeze([1, 2]) * 1e4)[0]
    found = model(input_ids=ids, position_ids=positions, text_mask=mask).text_states
    assert np.abs((found - expected).numpy())[mask.numpy() > 0].max() < 1e-5
    assert np.abs(model.mlm_logits(expected[0]).numpy() - theirs.lm_head(expected[0]).numpy()).max() < 1e-5
    assert "encoder (2 of 2 layers)" in summary and "image_emb.w_0" in summary


def test_unimo_takes_no_vit_and_checks_roberta_s_heads(roberta, vit, tmp_path):
    with pytest.raises(CheckpointError, match="UNIMO has no visual Transformer"):
        initialise(str(tmp_path / "new"), unimo_config(), vit=vit[1])
    with pytest.raises(CheckpointError, match="num_attention_heads is 4, needed is 2"):
        initialise(str(tmp_path / "new"), unimo_config(num_attention_heads=2), roberta=roberta[1])
    assert not (tmp_path / "new").exists()


def test_masked_word_head_equals_roberta_s(roberta, tmp_path):
    theirs, directory = roberta
    initialise(str(tmp_path / "new"), small_config(), roberta=directory)
    model = from_pretrained(str(tmp_path / "new"))
    states = paddle.to_tensor(np.random.RandomState(3).randn(4, HIDDEN).astype("float32"))
    assert np.abs(model.mlm_logits(states).numpy() - theirs.lm_head(states).numpy()).max() < 1e-5


def test_split_config_takes_lower_and_upper_layers(roberta, tmp_path):
    theirs, directory = roberta
    initialise(str(tmp_path / "new"), small_config(text_enc_layers="0", grounding_enc_layers="1"), roberta=directory)
    arrays = parameter_arrays(from_pretrained(str(tmp_path / "new")))
    layers = theirs.roberta.encoder.layers
    assert np.array_equal(arrays["text.encoder_layer_0_ffn_fc_0.w_0"], layers[0].linear1.weight.numpy())
    assert np.array_equal(arrays["grounded.encoder_layer_1_ffn_fc_0.w_0"], layers[1].linear1.weight.numpy())
    assert "text.encoder_layer_1_ffn_fc_0.w_0" not in arrays


def test_vit_states_equal_ours_on_the_shifted_picture(vit, tmp_path):
    theirs, file = vit
    initialise(str(tmp_path / "new"), small_config(), vit=file)
    model = from_pretrained(str(tmp_path / "new"))
    images = np.random.RandomState(4).uniform(-1, 1, (2, PIXELS, PIXELS, 3)).astype("float32")
    found = model.encode_image(paddle.to_tensor(images)).numpy()
    assert np.abs(found - states_of(theirs, shifted(images))).max() < 1e-5


def test_position_table_of_another_grid_is_resized_bicubically(tmp_path):
    theirs, file = _vit(80, epsilon=1e-12), str(tmp_path / "vit.pdparams")
    paddle.save(theirs.state_dict(), file)
    initialise(str(tmp_path / "new"), small_config(), vit=file)
    table = parameter_arrays(from_pretrained(str(tmp_path / "new")))["vit.position_embeddings"]
    stored = theirs.pos_embed.numpy()
    assert table.shape == (1, 10, HIDDEN) and np.array_equal(table[:, 0], stored[:, 0])
    middle = stored[0, 1:].reshape(5, 5, HIDDEN)[2, 2]
    assert np.allclose(table[0, 5], middle, atol=1e-6)  # the centres of both grids coincide


def test_both_sources_in_one_model_and_same_seed_same_rest(roberta, vit, tmp_path):
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    small_config().to_json(str(tmp_path / "config.json"))
    for target in (one, two):
        initialise(target, str(tmp_path / "config.json"), roberta=roberta[1], vit=vit[1], seed=5)
    a, b = parameter_arrays(from_pretrained(one)), parameter_arrays(from_pretrained(two))
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert np.array_equal(a["text.word_embedding"], roberta[0].roberta.embeddings.word_embeddings.weight.numpy())
    assert np.array_equal(a["vit.cls_token_embeddings"], vit[0].cls_token.numpy())


def test_word_rows_follow_the_pieces_when_both_vocabularies_are_given(roberta, tmp_path):
    theirs, directory = roberta
    pieces = {chr(200 + i): i for i in range(VOCABULARY - 5)}
    lines = ["[CLS]", "[PAD]", "[SEP]", "[UNK]"] + [str(i) for i in range(VOCABULARY - 5)] + ["[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "encoder.json").write_text(json.dumps(pieces), encoding="utf-8")
    rows = {"<s>": 4, "<pad>": 3, "</s>": 2, "<unk>": 1, "<mask>": 0}
    rows.update({piece: VOCABULARY - 1 - i for piece, i in pieces.items() if i != 7})
    (tmp_path / "vocab.json").write_text(json.dumps(rows), encoding="utf-8")
    target = str(tmp_path / "new")
    summary = initialise(target, small_config(), roberta=directory, roberta_vocab=str(tmp_path / "vocab.json"),
                         vocab_file=str(tmp_path / "vocab.txt"), encoder_json=str(tmp_path / "encoder.json"))
    table = parameter_arrays(from_pretrained(target))["text.word_embedding"]
    source = theirs.roberta.embeddings.word_embeddings.weight.numpy()
    assert np.array_equal(table[0], source[4]) and np.array_equal(table[49], source[0])
    assert np.array_equal(table[4], source[49]) and np.array_equal(table[30], source[49 - 26])
    assert not (table[11] == source).all(axis=1).any()
    assert "another order; 1 of 50" in summary


def test_every_mismatch_is_listed_and_nothing_is_written(roberta, vit, tmp_path):
    target = tmp_path / "new"
    with pytest.raises(CheckpointError) as caught:
        initialise(str(target), small_config(text_vocab_size=60, text_num_attention_heads=2, vit_num_hidden_layers=3),
                   roberta=roberta[1], vit=vit[1])
    text = str(caught.value)
    assert "text.word_embedding: the config needs [60, 24], the weights give [50, 24]" in text
    assert "num_attention_heads is 4, needed is 2" in text and "blocks.2.mlp.fc1.weight is missing" in text
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments, message", [
    ({}, "nothing to start from"),
    ({"vit": "no/such/file.pdparams"}, "does not exist"),
])
def test_missing_sources_are_named(arguments, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        initialise(str(tmp_path / "new"), small_config(), **arguments)


def test_existing_target_is_refused(vit, tmp_path):
    with pytest.raises(CheckpointError, match="exists already"):
        initialise(str(tmp_path), small_config(), vit=vit[1])
