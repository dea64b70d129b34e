"""Transformer layers shared by the three encoders: pre-norm (ViT) and post-norm (text, grounded).

Parameters carry the authors' variable names, so checkpoints load by name.
"""
import paddle
import paddle.nn.functional as F
from paddle import nn

MASK_BIAS = 1e4


def linear(name, in_features, out_features, init_std):
    """A fully connected layer with parameters ``{name}.w_0`` [in, out] and ``{name}.b_0`` [out]."""
    return nn.Linear(
        in_features, out_features,
        weight_attr=paddle.ParamAttr(name=f"{name}.w_0", initializer=nn.initializer.TruncatedNormal(std=init_std)),
        bias_attr=paddle.ParamAttr(name=f"{name}.b_0"))


def layer_norm(name, size, epsilon=1e-5):
    """Layer normalisation with parameters ``{name}_layer_norm_scale`` and ``{name}_layer_norm_bias`` [size]."""
    return nn.LayerNorm(
        size, epsilon=epsilon,
        weight_attr=paddle.ParamAttr(name=f"{name}_layer_norm_scale"),
        bias_attr=paddle.ParamAttr(name=f"{name}_layer_norm_bias"))


def mask_to_bias(mask, num_heads):
    """Additive attention bias of a visibility mask, expanded to all heads once per batch.

    Args:
        mask: float32 ``[B, T, S]``, 1 where query t may look at key s.
        num_heads: attention heads.

    Returns:
        float32 ``[B, heads, T, S]``: 0 where visible, -1e4 elsewhere (the authors' value). Expanding here costs one copy a batch;
        broadcasting inside every layer is several times slower on CPU.
    """
    bias = (mask - 1.0) * MASK_BIAS
    return bias.unsqueeze(1).expand([-1, num_heads, -1, -1])


class MultiHeadAttention(nn.Layer):
    """Scaled dot-product attention; the query is scaled before the product, as the authors do."""

    def __init__(self, name, hidden_size, num_heads, dropout, init_std):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = linear(f"{name}_query_fc", hidden_size, hidden_size, init_std)
        self.key = linear(f"{name}_key_fc", hidden_size, hidden_size, init_std)
        self.value = linear(f"{name}_value_fc", hidden_size, hidden_size, init_std)
        self.output = linear(f"{name}_output_fc", hidden_size, hidden_size, init_std)

    def forward(self, queries, states, bias=None):
        """Attend from ``queries`` [B, T, H] to ``states`` [B, S, H] under ``bias`` [B, heads, T, S]; returns [B, T, H]."""
        size = queries.shape[-1] // self.num_heads
        heads = [0, 0, self.num_heads, size]  # a 0 keeps the axis: works for any batch and in static graph
        query = self.query(queries).scale(size ** -0.5).reshape(heads)  # [B, T, N, D]
        key = self.key(states).reshape(heads)  # [B, S, N, D]
        value = self.value(states).reshape(heads)
        # einsum on [B, T, N, D] needs no transposed copies: several times faster than matmul on transposed views (CPU)
        scores = paddle.einsum("btnd,bsnd->bnts", query, key)
        if bias is not None:
            scores = scores + bias
        weights = F.softmax(scores)
        if self.dropout:
            weights = F.dropout(weights, self.dropout, training=self.training)
        context = paddle.einsum("bnts,bsnd->btnd", weights, value)
        return self.output(context.reshape([0, 0, queries.shape[-1]]))


class FeedForward(nn.Layer):
    """Two fully connected layers of width 4H with the activation between; no dropout inside."""

    def __init__(self, name, hidden_size, activation, init_std):
        super().__init__()
        self.activation = {"gelu": F.gelu, "relu": F.relu}[activation]  # F.gelu is the erf form
        self.inner = linear(f"{name}_fc_0", hidden_size, 4 * hidden_size, init_std)
        self.outer = linear(f"{name}_fc_1", 4 * hidden_size, hidden_size, init_std)

    def forward(self, states):
        return self.outer(self.activation(self.inner(states)))


class EncoderLayer(nn.Layer):
    """One Transformer layer, pre-norm or post-norm; residual order is dropout, add(, norm)."""

    def __init__(self, name, hidden_size, num_heads, activation, hidden_dropout, attention_dropout, init_std, pre_norm, epsilon):
        super().__init__()
        self.pre_norm, self.hidden_dropout = pre_norm, hidden_dropout
        place = "pre" if pre_norm else "post"
        self.attention = MultiHeadAttention(f"{name}_multi_head_att", hidden_size, num_heads, attention_dropout, init_std)
        self.attention_norm = layer_norm(f"{name}_{place}_att", hidden_size, epsilon)
        self.feed_forward = FeedForward(f"{name}_ffn", hidden_size, activation, init_std)
        self.feed_forward_norm = layer_norm(f"{name}_{place}_ffn", hidden_size, epsilon)

    def _dropout(self, states):
        return F.dropout(states, self.hidden_dropout, training=self.training) if self.hidden_dropout else states

    def forward(self, states, bias=None, rows=None):
        """Update ``states`` [B, T, H]; with ``rows`` (indices) only those positions are computed and returned, [B, len(rows), H]."""
        queries = states if rows is None else paddle.index_select(states, rows, axis=1)
        if bias is not None and rows is not None:
            bias = paddle.index_select(bias, rows, axis=2)
        if self.pre_norm:
            normed = self.attention_norm(states)
            normed_queries = normed if rows is None else self.attention_norm(queries)
            queries = queries + self._dropout(self.attention(normed_queries, normed, bias))
            return queries + self._dropout(self.feed_forward(self.feed_forward_norm(queries)))
        queries = self.attention_norm(queries + self._dropout(self.attention(queries, states, bias)))
        return self.feed_forward_norm(queries + self._dropout(self.feed_forward(queries)))


class Encoder(nn.Layer):
    """A stack of layers whose parameter names keep the layer's index (so a subset of layers loads the right weights)."""

    def __init__(self, name, layers, hidden_size, num_heads, activation, hidden_dropout, attention_dropout, init_std,
                 pre_norm=False, epsilon=1e-5):
        super().__init__()
        self.num_heads, self.recompute = num_heads, False
        self.layers = nn.LayerList([
            EncoderLayer(f"{name}.encoder_layer_{i}", hidden_size, num_heads, activation, hidden_dropout, attention_dropout, init_std,
                         pre_norm, epsilon) for i in layers])

    def forward(self, states, mask=None, rows=None):
        """Run all layers.

        Args:
            states: ``[B, T, H]``.
            mask: visibility ``[B, T, T]`` (1 = visible) or ``None`` (everything visible).
            rows: int64 indices; when given the last layer computes only these positions (exact: later rows are read by nobody).

        Returns:
            ``[B, T, H]``, or ``[B, len(rows), H]``.
        """
        bias = None if mask is None else mask_to_bias(mask, self.num_heads)
        for number, layer in enumerate(self.layers):
            last = rows if number == len(self.layers) - 1 else None
            if self.recompute and self.training and last is None:
                from paddle.distributed.fleet.utils import recompute

                # the re-entrant form breaks inside DataParallel (measured, Paddle 3.3.1)
                states = recompute(layer, states, bias, use_reentrant=False)
            else:
                states = layer(states, bias, last)
        return states
