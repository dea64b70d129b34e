"""What the benchmarks share: a line of the table, alternated timing, and what is told about the machine."""
import os
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import List, Optional

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "numpy", "opencv-python", "pillow", "tokenizers")


@dataclass
class Line:
    """One comparison.

    Attributes:
        work: what is done; ours, other: medians in ``unit`` (``other`` ``None``: nothing to compare with).
        ratio: how many times better ours is (median over the rounds of a round's ratio), low, high: its range over the rounds.
        bar: what was to be reached, in words; reached: whether it was, ``None`` when there is no bar or it could not be judged.
        floor: what the hardware would need at best, and how that was reckoned; note: what was scaled, skipped, or why a bar is missed.
    """

    work: str
    ours: float
    unit: str
    other: Optional[float] = None
    ratio: Optional[float] = None
    low: Optional[float] = None
    high: Optional[float] = None
    bar: str = ""
    reached: Optional[bool] = None
    floor: str = ""
    note: str = ""


@dataclass
class Options:
    """What a row is told: ``size`` tiny or base, ``repeats`` rounds, paths that may be empty."""

    size: str = "tiny"
    repeats: int = 3
    demo: str = ""          # directory of a trained demo (pretrain/best, data)
    torch_python: str = ""  # an interpreter that has PyTorch
    threads: int = 1


def clock():
    """With one thread the processor's seconds of this process, which other load changes little; else the wall's."""
    return time.process_time() if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter()


def alternate(functions, rounds, warmup=1, clock=clock):
    """Times of ``{name: function}``, all once per round, so that other load on the machine hits all alike: ``{name: [seconds]}``."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started = clock()
            function()
            times[name].append(clock() - started)
    return times


def compare(work, ours, other, unit="s", scale=1.0, amount=None, at_least=None, **more):
    """The :class:`Line` of two lists of seconds, round by round.

    Args:
        scale: seconds times this are shown; with ``amount`` (of things done in that time) ``amount / seconds`` is shown instead.
        at_least: the ratio to reach.
    """
    ratios = [b / a for a, b in zip(ours, other)]

    def shown(seconds):
        middle = statistics.median(seconds)
        return amount / middle if amount else middle * scale

    ratio = statistics.median(ratios)
    if at_least is not None:
        more = {"bar": f">= {at_least:g}x", "reached": ratio >= at_least, **more}
    return Line(work, shown(ours), unit, shown(other), ratio, min(ratios), max(ratios), **more)


def gemm_rate(size=1024, rounds=5):
    """Paddle's float32 matrix products here and now, GFLOP/s: the ceiling of everything that multiplies matrices in eager mode."""
    import numpy as np
    import paddle

    matrix = paddle.to_tensor(np.random.default_rng(0).standard_normal([size, size]).astype("float32"))
    times = alternate({"gemm": lambda: paddle.matmul(matrix, matrix).numpy()}, rounds)["gemm"]
    return 2.0 * size ** 3 / min(times) / 1e9


def processor():
    """Name of the processor, its cores as this process may use them, and what it has for vectors and matrices."""
    name, flags = platform.processor() or platform.machine(), []
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            name = value.strip() if key.strip() == "model name" else name
            flags = value.split() if key.strip() == "flags" else flags
    except OSError:
        pass
    kept = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores ({' '.join(kept)})"


def versions():
    """Versions of what matters, as text."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def load():
    """Processes that wanted to run in the last minute, and of them the share that is not this one cannot be told: the plain average."""
    return round(os.getloadavg()[0], 2)


def commit():
    """Short name of the checkout's commit, with a + when files differ from it; empty outside of git."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no"))


@dataclass
class Record:
    """The JSON file of one row."""

    row: str
    size: str
    lines: List[dict] = field(default_factory=list)
    skipped: str = ""
    seconds: float = 0.0
    threads: int = 1
    machine: str = ""
    versions: str = ""
    load: List[float] = field(default_factory=list)
    date: str = ""
    commit: str = ""


def record_of(row, options, measure):
    """Run ``measure(options)``, which returns lines or a text that says why it was skipped."""
    before, started = load(), time.perf_counter()
    result = measure(options)
    skipped = result if isinstance(result, str) else ""
    return asdict(Record(row, options.size, [] if skipped else [asdict(line) for line in result], skipped, round(time.perf_counter() - started, 1),
                         options.threads, processor(), versions(), [before, load()], time.strftime("%Y-%m-%d", time.gmtime()), commit()))
