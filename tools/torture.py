"""Kill a training run again and again, resume it, and compare its result bit for bit with a run that nobody killed.

    python tools/torture.py --kills 20 [--workers 2] [--steps 60] [--per-run 5] [--sync] [--seed 1] [--keep DIR]

A tiny pre-training run over generated data trains once in peace. Then it is started, killed (SIGKILL) at a random moment and resumed with
--resume auto, --per-run times before it may end; its last checkpoint and best model must have the same bytes. Moments are drawn while the run
starts, between and in its steps, and while it writes a checkpoint; with several workers the whole launch or one worker is killed. The process
is frozen (SIGSTOP) just before, so that the table can say what it was doing. After every kill all checkpoints must be whole and none lost.
Exit status: 0 all identical, 1 something differs.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from unimo2_paddle.checkpoints import store  # noqa: E402
from unimo2_paddle.data.demo import write_demo_data  # noqa: E402
from unimo2_paddle.errors import CheckpointError  # noqa: E402

SAVE_EVERY = 3
PATIENCE = 900  # seconds without the awaited moment after which something hangs
FILES = ("model.safetensors", "optimizer.safetensors", "average.safetensors", "config.json", "state.json", "manifest.json")  # as they are written
DROPOUT = {f"{prefix}{kind}_dropout_prob": 0.1 for prefix in ("", "text_", "vit_") for kind in ("hidden", "attention_probs")}
MODEL = {
    "config": "unimo2_demo", "hidden_size": 32, "text_hidden_size": 32, "vit_hidden_size": 32, "num_attention_heads": 2,
    "text_num_attention_heads": 2, "vit_num_attention_heads": 2, "num_hidden_layers": 2, "text_num_hidden_layers": 1,
    "vit_num_hidden_layers": 1, "image_size": 32, "resolution": 16, "position_grid": 2, "num_codebook": 32, "topk_value": 4, **DROPOUT,
}


def write_config(directory, steps, asynchronous):
    """Demo corpora and the run configuration over all three of them, with dropout and averaged weights; returns its path."""
    write_demo_data(directory / "data", size=24, seed=1)
    values = {
        "task": "pretrain", "model": MODEL,
        "data": {"vocab": str(directory / "data" / "vocab"), "max_text_len": 40,
                 **{corpus: [{"shards": str(directory / "data" / corpus / "*.tar")}] for corpus in ("pairs", "images", "texts")}},
        "mixture": {"weights": {"pairs": 1, "images": 1, "texts": 1}, "global_batch": {"pairs": 8, "images": 4, "texts": 8}},
        "train": {"steps": steps, "matching_group": 4}, "optim": {"learning_rate": 1e-3, "ema": 0.9},
        "run": {"output": "", "progress": False, "log_every": 1, "save_every": SAVE_EVERY, "keep_last": 2, "async_save": asynchronous},
    }
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


class Run:
    """One output directory and the processes that work on it, one launch after the other."""

    def __init__(self, config, output, workers):
        self.config, self.output, self.workers = config, Path(output), workers
        self.checkpoints = self.output / "checkpoints"
        self.process = None

    def launch(self):
        """Start training, or go on with it."""
        metrics = self.output / "metrics.jsonl"
        self.offset = metrics.stat().st_size if metrics.exists() else 0
        several = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(self.workers), "--log_dir", f"{self.output}.logs"]
        command = [sys.executable, *(several if self.workers > 1 else []), str(ROOT / "tools" / "train.py"), "-c", str(self.config),
                   "-o", f"run.output={self.output}", "--resume", "auto"]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PADDLE_", "FLAGS_"))}
        environment.setdefault("OMP_NUM_THREADS", "1")
        self.screen = open(f"{self.output}.screen", "ab")
        self.process = subprocess.Popen(command, env=environment, stdout=self.screen, stderr=subprocess.STDOUT, start_new_session=True)
        self.started = time.monotonic()

    def trained(self):
        """The step this launch has logged last, ``None`` before its first."""
        try:
            with open(self.output / "metrics.jsonl", "rb") as file:
                file.seek(self.offset)
                lines = file.read().rpartition(b"\n")[0].splitlines()
            return json.loads(lines[-1])["step"] if lines else None
        except FileNotFoundError:
            return None

    def writing(self):
        """Whether a checkpoint is being written."""
        try:
            return any(entry.name.endswith(".tmp") for entry in os.scandir(self.checkpoints))
        except FileNotFoundError:
            return False

    def wait(self, happened):
        """Wait until ``happened()``; false when the launch ended before that."""
        end = time.monotonic() + PATIENCE
        while not happened():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > end:
                self.end()
                raise SystemExit(f"torture.py: {self.output} got stuck; its output is in {self.output}.screen")
            time.sleep(0.0005)
        return True

    def processes(self):
        """rank -> process of the workers."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True) if self.workers > 1 else [psutil.Process(self.process.pid)]:
            try:
                rank = int(process.environ().get("PADDLE_TRAINER_ID", "0"))
                found.setdefault(rank, process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def kill(self, victim):
        """Freeze the first worker, look at what it does, kill ``victim`` (a rank, or "all"); returns (step, what it did, who was killed)."""
        workers = self.processes()
        if 0 in workers:
            workers[0].suspend()
        step, doing = self.trained(), self.phase()
        if victim in workers and self.workers > 1:
            workers[victim].kill()
            if victim and 0 in workers:
                workers[0].resume()
            self.wait(lambda: False)
        else:
            victim = "all" if self.workers > 1 else "it"
        self.end()
        return step, doing, str(victim)

    def end(self):
        """Kill what is left of this launch."""
        left = [self.process, *psutil.Process(self.process.pid).children(recursive=True)] if self.process.poll() is None else []
        for process in left:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.screen.close()

    def phase(self):
        """What a frozen run was doing, from its directories."""
        names = os.listdir(self.checkpoints) if self.checkpoints.is_dir() else []
        for name in names:
            if name.endswith(".tmp"):
                there = set(os.listdir(self.checkpoints / name))
                last = [file for file in FILES if file in there][-1:]
                return f"writing {name[:-4]}: " + (f"at {last[0]}" if last else "just begun")
        for ending, text in ((".gone", "removing an old checkpoint"), (".old", "replacing a checkpoint")):
            if any(name.endswith(ending) for name in names):
                return text
        if any((self.output / name).exists() for name in (".best.new", ".best.old")):
            return "writing best/"
        return "starting" if self.trained() is None else "training"

    def newest(self):
        """The step of the newest checkpoint; raises ``CheckpointError`` when any is damaged."""
        found = store.complete_checkpoints(str(self.checkpoints))
        for path in found:
            store.verify_checkpoint(path)
        return store.step_of(found[-1]) if found else 0

    def result(self):
        """name -> bytes of everything the run ends with."""
        newest = store.complete_checkpoints(str(self.checkpoints))[-1]
        paths = [*Path(newest).iterdir(), *(self.output / "best").glob("*.*")]
        return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in paths}


