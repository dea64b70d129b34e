"""One Transformer layer forward and backward on CPU, compiled by numba: matrix products by the MKL inside Paddle's wheel, and between them
loops that read and write each number once (bias, GELU, softmax, dropout, residual and norm), where Paddle runs one operation after the other.

A call works on the samples ``first <= b < last`` of a batch, so that threads share a layer without waiting for each other. Addresses come in
an int64 array in the order of :data:`FORWARD`; all numbers are float32 in rows, as Paddle keeps them. ``models/fused.py`` makes it a
differentiable operation; its slow twin is ``EncoderLayer.forward``.
"""
import ctypes
import os

import numpy as np
from llvmlite import binding, ir
from numba import carray, njit, types
from numba.extending import intrinsic

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
KEEP_SCALE = np.float32(2.0 ** -24)
SINGLE = np.float32

# not "nnan": a number that is not finite has to come out as one, or the loop would not notice a broken step
_LOOSE = {"contract", "reassoc", "nsz", "arcp", "afn"}


def _compiled(**options):
    return njit(nogil=True, cache=True, error_model="numpy", **{"fastmath": _LOOSE, **options})


def _load_mkl():
    """Make MKL's single-precision product callable from compiled code under names of our own; returns its thread setting.

    Raises:
        OSError, AttributeError: this Paddle comes without MKL.
    """
    import paddle

    folder = os.path.join(os.path.dirname(paddle.__file__), "libs")
    library = ctypes.CDLL(os.path.join(folder, "libmklml_intel.so"))
    binding.add_symbol("unimo2_sgemm", ctypes.cast(library.cblas_sgemm, ctypes.c_void_p).value)
    threads = library.MKL_Set_Num_Threads_Local
    threads.argtypes, threads.restype = [ctypes.c_int], ctypes.c_int
    return threads


set_matmul_threads = _load_mkl()
_int, _address = types.int32, types.int64
_sgemm = types.ExternalFunction("unimo2_sgemm", types.void(
    _int, _int, _int, _int, _int, _int, types.float32, _address, _int, _address, _int, types.float32, _address, _int))


@intrinsic
def _float_pointer(context, address):
    """An address as a pointer to float32."""
    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.FloatType().as_pointer())
    return types.CPointer(types.float32)(types.int64), code


@intrinsic
def _power_of_two(context, exponent):
    """2 ** exponent (int32, -126 to 127) as float32, made of its bits."""
    def code(context, builder, signature, arguments):
        integer = ir.IntType(32)
        bits = builder.shl(builder.add(arguments[0], ir.Constant(integer, 127)), ir.Constant(integer, 23))
        return builder.bitcast(bits, ir.FloatType())
    return types.float32(types.int32), code


@_compiled()
def _rows(address, rows, columns):
    return carray(_float_pointer(address), (rows, columns))


@_compiled()
def _row(address, size):
    return carray(_float_pointer(address), (size,))


@_compiled()
def _product(rows, columns, inner, scale, a, a_transposed, a_stride, b, b_transposed, b_stride, add, c, c_stride):
    """c = scale * a b (+ c when ``add`` is 1) of matrices at addresses; strides count numbers."""
    _sgemm(101, 112 if a_transposed else 111, 112 if b_transposed else 111, rows, columns, inner, scale, a, a_stride, b, b_stride, add, c, c_stride)


