"""Learning-rate schedules as pure functions of the optimizer step (step 0 is the first update)."""
from dataclasses import dataclass, field
from typing import List

from unimo2_paddle.errors import ConfigError

SCHEDULES = ("linear_warmup_decay", "fleet_linear", "noam", "fleet_noam", "piecewise", "cosine", "constant")


@dataclass
class ScheduleConfig:
    """What a schedule needs to know; steps are optimizer steps (accumulated micro-batches count once)."""

    schedule: str = "linear_warmup_decay"
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    total_steps: int = 1
    drop_at_steps: List[int] = field(default_factory=list)
    drop_factor: float = 0.1


def make_schedule(config):
    """The learning rate as a function ``step -> float``.

    * ``linear_warmup_decay``: warm-up, then a line to 0 at ``total_steps`` counted from step 0, so the rate drops at once when the
      warm-up ends (the authors' utils/optimization.py).
    * ``fleet_linear``: warm-up to the full rate, then a line that reaches 0 at ``warmup_steps + total_steps`` (the authors'
      optimization_fleet.py; at ``total_steps`` it is still lr * warmup / total).
    * ``noam`` / ``fleet_noam``: inverse square root, counted from 1 / from 0 in the authors' two files.
    * ``piecewise``: times ``drop_factor`` at every step of ``drop_at_steps`` (that step already has the new rate).
    * ``cosine``: warm-up, then half a cosine to 0 at ``total_steps``. ``constant``: warm-up, then flat.

    Raises:
        ConfigError: unknown schedule or impossible numbers.
    """
    name, rate, warmup, total = config.schedule, config.learning_rate, config.warmup_steps, config.total_steps
    if name not in SCHEDULES:
        raise ConfigError(f"schedule: {name!r} is not one of {', '.join(SCHEDULES)}")
    if warmup < 0 or total < 1:
        raise ConfigError(f"schedule: warmup_steps {warmup} must be >= 0 and total_steps {total} >= 1")
    if name in ("noam", "fleet_noam"):
        if warmup < 1:
            raise ConfigError(f"schedule: {name} needs warmup_steps >= 1")
        first = 1 if name == "noam" else 0

        def noam(step):
            count = step + first
            return rate * min(count / warmup, (warmup / count) ** 0.5 if count else 0.0)

        return noam
    if name == "piecewise":
        return lambda step: rate * config.drop_factor ** sum(step >= s for s in config.drop_at_steps)
    if name == "cosine":
        from math import cos, pi

        def after(step):
            return 0.5 * (1 + cos(pi * min(1.0, (step - warmup) / max(1, total - warmup))))
    elif name == "constant":
        def after(step):
            return 1.0
    else:
        start = warmup if name == "fleet_linear" else 0

        def after(step):
            return max(0.0, 1.0 - (step - start) / total)
    return lambda step: rate * (step / warmup if step < warmup else after(step))
