"""One step of decoding through a post-norm Transformer layer on CPU, compiled: the newest token of every beam attends to the prefix that the beams
of a sample share, to its beam's own tokens and to itself. ``models/fused.py`` calls it; its slow twin is ``EncoderLayer.step``.
"""
from unimo2_paddle.models.compiled import ONE, SINGLE, ZERO, compiled, product_at, row_at, rows_at
from unimo2_paddle.models.cpu_kernels import PARAMETERS, activated, add_residual, exponentials, largest, linear, norm_row

STEP = ("states", "prefix_keys", "prefix_values", "prefix_bias", "own_keys", "own_values", *PARAMETERS, "keys", "values", "out")
(STATES, PREFIX_K, PREFIX_V, BIAS, OWN_K, OWN_V, QUERY_W, QUERY_B, KEY_W, KEY_B, VALUE_W, VALUE_B, OUTPUT_W, OUTPUT_B, NORM1_W, NORM1_B, INNER_W,
 INNER_B, OUTER_W, OUTER_B, NORM2_W, NORM2_B, KEYS, VALUES, OUT) = range(len(STEP))
STEP_SIZES = ("beams", "prefix", "own", "hidden", "heads", "inner", "relu")


def step_scratch(sizes, samples):
    """Numbers of room that so many samples need."""
    beams, prefix, own, hidden, _, inner, _ = sizes
    return beams * (prefix + own + 1) + samples * beams * (4 * hidden + inner) + 2


@compiled()
def _dot(a, b):
    total = ZERO
    for j in range(a.shape[0]):
        total += a[j] * b[j]
    return total


@compiled()
def _add_scaled(out, weight, x):
    for j in range(x.shape[0]):
        out[j] += weight * x[j]


@compiled()
def _softmax(tile):
    """Softmax of every row in place."""
    for i in range(tile.shape[0]):
        row = tile[i]
        top = largest(row)
        for j in range(row.shape[0]):
            row[j] -= top
    exponentials(tile.reshape(-1))
    for i in range(tile.shape[0]):
        row, total = tile[i], ZERO
        for j in range(row.shape[0]):
            total += row[j]
        inverse = ONE / total
        for j in range(row.shape[0]):
            row[j] *= inverse


@compiled()
def _attend(p, sizes, query_at, context_at, tile_at, b, row):
    """Context of one sample's beams, whose queries and contexts begin at ``row`` of their buffers."""
    beams, prefix, own, hidden, heads = sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]
    width, length = hidden // heads, prefix + own + 1
    scale, tile = SINGLE(width ** -0.5), rows_at(tile_at, beams, length)
    for head in range(heads):
        column = 4 * head * width
        at, shared, out_at = query_at + 4 * row * hidden + column, 4 * b * prefix * hidden + column, context_at + 4 * row * hidden + column
        if prefix:
            product_at(beams, prefix, width, scale, at, False, hidden, p[PREFIX_K] + shared, True, hidden, ZERO, tile_at, length)
        for beam in range(beams):
            scores, query = tile[beam], row_at(at + 4 * beam * hidden, width)
            newest, older = 4 * (b * beams + beam) * hidden + column, 4 * (b * beams + beam) * own * hidden + column
            if p[BIAS] != 0:
                bias = row_at(p[BIAS] + 4 * b * prefix, prefix)
                for j in range(prefix):
                    scores[j] += bias[j]
            for t in range(own):
                scores[prefix + t] = scale * _dot(query, row_at(p[OWN_K] + older + 4 * t * hidden, width))
            scores[length - 1] = scale * _dot(query, row_at(p[KEYS] + newest, width))
        _softmax(tile)
        for beam in range(beams):
            scores, context = tile[beam], row_at(out_at + 4 * beam * hidden, width)
            newest, older = 4 * (b * beams + beam) * hidden + column, 4 * (b * beams + beam) * own * hidden + column
            context[:] = ZERO
            for t in range(own):
                _add_scaled(context, scores[prefix + t], row_at(p[OWN_V] + older + 4 * t * hidden, width))
            _add_scaled(context, scores[length - 1], row_at(p[VALUES] + newest, width))
        if prefix:
            product_at(beams, width, prefix, ONE, tile_at, False, length, p[PREFIX_V] + shared, False, hidden, ONE, out_at, hidden)


@compiled()
def layer_step(p, sizes, epsilon, scratch, first, last):
    """Output, keys and values of the newest tokens of samples ``first`` to ``last``.

    Args:
        p: int64 addresses in the order of :data:`STEP`, 0 for what is not there; sizes: int64 in the order of :data:`STEP_SIZES`.
        epsilon: float32, of the norms; scratch: address of room for :func:`step_scratch` numbers.
    """
    beams, hidden, wide = sizes[0], sizes[3], sizes[5]
    rows, start = (last - first) * beams, 4 * first * beams * hidden
    states_at, block = p[STATES] + start, 4 * rows * hidden
    query_at, context_at, mixed_at, active_at = scratch, scratch + block, scratch + 2 * block, scratch + 4 * block
    normed_at, tile_at = scratch + 3 * block, active_at + 4 * rows * wide
    statistics = row_at(tile_at + 4 * beams * (sizes[1] + sizes[2] + 1), 2)
    linear(states_at, rows, hidden, p[QUERY_W], p[QUERY_B], hidden, query_at)
    linear(states_at, rows, hidden, p[KEY_W], p[KEY_B], hidden, p[KEYS] + start)
    linear(states_at, rows, hidden, p[VALUE_W], p[VALUE_B], hidden, p[VALUES] + start)
    for b in range(first, last):
        _attend(p, sizes, query_at, context_at, tile_at, b, (b - first) * beams)

    product_at(rows, hidden, hidden, ONE, context_at, False, hidden, p[OUTPUT_W], False, hidden, ZERO, mixed_at, hidden)
    states, product, normed = rows_at(states_at, rows, hidden), rows_at(mixed_at, rows, hidden), rows_at(normed_at, rows, hidden)
    bias, weight, shift = row_at(p[OUTPUT_B], hidden), row_at(p[NORM1_W], hidden), row_at(p[NORM1_B], hidden)
    for i in range(rows):
        add_residual(product[i], states[i], bias, 0, 0, ONE, product[i])
        norm_row(product[i], weight, shift, epsilon, normed[i], statistics)
    product_at(rows, wide, hidden, ONE, normed_at, False, hidden, p[INNER_W], False, wide, ZERO, active_at, wide)
    active, bias = rows_at(active_at, rows, wide), row_at(p[INNER_B], wide)
    for i in range(rows):
        activated(active[i], bias, sizes[6] != 0, active[i])
    product_at(rows, hidden, wide, ONE, active_at, False, wide, p[OUTER_W], False, hidden, ZERO, mixed_at, hidden)
    out, bias, weight, shift = rows_at(p[OUT] + start, rows, hidden), row_at(p[OUTER_B], hidden), row_at(p[NORM2_W], hidden), row_at(p[NORM2_B], hidden)
    for i in range(rows):
        add_residual(product[i], normed[i], bias, 0, 0, ONE, product[i])
        norm_row(product[i], weight, shift, epsilon, out[i], statistics)
