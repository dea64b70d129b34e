"""Training state on disk: ``checkpoints/step-000500/`` directories that are complete or not there.

A checkpoint is written into ``step-N.tmp``, every file fsynced, the manifest (sha256 of each file) last, then renamed. It holds
``config.json`` and ``model.safetensors`` (so it is also a model directory for ``from_pretrained``), ``optimizer.safetensors`` and
``state.json`` (step, data position, best metric, who wrote it); a run that averages its weights adds ``average.safetensors``.

Other names appear only for moments: ``step-N.old`` is a complete checkpoint about to be replaced by another one of the same step and
counts for step N while there is no other; ``step-N.gone`` is being removed. ``step-N.aside`` keeps what a run went back behind.
Only names and contents decide, never times of files, so clocks may jump.
"""
import contextlib
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from typing import Dict, Optional

import numpy as np
from safetensors import safe_open

import unimo2_paddle
from unimo2_paddle.checkpoints.convert import read_json, read_safetensors, write_safetensors
from unimo2_paddle.checkpoints.released import assign_parameters, match_parameters, parameter_arrays
from unimo2_paddle.errors import CheckpointError

FORMAT = 1  # of the directory and state.json; another one is refused
MANIFEST = "manifest.json"
FILES = ("config.json", "model.safetensors", "optimizer.safetensors", "state.json")
AVERAGE = "average.safetensors"
_STEP = re.compile(r"step-(\d+)(?:\.old)?")
# Paddle's name of one; those of a half-precision parameter are named after its float32 copy
_ACCUMULATOR = re.compile(r"(.+?)(?:_fp32_master_\d+)?_(moment1|moment2|beta1_pow_acc|beta2_pow_acc)_\d+")
MASTERS = "master_weights"  # Paddle's key for the float32 copies of half-precision parameters
_UNFINISHED = re.compile(r"step-\d+\.(tmp|gone)")  # left by a killed run


@dataclass
class Snapshot:
    """What a checkpoint holds, as arrays and plain values that further training does not change."""

    config: dict                             # of the model
    weights: Dict[str, np.ndarray]           # by parameter name
    accumulators: Dict[str, np.ndarray]      # of the optimizer, see optimizer_arrays
    state: dict                              # step, data position, best metric, ...; "made_by" is added here
    averages: Optional[Dict[str, np.ndarray]] = None


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


def parameter_of(key):
    """The parameter that an accumulator in an optimizer's ``state_dict`` belongs to; ``None`` for other entries."""
    match = _ACCUMULATOR.fullmatch(key)
    return match and match[1]


def optimizer_state(arrays):
    """The ``state_dict`` of an Adam optimizer from the arrays of :func:`optimizer_arrays`."""
    import paddle

    state, masters = {}, {}
    for key, array in arrays.items():
        name, _, kind = key.partition("|")
        if kind == "master":
            masters[name] = paddle.to_tensor(array)
            masters[name].name = f"{name}_fp32_master_0"  # Paddle looks for the accumulators under the name of this tensor
        else:
            copy = "_fp32_master_0" if f"{name}|master" in arrays else ""
            state[f"{name}{copy}_{kind}_0"] = paddle.to_tensor(array)
    return {**state, MASTERS: masters} if masters else state


