"""Captions do not depend on how they are computed: with or without cache, alone or in a batch."""
import numpy as np
import paddle
import pytest

from unimo2_paddle import Unimo2Config, Unimo2Model
from unimo2_paddle.errors import UserInputError
from unimo2_paddle.models.generation import Decoding, generate, repeats_trigram, restrict, words_of
from unimo2_paddle.tasks.captioning_data import target_arrays

START, PAD, END = 0, 1, 2
TAGS = [[0, 11, 12, 13, 2], [0, 21, 2]]


def build(tiny_config, seed=3, **changes):
    config = Unimo2Config.from_dict({**tiny_config.to_dict(), "initializer_range": 0.3, **changes})
    paddle.seed(seed)
    with paddle.utils.unique_name.guard():
        model = Unimo2Model(config, heads=("masked_lm",))
    model.eval()
    return model


@pytest.fixture(scope="module")
def model(tiny_config):
    return build(tiny_config)


@pytest.fixture(scope="module")
def images():
    return paddle.to_tensor(np.random.default_rng(0).uniform(-1, 1, [2, 32, 32, 3]).astype("float32"))


def tag_tensors(tags):
    length = max(map(len, tags))
    ids = np.array([t + [PAD] * (length - len(t)) for t in tags], dtype="int64")
    positions = np.array([list(range(2, 2 + len(t))) + [1] * (length - len(t)) for t in tags], dtype="int64")
    mask = np.array([[1.0] * len(t) + [0.0] * (length - len(t)) for t in tags], dtype="float32")
    return tuple(map(paddle.to_tensor, (ids, positions, mask)))


