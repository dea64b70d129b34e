"""Worker processes that build batches ahead of the trainer, in order.

Not ``paddle.io.DataLoader``: when one of its workers dies (Paddle 3.3.1) the trainer waits 5 s and gets a SystemError that names
nothing, or gets it from a signal handler in the middle of whatever it does, a checkpoint for example; closing then raises too, and a
killed trainer leaves its files in /dev/shm. Here a batch travels in anonymous shared memory that the kernel frees with its last
user, every worker has a socket of its own whose end tells either side at once that the other is gone, and each worker writes
down what it is working on where the trainer can read it after the worker's death.
"""
import logging
import mmap
import multiprocessing
import os
import signal
import traceback
import weakref
from collections import deque
from multiprocessing import reduction, util

import numpy as np

from unimo2_paddle.errors import DataError, WorkerError

logger = logging.getLogger(__name__)

PREFETCH = 2            # batches under way per worker
_ALIGNMENT = 64         # of the arrays in shared memory, in bytes
_NOTE_BYTES = 4096
_REMARK_AFTER = 60.0    # seconds of waiting for a batch after which the log says so
_PATIENCE = 5.0         # seconds a closed worker may take to finish its batch before it is killed

_note_page = None       # in a worker: the shared page that holds its note
_number = 0             # of this process: 0 in the trainer, from 1 in workers
_open_ends = weakref.WeakSet()  # the trainer's ends of all sockets


def process_number():
    """0 in the trainer, 1, 2, ... in its workers."""
    return _number


def note(text):
    """Write down what this process works on, for the message the trainer gives if it dies. Does nothing outside of a worker."""
    if _note_page is not None:
        raw = text.encode("utf-8", "backslashreplace")[: _NOTE_BYTES - 2]
        _note_page[: 2 + len(raw)] = len(raw).to_bytes(2, "little") + raw


class WorkerPool:
    """``num_workers`` forked processes that turn tasks into batches; results come in the order of the tasks.

    Args:
        build: function of one task that returns a dict of numpy arrays and plain values.
        tasks: iterator of picklable tasks; ``describe(task)`` names one in messages.
        num_workers: how many processes.
    """

    def __init__(self, build, tasks, num_workers, describe=str):
        self._tasks, self._describe = tasks, describe
        self._turn, self._workers, self._failure = 0, [], None
        context = multiprocessing.get_context("fork")  # what is built from is opened once, not pickled for every worker
        for number in range(num_workers):
            ours, theirs = context.Pipe(duplex=True)
            page = mmap.mmap(-1, _NOTE_BYTES)
            _open_ends.add(ours)
            process = context.Process(target=_work, args=(build, theirs, number, page), daemon=True, name=f"data worker {number}")
            process.start()
            theirs.close()
            self._workers.append(_Worker(number, process, ours, page))
        # before multiprocessing ends its daemons with SIGTERM, which the workers do not hear
        self._finalizer = util.Finalize(self, _end, args=(self._workers,), exitpriority=100)
        for worker in self._workers * PREFETCH:
            self._hand_out(worker)

    def __next__(self):
        """The next batch; arrays are backed by memory that is freed with them.

        Raises:
            StopIteration: the tasks have ended.
            DataError: building the batch raised one.
            WorkerError: the worker died or building failed in another way.
        """
        if self._failure is not None:
            raise self._failure  # what comes after a lost batch must not pass for it
        worker = self._workers[self._turn]
        if not worker.tasks:
            raise StopIteration
        try:
            batch = self._receive_from(worker)
        except (DataError, WorkerError) as error:
            self._failure = error
            raise
        worker.tasks.popleft()
        self._hand_out(worker)
        self._turn = (self._turn + 1) % len(self._workers)
        return batch

    def _receive_from(self, worker):
        try:
            while not worker.connection.poll(_REMARK_AFTER):
                # not an error: a remote shard may be on its way; but a dead network file system would keep it like that for ever
                logger.warning("data worker %d has been at %s for %g s more", worker.number, self._doing(worker), _REMARK_AFTER)
            kind, content = worker.connection.recv()
            batch = _receive(worker.connection, content) if kind == "batch" else None
        except (EOFError, OSError):
            raise WorkerError(self._obituary(worker)) from None
        if kind == "data error":
            raise DataError(content)
        if kind == "error":
            message, trace = content
            raise WorkerError(f"data worker {worker.number} failed at {self._doing(worker)}: {message}") from _Remote(trace)
        return batch

    def close(self):
        """End the worker processes; those in the middle of a batch get a few seconds, then are killed."""
        self._finalizer()

    def _hand_out(self, worker):
        task = next(self._tasks, None)
        if task is not None:
            worker.tasks.append(task)
            try:
                worker.connection.send(task)
            except OSError:
                pass  # it died: found out when its next batch is due, after those it has finished

    def _doing(self, worker):
        length = int.from_bytes(worker.page[:2], "little")
        step, doing = self._describe(worker.tasks[0]), worker.page[2: 2 + length].decode("utf-8", "replace")
        return f"{step}, {doing}" if doing else step

    def _obituary(self, worker):
        worker.process.join(_PATIENCE)
        code = worker.process.exitcode
        if code in (-signal.SIGKILL, -signal.SIGBUS):
            how = (f"was ended by {signal.Signals(-code).name}, as happens when memory runs out: lower data.num_workers or the batch size, "
                   "or look for a huge record there")
        elif code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        else:
            how = f"ended with status {code}"
        return f"data worker {worker.number} (process {worker.process.pid}) {how}. It was at {self._doing(worker)}. Resume the run with --resume auto"


