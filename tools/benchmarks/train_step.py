"""A pre-training step on CPU: fused layers against the same step layer by layer, and the encoders' part of it against PyTorch.

"Layer by layer" is what one writes first: heads moved to the front by a transpose, scores by matmul, a mask broadcast over the heads, Paddle's
own AdamW. "Plain" is this package without its compiled kernels (``run.kernels: plain``): no transposes, masks expanded once per batch.
"""
import contextlib
import json
import math
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from bench import alternate, clock, compare, gemm_rate

from unimo2_paddle.config import load_run_config
from unimo2_paddle.data.demo import write_demo_data
from unimo2_paddle.models import fused, transformer
from unimo2_paddle.tasks.base import Shard, task_class, to_tensors
from unimo2_paddle.training.optim import build_optimizer

DEMO = Path(__file__).resolve().parents[2] / "run_configs" / "pretrain" / "demo.yaml"
CHANGES = {
    "tiny": [],
    "base": ["model={config: unimo2_base, image_size: 224, text_vocab_size: 512}", "mixture.global_batch={pairs: 2}", "train.matching_group=2",
             "train.fused_per_group=0", "train.pairs={contrastive: 1.0}", "optim.learning_rate=1.0e-5"],
}


def config_of(directory, size):
    """The demo's pre-training on pairs alone, with freshly generated data; for ``base`` with the released model's
    shapes, but the demo's vocabulary, and two pairs."""
    write_demo_data(directory, size=128, seed=1)
    shards = f"data.pairs=[{{shards: {directory}/pairs/*.tar}}]"
    return load_run_config(DEMO, [f"data.vocab={directory}/vocab", shards, "data.images=[]", "data.texts=[]", "eval.annotations=", "data.num_workers=0",
                                  "mixture.weights={pairs: 1.0}", f"run.output={directory}/run", *CHANGES[size]])


def attend_with_transposes(self, queries, states, bias=None, cache=None):
    """``MultiHeadAttention.forward`` as one writes it first."""
    query, key, value = (part.transpose([0, 2, 1, 3]) for part in self._project(queries, states))
    scores = paddle.matmul(query, key, transpose_y=True)
    if bias is not None:
        scores = scores + bias
    weights = F.dropout(F.softmax(scores), self.dropout, training=self.training)
    return self.output(paddle.matmul(weights, value).transpose([0, 2, 1, 3]).reshape([0, 0, queries.shape[-1]]))


@contextlib.contextmanager
def form(name):
    """Inside, layers are "fused", "plain" or "layer by layer"."""
    attention, to_bias = transformer.MultiHeadAttention.forward, transformer.mask_to_bias
    before = fused.choose("auto" if name == "fused" else "plain")
    if name == "layer by layer":
        transformer.MultiHeadAttention.forward = attend_with_transposes
        transformer.mask_to_bias = lambda mask, heads: ((mask - 1.0) * transformer.MASK_BIAS).unsqueeze(1)
    try:
        yield
    finally:
        fused.choose(before)
        transformer.MultiHeadAttention.forward, transformer.mask_to_bias = attention, to_bias


class Step:
    """Training steps on one batch; ``calls`` collects (stack, batch, length, rows of the last layer or 0, masked) of the encoders' runs."""

    def __init__(self, task, config):
        self.task, self.model = task, task.build_model()
        self.model.train()
        self.optimizer = build_optimizer(self.model.parameters(), config.optim)
        batches = task.train_batches(Shard())
        self.batch = next(batches)
        batches.close()
        self.calls = []

    def __call__(self, name="fused"):
        with form(name):
            paddle.seed(1)
            losses = self.task.loss(self.model, to_tensors(self.batch))
            losses["loss"].backward()
            {key: float(value) for key, value in losses.items()}  # as the loop reads them
            self.optimizer.step()
            self.optimizer.clear_grad(set_to_zero=False)

    def record(self):
        """Run once and note what the encoders are given."""
        stacks = {"vision": self.model.vision.encoder, "text": self.model.text.encoder, "grounded": self.model.grounded_encoder}
        for key, stack in stacks.items():
            def noted(states, mask=None, rows=None, caches=None, key=key, forward=stack.forward):
                self.calls.append((key, states.shape[0], states.shape[1], 0 if rows is None else len(rows), mask is not None))
                return forward(states, mask, rows, caches)
            stack.forward = noted
        self()
        for stack in stacks.values():
            del stack.forward
        return stacks