_EXP_LOW, _LOG2E = SINGLE(-87.0), SINGLE(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = SINGLE(0.693359375), SINGLE(-2.12194440e-4)  # their sum is ln 2, the first exact in few bits
_E2, _E3, _E4, _E5, _E6 = SINGLE(0.5), SINGLE(1 / 6), SINGLE(1 / 24), SINGLE(1 / 120), SINGLE(1 / 720)
_HALF, _ONE, _ZERO = SINGLE(0.5), SINGLE(1.0), SINGLE(0.0)


@_compiled(fastmath={"contract"})
def _exp(x):
    """exp of a number that is not above 88, within 2 units in the last place: 2 ** n times the series of the rest, |rest| <= ln(2) / 2."""
    x = _EXP_LOW if x < _EXP_LOW else x  # in this order: what is not a number stays so
    whole = np.floor(x * _LOG2E + _HALF)
    rest = (x - whole * _LN2_HIGH) - whole * _LN2_LOW
    series = _ONE + rest * (_ONE + rest * (_E2 + rest * (_E3 + rest * (_E4 + rest * (_E5 + rest * _E6)))))
    return series * _power_of_two(np.int32(whole))


# x P(x^2) / Q(x^2) fitted to erf on [0, 3.95] (largest error of the fit 1.8e-8; beyond it erf is 1 in float32)
_P0, _P1, _P2, _P3, _P4, _P5 = (SINGLE(v) for v in (
    1.1283790069386253, 0.19402610066307416, 0.053205551460244964, 0.00391682560980653, 0.0002875760787941737, 2.0116501665706076e-06))
_Q1, _Q2, _Q3, _Q4, _Q5 = (SINGLE(v) for v in (
    0.5052826490916774, 0.11558656451414942, 0.01526974769244329, 0.001198055062457896, 3.78374446025924e-05))
_ERF_END, _INV_SQRT2, _INV_SQRT_2PI = SINGLE(3.95), SINGLE(0.7071067811865476), SINGLE(0.3989422804014327)


@_compiled()
def _normal_cdf(x):
    """(1 + erf(x / sqrt 2)) / 2, the factor of the GELU; absolute error below 3e-7."""
    x = x * _INV_SQRT2
    x = _ERF_END if x > _ERF_END else x
    x = -_ERF_END if x < -_ERF_END else x
    z = x * x
    above = _P0 + z * (_P1 + z * (_P2 + z * (_P3 + z * (_P4 + z * _P5))))
    below = _ONE + z * (_Q1 + z * (_Q2 + z * (_Q3 + z * (_Q4 + z * _Q5))))
    return _HALF + _HALF * x * above / below


# odd multipliers and shifts of an integer hash, each mixing high bits into low ones and back
_H0, _H1, _H2, _H3 = (np.uint32(v) for v in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x2C1B3C6D))
_S8, _S13, _S15, _S16 = (np.uint32(v) for v in (8, 13, 15, 16))


@_compiled()
def _kept(position, seed, keep):
    """1 / keep with probability ``keep``, else 0: a hash of (seed, position), so any part of a mask can be made again at any time."""
    # numba widens products of 32-bit numbers, so every step says how wide it is
    bits = np.uint32(np.uint32(np.uint32(position) * _H0) + np.uint32(seed))
    bits = np.uint32((bits ^ (bits >> _S16)) * _H1)
    bits = np.uint32((bits ^ (bits >> _S13) ^ np.uint32(seed >> 32)) * _H2)
    bits = np.uint32((bits ^ (bits >> _S15)) * _H3)
    bits = np.uint32(bits ^ (bits >> _S16)) >> _S8
    uniform = SINGLE(np.int32(bits)) * KEEP_SCALE
    return _ONE / keep if uniform < keep else _ZERO


@_compiled()
def _fill(out, bias):
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = bias[j]


@_compiled()
def _linear(x, rows, inputs, weight, bias, outputs, out):
    """out = x weight + bias, all at addresses."""
    _fill(_rows(out, rows, outputs), _row(bias, outputs))
    _product(rows, outputs, inputs, _ONE, x, False, inputs, weight, False, outputs, _ONE, out, outputs)


@_compiled()
def _norm_row(x, weight, bias, epsilon, out, statistics):
    """Layer normalisation of one row; keeps its mean and inverse deviation."""
    size = x.shape[0]
    total = _ZERO
    for j in range(size):
        total += x[j]
    mean = total / SINGLE(size)
    squares = _ZERO
    for j in range(size):
        squares += (x[j] - mean) * (x[j] - mean)
    inverse = _ONE / np.sqrt(squares / SINGLE(size) + epsilon)
    for j in range(size):
        out[j] = (x[j] - mean) * inverse * weight[j] + bias[j]
    statistics[0], statistics[1] = mean, inverse


@_compiled()
def _norm_row_backward(gradient, x, statistics, weight, out, add, d_weight, d_bias):
    """Gradient of one normalised row with respect to ``x`` (added to ``out`` when ``add``) and, summed up, to weight and bias."""
    size = x.shape[0]
    mean, inverse = statistics[0], statistics[1]
    total, along = _ZERO, _ZERO
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


