"""Transformer layers shared by all encoders: pre-norm (ViT) and post-norm (text, grounded, UNIMO's single stream).

Parameters carry the authors' variable names, so checkpoints load by name.
"""
import paddle
import paddle.nn.functional as F
from paddle import nn

from unimo2_paddle.models import fused

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


def length(tensor, axis=0):
    """The size of an axis: an int, or where a static Program leaves it open a scalar tensor."""
    size = tensor.shape[axis]
    return size if size >= 0 else paddle.shape(tensor)[axis]


class LayerCache:
    """Keys and values of one layer during decoding: of the prefix that all beams of an image share, and of every beam's own tokens.

    Attributes:
        prefix: (keys, values) ``[B, S, N, D]`` or ``None``; own: (keys, values) ``[B, K, T, N, D]`` or ``None``.
        weights: addresses of the layer's parameters, noted by the first fused step.
    """

    def __init__(self):
        self.prefix = self.own = self.weights = None

    def append(self, keys, values):
        """Add ``[B, K, 1, N, D]`` to the own tokens; returns all of them."""
        if self.own is not None:
            keys, values = (paddle.concat(pair, axis=2) for pair in zip(self.own, (keys, values)))
        self.own = (keys, values)
        return self.own

    def select(self, images, parents):
        """Go on with other beams.

        Args:
            images: int64 [b], the images that stay, or ``None`` when all do.
            parents: int64 ``[b, K]``, for every beam the one it continues, counted over the beams of all images.
        """
        if images is not None and self.prefix is not None:
            self.prefix = tuple(paddle.index_select(part, images) for part in self.prefix)
        rest, rows = self.own[0].shape[2:], parents.reshape([-1])
        self.own = tuple(paddle.index_select(part.reshape([-1, *rest]), rows).reshape([*parents.shape, *rest]) for part in self.own)


