"""Checks that a run looks after itself: finite steps, gradients everywhere, checkpoints that can be written and read."""
import json
import math
import os
import shutil

import numpy as np
import paddle

from unimo2_paddle.checkpoints import store
from unimo2_paddle.checkpoints.convert import read_safetensors
from unimo2_paddle.checkpoints.released import parameter_arrays
from unimo2_paddle.errors import CheckpointError, TrainingError
from unimo2_paddle.training.fused_adamw import fits, square_sums

FIRST_STEPS = 3   # of every kind of step: how many may pass before a parameter without gradient is reported
SHOWN = 20        # names in a message


def gradient_norms(parameters, scale=1.0):
    """Euclidean norm of every gradient, ``{parameter name: float}``; parameters without gradient are left out.

    Args:
        parameters: after a backward pass; scale: what the loss was multiplied with before it.
    """
    graded = [(p.name, p.grad) for p in parameters if p.grad is not None]
    if not graded:
        return {}
    if fits([gradient for _, gradient in graded]):
        norms = np.sqrt(square_sums([gradient for _, gradient in graded])) / scale
        return {name: norm for (name, _), norm in zip(graded, norms.tolist())}
    # half precision would overflow in the sum of squares
    wide = [g if g.dtype == paddle.float32 else g.astype("float32") for _, g in graded]
    norms = paddle.stack([paddle.linalg.norm(gradient.reshape([-1])) for gradient in wide])
    return {name: norm / scale for (name, _), norm in zip(graded, norms.reshape([-1]).tolist())}


def global_norm(norms):
    """The norm of all gradients together."""
    return math.sqrt(sum(value * value for value in norms.values()))


def _listed(names):
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


class GradientCoverage:
    """Finds trainable parameters that no kind of step trains.

    Args:
        parameters: of the model; kinds: names of the kinds of steps (one per corpus), each of which trains some parameters.
    """

    def __init__(self, parameters, kinds):
        self._without = {p.name for p in parameters if not p.stop_gradient}
        self._count, self._left = len(self._without), {kind: FIRST_STEPS for kind in kinds}

    def note(self, kind, norms):
        """Take the gradients of one step; returns the warning once every kind has had its first steps, else ``None``."""
        if not self._left:
            return None
        self._without -= {name for name, norm in norms.items() if norm > 0}
        self._left[kind] = self._left.get(kind, FIRST_STEPS) - 1
        if any(left > 0 for left in self._left.values()):
            return None
        kinds, self._left = ", ".join(filter(None, self._left)), {}  # a finetuning task has one kind, without a name
        if not self._without:
            return None
        return (f"warning: {len(self._without)} of {self._count} trainable parameters got no gradient in the first steps{f' ({kinds})' if kinds else ''} and "
                f"stay as they are: {_listed(sorted(self._without))}")


def _plain(value):
    """A float as JSON allows it."""
    return value if math.isfinite(value) else str(value)


def summary(value):
    """Shape, type and range of an array or tensor, as plain Python."""
    array = np.asarray(value)
    facts = {"shape": list(array.shape), "dtype": str(array.dtype)}
    if array.size and array.dtype.kind in "fiub":
        finite = array[np.isfinite(array)] if array.dtype.kind == "f" else array
        facts["not_finite"] = int(array.size - finite.size)
        if finite.size:
            facts.update(min=float(finite.min()), max=float(finite.max()), mean=float(finite.mean(dtype="float64")))
    return facts


class StepWitness:
    """What one worker remembers of a step until it is known to be good: the keys and losses of all its micro-batches, and one batch's
    arrays (of the first whose loss is not finite, else of the last)."""

    def __init__(self):
        self.micro_batches, self._batch, self._caught = [], None, False

    def take(self, batch, losses):
        """Note a micro-batch and its losses (floats)."""
        self.micro_batches.append({"corpus": batch.get("corpus", ""), "keys": list(batch.get("keys", ())),
                                   "losses": {name: _plain(value) for name, value in losses.items()}})
        if not self._caught:
            self._batch, self._caught = batch, not math.isfinite(losses["loss"])
            self._number = len(self.micro_batches) - 1

    def facts(self):
        """Everything as plain Python."""
        arrays = {name: summary(value) for name, value in self._batch.items() if hasattr(value, "dtype")}
        return {"micro_batches": self.micro_batches, "arrays_of_micro_batch": self._number, "arrays": arrays}


