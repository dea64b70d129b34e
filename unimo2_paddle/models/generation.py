"""Captions and other texts: beam search, greedy search and sampling with cached keys and values.

The prefix (UNIMO-2: image, grounded tokens, object tags or source text; UNIMO: regions, object tags, source text) is computed once per
sample and shared by its beams; every step computes one token per beam. Beam search follows the authors' decoders step by step (golden
cases 10e to 10k, v1_40 to v1_52): scores are divided by a length penalty at every step, a finished hypothesis keeps its place and its
score, an unfinished one competes with the score it has.
"""
from dataclasses import dataclass, field
from typing import List

import numpy as np
import paddle
import paddle.nn.functional as F

from unimo2_paddle.errors import UserInputError
from unimo2_paddle.models.losses import log_softmax
from unimo2_paddle.models.text import source_mask
from unimo2_paddle.models.transformer import MASK_BIAS, LayerCache

METHODS = ("beam", "greedy", "sample")
FIRST_POSITION = 2     # position of [CLS], which starts every text
BLOCKED = -65000.0     # added to a candidate that repeats a trigram (the authors' value)


@dataclass
class Decoding:
    """How texts are searched.

    ``min_length``: tokens between [CLS] and the end token, at least; ``max_length``: tokens after [CLS], at most.
    ``length_penalty``: scores are divided by ((5 + length) / 6) to this power. ``samples``: texts per input of ``sample``.
    ``top_k`` (0: all) and ``top_p`` restrict sampling to the most probable tokens; ``temperature`` flattens it.
    ``attend_padded_tags``: padded object tags are attended while decoding, as the authors have it in UNIMO-2; a caption then depends
    on the images it shares a batch with. UNIMO never attends them.
    """

    method: str = "beam"
    beam_size: int = 5
    length_penalty: float = 0.6
    min_length: int = 5
    max_length: int = 50
    block_trigrams: bool = False
    samples: int = 1
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    attend_padded_tags: bool = False

    def problems(self):
        lowest = {"beam_size": 1, "length_penalty": 0, "min_length": 0, "max_length": 1, "samples": 1, "top_k": 0}
        found = [f"{key}: must be at least {low}, is {getattr(self, key)}" for key, low in lowest.items() if getattr(self, key) < low]
        if self.method not in METHODS:
            found.append(f"method: {self.method!r} is not one of {', '.join(METHODS)}")
        if self.min_length > self.max_length:
            found.append(f"min_length: {self.min_length} is above max_length {self.max_length}")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p: must be above 0 and at most 1, is {self.top_p}")
        if self.temperature <= 0:
            found.append(f"temperature: must be above 0, is {self.temperature}")
        return found


@dataclass
class Hypothesis:
    """One text: ``ids`` start with [CLS] and end with the end token unless it was cut at the maximum length; ``scores`` has the score after
    every token (0 for [CLS]): length-penalised in beam search, else the summed log-probability."""

    ids: List[int] = field(default_factory=list)
    scores: List[float] = field(default_factory=list)

    def finished(self, end_id):
        """Whether the text has ended."""
        return len(self.ids) > 1 and self.ids[-1] == end_id

    def tokens(self, special):
        """The ids without those in ``special`` ([CLS], the end token and others)."""
        return [i for i in self.ids if i not in special]