class EncoderSteps:
    """The encoders' share of a step alone: all their runs on random states, backward, clipping and AdamW over their parameters."""

    def __init__(self, stacks, calls, optim, hidden):
        random = np.random.default_rng(0)
        self.stacks, self.runs = stacks, []
        for key, batch, length, rows, masked in calls:
            states = paddle.to_tensor(random.standard_normal([batch, length, hidden]).astype("float32"))
            self.runs.append((stacks[key], states, paddle.ones([batch, length, length]) if masked else None,
                              paddle.arange(rows, dtype="int64") if rows else None))
        with paddle.utils.unique_name.guard():
            self.optimizer = build_optimizer([p for stack in stacks.values() for p in stack.parameters()], optim)

    def __call__(self):
        sum(stack(states, mask, rows).square().mean() for stack, states, mask, rows in self.runs).backward()
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)


def flops(calls, layers, hidden):
    """Operations of the encoders' products in forward and backward."""
    total = 0
    for key, batch, length, rows, _ in calls:
        whole = batch * length * (12 * hidden ** 2 + 2 * length * hidden)
        last = batch * (length * 2 * hidden ** 2 + rows * (10 * hidden ** 2 + 2 * length * hidden)) if rows else whole
        total += 2 * 3 * (whole * (layers[key] - 1) + last)
    return total


@contextlib.contextmanager
def torch_process(python, about):
    """A function that takes one of PyTorch's steps and returns its seconds, and PyTorch's version."""
    script = str(Path(__file__).with_name("torch_step.py"))
    with subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        def ask(text="step"):
            process.stdin.write(text + "\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        yield ask(json.dumps(about)), lambda: float(ask())
        process.stdin.close()


def against_torch(options, step, config, rate):
    """The encoders' steps in turns with PyTorch's."""
    model = step.model.config
    stacks = step.record()
    layers = {key: len(stack.layers) for key, stack in stacks.items()}
    ours = EncoderSteps(stacks, step.calls, config.optim, model.hidden_size)
    work = flops(step.calls, layers, model.hidden_size)
    about = {"hidden": model.hidden_size, "heads": model.num_attention_heads, "dropout": model.hidden_dropout_prob, "layers": layers,
             "calls": step.calls, "clip": config.optim.clip_norm}
    times = {"ours": [], "torch": []}
    with torch_process(options.torch_python, about) as (version, torch_step):
        for turn in range(options.repeats + 1):
            started = clock()
            ours()
            seconds = clock() - started
            other = torch_step()
            if turn:  # the first makes what is kept
                times["ours"].append(seconds)
                times["torch"].append(other)
    reached = work / np.median(times["ours"]) / 1e9
    return compare("encoders of the step, forward, backward and AdamW, against PyTorch fp32", times["ours"], times["torch"], "ms", scale=1e3,
                   at_least=0.75, note=f"PyTorch {version}, scaled dot-product attention, foreach AdamW.",
                   floor=f"{work / 1e9:.3g} GFLOP; {reached:.0f} GFLOP/s, {100 * reached / rate:.0f} % of Paddle's matrix products ({rate:.0f}).")


def measure(options):
    with tempfile.TemporaryDirectory() as directory:
        config = config_of(os.path.join(directory, "data"), options.size)
        step = Step(task_class("pretrain")(config), config)
        if fused.kernels() is None:
            return "numba or Paddle's MKL is not there, so layers cannot be fused"
        names = ("fused", "plain", "layer by layer")
        times = alternate({name: lambda name=name: step(name) for name in names}, options.repeats)
        rate = gemm_rate() if options.threads > 1 else _one_thread_rate()
        pairs = step.batch["samples"]
        lines = [compare(f"pre-training step of {pairs} pairs, fused layers against {other}", times["fused"], times[other], "ms", scale=1e3,
                         at_least=2.0 if (options.size, other) == ("tiny", "layer by layer") else None,
                         note="" if other == "plain" else "Transposed heads, masks broadcast in every layer, one operation after the other.")
                 for other in names[1:]]
        if options.torch_python:
            lines.append(against_torch(options, step, config, rate))
        return lines


def _one_thread_rate():
    """Like ``gemm_rate``, by the processor's seconds, which other load does not stretch."""
    matrix = paddle.ones([1024, 1024])
    times = alternate({"gemm": lambda: paddle.matmul(matrix, matrix)}, 5)["gemm"]
    return 2.0 * math.pow(1024, 3) / min(times) / 1e9