@_compiled()
def _add_residual(x, residual, bias, seed, start, keep, out):
    """out = residual + dropout(x + bias) of one row whose first number has position ``start`` in the batch."""
    if keep < _ONE:
        for j in range(x.shape[0]):
            out[j] = residual[j] + (x[j] + bias[j]) * _kept(start + j, seed, keep)
    else:
        for j in range(x.shape[0]):
            out[j] = residual[j] + (x[j] + bias[j])


@_compiled()
def _dropped(x, seed, start, keep, out, total):
    """out = gradient of the dropout of one row; added to ``total``, the gradient of the bias before it."""
    if keep < _ONE:
        for j in range(x.shape[0]):
            out[j] = x[j] * _kept(start + j, seed, keep)
            total[j] += out[j]
    else:
        for j in range(x.shape[0]):
            out[j] = x[j]
            total[j] += x[j]


@_compiled(fastmath={"contract"})
def _biased(score, visible):
    """A score under the mask; in this order alone, since adding 1e4 first would round the score away."""
    return score + (visible - _ONE) * MASK_BIAS


@_compiled(fastmath=True)
def _largest(row):
    value = row[0]
    for j in range(row.shape[0]):
        value = max(value, row[j])
    return value


@_compiled()
def _below_largest(row, visible, masked, kept):
    """Scores of one query less their largest, in place; keeps that."""
    if masked:
        for j in range(row.shape[0]):
            row[j] = _biased(row[j], visible[j])
    top = _largest(row)
    for j in range(row.shape[0]):
        row[j] -= top
    kept[0] = top


@_compiled()
def _exponentials(values):
    """exp of all scores of a tile, in place: row by row the last few numbers of each would take as long as the rest."""
    for j in range(values.shape[0]):
        values[j] = _exp(values[j])


@_compiled()
def _normalised(row, kept):
    """Exponentials to weights in place; keeps the inverse of their sum."""
    total = _ZERO
    for j in range(row.shape[0]):
        total += row[j]
    inverse = _ONE / total
    for j in range(row.shape[0]):
        row[j] *= inverse
    kept[1] = inverse


@_compiled()
def _drop_weights(row, seed, start, keep):
    for j in range(row.shape[0]):
        row[j] *= _kept(start + j, seed, keep)


def scratch_size(sizes, samples):
    """Numbers of room that the backward pass needs for so many samples; the forward pass needs less."""
    _, queries, keys, hidden, _, inner, pre_norm = sizes[:7]
    rows, others = samples * queries, samples * keys
    # tiles of the attention lie where the activations were
    return rows * hidden * 4 + others * hidden * (3 if pre_norm else 2) + max(2 * rows * inner, 2 * queries * keys + keys)


@_compiled()
def _attend(p, sizes, attention_keep, at, first, last):
    """Context of the samples' queries, head by head; a tile of weights, at the address ``at``, is all that exists of them."""
    queries, keys, hidden, heads = sizes[1], sizes[2], sizes[3], sizes[4]
    width = hidden // heads
    scale = SINGLE(width ** -0.5)
    tile = _rows(at, queries, keys)
    masked = p[MASK] != 0
    for b in range(first, last):
        visible = _rows(p[MASK] + 4 * b * queries * keys, queries if masked else 0, keys)
        for head in range(heads):
            query = p[QUERY] + 4 * (b * queries * hidden + head * width)
            other = 4 * (b * keys * hidden + head * width)
            _product(queries, keys, width, scale, query, False, hidden, p[KEY] + other, True, hidden, _ZERO, at, keys)
            sums = _rows(p[SUMS] + 8 * (b * heads + head) * queries, queries, 2)
            for i in range(queries):
                _below_largest(tile[i], visible[i] if masked else tile[i], masked, sums[i])
            _exponentials(_row(at, queries * keys))
            for i in range(queries):
                _normalised(tile[i], sums[i])
                if attention_keep < _ONE:
                    _drop_weights(tile[i], sizes[8], ((b * heads + head) * queries + i) * keys, attention_keep)
            context = p[CONTEXT] + 4 * (b * queries * hidden + head * width)
            _product(queries, width, keys, _ONE, at, False, keys, p[VALUE] + other, False, hidden, _ZERO, context, hidden)


