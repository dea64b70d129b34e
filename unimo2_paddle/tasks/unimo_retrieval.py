"""Retrieval by UNIMO: one encoder reads picture and sentence together, so every pair is a forward of its own.

Nothing of a pair can be computed once per side as in ``retrieval_scoring.py``, and there is no contrastive score that could choose a
shortlist. Pictures and sentences still reach the device once: a batch holds distinct ones, and pairs are gathered from them.
"""
import numpy as np
import paddle

from unimo2_paddle.tasks.retrieval_scoring import Scores
from unimo2_paddle.tasks.unimo_inputs import REGION_INPUTS

TEXT_INPUTS = ("input_ids", "position_ids", "text_mask")


def take(arrays, names, rows):
    """Rows (int64 ``[N]``, repeats allowed) of the tensors ``names``."""
    rows = paddle.to_tensor(rows, dtype="int64") if isinstance(rows, np.ndarray) else rows
    return {name: paddle.index_select(arrays[name], rows) for name in names}


def pair_scores(model, images, image_rows, texts, text_rows):
    """Matching scores ``[N]`` of the pairs (row n of ``image_rows``, row n of ``text_rows``), with gradient where that is on.

    Args:
        model: ``UnimoModel`` with the matching head; images, texts: tensors by the names of ``UnimoModel.forward``, one row per distinct
            picture or sentence.
    """
    out = model(**take(images, REGION_INPUTS, image_rows), **take(texts, TEXT_INPUTS, text_rows), first_only=True)
    return model.matching_score(out)


def batch_scores(model, batch):
    """Scores ``[B, C]`` of the pairs of a training batch (``pair_image``, ``pair_text`` ``[B, C]``)."""
    rows = batch["pair_image"].reshape([-1]), batch["pair_text"].reshape([-1])
    return pair_scores(model, batch, rows[0], batch, rows[1]).reshape(batch["pair_image"].shape)


def all_scores(model, dataset, image_batch=32, pair_batch=128, progress=None):
    """Scores of every caption of a ``RetrievalDataset`` with every picture; the model must be in evaluation mode.

    Args:
        image_batch: pictures read at a time; pair_batch: pairs per forward; progress: called with the number of pairs just done.

    Returns:
        :class:`Scores` without contrastive scores.
    """
    order = np.argsort([len(ids) for ids in dataset.tokens], kind="stable")  # by length, so that little is padding
    groups = []
    for rows in np.array_split(order, -(-len(order) // pair_batch)):
        groups.append((rows, {name: paddle.to_tensor(array) for name, array in zip(TEXT_INPUTS, dataset.text_batch(rows))}))
    found = np.empty([len(order), len(dataset)], dtype="float32")
    for first in range(0, len(dataset), image_batch):
        numbers = range(first, min(first + image_batch, len(dataset)))
        images = {name: paddle.to_tensor(array) for name, array in dataset.picture_arrays(numbers).items()}
        for rows, texts in groups:
            step = max(1, pair_batch // len(rows))
            for start in range(0, len(numbers), step):
                pictures = np.arange(start, min(start + step, len(numbers)))
                scores = pair_scores(model, images, np.repeat(pictures, len(rows)), texts, np.tile(np.arange(len(rows)), len(pictures)))
                found[rows[:, None], first + pictures[None]] = scores.numpy().reshape([len(pictures), len(rows)]).T
                if progress is not None:
                    progress(scores.shape[0])
    return Scores(found)
