"""Two gloo workers against one worker that does the whole batch: pre-training steps through the launcher, from the runs' own logs.

Started by the launcher itself (``workers.py NUMBERS FILE``) it is one of two workers that exchange so many numbers, and writes the seconds of it.
"""
import json
import os
import statistics
import sys
import tempfile
import time

from bench import Line
from runs import start, train_records

from unimo2_paddle.data.demo import write_demo_data

STEPS, WARM = {"tiny": 16, "base": 6}, {"tiny": 6, "base": 2}
MODELS = {"tiny": {"config": "unimo2_demo"}, "base": {"config": "unimo2_demo", "hidden_size": 384, "text_hidden_size": 384, "vit_hidden_size": 384,
                                                      "num_attention_heads": 6, "text_num_attention_heads": 6, "vit_num_attention_heads": 6}}


def seconds_of_steps(directory, workers, size, name):
    """Seconds of the steps after the first few, by so many workers with one thread each."""
    data = os.path.join(directory, "data")
    values = {
        "task": "pretrain", "model": MODELS[size],
        "data": {"vocab": f"{data}/vocab", "max_text_len": 40, "pairs": [{"shards": f"{data}/pairs/*.tar"}]},
        "mixture": {"weights": {"pairs": 1.0}, "global_batch": {"pairs": 64}}, "train": {"steps": STEPS[size], "matching_group": 16}, "optim": {},
    }
    return [record["batch_cost"] for record in train_records(directory, values, name, workers)][WARM[size]:]


def exchange_seconds(directory, numbers):
    """Median seconds of adding up so many float32 numbers over two workers, nothing else running in them."""
    path = os.path.join(directory, "exchange.json")
    start(directory, [__file__, str(numbers), path], workers=2)
    with open(path, encoding="utf-8") as file:
        return statistics.median(json.load(file))


def exchange(numbers, path, rounds=12, warm=4):
    """One worker's part of :func:`exchange_seconds`; the first worker writes."""
    import paddle
    import paddle.distributed as dist

    from unimo2_paddle.training import distributed

    shard, seconds, values = distributed.start(), [], paddle.ones([numbers])
    for _ in range(rounds + warm):
        distributed.barrier(shard)
        started = time.perf_counter()
        dist.all_reduce(values)
        seconds.append(time.perf_counter() - started)
    if shard.rank == 0:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(seconds[warm:], file)
    distributed.leave()


def measure(options):
    with tempfile.TemporaryDirectory() as directory:
        write_demo_data(os.path.join(directory, "data"), size=128, seed=1)
        one, two = [], []
        for turn in range(max(1, options.repeats - 1)):
            one.append(statistics.median(seconds_of_steps(directory, 1, options.size, f"one{turn}")))
            two.append(statistics.median(seconds_of_steps(directory, 2, options.size, f"two{turn}")))
        numbers = os.path.getsize(os.path.join(directory, "two0", "best", "model.safetensors")) // 4
        exchanged = exchange_seconds(directory, numbers)
    ratios = [a / b for a, b in zip(one, two)]
    ratio = statistics.median(ratios)
    idle = os.getloadavg()[0] < 2.5
    return [Line("pre-training step, two gloo workers against one with the whole batch", 1e3 * statistics.median(two), "ms",
                 1e3 * statistics.median(one), ratio, min(ratios), max(ratios), bar=">= 1.6x where two cores are free",
                 reached=ratio >= 1.6 if idle or ratio >= 1.6 else None,
                 note="Wall time of a step of 64 pairs, one thread per worker, from the runs' logs. Adding up the gradients of all "
                      f"{numbers / 1e6:.1f} million parameters takes {1e3 * exchanged:.1f} ms alone, {100 * exchanged / statistics.median(two):.1f} % of "
                      "the step of two. docs/cpu_training.md tells where the rest goes."
                      + ("" if idle or ratio >= 1.6 else " Not judged: other processes wanted the cores while this ran."))]


if __name__ == "__main__":
    exchange(int(sys.argv[1]), sys.argv[2])
