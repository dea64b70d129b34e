"""UNIMO-2: a visual, a text and a grounded Transformer that meet in a dictionary of grounded tokens (arXiv 2203.09067)."""
from dataclasses import dataclass
from typing import Optional, Sequence, Tuple

import paddle
import paddle.nn.functional as F
from paddle import nn

from unimo2_paddle.errors import UserInputError
from unimo2_paddle.models.configuration import Unimo2Config
from unimo2_paddle.models.grounding import GroundedDictionary, Grounding
from unimo2_paddle.models.heads import Pooler, TiedPredictor
from unimo2_paddle.models.text import TextEncoder, source_mask, text_visibility, visibility_block
from unimo2_paddle.models.transformer import Encoder, layer_norm, linear
from unimo2_paddle.models.vision import VisionTransformer

HEADS = ("pooling", "matching", "masked_lm", "masked_grounding")


@dataclass
class Unimo2Output:
    """Everything one forward computes; absent parts are ``None``."""

    image_states: Optional[paddle.Tensor] = None    # [B, 1+P, H] ViT output
    text_states: Optional[paddle.Tensor] = None     # [B, L, H] text encoder output
    grounded_tokens: Optional[paddle.Tensor] = None  # [B, K, H] chosen codes (before masking, positions and norm)
    grounded_ids: Optional[paddle.Tensor] = None    # [B, K]
    grounding_loss: Optional[paddle.Tensor] = None  # scalar
    fused_image: Optional[paddle.Tensor] = None     # [B, 1+P, H] grounded encoder output
    fused_grounded: Optional[paddle.Tensor] = None  # [B, K, H]
    fused_text: Optional[paddle.Tensor] = None      # [B, L, H]


def joint_visibility(image_states=None, grounded_visible=None, text_mask=None, layout="pair", baseline=False):
    """Who sees whom in the grounded encoder, over [image ; grounded ; text] (reference notes, section 1.1).

    Args:
        image_states: ``[B, V, H]`` or ``None``; grounded_visible: ``[B, K]`` or ``None`` (baseline); text_mask: ``[B, L]``, ``[B, L, L]`` or ``None``.
        layout: ``"pair"``: image and text meet only through grounded tokens (the baseline has none, so they see each other);
            ``"caption"``: text sees the image and the grounded tokens, which never see text.

    Returns:
        ``[B, T, T]``, or ``None`` when everything is visible.
    """
    if text_mask is None and (grounded_visible is None or image_states is None):
        return None
    parts = {}
    if image_states is not None:
        parts["image"] = paddle.ones_like(image_states[:, :, 0])
    if grounded_visible is not None:
        parts["grounded"] = grounded_visible
    if text_mask is not None:
        parts["text"] = source_mask(text_mask)
        square = text_visibility(text_mask)
        # the authors let padded caption rows see the image; elsewhere a padded row sees nothing
        text_rows = paddle.ones_like(parts["text"]) if layout == "caption" else square.max(axis=-1)
    hidden = set()
    if layout == "caption":
        hidden = {("image", "text"), ("grounded", "text")}
    elif not baseline:
        hidden = {("image", "text"), ("text", "image")}
    rows = []
    for row, row_valid in parts.items():
        if row == "text":
            row_valid = text_rows
        blocks = []
        for column, column_valid in parts.items():
            if (row, column) == ("text", "text"):
                blocks.append(square)
            else:
                block = visibility_block(row_valid, column_valid)
                blocks.append(block * 0.0 if (row, column) in hidden else block)
        rows.append(paddle.concat(blocks, axis=2))
    return paddle.concat(rows, axis=1)