class PrefixCache:
    """Keys and values of a batch of pictures and their object tags, or of source texts, and of the tokens generated so far.

    Made by :meth:`encode`, or for ``model`` alone and filled with ``stacks`` and biases that were stored (an exported model).
    """

    BIASES = ("text_bias", "grounded_bias")  # [B, 1, 1, S] over the stacks' prefixes, None where everything is visible

    def __init__(self, model):
        self.model = model
        self.text = [LayerCache() for _ in model.text.encoder.layers]
        self.grounded = [LayerCache() for _ in model.grounded_encoder.layers]
        self.text_bias = self.grounded_bias = None

    @classmethod
    def encode(cls, model, image_states, tags=None, attend_padded_tags=False):
        """The cache after the prefix.

        Args:
            model: ``Unimo2Model`` with the masked_lm head, in evaluation mode.
            image_states: ``[B, 1 + P, H]``, or ``None`` to go on with a text.
            tags: (input_ids, position_ids, mask), each ``[B, L]``: object tags, or the source text; ``None`` for a picture without tags.
            attend_padded_tags: see :class:`Decoding`.
        """
        self = cls(model)
        text_states = mask = None
        if tags is not None:
            ids, positions, mask = tags
            text_states = model.encode_text(ids, positions, mask, caches=self.text)
            self.text_bias = ((mask - 1.0) * MASK_BIAS).unsqueeze([1, 2])  # [B, 1, 1, L]
        layout = "pair" if image_states is None else "caption"  # as in training: source text and grounded tokens see each other
        grounding = model.ground(image_states, text_states, mask, layout, with_loss=False) if model.grounded else None
        model.fuse(image_states, text_states, mask, layout, grounding=grounding, caches=self.grounded)
        if tags is not None and not attend_padded_tags:
            parts = [] if image_states is None else [paddle.zeros_like(image_states[:, :, 0])]
            parts += [] if grounding is None else [(grounding.visible - 1.0) * MASK_BIAS]
            self.grounded_bias = paddle.concat(parts + [self.text_bias[:, 0, 0]], axis=1).unsqueeze([1, 2])
        return self

    @property
    def stacks(self):
        """The layers' caches by stack."""
        return {"text": self.text, "grounded": self.grounded}

    def step(self, tokens, step):
        """Logits ``[B, K, V]`` of the next token after feeding ``tokens`` int64 ``[B, K]``, the text's number ``step`` (from 0; or int64 ``[1]``)."""
        states = self.model.text.embed(tokens, paddle.zeros_like(tokens) + (FIRST_POSITION + step))
        states = self.model.text.encoder.step(states, self.text, self.text_bias)
        states = self.model.grounded_encoder.step(states, self.grounded, self.grounded_bias)
        return self.model.mlm_logits(states)

    def select(self, images, parents):
        """Go on with these images and beams, see :meth:`LayerCache.select`."""
        for cache in self.text + self.grounded:
            cache.select(images, parents)
        if images is not None:
            self.text_bias, self.grounded_bias = (None if bias is None else paddle.index_select(bias, images)
                                                  for bias in (self.text_bias, self.grounded_bias))


class SingleStreamCache:
    """Keys and values of a batch of UNIMO prefixes ([image ; object tags ; source text]), and of the tokens generated so far; made as
    :class:`PrefixCache`."""

    BIASES = ("bias",)  # padded positions of the prefix are never attended

    def __init__(self, model, first_positions=FIRST_POSITION):
        self.model, self.first, self.bias = model, first_positions, None
        self.layers = [LayerCache() for _ in model.encoder.layers]

    @classmethod
    def encode(cls, model, prefix, first_positions=FIRST_POSITION):
        """The cache after the prefix.

        Args:
            model: ``UnimoModel`` with the masked_lm head, in evaluation mode.
            prefix: arguments of ``UnimoModel.forward``.
            first_positions: position of every text's [CLS], int64 ``[B, 1]``, or one int for all.
        """
        self = cls(model, first_positions)
        model(**prefix, caches=self.layers)
        masks = [prefix[key] for key in ("image_mask", "object_mask") if prefix.get(key) is not None]
        if prefix.get("text_mask") is not None:
            masks.append(source_mask(prefix["text_mask"]))
        self.bias = ((paddle.concat(masks, axis=1) - 1.0) * MASK_BIAS).unsqueeze([1, 2])  # [B, 1, 1, S]
        return self

    @property
    def stacks(self):
        """The layers' caches by stack."""
        return {"encoder": self.layers}

    def step(self, tokens, step):
        """Logits ``[B, K, V]`` of the next token after feeding ``tokens`` int64 ``[B, K]``, the text's number ``step`` (from 0; or int64 ``[1]``)."""
        zeros = paddle.zeros_like(tokens) if self.model.config.dialog else None  # the answer has role 0, turn 0
        states = self.model.text.embed(tokens, paddle.zeros_like(tokens) + (self.first + step), zeros, zeros)
        return self.model.mlm_logits(self.model.encoder.step(states, self.layers, self.bias))

    def select(self, images, parents):
        """Go on with these samples and beams, see :meth:`LayerCache.select`."""
        for cache in self.layers:
            cache.select(images, parents)
        if images is not None:
            self.bias = paddle.index_select(self.bias, images)
            if not isinstance(self.first, int):
                self.first = paddle.index_select(self.first, images)


