"""Remote shards: fetched once, kept within the limit, safe among processes, and every failing command named."""
import multiprocessing
import os
import shlex
import time

import pytest

from unimo2_paddle.config import build
from unimo2_paddle.data import remote_shards
from unimo2_paddle.data.mixture import Batches, MixturePlan
from unimo2_paddle.data.pretrain_batches import BadRecords, PretrainData, lookahead_for, open_sources
from unimo2_paddle.data.remote_shards import ShardCache
from unimo2_paddle.data.shards import EpochOrder, ShardSet, ShardWriter, expand_shards
from unimo2_paddle.errors import DataError


@pytest.fixture
def remote(tmp_path):
    """Four shards of five texts far away; commands that fetch them count themselves in ``calls``."""
    with ShardWriter(tmp_path / "far", "t", 5) as writer:
        for i in range(20):
            writer.write(f"k{i}", texts=[f"text {i}"])
    return f"pipe:echo x >> {shlex.quote(str(tmp_path / 'calls'))}; cat {shlex.quote(str(tmp_path / 'far'))}/t-{{00000..00003}}.tar"


@pytest.fixture(autouse=True)
def no_open_copies():
    remote_shards._handles.clear()
    yield
    remote_shards._handles.clear()


def calls(tmp_path):
    path = tmp_path / "calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


def cache(tmp_path, limit=10**9, **options):
    return ShardCache(str(tmp_path / "cache"), limit, **{"retries": 0, "delay": 0.01, "stall": 10.0, **options})


def copies(tmp_path, ending=".tar"):
    return [name for name in os.listdir(tmp_path / "cache") if name.endswith(ending)]


def texts(records):
    return [records.read(i).texts[0] for i in range(len(records))]


def test_shards_are_fetched_once_and_read_like_local_ones(remote, tmp_path):
    local = ShardSet(str(tmp_path / "far" / "*.tar"), "texts")
    for _ in range(3):
        records = ShardSet(remote, "texts", remote=cache(tmp_path))
        assert texts(records) == texts(local) and records.shard_lengths == local.shard_lengths
        assert records.read(7).shard.endswith("t-00001.tar")
    assert calls(tmp_path) == 4 and len(copies(tmp_path)) == 4 and not copies(tmp_path, ".tmp")


def test_with_an_index_a_run_begins_without_fetching(remote, tmp_path):
    ShardSet(remote, "texts", str(tmp_path / "index"), remote=cache(tmp_path))
    remote_shards._handles.clear()
    for name in copies(tmp_path):
        os.remove(tmp_path / "cache" / name)
    records = ShardSet(remote, "texts", str(tmp_path / "index"), remote=cache(tmp_path))
    assert len(records) == 20 and calls(tmp_path) == 4
    assert records.read(6).texts == ["text 6"] and calls(tmp_path) == 5


def test_the_copies_used_least_recently_make_room(remote, tmp_path):
    size = os.path.getsize(tmp_path / "far" / "t-00000.tar")
    records = ShardSet(remote, "texts", remote=cache(tmp_path, limit=2 * size + 1))
    assert len(copies(tmp_path)) == 2 and len(copies(tmp_path, ".json")) == 4
    assert calls(tmp_path) == 4
    remote_shards._handles.clear()  # as another process would find it
    assert records.read(19).texts == ["text 19"] and calls(tmp_path) == 4, "the last two are there"
    assert records.read(0).texts == ["text 0"] and calls(tmp_path) == 5
    remote_shards._handles.clear()
    assert records.read(19).texts == ["text 19"] and calls(tmp_path) == 5, "used again, so another one went"
    assert len(copies(tmp_path)) == 2


def test_a_removed_copy_stays_readable_and_is_let_go_when_another_is_opened(remote, tmp_path):
    size = os.path.getsize(tmp_path / "far" / "t-00000.tar")
    records = ShardSet(remote, "texts", remote=cache(tmp_path, limit=size))
    handle = records._open(3)
    ShardSet(remote, "texts", remote=cache(tmp_path, limit=size)).read(0)
    assert os.fstat(handle.descriptor).st_nlink == 0 and len(os.pread(handle.descriptor, 10, 0)) == 10
    records.read(5)
    assert sum(os.fstat(held.descriptor).st_nlink == 0 for held in remote_shards._handles.values()) <= 1


