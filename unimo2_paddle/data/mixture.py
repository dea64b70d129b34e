"""Which records every step reads: corpora drawn by counter-based generators, so that all workers agree and resuming is exact."""
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Dict, List, Tuple

import numpy as np

from unimo2_paddle.data.workers import WorkerPool
from unimo2_paddle.errors import CheckpointError


def generator(*key):
    """A random generator that is a function of the integers in ``key`` alone (no hidden state, same on every worker)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([int(k) for k in key])))


CORPUS_DRAW, SOURCE_DRAW, RECORD_DRAW, STEP_DRAW, ORDER_DRAW = range(5)  # name spaces of the generators
CORPORA = ("pairs", "images", "texts")


@dataclass
class Draw:
    """One micro-batch of this worker."""

    step: int
    corpus: str
    slots: List[Tuple[int, int, int]]  # (slot in the step's global batch, source, record index)
    size: int                          # samples of the whole global micro-batch
    keys: List[str] = field(default_factory=list)  # names of the records that were read for it, once it is built

    def record_generator(self, seed, slot):
        """The generator for everything random about one sample (caption choice, masks, augmentation)."""
        return generator(seed, RECORD_DRAW, self.step, slot)


class MixturePlan:
    """The endless sequence of draws.

    A step's corpus follows from (seed, step); a sample's source from (seed, step, slot); sources are read in their epoch order, each
    record once per epoch. Nothing depends on the number of workers or of micro-batches: a micro-batch is a run of slots of the step's
    global batch, and a worker takes its slice of it.

    Args:
        sources: corpus -> list of (weight, ``EpochOrder``); weights: corpus -> share of the steps.
        global_batch: corpus -> samples per optimizer step over all workers and micro-batches.
        seed, accumulate: seed and micro-batches per step; rank, world_size: this worker.
        state: from :meth:`state_dict` of any world size.

    Raises:
        CheckpointError: the state is not of these corpora and sources, or their records or reading order are not the same.
    """

    def __init__(self, sources, weights, global_batch, seed, accumulate=1, rank=0, world_size=1, state=None):
        self.sources, self.global_batch, self.seed = sources, global_batch, seed
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size
        self.corpora = [c for c in (*CORPORA, *sorted(set(weights) - set(CORPORA))) if weights.get(c, 0) > 0]
        shares = np.array([weights[c] for c in self.corpora], dtype=np.float64)
        self.thresholds = np.cumsum(shares / shares.sum())
        if state is None:
            state = {"step": 0, "read": {c: [0] * len(sources[c]) for c in self.corpora}}
        now, then = {c: len(sources[c]) for c in self.corpora}, {c: len(counts) for c, counts in state["read"].items()}
        if now != then:
            raise CheckpointError(f"the data position to resume from has the shard sets {then}, the configuration {now}; resume with the "
                                  "corpora of the run, or start a new run from its weights with model.init")
        self._orders = {c: [order.fingerprint() for _, order in sources[c]] for c in self.corpora}
        self._check_orders(state.get("orders"))
        self.step, self.read = int(state["step"]), {c: list(counts) for c, counts in state["read"].items()}

    def _check_orders(self, stored):
        """A count of records read means nothing in another order: some would come twice, others never."""
        for corpus in self.corpora if stored else ():
            for number, (now, then) in enumerate(zip(self._orders[corpus], stored[corpus])):
                if now != then:
                    changed = ", ".join(f"{key} {then.get(key)} then and {now[key]} now" for key in now if now[key] != then.get(key))
                    raise CheckpointError(
                        f"the data position to resume from belongs to another reading order of {corpus} source {number} ({changed}): some "
                        "records would come twice and others never. Resume with the shards, seed and shuffle window of the run, or start "
                        "a new run from its weights with model.init")

    def state_dict(self):
        """The position between two steps: the next step, how many records each source has given, and in which order."""
        return {"step": self.step, "read": {c: list(counts) for c, counts in self.read.items()}, "orders": self._orders}

    def epochs(self, state):
        """How often each corpus has been read at a position from :meth:`state_dict`, ``{corpus: epochs}``."""
        sizes = {c: sum(len(order) for _, order in self.sources[c]) for c in self.corpora}
        return {c: sum(state["read"][c]) / sizes[c] for c in self.corpora}

    def corpus_of(self, step):
        """The corpus of a step."""
        draw = generator(self.seed, CORPUS_DRAW, step).random()
        return self.corpora[min(int(np.searchsorted(self.thresholds, draw, side="right")), len(self.corpora) - 1)]

    def next_step(self):
        """The draws of the next optimizer step (one per micro-batch); moves the state on."""
        corpus = self.corpus_of(self.step)
        sources = self.sources[corpus]
        size = self.global_batch[corpus] // self.accumulate
        share = size // self.world_size
        weights = np.array([weight for weight, _ in sources], dtype=np.float64)
        chosen = generator(self.seed, SOURCE_DRAW, self.step).choice(len(sources), size=size * self.accumulate, p=weights / weights.sum())
        draws = [Draw(self.step, corpus, [], size) for _ in range(self.accumulate)]
        for slot, source in enumerate(chosen):
            position = self.read[corpus][source]
            self.read[corpus][source] += 1
            micro, place = divmod(slot, size)
            if place // share == self.rank:
                order = sources[source][1]
                draws[micro].slots.append((slot, int(source), order.index(*divmod(position, len(order)))))
        self.step += 1
        return draws


class Batches:
    """Endless batches of a plan, built in worker processes when ``num_workers`` > 0, in order.

    ``next(batches)`` gives one micro-batch; ``state_dict()`` is the position after the last whole step that was taken out, whatever
    has been prefetched; ``close()`` ends the worker processes. Errors: see ``WorkerPool``.

    Args:
        plan: ``MixturePlan``; build: function of a ``Draw``; num_workers: worker processes, 0: batches are built by the caller.
        lookahead: ``Lookahead`` that is told how far the plan is, or None.
    """

    def __init__(self, plan, build, num_workers=0, lookahead=None):
        self.plan, self.build, self._lookahead = plan, build, lookahead
        self._states, self._taken, self._state = deque(), 0, plan.state_dict()
        self._draws = self._next_draws()
        self._pool = WorkerPool(build, self._draws, num_workers, _describe) if num_workers else None

    def _next_draws(self):
        while True:
            if self._lookahead is not None:
                self._lookahead(self.plan.read)
            draws = self.plan.next_step()
            self._states.append(self.plan.state_dict())
            yield from draws

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self._pool) if self._pool is not None else self.build(next(self._draws))
        self._taken += 1
        if self._taken == self.plan.accumulate:
            self._taken, self._state = 0, self._states.popleft()
        return batch

    def state_dict(self) -> Dict[str, Any]:
        """Where a resumed run goes on."""
        return self._state

    def epochs(self):
        """How often each corpus has been read by the steps taken out, ``{corpus: epochs}``."""
        return self.plan.epochs(self._state)

    def close(self):
        """End the worker processes, if there are any."""
        if self._lookahead is not None:
            self._lookahead.close()
        if self._pool is not None:
            self._pool.close()


def _describe(draw):
    return f"step {draw.step} ({draw.corpus})"
