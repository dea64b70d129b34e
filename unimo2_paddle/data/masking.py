"""Corrupting text for pre-training: span masking and sequence-to-sequence fragments (reference notes, section 2.2 items 4 and 5)."""
from dataclasses import dataclass

import numpy as np

SPAN_LENGTHS = np.arange(0, 11)
_GEOMETRIC = 0.2 * 0.8 ** SPAN_LENGTHS
SPAN_PROBABILITIES = _GEOMETRIC / _GEOMETRIC.sum()
NUM_SPECIAL_IDS = 4  # [CLS] [PAD] [SEP] [UNK] come first in the vocabulary; random replacements start behind them


def mask_spans(ids, word_starts, special, rng, mask_id, vocab_size, ratio=0.15):
    """Mask whole-word spans of one token sequence.

    Span lengths in words follow a geometric distribution (p = 0.2) cut to 0..10 and renormalised (0 still masks the anchor's word);
    anchors are uniform over tokens and skipped when special or already masked; at most ``ceil(ratio * length)`` tokens, at most 100
    tries per token of that budget. Each masked token becomes [MASK] (80 %), a random id of 4..V-1 (10 %) or stays (10 %).

    Args:
        ids: token ids of the sequence, special tokens included; word_starts: True where a word begins; special: True at special tokens.
        rng: ``numpy.random.Generator``.

    Returns:
        (ids with masks, sorted masked positions).
    """
    ids = np.array(ids, dtype=np.int64)
    starts = np.asarray(word_starts, dtype=bool) | np.asarray(special, dtype=bool)
    special = np.asarray(special, dtype=bool)
    length = len(ids)
    budget = int(np.ceil(ratio * length))
    masked = set()
    for _ in range(100 * budget):
        if len(masked) >= budget:
            break
        words = max(1, int(rng.choice(SPAN_LENGTHS, p=SPAN_PROBABILITIES)))
        anchor = int(rng.integers(length))
        if special[anchor] or anchor in masked:
            continue
        left = anchor
        while left > 0 and not starts[left]:
            left -= 1
        position = left
        while position < length and not special[position]:
            words -= bool(starts[position])
            if words < 0 or len(masked) >= budget:
                break
            masked.add(position)
            position += 1
    positions = np.array(sorted(masked), dtype=np.int64)
    for position in positions:
        draw = rng.random()
        if draw < 0.8:
            ids[position] = mask_id
        elif draw < 0.9:
            ids[position] = rng.integers(NUM_SPECIAL_IDS, vocab_size)
    return ids, positions


@dataclass
class Fragments:
    """A sequence-to-sequence example made of one text."""

    ids: np.ndarray          # [L] source then target tokens
    position_ids: np.ndarray  # [L]
    mask: np.ndarray         # [L, L] float32: source bidirectional, target causal
    predict_from: np.ndarray  # [M] positions whose state predicts ...
    labels: np.ndarray       # [M] ... these tokens


def _sizes(rng):
    """(encoder, decoder) fragment length ranges: short ones with probability 0.4, long ones with 0.6."""
    return ((3, 12), (1, 4)) if rng.random() < 0.4 else ((12, 96), (4, 32))


def sequence_fragments(ids, rng, cls_id, sep_id, first_position=2):
    """Cut a text into alternating source and target fragments.

    The source is ``[CLS] fragments [SEP]``, the target ``[CLS] fragment [CLS] fragment ...``; tokens keep the positions they have in
    the whole text; the loss starts at each fragment's first token (predicted from the [CLS] before it). A text too short for both
    becomes all target.

    Args:
        ids: tokens without special ones; rng: ``numpy.random.Generator``.

    Returns:
        ``Fragments``.
    """
    ids = np.asarray(ids, dtype=np.int64)
    encoder_range, decoder_range = _sizes(rng)
    source, target, at, to_source = [], [], 0, bool(rng.random() < 0.5)
    while at < len(ids):
        low, high = encoder_range if to_source else decoder_range
        size = int(rng.integers(low, high + 1))
        (source if to_source else target).append((at, min(len(ids), at + size)))
        at, to_source = at + size, not to_source
    if not target:
        source, target = [], [(0, len(ids))]
    tokens, positions = [cls_id], [first_position]
    for start, stop in source:
        tokens.extend(ids[start:stop])
        positions.extend(range(first_position + 1 + start, first_position + 1 + stop))
    tokens.append(sep_id)
    positions.append(first_position + 1 + len(ids))
    source_length = len(tokens)
    predict_from, labels = [], []
    for start, stop in target:
        tokens.append(cls_id)
        positions.append(first_position + start)
        for index in range(start, stop):
            predict_from.append(len(tokens) - 1)
            labels.append(ids[index])
            tokens.append(ids[index])
            positions.append(first_position + 1 + index)
    length = len(tokens)
    mask = np.tril(np.ones((length, length), dtype=np.float32))
    mask[:, :source_length] = 1.0
    return Fragments(np.array(tokens, dtype=np.int64), np.array(positions, dtype=np.int64), mask,
                     np.array(predict_from, dtype=np.int64), np.array(labels, dtype=np.int64))
