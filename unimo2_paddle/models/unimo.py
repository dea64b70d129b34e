"""UNIMO: one single-stream Transformer over detector regions, object tags and text (arXiv 2012.15409).

Built from the same layers as UNIMO-2; what differs between the two systems, in one place:

====================  ==========================================  =================================================
.                     UNIMO (this file)                           UNIMO-2 (``unimo2.py``)
====================  ==========================================  =================================================
image                 detector regions: features, boxes, and a    pixels through a Vision Transformer (``vit.*``)
                      global region in front (their mean)
encoders              one, over [image ; object tags ; text]      three: image, text, and grounded over both
meeting               every token sees every other                through grounded tokens of a dictionary
variable names        no prefix                                   ``vit.``, ``text.``, ``grounded.``
object tags           a segment of their own, before the text     the first part of the text
dialogue              role and turn embeddings                    none
matching              one score, product of both poolers          two logits, product of both poolers
visual entailment     sum of both poolers, two linear layers      product of both poolers, one layer
end of a sequence     ``[MASK]`` (captions: ``[SEP]``)            ``[SEP]``
adversarial training  in captioning, visual entailment            none
====================  ==========================================  =================================================

Norm epsilon (1e-5), mask bias, GELU, relu poolers, positions from 2 and the tied word head are the same in both.
"""
from dataclasses import dataclass
from typing import Optional, Sequence, Tuple

import paddle
import paddle.nn.functional as F
from paddle import nn

from unimo2_paddle.errors import UserInputError
from unimo2_paddle.models.configuration import UnimoConfig
from unimo2_paddle.models.heads import Pooler, RegionPredictor, TiedPredictor
from unimo2_paddle.models.text import TextEmbedding, text_visibility, visibility_block
from unimo2_paddle.models.transformer import Encoder, layer_norm, length, linear

HEADS = ("pooling", "matching", "masked_lm", "masked_region")
SEGMENTS = {  # what goes with a segment's first argument
    "image_features": ("image_location", "image_mask"),
    "object_ids": ("object_positions", "object_mask"),
    "input_ids": ("position_ids", "text_mask"),
}
LOCATION_SIZE = 5  # x1/W, y1/H, x2/W, y2/H, share of the picture's area


@dataclass
class UnimoOutput:
    """The encoder's output by segment; absent segments are ``None``."""

    image_states: Optional[paddle.Tensor] = None   # [B, N, H], the global region first
    object_states: Optional[paddle.Tensor] = None  # [B, O, H]
    text_states: Optional[paddle.Tensor] = None    # [B, L, H]


def joint_visibility(context_mask=None, text_mask=None):
    """Who sees whom over [context ; text], context being the image and the object tags.

    Args:
        context_mask: ``[B, C]`` or ``None``.
        text_mask: ``[B, L]``: every real position sees every real position; ``[B, L, L]`` (sequence to sequence): text sees the
            context and what the mask says, the context never sees the text; or ``None``.

    Returns:
        ``[B, T, T]``; padded rows and columns are 0.
    """
    if context_mask is None:
        return text_visibility(text_mask)
    if text_mask is None:
        return visibility_block(context_mask, context_mask)
    if len(text_mask.shape) == 2:
        return text_visibility(paddle.concat([context_mask, text_mask], axis=1))
    to_context = visibility_block(text_mask.max(axis=-1), context_mask)
    upper = paddle.concat([visibility_block(context_mask, context_mask), to_context.transpose([0, 2, 1]) * 0.0], axis=2)
    return paddle.concat([upper, paddle.concat([to_context, text_mask], axis=2)], axis=1)


def _numbers(rows):
    """int64 [R] of ints, or of scalar tensors where a static Program leaves lengths open."""
    if all(isinstance(row, int) for row in rows):
        return paddle.to_tensor(rows, dtype="int64")
    return paddle.concat([paddle.full([1], row, "int64") if isinstance(row, int) else row.astype("int64").reshape([1]) for row in rows])


class RegionEmbedding(nn.Layer):
    """norm(fc(feature) + fc(box)) of detector regions, with dropout. Parameters: ``image_emb.*``, ``image_loc.*``, ``v_pre_encoder_*``."""

    def __init__(self, config):
        super().__init__()
        hidden, std = config.hidden_size, config.initializer_range
        self.hidden_dropout = config.hidden_dropout_prob
        self.features = linear("image_emb", config.image_embedding_size, hidden, std)
        self.location = linear("image_loc", LOCATION_SIZE, hidden, std)
        self.norm = layer_norm("v_pre_encoder", hidden)

    def forward(self, image_features, image_location, delta=None):
        """``[B, N, H]`` of ``image_features`` ``[B, N, D]`` (plus ``delta``) and ``image_location`` ``[B, N, 5]``."""
        features = image_features if delta is None else image_features + delta
        states = self.norm(self.features(features) + self.location(image_location))
        return F.dropout(states, self.hidden_dropout, training=self.training) if self.hidden_dropout else states