class BadSteps:
    """Counts steps whose loss or gradient is not finite, writes down what was in them, and ends the run above the limit.

    Args:
        directory: ``<output>/bad_steps``; allowed: how many may be skipped in the whole run; count: those of the run so far.
        rank: of this worker.
    """

    def __init__(self, directory, allowed, count=0, rank=0):
        self.directory, self.allowed, self.count, self.rank = directory, allowed, count, rank

    def note(self, step, terms, norms, witness):
        """Write ``step-N.json`` (other workers than the first: ``step-N.worker-R.json``) and count the step (numbered from 0).

        Args:
            terms: the step's loss terms over all workers; norms: :func:`gradient_norms` of this worker; witness: its ``StepWitness``.

        Returns:
            a line for the log.

        Raises:
            TrainingError: more bad steps than allowed.
        """
        self.count += 1
        broken = sorted(name for name, norm in norms.items() if not math.isfinite(norm))
        place = os.path.join(self.directory, f"step-{step}.json" if self.rank == 0 else f"step-{step}.worker-{self.rank}.json")
        os.makedirs(self.directory, exist_ok=True)
        facts = {"step": step, "worker": self.rank, "losses_over_all_workers": {name: _plain(value) for name, value in terms.items()},
                 "gradients_not_finite": broken, **witness.facts()}
        with open(place + ".tmp", "w", encoding="utf-8") as file:
            file.write(json.dumps(facts, indent=1) + "\n")
        os.replace(place + ".tmp", place)
        if math.isfinite(terms["loss"]):
            what = f"{len(broken)} gradients are not finite ({_listed(broken)})" if broken else "another worker's gradients are not finite"
        else:
            what = f"the loss is {terms['loss']} ({', '.join(f'{k} {v:.4g}' for k, v in terms.items())})"
        if self.count > self.allowed:
            skipped = f" ({self.allowed} such steps were skipped before, run.skip_bad_steps allows no more)" if self.allowed else ""
            raise TrainingError(f"step {step}: {what}{skipped}; lower optim.learning_rate or look at the data of this step, listed in {place}")
        return f"warning: step {step}: {what}; skipped, {self.count} of {self.allowed} (run.skip_bad_steps), see {place}"


def trial_save(output, save, model, save_assets, first_worker=True):
    """Write a checkpoint into a hidden directory of the run, read it back, remove it: an error now costs less than one in a day.

    Args:
        output: the run's directory; save: ``save(directory) -> path`` writes a checkpoint; save_assets: ``save_assets(directory)``;
        first_worker: the others only take part in ``save``.

    Returns:
        a warning when the disk has not the room for the run's checkpoints (a trained optimizer triples them), else ``None``.

    Raises:
        CheckpointError: it could not be written, or what was read back differs.
    """
    directory = os.path.join(output, ".trial")
    if not first_worker:
        save(directory)
        return None
    shutil.rmtree(directory, ignore_errors=True)  # of a run that was killed here
    try:
        path = save(directory)
        save_assets(directory)
        store.verify_checkpoint(path)
        stored, own = read_safetensors(os.path.join(path, "model.safetensors")), parameter_arrays(model)
        wrong = [name for name in own if name not in stored or not np.array_equal(stored[name], own[name], equal_nan=True)]
        if wrong or len(stored) != len(own):
            raise CheckpointError(f"{path}: the trial checkpoint reads back differently ({_listed(wrong)}); the disk or its driver loses data, "
                                  "choose another run.output")
        size = 3 * os.path.getsize(os.path.join(path, "model.safetensors"))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    free = shutil.disk_usage(output).free
    if free < 2 * size:
        return f"warning: {output} has {free / 1e9:.1f} GB left, a checkpoint will take about {size / 1e9:.1f} GB; make room or lower run.keep_last"
    return None
