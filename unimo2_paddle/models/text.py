"""Text Transformer: token and position embeddings, norm, post-norm layers (RoBERTa-like). Parameters: ``text.*``."""
import paddle
import paddle.nn.functional as F
from paddle import nn

from unimo2_paddle.models.transformer import Encoder, layer_norm


def text_visibility(text_mask):
    """Visibility ``[B, L, L]`` of a text mask.

    A ``[B, L]`` mask becomes its outer product (a padded row sees nothing, as the authors have it); ``[B, L, L]`` is taken as it is.
    """
    if len(text_mask.shape) == 3:
        return text_mask
    return paddle.matmul(text_mask.unsqueeze(2), text_mask.unsqueeze(1))


class TextEncoder(nn.Layer):
    """Post-norm encoder over tokens; sentence ids do not exist in this model (the authors feed but never use them)."""

    def __init__(self, config):
        super().__init__()
        hidden, std = config.hidden_size, config.initializer_range
        normal = nn.initializer.TruncatedNormal(std=std)
        self.hidden_dropout = config.text_hidden_dropout_prob
        self.words = nn.Embedding(config.text_vocab_size, hidden,
                                  weight_attr=paddle.ParamAttr(name="text.word_embedding", initializer=normal))
        self.positions = nn.Embedding(config.text_max_position_embeddings, hidden,
                                      weight_attr=paddle.ParamAttr(name="text.pos_embedding", initializer=normal))
        self.norm = layer_norm("text.pre_encoder", hidden)
        self.encoder = Encoder(
            "text", config.text_enc_layers, hidden, config.text_num_attention_heads, config.text_hidden_act,
            config.text_hidden_dropout_prob, config.text_attention_probs_dropout_prob, std)

    def embed(self, input_ids, position_ids):
        """Normed embeddings ``[B, L, H]``, the input of the first layer."""
        states = self.norm(self.words(input_ids) + self.positions(position_ids))
        return F.dropout(states, self.hidden_dropout, training=self.training) if self.hidden_dropout else states

    def forward(self, input_ids, position_ids, text_mask, caches=None):
        """States ``[B, L, H]`` of ``input_ids`` and ``position_ids`` int64 ``[B, L]`` under ``text_mask`` ``[B, L]`` or ``[B, L, L]``."""
        return self.encoder(self.embed(input_ids, position_ids), text_visibility(text_mask), caches=caches)
