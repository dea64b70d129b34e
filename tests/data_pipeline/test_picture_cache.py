"""Pictures kept in a file: shared, never half, never stale."""
import errno
import multiprocessing
import os

import numpy as np
import pytest

from unimo2_paddle.data import picture_cache
from unimo2_paddle.data.picture_cache import MemoryPictures, PictureFile

SIZE = 8


def picture(number):
    return np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype="uint8")


@pytest.fixture
def paths(tmp_path):
    """Four picture files, of which only names, sizes and times matter here."""
    made = [tmp_path / f"{number}.jpg" for number in range(4)]
    for path in made:
        path.write_bytes(b"x")
    return [str(path) for path in made]


def opened(tmp_path, paths, **changes):
    return PictureFile(str(tmp_path / "cache"), paths, changes.get("size", SIZE), changes.get("exif", True))


def fill(directory, paths, numbers):
    cache = PictureFile(directory, paths, SIZE, True)
    for number in numbers:
        cache.put(number, picture(number))


def test_what_two_processes_write_all_read(tmp_path, paths):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=fill, args=(str(tmp_path / "cache"), paths, numbers)) for numbers in ([0, 2], [2, 3])]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    cache = opened(tmp_path, paths)
    for number in (0, 2, 3):
        np.testing.assert_array_equal(cache.get(number), picture(number))
    assert cache.get(1) is None


def test_a_picture_that_was_not_written_whole_counts_as_missing(tmp_path, paths):
    cache = opened(tmp_path, paths)
    cache.put(1, picture(1))
    os.pwrite(cache.file, b"\0" * 20, cache.first + cache.bytes + 50)
    assert cache.get(1) is None
    cache.put(1, picture(1))
    np.testing.assert_array_equal(cache.get(1), picture(1))


@pytest.mark.parametrize("change", ["file", "size", "exif", "order"])
def test_other_pictures_have_another_file(tmp_path, paths, change):
    before = opened(tmp_path, paths).path
    if change == "file":
        with open(paths[2], "wb") as file:
            file.write(b"longer")
    changes = {"size": {"size": 9}, "exif": {"exif": False}}.get(change, {})
    assert opened(tmp_path, paths[::-1] if change == "order" else paths, **changes).path != before
    assert (opened(tmp_path, paths).path == before) == (change != "file")


def test_a_full_disk_ends_the_writing_and_not_the_run(tmp_path, paths, monkeypatch, caplog):
    cache = opened(tmp_path, paths)
    cache.put(0, picture(0))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(picture_cache.os, "pwrite", full)
    cache.put(1, picture(1))
    cache.put(2, picture(2))
    assert cache.get(1) is None and len(caplog.records) == 1 and "No space left" in caplog.text
    np.testing.assert_array_equal(cache.get(0), picture(0))


def test_the_file_takes_room_as_it_fills(tmp_path):
    cache = PictureFile(str(tmp_path / "cache"), [f"{number}.jpg" for number in range(1000)], 384, True)
    assert os.stat(cache.path).st_size > 400e6 and os.stat(cache.path).st_blocks * 512 < 1e6


def test_memory_keeps_what_fits():
    kept = MemoryPictures(2 * picture(0).nbytes + 5)
    for number in range(4):
        kept.put(number, picture(number))
    assert [kept.get(number) is not None for number in range(4)] == [True, True, False, False]
