"""Writing checkpoints while training goes on."""
import logging
from concurrent.futures import ThreadPoolExecutor

logger = logging.getLogger("unimo2_paddle")


class Writer:
    """Calls functions one after the other, in one background thread or at once.

    What it is given must not change any more: the training thread copies (``store.take_snapshot``), the background thread writes. There
    is at most one write under way, so at most one copy is in memory; the interpreter does not end before it is done.

    Args:
        background: false: :meth:`submit` does the work itself.
    """

    def __init__(self, background=True):
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self._pending = None

    def submit(self, function, *arguments):
        """Start ``function(*arguments)`` after the one before is done; raises what that one raised."""
        self.wait()
        if self._pool is None:
            function(*arguments)
        else:
            self._pending = self._pool.submit(function, *arguments)

    def check(self):
        """Raise what a finished write raised; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self):
        """Wait for the write under way; raises what it raised, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self):
        """Wait and end the thread. For use while another error is on its way: what the write raised is only logged."""
        try:
            self.wait()
        except Exception as error:
            logger.error("%s", error)
        if self._pool is not None:
            self._pool.shutdown()
