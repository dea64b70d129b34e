"""Generated texts do not depend on how they are computed: UNIMO after any prefix, UNIMO-2 after a source text."""
import numpy as np
import paddle
import pytest

from unimo2_paddle import Unimo2Config, Unimo2Model, UnimoConfig, UnimoModel
from unimo2_paddle.errors import UserInputError
from unimo2_paddle.models.generation import Decoding, generate, generate_from_prefix

START, PAD, SEP, END = 0, 1, 2, 39
SOURCES = [[0, 11, 12, 13, 2], [0, 21, 2]]
OPTIONS = Decoding(beam_size=3, length_penalty=0.6, min_length=2, max_length=6)


def build(seed=3, **overrides):
    config = UnimoConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=40, max_position_embeddings=24,
                         image_embedding_size=6, initializer_range=0.4, **overrides)
    paddle.seed(seed)
    with paddle.utils.unique_name.guard():
        model = UnimoModel(config, heads=("masked_lm",))
    model.eval()
    return model


def padded(rows, value, dtype):
    length = max(map(len, rows))
    return paddle.to_tensor(np.array([list(row) + [value] * (length - len(row)) for row in rows], dtype=dtype))


def source(rows=SOURCES, names=("input_ids", "position_ids", "text_mask")):
    return dict(zip(names, (padded(rows, PAD, "int64"), padded([range(2, 2 + len(r)) for r in rows], 1, "int64"),
                            padded([[1.0] * len(r) for r in rows], 0.0, "float32"))))


def picture_and_tags(rows=(0, 1)):
    rng = np.random.RandomState(0)
    features, boxes = rng.randn(2, 4, 6).astype("float32"), rng.rand(2, 4, 5).astype("float32")
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], "float32")
    tags = source([SOURCES[row] for row in rows], ("object_ids", "object_positions", "object_mask"))
    return {"image_features": paddle.to_tensor(features[list(rows)]), "image_location": paddle.to_tensor(boxes[list(rows)]),
            "image_mask": paddle.to_tensor(mask[list(rows)]), **tags}


def sequence(prefix_ids, ids, first=2):
    """One source and one target packed as in training."""
    packed, split = prefix_ids + ids, len(prefix_ids)
    mask = np.zeros([len(packed)] * 2, "float32")
    mask[:, :split] = 1.0
    mask[split:, split:] = np.tril(np.ones([len(ids)] * 2))
    positions = list(range(2, 2 + split)) + list(range(first, first + len(ids)))
    return {"input_ids": paddle.to_tensor([packed]), "position_ids": paddle.to_tensor([positions]), "text_mask": paddle.to_tensor(mask[None])}


def token_scores(logits, ids, end, min_length):
    """Log-probability of every token after the first; the end cannot come before ``min_length`` tokens."""
    logits[:min_length, end] = -1e9
    return paddle.nn.functional.log_softmax(logits).numpy()[np.arange(len(ids) - 1), ids[1:]]


def penalised(parts, options=OPTIONS):
    return parts.sum() / ((5 + len(parts)) / 6) ** options.length_penalty


@pytest.mark.parametrize("first", [2, 7])
def test_scores_after_a_source_text_equal_recomputation_without_cache(first):
    model = build()
    found = generate_from_prefix(model, source(), START, END, OPTIONS, first_positions=paddle.to_tensor([first, first]))
    for row, hypotheses in enumerate(found):
        assert len(hypotheses) == 3
        for hypothesis in hypotheses:
            out = model(**sequence(SOURCES[row], hypothesis.ids, first))
            logits = model.mlm_logits(out.text_states[0, len(SOURCES[row]):-1])
            assert hypothesis.scores[-1] == pytest.approx(penalised(token_scores(logits, hypothesis.ids, END, 2)), abs=2e-4)


def test_scores_after_regions_and_tags_equal_recomputation_without_cache():
    model = build()
    for row, hypotheses in enumerate(generate_from_prefix(model, picture_and_tags(), START, SEP, OPTIONS)):
        for hypothesis in hypotheses:
            out = model(**picture_and_tags([row]), **sequence([], hypothesis.ids))
            logits = model.mlm_logits(out.text_states[0, :-1])
            assert hypothesis.scores[-1] == pytest.approx(penalised(token_scores(logits, hypothesis.ids, SEP, 2)), abs=2e-4)


def test_an_answer_in_a_dialogue_has_role_and_turn_0():
    model = build(role_type_size=3, turn_type_size=16)
    turns = {key: padded([[2] * len(row) for row in SOURCES], 0, "int64") for key in ("role_ids", "turn_ids")}
    for row, hypotheses in enumerate(generate_from_prefix(model, {**source(), **turns}, START, END, OPTIONS)):
        best = hypotheses[0]
        packed = [2] * len(SOURCES[row]) + [0] * len(best.ids)
        out = model(**sequence(SOURCES[row], best.ids), role_ids=paddle.to_tensor([packed]), turn_ids=paddle.to_tensor([packed]))
        logits = model.mlm_logits(out.text_states[0, len(SOURCES[row]):-1])
        assert best.scores[-1] == pytest.approx(penalised(token_scores(logits, best.ids, END, 2)), abs=2e-4)


def test_a_text_does_not_depend_on_the_batch_it_is_in():
    model = build()
    together = generate_from_prefix(model, picture_and_tags(), START, SEP, OPTIONS)
    for row in range(2):
        alone = generate_from_prefix(model, picture_and_tags([row]), START, SEP, OPTIONS)[0]
        assert [h.ids for h in alone] == [h.ids for h in together[row]]


def test_greedy_search_is_beam_search_of_one():
    model = build()
    settings = dict(length_penalty=0.0, min_length=1, max_length=6)
    greedy = generate_from_prefix(model, source(), START, END, Decoding(method="greedy", **settings))
    beam = generate_from_prefix(model, source(), START, END, Decoding(beam_size=1, **settings))
    assert [own[0].ids for own in greedy] == [own[0].ids for own in beam]


@pytest.mark.parametrize("model_type", ["grounded", "baseline"])
def test_unimo2_goes_on_with_a_source_text_as_it_was_trained(tiny_config, model_type):
    config = Unimo2Config.from_dict({**tiny_config.to_dict(), "initializer_range": 0.3, "model_type": model_type})
    paddle.seed(3)
    with paddle.utils.unique_name.guard():
        model = Unimo2Model(config, vision=False, heads=("masked_lm",))
    model.eval()
    found = generate(model, None, START, SEP, OPTIONS, tags=tuple(source().values()))
    for row, hypotheses in enumerate(found):
        for hypothesis in hypotheses:
            out = model(**sequence(SOURCES[row], hypothesis.ids))
            logits = model.mlm_logits(out.fused_text[0, len(SOURCES[row]):-1])
            assert hypothesis.scores[-1] == pytest.approx(penalised(token_scores(logits, hypothesis.ids, SEP, 2)), abs=2e-4)


def test_what_cannot_be_generated_is_refused():
    model = build()
    with pytest.raises(UserInputError, match="positions for 17 tokens"):
        generate_from_prefix(model, source(), START, END, Decoding(max_length=18), first_positions=paddle.to_tensor([2, 7]))
    with pytest.raises(UserInputError, match="block_trigrams needs the table"):
        generate_from_prefix(model, source(), START, END, Decoding(max_length=8, block_trigrams=True))
    with paddle.utils.unique_name.guard():
        without_head = UnimoModel(model.config, heads=("pooling",))
    with pytest.raises(UserInputError, match="masked_lm head"):
        generate_from_prefix(without_head, source(), START, END, OPTIONS)
