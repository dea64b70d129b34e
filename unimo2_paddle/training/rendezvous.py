"""Workers meet before Paddle connects them, and hear at once when one of them has died.

Paddle's own start waits a quarter of an hour for a missing worker without naming it, and a collective call with a dead one may wait for ever. So
the first worker calls every other one at the address the launch gave it (PADDLE_TRAINER_ENDPOINTS), says "go" when all have answered, and keeps
these connections open: the end of one without a farewell is the death of its worker, and everyone is told. No Paddle in here.
"""
import atexit
import errno
import hashlib
import os
import selectors
import socket
import sys
import threading
import time

from unimo2_paddle.errors import TrainingError

_LINE = 256  # bytes of the longest word workers exchange
_PATIENCE = 2.0  # seconds for one answer during the meeting
_GRACE = {"died": 1.0, "failed": 5.0}  # seconds in which a worker may still end by itself, with its own message
_WRITERS = 10.0  # seconds that a checkpoint being written by another thread is given


def _address(endpoint):
    host, _, port = endpoint.rpartition(":")
    return host, int(port)


def _name(rank, endpoints):
    return f"worker {rank} ({endpoints[rank]})"


def listen(endpoint, purpose):
    """A listening socket at ``host:port``.

    Raises:
        TrainingError: another process has the port, or the address is not one of this machine.
    """
    host, port = _address(endpoint)
    try:
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            server.bind(("", port))  # behind a translated address, as in some containers
        server.listen()
        return server
    except (OSError, OverflowError) as error:
        server.close()
        reason = "is in use by another process" if getattr(error, "errno", None) == errno.EADDRINUSE else f"cannot be opened ({error})"
        raise TrainingError(f"port {port} of {host}, {purpose}, {reason}; start again (the launch chooses other ports), or end that process") from None


def _read_line(link, deadline):
    """One line of a socket without its end; empty when the other side closed, was silent until ``deadline`` or talks too much."""
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < _LINE:
            link.settimeout(max(0.01, deadline - time.monotonic()))
            byte = link.recv(1)
            if not byte:
                return ""
            data += byte
    except OSError:
        return ""
    return data.decode("ascii", "replace").strip()


def _call(endpoints, rank, token, deadline):
    """The first worker's connection to another one, or ``None`` if that one does not answer now."""
    try:
        link = socket.create_connection(_address(endpoints[rank]), timeout=max(0.01, min(_PATIENCE, deadline - time.monotonic())))
    except OSError:
        return None
    try:
        link.sendall(f"unimo2 {token} {rank}\n".encode())
        if _read_line(link, time.monotonic() + _PATIENCE) == f"here {token} {rank}":
            return link
    except OSError:
        pass
    link.close()
    return None


def _gather(endpoints, token, timeout):
    """The first worker's part of the meeting: connections to all others, by rank."""
    deadline, links = time.monotonic() + timeout, {}
    missing = list(range(1, len(endpoints)))
    while missing and time.monotonic() < deadline:
        for rank in list(missing):
            link = _call(endpoints, rank, token, deadline)
            if link is not None:
                links[rank] = link
                missing.remove(rank)
        if missing:
            time.sleep(0.1)
    word = f"missing {' '.join(map(str, missing))}" if missing else "go"
    for link in links.values():
        _say(link, word[:_LINE - 1])
    if missing:
        for link in links.values():
            link.close()
        raise _absent(missing, endpoints, timeout)
    return links


def _answer(endpoints, rank, token, timeout):
    """Any other worker's part of the meeting: its connection to the first one."""
    deadline = time.monotonic() + timeout
    with listen(endpoints[rank], f"which the launch gave to worker {rank}") as server:
        while True:
            try:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                link, _ = server.accept()
            except OSError:
                raise _absent([0], endpoints, timeout) from None
            if _read_line(link, time.monotonic() + _PATIENCE) == f"unimo2 {token} {rank}":
                break
            link.close()  # a stranger, or a worker of another launch
    _say(link, f"here {token} {rank}")
    word, *ranks = _read_line(link, time.monotonic() + timeout + 2 * _PATIENCE).split() or ["gone"]
    if word == "go":
        return {0: link}
    link.close()
    if word == "missing":
        raise _absent([int(r) for r in ranks if r.isdigit() and int(r) < len(endpoints)], endpoints, timeout)
    raise TrainingError(f"{_name(0, endpoints)} left while the workers were meeting; its log says why")


