"""Text: token and position embeddings with their norm (both systems), and UNIMO-2's text Transformer (RoBERTa-like, post-norm)."""
import paddle
import paddle.nn.functional as F
from paddle import nn

from unimo2_paddle.models.transformer import Encoder, layer_norm


def visibility_block(rows, columns):
    """Visibility block ``[B, R, C]`` in which every valid row sees every valid column (``[B, R]``, ``[B, C]``)."""
    return paddle.matmul(rows.unsqueeze(2), columns.unsqueeze(1))


def text_visibility(text_mask):
    """Visibility ``[B, L, L]`` of a text mask.

    A ``[B, L]`` mask becomes its outer product (a padded row sees nothing, as the authors have it); ``[B, L, L]`` is taken as it is.
    """
    if len(text_mask.shape) == 3:
        return text_mask
    return visibility_block(text_mask, text_mask)


def source_mask(text_mask):
    """Which text positions are real and readable by everybody, ``[B, L]``.

    Of a ``[B, L, L]`` sequence-to-sequence mask that is what the first position sees (the source side), so that no target token
    leaks through the grounded tokens.
    """
    return text_mask if len(text_mask.shape) == 2 else text_mask[:, 0]


class TextEmbedding(nn.Layer):
    """Sum of word and position embeddings (and of role and turn, where there are such tables), norm, dropout.

    Sentence ids do not exist in these models: the authors feed but never use them.

    Args:
        prefix: of the parameter names, ``"text."`` in UNIMO-2, empty in UNIMO.
        words, positions: rows of the tables; hidden_size, init_std, dropout: as in the config.
        roles, turns: rows of the dialogue tables (UNIMO), 0 for none.
    """

    def __init__(self, prefix, words, positions, hidden_size, init_std, dropout, roles=0, turns=0):
        super().__init__()
        normal = nn.initializer.TruncatedNormal(std=init_std)

        def table(name, rows):
            return nn.Embedding(rows, hidden_size, weight_attr=paddle.ParamAttr(name=f"{prefix}{name}", initializer=normal))

        self.hidden_dropout = dropout
        self.words, self.positions = table("word_embedding", words), table("pos_embedding", positions)
        self.roles, self.turns = (table("role_embedding", roles), table("turn_embedding", turns)) if roles else (None, None)
        self.norm = layer_norm(f"{prefix}pre_encoder", hidden_size)

    def embed(self, input_ids, position_ids, role_ids=None, turn_ids=None, delta=None):
        """Normed embeddings ``[B, L, H]``, the input of the first layer, of int64 ``[B, L]`` ids.

        ``delta`` ``[B, L, H]``, an adversarial perturbation, is added to the sum before the norm.
        """
        states = self.words(input_ids) + self.positions(position_ids)
        if role_ids is not None:
            states = states + self.roles(role_ids) + self.turns(turn_ids)
        if delta is not None:
            states = states + delta
        states = self.norm(states)
        return F.dropout(states, self.hidden_dropout, training=self.training) if self.hidden_dropout else states


class TextEncoder(TextEmbedding):
    """UNIMO-2's post-norm encoder over tokens. Parameters: ``text.*``."""

    def __init__(self, config):
        super().__init__("text.", config.text_vocab_size, config.text_max_position_embeddings, config.hidden_size,
                         config.initializer_range, config.text_hidden_dropout_prob)
        self.encoder = Encoder(
            "text", config.text_enc_layers, config.hidden_size, config.text_num_attention_heads, config.text_hidden_act,
            config.text_hidden_dropout_prob, config.text_attention_probs_dropout_prob, config.initializer_range)

    def forward(self, input_ids, position_ids, text_mask, caches=None):
        """States ``[B, L, H]`` of ``input_ids`` and ``position_ids`` int64 ``[B, L]`` under ``text_mask`` ``[B, L]`` or ``[B, L, L]``."""
        return self.encoder(self.embed(input_ids, position_ids), text_visibility(text_mask), caches=caches)
