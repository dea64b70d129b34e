"""A whole Transformer layer as one differentiable operation on CPU, several times faster than operation by operation.

It is used for float32 layers of the dynamic graph on CPU where numba and MKL are there (``models/cpu_kernels.py``); everywhere else, and
with ``run.kernels: plain`` or ``UNIMO2_KERNELS=plain`` in the environment, ``EncoderLayer`` runs as it is written.

``paddle.grad`` with respect to a few tensors must ask for the parameters of the fused layers on the way too, or use the plain form:
Paddle refuses gradients of an operation of ours that nobody asked for.
"""
import contextlib
import functools
import importlib
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer

from unimo2_paddle.runtime import find_compile_cache

KINDS = ("auto", "plain")
KEY_PART, VALUE_PART = 2, 3  # of a layer's workspace
_chosen, _pool, _rooms = "auto", None, threading.local()


def choose(kind):
    """Which form the layers of this process take: ``"auto"`` or ``"plain"``; returns the form before."""
    global _chosen
    before, _chosen = _chosen, kind
    return before


@contextlib.contextmanager
def plain():
    """Inside, layers run as they are written."""
    before = choose("plain")
    try:
        yield
    finally:
        choose(before)


@functools.lru_cache(maxsize=None)
def kernels():
    """The compiled kernels, or ``None`` where they cannot be had."""
    if paddle.is_compiled_with_cuda() and not paddle.device.get_device().startswith("cpu"):
        return None
    find_compile_cache()
    try:
        return importlib.import_module("unimo2_paddle.models.cpu_kernels")
    except (ImportError, OSError, AttributeError):  # no numba, or a Paddle without MKL
        return None


@functools.lru_cache(maxsize=None)
def threads():
    """How many threads share a layer: those of Paddle's own operations."""
    return max(1, int(os.environ.get("OMP_NUM_THREADS", "1").split(",")[0] or 1))


def enabled():
    """Whether layers on CPU take the fused form."""
    return _chosen == "auto" and os.environ.get("UNIMO2_KERNELS") != "plain" and kernels() is not None


def applies(states, mask=None):
    """Whether layers on ``states`` [B, T, H] under the visibility ``mask`` [B, T, T] can run fused.

    A batch smaller than the threads is left to Paddle, which splits single products.
    """
    return (enabled() and paddle.in_dynamic_mode() and states.place.is_cpu_place() and states.dtype == paddle.float32
            and states.shape[0] >= threads() and (mask is None or mask.stop_gradient and mask.dtype == paddle.float32))


def _after_fork():
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_after_fork)


def _scratch(count):
    """Address of room for ``count`` numbers that belongs to this thread until its next call; kept, since fresh memory is slow."""
    room = getattr(_rooms, "room", None)
    if room is None or room.size < count:
        room = _rooms.room = np.empty(count, np.float32)
    return room.ctypes.data


