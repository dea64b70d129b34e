"""Span masking and sequence-to-sequence fragments against the reference notes, section 2.2 items 4 and 5."""
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimo2_paddle.data.masking import SPAN_PROBABILITIES, mask_spans, sequence_fragments

CLS, SEP, MASK, VOCAB = 0, 2, 99, 100


@st.composite
def texts(draw):
    """(ids, word starts, special) of a text of words of 1 to 6 pieces between [CLS] and [SEP]."""
    words = draw(st.lists(st.integers(1, 6), min_size=1, max_size=60))
    starts = [piece == 0 for length in words for piece in range(length)]
    ids = [CLS] + list(range(10, 10 + len(starts))) + [SEP]
    return ids, [True] + starts + [True], [True] + [False] * len(starts) + [True]


def words_of(starts, special):
    """Lists of the positions of every word."""
    words = []
    for position, (start, skip) in enumerate(zip(starts, special)):
        if skip:
            continue
        if start or not words:
            words.append([])
        words[-1].append(position)
    return words


@given(texts(), st.integers(0, 10 ** 6), st.sampled_from([0.05, 0.15, 0.5, 0.9]))
def test_the_budget_is_used_up_and_special_tokens_stay(text, seed, ratio):
    ids, starts, special = text
    masked, positions = mask_spans(ids, starts, special, np.random.default_rng(seed), MASK, 1000, ratio)
    assert len(positions) == min(math.ceil(ratio * len(ids)), len(ids) - 2)
    assert list(positions) == sorted(set(positions)) and not np.asarray(special)[positions].any()
    untouched = np.setdiff1d(np.arange(len(ids)), positions)
    assert (masked[untouched] == np.asarray(ids)[untouched]).all()
    assert ((masked >= 4) | np.isin(np.arange(len(ids)), untouched)).all()


@given(texts(), st.integers(0, 10 ** 6))
def test_words_are_masked_whole_but_for_the_one_that_meets_the_budget(text, seed):
    ids, starts, special = text
    _, positions = mask_spans(ids, starts, special, np.random.default_rng(seed), MASK, 1000)
    chosen = set(positions.tolist())
    cut = [word for word in words_of(starts, special) if 0 < len(chosen & set(word)) < len(word)]
    assert len(cut) <= 1
    assert all(word[0] in chosen for word in cut), "the last word is cut at its end"


@given(texts(), st.integers(0, 10 ** 6))
def test_masking_is_a_function_of_its_generator(text, seed):
    first, second = (mask_spans(*text, np.random.default_rng(seed), MASK, VOCAB) for _ in range(2))
    assert (first[0] == second[0]).all() and (first[1] == second[1]).all()
    assert text[0][1] == 10, "the input is not changed"


def test_masked_tokens_become_mask_random_or_themselves_in_80_10_10():
    length, vocab = 2000, 60000  # large, so that a random id is hardly ever the right one
    ids = np.full(length, 5)
    rng, flags = np.random.default_rng(1), [True] * length
    kinds, drawn = np.zeros(3), []
    for _ in range(20):
        masked, positions = mask_spans(ids, flags, [False] * length, rng, vocab - 1, vocab)
        new = masked[positions]
        kinds += [(new == vocab - 1).sum(), ((new != vocab - 1) & (new != 5)).sum(), (new == 5).sum()]
        drawn.extend(new[(new != vocab - 1) & (new != 5)])
    assert kinds.sum() == 6000
    assert np.abs(kinds / 6000 - [0.8, 0.1, 0.1]).max() < 0.02  # three standard deviations: 0.015
    assert min(drawn) >= 4 and min(drawn) < 400 and max(drawn) > vocab - 400 and abs(np.mean(drawn) / vocab - 0.5) < 0.05


def test_random_replacements_leave_out_the_four_first_ids_and_reach_the_last():
    rng = np.random.default_rng(2)
    masked, positions = mask_spans([4] * 4000, [True] * 4000, [False] * 4000, rng, 20, 9, ratio=0.9)
    assert set(masked[positions]) == {4, 5, 6, 7, 8, 20}


def test_span_lengths_follow_the_cut_geometric_distribution():
    rng, length = np.random.default_rng(3), 4000
    counts, flags, special = np.zeros(11), [True] * length, [False] * length
    for _ in range(1500):
        _, positions = mask_spans([5] * length, flags, special, _Recorder(rng), 8, 9, ratio=10 / length)
        counts += np.bincount(_Recorder.lengths, minlength=11)
    shares = counts / counts.sum()
    wanted = 0.2 * 0.8 ** np.arange(11)
    wanted /= wanted.sum()
    assert np.allclose(SPAN_PROBABILITIES, wanted)
    assert np.abs(shares - wanted).max() < 4 * np.sqrt(0.25 / counts.sum())


class _Recorder:
    """Passes draws on and keeps the span lengths."""

    lengths = []

    def __init__(self, rng):
        self.rng, _Recorder.lengths = rng, []

    def choice(self, values, p):
        _Recorder.lengths.append(int(self.rng.choice(values, p=p)))
        return _Recorder.lengths[-1]

    def __getattr__(self, name):
        return getattr(self.rng, name)


class _Scripted:
    """Draws these span lengths and anchors, then always masks."""

    def __init__(self, lengths, anchors):
        self.lengths, self.anchors = iter(lengths), iter(anchors)

    def choice(self, values, p):
        return next(self.lengths)

    def integers(self, *bounds):
        return next(self.anchors)

    def random(self):
        return 0.0


