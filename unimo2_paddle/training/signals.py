"""Asking a run to stop: SIGTERM and SIGINT end it after the step in hand; a second one ends the process at once."""
import os
import signal
import sys
import threading
import time

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "SIGINT"}
REPEATS = 1.0  # seconds: paddle.distributed.launch sends SIGTERM three times within 0.6 s, and that is one request


class StopSignals:
    """Inside this context SIGTERM and SIGINT are noted in ``received`` (the signal's name, else ``None``) instead of ending the process.

    A thread reads the signals from a pipe: so the second one works, too, while the main thread waits in native code, for example for
    a worker that is gone. Outside the main thread, where Python cannot handle signals, nothing is changed.
    """

    def __init__(self):
        self.received = None
        self._before, self._pipe = {}, None

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._before = {number: signal.signal(number, self._note) for number in NAMES}
        self._before_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._watch = threading.Thread(target=self._read, name="stop-signals", daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_):
        if self._pipe is None:
            return
        signal.set_wakeup_fd(self._before_pipe)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._pipe[1])  # ends the thread's reading
        self._watch.join()
        os.close(self._pipe[0])
        self._pipe = None

    def _note(self, number, _):
        self.received = self.received or NAMES[number]

    def _read(self):
        first = None
        for number in iter(lambda: os.read(self._pipe[0], 1), b""):
            number, now = number[0], time.monotonic()
            if number not in NAMES:
                continue
            if first is None:
                first = now
                self.received = self.received or NAMES[number]
                print(f"{NAMES[number]}: finishing this step, then saving; a second signal ends the run at once", file=sys.stderr, flush=True)
            elif now - first > REPEATS:
                os._exit(128 + number)
