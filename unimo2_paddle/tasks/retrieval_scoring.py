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

STATES_KEPT = 2 << 30  # bytes of visual states that a shortlist evaluation keeps between its two passes


class EncodedImages(NamedTuple):
    """What scoring needs of some pictures."""

    states: paddle.Tensor                  # [N, 1+P, H] visual encoder output
    features: paddle.Tensor                # [N, H] for the contrastive score
    code_scores: Optional[paddle.Tensor]   # [N, C] this side's part of the code scores

    def take(self, rows):
        """The pictures ``rows`` (int64 array or tensor, repeats allowed), with gradient."""
        return EncodedImages(*_take(self, rows))


class EncodedTexts(NamedTuple):
    """What scoring needs of some captions of similar length."""

    states: paddle.Tensor                  # [N, L, H] text encoder output
    mask: paddle.Tensor                    # [N, L]
    features: paddle.Tensor                # [N, H]
    code_scores: Optional[paddle.Tensor]   # [N, C]

    def take(self, rows):
        """The captions ``rows`` (int64 array or tensor, repeats allowed), with gradient."""
        return EncodedTexts(*_take(self, rows))


class TextGroup(NamedTuple):
    """Captions of a data set that were encoded together."""

    rows: np.ndarray                       # int [N] their numbers in the data set
    texts: EncodedTexts


class Scores(NamedTuple):
    """Scores of all pairs, float32 ``[T, I]``; UNIMO has no contrastive ones.

    ``shortlist``: bool ``[T, I]``, which pairs the whole model has scored; ``None`` = all. The others keep the order of their contrastive
    scores, behind every pair of the shortlist.
    """

    retrieval: np.ndarray
    contrastive: Optional[np.ndarray] = None
    shortlist: Optional[np.ndarray] = None


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


def _take(encoded, rows):
    rows = paddle.to_tensor(rows, dtype="int64") if isinstance(rows, np.ndarray) else rows
    return [None if value is None else paddle.index_select(value, rows) for value in encoded]


def _code_scores(model, image_states=None, text_states=None, text_mask=None):
    if not model.grounded or model.dictionary.method != "topk":
        return None  # the baseline has no codes; nearest codes are chosen per position, not per pair
    valid = None
    if text_states is not None:
        valid = paddle.ones_like(text_mask) if model.config.grounding_counts_padding else source_mask(text_mask)
    return model.dictionary.code_scores(*model.dictionary.inputs(image_states, text_states, valid))


def encode_pictures(model, pixels):
    """:class:`EncodedImages` of ``pixels``, a uint8 tensor ``[N, S, S, 3]``."""
    states = model.encode_image(normalise_tensor(pixels))
    return EncodedImages(states, model.contrastive_features(image_states=states)[0], _code_scores(model, image_states=states))


def encode_captions(model, input_ids, position_ids, text_mask):
    """:class:`EncodedTexts` of padded captions, tensors ``[N, L]``."""
    states = model.encode_text(input_ids, position_ids, text_mask)
    return EncodedTexts(states, text_mask, model.contrastive_features(text_states=states)[1],
                        _code_scores(model, text_states=states, text_mask=text_mask))


def _encode_block(model, dataset, first, count):
    return encode_pictures(model, paddle.to_tensor(dataset.pictures(first, first + count, model.config.image_size)))


def encode_images(model, dataset, batch_size=32):
    """Yields :class:`EncodedImages` of the pictures in order, each encoded once; one batch of states exists at a time."""
    for first in range(0, len(dataset), batch_size):
        yield _encode_block(model, dataset, first, batch_size)


