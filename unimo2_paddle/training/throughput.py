"""What the machine can do and what a run takes of it: matrix-product ceiling and peak memory."""
import functools
import sys
import time

import paddle

CEILING_SECONDS = 0.2


def _synchronise():
    if paddle.is_compiled_with_cuda():
        paddle.device.cuda.synchronize()


@functools.lru_cache(maxsize=None)
def matmul_ceiling(dtype="float32"):
    """Floating-point operations a second of square matrix products on this process's device and threads: the fastest of 0.2 seconds.

    Model FLOPs utilisation is judged against this rather than a data sheet: it exists for every machine, and it is what the same
    library reaches there. Measured once per process and type.
    """
    size = 4096 if paddle.is_compiled_with_cuda() else 1024
    left, right = (paddle.ones([size, size], dtype="float32").astype(dtype) for _ in range(2))
    paddle.matmul(left, right)
    _synchronise()
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < CEILING_SECONDS or best == float("inf"):
        started = time.perf_counter()
        paddle.matmul(left, right)
        _synchronise()
        best = min(best, time.perf_counter() - started)
    return 2.0 * size ** 3 / best


def peak_memory():
    """The most memory this process has held so far, in bytes: on the GPU where there is one, else resident in RAM."""
    if paddle.is_compiled_with_cuda():
        return paddle.device.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
