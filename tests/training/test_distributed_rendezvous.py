"""Workers meet or name who is missing; the death of one is told to all. Plain sockets of this machine, no Paddle."""
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from unimo2_paddle.errors import TrainingError
from unimo2_paddle.training.rendezvous import Team, listen, meet

ROOT = Path(__file__).resolve().parents[2]


def free_endpoints(count):
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    endpoints = [f"127.0.0.1:{server.getsockname()[1]}" for server in servers]
    for server in servers:
        server.close()
    return endpoints


def meet_in_threads(endpoints, ranks, timeout=20.0, jobs=None):
    """What ``meet`` gave or raised for each of ``ranks``, all at the same time."""
    outcomes = {}

    def one(rank):
        try:
            outcomes[rank] = meet(rank, endpoints, timeout, (jobs or {}).get(rank, "job"))
        except TrainingError as error:
            outcomes[rank] = str(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@pytest.fixture
def team():
    """Three workers that have met and watch each other; what each was told comes out of ``told``."""
    endpoints, told = free_endpoints(3), queue.Queue()
    met = meet_in_threads(endpoints, range(3))
    teams = [Team(rank, endpoints, met[rank].links, end=lambda message, grace, rank=rank: told.put((rank, message))) for rank in range(3)]
    for one in teams:
        one._thread.start()  # without the farewell at the end of the process, which is this test's
    yield teams, told
    for one in teams:
        one.leave()
        for link in one.links.values():
            link.close()


def test_all_workers_meet_whatever_their_order():
    for ranks in ([0, 1, 2], [2, 1, 0]):
        teams = meet_in_threads(free_endpoints(3), ranks)
        assert sorted(teams[0].links) == [1, 2] and sorted(teams[1].links) == sorted(teams[2].links) == [0]
        for one in teams.values():
            for link in one.links.values():
                link.close()


def test_a_worker_that_never_arrives_is_named_to_all_others():
    endpoints = free_endpoints(4)
    outcomes = meet_in_threads(endpoints, [0, 1, 3], timeout=0.5)
    assert set(outcomes) == {0, 1, 3}
    for message in outcomes.values():
        assert message.startswith(f"worker 2 ({endpoints[2]}) did not arrive within 0.5 s") and "run.worker_timeout" in message


def test_the_first_worker_is_named_when_it_is_the_missing_one():
    endpoints = free_endpoints(3)
    outcomes = meet_in_threads(endpoints, [1, 2], timeout=0.3)
    assert all(message.startswith(f"worker 0 ({endpoints[0]}) did not arrive") for message in outcomes.values()) and len(outcomes) == 2


def test_a_worker_of_another_launch_does_not_count():
    endpoints = free_endpoints(2)
    outcomes = meet_in_threads(endpoints, [0, 1], timeout=0.5, jobs={1: "another"})
    assert "worker 1" in outcomes[0] and "worker 0" in outcomes[1]


def test_strangers_at_the_port_are_sent_away():
    endpoints = free_endpoints(2)
    host, port = endpoints[1].split(":")
    outcomes = {}
    worker = threading.Thread(target=lambda: outcomes.update(meet_in_threads(endpoints, [1])))
    worker.start()
    while True:
        try:
            stranger = socket.create_connection((host, int(port)), timeout=1)
            break
        except OSError:
            continue
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    outcomes.update(meet_in_threads(endpoints, [0]))
    worker.join()
    assert isinstance(outcomes[0], Team) and isinstance(outcomes[1], Team)
    stranger.close()
    for one in outcomes.values():
        for link in one.links.values():
            link.close()


def test_a_port_in_use_is_named_with_a_way_out():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(TrainingError, match=rf"port {port} of 127.0.0.1, which .* worker 1, is in use by another process; start again"):
            meet(1, [f"127.0.0.1:{port + 1}", f"127.0.0.1:{port}"], 5.0)


def test_an_impossible_address_is_one_clear_error():
    with pytest.raises(TrainingError, match="port 99999 of 127.0.0.1, for a test, cannot be opened"):
        listen("127.0.0.1:99999", "for a test")


@pytest.mark.parametrize("dead", [0, 1])
def test_the_death_of_a_worker_is_told_to_every_other_one(team, dead):
    teams, told = team
    teams[dead]._left = True  # the dead hear nothing
    for link in teams[dead].links.values():
        link.shutdown(socket.SHUT_RDWR)
    heard = dict(told.get(timeout=20) for _ in range(2))
    assert set(heard) == {0, 1, 2} - {dead}
    assert all(message.startswith(f"worker {dead} ({teams[0].endpoints[dead]}) has died") and "--resume auto" in message for message in heard.values())


def test_a_worker_that_fails_in_order_is_told_as_such(team):
    teams, told = team
    teams[2]._leave("failed")
    heard = dict(told.get(timeout=20) for _ in range(2))
    assert set(heard) == {0, 1} and all("worker 2" in message and "stopped with an error" in message for message in heard.values())


def test_workers_that_are_done_may_leave_one_after_the_other(team):
    teams, told = team
    for one in (teams[1], teams[0], teams[2]):
        one.leave()
        for link in one.links.values():
            link.shutdown(socket.SHUT_WR)
    for one in teams:
        one._thread.join(20)
        assert not one._thread.is_alive()
    assert told.empty()


def test_a_forked_child_does_not_keep_its_dead_parent_alive():
    """A worker's data loading processes inherit its sockets; killed with SIGKILL, it must still be missed at once."""
    code = ("import os, sys, time; from unimo2_paddle.training.rendezvous import meet\n"
            "team = meet(1, sys.argv[1:], 20).start()\n"
            "if os.fork() == 0: time.sleep(60)\n"
            "os.kill(os.getpid(), 9)")
    endpoints, told = free_endpoints(2), queue.Queue()
    process = subprocess.Popen([sys.executable, "-c", code, *endpoints], cwd=ROOT, start_new_session=True)
    try:
        first = meet(0, endpoints, 20.0)
        Team(0, endpoints, first.links, end=lambda message, grace: told.put(message))._thread.start()
        assert "worker 1" in told.get(timeout=20)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
