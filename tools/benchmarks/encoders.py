"""Forward passes of the visual, text and grounded encoders: dynamic graph and oneDNN against PyTorch."""
import contextlib
import json
import subprocess
from pathlib import Path

import numpy as np
import paddle
import subjects
from bench import clock, compare, gemm_rate

from unimo2_paddle.models.flops import encoder_flops
from unimo2_paddle.models.onednn import PRECISIONS, InferenceEngine

BATCH = {"tiny": 16, "base": 1}
WORDS = 20


def inputs_of(model, batch):
    """Per encoder its stack, states ``[B, T, H]`` and mask ``[T, T]`` or ``None``: a picture, a text of 20 tokens, and the pair."""
    config, rng = model.config, np.random.default_rng(0)
    image, codes = 1 + (config.image_size // config.resolution) ** 2, config.topk_value
    total = image + codes + WORDS
    pair = np.ones([total, total], "float32")
    pair[:image, image + codes:] = pair[image + codes:, :image] = 0.0
    found = {"vision": (model.vision.encoder, image, None), "text": (model.text.encoder, WORDS, np.ones([WORDS, WORDS], "float32")),
             "grounded": (model.grounded_encoder, total, pair)}
    return {name: (stack, rng.standard_normal([batch, length, config.hidden_size]).astype("float32"), mask)
            for name, (stack, length, mask) in found.items()}


def seconds_of(stack, states, mask):
    """Processor seconds (one thread) or wall seconds of a forward pass, with the copies in and out."""
    started = clock()
    with paddle.no_grad():
        stack(paddle.to_tensor(states), None if mask is None else paddle.to_tensor(np.tile(mask, [len(states), 1, 1]))).numpy()
    return clock() - started


@contextlib.contextmanager
def torch_process(python, config, inputs):
    """A function ("vision", "fp32") -> seconds in PyTorch."""
    heads = config.num_attention_heads
    stacks = {name: {"hidden": config.hidden_size, "heads": heads, "layers": len(stack.layers), "pre_norm": name == "vision", "batch": len(states),
                     "length": states.shape[1], "mask": [] if mask is None else mask.tolist()} for name, (stack, states, mask) in inputs.items()}
    script = str(Path(__file__).with_name("torch_side.py"))
    with subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        def ask(text):
            process.stdin.write(text + "\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        version = ask(json.dumps(stacks))
        yield version, lambda name, kind: float(ask(f"{name} {kind}"))
        process.stdin.close()


def measure(options):
    if not options.torch_python:
        return "no PyTorch; name an interpreter that has it with --torch-python"
    times = {}
    model, batch = subjects.build(options.size), BATCH[options.size]
    engines, inputs = {name: InferenceEngine(model, name) for name in PRECISIONS}, inputs_of(model, batch)
    with torch_process(options.torch_python, model.config, inputs) as (version, ask):
        for _ in range(options.repeats + 1):
            for part in inputs:
                for name, engine in engines.items():
                    with engine:
                        times.setdefault((part, name), []).append(seconds_of(*inputs[part]))
                for kind in ("fp32", "bf16"):
                    times.setdefault((part, f"torch {kind}"), []).append(ask(part, kind))
    times = {key: seconds[1:] for key, seconds in times.items()}  # the first turn makes the programs
    return list(_lines(times, inputs, model.config, batch, version, judged=options.size == "base"))


def _lines(times, inputs, config, batch, version, judged):
    rate = gemm_rate()
    work = {part: batch * encoder_flops(config.hidden_size, len(stack.layers), states.shape[1]) for part, (stack, states, _) in inputs.items()}
    for ours, theirs, at_least in (("fp32", "fp32", 1.0), ("bf16", "bf16", 1.0), ("dynamic", "fp32", None)):
        for part in (*inputs, "all"):
            parts = list(inputs) if part == "all" else [part]
            mine, other = ([sum(turn) for turn in zip(*(times[one, kind] for one in parts))] for kind in (ours, f"torch {theirs}"))
            flops = sum(work[one] for one in parts)
            floor = f"{flops / 1e9:.3g} GFLOP, {flops / np.median(mine) / 1e9:.0f} GFLOP/s reached; Paddle's matrix products: {rate:.0f}."
            title = "the three encoders" if part == "all" else f"the {part} encoder"
            side = "dynamic graph" if ours == "dynamic" else f"oneDNN {ours}"
            yield compare(f"forward of {title}, {side} against PyTorch {theirs}", mine, other, "ms", scale=1e3,
                          at_least=at_least if judged and part == "all" else None, floor=floor if part == "all" else "",
                          note=f"PyTorch {version}, batch of {batch}." if part == "all" else "")
