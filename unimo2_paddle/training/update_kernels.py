"""Norms of gradients and AdamW's update over all parameters at once, compiled; ``training/fused_adamw.py`` calls them."""
import numpy as np

from unimo2_paddle.models.compiled import ONE, ZERO, compiled, row_at


@compiled()
def square_sums(addresses, counts, first, last, sums):
    """Of vectors at addresses, laid end to end, the numbers ``first`` to ``last``: adds each vector's squares to its place in ``sums``."""
    start = 0
    for place in range(counts.shape[0]):
        begin, end = max(first - start, 0), min(last - start, counts[place])
        start += counts[place]
        if begin >= end:
            continue
        values, total = row_at(addresses[place], end), 0.0
        for block in range(begin, end, 4096):
            part = ZERO
            for j in range(block, min(block + 4096, end)):
                part += values[j] * values[j]
            total += part
        sums[place] += total


@compiled()
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
        values, gradient = row_at(parameters[place], end), row_at(gradients[place], end)
        means, squares = row_at(moments1[place], end), row_at(moments2[place], end)
        correction = np.sqrt(ONE - row_at(powers2[place], 1)[0])
        rate = rates[place] * correction / (ONE - row_at(powers1[place], 1)[0])
        kept, floor = ONE - rates[place] * decays[place], epsilon * correction
        for j in range(begin, end):
            own = gradient[j] * scale
            means[j] = beta1 * means[j] + (ONE - beta1) * own
            squares[j] = beta2 * squares[j] + (ONE - beta2) * own * own
            values[j] = values[j] * kept - rate * means[j] / (np.sqrt(squares[j]) + floor)


@compiled()
def scale_numbers(addresses, factor):
    """Multiply the single numbers at addresses."""
    for place in range(addresses.shape[0]):
        row_at(addresses[place], 1)[0] *= factor