class _Worker:
    """The trainer's side of a worker."""

    def __init__(self, number, process, connection, page):
        self.number, self.process, self.connection, self.page = number, process, connection, page
        self.tasks = deque()  # handed out and not yet received


class _Remote(Exception):
    """The traceback of a worker, shown as the cause of the trainer's error."""

    def __str__(self):
        return "\n" + self.args[0]


def _end(workers):
    for worker in workers:
        worker.connection.close()
    for worker in workers:
        worker.process.join(_PATIENCE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _work(build, connection, number, page):
    """A worker's life: ends when the trainer's end of the socket does."""
    import cv2

    global _note_page, _number
    _note_page, _number = page, number + 1
    # Ctrl-C and a batch system's SIGTERM go to the whole group, but the trainer still wants batches to finish its step with
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for end in list(_open_ends):  # held open here, a socket would not tell the other workers that the trainer is gone
        end.close()
    cv2.setNumThreads(0)  # the workers are the parallelism; OpenCV's own threads would only fight for the same cores
    try:
        while True:
            task = connection.recv()
            note("")
            try:
                batch = build(task)
            except DataError as error:
                connection.send(("data error", str(error)))
            except BaseException as error:
                connection.send(("error", (f"{type(error).__name__}: {error}", traceback.format_exc()[-4000:])))
            else:
                _send(connection, batch)
    except (EOFError, OSError):
        pass
    os._exit(0)  # nothing of the trainer's (boards, communicators) may be finished here


def _send(connection, batch):
    """A batch as a description of its arrays and the descriptor of the memory that holds them."""
    layout, plain, size = {}, {}, 0
    for key, value in batch.items():
        if isinstance(value, np.ndarray):
            layout[key] = (size, value.dtype.str, value.shape)
            size += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
        else:
            plain[key] = value
    descriptor = os.memfd_create("unimo2_batch")
    try:
        if size:
            os.ftruncate(descriptor, size)
            memory = mmap.mmap(descriptor, size)
            for key, (offset, dtype, shape) in layout.items():
                np.ndarray(shape, dtype, memory, offset)[...] = batch[key]
        connection.send(("batch", (list(batch), layout, plain, size)))
        reduction.send_handle(connection, descriptor, None)
    finally:
        os.close(descriptor)


def _receive(connection, content):
    keys, layout, plain, size = content
    descriptor = reduction.recv_handle(connection)
    try:
        memory = mmap.mmap(descriptor, size) if size else b""
    finally:
        os.close(descriptor)
    arrays = {key: np.ndarray(shape, dtype, memory, offset) for key, (offset, dtype, shape) in layout.items()}
    return {key: arrays[key] if key in arrays else plain[key] for key in keys}
