"""What reading order, index and worker processes cost, in processor seconds (which a busy machine changes little).

    python tools/benchmarks/data_scale.py
"""
import os
import resource
import signal
import tempfile
import time

import numpy as np

from unimo2_paddle.data.mixture import Batches, MixturePlan
from unimo2_paddle.data.shards import EpochOrder, ShardSet, ShardWriter
from unimo2_paddle.errors import WorkerError


def seconds(function):
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def order(records):
    made = EpochOrder([10000] * (records // 10000), seed=1, window=20000)
    plan = MixturePlan({"pairs": [(1.0, made)]}, {"pairs": 1.0}, {"pairs": 1024}, 1, rank=0, world_size=8)
    used, _ = seconds(lambda: [plan.next_step() for _ in range(200)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"order of {records:,} records: {used / 200 * 1e3:.2f} ms per step of 1,024 records, process at most {peak:.0f} MB")


def index(directory, records=100000):
    with ShardWriter(directory, "p", 10000) as writer:
        for number in range(records):
            writer.write(f"{number:09d}", b"\xff\xd8\xff" + bytes(200), ["a text of a few words"])
    cache = os.path.join(directory, "index")
    scan, _ = seconds(lambda: ShardSet(directory + "/*.tar", "pairs", cache))
    again, shards = seconds(lambda: ShardSet(directory + "/*.tar", "pairs", cache))
    size = sum(entry.stat().st_size for entry in os.scandir(cache))
    places = np.random.default_rng(0).permutation(records)[:20000]
    read, _ = seconds(lambda: [shards.read(int(place)) for place in places])
    print(f"index of {records:,} records: {records / scan:,.0f} records/s the first time, {records / again:,.0f} from its files "
          f"({size / records:.0f} bytes per record); {len(places) / read:,.0f} small records/s read in random order")


def death():
    def build(draw):
        if draw.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"image": np.zeros([8, 64, 64, 3], np.uint8)}

    plan = MixturePlan({"pairs": [(1.0, EpochOrder([100], 1))]}, {"pairs": 1.0}, {"pairs": 8}, 1)
    batches = Batches(plan, build, 2)
    try:
        for _ in range(4):
            next(batches)
        start = time.monotonic()
        next(batches)
    except WorkerError as error:
        print(f"killed worker: noticed after {time.monotonic() - start:.3f} s: {error}")
    finally:
        start = time.monotonic()
        batches.close()
        print(f"closed in {time.monotonic() - start:.3f} s")


if __name__ == "__main__":
    for count in (10**7, 10**8, 10**9):
        order(count)
    with tempfile.TemporaryDirectory() as folder:
        index(folder)
    death()
