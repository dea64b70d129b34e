"""Checkpoints when the process dies, the disk is full or read-only, files are damaged and clocks jump."""
import os
import resource
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from unimo2_paddle.checkpoints import store
from unimo2_paddle.errors import CheckpointError


class Killed(BaseException):
    """Stands in for a process that dies."""


def dying_at(moment, patch):
    """Make the ``moment``-th call that changes the disk the last one: a removal in progress, a renaming or a sync that never came."""
    calls, sync, rename, rmtree = iter(range(1000)), store._sync, os.rename, shutil.rmtree

    def dies(path):
        if next(calls) == moment:
            if os.path.isdir(path):
                for name in set(os.listdir(path)) - {store.MANIFEST}:  # the worst order: what makes it look complete goes last
                    if os.path.isfile(os.path.join(path, name)):
                        os.unlink(os.path.join(path, name))
            raise Killed

    def removing(path, *arguments, **options):
        if os.path.isdir(path):
            dies(path)
        rmtree(path, *arguments, **options)

    def reaching(function):
        def call(*arguments):
            if next(calls) == moment:
                raise Killed
            function(*arguments)

        return call

    patch.setattr(store, "_sync", reaching(sync))
    patch.setattr(os, "rename", reaching(rename))
    patch.setattr(shutil, "rmtree", removing)


def small(step, value=0.0):
    """A snapshot with one weight."""
    return store.Snapshot({}, {"w": np.full(3, value, "float32")}, {}, {"step": step, "data": None, "best": None, "made_by": {"format": store.FORMAT}})


def weight(path):
    return store.read_snapshot(path).weights["w"][0]


@pytest.mark.parametrize("step, leftover", [(4, None), (3, None), (3, "old"), (4, "tmp"), (4, "gone")])
def test_whenever_a_run_dies_no_complete_checkpoint_is_lost_and_every_listed_one_is_whole(tmp_path, monkeypatch, step, leftover):
    """Writing step 4, or step 3 again, with steps 2 and 3 there and at most two to keep."""
    moment, died = 0, True
    while died:
        directory = tmp_path / str(moment)
        for earlier in (2, 3):
            store.write_snapshot(str(directory), earlier, small(earlier))
        if leftover:
            shutil.copytree(directory / "step-000003", directory / f"step-{step:06d}.{leftover}")
        with monkeypatch.context() as patch:
            dying_at(moment, patch)
            died = False
            try:
                store.write_snapshot(str(directory), step, small(step, 1.0), keep_last=2)
            except Killed:
                died = True
        found = {store.step_of(path): weight(path) for path in store.complete_checkpoints(str(directory))}  # reading verifies
        assert 3 in found, f"call {moment}"
        assert 2 in found or found[step] == 1.0, "the oldest goes only after the new one is there"
        store.write_snapshot(str(directory), step, small(step, 1.0), keep_last=2)
        names = sorted(p.name for p in directory.iterdir())
        assert names == [f"step-{kept:06d}" for kept in ((3, 4) if step == 4 else (2, 3))], f"call {moment} left something"
        assert weight(str(directory / f"step-{step:06d}")) == 1.0
        moment += 1
    assert moment > 9


def test_a_step_that_cannot_be_replaced_keeps_its_name(tmp_path, monkeypatch):
    path = store.write_snapshot(str(tmp_path), 3, small(3))
    rename = os.rename

    def failing(source, target):
        if source.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(CheckpointError, match="Input/output error; earlier checkpoints are untouched"):
        store.write_snapshot(str(tmp_path), 3, small(3, 1.0))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"] and weight(path) == 0


def test_a_process_that_dies_while_replacing_leaves_the_old_step_listed(tmp_path):
    path = store.write_snapshot(str(tmp_path), 3, small(3))
    os.rename(path, path + ".old")
    assert store.complete_checkpoints(str(tmp_path)) == [path + ".old"] and store.step_of(path + ".old") == 3
    assert store.newest_whole(str(tmp_path)) == (path + ".old", [])
    assert store.read_snapshot(path + ".old").state["step"] == 3