class MultiHeadAttention(nn.Layer):
    """Scaled dot-product attention; the query is scaled before the product, as the authors do."""

    def __init__(self, name, hidden_size, num_heads, dropout, init_std):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = linear(f"{name}_query_fc", hidden_size, hidden_size, init_std)
        self.key = linear(f"{name}_key_fc", hidden_size, hidden_size, init_std)
        self.value = linear(f"{name}_value_fc", hidden_size, hidden_size, init_std)
        self.output = linear(f"{name}_output_fc", hidden_size, hidden_size, init_std)

    def _heads(self, states):
        # a 0 keeps the axis: works for any batch and in static graph
        return states.reshape([0, 0, self.num_heads, states.shape[-1] // self.num_heads])

    def _project(self, queries, states):
        """Scaled query [B, T, N, D], key and value [B, S, N, D]."""
        size = queries.shape[-1] // self.num_heads
        return self._heads(self.query(queries).scale(size ** -0.5)), self._heads(self.key(states)), self._heads(self.value(states))

    def forward(self, queries, states, bias=None, cache=None):
        """Attend from ``queries`` [B, T, H] to ``states`` [B, S, H] under ``bias`` [B, heads, T, S]; returns [B, T, H].

        A ``cache`` (:class:`LayerCache`) keeps keys and values as the prefix of a decoding.
        """
        query, key, value = self._project(queries, states)
        if cache is not None:
            cache.prefix = (key, value)
        # einsum on [B, T, N, D] needs no transposed copies: several times faster than matmul on transposed views (CPU)
        scores = paddle.einsum("btnd,bsnd->bnts", query, key)
        if bias is not None:
            scores = scores + bias
        weights = F.softmax(scores)
        if self.dropout:
            weights = F.dropout(weights, self.dropout, training=self.training)
        context = paddle.einsum("bnts,bsnd->btnd", weights, value)
        return self.output(context.reshape([0, 0, queries.shape[-1]]))

    def step(self, queries, cache, bias=None):
        """Attend from the newest token of K beams, ``queries`` [B, K, H], to the prefix all share and to each beam's own tokens.

        Args:
            cache: :class:`LayerCache`; the newest tokens' keys and values are added to it.
            bias: ``[B, 1, 1, S]`` over the prefix, or ``None`` when all of it is visible.

        Returns:
            ``[B, K, H]``.
        """
        query, key, value = self._project(queries, queries)
        own_keys, own_values = cache.append(key.unsqueeze(2), value.unsqueeze(2))  # [B, K, T, N, D]
        own = (query.unsqueeze(2) * own_keys).sum(axis=-1).transpose([0, 3, 1, 2])  # [B, N, K, T]
        if cache.prefix is None:
            weights = F.softmax(own)
        else:
            shared = paddle.einsum("bknd,bsnd->bnks", query, cache.prefix[0])
            weights = F.softmax(paddle.concat([shared if bias is None else shared + bias, own], axis=-1))
        split = 0 if cache.prefix is None else length(cache.prefix[0], 1)
        context = (weights[:, :, :, split:].transpose([0, 2, 3, 1]).unsqueeze(4) * own_values).sum(axis=2)
        if cache.prefix is not None:
            context = context + paddle.einsum("bnks,bsnd->bknd", weights[:, :, :, :split], cache.prefix[1])
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

    def forward(self, states, bias=None, rows=None, cache=None, fuse=False):
        """Update ``states`` [B, T, H]; with ``rows`` (indices) only those positions are computed and returned, [B, len(rows), H].

        ``bias`` is that of :func:`mask_to_bias` [B, heads, T, T]; with ``fuse`` (see ``models/fused.py``) the mask itself [B, T, T].
        """
        queries = states if rows is None else paddle.index_select(states, rows, axis=1)
        if bias is not None and rows is not None:
            bias = paddle.index_select(bias, rows, axis=-2)
        if fuse:
            return fused.encoder_layer(self, states, None if rows is None else queries, bias, cache)
        if self.pre_norm:
            normed = self.attention_norm(states)
            normed_queries = normed if rows is None else self.attention_norm(queries)
            queries = queries + self._dropout(self.attention(normed_queries, normed, bias, cache))
            return queries + self._dropout(self.feed_forward(self.feed_forward_norm(queries)))
        queries = self.attention_norm(queries + self._dropout(self.attention(queries, states, bias, cache)))
        return self.feed_forward_norm(queries + self._dropout(self.feed_forward(queries)))

    def step(self, states, cache, bias=None):
        """Update the newest token of every beam, ``states`` [B, K, H]; post-norm layers (text, grounded) without dropout."""
        if fused.decodes(states):
            return fused.decoding_step(self, states, cache, bias)
        states = self.attention_norm(states + self.attention.step(states, cache, bias))
        return self.feed_forward_norm(states + self.feed_forward(states))


class Encoder(nn.Layer):
    """A stack of layers whose parameter names keep the layer's index (so a subset of layers loads the right weights).

    ``name`` precedes it with a dot; it is empty in UNIMO, which has one encoder only.
    """

    def __init__(self, name, layers, hidden_size, num_heads, activation, hidden_dropout, attention_dropout, init_std,
                 pre_norm=False, epsilon=1e-5):
        super().__init__()
        self.num_heads, self.pre_norm, self.recompute = num_heads, pre_norm, False
        prefix = f"{name}." if name else ""
        self.layers = nn.LayerList([
            EncoderLayer(f"{prefix}encoder_layer_{i}", hidden_size, num_heads, activation, hidden_dropout, attention_dropout, init_std,
                         pre_norm, epsilon) for i in layers])

    def forward(self, states, mask=None, rows=None, caches=None):
        """Run all layers.

        Args:
            states: ``[B, T, H]``.
            mask: visibility ``[B, T, T]`` (1 = visible) or ``None`` (everything visible).
            rows: int64 indices; when given the last layer computes only these positions (exact: later rows are read by nobody).
            caches: a :class:`LayerCache` per layer, to keep keys and values for :meth:`step`.

        Returns:
            ``[B, T, H]``, or ``[B, len(rows), H]``.
        """
        fuse = (not (self.pre_norm and rows is not None) and fused.applies(states, mask)
                and (caches is None or not paddle.is_grad_enabled()))  # keys and values that are kept get no gradient from the fused form
        bias = mask if fuse or mask is None else mask_to_bias(mask, self.num_heads)
        for number, layer in enumerate(self.layers):
            last = rows if number == len(self.layers) - 1 else None
            if caches is not None:
                states = layer(states, bias, last, caches[number], fuse=fuse)
            elif self.recompute and self.training and last is None:
                from paddle.distributed.fleet.utils import recompute

                # the re-entrant form breaks inside DataParallel (measured, Paddle 3.3.1)
                states = recompute(layer, states, bias, fuse=fuse, use_reentrant=False)
            else:
                states = layer(states, bias, last, fuse=fuse)
        return states

    def step(self, states, caches, bias=None):
        """Run all layers on the newest token of every beam, ``states`` [B, K, H]; see :meth:`MultiHeadAttention.step`."""
        for layer, cache in zip(self.layers, caches):
            states = layer.step(states, cache, bias)
        return states