def recomputed(model, image, ids, tags, min_length=0):
    """Log-probability of every token of a caption by one forward over everything, as in training; [SEP] cannot come earlier."""
    text = {k: paddle.to_tensor(v) for k, v in target_arrays([ids], None if tags is None else [tags], PAD).items()}
    out = model(image=image, input_ids=text["input_ids"], position_ids=text["position_ids"], text_mask=text["text_mask"], layout="caption")
    logits = model.mlm_logits(paddle.index_select(out.fused_text[0], text["predict_from"]))
    logits[:min_length, END] = -1e9
    return paddle.nn.functional.log_softmax(logits).numpy()[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("changes", [{}, {"model_type": "baseline"}, {"grounding_method": "normal"}], ids=["grounded", "baseline", "nearest"])
@pytest.mark.parametrize("with_tags", [True, False], ids=["tags", "no tags"])
def test_beam_scores_equal_recomputation_without_cache(tiny_config, images, changes, with_tags):
    model = build(tiny_config, **changes)
    options = Decoding(beam_size=3, length_penalty=0.6, min_length=2, max_length=7)
    found = generate(model, images, START, END, options, tag_tensors(TAGS) if with_tags else None)
    for row, hypotheses in enumerate(found):
        assert len(hypotheses) == 3
        for hypothesis in hypotheses:
            parts = recomputed(model, images[row:row + 1], hypothesis.ids, TAGS[row] if with_tags else None, min_length=2)
            length = len(hypothesis.ids) - 1
            assert hypothesis.scores[-1] == pytest.approx(parts.sum() / ((5 + length) / 6) ** 0.6, abs=2e-4)


def test_a_caption_does_not_depend_on_the_batch_it_is_in(model, images):
    options = Decoding(beam_size=3, min_length=1, max_length=6)
    together = generate(model, images, START, END, options, tag_tensors(TAGS))
    for row in range(2):
        alone = generate(model, images[row:row + 1], START, END, options, tag_tensors(TAGS[row:row + 1]))[0]
        assert [h.ids for h in alone] == [h.ids for h in together[row]]
        np.testing.assert_allclose([h.scores[-1] for h in alone], [h.scores[-1] for h in together[row]], atol=1e-4)


def test_the_authors_switch_attends_padded_tags(model, images):
    options = Decoding(beam_size=2, min_length=1, max_length=4, attend_padded_tags=True)
    together = generate(model, images, START, END, options, tag_tensors(TAGS))[1]
    alone = generate(model, images[1:], START, END, options, tag_tensors(TAGS[1:]))[0]
    assert abs(together[0].scores[-1] - alone[0].scores[-1]) > 1e-3


def test_an_exhaustive_beam_finds_the_most_probable_caption(tiny_config, images):
    model = build(tiny_config, text_vocab_size=6)
    best = generate(model, images[:1], START, END, Decoding(beam_size=200, length_penalty=0.0, min_length=0, max_length=3))[0][0]
    captions = [[START, END]] + [[START, a, END] for a in range(6) if a != END] + [
        [START, a, b, c] for a in range(6) for b in range(6) for c in range(6) if END not in (a, b)]
    scores = [recomputed(model, images[:1], ids, None).sum() for ids in captions]
    assert best.ids == captions[int(np.argmax(scores))]
    assert best.scores[-1] == pytest.approx(max(scores), abs=1e-4)


def test_greedy_search_equals_a_beam_of_one_and_sampling_of_the_best_token(model, images):
    settings = {"min_length": 2, "max_length": 6, "length_penalty": 0.0}
    greedy = generate(model, images, START, END, Decoding(method="greedy", **settings))
    beam = generate(model, images, START, END, Decoding(beam_size=1, **settings))
    drawn = generate(model, images, START, END, Decoding(method="sample", samples=2, top_k=1, **settings))
    for row in range(2):
        assert greedy[row][0].ids == beam[row][0].ids == drawn[row][0].ids == drawn[row][1].ids
        assert greedy[row][0].scores[-1] == pytest.approx(beam[row][0].scores[-1], abs=1e-4)


def test_sampling_follows_the_model_and_the_seed(tiny_config, images):
    model = build(tiny_config, text_vocab_size=8, initializer_range=0.1)
    options = Decoding(method="sample", samples=3000, min_length=0, max_length=1)
    paddle.seed(5)
    drawn = [h.ids[1] for h in generate(model, images[:1], START, END, options)[0]]
    paddle.seed(5)
    assert sorted(drawn) == sorted(h.ids[1] for h in generate(model, images[:1], START, END, options)[0])
    wanted = np.exp([recomputed(model, images[:1], [START, i], None)[0] for i in range(8)])
    np.testing.assert_allclose(np.bincount(drawn, minlength=8) / 3000, wanted, atol=0.04)


def test_lengths_are_kept(model, images):
    for method in ("beam", "greedy", "sample"):
        found = generate(model, images, START, END, Decoding(method=method, beam_size=3, min_length=5, max_length=6))
        for hypothesis in sum(found, []):
            assert END not in hypothesis.ids[:6] and len(hypothesis.ids) <= 7


@pytest.mark.parametrize("method", ["beam", "greedy", "sample"])
def test_blocked_trigrams_do_not_come_twice(tiny_config, images, method):
    model = build(tiny_config, text_vocab_size=5)
    paddle.seed(1)
    starts = np.array([True, True, True, True, False])
    options = Decoding(method=method, beam_size=3, min_length=20, max_length=20, length_penalty=0.0)
    free = generate(model, images, START, END, options)
    options.block_trigrams = True
    blocked = generate(model, images, START, END, options, word_starts=starts)
    repeats = [sum(repeats_trigram(h.ids[:n], starts) for h in own[:1] for n in range(4, 22)) for own in (sum(free, []), sum(blocked, []))]
    assert repeats[1] == 0 < repeats[0]


def test_words_are_joined_before_trigrams_are_compared():
    starts = np.array([True] * 8 + [False, False])
    assert words_of([0, 3, 8, 9, 4], starts) == [(0,), (3, 8, 9), (4,)]
    assert repeats_trigram([3, 4, 5, 3, 4, 5], starts)
    assert not repeats_trigram([3, 4, 5, 8, 3, 4, 5], starts)
    assert repeats_trigram([3, 4, 5, 8, 3, 4, 5, 8], starts)
    assert not repeats_trigram([3, 4], starts)


def test_restricting_keeps_the_fewest_best_tokens_that_reach_top_p():
    logits = paddle.to_tensor(np.log([[0.5, 0.2, 0.2, 0.06, 0.04]]).astype("float32"))

    def kept(**limits):
        return (restrict(logits, **limits).numpy()[0] > -1e8).tolist()

    assert kept(top_p=0.4) == [True, False, False, False, False]
    assert kept(top_p=0.95) == [True, True, True, True, False]
    assert kept(top_p=1.0) == [True] * 5
    assert kept(top_k=1) == [True, False, False, False, False]
    assert kept(top_k=9) == [True] * 5


def test_what_cannot_work_is_refused(tiny_config, model, images):
    with pytest.raises(UserInputError, match="word_start_table"):
        generate(model, images, START, END, Decoding(block_trigrams=True))
    with pytest.raises(UserInputError, match="lower max_length"):
        generate(model, images, START, END, Decoding(max_length=500))
    with paddle.utils.unique_name.guard():
        without_head = Unimo2Model(tiny_config, heads=())
    with pytest.raises(UserInputError, match="masked_lm"):
        generate(without_head, images, START, END, Decoding())
    assert len(Decoding(method="x", beam_size=0, min_length=9, max_length=3, top_p=0.0, temperature=0.0).problems()) == 5