def encode_texts(model, dataset, batch_size=128):
    """List of :class:`TextGroup` over all captions, sorted by length so that little is padding, each encoded once.

    With ``grounding_counts_padding`` a score depends on the padding of its batch, as in the authors' evaluation, but on other
    batches than theirs.
    """
    order = np.argsort([len(ids) for ids in dataset.tokens], kind="stable")
    groups = []
    for rows in np.array_split(order, -(-len(order) // batch_size)):
        ids, positions, mask = (paddle.to_tensor(array) for array in dataset.text_batch(rows))
        groups.append(TextGroup(rows, encode_captions(model, ids, positions, mask)))
    return groups


def matching_logits(model, images, texts):
    """Matching logits ``[N, 2]`` of the pairs (row n of ``images``, row n of ``texts``), with gradient where that is on."""
    grounding = None
    if images.code_scores is not None:
        tokens, ids = model.dictionary.choose(images.code_scores + texts.code_scores)
        grounding = Grounding(tokens, ids, paddle.ones_like(tokens[:, :, 0]))
    out = model.fuse(images.states, texts.states, texts.mask, grounding=grounding, first_only=True, with_grounding_loss=False)
    return model.matching_logits(out)


def contrastive_scores(images, texts):
    """Contrastive scores ``[N]`` of the pairs (row n of ``images``, row n of ``texts``)."""
    return (images.features * texts.features).sum(axis=-1)


def score_matrix(model, images, groups, pair_batch=128, progress=None):
    """Scores of every caption with every picture. The model must be in evaluation mode (see :func:`evaluation_mode`).

    Args:
        model: ``Unimo2Model`` with pooling and matching heads.
        images: iterable of :class:`EncodedImages`, read once; groups: list of :class:`TextGroup`.
        pair_batch: pairs per forward of the grounded encoder.
        progress: called with the number of pairs just done.

    Returns:
        :class:`Scores` ``[T, I]`` of the T captions and I pictures in the order of the data set.
    """
    count = sum(len(group.rows) for group in groups)
    retrieval, contrastive = [], []
    for block in images:
        size = block.states.shape[0]
        matching, similarity = np.empty([count, size], dtype="float32"), _similarity(groups, [block], count)
        for group in groups:
            texts, step = len(group.rows), max(1, pair_batch // len(group.rows))
            for first in range(0, size, step):
                pictures = np.arange(first, min(first + step, size))
                logits = matching_logits(model, block.take(np.repeat(pictures, texts)),
                                         group.texts.take(np.tile(np.arange(texts), len(pictures))))[:, 1]
                matching[group.rows, first: first + step] = logits.numpy().reshape([len(pictures), texts]).T
                if progress is not None:
                    progress(logits.shape[0])
        retrieval.append(matching + model.config.cmcl_score_weight * similarity)
        contrastive.append(similarity)
    return Scores(np.concatenate(retrieval, axis=1), np.concatenate(contrastive, axis=1))


def _similarity(groups, blocks, count):
    """Contrastive scores ``[T, I]`` of all captions with the pictures of ``blocks``."""
    features = paddle.concat([block.features for block in blocks])
    similarity = np.empty([count, features.shape[0]], dtype="float32")
    for group in groups:
        similarity[group.rows] = paddle.matmul(group.texts.features, features, transpose_y=True).numpy()
    return similarity


def contrastive_shortlist(similarity, k):
    """Which pairs are among the k best pictures of their caption or the k best captions of their picture.

    Args:
        similarity: contrastive scores ``[T, I]``; k: int >= 1.

    Returns:
        bool ``[T, I]``.
    """
    texts, images = similarity.shape
    chosen = np.zeros(similarity.shape, dtype=bool)
    pictures = np.argpartition(-similarity, min(k, images) - 1, axis=1)[:, :k]
    captions = np.argpartition(-similarity, min(k, texts) - 1, axis=0)[:k]
    np.put_along_axis(chosen, pictures, True, axis=1)
    np.put_along_axis(chosen, captions, True, axis=0)
    return chosen


def shortlist_scores(model, dataset, groups, k, image_batch=32, pair_batch=128, progress=None):
    """Scores in which the whole model judges only :func:`contrastive_shortlist`; arguments as in :func:`score_matrix`.

    Visual states are kept between the two passes up to ``STATES_KEPT`` bytes; pictures beyond that are encoded a second time.

    Returns:
        :class:`Scores` with its ``shortlist``.
    """
    count, blocks, kept = sum(len(group.rows) for group in groups), [], 0
    for block in encode_images(model, dataset, image_batch):
        kept += block.states.size * 4
        blocks.append(block if kept <= STATES_KEPT else block._replace(states=None))
    similarity = _similarity(groups, blocks, count)
    shortlist = contrastive_shortlist(similarity, k)
    place = np.concatenate([group.rows for group in groups])  # captions by length, as they stand in the groups
    group_of = np.repeat(np.arange(len(groups)), [len(group.rows) for group in groups])
    row_of = np.concatenate([np.arange(len(group.rows)) for group in groups])
    matching = np.zeros_like(similarity)
    for number, block in enumerate(blocks):
        first = number * image_batch
        if block.states is None:
            block = _encode_block(model, dataset, first, image_batch)
        blocks[number] = None
        captions, pictures = np.nonzero(shortlist[place, first: first + image_batch])
        for start in range(0, len(captions), pair_batch):
            text, image = captions[start: start + pair_batch], pictures[start: start + pair_batch]
            logits = matching_logits(model, block.take(image), _join(groups, group_of[text], row_of[text]))
            matching[place[text], first + image] = logits[:, 1].numpy()
            if progress is not None:
                progress(len(text))
    retrieval = matching + model.config.cmcl_score_weight * similarity
    rest = ~shortlist
    if rest.any():
        retrieval[rest] = retrieval[shortlist].min() - 1.0 - (similarity[rest].max() - similarity[rest])
    return Scores(retrieval, similarity, shortlist)


def _join(groups, numbers, rows):
    """Captions ``rows`` of the groups ``numbers`` (ascending) as one batch, padded to the longest."""
    parts = [groups[number].texts.take(rows[numbers == number]) for number in np.unique(numbers)]
    if len(parts) == 1:
        return parts[0]
    length = max(part.states.shape[1] for part in parts)
    states, masks = [], []
    for part in parts:
        n, own, hidden = part.states.shape
        states.append(paddle.concat([part.states, paddle.zeros([n, length - own, hidden], part.states.dtype)], axis=1))
        masks.append(paddle.concat([part.mask, paddle.zeros([n, length - own], part.mask.dtype)], axis=1))
    codes = None if parts[0].code_scores is None else paddle.concat([part.code_scores for part in parts])
    return EncodedTexts(paddle.concat(states), paddle.concat(masks), paddle.concat([part.features for part in parts]), codes)
