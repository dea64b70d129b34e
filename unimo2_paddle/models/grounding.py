"""The grounded dictionary: a codebook whose entries (grounded tokens) image and text share (UNIMO-2, "grounded learning")."""
from dataclasses import dataclass
from typing import Optional

import paddle
import paddle.nn.functional as F
from paddle import nn

from unimo2_paddle.models.transformer import linear

CODEBOOK_WEIGHT, STATE_WEIGHT = 1.0, 0.25  # weights of the two dictionary terms (authors' alpha and beta)
EPSILON = 1e-18


@dataclass
class Grounding:
    """What the dictionary returns for a batch."""

    tokens: paddle.Tensor   # [B, K, H] chosen codes
    ids: paddle.Tensor      # int64 [B, K] their indices, best first
    visible: paddle.Tensor  # [B, K] 1 where the token may be attended (0 only for padding under "normal")
    loss: Optional[paddle.Tensor] = None  # scalar dictionary loss


def _masked_mean_square(difference, valid):
    """Mean of squares per sample over the valid positions, then over the batch.

    Without padding this equals the authors' mean over everything; with padding a sample's loss does not depend on its neighbours.
    """
    per_position = difference.square().mean(axis=-1) * valid           # [B, N]
    return (per_position.sum(axis=1) / valid.sum(axis=1).clip(min=1.0)).mean()


class GroundedDictionary(nn.Layer):
    """Codebook ``vq_emb`` [C, H] with the learnt relevance temperature ``topk_temperature`` [1]."""

    def __init__(self, config):
        super().__init__()
        hidden, codes, std = config.hidden_size, config.num_codebook, config.initializer_range
        self.method, self.topk = config.grounding_method, config.topk_value
        self.codebook = self.create_parameter([codes, hidden], attr=paddle.ParamAttr(
            name="vq_emb", initializer=nn.initializer.Uniform(-1.0 / codes, 1.0 / codes)))
        self.temperature = self.create_parameter([1], attr=paddle.ParamAttr(
            name="topk_temperature", initializer=nn.initializer.Constant(100.0)))
        self.project = config.with_grounding_projection
        if self.project:
            self.patch_projection = linear("grounded.grounding_patch_projection", hidden, hidden, std)
            self.token_projection = linear("grounded.grounding_token_projection", hidden, hidden, std)

    def _projected(self, states, layer):
        return F.normalize(F.relu(layer(states)), axis=-1) if self.project else states

    def inputs(self, image_states=None, text_states=None, text_valid=None):
        """The states that choose codes, patches before tokens, each without its first position.

        Args:
            image_states: ``[B, 1 + P, H]`` or ``None``.
            text_states: ``[B, L, H]`` or ``None``; text_valid: ``[B, L]``, 1 where a token counts.

        Returns:
            states ``[B, N, H]`` and valid ``[B, N]``.
        """
        states, valid = [], []
        if image_states is not None:
            patches = self._projected(image_states[:, 1:], getattr(self, "patch_projection", None))
            states.append(patches)
            valid.append(paddle.ones_like(patches[:, :, 0]))
        if text_states is not None:
            states.append(self._projected(text_states[:, 1:], getattr(self, "token_projection", None)))
            valid.append(text_valid[:, 1:])
        if len(states) == 1:
            return states[0], valid[0]
        return paddle.concat(states, axis=1), paddle.concat(valid, axis=1)

    def relevance(self, states, codes):
        """sigmoid(temperature * <state, code>): ``[B, N, C]`` of states ``[B, N, H]`` and codes ``[C, H]`` or ``[B, C, H]``."""
        scale = self.temperature.clip(1.0, 1e4)
        return F.sigmoid(paddle.matmul(states, codes, transpose_y=True) * scale)

    @paddle.no_grad()
    def code_scores(self, states, valid):
        """Summed relevance of every code, ``[B, C]``: additive over positions, so image and text parts can be computed apart."""
        return (self.relevance(states, self.codebook) * valid.unsqueeze(2)).sum(axis=1)

    def choose(self, scores):
        """The K best codes by ``scores`` [B, C]: tokens ``[B, K, H]`` and ids ``[B, K]``, best first."""
        ids = paddle.topk(scores, self.topk, axis=-1)[1]
        return F.embedding(ids, self.codebook), ids

    def forward(self, states, valid, with_loss=True):
        """Choose grounded tokens for ``states`` [B, N, H] with ``valid`` [B, N].

        Returns:
            :class:`Grounding`; without ``with_loss`` its loss is ``None`` (negative pairs, evaluation).
        """
        return self._topk(states, valid, with_loss) if self.method == "topk" else self._nearest(states, valid, with_loss)

    def _topk(self, states, valid, with_loss):
        tokens, ids = self.choose(self.code_scores(states, valid))
        if not with_loss:
            return Grounding(tokens, ids, paddle.ones_like(tokens[:, :, 0]))
        relevance = self.relevance(states, tokens) * valid.unsqueeze(2)          # [B, N, K]
        by_state = relevance / (relevance.sum(axis=2, keepdim=True) + EPSILON)
        by_code = relevance / (relevance.sum(axis=1, keepdim=True) + EPSILON)
        pulled_states = paddle.matmul(by_code, states, transpose_x=True)         # [B, K, H]
        codebook_loss = _masked_mean_square(states.detach() - paddle.matmul(by_state, tokens), valid)
        state_loss = F.mse_loss(pulled_states, tokens.detach())
        return Grounding(tokens, ids, paddle.ones_like(tokens[:, :, 0]), CODEBOOK_WEIGHT * codebook_loss + STATE_WEIGHT * state_loss)

    def _nearest(self, states, valid, with_loss):
        with paddle.no_grad():
            distance = self.codebook.square().sum(axis=1) - 2.0 * paddle.matmul(states, self.codebook, transpose_y=True)
            ids = distance.argmin(axis=-1)                                       # [B, N]
        tokens = F.embedding(ids, self.codebook)
        if not with_loss:
            return Grounding(tokens, ids, valid)
        codebook_loss = _masked_mean_square(tokens - states.detach(), valid)
        state_loss = _masked_mean_square(tokens.detach() - states, valid)
        return Grounding(tokens, ids, valid, CODEBOOK_WEIGHT * codebook_loss + STATE_WEIGHT * state_loss)