def _absent(missing, endpoints, timeout):
    names = ", ".join(_name(rank, endpoints) for rank in missing)
    return TrainingError(f"{names} did not arrive within {timeout:g} s; the logs of the missing workers say why (workerlog.N in the launch's log "
                         "directory on their machine). Start again, or give them more time with run.worker_timeout")


def _say(link, word):
    try:
        link.sendall(word.encode() + b"\n")
    except OSError:
        pass  # the other side is gone, which its own connection tells


class Team:
    """This process's connections to other workers: the first one's to all, everyone else's to the first.

    Args:
        rank: own number; endpoints: ``host:port`` of every worker; links: ``{rank: socket}`` from :func:`meet`; end: called as ``end(message,
        grace)`` in a thread of its own when another worker is gone; default: :func:`end_process`.
    """

    def __init__(self, rank, endpoints, links, end=None):
        self.rank, self.endpoints, self.links, self.end = rank, endpoints, links, end or end_process
        self._left = False
        self._thread = threading.Thread(target=self._watch, name="unimo2-team", daemon=True)

    def start(self):
        """Watch the other workers from now on."""
        atexit.register(self._leave, "failed")  # does nothing after leave()
        os.register_at_fork(after_in_child=self._forget)
        self._thread.start()
        return self

    def leave(self):
        """This worker has done its part: its end is not a failure."""
        self._leave("done")

    def _leave(self, word):
        if not self._left:
            self._left = True
            for link in list(self.links.values()):
                _say(link, word)

    def _forget(self):
        """In a forked child: the connections are the parent's, and end with it."""
        self._left = True
        for link in self.links.values():
            link.close()

    def _watch(self):
        with selectors.DefaultSelector() as selector:
            for rank, link in self.links.items():
                link.settimeout(_PATIENCE)
                selector.register(link, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    word, *ranks = _read_line(key.fileobj, time.monotonic() + _PATIENCE).split() or ["died"]
                    if word == "done":
                        selector.unregister(key.fileobj)
                    elif not self._left:
                        return self._lost(int(ranks[0]) if ranks else key.data, "failed" if word == "failed" else "died")
                    else:
                        return None
        return None

    def _lost(self, rank, how):
        if self.rank == 0:
            for link in self.links.values():
                _say(link, f"{how} {rank}")
        what = "has died (killed, or its machine is gone)" if how == "died" else "has stopped with an error (its log says which)"
        self._left = True  # this worker's own end follows from that one: no news
        self.end(f"{_name(rank, self.endpoints)} {what}, so this run cannot go on; start it again with --resume auto and it continues from its newest "
                 "complete checkpoint", _GRACE[how])


def end_process(message, grace):
    """Say why, let the process end by itself for ``grace`` seconds, then end it with status 1: its main thread may wait in a collective for ever."""
    print(message, file=sys.stderr, flush=True)
    time.sleep(grace)
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join(_WRITERS)
    sys.stdout.flush()
    os._exit(1)


def meet(rank, endpoints, timeout, job=""):
    """Wait until all workers of a launch are there.

    Args:
        rank: own number; endpoints: ``host:port`` of every worker in rank order; timeout: seconds; job: name that keeps two launches apart.

    Returns:
        :class:`Team`, not yet watching.

    Raises:
        TrainingError: a worker did not arrive (it is named), or a port is taken.
    """
    token = hashlib.sha256(",".join([job, *endpoints]).encode()).hexdigest()[:16]
    links = _gather(endpoints, token, timeout) if rank == 0 else _answer(endpoints, rank, token, timeout)
    return Team(rank, endpoints, links)