@_compiled()
def _normalise(x, rows, hidden, weight, bias, epsilon, out, statistics):
    source, target, kept = _rows(x, rows, hidden), _rows(out, rows, hidden), _rows(statistics, rows, 2)
    weights, biases = _row(weight, hidden), _row(bias, hidden)
    for i in range(rows):
        _norm_row(source[i], weights, biases, epsilon, target[i], kept[i])


@_compiled()
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
    _linear(states if pre_norm else source, rows, hidden, p[QUERY_W], p[QUERY_B], hidden, p[QUERY] + q)
    _linear(states, others, hidden, p[KEY_W], p[KEY_B], hidden, p[KEY] + s)
    _linear(states, others, hidden, p[VALUE_W], p[VALUE_B], hidden, p[VALUE] + s)
    _attend(p, sizes, attention_keep, scratch, first, last)

    at, active_at = scratch, scratch + 4 * rows * hidden
    product, active = _rows(at, rows, hidden), _rows(active_at, rows, wide)
    _product(rows, hidden, hidden, _ONE, p[CONTEXT] + q, False, hidden, p[OUTPUT_W], False, hidden, _ZERO, at, hidden)
    residual, middle, inner_input = _rows(source, rows, hidden), _rows(p[MIDDLE] + q, rows, hidden), _rows(p[INNER_INPUT] + q, rows, hidden)
    bias = _row(p[OUTPUT_B], hidden)
    between = STAT2 if pre_norm else STAT1
    weight, shift = _row(p[NORM2_W if pre_norm else NORM1_W], hidden), _row(p[NORM2_B if pre_norm else NORM1_B], hidden)
    statistics = _rows(p[between] + 8 * first * queries, rows, 2)
    for i in range(rows):
        _add_residual(product[i], residual[i], bias, sizes[9], start + i * hidden, hidden_keep, middle[i])
        _norm_row(middle[i], weight, shift, epsilon, inner_input[i], statistics[i])

    _product(rows, wide, hidden, _ONE, p[INNER_INPUT] + q, False, hidden, p[INNER_W], False, wide, _ZERO, p[INNER] + q // hidden * wide, wide)
    inner, bias = _rows(p[INNER] + q // hidden * wide, rows, wide), _row(p[INNER_B], wide)
    for i in range(rows):
        source_row, target_row = inner[i], active[i]
        if sizes[7]:
            for j in range(wide):
                value = source_row[j] + bias[j]
                target_row[j] = _ZERO if value < _ZERO else value
        else:
            for j in range(wide):
                value = source_row[j] + bias[j]
                target_row[j] = value * _normal_cdf(value)
    _product(rows, hidden, wide, _ONE, active_at, False, wide, p[OUTER_W], False, hidden, _ZERO, at, hidden)
    out, bias, seed = _rows(p[OUT] + q, rows, hidden), _row(p[OUTER_B], hidden), sizes[9] ^ 0x5DEECE66D
    if pre_norm:
        for i in range(rows):
            _add_residual(product[i], middle[i], bias, seed, start + i * hidden, hidden_keep, out[i])
        return
    end, weight, shift = _rows(p[LAST] + q, rows, hidden), _row(p[NORM2_W], hidden), _row(p[NORM2_B], hidden)
    statistics = _rows(p[STAT2] + 8 * first * queries, rows, 2)
    for i in range(rows):
        _add_residual(product[i], inner_input[i], bias, seed, start + i * hidden, hidden_keep, end[i])
        _norm_row(end[i], weight, shift, epsilon, out[i], statistics[i])


@_compiled()
def _attend_backward(p, sizes, attention_keep, d_context, d_query, d_key, d_value, at, first, last):
    """Gradients of query, key and value rows of the samples (addresses of their first rows)."""
    queries, keys, hidden, heads = sizes[1], sizes[2], sizes[3], sizes[4]
    width = hidden // heads
    scale = SINGLE(width ** -0.5)
    d_at = at + 4 * queries * keys
    tile, gradient, kept = _rows(at, queries, keys), _rows(d_at, queries, keys), _row(d_at + 4 * queries * keys, keys)
    masked, drops = p[MASK] != 0, attention_keep < _ONE
    context, d_rows = _rows(p[CONTEXT] + 4 * first * queries * hidden, (last - first) * queries, hidden), _rows(
        d_context, (last - first) * queries, hidden)
    for b in range(first, last):
        visible = _rows(p[MASK] + 4 * b * queries * keys, queries if masked else 0, keys)
        for head in range(heads):
            row = (b - first) * queries
            near, far = 4 * (b * queries * hidden + head * width), 4 * (b * keys * hidden + head * width)
            own, other = 4 * (row * hidden + head * width), 4 * ((b - first) * keys * hidden + head * width)
            _product(queries, keys, width, scale, p[QUERY] + near, False, hidden, p[KEY] + far, True, hidden, _ZERO, at, keys)
            _product(queries, keys, width, _ONE, d_context + own, False, hidden, p[VALUE] + far, True, hidden, _ZERO, d_at, keys)
            sums = _rows(p[SUMS] + 8 * (b * heads + head) * queries, queries, 2)
            for i in range(queries):
                weights, top = tile[i], sums[i, 0]
                if masked:
                    seen = visible[i]
                    for j in range(keys):
                        weights[j] = _biased(weights[j], seen[j]) - top
                else:
                    for j in range(keys):
                        weights[j] -= top
            _exponentials(_row(at, queries * keys))
            for i in range(queries):
                weights, change, inverse = tile[i], gradient[i], sums[i, 1]
                along = _ZERO  # sum over the keys of weight times its gradient, which is context times its gradient
                for j in range(head * width, (head + 1) * width):
                    along += context[row + i, j] * d_rows[row + i, j]
                if drops:
                    start = ((b * heads + head) * queries + i) * keys
                    for j in range(keys):
                        kept[j] = _kept(start + j, sizes[8], attention_keep)
                        change[j] *= kept[j]
                for j in range(keys):
                    weights[j] *= inverse
                    change[j] = weights[j] * (change[j] - along) * scale
                if drops:
                    for j in range(keys):
                        weights[j] *= kept[j]
            _product(keys, width, queries, _ONE, at, True, keys, d_context + own, False, hidden, _ZERO, d_value + other, hidden)
            _product(queries, width, keys, _ONE, d_at, False, keys, p[KEY] + far, False, hidden, _ZERO, d_query + own, hidden)
            _product(keys, width, queries, _ONE, d_at, True, keys, p[QUERY] + near, False, hidden, _ZERO, d_key + other, hidden)


@_compiled()
def _linear_backward(gradient, rows, outputs, x, inputs, weight, d_weight, d_bias, d_input, add):
    """Gradients of ``x weight + bias`` at addresses; those of weight and bias are left out where the address is 0, that of the input is added when ``add``."""
    if d_weight != 0:
        _product(inputs, outputs, rows, _ONE, x, True, inputs, gradient, False, outputs, _ZERO, d_weight, outputs)
    if d_bias != 0:
        values, total = _rows(gradient, rows, outputs), _row(d_bias, outputs)
        for i in range(rows):
            for j in range(outputs):
                total[j] += values[i, j]
    _product(rows, inputs, outputs, _ONE, gradient, False, outputs, weight, True, outputs, _ONE if add else _ZERO, d_input, inputs)


@_compiled()
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
    gradient, middle, end = _rows(d_out + q, rows, hidden), _rows(p[MIDDLE] + q, rows, hidden), _rows(p[LAST] + q, rows, hidden)
    block = 4 * rows * hidden
    direct_at, dropped_at, middle_at, query_at, key_at = scratch, scratch + block, scratch + 2 * block, scratch + 3 * block, scratch + 4 * block
    value_at = key_at + 4 * others * hidden
    normed_at = value_at + 4 * others * hidden
    active_at = normed_at + (4 * others * hidden if pre_norm else 0)
    inner_at = active_at + 4 * rows * wide
    direct, dropped, d_middle = _rows(direct_at, rows, hidden), _rows(dropped_at, rows, hidden), _rows(middle_at, rows, hidden)
    for place in _VECTORS:
        _row(grads[place], wide if place == INNER_B - size else hidden)[:] = _ZERO
    d_norm1, d_shift1 = _row(grads[NORM1_W - size], hidden), _row(grads[NORM1_B - size], hidden)
    d_norm2, d_shift2 = _row(grads[NORM2_W - size], hidden), _row(grads[NORM2_B - size], hidden)
    seed, d_bias = sizes[9] ^ 0x5DEECE66D, _row(grads[OUTER_B - size], hidden)
    last_statistics, weight = _rows(p[STAT2] + 8 * first * queries, rows, 2), _row(p[NORM2_W], hidden)
    for i in range(rows):
        if pre_norm:
            direct[i] = gradient[i]
        else:
            _norm_row_backward(gradient[i], end[i], last_statistics[i], weight, direct[i], False, d_norm2, d_shift2)
        _dropped(direct[i], seed, start + i * hidden, hidden_keep, dropped[i], d_bias)

    # feed-forward: the activation is computed again from what came into it
    inner, bias, d_bias = _rows(p[INNER] + q // hidden * wide, rows, wide), _row(p[INNER_B], wide), _row(grads[INNER_B - size], wide)
    active, d_inner = _rows(active_at, rows, wide), _rows(inner_at, rows, wide)
    _product(rows, wide, hidden, _ONE, dropped_at, False, hidden, p[OUTER_W], True, hidden, _ZERO, inner_at, wide)
    for i in range(rows):
        source, target, change = inner[i], active[i], d_inner[i]
        if sizes[7]:
            for j in range(wide):
                value = source[j] + bias[j]
                target[j] = _ZERO if value < _ZERO else value
                change[j] = change[j] if value > _ZERO else _ZERO
                d_bias[j] += change[j]
        else:
            for j in range(wide):
                value = source[j] + bias[j]
                share = _normal_cdf(value)
                target[j] = value * share
                change[j] *= share + value * _INV_SQRT_2PI * _exp(-_HALF * value * value)
                d_bias[j] += change[j]
    if with_weights:
        _product(wide, hidden, rows, _ONE, active_at, True, wide, dropped_at, False, hidden, _ZERO, grads[OUTER_W - size], hidden)
    d_inner_w = grads[INNER_W - size] if with_weights else 0
    if pre_norm:
        _linear_backward(inner_at, rows, wide, p[INNER_INPUT] + q, hidden, p[INNER_W], d_inner_w, 0, middle_at, False)
        for i in range(rows):
            _norm_row_backward(d_middle[i], middle[i], last_statistics[i], weight, direct[i], True, d_norm2, d_shift2)
    else:
        _linear_backward(inner_at, rows, wide, p[INNER_INPUT] + q, hidden, p[INNER_W], d_inner_w, 0, direct_at, True)
        first_statistics, weight = _rows(p[STAT1] + 8 * first * queries, rows, 2), _row(p[NORM1_W], hidden)
        for i in range(rows):
            _norm_row_backward(direct[i], middle[i], first_statistics[i], weight, d_middle[i], False, d_norm1, d_shift1)
        direct, middle_at = d_middle, direct_at

    # attention; direct is what goes straight through the residual to the queries
    d_bias = _row(grads[OUTPUT_B - size], hidden)
    for i in range(rows):
        _dropped(direct[i], sizes[9], start + i * hidden, hidden_keep, dropped[i], d_bias)
    d_context = middle_at
    _linear_backward(dropped_at, rows, hidden, p[CONTEXT] + q, hidden, p[OUTPUT_W], grads[OUTPUT_W - size] if with_weights else 0, 0,
                     d_context, False)
    _attend_backward(p, sizes, attention_keep, d_context, query_at, key_at, value_at, active_at, first, last)

    d_states, states = d_inputs[D_STATES] + s, p[STATES] + s
    inputs, near = _rows(states, others, hidden), p[QUERIES] + q
    same = d_inputs[D_QUERIES] == d_inputs[D_STATES]
    projected = d_states
    d_normed = _rows(normed_at, others if pre_norm else 0, hidden)
    if pre_norm:
        near = states = p[NORMED] + s
        projected = normed_at
    _linear_backward(key_at, others, hidden, states, hidden, p[KEY_W], grads[KEY_W - size] if with_weights else 0, grads[KEY_B - size],
                     projected, False)
    _linear_backward(value_at, others, hidden, states, hidden, p[VALUE_W], grads[VALUE_W - size] if with_weights else 0,
                     grads[VALUE_B - size], projected, True)
    _linear_backward(query_at, rows, hidden, near, hidden, p[QUERY_W], grads[QUERY_W - size] if with_weights else 0, grads[QUERY_B - size],
                     projected if same else d_inputs[D_QUERIES] + q, same)
    result = _rows(d_inputs[D_QUERIES] + q, rows, hidden)
    if pre_norm:
        first_statistics, weight = _rows(p[STAT1] + 8 * first * keys, others, 2), _row(p[NORM1_W], hidden)
        for i in range(rows):
            result[i] = direct[i]
            _norm_row_backward(d_normed[i], inputs[i], first_statistics[i], weight, result[i], True, d_norm1, d_shift1)
    else:
        for i in range(rows):
            for j in range(hidden):
                result[i, j] += direct[i, j]


@_compiled()
def add_partials(totals, parts, counts):
    """Add up the gradients of two threads: totals += parts, vectors of ``counts`` numbers at int64 addresses."""
    for place in range(counts.shape[0]):
        target, source = _row(totals[place], counts[place]), _row(parts[place], counts[place])
        for j in range(counts[place]):
            target[j] += source[j]


@_compiled()
def cut_patches(image, size, patch, shift, tiles, first, last):
    """Patches of images [B, S, S, 3] as rows of numbers, channel by channel [B, P, 3 * patch * patch]; both at addresses.

    Everything is moved ``shift`` pixels down and right, where zeros come in.
    """
    grid = size // patch
    pixels = carray(_float_pointer(image), (last, size, size, 3))
    out = carray(_float_pointer(tiles), (last, grid, grid, 3, patch, patch))
    for b in range(first, last):
        for y in range(grid * patch):
            for x in range(grid * patch):
                inside = y >= shift and x >= shift
                for c in range(3):
                    out[b, y // patch, x // patch, c, y % patch, x % patch] = pixels[b, y - shift, x - shift, c] if inside else _ZERO


@_compiled()
def square_sums(addresses, counts, first, last, sums):
    """Of vectors at addresses, laid end to end, the numbers ``first`` to ``last``: adds each vector's squares to its place in ``sums``."""
    start = 0
    for place in range(counts.shape[0]):
        begin, end = max(first - start, 0), min(last - start, counts[place])
        start += counts[place]
        if begin >= end:
            continue
        values, total = _row(addresses[place], end), 0.0
        for block in range(begin, end, 4096):
            part = _ZERO
            for j in range(block, min(block + 4096, end)):
                part += values[j] * values[j]
            total += part
        sums[place] += total


@_compiled()
def adamw(parameters, gradients, moments1, moments2, powers1, powers2, counts, rates, decays, beta1, beta2, epsilon, scale, first, last):
    """Paddle's AdamW on the numbers ``first`` to ``last`` of all parameters laid end to end; gradients count ``scale`` times.

    Addresses int64; rates, decays: float32 per parameter. The powers of the betas are read only.
    """
    start = 0
    for place in range(counts.shape[0]):
        begin, end = max(first - start, 0), min(last - start, counts[place])
        start += counts[place]
        if begin >= end:
            continue
        values, gradient = _row(parameters[place], end), _row(gradients[place], end)
        means, squares = _row(moments1[place], end), _row(moments2[place], end)
        correction = np.sqrt(_ONE - _row(powers2[place], 1)[0])
        rate = rates[place] * correction / (_ONE - _row(powers1[place], 1)[0])
        kept, floor = _ONE - rates[place] * decays[place], epsilon * correction
        for j in range(begin, end):
            own = gradient[j] * scale
            means[j] = beta1 * means[j] + (_ONE - beta1) * own
            squares[j] = beta2 * squares[j] + (_ONE - beta2) * own * own
            values[j] = values[j] * kept - rate * means[j] / (np.sqrt(squares[j]) + floor)


@_compiled()
def scale_numbers(addresses, factor):
    """Multiply the single numbers at addresses."""
    for place in range(addresses.shape[0]):
        _row(addresses[place], 1)[0] *= factor
