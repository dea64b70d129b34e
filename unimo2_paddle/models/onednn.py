"""Evaluation on CPU through paddle.inference and oneDNN: every stack of layers becomes a program of its own, in float32 or bfloat16.

What lies around the stacks (patches, embeddings, the choice of grounded tokens, heads) is a hundredth of the work and stays in the dynamic
graph, so scores, decoding and reports need not know of it. Paddle 3.3.1's oneDNN cannot run the patch embedding and the resized positions anyway.
The slow twin is ``Encoder.forward``; the first sample of every program is compared with it.
"""
import os
import tempfile

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.static import InputSpec

from unimo2_paddle.errors import UserInputError
from unimo2_paddle.models.transformer import MASK_BIAS, Encoder

PRECISIONS = ("dynamic", "fp32", "bf16")
TOLERANCES = {"fp32": 1e-3, "bf16": 0.5}  # relative; float32 differs by rounding only
ROUNDING = 1e-6  # less than bfloat16 can do: it was not used


class _Stack(nn.Layer):
    """The layers of an ``Encoder`` in evaluation, in the form that oneDNN runs best: products on [B, heads, T, D], one bias for all heads."""

    def __init__(self, encoder, inputs):
        super().__init__()
        self.encoder, self.inputs = encoder, inputs

    def forward(self, states, first=None, second=None):
        given = dict(zip(self.inputs, (first, second)))
        bias = (given["mask"].unsqueeze(1) - 1.0) * MASK_BIAS if "mask" in given else None  # [B, 1, T, S]
        layers, rows = list(self.encoder.layers), given.get("rows")
        for layer in layers[:-1]:
            states = self._layer(layer, states, states, bias)
        queries = states
        if rows is not None:
            queries = paddle.index_select(states, rows, axis=1)
            bias = None if bias is None else paddle.index_select(bias, rows, axis=2)
        return self._layer(layers[-1], queries, states, bias)

    def _layer(self, layer, queries, states, bias):
        if layer.pre_norm:
            normed = layer.attention_norm(states)
            normed_queries = normed if queries is states else layer.attention_norm(queries)
            queries = queries + self._attention(layer.attention, normed_queries, normed, bias)
            return queries + layer.feed_forward(layer.feed_forward_norm(queries))
        queries = layer.attention_norm(queries + self._attention(layer.attention, queries, states, bias))
        return layer.feed_forward_norm(queries + layer.feed_forward(queries))

    def _attention(self, attention, queries, states, bias):
        width = queries.shape[-1]
        size = width // attention.num_heads

        def heads(tensor):
            return tensor.reshape([0, 0, attention.num_heads, size]).transpose([0, 2, 1, 3])  # [B, N, T, D]

        scores = paddle.matmul(heads(attention.query(queries)), heads(attention.key(states)), transpose_y=True) * size ** -0.5
        weights = F.softmax(scores if bias is None else scores + bias)
        context = paddle.matmul(weights, heads(attention.value(states)))
        return attention.output(context.transpose([0, 2, 1, 3]).reshape([0, 0, width]))


class _Program:
    """A stack with one set of inputs besides the states, saved and opened again by paddle.inference."""

    def __init__(self, encoder, hidden, inputs, precision):
        from paddle import inference

        shapes = {"mask": ([None, None, None], "float32"), "rows": ([None], "int64")}
        specs = [InputSpec([None, None, hidden], "float32", "states"), *(InputSpec(*shapes[name], name) for name in inputs)]
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "stack")
            paddle.jit.save(_Stack(encoder, inputs), path, input_spec=specs)
            graph = ".json" if os.path.isfile(path + ".json") else ".pdmodel"
            config = inference.Config(path + graph, path + ".pdiparams")
            config.disable_glog_info()
            config.enable_mkldnn()
            if precision == "bf16":
                config.enable_mkldnn_bfloat16()  # ignored in silence by a processor without AVX-512: see _check
            config.set_cpu_math_library_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
            self.predictor = inference.create_predictor(config)
        self.inputs = {name: self.predictor.get_input_handle(name) for name in self.predictor.get_input_names()}
        self.output = self.predictor.get_output_handle(self.predictor.get_output_names()[0])

    def run(self, tensors):
        for name, handle in self.inputs.items():
            handle.copy_from_cpu(np.ascontiguousarray(tensors[name].numpy()))
        self.predictor.run()
        return paddle.to_tensor(self.output.copy_to_cpu())


class _Engine:
    """The programs of one ``Encoder``, made when they are first needed."""

    def __init__(self, encoder, name, precision, differences):
        self.encoder, self.name, self.precision, self.differences = encoder, name, precision, differences
        self.forward, self.programs = encoder.forward, {}

    def run(self, states, mask=None, rows=None, caches=None):
        """As the stack's own ``forward``; training, gradients and decoding's prefix go there."""
        if caches is not None or self.encoder.training or paddle.is_grad_enabled() or not len(self.encoder.layers):
            return self.forward(states, mask, rows, caches)
        given = {name: value for name, value in (("mask", mask), ("rows", rows)) if value is not None}
        if tuple(given) in self.programs:
            return self.programs[tuple(given)].run({"states": states, **given})
        program = _Program(self.encoder, states.shape[-1], tuple(given), self.precision)
        found = program.run({"states": states, **given})
        self._check(found[:1], self.forward(states[:1], None if mask is None else mask[:1], rows))
        self.programs[tuple(given)] = program
        return found

    def _check(self, found, expected):
        scale = float(expected.square().mean().sqrt()) or 1.0
        difference = float((found - expected).square().mean().sqrt()) / scale
        self.differences[self.name] = max(difference, self.differences.get(self.name, 0.0))
        if self.precision == "bf16" and difference < ROUNDING:
            raise UserInputError("precision bf16: this processor has no bfloat16 for oneDNN (AVX-512); use fp32")
        if not difference <= TOLERANCES[self.precision]:
            raise UserInputError(f"precision {self.precision}: oneDNN's states of the {self.name} stack are off by {100 * difference:.2g} % on this "
                                 "processor; use precision dynamic")


class InferenceEngine:
    """A context in which every stack of layers in ``model`` that is evaluated without gradients runs through oneDNN.

    It can be entered again while the weights stay as they are; its programs are kept.

    Args:
        model: a ``Unimo2Model``, ``UnimoModel`` or a Layer that contains one; its weights must not change inside.
        precision: "dynamic" (nothing changes), "fp32" or "bf16".

    Entering gives a dict: per stack the root mean square difference of its first sample's states from those of the dynamic graph, relative to
    their own.

    Raises:
        UserInputError: there is no such precision, the device is no CPU, or the processor cannot do it.
    """

    def __init__(self, model, precision):
        if precision not in PRECISIONS:
            raise UserInputError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
        if precision != "dynamic" and paddle.get_device() != "cpu":
            raise UserInputError(f"precision {precision}: oneDNN runs on CPU, the device is {paddle.get_device()}; leave precision at dynamic")
        self.differences, self.before = {}, []
        self.engines = [] if precision == "dynamic" else [
            _Engine(layer, name.replace(".encoder", ""), precision, self.differences)
            for name, layer in model.named_sublayers() if isinstance(layer, Encoder)]

    def __enter__(self):
        self.before = [engine.encoder.__dict__.get("forward") for engine in self.engines]
        for engine in self.engines:
            engine.encoder.forward = engine.run
        return self.differences

    def __exit__(self, *_):
        for engine, forward in zip(self.engines, self.before):
            if forward is None:
                del engine.encoder.__dict__["forward"]
            else:
                engine.encoder.forward = forward


inference_engine = InferenceEngine  # reads better after "with"
