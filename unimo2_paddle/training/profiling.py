"""``run.profile: [10, 20]``: what Paddle's profiler sees in these steps, as a Chrome trace and a table."""
import contextlib
import io
import os

import paddle

DIRECTORY = "profile"


class StepProfiler:
    """Profiles the steps numbered ``span[0]`` to ``span[1]`` (from 1, both included); does nothing when ``span`` is empty.

    Writes ``<output>/profile/steps-A-B.json`` (open it in chrome://tracing or ui.perfetto.dev) and ``steps-A-B.txt``, the operators by time.

    Args:
        span: two steps or nothing; output: the run's directory; enabled: first worker.
    """

    def __init__(self, span, output, enabled):
        self.first, self.last = span if span and enabled else (0, 0)
        self.directory, self._profiler = os.path.join(output, DIRECTORY), None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._profiler is not None:
            self._finish()

    def step(self, number):
        """Step ``number`` begins."""
        if self._profiler is None and self.first and self.first <= number <= self.last:
            targets = [paddle.profiler.ProfilerTarget.CPU]
            if paddle.is_compiled_with_cuda():
                targets.append(paddle.profiler.ProfilerTarget.GPU)
            self._begun = number
            # without a function of ours Paddle writes a second trace, into the working directory
            self._profiler = paddle.profiler.Profiler(targets=targets, on_trace_ready=lambda profiler: None)
            self._profiler.start()

    def end(self, number):
        """Step ``number`` is done; returns a line for the log when the trace was written."""
        if self._profiler is None:
            return None
        self._ended = number
        if number < self.last:
            self._profiler.step()
            return None
        return self._finish()

    def _finish(self):
        profiler, self._profiler, self.first = self._profiler, None, 0
        profiler.stop()
        os.makedirs(self.directory, exist_ok=True)
        name = os.path.join(self.directory, f"steps-{self._begun}-{getattr(self, '_ended', self._begun)}")
        profiler.export(name + ".json", format="json")
        table = io.StringIO()
        with contextlib.redirect_stdout(table):  # Paddle prints it, there is no other way to it
            profiler.summary(sorted_by=paddle.profiler.SortedKeys.CPUTotal, op_detail=True, thread_sep=False, time_unit="ms")
        with open(name + ".txt", "w", encoding="utf-8") as file:
            file.write(table.getvalue())
        return f"profile of these steps: {name}.json, {name}.txt"
