"""Process settings that must be made before Paddle is imported; each was measured (docs: see the comments).

Called by the command line, not on import: a program that imports this package keeps its own settings.
"""
import os
import tempfile

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # option numbers of glibc's mallopt
AVX512 = {"avx512f", "avx512dq", "avx512cd", "avx512bw", "avx512vl"}  # what MKL's AVX-512 path uses (Skylake's set)


def _cpu_facts():
    """Vendor, flags and name of the first CPU, empty where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            block = file.read().split("\n\n")[0]
    except OSError:
        return "", (), ""
    facts = dict(line.partition(":")[::2] for line in block.splitlines())
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    return facts.get("vendor_id", ""), facts.get("flags", "").split(), facts.get("model name", "")


def local_workers():
    """Workers of a launch on this machine, at least 1."""
    return max(1, int(os.environ.get("PADDLE_LOCAL_SIZE", os.environ.get("PADDLE_TRAINERS_NUM", "1"))))


def prepare_process():
    """Threads, matrix kernels and memory of this process; settings the user made are kept.

    * ``OMP_NUM_THREADS``: Paddle sets it to 1 when it is unset; we use the cores shared by the workers of this machine.
    * ``MKL_DEBUG_CPU_TYPE`` on AMD: the MKL inside Paddle's wheel takes its slowest path on AMD processors; 7 selects its AVX-512
      path, 5 the AVX2 one, which is 2.5 to 3 times faster than the slowest. Measured on one core of a Zen 5 EPYC at the demo's
      sizes: 5 reaches 114 GFLOP/s, 7 reaches 230.
    * ``KMP_BLOCKTIME=0``: threads of Paddle's operations sleep between them. By default they spin for 0.2 s, on cores that fused layers
      (models/fused.py), data workers and other programs need: two threads of a plain demo step on a busy machine
      took 1151 ms (482 ms of processor time), sleeping 541 ms (403 ms).
    * glibc keeps large blocks instead of giving them back to the kernel after every operation (GELU and bias additions: half the
      time); see reference facts on page faults.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // local_workers())))
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    vendor, flags, _ = _cpu_facts()
    if vendor == "AuthenticAMD" and AVX512 <= set(flags):
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "7")
    elif vendor == "AuthenticAMD" and "avx2" in flags:
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    _keep_memory()


def find_compile_cache():
    """Let numba keep compiled code beside the source or in the user's cache; where neither can be written, in the directory of temporary files."""
    own, home = os.path.dirname(os.path.abspath(__file__)), os.path.expanduser("~")
    if "NUMBA_CACHE_DIR" not in os.environ and not os.access(own, os.W_OK) and not os.access(home, os.W_OK):
        os.environ["NUMBA_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"unimo2-numba-{os.getuid()}")


def import_paddle():
    """Import Paddle without what it prints about ccache and thread counts, which nobody here can act on; errors come through."""
    import contextlib
    import io
    import warnings

    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No ccache found")
        import paddle  # noqa: F401


def describe_environment():
    """What a run's report tells of where it was carried out, as plain text by name; Paddle must have been imported."""
    import platform
    import shlex
    import sys

    import numpy
    import paddle

    import unimo2_paddle

    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    device = f"{gpus} x {paddle.device.cuda.get_device_name()}" if gpus else "CPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"command": shlex.join(sys.argv), "unimo2_paddle": unimo2_paddle.__version__, "paddle": paddle.__version__, "python": platform.python_version(),
            "numpy": numpy.__version__, "system": platform.platform(), "processor": _cpu_facts()[2] or platform.machine(), "cores": str(cores),
            "threads": os.environ.get("OMP_NUM_THREADS", ""), "device": device}


def _keep_memory():
    import ctypes

    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
    except (OSError, AttributeError):
        pass  # not glibc: nothing to tune