@paddle.no_grad()
def generate(model, image, start_id, end_id, options, tags=None, word_starts=None):
    """Caption a batch of pictures, or go on with a batch of source texts, by UNIMO-2.

    Args:
        model: ``Unimo2Model`` in evaluation mode, with the masked_lm head (and vision for pictures).
        image: float32 ``[B, S, S, 3]``, normalised; ``None`` to go on with the texts ``tags``.
        start_id, end_id: [CLS] and the end token, [SEP].
        options: :class:`Decoding`.
        tags: object tags or source texts (input_ids, position_ids, mask), each ``[B, L]``, or ``None`` for no tags.
        word_starts: bool ``[V]``, which tokens begin a word (``Tokenizer.word_start_table``); needed to block trigrams.

    Returns:
        per sample a list of :class:`Hypothesis`, best first: ``beam_size`` of beam search, 1 of greedy, ``samples`` of sampling.

    Raises:
        UserInputError: the model cannot generate, has too few positions, or ``word_starts`` is missing.
    """
    if image is not None and model.vision is None or "masked_lm" not in model.heads:
        raise UserInputError("captions need a model with its visual Transformer and the masked_lm head")
    if image is None and tags is None:
        raise UserInputError("give pictures to caption, or source texts (tags)")
    _check(options, word_starts, FIRST_POSITION, model.config.text_max_position_embeddings)
    cache = PrefixCache.encode(model, None if image is None else model.encode_image(image), tags, options.attend_padded_tags)
    return search(cache, len(tags[0] if image is None else image), start_id, end_id, options, word_starts)


@paddle.no_grad()
def generate_from_prefix(model, prefix, start_id, end_id, options, word_starts=None, first_positions=None):
    """Generate text after a batch of prefixes by UNIMO: captions, summaries, questions, answers.

    Args:
        model: ``UnimoModel`` in evaluation mode, with the masked_lm head.
        prefix: arguments of ``UnimoModel.forward``, a dict: regions and object tags, or a source text (with roles and turns).
        start_id, end_id: [CLS] and the end token ([MASK] in sequence to sequence, [SEP] in captioning).
        options, word_starts: as in :func:`generate`.
        first_positions: int64 ``[B]``, position of every text's [CLS]; default 2. With continuous positions training puts it after the
            source, at its length + 2; the authors' decoder starts at the length itself (golden case v1_44).

    Returns:
        As :func:`generate`.

    Raises:
        UserInputError: the model cannot generate, has too few positions, or ``word_starts`` is missing.
    """
    if "masked_lm" not in model.heads:
        raise UserInputError("generating text needs a model with the masked_lm head")
    size = len(next(value for value in prefix.values() if value is not None))
    latest = FIRST_POSITION if first_positions is None else int(first_positions.max())
    _check(options, word_starts, latest, model.config.max_position_embeddings)
    first = FIRST_POSITION if first_positions is None else first_positions.unsqueeze(1)
    return search(SingleStreamCache.encode(model, prefix, first), size, start_id, end_id, options, word_starts)


def search(cache, size, start_id, end_id, options, word_starts):
    """Step by step, the hypotheses of ``size`` samples whose prefixes ``cache`` holds (anything with the ``step`` and ``select`` of
    :class:`PrefixCache`); see :func:`generate`."""
    width = {"beam": 1, "greedy": 1, "sample": options.samples}[options.method]
    active = [[Hypothesis([start_id], [0.0]) for _ in range(width)] for _ in range(size)]
    done, numbers = [None] * len(active), list(range(len(active)))
    for step in range(options.max_length):
        tokens = paddle.to_tensor(np.array([[h.ids[-1] for h in beams] for beams in active], dtype="int64"))
        logits = cache.step(tokens, step)
        if step < options.min_length:
            logits[:, :, end_id] = logits[:, :, end_id] - 1e18
        advance = _beam_step if options.method == "beam" else _single_step
        following = advance(logits, active, step, end_id, options, word_starts)
        ended = [all(h.finished(end_id) for h, _ in beams) for beams in following]
        kept = [row for row, over in enumerate(ended) if not over]
        for row, beams in enumerate(following):
            done[numbers[row]] = [h for h, _ in beams]
        if not kept:
            break
        width = len(active[0])
        parents = np.array([[row * width + parent for _, parent in following[row]] for row in kept], dtype="int64")
        cache.select(paddle.to_tensor(np.array(kept)) if len(kept) < len(active) else None, paddle.to_tensor(parents))
        active, numbers = [[h for h, _ in following[row]] for row in kept], [numbers[row] for row in kept]
    return [sorted(beams, key=lambda h: -h.scores[-1]) for beams in done]


def _check(options, word_starts, first, positions):
    limit = positions - first
    if options.max_length > limit:
        raise UserInputError(f"max_length {options.max_length}: the model has positions for {limit} tokens; lower max_length")
    if options.block_trigrams and word_starts is None:
        raise UserInputError("block_trigrams needs the table of tokens that begin a word (Tokenizer.word_start_table)")


