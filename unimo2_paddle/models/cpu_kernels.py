"""One Transformer layer forward and backward on CPU, compiled by numba: matrix products by the MKL inside Paddle's wheel, and between them
loops that read and write each number once (bias, GELU, softmax, dropout, residual and norm), where Paddle runs one operation after the other.

A call works on the samples ``first <= b < last`` of a batch, so that threads share a layer without waiting for each other. Addresses come in
an int64 array in the order of :data:`FORWARD`; all numbers are float32 in rows, as Paddle keeps them. ``models/fused.py`` makes it a
differentiable operation; its slow twin is ``EncoderLayer.forward``.
"""
import numpy as np
from numba import carray

from unimo2_paddle.models.compiled import (
    HALF,
    INV_SQRT_2PI,
    ONE,
    SINGLE,
    ZERO,
    compiled,
    exponential,
    float_pointer,
    kept_share,
    normal_cdf,
    product_at,
    row_at,
    rows_at,
    set_matmul_threads,  # noqa: F401  for fused.py
)

PARAMETERS = ("query_weight", "query_bias", "key_weight", "key_bias", "value_weight", "value_bias", "output_weight", "output_bias",
              "norm1_weight", "norm1_bias", "inner_weight", "inner_bias", "outer_weight", "outer_bias", "norm2_weight", "norm2_bias")
FORWARD = ("states", "queries", "mask", *PARAMETERS, "out",
           # what the backward pass reads again, all of it in one workspace
           "normed", "query", "key", "value", "sums", "context", "middle", "inner_input", "inner", "last", "statistics1", "statistics2")
(STATES, QUERIES, MASK, QUERY_W, QUERY_B, KEY_W, KEY_B, VALUE_W, VALUE_B, OUTPUT_W, OUTPUT_B, NORM1_W, NORM1_B, INNER_W, INNER_B, OUTER_W,
 OUTER_B, NORM2_W, NORM2_B, OUT, NORMED, QUERY, KEY, VALUE, SUMS, CONTEXT, MIDDLE, INNER_INPUT, INNER, LAST, STAT1, STAT2) = range(len(FORWARD))
_VECTORS = tuple(PARAMETERS.index(name) for name in PARAMETERS if name.endswith("_bias") or name.startswith("norm"))
D_STATES, D_QUERIES = 0, 1  # addresses of gradients: those of both inputs, then of the parameters
SIZES = ("batch", "queries", "keys", "hidden", "heads", "inner", "pre_norm", "relu", "attention_seed", "hidden_seed")
MASK_BIAS = np.float32(1e4)


@compiled()
def _fill(out, bias):
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = bias[j]


@compiled()
def linear(x, rows, inputs, weight, bias, outputs, out):
    """out = x weight + bias, all at addresses."""
    _fill(rows_at(out, rows, outputs), row_at(bias, outputs))
    product_at(rows, outputs, inputs, ONE, x, False, inputs, weight, False, outputs, ONE, out, outputs)


@compiled()
def norm_row(x, weight, bias, epsilon, out, statistics):
    """Layer normalisation of one row; keeps its mean and inverse deviation."""
    size = x.shape[0]
    total = ZERO
    for j in range(size):
        total += x[j]
    mean = total / SINGLE(size)
    squares = ZERO
    for j in range(size):
        squares += (x[j] - mean) * (x[j] - mean)
    inverse = ONE / np.sqrt(squares / SINGLE(size) + epsilon)
    for j in range(size):
        out[j] = (x[j] - mean) * inverse * weight[j] + bias[j]
    statistics[0], statistics[1] = mean, inverse


@compiled()
def _norm_row_backward(gradient, x, statistics, weight, out, add, d_weight, d_bias):
    """Gradient of one normalised row with respect to ``x`` (added to ``out`` when ``add``) and, summed up, to weight and bias."""
    size = x.shape[0]
    mean, inverse = statistics[0], statistics[1]
    total, along = ZERO, ZERO
    for j in range(size):
        scaled = gradient[j] * weight[j]
        total += scaled
        along += scaled * (x[j] - mean)
    total = total / SINGLE(size)
    along = along * inverse * inverse / SINGLE(size)
    for j in range(size):
        centred = x[j] - mean
        d_weight[j] += gradient[j] * centred * inverse
        d_bias[j] += gradient[j]
        value = (gradient[j] * weight[j] - total - centred * along) * inverse
        out[j] = out[j] + value if add else value