def test_the_checkpoint_just_written_is_never_the_one_removed(tmp_path):
    for step in (7, 8, 9, 2):
        store.write_snapshot(str(tmp_path), step, small(step), keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


def test_neither_the_clock_nor_file_times_decide(tmp_path, monkeypatch):
    for number, step in enumerate((5, 6, 7)):
        monkeypatch.setattr(time, "time", lambda number=number: 2e9 - 1e8 * number)
        path = store.write_snapshot(str(tmp_path), step, small(step), keep_last=3)
        for file in (path, *(os.path.join(path, name) for name in os.listdir(path))):
            os.utime(file, (2e9 - 1e8 * number,) * 2)
    assert [store.step_of(path) for path in store.complete_checkpoints(str(tmp_path))] == [5, 6, 7]
    assert store.newest_whole(str(tmp_path))[0].endswith("step-000007")
    store.write_snapshot(str(tmp_path), 8, small(8), keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000007", "step-000008"]


def test_the_newest_whole_checkpoint_is_found_behind_damaged_ones(tmp_path):
    for step in (5, 6, 7, 8):
        store.write_snapshot(str(tmp_path), step, small(step), keep_last=9)
    (tmp_path / "step-000008" / "model.safetensors").write_bytes(b"x")
    (tmp_path / "step-000007" / "manifest.json").write_bytes(b"")  # what a loss of power can leave
    (tmp_path / "step-000006" / "manifest.json").unlink()
    path, problems = store.newest_whole(str(tmp_path))
    assert path.endswith("step-000005") and len(problems) == 3
    assert "step-000008/model.safetensors is damaged" in problems[0] and "step-000007/manifest.json" in problems[1] and "no manifest.json" in problems[2]
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        store.newest_whole(str(tmp_path))
    assert store.newest_whole(str(tmp_path / "nowhere")) == (None, [])


def test_later_checkpoints_are_set_aside_not_deleted(tmp_path):
    for step in (5, 6, 7):
        store.write_snapshot(str(tmp_path), step, small(step))
    (tmp_path / "step-000007.aside").mkdir()
    assert store.set_aside(str(tmp_path), 5) == ["step-000007.aside-2", "step-000006.aside"]
    assert [os.path.basename(path) for path in store.complete_checkpoints(str(tmp_path))] == ["step-000005"]
    store.write_snapshot(str(tmp_path), 6, small(6), keep_last=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000006", "step-000006.aside", "step-000007.aside", "step-000007.aside-2"]
    assert store.set_aside(str(tmp_path / "nowhere"), 5) == []


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_limit_on_file_sizes_leaves_earlier_checkpoints_and_nothing_half_written(tmp_path):
    """The way of a full disk that every system allows to test: the kernel refuses in the middle of a file."""
    store.write_snapshot(str(tmp_path), 3, small(3))
    before, large = contents(tmp_path), store.Snapshot({}, {"w": np.zeros(500_000, "float32")}, {}, small(3).state)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        for step in (3, 4):
            with pytest.raises(CheckpointError, match=rf"cannot write the checkpoint .*step-00000{step} \(2.0 MB\): File too large; earlier checkpoints"):
                store.write_snapshot(str(tmp_path), step, large)
            assert contents(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["step-000003"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store.verify_checkpoint(store.write_snapshot(str(tmp_path), 4, large))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB; where this process may not mount one, the test is skipped (the limit on file sizes above stands in)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("this process may not mount a file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_leaves_earlier_checkpoints_and_nothing_half_written(small_disk):
    directory, number = small_disk / "checkpoints", 60_000  # 0.24 MB each
    big = store.Snapshot({}, {"w": np.zeros(number, "float32")}, {}, small(0).state)
    for step in (1, 2, 3):
        store.write_snapshot(str(directory), step, big, keep_last=9)
    with pytest.raises(CheckpointError, match=r"step-000004 \(0.4 MB\): No space left on device; earlier checkpoints are untouched. Make room"):
        store.write_snapshot(str(directory), 4, store.Snapshot({}, {"w": np.zeros(100_000, "float32")}, {}, big.state), keep_last=9)
    assert [store.step_of(p) for p in store.complete_checkpoints(str(directory))] == [1, 2, 3]
    assert sorted(p.name for p in directory.iterdir()) == ["step-000001", "step-000002", "step-000003"]
    for path in store.complete_checkpoints(str(directory)):
        store.verify_checkpoint(path)


def test_a_read_only_file_system_is_refused_and_still_read(small_disk):
    directory = small_disk / "checkpoints"
    store.write_snapshot(str(directory), 1, small(1))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointError, match="Read-only file system; earlier checkpoints are untouched. Make room or give access"):
        store.write_snapshot(str(directory), 2, small(2))
    path, _ = store.newest_whole(str(directory))
    assert weight(path) == 0 and path.endswith("step-000001")


def fill(directory, text):
    os.makedirs(os.path.join(directory, "vocab"))
    for name in ("model", os.path.join("vocab", "words")):
        Path(directory, name).write_text(text)


def test_a_replaced_directory_is_the_old_or_the_new_one_whenever_the_process_dies(tmp_path, monkeypatch):
    moment, died, seen = 0, True, set()
    while died:
        best = tmp_path / str(moment) / "best"
        best.parent.mkdir()
        with store.replaced_directory(str(best)) as new:
            fill(new, "old")
        with monkeypatch.context() as patch:
            dying_at(moment, patch)
            died = False
            try:
                with store.replaced_directory(str(best)) as new:
                    fill(new, "new")
            except Killed:
                died = True
        store.recover_directory(str(best))
        assert sorted(p.name for p in best.iterdir()) == ["model", "vocab"] and (best / "vocab" / "words").read_text() == (best / "model").read_text()
        seen.add((best / "model").read_text())
        with store.replaced_directory(str(best)) as new:
            fill(new, "newer")
        assert [p.name for p in best.parent.iterdir()] == ["best"] and (best / "model").read_text() == "newer"
        moment += 1
    assert seen == {"old", "new"} and moment > 6


def test_a_replacement_that_fails_keeps_what_was_there(tmp_path):
    best = tmp_path / "best"
    with store.replaced_directory(str(best)) as new:
        fill(new, "old")
    with pytest.raises(CheckpointError, match="cannot write .*best: No space left on device; what was there is kept"):
        with store.replaced_directory(str(best)) as new:
            fill(new, "new")
            raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["best"] and (best / "model").read_text() == "old"