def _beam_step(logits, active, step, end_id, options, word_starts):
    """The best ``beam_size`` continuations of every image as lists of (hypothesis, number of its parent)."""
    width = min(options.beam_size, logits.shape[-1])
    values, ids = paddle.topk(logits, width, axis=-1)
    largest = F.softmax(logits).max(axis=-1, keepdim=True).numpy()  # of the probabilities: cheaper than the log of all
    values, ids = values.numpy(), ids.numpy()
    values, ids = (values - values[:, :, :1] + np.log(largest)).tolist(), ids.tolist()
    before, after = ((5.0 + step) / 6.0) ** options.length_penalty, ((6.0 + step) / 6.0) ** options.length_penalty
    following = []
    for row, beams in enumerate(active):
        candidates = []
        for parent, beam in enumerate(beams):
            if beam.finished(end_id):
                candidates.append((beam.scores[-1], parent, None))
                continue
            for value, token in zip(values[row][parent], ids[row][parent]):
                blocked = BLOCKED if options.block_trigrams and repeats_trigram(beam.ids + [token], word_starts) else 0.0
                candidates.append(((beam.scores[-1] * before + blocked + value) / after, parent, token))
        best = sorted(candidates, key=lambda candidate: -candidate[0])[:options.beam_size]
        following.append([(beams[parent] if token is None else _extended(beams[parent], token, score), parent)
                          for score, parent, token in best])
    return following


def _single_step(logits, active, step, end_id, options, word_starts):
    """One continuation of every hypothesis: its best token, or a drawn one."""
    if options.block_trigrams:
        logits = logits + paddle.to_tensor(_trigram_penalty(active, logits.shape[-1], word_starts))
    values = log_softmax(logits)
    if options.method == "greedy":
        chosen = values.argmax(axis=-1)
    else:
        noise = paddle.rand(logits.shape).clip(1e-20, 1.0 - 1e-7)
        chosen = (restrict(logits / options.temperature, options.top_k, options.top_p) - paddle.log(-paddle.log(noise))).argmax(axis=-1)
    scores = paddle.take_along_axis(values, chosen.unsqueeze(2), axis=2).numpy()[:, :, 0]
    chosen = chosen.numpy()
    return [[(beam if beam.finished(end_id) else _extended(beam, int(chosen[row, k]), beam.scores[-1] + float(scores[row, k])), k)
             for k, beam in enumerate(beams)] for row, beams in enumerate(active)]


def _extended(beam, token, score):
    return Hypothesis(beam.ids + [token], beam.scores + [score])


def restrict(logits, top_k=0, top_p=1.0):
    """Logits ``[..., V]`` with everything but the ``top_k`` best tokens, and but the best ones that together reach probability
    ``top_p``, at -1e9."""
    if top_k and top_k < logits.shape[-1]:
        least = paddle.topk(logits, top_k, axis=-1)[0][..., -1:]
        logits = paddle.where(logits < least, paddle.full_like(logits, -1e9), logits)
    if top_p < 1.0:
        ordered = paddle.sort(logits, axis=-1, descending=True)
        shares = F.softmax(ordered)
        reached = shares.cumsum(axis=-1) - shares >= top_p  # the better tokens reach it without this one
        least = paddle.where(reached, paddle.full_like(ordered, 1e9), ordered).min(axis=-1, keepdim=True)
        logits = paddle.where(logits < least, paddle.full_like(logits, -1e9), logits)
    return logits


def words_of(ids, word_starts):
    """Token ids joined to words (tuples of ids): a piece that begins no word belongs to the one before."""
    words = []
    for i in ids:
        if word_starts[i] or not words:
            words.append((i,))
        else:
            words[-1] += (i,)
    return words


def repeats_trigram(ids, word_starts):
    """Whether the last three words occurred before in the same order."""
    words = words_of(ids, word_starts)
    trigrams = [tuple(words[i: i + 3]) for i in range(len(words) - 2)]
    return len(trigrams) > 1 and trigrams[-1] in trigrams[:-1]


def _trigram_penalty(active, vocabulary, word_starts):
    """``[B, K, V]``: BLOCKED for every token that would repeat a trigram.

    Only tokens that ended a trigram before, or go on in a word of one, can repeat it, so only those are tried.
    """
    penalty = np.zeros([len(active), len(active[0]), vocabulary], dtype="float32")
    for row, beams in enumerate(active):
        for k, beam in enumerate(beams):
            for token in set(beam.ids):
                if repeats_trigram(beam.ids + [token], word_starts):
                    penalty[row, k, token] = BLOCKED
    return penalty
