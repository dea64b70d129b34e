"""Training state on disk: ``checkpoints/step-000500/`` directories that are complete or not there.

A checkpoint is written into ``step-N.tmp``, every file fsynced, the manifest (sha256 of each file) last, then renamed. It holds
``config.json`` and ``model.safetensors`` (so it is also a model directory for ``from_pretrained``), ``optimizer.safetensors`` and
``state.json`` (step, data position, best metric); a run that averages its weights adds ``average.safetensors``.
"""
import hashlib
import json
import os
import re
import shutil

import numpy as np
from safetensors import SafetensorError

from unimo2_paddle.checkpoints.convert import read_json, read_safetensors, write_safetensors
from unimo2_paddle.checkpoints.released import assign_parameters, match_parameters, parameter_arrays
from unimo2_paddle.errors import CheckpointError

MANIFEST = "manifest.json"
FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "state.json")
AVERAGE = "average.safetensors"
_STEP = re.compile(r"step-(\d+)")
_UNFINISHED = re.compile(r"step-\d+\.(tmp|old)")  # left by a killed run


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path, values):
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2, sort_keys=True) + "\n")


def optimizer_arrays(optimizer):
    """The optimizer's accumulators as ``{"<parameter>|<accumulator>": array}`` (Paddle's running number at the end is cut off)."""
    arrays = {}
    for key, value in optimizer.state_dict().items():
        match = re.fullmatch(r"(.+)_(moment1|moment2|beta1_pow_acc|beta2_pow_acc)_\d+", key)
        if match:
            arrays[f"{match[1]}|{match[2]}"] = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
    return arrays


def load_optimizer(optimizer, arrays, parameters):
    """Put accumulators back into a fresh Adam optimizer (before its first step).

    Parameters without any (they had no gradient yet) get those of a first step, which Paddle demands once a state is loaded.
    """
    import paddle

    state = {}
    for parameter in parameters:
        start = {"moment1": np.zeros(parameter.shape, "float32"), "moment2": np.zeros(parameter.shape, "float32"),
                 "beta1_pow_acc": np.full([1], optimizer._beta1, "float32"), "beta2_pow_acc": np.full([1], optimizer._beta2, "float32")}
        for kind, array in start.items():
            state[f"{parameter.name}_{kind}_0"] = paddle.to_tensor(arrays.get(f"{parameter.name}|{kind}", array))
    optimizer.set_state_dict(state)


def step_of(path):
    """The step number in a checkpoint's name, or ``None``."""
    match = _STEP.fullmatch(os.path.basename(os.path.normpath(path)))
    return int(match[1]) if match else None


def complete_checkpoints(directory):
    """Paths of the complete checkpoints in a run's ``checkpoints`` directory, oldest first."""
    if not os.path.isdir(directory):
        return []
    found = [os.path.join(directory, name) for name in os.listdir(directory) if _STEP.fullmatch(name)]
    return sorted((p for p in found if os.path.isfile(os.path.join(p, MANIFEST))), key=step_of)


