"""What a run left in its output directory, read back for reports: configuration, curves, judgements, environment."""
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any, Dict, List, Tuple

from unimo2_paddle.config import SOURCE, leading_comments, read_yaml
from unimo2_paddle.errors import UserInputError

EVALUATIONS = "evaluations.json"
Points = List[Tuple[int, float]]


@dataclass
class Run:
    """One output directory.

    ``config``: the resolved configuration; ``header``: the comments of the file it came from; ``source``: that file's name.
    ``curves``: kind ("train" or an evaluator's name) -> metric -> points. ``status``: the content of status.json.
    ``evaluations``: evaluator name -> {"metrics", "model", "environment"} of ``unimo2 eval``.
    """

    directory: str
    config: Dict[str, Any] = field(default_factory=dict)
    header: List[str] = field(default_factory=list)
    source: str = ""
    status: Dict[str, Any] = field(default_factory=dict)
    curves: Dict[str, Dict[str, Points]] = field(default_factory=dict)
    evaluations: Dict[str, Dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self):
        return os.path.normpath(self.directory)

    @property
    def environment(self):
        """Where the run was carried out: of the training, else of the newest evaluation."""
        own = [self.status.get("environment"), *(entry.get("environment") for entry in reversed(list(self.evaluations.values())))]
        return next((one for one in own if one), {})

    def judgements(self):
        """``(evaluator, metric) -> (value at the best step or None, last value)`` of the evaluations during training."""
        best = (self.status.get("best") or {}).get("step")
        return {(kind, metric): (dict(points).get(best), points[-1][1])
                for kind, metrics in self.curves.items() if kind != "train" for metric, points in metrics.items() if points}

    def value(self, evaluator, metric):
        """The figure of an evaluator that counts: of ``unimo2 eval`` if there was one, else of the best step, else the last."""
        found = self.evaluations.get(evaluator, {}).get("metrics", {}).get(metric)
        if found is None:
            best, last = self.judgements().get((evaluator, metric), (None, None))
            found = last if best is None else best
        return found


def read_run(directory):
    """Read the output directory of a training run or an evaluation.

    Raises:
        UserInputError: it holds neither; or what it holds cannot be read.
    """
    run = Run(os.fspath(directory))
    paths = {name: os.path.join(run.directory, name) for name in ("config.yaml", "metrics.jsonl", "status.json")}
    evaluations = os.path.join(run.directory, "predictions", EVALUATIONS)
    if not any(os.path.isfile(path) for path in (*paths.values(), evaluations)):
        raise UserInputError(f"{run.directory} holds no run: no config.yaml, metrics.jsonl or predictions/{EVALUATIONS}; give the run.output of "
                             "unimo2 train or unimo2 eval")
    run.status, run.evaluations = _read_json(paths["status.json"]), _read_json(evaluations)
    run.curves = read_curves(paths["metrics.jsonl"])
    if os.path.isfile(paths["config.yaml"]):
        run.config, run.header = read_yaml(paths["config.yaml"]), leading_comments(paths["config.yaml"])
    elif run.evaluations:
        newest = list(run.evaluations.values())[-1]
        run.config, run.header = newest.get("config", {}), newest.get("header", [])
    run.source = next((line[len(SOURCE):] for line in run.header if line.startswith(SOURCE)), "")
    return run


def _read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserInputError(f"{path} cannot be read ({error}); move it away, the rest of the run is still shown") from None
    if not isinstance(values, dict):
        raise UserInputError(f"{path} is not a mapping; move it away, the rest of the run is still shown")
    return values


def read_curves(path):
    """The curves of a ``metrics.jsonl``: kind -> metric -> ``[(step, value), ...]``; a broken line is passed over.

    A run that was resumed from an earlier step does steps again: what it wrote the last time counts.
    """
    records = {}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    kind, step = record["kind"], int(record["step"])
                except (ValueError, KeyError, TypeError):
                    continue  # cut short by a crash
                own = records.setdefault(kind, {})
                while own and next(reversed(own)) >= step:
                    own.popitem()
                own[step] = record
    except FileNotFoundError:
        return {}
    curves = {}
    for kind, own in records.items():
        for step, record in own.items():
            for name, value in record.items():
                if name not in ("step", "kind") and isinstance(value, (int, float)) and math.isfinite(value):
                    curves.setdefault(kind, {}).setdefault(name, []).append((step, float(value)))
    return curves


def note_evaluations(directory, judged, config, environment):
    """Add what ``unimo2 eval`` found to ``predictions/evaluations.json``; earlier evaluations of other names stay.

    Args:
        directory: ``run.output``; judged: (evaluator name, metrics) pairs; config: the ``RunConfig``; environment: a plain mapping.
    """
    from unimo2_paddle.tasks.reporting import write_json

    path = os.path.join(directory, "predictions", EVALUATIONS)
    try:
        known = _read_json(path)
    except UserInputError:
        known = {}  # a damaged note must not stop an evaluation
    for name, metrics in judged:
        known.pop(name, None)
        known[name] = {"metrics": {key: float(value) for key, value in metrics.items()}, "model": config.model.init, "config": config.resolved(),
                       "header": config.header(), "environment": environment}
    write_json(path, known, sort_keys=False)


def flat(config, prefix=""):
    """A nested configuration as ``{"group.key": value}``."""
    found = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found