#         [CLS] un|believ|able  cat|s  sat  on  mat|s [SEP]
STARTS = [True, True, False, False, True, False, True, True, True, False, True]
SPECIAL = [True] + [False] * 9 + [True]


@pytest.mark.parametrize("length, anchor, ratio, wanted", [
    (1, 3, 0.9, [1, 2, 3]),           # to the start of the anchor's word
    (0, 5, 0.9, [4, 5]),              # length 0 still masks that word
    (3, 6, 0.9, [6, 7, 8, 9]),        # three words
    (10, 7, 0.9, [7, 8, 9]),          # never over the end
    (2, 2, 0.35, [1, 2, 3, 4]),       # the budget of ceil(0.35 * 11) = 4 cuts the second word
])
def test_a_span_grows_from_its_anchor_in_whole_words(length, anchor, ratio, wanted):
    script = _Scripted([length] + [0] * 2000, [anchor] + [0] * 2000)  # afterwards only the special [CLS] is hit
    masked, positions = mask_spans(range(11), STARTS, SPECIAL, script, 99, 100, ratio)
    assert positions.tolist() == wanted
    assert (masked[positions] == 99).all()


def test_a_hopeless_budget_ends_after_a_hundred_tries_per_token():
    tries = iter(range(301))
    script = _Scripted([1] * 1000, (0 for _ in tries))
    _, positions = mask_spans(range(11), STARTS, SPECIAL, script, 99, 100, ratio=3 / 11)
    assert positions.tolist() == [] and next(tries) == 300


@given(st.integers(1, 300), st.integers(0, 10 ** 6))
def test_every_token_is_in_one_fragment_with_its_own_position(length, seed):
    ids = np.arange(100, 100 + length)
    made = sequence_fragments(ids, np.random.default_rng(seed), CLS, SEP)
    tokens = made.ids >= 100
    assert sorted(made.ids[tokens]) == list(ids)
    assert (made.position_ids[tokens] == made.ids[tokens] - 100 + 3).all(), "[CLS] is at 2, the first token at 3"
    assert len(made.ids) == len(made.position_ids) == len(made.mask)


def parts_of(made):
    """(length of the source, start of every target fragment)."""
    source = int(made.mask[0].sum())
    return source, [i for i in range(source, len(made.ids)) if made.ids[i] == CLS]


@given(st.integers(1, 300), st.integers(0, 10 ** 6))
def test_source_and_target_have_the_layout_of_the_reference(length, seed):
    made = sequence_fragments(np.arange(100, 100 + length), np.random.default_rng(seed), CLS, SEP)
    source, starts = parts_of(made)
    assert made.ids[0] == CLS and made.ids[source - 1] == SEP and (made.ids[1:source - 1] >= 100).all()
    assert made.position_ids[0] == 2 and made.position_ids[source - 1] == length + 3
    assert starts and starts[0] == source
    for start, end in zip(starts, starts[1:] + [len(made.ids)]):
        assert made.position_ids[start] == made.position_ids[start + 1] - 1
        assert (np.diff(made.ids[start + 1:end]) == 1).all(), "a fragment is a run of the text"


@given(st.integers(1, 200), st.integers(0, 10 ** 6))
def test_source_sees_source_and_target_sees_source_and_what_is_left_of_it(length, seed):
    made = sequence_fragments(np.arange(100, 100 + length), np.random.default_rng(seed), CLS, SEP)
    source, _ = parts_of(made)
    size = len(made.ids)
    for query in range(size):
        wanted = [key < source or (query >= source and key <= query) for key in range(size)]
        assert made.mask[query].tolist() == wanted


@given(st.integers(1, 300), st.integers(0, 10 ** 6))
def test_every_target_token_is_predicted_once_from_the_place_before_it(length, seed):
    made = sequence_fragments(np.arange(100, 100 + length), np.random.default_rng(seed), CLS, SEP)
    source, _ = parts_of(made)
    targets = [i for i in range(source, len(made.ids)) if made.ids[i] >= 100]
    assert made.predict_from.tolist() == [i - 1 for i in targets]
    assert made.labels.tolist() == made.ids[targets].tolist()


def test_fragment_sizes_come_from_the_two_profiles_of_the_reference():
    rng, short = np.random.default_rng(4), 0
    for _ in range(400):
        made = sequence_fragments(np.arange(100, 900), rng, CLS, SEP)
        source, starts = parts_of(made)
        ends = starts[1:] + [len(made.ids)]
        targets = [end - start - 1 for start, end in zip(starts, ends)][:-1]  # the text may end inside the last one
        runs = np.split(made.ids[1:source - 1], np.where(np.diff(made.ids[1:source - 1]) != 1)[0] + 1)
        sources = [len(run) for run in runs][:-1]
        if max(targets) <= 4:
            short += 1
            assert min(targets) >= 1 and min(sources) >= 3 and max(sources) <= 12
        else:
            assert min(targets) >= 4 and max(targets) <= 32 and min(sources) >= 12 and max(sources) <= 96
    assert abs(short / 400 - 0.4) < 0.1


def test_a_text_too_short_for_both_sides_is_all_target():
    assert all(len(sequence_fragments([100], np.random.default_rng(seed), CLS, SEP).labels) == 1 for seed in range(50))