@compiled()
def add_residual(x, residual, bias, seed, start, keep, out):
    """out = residual + dropout(x + bias) of one row whose first number has position ``start`` in the batch."""
    if keep < ONE:
        for j in range(x.shape[0]):
            out[j] = residual[j] + (x[j] + bias[j]) * kept_share(start + j, seed, keep)
    else:
        for j in range(x.shape[0]):
            out[j] = residual[j] + (x[j] + bias[j])


@compiled()
def _dropped(x, seed, start, keep, out, total):
    """out = gradient of the dropout of one row; added to ``total``, the gradient of the bias before it."""
    if keep < ONE:
        for j in range(x.shape[0]):
            out[j] = x[j] * kept_share(start + j, seed, keep)
            total[j] += out[j]
    else:
        for j in range(x.shape[0]):
            out[j] = x[j]
            total[j] += x[j]


@compiled(fastmath={"contract"})
def _biased(score, visible):
    """A score under the mask; in this order alone, since adding 1e4 first would round the score away."""
    return score + (visible - ONE) * MASK_BIAS


@compiled(fastmath=True)
def largest(row):
    value = row[0]
    for j in range(row.shape[0]):
        value = max(value, row[j])
    return value


@compiled()
def _below_largest(row, visible, masked, kept):
    """Scores of one query less their largest, in place; keeps that."""
    if masked:
        for j in range(row.shape[0]):
            row[j] = _biased(row[j], visible[j])
    top = largest(row)
    for j in range(row.shape[0]):
        row[j] -= top
    kept[0] = top


@compiled()
def exponentials(values):
    """exp of all scores of a tile, in place: row by row the last few numbers of each would take as long as the rest."""
    for j in range(values.shape[0]):
        values[j] = exponential(values[j])


@compiled()
def _normalised(row, kept):
    """Exponentials to weights in place; keeps the inverse of their sum."""
    total = ZERO
    for j in range(row.shape[0]):
        total += row[j]
    inverse = ONE / total
    for j in range(row.shape[0]):
        row[j] *= inverse
    kept[1] = inverse


@compiled()
def _drop_weights(row, seed, start, keep):
    for j in range(row.shape[0]):
        row[j] *= kept_share(start + j, seed, keep)


def scratch_size(sizes, samples):
    """Numbers of room that the backward pass needs for so many samples; the forward pass needs less."""
    _, queries, keys, hidden, _, inner, pre_norm = sizes[:7]
    rows, others = samples * queries, samples * keys
    # tiles of the attention lie where the activations were
    return rows * hidden * 4 + others * hidden * (3 if pre_norm else 2) + max(2 * rows * inner, 2 * queries * keys + keys)


@compiled()
def _attend(p, sizes, attention_keep, at, first, last):
    """Context of the samples' queries, head by head; a tile of weights, at the address ``at``, is all that exists of them."""
    queries, keys, hidden, heads = sizes[1], sizes[2], sizes[3], sizes[4]
    width = hidden // heads
    scale = SINGLE(width ** -0.5)
    tile = rows_at(at, queries, keys)
    masked = p[MASK] != 0
    for b in range(first, last):
        visible = rows_at(p[MASK] + 4 * b * queries * keys, queries if masked else 0, keys)
        for head in range(heads):
            query = p[QUERY] + 4 * (b * queries * hidden + head * width)
            other = 4 * (b * keys * hidden + head * width)
            product_at(queries, keys, width, scale, query, False, hidden, p[KEY] + other, True, hidden, ZERO, at, keys)
            sums = rows_at(p[SUMS] + 8 * (b * heads + head) * queries, queries, 2)
            for i in range(queries):
                _below_largest(tile[i], visible[i] if masked else tile[i], masked, sums[i])
            exponentials(row_at(at, queries * keys))
            for i in range(queries):
                _normalised(tile[i], sums[i])
                if attention_keep < ONE:
                    _drop_weights(tile[i], sizes[8], ((b * heads + head) * queries + i) * keys, attention_keep)
            context = p[CONTEXT] + 4 * (b * queries * hidden + head * width)
            product_at(queries, width, keys, ONE, at, False, keys, p[VALUE] + other, False, hidden, ZERO, context, hidden)