def optimizer_arrays(optimizer):
    """The optimizer's accumulators as ``{"<parameter>|<accumulator>": array}`` (Paddle's running number at the end is cut off).

    Paddle hands a loaded accumulator to its parameter at the parameter's next gradient and leaves it out of ``state_dict()`` until then.
    A run saved before that (another corpus trains other parameters) must not lose it, so those in waiting are read too.
    The float32 copies of half-precision parameters are ``"<parameter>|master"``.
    """
    waiting = getattr(optimizer, "_accumulators_holder", {})
    arrays, loaded = {}, set()
    state = optimizer.state_dict()
    for key, value in {**waiting, **state}.items():
        match = _ACCUMULATOR.fullmatch(key)
        if match:
            arrays[f"{match[1]}|{match[2]}"] = np.asarray(value.numpy() if hasattr(value, "numpy") else value)
            if key in waiting:
                loaded.add(match[1])
    start = {"beta1_pow_acc": np.float32(optimizer._beta1), "beta2_pow_acc": np.float32(optimizer._beta2), "moment1": 0, "moment2": 0}
    # what load_optimizer made up for a parameter that has had no gradient yet is nothing to keep
    idle = {name for name in loaded if all((arrays[f"{name}|{kind}"] == start[kind]).all() for kind in start)}
    masters = {f"{name}|master": value.numpy() for name, value in state.get(MASTERS, {}).items()}
    return {**{key: array for key, array in arrays.items() if key.partition("|")[0] not in idle}, **masters}


def load_optimizer(optimizer, arrays, parameters):
    """Put accumulators back into a fresh Adam optimizer (before its first step).

    Parameters without any (they had no gradient yet) get those of a first step, which Paddle demands once a state is loaded.
    """
    complete = {}
    for parameter in parameters:
        start = {"moment1": np.zeros(parameter.shape, "float32"), "moment2": np.zeros(parameter.shape, "float32"),
                 "beta1_pow_acc": np.full([1], optimizer._beta1, "float32"), "beta2_pow_acc": np.full([1], optimizer._beta2, "float32")}
        complete.update({f"{parameter.name}|{kind}": array for kind, array in start.items()})
    optimizer.set_state_dict(optimizer_state({**complete, **arrays}))


def take_snapshot(model, optimizer, state, average=None):
    """Copy what a checkpoint needs, so that it can be written while training goes on.

    Args:
        state: values that JSON can hold (step, data position, best metric); tensors and arrays in it become lists.
        average: the run's ``WeightAverage``, if it has one.
    """
    # numpy() of a tensor is a copy
    return Snapshot(model.config.to_dict(), parameter_arrays(model), optimizer_arrays(optimizer),
                    json.loads(json.dumps({**state, "made_by": made_by(optimizer)}, default=lambda value: value.tolist())),
                    average.arrays() if average is not None else None)


def _kind(optimizer):
    """The name of Paddle's optimizer that this one is or extends: what its state is the state of."""
    return next((kind.__name__ for kind in type(optimizer).__mro__ if kind.__module__.split(".")[0] == "paddle"), type(optimizer).__name__)


def made_by(optimizer):
    """Format and programs of the checkpoints written here, and the optimizer's kind."""
    import paddle

    while hasattr(optimizer, "_inner_opt"):  # fleet wraps it
        optimizer = optimizer._inner_opt
    return {"format": FORMAT, "unimo2_paddle": unimo2_paddle.__version__, "paddle": paddle.__version__, "optimizer": _kind(optimizer)}


def step_of(path):
    """The step number in a checkpoint's name, or ``None``."""
    match = _STEP.fullmatch(os.path.basename(os.path.normpath(path)))
    return int(match[1]) if match else None


def _is_complete(path):
    return os.path.isfile(os.path.join(path, MANIFEST))


def _step_directories(directory):
    """(step, path) of everything in ``directory`` that has a checkpoint's name, oldest step first, ``.old`` after its namesake."""
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    return sorted((step_of(name), os.path.join(directory, name)) for name in names if step_of(name) is not None)


def complete_checkpoints(directory):
    """Paths of the complete checkpoints in a run's ``checkpoints`` directory, oldest first, one for each step."""
    found = {}
    for step, path in _step_directories(directory):
        if _is_complete(path):
            found.setdefault(step, path)
    return list(found.values())


