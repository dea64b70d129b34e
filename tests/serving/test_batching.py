"""Requests that wait together are answered together, each with its own result, its own failure and its own end."""
import threading

import pytest

from unimo2_paddle.serving.batching import Batcher, Stopped

PATIENCE = 60


class Gate:
    """A model that waits for permission and remembers its batches."""

    def __init__(self):
        self.open, self.entered, self.batches = threading.Event(), threading.Event(), []

    def __call__(self, requests):
        self.entered.set()
        assert self.open.wait(PATIENCE)
        self.batches.append(list(requests))
        if "bad" in requests:
            raise ValueError("bad request")
        return [f"{request}!" for request in requests]


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def batcher(gate):
    made = []

    def make(**options):
        made.append(Batcher(gate, **options))
        return made[-1]

    yield make
    gate.open.set()
    for one in made:
        assert one.close(PATIENCE)


def test_requests_that_arrive_during_a_forward_share_the_next_one(gate, batcher):
    one = batcher(max_batch=8, max_wait=0.0)
    first = one.submit("a")
    assert gate.entered.wait(PATIENCE)
    rest = [one.submit(letter) for letter in "bcdefghijk"]
    gate.open.set()
    assert [future.result(PATIENCE).result for future in [first, *rest]] == [f"{letter}!" for letter in "abcdefghijk"]
    assert gate.batches == [["a"], list("bcdefghi"), list("jk")]
    assert [future.result().batch for future in rest] == [8] * 8 + [2] * 2 and rest[0].result().waited > 0


def test_a_full_batch_does_not_wait_for_more(gate, batcher):
    gate.open.set()
    one = batcher(max_batch=2, max_wait=PATIENCE)
    futures = [one.submit("a"), one.submit("b")]
    assert [future.result(PATIENCE / 2).batch for future in futures] == [2, 2]


def test_only_the_request_to_blame_fails(gate, batcher):
    one = batcher(max_batch=4, max_wait=0.0)
    blocker = one.submit("x")
    assert gate.entered.wait(PATIENCE)
    futures = [one.submit(text) for text in ("a", "bad", "b")]
    gate.open.set()
    assert futures[0].result(PATIENCE).result == "a!" and futures[2].result(PATIENCE).result == "b!" and blocker.result().result == "x!"
    with pytest.raises(ValueError, match="bad request"):
        futures[1].result(PATIENCE)
    assert one.submit("c").result(PATIENCE).result == "c!"


def test_a_cancelled_request_is_not_computed(gate, batcher):
    one = batcher(max_batch=4, max_wait=0.0)
    one.submit("x")
    assert gate.entered.wait(PATIENCE)
    gone, kept = one.submit("gone"), one.submit("kept")
    assert gone.cancel()
    gate.open.set()
    assert kept.result(PATIENCE).batch == 1 and gate.batches[-1] == ["kept"]


def test_closing_finishes_what_waits_and_refuses_what_comes(gate, batcher):
    one = batcher(max_batch=1, max_wait=0.0)
    futures = [one.submit(letter) for letter in "abc"]
    assert not one.close(timeout=0.01)
    with pytest.raises(Stopped):
        one.submit("d")
    gate.open.set()
    assert one.close(PATIENCE) and [future.result(0).result for future in futures] == ["a!", "b!", "c!"]


def test_two_models_that_share_a_lock_never_compute_at_once():
    lock, inside, most = threading.Lock(), [0], [0]

    def run(requests):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        threading.Event().wait(0.001)
        inside[0] -= 1
        return requests

    batchers = [Batcher(run, 1, 0.0, lock) for _ in range(2)]
    futures = [batchers[n % 2].submit(n) for n in range(20)]
    assert [future.result(PATIENCE).result for future in futures] == list(range(20)) and most == [1]
    assert all(batcher.close(PATIENCE) for batcher in batchers)
