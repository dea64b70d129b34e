"""What unimo2 explain tells is what the model computes."""
import json

import numpy as np
import paddle
import pytest

from unimo2_paddle import Predictor, explain, load_image
from unimo2_paddle.errors import UserInputError
from unimo2_paddle.serving.codes import text_batch, word_spans
from unimo2_paddle.serving.explain_report import render_explanation, scaled, summary
from unimo2_paddle.serving.indexing import IndexOptions, update_index

CAPTION = "A small red ring is left of a <b>blue</b> box."


@pytest.fixture(scope="module")
def picture(demo_data):
    return sorted((demo_data / "retrieval" / "images").glob("*.jpg"))[0]


@pytest.fixture(scope="module")
def predictor(grounded):
    return Predictor(grounded.directory)


def outputs(made, predictor, picture, caption):
    batch = text_batch(predictor, [caption])
    image = paddle.to_tensor(load_image(picture, made.model.config.image_size)[None])
    return made.model(image=image, **batch), batch


def test_the_tokens_are_those_of_a_forward_pass_with_their_sums(grounded, predictor, picture):
    out, batch = outputs(grounded, predictor, picture, CAPTION)
    found = explain(predictor, picture, CAPTION, tokens=4)
    assert found.chosen == out.grounded_ids.numpy()[0].tolist()
    model = grounded.model
    scores = model.dictionary.code_scores(*model.dictionary.inputs(out.image_states, out.text_states, batch["text_mask"])).numpy()[0]
    for token in found.tokens:
        assert token.score == pytest.approx(scores[token.id], rel=1e-4) and found.chosen[token.rank - 1] == token.id
        assert token.image_share == pytest.approx(np.mean(token.patch_relevance), abs=1e-5)
        assert token.score == pytest.approx(token.image_share * 4 + token.text_share * (batch["input_ids"].shape[1] - 1), rel=1e-4)
    assert found.match == pytest.approx(predictor(image=picture, text=CAPTION).score)


def test_heat_maps_are_the_products_of_states_and_codes(grounded, predictor, picture):
    out, _ = outputs(grounded, predictor, picture, CAPTION)
    token = explain(predictor, picture, CAPTION, tokens=1).tokens[0]
    code = grounded.model.dictionary.codebook.numpy()[token.id]
    np.testing.assert_allclose(np.array(token.patches).ravel(), out.image_states.numpy()[0, 1:] @ code, rtol=1e-3, atol=1e-4)
    pieces = out.text_states.numpy()[0, 1:] @ code
    spans = word_spans(predictor, CAPTION)
    assert [word for word, _, _ in spans][:5] == ["A", "small", "red", "ring", "is"] and spans[-1][0] == "(end)" and spans[-1][2] == len(pieces)
    np.testing.assert_allclose(token.words, [pieces[first:last].max() for _, first, last in spans], rtol=1e-3, atol=1e-4)


def test_one_side_alone_is_explained_too(grounded, predictor, picture):
    image, text = explain(predictor, picture), explain(predictor, text=CAPTION)
    out = grounded.model(image=paddle.to_tensor(load_image(picture, grounded.model.config.image_size)[None]))
    assert image.chosen == out.grounded_ids.numpy()[0].tolist() and image.tokens[0].words == [] and image.shared == []
    assert text.picture is None and text.tokens[0].patches == [] and text.tokens[0].words
    for found in (image, text):
        assert "grounded tokens of 32 codes" in summary(found)[0]
        assert render_explanation(found).count("<section") == len(found.tokens)


def test_nearest_codes_are_explained_by_the_positions_that_choose_them(pair_model, picture):
    made = pair_model("nearest", grounding_method="normal")
    found = explain(str(made.directory), picture, CAPTION, tokens=32)
    out, _ = outputs(made, Predictor(made.directory), picture, CAPTION)
    ids, counts = np.unique(out.grounded_ids.numpy()[0], return_counts=True)
    assert sorted(found.chosen) == ids.tolist()
    assert {token.id: token.score for token in found.tokens} == dict(zip(ids.tolist(), counts.astype(float).tolist()))


def test_nearest_pictures_and_words_are_those_with_the_largest_share(grounded, predictor, picture, folder, tmp_path):
    (tmp_path / "lines.txt").write_text("A red ring.\nA blue box is above a ring.\n")
    pictures, _ = update_index(predictor, folder, tmp_path / "index", IndexOptions(codes=True))
    words, _ = update_index(predictor, tmp_path / "lines.txt", tmp_path / "texts", IndexOptions(codes=True))
    found = explain(predictor, picture, CAPTION, [pictures, tmp_path / "texts"], tokens=2, nearest=3)
    for token in found.tokens:
        shares = pictures.arrays["codes"][:, token.id].astype("float32")
        assert [entry["share"] for entry in token.pictures] == pytest.approx(sorted(shares.tolist(), reverse=True)[:3])
        assert token.near_words[0]["share"] == pytest.approx(words.arrays["word_codes"][:, token.id].max())
    plain, _ = update_index(predictor, folder, tmp_path / "plain")
    with pytest.raises(UserInputError, match="holds no codes; add them with unimo2 index"):
        explain(predictor, picture, CAPTION, [plain])


def test_the_command_writes_a_picture_data_and_a_page_without_outside_parts(unimo2, grounded, picture, tmp_path):
    outcome = unimo2("explain", picture, CAPTION, "-m", grounded.directory, "--out", tmp_path / "out", "--tokens", 3)
    assert outcome.status == 0, outcome.err
    assert len([line for line in outcome.out.splitlines() if line.strip()[:1].isdigit()]) >= 3
    page, data = (tmp_path / "out" / "explain.html").read_text(), json.loads((tmp_path / "out" / "explain.json").read_text())
    assert "http" not in page and "<b>blue" not in page and page.count("class='map'") == 3
    assert len(data["tokens"]) == 3 and len(data["chosen"]) == 4 and "picture" not in data
    assert (tmp_path / "out" / "explain.png").read_bytes()[:4] == b"\x89PNG"
    assert unimo2("explain", picture, "-m", grounded.directory, "--out", tmp_path / "alone", "--json").status == 0


def test_models_and_inputs_that_cannot_be_explained_are_named(unimo2, pair_model, grounded, picture, tmp_path):
    baseline = pair_model("baseline", model_type="baseline")
    outcome = unimo2("explain", picture, "a ring", "-m", baseline.directory, "--out", tmp_path / "out")
    assert outcome.status == 2 and "no grounded dictionary" in outcome.err and not (tmp_path / "out").exists()
    assert unimo2("explain", tmp_path / "none.jpg", "-m", grounded.directory).status == 2
    assert "tokens must be at least 1" in unimo2("explain", picture, "-m", grounded.directory, "--tokens", 0).err
    with pytest.raises(UserInputError, match="nothing to explain"):
        explain(grounded.directory)


def test_equal_values_have_no_scale():
    assert scaled([[2.0, 2.0]]).tolist() == [[0.0, 0.0]] and scaled([1.0, 3.0, 2.0]).tolist() == [0.0, 1.0, 0.5]