def newest_whole(directory):
    """The newest checkpoint whose files are as they were written.

    Returns:
        (its path, or ``None`` where there are no checkpoints; list of what is wrong with newer ones).

    Raises:
        CheckpointError: there are complete checkpoints, and all of them are damaged.
    """
    problems = []
    for _, path in sorted(_step_directories(directory), key=lambda found: (-found[0], found[1])):
        try:
            verify_checkpoint(path)
            return path, problems
        except CheckpointError as error:
            problems.append(str(error))
    if complete_checkpoints(directory):
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise CheckpointError(f"{directory} holds no usable checkpoint:\n{listing}\nStart a new run in another run.output; model.init can take "
                              "its weights from any model directory that is left")
    return None, problems


def save_checkpoint(directory, step, model, optimizer, state, keep_last=3, average=None):
    """``take_snapshot`` and ``write_snapshot`` at once; returns the checkpoint's path."""
    return write_snapshot(directory, step, take_snapshot(model, optimizer, state, average), keep_last)


def write_snapshot(directory, step, snapshot, keep_last=3):
    """Write the checkpoint of ``step``, then remove the oldest beyond ``keep_last`` and what a killed run left unfinished.

    Args:
        directory: the run's ``checkpoints`` directory.

    Returns:
        the checkpoint's path.

    Raises:
        CheckpointError: it could not be written (for example a full disk); earlier checkpoints are untouched.
    """
    target = os.path.join(directory, f"step-{step:06d}")
    temporary = target + ".tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        fresh = not os.path.isdir(directory)
        os.makedirs(temporary)
        if fresh:
            _sync(os.path.dirname(os.path.abspath(directory)))
        _fill(temporary, snapshot)
        _put_in_place(temporary, target)
        _sync(directory)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write the checkpoint {target} ({_megabytes(snapshot)}): {error.strerror or error}; earlier checkpoints are untouched. "
                              "Make room or give access, then continue with --resume auto") from error
    _remove_old(directory, target, keep_last)
    return target


def _megabytes(snapshot):
    parts = (snapshot.weights, snapshot.accumulators, snapshot.averages or {})
    return f"{sum(array.nbytes for part in parts for array in part.values()) / 1e6:.1f} MB"


def _fill(directory, snapshot):
    """Write and sync the files of a checkpoint, the manifest last: with it the directory is complete."""
    write_safetensors(os.path.join(directory, "model.safetensors"), snapshot.weights)
    write_safetensors(os.path.join(directory, "optimizer.safetensors"), snapshot.accumulators)
    if snapshot.averages is not None:
        write_safetensors(os.path.join(directory, AVERAGE), snapshot.averages)
    _write_json(os.path.join(directory, "config.json"), snapshot.config)
    _write_json(os.path.join(directory, "state.json"), snapshot.state)
    manifest = {}
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        _sync(path)
        manifest[name] = {"sha256": _sha256(path), "bytes": os.path.getsize(path)}
    _write_json(os.path.join(directory, MANIFEST), manifest)
    _sync(os.path.join(directory, MANIFEST))
    _sync(directory)


def _put_in_place(temporary, target):
    """Give a finished directory its name. A complete checkpoint there (a resumed run comes by again) is kept as ``.old`` until then."""
    old = target + ".old"
    if _is_complete(target):
        _discard(old)
        os.rename(target, old)
    elif os.path.isdir(target):
        shutil.rmtree(target)
    try:
        os.rename(temporary, target)
    except OSError:
        with contextlib.suppress(OSError):
            os.rename(old, target)
        raise


def _discard(path):
    """Remove a checkpoint such that no part of it looks complete if this process dies meanwhile."""
    gone = (path[:-len(".old")] if path.endswith(".old") else path) + ".gone"
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _remove_old(directory, written, keep_last):
    """Keep ``written`` and the newest others, ``keep_last`` in all; remove what killed runs left."""
    try:
        others = [path for path in complete_checkpoints(directory) if path != written]
        for path in others[:max(0, len(others) - (keep_last - 1))]:
            _discard(path)
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            if _UNFINISHED.fullmatch(name):
                shutil.rmtree(path, ignore_errors=True)
            elif name.endswith(".old") and step_of(name) is not None and _is_complete(path[:-len(".old")]):
                _discard(path)
    except OSError as error:  # the checkpoint itself is written
        raise CheckpointError(f"cannot remove old checkpoints in {directory}: {error.strerror}; the newest one is complete") from error