def save_checkpoint(directory, step, model, optimizer, state, keep_last=3, average=None):
    """Write the checkpoint of ``step``, then remove the oldest beyond ``keep_last`` and what a killed run left unfinished.

    Args:
        directory: the run's ``checkpoints`` directory; state: plain Python (step, data position, best metric).
        average: the run's ``WeightAverage``, if it has one.

    Returns:
        the checkpoint's path.

    Raises:
        CheckpointError: it could not be written (for example a full disk); earlier checkpoints are untouched.
    """
    target = os.path.join(directory, f"step-{step:06d}")
    temporary = target + ".tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        write_safetensors(os.path.join(temporary, "model.safetensors"), parameter_arrays(model))
        write_safetensors(os.path.join(temporary, "optimizer.safetensors"), optimizer_arrays(optimizer))
        if average is not None:
            write_safetensors(os.path.join(temporary, AVERAGE), average.arrays())
        model.config.to_json(os.path.join(temporary, "config.json"))
        _write_json(os.path.join(temporary, "state.json"), state)
        manifest = {}
        for name in sorted(os.listdir(temporary)):
            path = os.path.join(temporary, name)
            _sync(path)
            manifest[name] = {"sha256": _sha256(path), "bytes": os.path.getsize(path)}
        _write_json(os.path.join(temporary, MANIFEST), manifest)
        _sync(os.path.join(temporary, MANIFEST))
        _sync(temporary)
        if os.path.isdir(target):  # a run resumed from an earlier step comes by here again
            shutil.rmtree(target + ".old", ignore_errors=True)
            os.rename(target, target + ".old")
        os.rename(temporary, target)
        _sync(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write the checkpoint {target}: {reason}; earlier checkpoints are untouched") from error
    unfinished = [os.path.join(directory, name) for name in os.listdir(directory) if _UNFINISHED.fullmatch(name)]
    for old in complete_checkpoints(directory)[:-keep_last] + unfinished:
        shutil.rmtree(old, ignore_errors=True)
    return target


def verify_checkpoint(path):
    """Raise ``CheckpointError`` unless every file of the manifest is there with its size and hash."""
    if not os.path.isfile(os.path.join(path, MANIFEST)):
        raise CheckpointError(f"{path} is not a complete training checkpoint (no {MANIFEST}); give a directory such as "
                              "output/<run>/checkpoints/step-000500")
    manifest = read_json(os.path.join(path, MANIFEST))
    for name in sorted({*FILES, *manifest}):
        file, facts = os.path.join(path, name), manifest.get(name)
        if not isinstance(facts, dict) or not {"bytes", "sha256"} <= set(facts) or os.path.basename(name) != name:
            raise CheckpointError(f"{os.path.join(path, MANIFEST)} is damaged (its entry for {name}); use another checkpoint")
        if not os.path.isfile(file):
            raise CheckpointError(f"{path}: {name} is missing; use another checkpoint")
        if os.path.getsize(file) != facts["bytes"] or _sha256(file) != facts["sha256"]:
            raise CheckpointError(f"{file} is damaged (size or sha256 differs from the manifest); use another checkpoint")


def _fits(key, array, shapes):
    """Whether an accumulator belongs to one of the parameters in ``shapes``: moments as large as it, powers of beta as one number."""
    name, _, kind = key.partition("|")
    return name in shapes and array.shape in ((shapes[name],) if kind in ("moment1", "moment2") else ((1,), ()))


def load_checkpoint(path, model, optimizer, average=None):
    """Verify a checkpoint, then load weights, optimizer and, if the run has one, its ``WeightAverage``; returns its state mapping.

    Raises:
        CheckpointError: incomplete, damaged, or of another model or optimizer; nothing has been changed then.
    """
    verify_checkpoint(path)
    weights = read_safetensors(os.path.join(path, "model.safetensors"))
    accumulators = read_safetensors(os.path.join(path, "optimizer.safetensors"))
    state = read_json(os.path.join(path, "state.json"))
    match_parameters(model, {name: (a.shape, a.dtype) for name, a in weights.items()}, path)
    shapes = {p.name: tuple(p.shape) for p in model.parameters()}
    foreign = [key for key, array in accumulators.items() if not _fits(key, array, shapes)]
    if foreign:
        raise CheckpointError(f"{path}: the optimizer state belongs to another model or optimizer (for example {foreign[0]}); "
                              "resume with the configuration of that run")
    if not isinstance(state.get("step"), int) or not {"data", "best"} <= set(state):
        raise CheckpointError(f"{path}: state.json is not that of a training checkpoint of this version")
    averages = _read_average(path, model) if average is not None else None
    assign_parameters(model, weights)
    if averages is not None:
        average.load(averages)
    load_optimizer(optimizer, accumulators, model.parameters())
    return state


def _read_average(path, model):
    """The averaged weights of a checkpoint, one for every parameter of the model."""
    file = os.path.join(path, AVERAGE)
    if not os.path.isfile(file):
        raise CheckpointError(f"{path} has no {AVERAGE}: its run did not average weights; resume with optim.ema=0, or start a new run "
                              "from its weights with model.init")
    arrays = read_safetensors(file)
    match_parameters(model, {name: (a.shape, a.dtype) for name, a in arrays.items()}, file)
    return arrays