class Unimo2Model(nn.Layer):
    """The grounded model, or with ``config.model_type == "baseline"`` the paper's ablation without the dictionary.

    Every ``Parameter.name`` is the authors' variable name. Build under ``paddle.utils.unique_name.guard()`` when a process makes
    several models (Paddle refuses a repeated parameter name).

    Args:
        config: a ``Unimo2Config``.
        vision: ``False`` leaves the ViT out (text-only tasks); text: ``False`` leaves the text encoder out (image-only tasks).
        heads: which output heads exist; default: pooling, matching, masked_lm, and masked_grounding when ``config.with_grounding_mask``.
    """

    def __init__(self, config: Unimo2Config, vision: bool = True, heads: Optional[Sequence[str]] = None, text: bool = True) -> None:
        super().__init__()
        if not text and config.with_grounding_pos:
            raise UserInputError("with_grounding_pos takes its positions from the text encoder, which this model is built without (text=False)")
        if heads is None:
            heads = HEADS if config.with_grounding_mask and config.model_type == "grounded" else HEADS[:3]
        unknown = set(heads) - set(HEADS)
        if unknown:
            raise UserInputError(f"unknown heads {sorted(unknown)}; known: {', '.join(HEADS)}")
        hidden, std = config.hidden_size, config.initializer_range
        self.config, self.heads = config, tuple(heads)
        self.grounded = config.model_type == "grounded"
        self.vision = VisionTransformer(config) if vision else None
        self.text = TextEncoder(config) if text else None
        self.grounded_encoder = Encoder(
            "grounded", config.grounding_enc_layers, hidden, config.num_attention_heads, config.hidden_act,
            config.hidden_dropout_prob, config.attention_probs_dropout_prob, std)
        if self.grounded:
            self.dictionary = GroundedDictionary(config)
            self.grounded_norm = layer_norm("grounded.pre_encoder", hidden)
        self.contrastive_temperature = self.create_parameter([1], attr=paddle.ParamAttr(
            name="cmcl_temperature", initializer=nn.initializer.Constant(0.07)))
        if "pooling" in heads:
            if text:
                self.text_pooler = Pooler("grounded.pooled_fc_text", hidden, std)
            if vision:
                self.image_pooler = Pooler("grounded.pooled_fc_image", hidden, std)
        if config.with_cmcl_projection and config.cmcl_share_parameters:
            self.contrastive_text = self.dictionary.token_projection
            self.contrastive_image = self.dictionary.patch_projection
        elif config.with_cmcl_projection:
            self.contrastive_text = linear("grounded.cmcl_pooled_fc_text", hidden, hidden, std)
            self.contrastive_image = linear("grounded.cmcl_pooled_fc_image", hidden, hidden, std)
        if "matching" in heads and vision and text:
            self.matching = linear("grounded.img_text_matching_fc", hidden, 2, std)
        if "masked_lm" in heads and text:
            self.masked_lm = TiedPredictor(
                "grounded.mask_lm", hidden, config.text_vocab_size, config.hidden_act, std, tied=config.weight_sharing)
        if "masked_grounding" in heads and self.grounded:
            self.masked_grounding = TiedPredictor(
                "grounded.mask_g", hidden, config.num_codebook, config.hidden_act, std, tied=config.weight_sharing)

    def set_recompute(self, enabled: bool = True) -> None:
        """Recompute layer activations in the backward pass instead of keeping them (memory for time)."""
        for part in (self.text, self.vision):
            if part is not None:
                part.encoder.recompute = enabled
        self.grounded_encoder.recompute = enabled

    def encode_image(self, image: paddle.Tensor) -> paddle.Tensor:
        """ViT states ``[B, 1+P, H]`` of ``image`` float32 ``[B, S, S, 3]``."""
        if self.vision is None:
            raise UserInputError("this model was built without its visual Transformer (vision=False) but was given an image")
        return self.vision(image)

    def encode_text(self, input_ids: paddle.Tensor, position_ids: paddle.Tensor, text_mask: paddle.Tensor,
                    caches: Optional[list] = None) -> paddle.Tensor:
        """Text states ``[B, L, H]`` of ``input_ids``, ``position_ids`` int64 ``[B, L]``, ``text_mask`` ``[B, L]`` or ``[B, L, L]``."""
        if self.text is None:
            raise UserInputError("this model was built without its text encoder (text=False) but was given text")
        return self.text(input_ids, position_ids, text_mask, caches)

    def ground(self, image_states: Optional[paddle.Tensor] = None, text_states: Optional[paddle.Tensor] = None,
               text_mask: Optional[paddle.Tensor] = None, layout: str = "pair", with_loss: bool = True) -> Grounding:
        """Choose grounded tokens; with ``layout="caption"`` from the patches only. Returns a ``Grounding``."""
        valid = None
        if layout == "caption" and image_states is not None:
            text_states = None
        if text_states is not None:
            valid = source_mask(text_mask)
            if self.config.grounding_counts_padding:
                valid = paddle.ones_like(valid)
        return self.dictionary(*self.dictionary.inputs(image_states, text_states, valid), with_loss=with_loss)

    def fuse(self, image_states: Optional[paddle.Tensor] = None, text_states: Optional[paddle.Tensor] = None,
             text_mask: Optional[paddle.Tensor] = None, layout: str = "pair", grounding: Optional[Grounding] = None,
             token_mask: Optional[paddle.Tensor] = None, first_only: bool = False, with_grounding_loss: bool = True,
             caches: Optional[list] = None) -> Unimo2Output:
        """Run the grounded encoder over [image ; grounded ; text].

        Args:
            image_states: ``[B, 1+P, H]`` or ``None``; text_states ``[B, L, H]`` or ``None`` with its ``text_mask``.
            layout: ``"pair"`` or ``"caption"``, see :func:`joint_visibility`.
            grounding: a ready ``Grounding`` (default: chosen here).
            token_mask: ``[B, K]``, 1 where a grounded token is hidden (zeroed before positions and norm).
            first_only: compute only the first image and first text position in the last layer (exact; enough for every pooled head).
            with_grounding_loss: ``False`` saves the dictionary loss where nobody wants it.
            caches: a ``LayerCache`` per layer of the grounded encoder, for decoding (see ``models/generation.py``).

        Returns:
            ``Unimo2Output``; with ``first_only`` the fused parts have one position and ``fused_grounded`` is ``None``.
        """
        parts, out = [], Unimo2Output(image_states=image_states, text_states=text_states)
        if image_states is not None:
            parts.append(image_states)
        if self.grounded:
            grounding = grounding or self.ground(image_states, text_states, text_mask, layout, with_grounding_loss)
            out.grounded_tokens, out.grounded_ids, out.grounding_loss = grounding.tokens, grounding.ids, grounding.loss
            tokens = grounding.tokens
            if token_mask is not None:
                tokens = tokens * (1.0 - token_mask).unsqueeze(2)
            if self.config.with_grounding_pos and layout == "pair":
                tokens = tokens + self.text.positions.weight[2: 2 + tokens.shape[1]]
            tokens = self.grounded_norm(tokens)
            if self.config.hidden_dropout_prob:
                tokens = F.dropout(tokens, self.config.hidden_dropout_prob, training=self.training)
            parts.append(tokens)
        if text_states is not None:
            parts.append(text_states)
        mask = joint_visibility(image_states, grounding.visible if self.grounded else None,
                                None if text_states is None else text_mask, layout, baseline=not self.grounded)
        states = paddle.concat(parts, axis=1) if len(parts) > 1 else parts[0]
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + part.shape[1])
        if first_only:
            return self._first_rows(out, states, mask, starts, image_states is not None, text_states is not None)
        fused = self.grounded_encoder(states, mask, caches=caches)
        # the last part reaches to the end, so its length may be open (static graph)
        spans = [fused[:, a:b] for a, b in zip(starts, [*starts[1:-1], None])]
        if image_states is not None:
            out.fused_image = spans.pop(0)
        if self.grounded:
            out.fused_grounded = spans.pop(0)
        if text_states is not None:
            out.fused_text = spans.pop(0)
        return out

    def _first_rows(self, out, states, mask, starts, with_image, with_text):
        rows = ([0] if with_image else []) + ([starts[-2]] if with_text else [])
        fused = self.grounded_encoder(states, mask, rows=paddle.to_tensor(rows, dtype="int64"))
        if with_image:
            out.fused_image = fused[:, :1]
        if with_text:
            out.fused_text = fused[:, -1:]
        return out

    def forward(self, image: Optional[paddle.Tensor] = None, input_ids: Optional[paddle.Tensor] = None, position_ids: Optional[paddle.Tensor] = None,
                text_mask: Optional[paddle.Tensor] = None, layout: str = "pair", token_mask: Optional[paddle.Tensor] = None) -> Unimo2Output:
        """Encode what is given and fuse it.

        Args:
            image: float32 ``[B, S, S, 3]`` or ``None``.
            input_ids, position_ids: int64 ``[B, L]`` or ``None`` (positions of real tokens start at 2).
            text_mask: float32 ``[B, L]`` (1 = token) or ``[B, L, L]`` (sequence to sequence).
            layout: ``"pair"`` or ``"caption"``.
            token_mask: see :meth:`fuse`.

        Returns:
            ``Unimo2Output``.

        Raises:
            UserInputError: nothing was given, text parts are incomplete, or the layout is unknown.
        """
        if layout not in ("pair", "caption"):
            raise UserInputError(f"layout {layout!r} is not one of pair, caption")
        if image is None and input_ids is None:
            raise UserInputError("give an image, input_ids, or both")
        if input_ids is not None and (position_ids is None or text_mask is None):
            raise UserInputError("input_ids need position_ids and text_mask")
        image_states = None if image is None else self.encode_image(image)
        text_states = None if input_ids is None else self.encode_text(input_ids, position_ids, text_mask)
        return self.fuse(image_states, text_states, text_mask, layout, token_mask=token_mask)

    def pool_text(self, out: Unimo2Output) -> paddle.Tensor:
        """Pooled fused text ``[B, H]``."""
        return self.text_pooler(out.fused_text)

    def pool_image(self, out: Unimo2Output) -> paddle.Tensor:
        """Pooled fused image ``[B, H]``."""
        return self.image_pooler(out.fused_image)

    def fused_features(self, out: Unimo2Output, fusion: Optional[str] = None) -> paddle.Tensor:
        """Pooled image and text combined by product or sum (``config.fusion_method``), with dropout: ``[B, H]``."""
        text, image = self.pool_text(out), self.pool_image(out)
        fused = text * image if (fusion or self.config.fusion_method) == "mul" else text + image
        return F.dropout(fused, self.config.attention_probs_dropout_prob, training=self.training)

    def matching_logits(self, out: Unimo2Output, fusion: Optional[str] = None) -> paddle.Tensor:
        """Image-text matching logits ``[B, 2]``; column 1 = the pair belongs together."""
        return self.matching(self.fused_features(out, fusion))

    def contrastive_features(self, image_states: Optional[paddle.Tensor] = None, text_states: Optional[paddle.Tensor] = None,
                             normalise: str = "image") -> Tuple[Optional[paddle.Tensor], Optional[paddle.Tensor]]:
        """Features of the unimodal encoders for contrastive learning, ``[B, H]`` each (``None`` for an absent side).

        With ``with_cmcl_projection`` both are projected and L2-normalised. Without it the authors normalise only the image side
        (``normalise="image"``: scores and in-batch loss) or neither (``"none"``: their loss across ranks).
        """
        config = self.config
        image = text = None
        if config.with_cmcl_projection:
            if image_states is not None:
                image = F.normalize(F.relu(self.contrastive_image(image_states[:, 0])), axis=-1)
            if text_states is not None:
                text = F.normalize(F.relu(self.contrastive_text(text_states[:, 0])), axis=-1)
            return image, text
        if image_states is not None:
            image = F.normalize(image_states[:, 0], axis=-1) if normalise == "image" else image_states[:, 0]
        if text_states is not None:
            text = text_states[:, 0]
        return image, text

    def contrastive_score(self, out: Unimo2Output) -> paddle.Tensor:
        """Dot product of the contrastive features, ``[B]`` (no temperature)."""
        image, text = self.contrastive_features(out.image_states, out.text_states)
        return (image * text).sum(axis=-1)

    def retrieval_score(self, out: Unimo2Output) -> paddle.Tensor:
        """matching logit 1 + ``cmcl_score_weight`` * contrastive score, ``[B]``."""
        return self.matching_logits(out)[:, 1] + self.config.cmcl_score_weight * self.contrastive_score(out)

    def temperature(self) -> paddle.Tensor:
        """The contrastive temperature, clipped to [0.001, 0.5] as when it is used."""
        return self.contrastive_temperature.clip(0.001, 0.5)

    def mlm_logits(self, states: paddle.Tensor) -> paddle.Tensor:
        """Vocabulary logits ``[N, V]`` of fused text states ``[N, H]`` (also the caption head)."""
        return self.masked_lm(states, self.text.words.weight)

    def masked_grounding_logits(self, states: paddle.Tensor) -> paddle.Tensor:
        """Codebook logits ``[N, C]`` of fused grounded states ``[N, H]``."""
        return self.masked_grounding(states, self.dictionary.codebook)


__all__ = ["Unimo2Model", "Unimo2Output", "Grounding", "joint_visibility", "source_mask"]
