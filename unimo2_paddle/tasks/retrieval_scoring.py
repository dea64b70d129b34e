"""Scores of all picture-sentence pairs, with everything that needs one side alone computed once.

The score of a pair is matching logit 1 + ``cmcl_score_weight`` x contrastive score. Encoder states, contrastive feature and a
side's part of the code scores (whose sum over both sides chooses the grounded tokens) belong to one picture or one sentence. A
pair costs the choice of its tokens and the grounded encoder, in whose last layer only the two [CLS] rows are computed. The result
equals a full forward of every pair up to float rounding; two codes tied within rounding at the K-th place may change places.
"""
import contextlib
from typing import NamedTuple, Optional

import numpy as np
import paddle

from unimo2_paddle.models.grounding import Grounding
from unimo2_paddle.models.unimo2 import source_mask
from unimo2_paddle.tasks.base import normalise_tensor


class EncodedImages(NamedTuple):
    """What scoring needs of some pictures."""

    states: paddle.Tensor                  # [N, 1+P, H] visual encoder output
    features: paddle.Tensor                # [N, H] for the contrastive score
    code_scores: Optional[paddle.Tensor]   # [N, C] this side's part of the code scores


class EncodedTexts(NamedTuple):
    """What scoring needs of some captions of similar length."""

    rows: np.ndarray                       # int [N] their numbers in the data set
    states: paddle.Tensor                  # [N, L, H] text encoder output
    mask: paddle.Tensor                    # [N, L]
    features: paddle.Tensor                # [N, H]
    code_scores: Optional[paddle.Tensor]   # [N, C]


class Scores(NamedTuple):
    """Scores of all pairs, float32 ``[T, I]``."""

    retrieval: np.ndarray
    contrastive: np.ndarray


@contextlib.contextmanager
def evaluation_mode(model):
    """No dropout and no gradients inside; afterwards every layer is in the mode it was in."""
    modes = [(layer, layer.training) for layer in model.sublayers(include_self=True)]
    model.eval()
    try:
        with paddle.no_grad():
            yield
    finally:
        for layer, training in modes:
            layer.training = training


def _code_scores(model, image_states=None, text_states=None, text_mask=None):
    if not model.grounded or model.dictionary.method != "topk":
        return None  # the baseline has no codes; nearest codes are chosen per position, not per pair
    valid = None
    if text_states is not None:
        valid = paddle.ones_like(text_mask) if model.config.grounding_counts_padding else source_mask(text_mask)
    return model.dictionary.code_scores(*model.dictionary.inputs(image_states, text_states, valid))


def encode_images(model, dataset, batch_size=32):
    """Yields :class:`EncodedImages` of the pictures in order, each encoded once; one batch of states exists at a time."""
    for first in range(0, len(dataset), batch_size):
        pixels = dataset.pictures(first, first + batch_size, model.config.image_size)
        states = model.encode_image(normalise_tensor(paddle.to_tensor(pixels)))
        features = model.contrastive_features(image_states=states)[0]
        yield EncodedImages(states, features, _code_scores(model, image_states=states))


def encode_texts(model, dataset, batch_size=128):
    """List of :class:`EncodedTexts` over all captions, sorted by length so that little is padding, each encoded once.

    With ``grounding_counts_padding`` a score depends on the padding of its batch, as in the authors' evaluation, but on other
    batches than theirs.
    """
    order = np.argsort([len(ids) for ids in dataset.tokens], kind="stable")
    encoded = []
    for rows in np.array_split(order, -(-len(order) // batch_size)):
        ids, positions, mask = (paddle.to_tensor(array) for array in dataset.text_batch(rows))
        states = model.encode_text(ids, positions, mask)
        features = model.contrastive_features(text_states=states)[1]
        encoded.append(EncodedTexts(rows, states, mask, features, _code_scores(model, text_states=states, text_mask=mask)))
    return encoded


def _all_pairs(image_part, text_part):
    """Rows of both sides for every (image, text), images outermost: ``[m * t, ...]`` each, of ``[m, ...]`` and ``[t, ...]``."""
    images, texts = image_part.shape[0], text_part.shape[0]
    left = paddle.repeat_interleave(image_part, texts, axis=0)
    right = text_part if images == 1 else paddle.concat([text_part] * images, axis=0)
    return left, right


def _matching_logits(model, images, texts):
    """Matching logit 1 of every pair, ``[m, t]``."""
    image_states, text_states = _all_pairs(images.states, texts.states)
    mask = texts.mask.tile([images.states.shape[0], 1])
    grounding = None
    if images.code_scores is not None:
        scores = images.code_scores.unsqueeze(1) + texts.code_scores.unsqueeze(0)
        tokens, ids = model.dictionary.choose(scores.reshape([-1, scores.shape[2]]))
        grounding = Grounding(tokens, ids, paddle.ones_like(tokens[:, :, 0]))
    out = model.fuse(image_states, text_states, mask, grounding=grounding, first_only=True, with_grounding_loss=False)
    return model.matching_logits(out)[:, 1].reshape([images.states.shape[0], -1])


def score_matrix(model, images, texts, pair_batch=128, progress=None):
    """Scores of every caption with every picture. The model must be in evaluation mode (see :func:`evaluation_mode`).

    Args:
        model: ``Unimo2Model`` with pooling and matching heads.
        images: iterable of :class:`EncodedImages`, read once; texts: list of :class:`EncodedTexts`.
        pair_batch: pairs per forward of the grounded encoder.
        progress: called with the number of pairs just done.

    Returns:
        :class:`Scores` ``[T, I]`` of the T captions and I pictures in the order of the data set.
    """
    count = sum(len(group.rows) for group in texts)
    retrieval, contrastive = [], []
    for block in images:
        size = block.states.shape[0]
        matching, similarity = np.empty([count, size], dtype="float32"), np.empty([count, size], dtype="float32")
        for group in texts:
            similarity[group.rows] = paddle.matmul(group.features, block.features, transpose_y=True).numpy()
            step = max(1, pair_batch // len(group.rows))
            for first in range(0, size, step):
                part = EncodedImages(*(None if value is None else value[first: first + step] for value in block))
                logits = _matching_logits(model, part, group)
                matching[group.rows, first: first + step] = logits.numpy().T
                if progress is not None:
                    progress(logits.shape[0] * logits.shape[1])
        retrieval.append(matching + model.config.cmcl_score_weight * similarity)
        contrastive.append(similarity)
    return Scores(np.concatenate(retrieval, axis=1), np.concatenate(contrastive, axis=1))
