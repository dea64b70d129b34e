"""A lock between processes that the kernel gives back when its holder ends, however it does."""
import contextlib
import fcntl
import os


@contextlib.contextmanager
def locked(path, waiting=None):
    """Hold the exclusive lock of a file, which is created when missing and stays in place.

    Args:
        path: the file; waiting: called once, without arguments, before waiting for another holder.

    Raises:
        OSError: the file cannot be opened or locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