@compiled()
def _normalise(x, rows, hidden, weight, bias, epsilon, out, statistics):
    source, target, kept = rows_at(x, rows, hidden), rows_at(out, rows, hidden), rows_at(statistics, rows, 2)
    weights, biases = row_at(weight, hidden), row_at(bias, hidden)
    for i in range(rows):
        norm_row(source[i], weights, biases, epsilon, target[i], kept[i])


@compiled()
def activated(x, bias, relu, out):
    """out = GELU or ReLU of one row with its bias; may be the row itself."""
    if relu:
        for j in range(x.shape[0]):
            value = x[j] + bias[j]
            out[j] = ZERO if value < ZERO else value
    else:
        for j in range(x.shape[0]):
            value = x[j] + bias[j]
            out[j] = value * normal_cdf(value)


@compiled()
def layer_forward(p, sizes, epsilon, attention_keep, hidden_keep, scratch, first, last):
    """The layer's output for samples ``first`` to ``last`` and all that :func:`layer_backward` reads.

    Args:
        p: int64 addresses in the order of :data:`FORWARD`; 0 for no mask. sizes: int64 in the order of :data:`SIZES`.
        epsilon: of the norms; attention_keep, hidden_keep: 1 - dropout. All float32.
        scratch: address of room for :func:`scratch_size` numbers. (Arrays made here would be freed before a product at their address is done.)
    """
    queries, keys, hidden, wide, pre_norm = sizes[1], sizes[2], sizes[3], sizes[5], sizes[6] != 0
    rows, others = (last - first) * queries, (last - first) * keys
    start, q, s = first * queries * hidden, 4 * first * queries * hidden, 4 * first * keys * hidden
    states, source = p[STATES] + s, p[QUERIES] + q
    if pre_norm:
        _normalise(states, others, hidden, p[NORM1_W], p[NORM1_B], epsilon, p[NORMED] + s, p[STAT1] + 8 * first * keys)
        states = p[NORMED] + s
    linear(states if pre_norm else source, rows, hidden, p[QUERY_W], p[QUERY_B], hidden, p[QUERY] + q)
    linear(states, others, hidden, p[KEY_W], p[KEY_B], hidden, p[KEY] + s)
    linear(states, others, hidden, p[VALUE_W], p[VALUE_B], hidden, p[VALUE] + s)
    _attend(p, sizes, attention_keep, scratch, first, last)

    at, active_at = scratch, scratch + 4 * rows * hidden
    product, active = rows_at(at, rows, hidden), rows_at(active_at, rows, wide)
    product_at(rows, hidden, hidden, ONE, p[CONTEXT] + q, False, hidden, p[OUTPUT_W], False, hidden, ZERO, at, hidden)
    residual, middle, inner_input = rows_at(source, rows, hidden), rows_at(p[MIDDLE] + q, rows, hidden), rows_at(p[INNER_INPUT] + q, rows, hidden)
    bias = row_at(p[OUTPUT_B], hidden)
    between = STAT2 if pre_norm else STAT1
    weight, shift = row_at(p[NORM2_W if pre_norm else NORM1_W], hidden), row_at(p[NORM2_B if pre_norm else NORM1_B], hidden)
    statistics = rows_at(p[between] + 8 * first * queries, rows, 2)
    for i in range(rows):
        add_residual(product[i], residual[i], bias, sizes[9], start + i * hidden, hidden_keep, middle[i])
        norm_row(middle[i], weight, shift, epsilon, inner_input[i], statistics[i])

    product_at(rows, wide, hidden, ONE, p[INNER_INPUT] + q, False, hidden, p[INNER_W], False, wide, ZERO, p[INNER] + q // hidden * wide, wide)
    inner, bias = rows_at(p[INNER] + q // hidden * wide, rows, wide), row_at(p[INNER_B], wide)
    for i in range(rows):
        activated(inner[i], bias, sizes[7] != 0, active[i])
    product_at(rows, hidden, wide, ONE, active_at, False, wide, p[OUTER_W], False, hidden, ZERO, at, hidden)
    out, bias, seed = rows_at(p[OUT] + q, rows, hidden), row_at(p[OUTER_B], hidden), sizes[9] ^ 0x5DEECE66D
    if pre_norm:
        for i in range(rows):
            add_residual(product[i], middle[i], bias, seed, start + i * hidden, hidden_keep, out[i])
        return
    end, weight, shift = rows_at(p[LAST] + q, rows, hidden), row_at(p[NORM2_W], hidden), row_at(p[NORM2_B], hidden)
    statistics = rows_at(p[STAT2] + 8 * first * queries, rows, 2)
    for i in range(rows):
        add_residual(product[i], inner_input[i], bias, seed, start + i * hidden, hidden_keep, end[i])
        norm_row(end[i], weight, shift, epsilon, out[i], statistics[i])


@compiled()
def _attend_backward(p, sizes, attention_keep, d_context, d_query, d_key, d_value, at, first, last):
    """Gradients of query, key and value rows of the samples (addresses of their first rows)."""
    queries, keys, hidden, heads = sizes[1], sizes[2], sizes[3], sizes[4]
    width = hidden // heads
    scale = SINGLE(width ** -0.5)
    d_at = at + 4 * queries * keys
    tile, gradient, kept = rows_at(at, queries, keys), rows_at(d_at, queries, keys), row_at(d_at + 4 * queries * keys, keys)
    masked, drops = p[MASK] != 0, attention_keep < ONE
    context, d_rows = rows_at(p[CONTEXT] + 4 * first * queries * hidden, (last - first) * queries, hidden), rows_at(
        d_context, (last - first) * queries, hidden)
    for b in range(first, last):
        visible = rows_at(p[MASK] + 4 * b * queries * keys, queries if masked else 0, keys)
        for head in range(heads):
            row = (b - first) * queries
            near, far = 4 * (b * queries * hidden + head * width), 4 * (b * keys * hidden + head * width)
            own, other = 4 * (row * hidden + head * width), 4 * ((b - first) * keys * hidden + head * width)
            product_at(queries, keys, width, scale, p[QUERY] + near, False, hidden, p[KEY] + far, True, hidden, ZERO, at, keys)
            product_at(queries, keys, width, ONE, d_context + own, False, hidden, p[VALUE] + far, True, hidden, ZERO, d_at, keys)
            sums = rows_at(p[SUMS] + 8 * (b * heads + head) * queries, queries, 2)
            for i in range(queries):
                weights, top = tile[i], sums[i, 0]
                if masked:
                    seen = visible[i]
                    for j in range(keys):
                        weights[j] = _biased(weights[j], seen[j]) - top
                else:
                    for j in range(keys):
                        weights[j] -= top
            exponentials(row_at(at, queries * keys))
            for i in range(queries):
                weights, change, inverse = tile[i], gradient[i], sums[i, 1]
                along = ZERO  # sum over the keys of weight times its gradient, which is context times its gradient
                for j in range(head * width, (head + 1) * width):
                    along += context[row + i, j] * d_rows[row + i, j]
                if drops:
                    start = ((b * heads + head) * queries + i) * keys
                    for j in range(keys):
                        kept[j] = kept_share(start + j, sizes[8], attention_keep)
                        change[j] *= kept[j]
                for j in range(keys):
                    weights[j] *= inverse
                    change[j] = weights[j] * (change[j] - along) * scale
                if drops:
                    for j in range(keys):
                        weights[j] *= kept[j]
            product_at(keys, width, queries, ONE, at, True, keys, d_context + own, False, hidden, ZERO, d_value + other, hidden)
            product_at(queries, width, keys, ONE, d_at, False, keys, p[KEY] + far, False, hidden, ZERO, d_query + own, hidden)
            product_at(keys, width, queries, ONE, d_at, True, keys, p[QUERY] + near, False, hidden, ZERO, d_key + other, hidden)


@compiled()
def _linear_backward(gradient, rows, outputs, x, inputs, weight, d_weight, d_bias, d_input, add):
    """Gradients of ``x weight + bias`` at addresses; those of weight and bias are left out where the address is 0, that of the input is added when ``add``."""
    if d_weight != 0:
        product_at(inputs, outputs, rows, ONE, x, True, inputs, gradient, False, outputs, ZERO, d_weight, outputs)
    if d_bias != 0:
        values, total = rows_at(gradient, rows, outputs), row_at(d_bias, outputs)
        for i in range(rows):
            for j in range(outputs):
                total[j] += values[i, j]
    product_at(rows, inputs, outputs, ONE, gradient, False, outputs, weight, True, outputs, ONE if add else ZERO, d_input, inputs)


@compiled()
def layer_backward(p, sizes, epsilon, attention_keep, hidden_keep, scratch, d_out, d_inputs, grads, with_weights, first, last):
    """Gradients of :func:`layer_forward`.

    Args:
        d_out: address of the output's gradient; d_inputs: int64 addresses of the gradients of ``states`` and ``queries`` (the same where the
            queries are the states). grads: int64 addresses of the parameters' gradients in the order of :data:`PARAMETERS`, written for
            these samples alone. with_weights: ``False`` leaves the matrices among them out.
    """
    queries, keys, hidden, wide, pre_norm = sizes[1], sizes[2], sizes[3], sizes[5], sizes[6] != 0
    rows, others = (last - first) * queries, (last - first) * keys
    start, q, s = first * queries * hidden, 4 * first * queries * hidden, 4 * first * keys * hidden
    size = QUERY_W  # a parameter's place among the addresses is its place among the gradients plus this
    gradient, middle, end = rows_at(d_out + q, rows, hidden), rows_at(p[MIDDLE] + q, rows, hidden), rows_at(p[LAST] + q, rows, hidden)
    block = 4 * rows * hidden
    direct_at, dropped_at, middle_at, query_at, key_at = scratch, scratch + block, scratch + 2 * block, scratch + 3 * block, scratch + 4 * block
    value_at = key_at + 4 * others * hidden
    normed_at = value_at + 4 * others * hidden
    active_at = normed_at + (4 * others * hidden if pre_norm else 0)
    inner_at = active_at + 4 * rows * wide
    direct, dropped, d_middle = rows_at(direct_at, rows, hidden), rows_at(dropped_at, rows, hidden), rows_at(middle_at, rows, hidden)
    for place in _VECTORS:
        row_at(grads[place], wide if place == INNER_B - size else hidden)[:] = ZERO
    d_norm1, d_shift1 = row_at(grads[NORM1_W - size], hidden), row_at(grads[NORM1_B - size], hidden)
    d_norm2, d_shift2 = row_at(grads[NORM2_W - size], hidden), row_at(grads[NORM2_B - size], hidden)
    seed, d_bias = sizes[9] ^ 0x5DEECE66D, row_at(grads[OUTER_B - size], hidden)
    last_statistics, weight = rows_at(p[STAT2] + 8 * first * queries, rows, 2), row_at(p[NORM2_W], hidden)
    for i in range(rows):
        if pre_norm:
            direct[i] = gradient[i]
        else:
            _norm_row_backward(gradient[i], end[i], last_statistics[i], weight, direct[i], False, d_norm2, d_shift2)
        _dropped(direct[i], seed, start + i * hidden, hidden_keep, dropped[i], d_bias)

    # feed-forward: the activation is computed again from what came into it
    inner, bias, d_bias = rows_at(p[INNER] + q // hidden * wide, rows, wide), row_at(p[INNER_B], wide), row_at(grads[INNER_B - size], wide)
    active, d_inner = rows_at(active_at, rows, wide), rows_at(inner_at, rows, wide)
    product_at(rows, wide, hidden, ONE, dropped_at, False, hidden, p[OUTER_W], True, hidden, ZERO, inner_at, wide)
    for i in range(rows):
        source, target, change = inner[i], active[i], d_inner[i]
        if sizes[7]:
            for j in range(wide):
                value = source[j] + bias[j]
                target[j] = ZERO if value < ZERO else value
                change[j] = change[j] if value > ZERO else ZERO
                d_bias[j] += change[j]
        else:
            for j in range(wide):
                value = source[j] + bias[j]
                share = normal_cdf(value)
                target[j] = value * share
                change[j] *= share + value * INV_SQRT_2PI * exponential(-HALF * value * value)
                d_bias[j] += change[j]
    if with_weights:
        product_at(wide, hidden, rows, ONE, active_at, True, wide, dropped_at, False, hidden, ZERO, grads[OUTER_W - size], hidden)
    d_inner_w = grads[INNER_W - size] if with_weights else 0
    if pre_norm:
        _linear_backward(inner_at, rows, wide, p[INNER_INPUT] + q, hidden, p[INNER_W], d_inner_w, 0, middle_at, False)
        for i in range(rows):
            _norm_row_backward(d_middle[i], middle[i], last_statistics[i], weight, direct[i], True, d_norm2, d_shift2)
    else:
        _linear_backward(inner_at, rows, wide, p[INNER_INPUT] + q, hidden, p[INNER_W], d_inner_w, 0, direct_at, True)
        first_statistics, weight = rows_at(p[STAT1] + 8 * first * queries, rows, 2), row_at(p[NORM1_W], hidden)
        for i in range(rows):
            _norm_row_backward(direct[i], middle[i], first_statistics[i], weight, d_middle[i], False, d_norm1, d_shift1)
        direct, middle_at = d_middle, direct_at

    # attention; direct is what goes straight through the residual to the queries
    d_bias = row_at(grads[OUTPUT_B - size], hidden)
    for i in range(rows):
        _dropped(direct[i], sizes[9], start + i * hidden, hidden_keep, dropped[i], d_bias)
    d_context = middle_at
    _linear_backward(dropped_at, rows, hidden, p[CONTEXT] + q, hidden, p[OUTPUT_W], grads[OUTPUT_W - size] if with_weights else 0, 0,
                     d_context, False)
    _attend_backward(p, sizes, attention_keep, d_context, query_at, key_at, value_at, active_at, first, last)

    d_states, states = d_inputs[D_STATES] + s, p[STATES] + s
    inputs, near = rows_at(states, others, hidden), p[QUERIES] + q
    same = d_inputs[D_QUERIES] == d_inputs[D_STATES]
    projected = d_states
    d_normed = rows_at(normed_at, others if pre_norm else 0, hidden)
    if pre_norm:
        near = states = p[NORMED] + s
        projected = normed_at
    _linear_backward(key_at, others, hidden, states, hidden, p[KEY_W], grads[KEY_W - size] if with_weights else 0, grads[KEY_B - size],
                     projected, False)
    _linear_backward(value_at, others, hidden, states, hidden, p[VALUE_W], grads[VALUE_W - size] if with_weights else 0,
                     grads[VALUE_B - size], projected, True)
    _linear_backward(query_at, rows, hidden, near, hidden, p[QUERY_W], grads[QUERY_W - size] if with_weights else 0, grads[QUERY_B - size],
                     projected if same else d_inputs[D_QUERIES] + q, same)
    result = rows_at(d_inputs[D_QUERIES] + q, rows, hidden)
    if pre_norm:
        first_statistics, weight = rows_at(p[STAT1] + 8 * first * keys, others, 2), row_at(p[NORM1_W], hidden)
        for i in range(rows):
            result[i] = direct[i]
            _norm_row_backward(d_normed[i], inputs[i], first_statistics[i], weight, result[i], True, d_norm1, d_shift1)
    else:
        for i in range(rows):
            for j in range(hidden):
                result[i, j] += direct[i, j]


@compiled()
def add_partials(totals, parts, counts):
    """Add up the gradients of two threads: totals += parts, vectors of ``counts`` numbers at int64 addresses."""
    for place in range(counts.shape[0]):
        target, source = row_at(totals[place], counts[place]), row_at(parts[place], counts[place])
        for j in range(counts[place]):
            target[j] += source[j]


@compiled()
def cut_patches(image, size, patch, shift, tiles, first, last):
    """Patches of images [B, S, S, 3] as rows of numbers, channel by channel [B, P, 3 * patch * patch]; both at addresses.

    Everything is moved ``shift`` pixels down and right, where zeros come in.
    """
    grid = size // patch
    pixels = carray(float_pointer(image), (last, size, size, 3))
    out = carray(float_pointer(tiles), (last, grid, grid, 3, patch, patch))
    for b in range(first, last):
        for y in range(grid * patch):
            for x in range(grid * patch):
                inside = y >= shift and x >= shift
                for c in range(3):
                    out[b, y // patch, x // patch, c, y % patch, x % patch] = pixels[b, y - shift, x - shift, c] if inside else ZERO
