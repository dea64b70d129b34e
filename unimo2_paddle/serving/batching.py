"""Concurrent requests answered together: those that arrive while the model computes, or within a short wait, share its next forward."""
import collections
import threading
import time
from concurrent.futures import Future
from typing import Any, NamedTuple

from unimo2_paddle.errors import Unimo2Error


class Answer(NamedTuple):
    """A result with what it took: requests of its batch, seconds it waited, seconds of the batch's forward."""

    result: Any
    batch: int
    waited: float
    computed: float


class Stopped(Unimo2Error):
    """The service is stopping and takes nothing new."""


class Batcher:
    """Collects requests and runs them in batches in a thread of its own.

    Args:
        run: list of requests -> list of results; max_batch: requests per forward; max_wait: seconds that the first of a batch waits for others.
        compute: lock held while anything computes, shared by all models of a process: on a CPU two forwards at once only slow each other.

    A request whose future is cancelled before its turn is left out. If a batch fails, its requests are run one by one, so that only the one
    that is to blame fails.
    """

    def __init__(self, run, max_batch=16, max_wait=0.005, compute=None, name="model"):
        self.run, self.max_batch, self.max_wait, self.compute = run, max_batch, max_wait, compute or threading.Lock()
        self.pending, self.changed, self.closed = collections.deque(), threading.Condition(), False
        self.thread = threading.Thread(target=self._work, name=f"batcher-{name}", daemon=True)
        self.thread.start()

    def submit(self, request):
        """A ``Future`` of the request's :class:`Answer`.

        Raises:
            Stopped: after :meth:`close`.
        """
        future = Future()
        with self.changed:
            if self.closed:
                raise Stopped("the service is stopping")
            self.pending.append((request, future, time.monotonic()))
            self.changed.notify()
        return future

    def close(self, timeout=None):
        """Take nothing new, finish what is there; returns whether it was finished within ``timeout`` seconds."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join(timeout)
        return not self.thread.is_alive()

    def _work(self):
        while self._ready():
            with self.compute:
                batch = self._take()
                if batch:
                    self._answer(batch)

    def _ready(self):
        """Wait until a batch is due; false when all is done and closed."""
        with self.changed:
            while not self.pending:
                if self.closed:
                    return False
                self.changed.wait()
            due = self.pending[0][2] + self.max_wait
            while len(self.pending) < self.max_batch and not self.closed and time.monotonic() < due:
                self.changed.wait(max(0.0, due - time.monotonic()))
            return True

    def _take(self):
        batch = []
        with self.changed:
            while self.pending and len(batch) < self.max_batch:
                one = self.pending.popleft()
                if one[1].set_running_or_notify_cancel():
                    batch.append(one)
        return batch

    def _answer(self, batch):
        began = time.monotonic()
        try:
            results = self.run([request for request, _, _ in batch])
        except Exception as error:  # whatever it is, it belongs to the requests: the thread must go on
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            else:
                for one in batch:
                    self._answer([one])
            return
        computed = time.monotonic() - began
        for result, (_, future, arrived) in zip(results, batch):
            future.set_result(Answer(result, len(batch), began - arrived, computed))
