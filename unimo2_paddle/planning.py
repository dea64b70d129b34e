"""``unimo2 plan``: what a step of UNIMO-2's pre-training costs in operations, memory and communication on so many devices.

Operations and memory come from the shapes of a step (models/flops.py, models/memory.py). Memory is that of the dynamic graph in float32; it was
compared with measured steps on CPU (docs/scaling.md). Seconds are a reckoning from three assumptions that are printed with them.
"""
from dataclasses import dataclass
from typing import Dict

import numpy as np

from unimo2_paddle.data.mixture import CORPORA
from unimo2_paddle.errors import UserInputError

TRAINING = 3.0
GIB = 2.0 ** 30
WORDS = 24  # tokens of a caption that a batch is padded to, where nothing else is said; texts fill data.max_text_len


@dataclass
class Assumptions:
    """``tflops``: what a device multiplies matrices with at best, 10^12 operations a second; ``utilisation``: the share a step reaches;
    ``bandwidth``: GB a second of a device in a ring; ``words``: tokens that captions are padded to."""

    tflops: float = 156.0
    utilisation: float = 0.35
    bandwidth: float = 100.0
    words: int = WORDS

    def check(self):
        """Raise ``UserInputError`` for values that nothing can be reckoned with."""
        for name, low in (("tflops", 0), ("utilisation", 0), ("bandwidth", 0), ("words", 2)):
            if not getattr(self, name) > low:
                raise UserInputError(f"--{name}: must be above {low}, is {getattr(self, name)}")


def example_batch(config, corpus, samples, words):
    """The shapes of a micro-batch of ``samples`` as empty arrays, for ``pretraining_passes``; the smallest that the passes ask for."""
    train, data = config.train, config.data
    length = min(words, data.max_text_len) if corpus == "pairs" else data.max_text_len
    masked = max(1, round(samples * (length - 2) * train.mask_ratio))
    per_group = train.fused_per_group or train.matching_group
    fused = samples if samples < train.matching_group else samples // train.matching_group * per_group
    ids = np.broadcast_to(np.int64(5), [samples, length])
    if corpus == "images":
        views = np.broadcast_to(np.uint8(0), [samples, 1])
        return {"corpus": corpus, "first_view": views, "second_view": views, "token_mask": views}
    return {"corpus": corpus, "input_ids": ids, "position_ids": ids, "fused": np.arange(fused), "token_mask": ids,
            "labels": np.broadcast_to(np.int64(5), [round(masked * fused / samples) if corpus == "pairs" else masked])}


def count_parameters(config):
    """Parameters of the model, which is built without memory for them."""
    import paddle

    from unimo2_paddle.models.unimo2 import Unimo2Model

    with paddle.LazyGuard(), paddle.utils.unique_name.guard():
        return int(sum(np.prod(parameter.shape) for parameter in Unimo2Model(config).parameters()))


@dataclass
class Step:
    """One kind of step on one of several devices: samples, operations (of all micro-batches) and bytes."""

    corpus: str
    samples: int                   # per device and micro-batch
    flops: float
    memory: Dict[str, float]       # see ``step_peak``
    sent: float                    # bytes that a device sends: gradients, features, sharded parameters
    seconds: float
    sending: float


def plan(config, devices, assumptions):
    """A list of :class:`Step` for the corpora in use, and the number of parameters.

    Raises:
        UserInputError: another task than UNIMO-2's pre-training, or batches that so many devices cannot share.
    """
    from unimo2_paddle.models.flops import pass_flops
    from unimo2_paddle.models.memory import step_peak
    from unimo2_paddle.tasks.work import pretraining_passes

    if config.task != "pretrain":
        raise UserInputError(f"plan: reckons UNIMO-2's pre-training (task pretrain), the config's task is {config.task}")
    if devices < 1:
        raise UserInputError(f"--devices: must be at least 1, is {devices}")
    assumptions.check()
    model, run, train = config.model.model_config(), config.run, config.train
    parameters, steps = count_parameters(model), []
    for corpus in [name for name in CORPORA if config.mixture.weights.get(name, 0) > 0]:
        whole = config.mixture.global_batch[corpus]
        if whole % (devices * train.accumulate):
            raise UserInputError(f"mixture.global_batch.{corpus}: {whole} samples cannot be shared by {devices} devices in {train.accumulate} micro-batches; "
                                 f"set it to a multiple of {devices * train.accumulate}, for example "
                                 f"-o mixture.global_batch.{corpus}={-(-whole // (devices * train.accumulate)) * devices * train.accumulate}")
        samples = whole // (devices * train.accumulate)
        passes = pretraining_passes(model, example_batch(config, corpus, samples, assumptions.words), train)
        flops = TRAINING * train.accumulate * sum(pass_flops(model, one) for one in passes)
        memory = step_peak(model, parameters, passes, run.recompute, devices if run.sharding else 1, config.optim.ema > 0)
        sent = _sent(model, parameters, devices, samples * train.accumulate, run.sharding)
        recomputed = 4.0 / 3.0 if run.recompute else 1.0  # the forward pass runs twice
        steps.append(Step(corpus, samples, flops, memory, sent, flops * recomputed / (assumptions.tflops * 1e12 * assumptions.utilisation),
                          sent / (assumptions.bandwidth * 1e9)))
    return steps, parameters


def _sent(model, parameters, devices, samples, sharding):
    """Bytes a device sends per step in rings: gradients averaged, contrastive features gathered (and their gradients), sharded parameters."""
    share = (devices - 1) / devices
    gradients = 2.0 * share * 4.0 * parameters
    features = 3.0 * share * 4.0 * 2 * samples * devices * model.hidden_size
    return gradients + features + (share * 4.0 * parameters if sharding else 0.0)


def describe(path, overrides, devices, assumptions):
    """The plan of the run configuration at ``path`` as text."""
    from unimo2_paddle.config import load_run_config

    config = load_run_config(path, overrides)
    steps, parameters = plan(config, devices, assumptions)
    run = config.run
    lines = [f"{path} on {devices} device{'s' * (devices > 1)}: {parameters / 1e6:.1f} million parameters, recompute {'on' if run.recompute else 'off'}, "
             f"sharding {run.sharding}, {config.train.accumulate} micro-batch(es) per step",
             f"{'per device and step':<20}{'samples':>9}{'TFLOP':>9}{'weights':>9}{'grads':>9}{'optim':>9}{'activ.':>9}{'peak GiB':>10}{'sent GB':>9}"
             f"{'compute s':>11}{'sending s':>11}"]
    for step in steps:
        memory = [step.memory[part] / GIB for part in ("parameters", "gradients", "optimizer", "activations")]
        lines.append(f"{step.corpus:<20}{step.samples * config.train.accumulate:>9}{step.flops / 1e12:>9.2f}{''.join(f'{part:>9.2f}' for part in memory)}"
                     f"{step.memory['peak'] / GIB:>10.2f}{step.sent / 1e9:>9.2f}{step.seconds:>11.3f}{step.sending:>11.3f}")
    lines.append(f"memory: float32, dynamic graph, without the framework's own (a CUDA context and its libraries: about 1 GiB); captions padded to "
                 f"{assumptions.words} tokens, texts to {config.data.max_text_len}")
    lines.append(f"seconds assume {assumptions.tflops:g} TFLOP/s at {100 * assumptions.utilisation:g} % and {assumptions.bandwidth:g} GB/s per device, "
                 "sending not hidden behind the backward pass")
    return "\n".join(lines)