def set_aside(directory, step):
    """Rename the checkpoints after ``step`` to ``step-N.aside``: a run that goes back to ``step`` must not jump to them later.

    Returns:
        the new names.
    """
    renamed = []
    for later, path in reversed(_step_directories(directory)):
        if later > step:
            base = os.path.join(directory, f"step-{later:06d}.aside")
            target = next(name for name in (base, *(f"{base}-{n}" for n in range(2, 1000))) if not os.path.lexists(name))
            os.rename(path, target)
            renamed.append(os.path.basename(target))
    return renamed


@contextlib.contextmanager
def replaced_directory(target):
    """Fill a directory that then takes the place of ``target`` (a run's ``best/``), synced and complete before the old one goes."""
    parent, name = os.path.split(os.path.abspath(target))
    fresh, old = (os.path.join(parent, f".{name}.{kind}") for kind in ("new", "old"))
    recover_directory(target)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        yield fresh
        for folder, _, files in os.walk(fresh):
            for file in files:
                _sync(os.path.join(folder, file))
            _sync(folder)
        if os.path.isdir(target):
            os.rename(target, old)
        os.rename(fresh, target)
        _sync(parent)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        recover_directory(target)
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}; what was there is kept") from error
    shutil.rmtree(old, ignore_errors=True)


def recover_directory(target):
    """Give ``target`` back what :func:`replaced_directory` was replacing when its process died between two renames."""
    parent, name = os.path.split(os.path.abspath(target))
    old = os.path.join(parent, f".{name}.old")
    if os.path.isdir(old) and not os.path.isdir(target):
        os.rename(old, target)


def verify_checkpoint(path):
    """Raise ``CheckpointError`` unless the files are exactly those of the manifest, with its sizes and hashes."""
    if not _is_complete(path):
        raise CheckpointError(f"{path} is not a complete training checkpoint (no {MANIFEST}); give a directory such as "
                              "output/<run>/checkpoints/step-000500")
    try:
        manifest = read_json(os.path.join(path, MANIFEST))
    except CheckpointError as error:
        raise CheckpointError(f"{error}: it is damaged; use another checkpoint") from None
    for name in sorted({*FILES, *manifest}):
        file, facts = os.path.join(path, name), manifest.get(name)
        if not isinstance(facts, dict) or not {"bytes", "sha256"} <= set(facts) or os.path.basename(name) != name:
            raise CheckpointError(f"{os.path.join(path, MANIFEST)} is damaged (its entry for {name}); use another checkpoint")
        if not os.path.isfile(file):
            raise CheckpointError(f"{path}: {name} is missing; use another checkpoint")
        if os.path.getsize(file) != facts["bytes"] or _sha256(file) != facts["sha256"]:
            raise CheckpointError(f"{file} is damaged (size or sha256 differs from the manifest); use another checkpoint")
    # hidden files are those of file systems and desktops
    extra = sorted(name for name in os.listdir(path) if name not in manifest and name != MANIFEST and not name.startswith("."))
    if extra:
        raise CheckpointError(f"{path}: {', '.join(extra)} was not written with it; move it away or use another checkpoint")


def read_snapshot(path, verified=False):
    """The ``Snapshot`` in a checkpoint directory.

    Args:
        verified: :func:`verify_checkpoint` was called already (hashing a large checkpoint takes a while).

    Raises:
        CheckpointError: incomplete, damaged, or of another format.
    """
    if not verified:
        verify_checkpoint(path)
    state = read_json(os.path.join(path, "state.json"))
    origin = state.get("made_by")
    if not isinstance(origin, dict) or not isinstance(state.get("step"), int) or not {"data", "best"} <= set(state):
        raise CheckpointError(f"{path}: state.json is not that of a training checkpoint of this version; start a new run from its weights "
                              "with model.init")
    if origin.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {origin.get('format')} (written by unimo2_paddle {origin.get('unimo2_paddle')}), this is "
                              f"unimo2_paddle {unimo2_paddle.__version__} with format {FORMAT}; resume with that version, or start a new run "
                              "from its weights with model.init")
    average = os.path.join(path, AVERAGE)
    return Snapshot(read_json(os.path.join(path, "config.json")), read_safetensors(os.path.join(path, "model.safetensors")),
                    _read_accumulators(path), state, read_safetensors(average) if os.path.isfile(average) else None)