def train_in_peace(run):
    """The run to compare with; returns its result, seconds to the first step, per step and per checkpoint."""
    run.launch()
    run.wait(lambda: run.trained() is not None)
    start, first, writes, wrote_since = time.monotonic() - run.started, time.monotonic(), [], None
    while run.process.poll() is None:
        if run.writing():
            wrote_since = wrote_since or time.monotonic()
        elif wrote_since:
            writes.append(time.monotonic() - wrote_since)
            wrote_since = None
        time.sleep(0.0005)
    if run.process.returncode:
        raise SystemExit(f"torture.py: the run fails by itself; its output is in {run.output}.screen")
    steps = max(1, run.trained() - 1)
    return run.result(), start, (time.monotonic() - first) / steps, sorted(writes)[len(writes) // 2] if writes else 0.01


def strike(run, kind, target, times, chance):
    """Launch, wait for the moment and kill; returns a row of the table, ``None`` when the run ended before."""
    start, step, write = times
    before = run.newest()
    run.launch()
    if kind == "start":
        delay = chance.uniform(0, start)
        come = run.wait(lambda: time.monotonic() - run.started > delay)
    else:
        come = run.wait(lambda: (run.trained() or 0) >= target)
        if come and kind == "write":
            come = run.wait(run.writing)
        if come:
            time.sleep(chance.uniform(0, write if kind == "write" else step))
    if not come or run.process.poll() is not None:
        run.end()
        return None
    victim = chance.choice(["all", *range(run.workers)])
    trained, doing, victim = run.kill(victim)
    row = {"kind": kind, "step": trained if trained is not None else before, "doing": doing, "killed": victim}
    try:
        newest = run.newest()
        row["verdict"] = f"whole, newest {newest}" if newest >= before else f"LOST: newest {newest}, was {before}"
    except CheckpointError as error:
        row["verdict"] = f"DAMAGED: {error}"
    return row


def finish(run, wanted):
    """Let a run come to its end; returns what differs from the undisturbed one (empty: nothing)."""
    run.launch()
    run.wait(lambda: False)
    if run.process.returncode:
        return [f"exit status {run.process.returncode}, see {run.output}.screen"]
    result = run.result()
    different = sorted(name for name in {*result, *wanted} if result.get(name) != wanted.get(name))
    return different + ["passed over a damaged checkpoint"] * ("passed over" in (run.output / "train.log").read_text())


def torture(directory, arguments):
    """The whole tool; returns whether everything was identical."""
    config = write_config(directory, arguments.steps, not arguments.sync)
    wanted, *times = train_in_peace(Run(config, directory / "peace", arguments.workers))
    how = "waiting for each" if arguments.sync else "in the background"
    print(f"{arguments.workers} worker(s), {arguments.steps} steps, a checkpoint every {SAVE_EVERY}, {how}; "
          f"undisturbed: first step after {times[0]:.1f} s, {times[1]:.2f} s a step, {times[2]:.3f} s a checkpoint\n", flush=True)
    print(f"{'kill':>4}  {'run':>3}  {'after step':>10}  {'killed':<6}  {'while':<44}  checkpoints", flush=True)
    chance, kills, inside, good, number = random.Random(arguments.seed), 0, 0, True, 0
    while kills < arguments.kills:
        number += 1
        run = Run(config, directory / f"run{number}", arguments.workers)
        count = min(arguments.per_run, arguments.kills - kills)
        targets = sorted(chance.sample(range(1, max(2, arguments.steps - SAVE_EVERY)), min(count, max(1, arguments.steps - SAVE_EVERY - 1))))
        for target in targets:
            kind = chance.choices(("step", "write", "start"), (4, 5, 1))[0]
            row = strike(run, kind, target, times, chance)
            if row is None:
                break  # it had come to its end
            kills += 1
            inside += row["doing"].startswith(("writing", "removing", "replacing"))
            good &= row["verdict"].startswith("whole")
            print(f"{kills:>4}  {number:>3}  {row['step']:>10}  {row['killed']:<6}  {row['doing']:<44}  {row['verdict']}", flush=True)
        different = finish(run, wanted)
        good &= not different
        print(f"      run {number}: " + ("bit-identical to the undisturbed run" if not different else f"DIFFERS: {', '.join(different)}"), flush=True)
        if not different:
            shutil.rmtree(run.output)
    print(f"\n{kills} kills, {inside} of them inside a write, {number} runs: " + ("all bit-identical" if good else "NOT identical"))
    return good


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="\n".join(__doc__.splitlines()[4:]),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills in all; default: 20")
    parser.add_argument("--workers", type=int, default=1, help="workers of the run (gloo); default: 1")
    parser.add_argument("--steps", type=int, default=60, help="steps of the run; default: 60")
    parser.add_argument("--per-run", type=int, default=5, help="kills of one run before it may end; default: 5")
    parser.add_argument("--sync", action="store_true", help="wait for every checkpoint (run.async_save: false)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the moments; default: 1")
    parser.add_argument("--keep", metavar="DIR", help="work in DIR and leave everything there; default: a temporary directory")
    arguments = parser.parse_args(argv)
    if min(arguments.kills, arguments.workers, arguments.per_run) < 1 or arguments.steps < 2 * SAVE_EVERY:
        parser.error(f"--kills, --workers and --per-run must be at least 1, --steps at least {2 * SAVE_EVERY}")
    if arguments.keep:
        directory = Path(arguments.keep).resolve()
        if directory.exists() and any(directory.iterdir()):
            parser.error(f"--keep {directory} is not empty; give another directory")
        directory.mkdir(parents=True, exist_ok=True)
        return 0 if torture(directory, arguments) else 1
    with tempfile.TemporaryDirectory(prefix="torture-") as directory:
        return 0 if torture(Path(directory), arguments) else 1


if __name__ == "__main__":
    sys.exit(main())