def share(batch, room, work):
    """Call ``work(part, scratch, first, last)`` for parts of the samples, one per thread, each with single-threaded matrix products.

    ``room`` is the function from a number of samples to the numbers of scratch that they need, or ``None``.
    """
    global _pool
    parts = min(threads(), batch)
    bounds = [batch * i // parts for i in range(parts + 1)]
    scratch = room(-(-batch // parts)) if room else 0
    set_threads = kernels().set_matmul_threads

    def run(part):
        work(part, _scratch(scratch), bounds[part], bounds[part + 1])

    if parts > 1 and _pool is None:
        _pool = ThreadPoolExecutor(threads() - 1, "unimo2-layer", initializer=set_threads, initargs=(1,))
    waiting = [_pool.submit(run, part) for part in range(1, parts)]
    before = set_threads(1)
    try:
        run(0)
    finally:
        set_threads(before)
        for part in waiting:
            part.result()


def _parameters(layer):
    """The layer's parameters in the order of the kernels."""
    attention, feed_forward = layer.attention, layer.feed_forward
    return [parameter for part in (attention.query, attention.key, attention.value, attention.output, layer.attention_norm,
                                   feed_forward.inner, feed_forward.outer, layer.feed_forward_norm)
            for parameter in (part.weight, part.bias)]


def _sizes_of_workspace(sizes):
    """Numbers in each part of the workspace, in the order of the kernels."""
    batch, queries, keys, hidden, heads, inner, pre_norm = sizes[:7]
    rows, others = batch * queries, batch * keys
    return (others * hidden if pre_norm else 0, rows * hidden, others * hidden, others * hidden, 2 * rows * heads, rows * hidden, rows * hidden,
            rows * hidden, rows * inner, 0 if pre_norm else rows * hidden, 2 * max(rows, others), 2 * rows)


def _room(sizes):
    return functools.partial(kernels().scratch_size, sizes.tolist())


def draw_seeds():
    """Seeds of a layer's dropout in the attention and of its other dropouts, 62 bits each.

    They come from Paddle's generator, so masks follow ``paddle.seed`` and a layer that is recomputed draws them again.
    """
    bits = paddle.randint(0, 2 ** 31 - 1, [4], "int32").tolist()
    return bits[0] << 31 | bits[1], bits[2] << 31 | bits[3]


class _FusedLayer(PyLayer):
    """``layer_forward`` and ``layer_backward`` of the kernels as one node of the graph."""

    @staticmethod
    def forward(ctx, layer, cache, states, queries, mask, *parameters):
        code = kernels()
        source = states if queries is None else queries
        attention, norm = layer.attention, layer.attention_norm
        drops = [p if layer.training else 0.0 for p in (attention.dropout, layer.hidden_dropout)]
        seeds = draw_seeds() if any(drops) else (0, 0)
        sizes = np.array([states.shape[0], source.shape[1], states.shape[1], states.shape[2], attention.num_heads,
                          layer.feed_forward.inner.weight.shape[1], layer.pre_norm, layer.feed_forward.activation is F.relu, *seeds], np.int64)
        numbers = tuple(np.float32(v) for v in (norm._epsilon, 1.0 - drops[0], 1.0 - drops[1]))
        parts = np.array(_sizes_of_workspace(sizes.tolist()), np.int64)
        out, workspace = paddle.empty(source.shape, "float32"), paddle.empty([int(parts.sum())], "float32")
        ctx.save_for_backward(workspace, states, *parameters, *(t for t in (queries, mask) if t is not None))
        ctx.call = sizes, numbers, parts, queries is not None, mask is not None
        ctx.wanted = [not t.stop_gradient for t in (states, queries, mask, *parameters) if t is not None]
        addresses = _addresses(states, queries, mask, parameters, out, workspace, parts)
        share(int(sizes[0]), _room(sizes), lambda part, scratch, first, last: code.layer_forward(
            addresses, sizes, *numbers, scratch, first, last))
        if cache is not None:
            cache.prefix = _keys_and_values(workspace, parts, states.shape, attention.num_heads)
        return out

    @staticmethod
    def backward(ctx, gradient):
        code = kernels()
        sizes, numbers, parts, selects, masked = ctx.call
        workspace, states, *parameters = ctx.saved_tensor()
        mask = parameters.pop() if masked else None
        queries = parameters.pop() if selects else None
        gradient = gradient if gradient.is_contiguous() else gradient.contiguous()
        d_states = paddle.empty(states.shape, "float32")
        d_queries = None if queries is None else paddle.empty(queries.shape, "float32")
        d_parameters = [paddle.empty(p.shape, "float32") for p in parameters]
        with_weights = any(ctx.wanted[-len(parameters):])
        addresses = _addresses(states, queries, mask, parameters, None, workspace, parts)
        d_inputs = np.array([d_states.data_ptr(), d_states.data_ptr() if queries is None else d_queries.data_ptr()], np.int64)
        shares = [np.array([d.data_ptr() for d in d_parameters], np.int64)]
        counts = np.array([math.prod(d.shape) for d in d_parameters], np.int64)  # Tensor.size takes 5 us each
        spare = [np.empty(counts.sum(), np.float32) for _ in range(min(threads(), sizes[0]) - 1)]
        shares += [each.ctypes.data + 4 * (np.cumsum(counts) - counts) for each in spare]
        d_out = gradient.data_ptr()
        share(int(sizes[0]), _room(sizes), lambda part, scratch, first, last: code.layer_backward(
            addresses, sizes, *numbers, scratch, d_out, d_inputs, shares[part], with_weights, first, last))
        for part in shares[1:]:
            code.add_partials(shares[0], part, counts)
        gradients = [d_states] + ([d_queries] if selects else []) + ([None] if masked else []) + d_parameters
        return tuple(d if wanted else None for d, wanted in zip(gradients, ctx.wanted))


def _addresses(states, queries, mask, parameters, out, workspace, parts):
    """The int64 table that the kernels read."""
    inputs = [states.data_ptr(), (states if queries is None else queries).data_ptr(), 0 if mask is None else mask.data_ptr()]
    inside = workspace.data_ptr() + 4 * (np.cumsum(parts) - parts)
    return np.array([*inputs, *(p.data_ptr() for p in parameters), 0 if out is None else out.data_ptr(), *inside], np.int64)


def _contiguous(tensor):
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _keys_and_values(workspace, parts, shape, heads):
    """Copies of both ``[B, S, N, D]`` from a layer's workspace, which is many times as large."""
    batch, length, hidden = shape
    ends = np.cumsum(parts).tolist()
    return tuple(workspace[ends[place - 1]:ends[place]].clone().reshape([batch, length, heads, hidden // heads]) for place in (KEY_PART, VALUE_PART))


def encoder_layer(layer, states, queries=None, mask=None, cache=None):
    """``EncoderLayer.forward`` fused.

    Args:
        layer: an ``EncoderLayer``; states: ``[B, S, H]``.
        queries: the positions of ``states`` to compute ``[B, T, H]``, or ``None`` for all of them; not for pre-norm layers.
        mask: visibility ``[B, T, S]`` (1 = visible) or ``None``.
        cache: a ``LayerCache`` that keeps keys and values, without gradients, or ``None``.

    Returns:
        ``[B, T, H]``.
    """
    return _FusedLayer.apply(layer, cache, *map(_contiguous, (states, queries, mask)), *_parameters(layer))


def decodes(states):
    """Whether a step of decoding from ``states`` [B, K, H] can run fused."""
    return (enabled() and paddle.in_dynamic_mode() and states.place.is_cpu_place() and states.dtype == paddle.float32
            and not paddle.is_grad_enabled())


def decoding_step(layer, states, cache, bias=None):
    """``EncoderLayer.step`` fused; arguments as there."""
    from unimo2_paddle.models import decoding_kernels as code

    batch, beams, hidden = states.shape
    heads = layer.attention.num_heads
    out = paddle.empty([batch, beams, hidden], "float32")
    keys, values = (paddle.empty([batch, beams, 1, heads, hidden // heads], "float32") for _ in range(2))
    before = [None if tensor is None else _contiguous(tensor) for tensor in (*(cache.prefix or (None, None)), bias, *(cache.own or (None, None)))]
    if cache.weights is None:
        cache.weights = [parameter.data_ptr() for parameter in _parameters(layer)]
    states = _contiguous(states)
    sizes = np.array([beams, 0 if before[0] is None else before[0].shape[1], 0 if before[3] is None else before[3].shape[2], hidden, heads,
                      layer.feed_forward.inner.weight.shape[1], layer.feed_forward.activation is F.relu], np.int64)
    inputs = [0 if tensor is None else tensor.data_ptr() for tensor in (states, *before)]
    addresses = np.array([*inputs, *cache.weights, *(tensor.data_ptr() for tensor in (keys, values, out))], np.int64)
    epsilon = np.float32(layer.attention_norm._epsilon)
    share(batch, functools.partial(code.step_scratch, sizes.tolist()), lambda part, scratch, first, last: code.layer_step(
        addresses, sizes, epsilon, scratch, first, last))
    cache.append(keys, values)
    return out


def patch_tiles(image, patch, shift):
    """``VisionTransformer._tiles`` in one pass: ``[B, P, 3 * patch * patch]`` of ``image`` ``[B, S, S, 3]``, which gets no gradient."""
    image, (batch, size) = _contiguous(image), image.shape[:2]
    tiles = paddle.empty([batch, (size // patch) ** 2, 3 * patch * patch], "float32")
    source, target = image.data_ptr(), tiles.data_ptr()
    share(batch, None, lambda part, room, first, last: kernels().cut_patches(source, size, patch, shift, target, first, last))
    return tiles
