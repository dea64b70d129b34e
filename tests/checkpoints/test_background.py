"""Writing in the background: one at a time, in order, waited for, and no error is lost."""
import logging
import threading

import pytest

from unimo2_paddle.checkpoints.background import Writer
from unimo2_paddle.errors import CheckpointError


def fail(text):
    raise CheckpointError(text)


def wait_until_done(writer):
    writer._pending.exception()


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits_for_it():
    writer, gate, done, started = Writer(), threading.Event(), [], threading.Event()

    def slow():
        gate.wait()
        done.append(1)

    writer.submit(slow)
    writer.check()
    assert not done, "the caller goes on"
    second = threading.Thread(target=lambda: (started.set(), writer.submit(done.append, 2)))
    second.start()
    started.wait()
    assert not done
    gate.set()
    second.join()
    writer.wait()
    assert done == [1, 2]
    writer.close()


@pytest.mark.parametrize("background", [True, False])
def test_everything_is_written_when_it_is_closed(background):
    writer, done = Writer(background), []
    for number in range(3):
        writer.submit(done.append, number)
    writer.close()
    assert done == [0, 1, 2]


@pytest.mark.parametrize("method", ["check", "wait", "submit"])
def test_an_error_surfaces_once_at_the_next_call(method):
    writer = Writer()
    writer.submit(fail, "the disk is full")
    wait_until_done(writer)
    with pytest.raises(CheckpointError, match="the disk is full"):
        getattr(writer, method)(*([print] if method == "submit" else []))
    writer.check()
    writer.wait()
    writer.close()


def test_without_a_background_an_error_surfaces_at_once():
    writer = Writer(background=False)
    with pytest.raises(CheckpointError, match="the disk is full"):
        writer.submit(fail, "the disk is full")
    writer.close()


def test_an_error_nobody_asked_for_is_logged_not_raised_over_another_one(caplog):
    writer = Writer()
    writer.submit(fail, "the disk is full")
    with caplog.at_level(logging.ERROR, "unimo2_paddle"), pytest.raises(ZeroDivisionError):
        try:
            raise ZeroDivisionError
        finally:
            writer.close()
    assert "the disk is full" in caplog.text