def _read_accumulators(path):
    """The optimizer's accumulators; there are none before the first step."""
    file = os.path.join(path, "optimizer.safetensors")
    with safe_open(file, "np") as opened:
        empty = not opened.keys()
    return {} if empty else read_safetensors(file)


def load_checkpoint(path, model, optimizer, average=None, task=None, verified=False):
    """Read a checkpoint, then load weights, optimizer and, if the run has one, its ``WeightAverage``; returns its state mapping.

    Args:
        task: name of the run's task; a checkpoint of another one is refused.
        verified: as in :func:`read_snapshot`.

    Raises:
        CheckpointError: incomplete, damaged, or of another format, task, model or optimizer; nothing has been changed then.
    """
    snapshot = read_snapshot(path, verified)
    if task is not None and snapshot.state.get("task", task) != task:
        raise CheckpointError(f"{path} is of a run of task {snapshot.state['task']}, this one is {task}; resume with the configuration of that "
                              "run, or start a new one from its weights with model.init")
    _check_fit(path, snapshot, model, optimizer)
    if average is not None:
        if snapshot.averages is None:
            raise CheckpointError(f"{path} has no {AVERAGE}: its run did not average weights; resume with optim.ema=0, or start a new run "
                                  "from its weights with model.init")
        match_parameters(model, _shapes_of(snapshot.averages), os.path.join(path, AVERAGE))
        average.load(snapshot.averages)
    assign_parameters(model, snapshot.weights)
    load_optimizer(optimizer, snapshot.accumulators, model.parameters())
    return snapshot.state


def changes_since(state, **now):
    """What differs between the run that wrote ``state`` and this one without being refused, as texts: versions, and values in ``now``."""
    import paddle

    then = {**state, **state["made_by"]}
    now = {"unimo2_paddle": unimo2_paddle.__version__, "paddle": paddle.__version__, **now}
    return [f"{name} {then[name]}, now {value}" for name, value in now.items() if then.get(name, value) != value]


def _shapes_of(arrays):
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}


def _check_fit(path, snapshot, model, optimizer):
    """Raise ``CheckpointError`` with what differs unless weights and accumulators are those of this model and optimizer."""
    unknown = match_parameters(model, _shapes_of(snapshot.weights), path).unexpected
    if unknown:
        raise CheckpointError(f"{path} is of another model: it has {len(unknown)} parameters that this one lacks ({', '.join(unknown[:5])}"
                              f"{', ...' if len(unknown) > 5 else ''}); resume with the configuration of that run")
    then, now = snapshot.state["made_by"].get("optimizer"), made_by(optimizer)["optimizer"]
    if then != now:
        raise CheckpointError(f"{path}: the optimizer state is of {then}, this run has {now}; resume with the optimizer of that run")
    shapes = {p.name: tuple(p.shape) for p in model.parameters()}
    foreign = [key for key, array in snapshot.accumulators.items() if not _fits(key, array, shapes)]
    if foreign:
        raise CheckpointError(f"{path}: the optimizer state belongs to another model or optimizer (for example {foreign[0]}); "
                              "resume with the configuration of that run")


def _fits(key, array, shapes):
    """Whether an accumulator belongs to one of the parameters in ``shapes``: moments as large as it, powers of beta as one number."""
    name, _, kind = key.partition("|")
    return name in shapes and array.shape in ((shapes[name],) if kind in ("moment1", "moment2", "master") else ((1,), ()))
