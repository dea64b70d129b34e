"""Does a long run keep its memory, files and threads? Trains a tiny generated run and measures this process and its data workers.

    python tools/soak.py --steps 2000            # prints a table and a verdict; exit status 0 (flat), 1 (something grows)

Every ``--restart`` steps the run is stopped and resumed in the same process, so that what a start leaves behind shows, too: data workers
are ended and started again, the model, the optimizer and the board are built anew.
"""
import argparse
import gc
import json
import os
import sys
import tempfile
import zlib  # noqa: F401  before paddle: Paddle 2.6.2 exports zlib's symbols, and the first use would then crash
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# per 1,000 steps: what the allocator may gain on a machine that does other things as well
ALLOWED = {"memory_mb": 20.0, "worker_memory_mb": 20.0, "open_files": 0.0, "shared_memory": 0.0, "threads": 0.0, "children": 0.0}
UNITS = {"memory_mb": "MB resident", "worker_memory_mb": "MB of data workers alone", "open_files": "open files", "shared_memory": "mapped memory segments",
         "threads": "threads", "children": "child processes"}

RUN = {
    "task": "pretrain",
    "model": {"config": "unimo2_demo", "hidden_size": 32, "text_hidden_size": 32, "vit_hidden_size": 32, "num_attention_heads": 2,
              "text_num_attention_heads": 2, "vit_num_attention_heads": 2, "num_hidden_layers": 2, "text_num_hidden_layers": 1, "vit_num_hidden_layers": 1,
              "image_size": 32, "resolution": 16, "position_grid": 2, "num_codebook": 32, "topk_value": 4},
    "mixture": {"weights": {"pairs": 0.5, "images": 0.25, "texts": 0.25}, "global_batch": {"pairs": 8, "images": 4, "texts": 8}},
    "optim": {"learning_rate": 1e-3},
}


def resident():
    """Resident memory of this process in MB."""
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def private(pid):
    """Memory in MB that a process shares with no other, 0 when it is gone: a forked worker's resident memory is mostly the trainer's."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("Private_")) / 1e3
    except OSError:
        return 0.0


def children():
    """Process numbers of this process's children."""
    found = []
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/children", encoding="utf-8") as file:
                found += map(int, file.read().split())
        except OSError:
            continue
    return found


def measure():
    """What this process and its children hold now."""
    gc.collect()
    with open("/proc/self/maps", encoding="utf-8") as file:
        shared = sum("memfd:" in line or "/dev/shm/" in line for line in file)
    below = children()
    return {"memory_mb": resident(), "worker_memory_mb": sum(map(private, below)), "open_files": len(os.listdir("/proc/self/fd")),
            "shared_memory": shared, "threads": len(os.listdir("/proc/self/task")), "children": len(below)}


def slope(points):
    """Growth per 1,000 steps: least squares over ``[(step, value)]``."""
    count = len(points)
    mean_step, mean = sum(s for s, _ in points) / count, sum(v for _, v in points) / count
    spread = sum((s - mean_step) ** 2 for s, _ in points)
    return 1000 * sum((s - mean_step) * (v - mean) for s, v in points) / spread if spread else 0.0


def verdicts(samples):
    """``{quantity: (first, last, growth per 1,000 steps, flat)}`` of measurements after the warm-up.

    A quantity counts as growing only when its line rises by more than what is allowed *and* its second half lies above the first.
    """
    found = {}
    for name, allowed in ALLOWED.items():
        points = [(sample["step"], sample[name]) for sample in samples]
        half = len(points) // 2
        risen = min(v for _, v in points[half:]) > min(v for _, v in points[:half])
        growth = slope(points)
        found[name] = (points[0][1], points[-1][1], growth, not (risen and growth > allowed))
    return found


def soak(directory, steps, restart, every, workers):
    """Train ``steps`` steps in ``directory`` and measure every ``every`` steps; returns the measurements."""
    import yaml

    from unimo2_paddle.data.demo import write_demo_data
    from unimo2_paddle.tasks.pretrain import PretrainTask
    from unimo2_paddle.training.loop import train_from_config

    data = os.path.join(directory, "data")
    write_demo_data(data, size=64, seed=1)
    values = {**RUN, "train": {"steps": steps, "matching_group": 4}, "data": {
        "vocab": os.path.join(data, "vocab"), "max_text_len": 40, "num_workers": workers,
        **{corpus: [{"shards": os.path.join(data, corpus, "*.tar")}] for corpus in ("pairs", "images", "texts")}},
        "run": {"output": os.path.join(directory, "run"), "progress": False, "log_every": 50, "save_every": max(1, every), "keep_last": 2}}
    config = os.path.join(directory, "run.yaml")
    with open(config, "w", encoding="utf-8") as file:
        yaml.safe_dump(values, file)
    samples, taken, plain = [], [0], PretrainTask.work

    def work(task, batch):
        taken[0] += 1
        if taken[0] % every == 0:
            samples.append({"step": taken[0], **measure()})
        if taken[0] % restart == 0 and taken[0] < steps:
            os.kill(os.getpid(), 15)  # as a batch system does: the step is finished and saved
        return plain(task, batch)

    PretrainTask.work = work
    try:
        with open(os.devnull, "w", encoding="utf-8") as silence:
            screen, sys.stdout = sys.stdout, silence
            try:
                while taken[0] < steps:
                    train_from_config(config, resume="auto")
            finally:
                sys.stdout = screen
    finally:
        PretrainTask.work = plain
    return samples


def main(argv=None):
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description="Measure memory, files, shared memory and threads over a long tiny run.")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--restart", type=int, default=500, metavar="STEPS", help="stop and resume the run so often; default: 500")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="data workers; default: 2")
    parser.add_argument("--json", metavar="FILE", help="write the measurements there")
    args = parser.parse_args(argv)
    every = max(1, args.steps // 40)
    with tempfile.TemporaryDirectory(prefix="unimo2-soak-") as directory:
        samples = soak(directory, args.steps, args.restart, every, args.workers)
    if args.json:
        Path(args.json).write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")
    # the first start after a stop still fills caches that the next ones find
    settled = [sample for sample in samples if sample["step"] > max(args.steps / 5, min(args.restart, args.steps / 2))]
    found = verdicts(settled)
    print(f"{'quantity':<28} {'step ' + str(settled[0]['step']):>10} {'step ' + str(settled[-1]['step']):>10} {'per 1,000 steps':>16}  verdict")
    for name, (first, last, growth, flat) in found.items():
        print(f"{UNITS[name]:<28} {first:>10.1f} {last:>10.1f} {growth:>+16.2f}  {'flat' if flat else 'GROWS'}")
    return 0 if all(flat for *_, flat in found.values()) else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from unimo2_paddle.runtime import import_paddle, prepare_process

    prepare_process()
    import_paddle()
    sys.exit(main())
