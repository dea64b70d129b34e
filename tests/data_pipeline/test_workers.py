"""Worker processes: batches arrive whole and in order, and whoever dies, the others know at once and leave nothing behind."""
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from unimo2_paddle.data import workers
from unimo2_paddle.data.workers import WorkerPool, note
from unimo2_paddle.errors import DataError, WorkerError

ROOT = Path(__file__).resolve().parents[2]


def build(task):
    note(f"shards/pairs-00007.tar, record {task}")
    if task == "raise":
        raise ValueError("boom")
    if task == "bad data":
        raise DataError("record 17 is broken")
    if isinstance(task, str):
        os.kill(os.getpid(), getattr(signal, task))
        time.sleep(0.2)
    return {"image": np.full([2, 3, 3, 3], 7, np.uint8), "task": task, "empty": np.zeros([0, 4], np.float32), "scalar": np.float64(2).reshape(()),
            "worker": os.getpid()}


@pytest.fixture
def pool():
    """Makes pools of two workers over a list of tasks and closes them."""
    made = []

    def make(tasks, number=2, build=build):
        made.append(WorkerPool(build, iter(tasks), number))
        return made[-1]

    yield make
    for one in made:
        one.close()


def open_files():
    return len(os.listdir("/proc/self/fd"))


def wait_until(condition, seconds=20):
    end = time.time() + seconds
    while not condition() and time.time() < end:
        time.sleep(0.02)
    return condition()


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_batches_arrive_in_order_with_every_kind_of_value(pool):
    batches = pool(range(9), 3)
    for number in range(9):
        batch = next(batches)
        assert list(batch) == ["image", "task", "empty", "scalar", "worker"]
        assert batch["task"] == number and (batch["image"] == 7).all() and batch["image"].dtype == np.uint8
        assert batch["empty"].shape == (0, 4) and batch["scalar"].shape == () and batch["scalar"] == 2
        batch["image"][0] = 1  # a batch is the trainer's own
    with pytest.raises(StopIteration):
        next(batches)


def test_a_batch_without_arrays_arrives(pool):
    assert next(pool([1], build=lambda task: {"task": task})) == {"task": 1}


def test_kept_batches_stay_what_they_are_and_dropped_ones_free_their_memory(pool):
    batches = pool(range(40), build=lambda task: {"image": np.full([1000], task % 256, np.uint8)})
    kept = next(batches)
    before = open_files()
    for _ in range(39):
        next(batches)
    assert (kept["image"] == 0).all() and open_files() == before
    assert not [line for line in Path("/proc/self/maps").read_text().splitlines() if "unimo2_batch" in line][2:]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGUSR2"])
def test_a_dead_worker_is_an_error_that_names_the_record_after_the_finished_batches(pool, name):
    batches = pool([0, 1, 2, name, 4, 5, 6])
    assert [next(batches)["task"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(WorkerError, match=f"{name}.*shards/pairs-00007.tar, record {name}.*--resume auto"):
        next(batches)
    with pytest.raises(WorkerError):  # asking again neither hangs nor skips the batch
        next(batches)
    batches.close()
    assert not multiprocessing.active_children()


def test_an_exception_of_a_worker_carries_its_text_place_and_traceback(pool):
    batches = pool([0, "raise"])
    next(batches)
    with pytest.raises(WorkerError, match="record raise: ValueError: boom") as caught:
        next(batches)
    assert "in build" in str(caught.value.__cause__)


def test_a_data_error_of_a_worker_stays_one(pool):
    batches = pool(["bad data", 1, 2, 3])
    for _ in range(2):  # asked again, it does not give another batch in place of the lost one
        with pytest.raises(DataError, match="^record 17 is broken$"):
            next(batches)


def test_signals_to_the_whole_group_do_not_end_workers_before_the_trainer_wants(pool):
    batches = pool(["SIGINT", "SIGTERM", "SIGINT", "SIGTERM"])
    assert [next(batches)["task"] for _ in range(4)] == ["SIGINT", "SIGTERM", "SIGINT", "SIGTERM"]


def test_closing_one_pool_leaves_the_other_and_does_not_wait_for_it(pool):
    first, second = pool(range(100)), pool(range(100))
    pids = {next(first)["worker"] for _ in range(2)}
    next(second)
    first.close()
    assert not any(map(alive, pids)) and all(worker.process.exitcode is None for worker in second._workers)
    assert all(worker.process.exitcode == 0 for worker in first._workers), "ended by themselves, not killed"
    assert next(second)["task"] == 1
    first.close()


def test_a_worker_that_does_not_come_back_is_killed_when_the_pool_closes(pool, monkeypatch):
    monkeypatch.setattr(workers, "_PATIENCE", 0.2)
    batches = pool([0], 1, build=lambda task: time.sleep(1000))
    batches.close()
    assert batches._workers[0].process.exitcode == -signal.SIGKILL


def test_waiting_long_for_a_worker_is_remarked_with_what_it_does(pool, monkeypatch, caplog):
    monkeypatch.setattr(workers, "_REMARK_AFTER", 0.05)

    def slowly(task):
        note("shards/slow.tar, record a")
        time.sleep(0.4)
        return {"task": task}

    assert next(pool([3], build=slowly))["task"] == 3
    assert "data worker 0 has been at 3, shards/slow.tar, record a" in caplog.text


TRAINER = """
import os, sys, time
import numpy as np
from unimo2_paddle.data.workers import WorkerPool
pool = WorkerPool(lambda task: {"image": np.zeros([100], np.uint8), "worker": os.getpid()}, iter(range(10**9)), 2)
print(*sorted({next(pool)["worker"] for _ in range(2)}), flush=True)
{ENDING}
"""


@pytest.mark.parametrize("ending", ["os.kill(os.getpid(), 9)", "os._exit(0)", "sys.exit(0)", "raise RuntimeError('out')"])
def test_however_the_trainer_ends_its_workers_end_and_nothing_stays_in_shared_memory(ending):
    shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", TRAINER.replace("{ENDING}", ending)], env=environment, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, text=True, timeout=60)
    pids = [int(pid) for pid in process.stdout.split()]
    assert len(pids) == 2 and wait_until(lambda: not any(map(alive, pids)))
    if shared:
        mine = [name for name in set(os.listdir("/dev/shm")) - shared if any(str(pid) in name for pid in pids)]
        assert not mine


def test_outside_of_a_worker_a_note_does_nothing():
    note("x" * 10000)
    assert workers.process_number() == 0