class UnimoModel(nn.Layer):
    """The single-stream encoder and its heads. Every ``Parameter.name`` is the authors' variable name.

    Build under ``paddle.utils.unique_name.guard()`` when a process makes several models (Paddle refuses a repeated parameter name).

    Args:
        config: a ``UnimoConfig``; with ``role_type_size`` and ``turn_type_size`` text has roles and turns (dialogue).
        vision: ``False`` leaves the region embedding and the image pooler out (text-only tasks).
        heads: which output heads exist; default: pooling and masked_lm, those of a released checkpoint. ``masked_region`` has names
            of ours: the authors never released their pre-training heads.
    """

    def __init__(self, config: UnimoConfig, vision: bool = True, heads: Optional[Sequence[str]] = None) -> None:
        super().__init__()
        heads = ("pooling", "masked_lm") if heads is None else tuple(heads)
        unknown = set(heads) - set(HEADS)
        if unknown:
            raise UserInputError(f"unknown heads {sorted(unknown)}; known: {', '.join(HEADS)}")
        if not vision and {"matching", "masked_region"} & set(heads):
            raise UserInputError("the heads matching and masked_region need an image, which this model is built without (vision=False)")
        hidden, std = config.hidden_size, config.initializer_range
        self.config, self.heads = config, heads
        self.text = TextEmbedding("", config.vocab_size, config.max_position_embeddings, hidden, std, config.hidden_dropout_prob,
                                  config.role_type_size, config.turn_type_size)
        self.vision = RegionEmbedding(config) if vision else None
        self.encoder = Encoder("", range(config.num_hidden_layers), hidden, config.num_attention_heads, config.hidden_act,
                               config.hidden_dropout_prob, config.attention_probs_dropout_prob, std)
        if "pooling" in heads or "matching" in heads:
            self.text_pooler = Pooler("pooled_fc_text", hidden, std)
            self.image_pooler = Pooler("pooled_fc_image", hidden, std) if vision else None
        if "matching" in heads:
            # as in the authors' program, which leaves both to Paddle 1.8's defaults (reference notes, section 1.4)
            self.matching = nn.Linear(
                hidden, 1, weight_attr=paddle.ParamAttr(name="match_fc.w_0", initializer=nn.initializer.XavierUniform()),
                bias_attr=paddle.ParamAttr(name="match_fc.b_0", initializer=nn.initializer.Uniform(-1.0, 1.0)))
        if "masked_lm" in heads:
            self.masked_lm = TiedPredictor("mask_lm", hidden, config.vocab_size, config.hidden_act, std, tied=config.weight_sharing)
        if "masked_region" in heads:
            self.masked_region = RegionPredictor(
                "mask_region", hidden, config.image_class_size if config.image_predict_class else 0,
                config.image_embedding_size if config.image_predict_feature else 0, config.hidden_act, std)

    def set_recompute(self, enabled: bool = True) -> None:
        """Recompute layer activations in the backward pass instead of keeping them (memory for time)."""
        self.encoder.recompute = enabled

    def forward(self, image_features: Optional[paddle.Tensor] = None, image_location: Optional[paddle.Tensor] = None,
                image_mask: Optional[paddle.Tensor] = None, object_ids: Optional[paddle.Tensor] = None,
                object_positions: Optional[paddle.Tensor] = None, object_mask: Optional[paddle.Tensor] = None,
                input_ids: Optional[paddle.Tensor] = None, position_ids: Optional[paddle.Tensor] = None, text_mask: Optional[paddle.Tensor] = None,
                role_ids: Optional[paddle.Tensor] = None, turn_ids: Optional[paddle.Tensor] = None, text_delta: Optional[paddle.Tensor] = None,
                image_delta: Optional[paddle.Tensor] = None, first_only: bool = False, caches: Optional[list] = None) -> UnimoOutput:
        """Encode what is given in one sequence [image ; object tags ; text].

        These argument names are the batch interface of every UNIMO task.

        Args:
            image_features: float32 ``[B, N, D]``, row 0 the global region (the mean of the others), D = ``image_embedding_size``.
            image_location: float32 ``[B, N, 5]``: x1/W, y1/H, x2/W, y2/H, share of the area; the global region has 0, 0, 1, 1, 1.
            image_mask: float32 ``[B, N]``, 1 = region, 0 = padding.
            object_ids, object_positions: int64 ``[B, O]`` object tags, embedded like text; object_mask: float32 ``[B, O]``.
            input_ids, position_ids: int64 ``[B, L]`` (positions of real tokens start at 2; padding has id and position 1).
            text_mask: float32 ``[B, L]``, or ``[B, L, L]`` for sequence to sequence, see :func:`joint_visibility`.
            role_ids, turn_ids: int64 ``[B, L]``, in dialogue only.
            text_delta: ``[B, L, H]`` added to the text embedding sum before its norm; image_delta: ``[B, N, D]`` added to the features
                (adversarial training; never to object tags).
            first_only: compute only the first image and first text position in the last layer (exact; enough for pooled heads);
                then ``object_states`` is ``None``.
            caches: a ``LayerCache`` per layer, to decode after this prefix (see ``models/generation.py``).

        Returns:
            ``UnimoOutput``.

        Raises:
            UserInputError: nothing was given, a segment is incomplete, or the model lacks the part for it.
        """
        self._check(image_features=image_features, image_location=image_location, image_mask=image_mask, object_ids=object_ids,
                    object_positions=object_positions, object_mask=object_mask, input_ids=input_ids, position_ids=position_ids,
                    text_mask=text_mask, role_ids=role_ids, turn_ids=turn_ids)
        parts, context = [], []
        if image_features is not None:
            parts.append(self.vision(image_features, image_location, image_delta))
            context.append(image_mask)
        if object_ids is not None:
            parts.append(self.text.embed(object_ids, object_positions))
            context.append(object_mask)
        if input_ids is not None:
            parts.append(self.text.embed(input_ids, position_ids, role_ids, turn_ids, text_delta))
        mask = joint_visibility(paddle.concat(context, axis=1) if context else None, text_mask if input_ids is not None else None)
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + length(part, 1))
        rows = None
        if first_only:
            rows = ([0] if image_features is not None else []) + ([starts[-2]] if input_ids is not None else [])
        states = self.encoder(paddle.concat(parts, axis=1) if len(parts) > 1 else parts[0], mask,
                              rows=None if rows is None else _numbers(rows), caches=caches)
        if first_only:
            return UnimoOutput(image_states=states[:, :1] if image_features is not None else None,
                               text_states=states[:, -1:] if input_ids is not None else None)
        spans = [states[:, a:b] for a, b in zip(starts, starts[1:])]
        return UnimoOutput(image_states=spans.pop(0) if image_features is not None else None,
                           object_states=spans.pop(0) if object_ids is not None else None,
                           text_states=spans.pop(0) if input_ids is not None else None)

    def _check(self, **given):
        if all(given[segment] is None for segment in SEGMENTS):
            raise UserInputError(f"give {', '.join(SEGMENTS)}, or several of them")
        for segment, others in SEGMENTS.items():
            if given[segment] is not None and any(given[name] is None for name in others):
                raise UserInputError(f"{segment} need {' and '.join(others)}")
        regions = given["image_features"]
        if regions is not None and self.vision is None:
            raise UserInputError("this model was built without its region embedding (vision=False) but was given an image")
        if regions is not None and regions.shape[-1] != self.config.image_embedding_size:
            raise UserInputError(f"image_features are {regions.shape[-1]} wide, the model's image_embedding_size is "
                                 f"{self.config.image_embedding_size}")
        dialog = [given[name] is not None for name in ("role_ids", "turn_ids")]
        if given["input_ids"] is not None and self.config.dialog and not all(dialog):
            raise UserInputError("this model has role and turn embeddings (dialogue): input_ids need role_ids and turn_ids")
        if any(dialog) and not self.config.dialog:
            raise UserInputError("role_ids and turn_ids were given, but the config has no role_type_size and turn_type_size (3 and 16 in CoQA)")

    def pool_text(self, out: UnimoOutput) -> paddle.Tensor:
        """Pooled first text position ``[B, H]``."""
        return self.text_pooler(out.text_states)

    def pool_image(self, out: UnimoOutput) -> paddle.Tensor:
        """Pooled global region ``[B, H]``."""
        return self.image_pooler(out.image_states)

    def matching_score(self, out: UnimoOutput) -> paddle.Tensor:
        """Image-text matching score ``[B]`` (retrieval): fc of the product of both poolers, with dropout."""
        fused = F.dropout(self.pool_text(out) * self.pool_image(out), self.config.attention_probs_dropout_prob, training=self.training)
        return self.matching(fused).squeeze(-1)

    def mlm_logits(self, states: paddle.Tensor) -> paddle.Tensor:
        """Vocabulary logits ``[N, V]`` of text states ``[N, H]``: masked words, captions and every generated text."""
        return self.masked_lm(states, self.text.words.weight)

    def region_predictions(self, states: paddle.Tensor) -> Tuple[Optional[paddle.Tensor], Optional[paddle.Tensor]]:
        """Of masked regions' states ``[N, H]``: (class logits ``[N, C]``, features ``[N, D]``); ``None`` for what the config turns off."""
        return self.masked_region(states)


__all__ = ["UnimoModel", "UnimoOutput", "joint_visibility"]
