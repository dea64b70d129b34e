"""From records to batches: small functions that turn lists into padded numpy arrays."""
import numpy as np

from unimo2_paddle.errors import DataError

FIRST_POSITION = 2  # positions of real tokens start here; padded places carry token id and position id 1 (the authors' convention)
PAD_POSITION = 1


def with_special_tokens(ids, tokenizer, max_len):
    """``[CLS] ids [SEP]``, cut to ``max_len`` with [SEP] kept."""
    return [tokenizer.cls_id] + list(ids[: max_len - 2]) + [tokenizer.sep_id]


def pad(sequences, value, dtype=np.int64, length=0):
    """Sequences of different lengths as one array ``[B, L]`` filled up with ``value``; L is the longest, at least ``length``."""
    length = max(length, max(len(s) for s in sequences))
    batch = np.full((len(sequences), length), value, dtype=dtype)
    for row, sequence in zip(batch, sequences):
        row[: len(sequence)] = sequence
    return batch


def text_arrays(sequences, pad_id):
    """``input_ids``, ``position_ids`` int64 ``[B, L]`` and ``text_mask`` float32 ``[B, L]`` of token lists.

    Raises:
        DataError: there is no sequence.
    """
    if not sequences:
        raise DataError("an empty batch: no sequence to pad")
    return {
        "input_ids": pad(sequences, pad_id),
        "position_ids": pad([range(FIRST_POSITION, FIRST_POSITION + len(s)) for s in sequences], PAD_POSITION),
        "text_mask": pad([[1.0] * len(s) for s in sequences], 0.0, np.float32),
    }


def seq2seq_visibility(sizes, length):
    """Who sees whom in sequence to sequence, float32 ``[B, length, length]``: all see the source, the target sees itself up to the present token.

    Args:
        sizes: (length of the source, length of source and target) per row; length: padded one.
    """
    mask = np.zeros([len(sizes), length, length], dtype=np.float32)
    for visible, (start, end) in zip(mask, sizes):
        visible[:end, :start] = 1.0
        visible[start:end, start:end] = np.tril(np.ones([end - start, end - start]))
    return mask


def flat_positions(positions, length):
    """Positions within each row as indices into the flattened ``[B * L]``, one int64 array."""
    return np.concatenate([np.asarray(p, dtype=np.int64) + row * length for row, p in enumerate(positions)])
