"""What every test shares: one thread, no network, repeatable property tests."""
import ipaddress
import os
import socket
import zlib  # noqa: F401  before paddle: Paddle 2.6.2 exports zlib's symbols, and the first use would then crash
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "hypothesis"))

# No deadline: the machine may be shared. No database: a run leaves nothing behind and equals the one before.
settings.register_profile("unimo2", deadline=None, derandomize=True, database=None)
settings.load_profile("unimo2")


def _is_local(family, address):
    """Whether a socket address stays on this machine."""
    if family not in (socket.AF_INET, socket.AF_INET6):
        return True  # Unix sockets and the like
    host = address[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Make every connection that would leave this machine an error."""

    def guard(connect):
        def guarded(self, address):
            if not _is_local(self.family, address):
                raise RuntimeError(f"a test tried to reach {address!r}; tests use the network of this machine only")
            return connect(self, address)

        return guarded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guard(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guard(socket.socket.connect_ex))
        yield