def test_processes_fetch_a_shard_once(remote, tmp_path):
    slow = remote.replace("; cat", "; sleep 0.3; cat").replace("{00000..00003}", "00002")

    def read():
        os._exit(0 if texts(ShardSet(slow, "texts", remote=cache(tmp_path))) == [f"text {i}" for i in range(10, 15)] else 1)

    processes = [multiprocessing.get_context("fork").Process(target=read) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4 and calls(tmp_path) == 1


def test_what_a_killed_fetch_left_behind_is_removed(remote, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "0123.tar.tmp").write_bytes(b"x" * 10000)
    assert len(ShardSet(remote, "texts", remote=cache(tmp_path))) == 20
    assert not copies(tmp_path, ".tmp")


@pytest.mark.parametrize("command,message", [
    ("echo getting it >&2; echo no such bucket >&2; exit 7", "exit status 7: no such bucket"), ("exit 3", "exit status 3: .*wrote nothing"),
    ("no_such_program_at_all", "exit status 127: .*not found"), ("true", "the file is empty"), ("head -c 700 {far}/t-00000.tar", "truncated tar"),
    ("echo '<html>404 not found</html>'", "truncated|not a tar"), ("cat {far}/t-00000.tar; exit 5", "exit status 5"),
    ("sleep 1000", "gave nothing for 0.3 s"), ("cat {far}/t-00000.tar; exec >&-; sleep 1000", "did not end")])
def test_a_failing_command_is_named_with_status_and_last_words(remote, tmp_path, command, message):
    command = "pipe:" + command.replace("{far}", str(tmp_path / "far"))
    with pytest.raises(DataError, match=message) as caught:
        ShardSet(command, "texts", remote=cache(tmp_path, stall=0.3))
    assert str(caught.value).startswith(command) and "tried 1 times" in str(caught.value)
    assert not copies(tmp_path) and not copies(tmp_path, ".tmp") and not copies(tmp_path, ".json")


def test_a_command_that_fails_now_and_then_is_tried_again(remote, tmp_path):
    flaky = f"pipe:echo x >> {tmp_path}/calls; test $(wc -l < {tmp_path}/calls) -ge 3 && cat {tmp_path}/far/t-00000.tar"
    with pytest.raises(DataError, match="tried 2 times"):
        ShardSet(flaky, "texts", remote=cache(tmp_path, retries=1))
    assert len(ShardSet(flaky, "texts", remote=cache(tmp_path, retries=1))) == 5


def test_a_shard_replaced_at_its_source_is_refused(remote, tmp_path):
    one = remote.replace("{00000..00003}", "00000")
    ShardSet(one, "texts", str(tmp_path / "index"), remote=cache(tmp_path))
    remote_shards._handles.clear()
    os.remove(tmp_path / "cache" / copies(tmp_path)[0])
    os.replace(tmp_path / "far" / "t-00001.tar", tmp_path / "far" / "t-00000.tar")
    with pytest.raises(DataError, match="not the one that was indexed"):
        ShardSet(one, "texts", str(tmp_path / "index"), remote=cache(tmp_path)).read(0)


def test_a_shard_larger_than_the_whole_cache_is_refused_at_once(remote, tmp_path):
    with pytest.raises(DataError, match="larger than all of the shard cache .*data.shard_cache_gb"):
        ShardSet("pipe:cat /dev/zero", "texts", remote=cache(tmp_path, limit=5000, retries=3))
    assert not copies(tmp_path, ".tmp")


def test_a_cache_that_cannot_be_written_is_an_error(remote, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="cannot hold copies of remote shards"):
        ShardSet(remote, "texts", remote=cache(tmp_path))


def test_commands_are_refused_unless_the_configuration_allows_them(remote, tmp_path):
    with pytest.raises(DataError, match="runs a shell command, which is off by default; set data.allow_pipe"):
        expand_shards(remote)
    assert calls(tmp_path) == 0
    for values, problem in (({}, "allow_pipe"), ({"allow_pipe": True}, "data.shard_cache: is required"),
                            ({"allow_pipe": True, "shard_cache": "c", "shard_cache_gb": 0}, "shard_cache_gb")):
        problems = []
        build(PretrainData, {"vocab": "v", "texts": [{"shards": [remote]}], **values}, "data", problems)
        assert len(problems) == 1 and problem in problems[0]


def test_a_configured_run_reads_remote_shards_through_workers(remote, tmp_path):
    problems = []
    data = build(PretrainData, {"vocab": "v", "texts": [{"shards": remote}], "allow_pipe": True, "shard_cache": str(tmp_path / "cache"),
                                "shard_cache_gb": 1}, "data", problems)
    assert not problems
    readers, orders = open_sources(data, ["texts"], 1, BadRecords(str(tmp_path / "bad.jsonl"), 0.01))
    plan = MixturePlan(orders, {"texts": 1.0}, {"texts": 4}, 1)
    batches = Batches(plan, lambda draw: {"texts": [readers["texts"][0].read(index).texts[0] for _, _, index in draw.slots]}, 2)
    try:
        read = [text for _ in range(5) for text in next(batches)["texts"]]
    finally:
        batches.close()
    assert sorted(read) == sorted(f"text {i}" for i in range(20)) and calls(tmp_path) == 4


def test_the_error_of_a_worker_that_cannot_fetch_reaches_the_trainer(remote, tmp_path):
    records = ShardSet(remote, "texts", str(tmp_path / "index"), remote=cache(tmp_path))
    remote_shards._handles.clear()
    for name in copies(tmp_path):
        os.remove(tmp_path / "cache" / name)
    os.remove(tmp_path / "far" / "t-00001.tar")
    plan = MixturePlan({"texts": [(1.0, EpochOrder([5] * 4, 1))]}, {"texts": 1.0},
                       {"texts": 20}, 1)
    batches = Batches(plan, lambda draw: {"texts": [records.read(index).texts for _, _, index in draw.slots]}, 1)
    try:
        with pytest.raises(DataError, match="t-00001.tar: the command ended with exit status 1: .*No such file"):
            next(batches)
    finally:
        batches.close()


def test_a_command_is_ended_with_its_children_when_it_stalls(tmp_path):
    with pytest.raises(DataError, match="gave nothing"):
        ShardSet(f"pipe:(sleep 0.8; touch {tmp_path}/late) | cat", "texts", remote=cache(tmp_path, stall=0.2))
    time.sleep(1)
    assert not (tmp_path / "late").exists()


def test_shards_of_the_next_window_are_fetched_before_they_are_needed(remote, tmp_path):
    problems = []
    data = build(PretrainData, {"vocab": "v", "texts": [{"shards": remote}], "allow_pipe": True, "shard_cache": str(tmp_path / "cache"),
                                "shuffle_window": 5}, "data", problems)
    readers, orders = open_sources(data, ["texts"], 1, BadRecords(str(tmp_path / "bad.jsonl"), 0.01))
    order, paths = orders["texts"][0][1], readers["texts"][0].paths
    remote_shards._handles.clear()
    for name in copies(tmp_path):
        os.remove(tmp_path / "cache" / name)
    batches = Batches(MixturePlan(orders, {"texts": 1.0}, {"texts": 5}, 1), lambda draw: {}, 0, lookahead_for(readers, orders))

    def present():
        return {path for path in paths if os.path.exists(readers["texts"][0].remote._file(path, ".tar"))}

    try:
        for windows in ((0, 1), (0, 1, 2), (0, 1, 2, 3)):
            next(batches)
            wanted = {paths[shard] for window in windows for shard in order.shards(0, window)}
            end = time.time() + 20
            while present() != wanted and time.time() < end:
                time.sleep(0.02)
            assert present() == wanted
    finally:
        batches.close()


def test_the_lookahead_leaves_errors_to_those_who_need_the_shard(remote, tmp_path):
    records = ShardSet(remote, "texts", str(tmp_path / "index"), remote=cache(tmp_path))
    for name in copies(tmp_path):
        os.remove(tmp_path / "cache" / name)
    os.remove(tmp_path / "far" / "t-00001.tar")
    lookahead = remote_shards.Lookahead({("texts", 0): (records, EpochOrder([5] * 4, 1, 20))})
    lookahead({"texts": [0]})
    end = time.time() + 20
    while len(copies(tmp_path)) < 3 and time.time() < end:
        time.sleep(0.02)
    assert len(copies(tmp_path)) == 3 and lookahead._thread.is_alive()
    lookahead.close()
    lookahead._thread.join(20)
    assert not lookahead._thread.is_alive()
