"""Tar shards: what is written can be read, what is broken is named, and epochs visit everything once."""
import gzip
import io
import json
import os
import pickle
import resource
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimo2_paddle.data import shards
from unimo2_paddle.data.shards import EpochOrder, ShardSet, ShardWriter, expand_shards
from unimo2_paddle.data.tar_members import tar_members
from unimo2_paddle.errors import DataError

JPEG = b"\xff\xd8\xff" + bytes(range(200)) * 5
PNG = b"\x89PNG\r\n\x1a\n" + b"p" * 90


def make_tar(path, members, format=tarfile.GNU_FORMAT):
    """Members are (name, bytes) or a TarInfo without content."""
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return str(path)


def pair(key, text=b"a star\n", image=JPEG):
    return [(key + ".jpg", image), (key + ".txt", text)]


def scan(path):
    with open(path, "rb") as file:
        return list(tar_members(file.fileno(), os.path.getsize(path), path))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_header_scan_agrees_with_tarfile(tmp_path, format):
    names = ["a.jpg", "folder/b.txt", "x" * 60 + "/" + "y" * 90 + ".json"]
    if format != tarfile.USTAR_FORMAT:
        names += ["long/" * 60 + "c.txt", "zażółć/ślub 写真.jpg", "n" * 150 + ".png"]
    path = make_tar(tmp_path / "t.tar", [(name, b"z" * size) for name, size in zip(names, (0, 1, 511, 512, 513, 5000))], format)
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    assert [(member.name, member.offset, member.size) for member in scan(path)] == expected
    assert {member.type for member in scan(path)} == {"file"}


def test_a_size_in_base_256_is_understood(tmp_path):
    path = make_tar(tmp_path / "t.tar", [("a.txt", b"hello")])
    with open(path, "rb") as file:
        block = bytearray(file.read())
    block[124:136] = b"\x80" + (5).to_bytes(11, "big")
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:512]))
    with open(path, "wb") as file:
        file.write(block)
    assert [member.size for member in scan(path)] == [5]


def test_records_come_back_as_written(tmp_path):
    with ShardWriter(tmp_path, "pairs", records_per_shard=3) as writer:
        homes = [writer.write(f"k{i}", JPEG if i % 2 else PNG, [f"text {i}", "żółw"]) for i in range(7)]
    assert homes == ["pairs-00000.tar"] * 3 + ["pairs-00001.tar"] * 3 + ["pairs-00002.tar"]
    assert sorted(os.listdir(tmp_path)) == sorted(set(homes))
    records = ShardSet(str(tmp_path / "pairs-{00000..00002}.tar"), "pairs")
    assert len(records) == 7 and records.shard_lengths == [3, 3, 1] and records.bad_records == 0
    for i in range(7):
        record = records.read(i)
        assert (record.key, os.path.basename(record.shard)) == (f"k{i}", homes[i])
        assert record.image == (JPEG if i % 2 else PNG) and record.texts == [f"text {i}", "żółw"]
    with pytest.raises(IndexError):
        records.read(7)
    assert ShardSet(str(tmp_path / "*.tar"), "images").read(0).texts == []
    assert ShardSet(str(tmp_path / "*.tar"), "texts").read(0).image is None


def test_written_bytes_do_not_depend_on_the_time(tmp_path, monkeypatch):
    for folder, now in (("a", 1e9), ("b", 1.5e9)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        with ShardWriter(tmp_path / folder, "p", 10) as writer:
            writer.write("k", JPEG, ["text"])
    assert (tmp_path / "a/p-00000.tar").read_bytes() == (tmp_path / "b/p-00000.tar").read_bytes()


def test_an_interrupted_writer_leaves_no_unfinished_shard(tmp_path):
    with pytest.raises(RuntimeError):
        with ShardWriter(tmp_path, "p", 2) as writer:
            for i in range(3):
                writer.write(f"k{i}", texts=["text"])
            raise RuntimeError
    assert os.listdir(tmp_path) == ["p-00000.tar"]
    with pytest.raises(DataError, match="already holds 1 shard"):
        ShardWriter(tmp_path, "p", 2)


@pytest.mark.parametrize("key,image,texts,message", [
    ("a.b", JPEG, ["x"], "without a dot"), ("../a", JPEG, ["x"], "relative name"), ("/a", JPEG, ["x"], "relative name"),
    ("", JPEG, ["x"], "relative name"), ("a", None, [], "neither an image nor a text"), ("a", b"GIF89a", ["x"], "neither JPEG"),
    ("a", JPEG, ["two\nlines"], "line break"), ("a", JPEG, [" "], "empty"),
])
def test_the_writer_refuses_what_could_not_be_read_back(tmp_path, key, image, texts, message):
    with ShardWriter(tmp_path, "p", 2) as writer, pytest.raises(DataError, match=message):
        writer.write(key, image, texts)
    assert os.listdir(tmp_path) == []


def test_img2dataset_shards_are_read(tmp_path):
    path = make_tar(tmp_path / "00000.tar", [
        ("000000000.jpg", JPEG), ("000000000.json", b'{"caption": "from\\n json"}'), ("000000000.txt", b"from txt"),
        ("000000001.JPG", JPEG), ("000000001.json", '{"caption": "only żson", "url": "u"}'.encode()),
        ("000000002.webp", PNG), ("000000002.json", b'{"caption": "x"}'), ("000000002.txt", b""),
        ("./000000003.png", PNG), ("./000000003.seg.png", PNG), ("./000000003.cls", b"7"),
        ("./000000003.txt", b"a\r\n\r\n b \n"),
        ("__MACOSX/._000000003.jpg", b"junk"), ("README", b"junk"), tarfile.TarInfo("empty.txt/"),
    ])
    records = ShardSet(path, "pairs")
    read = [records.read(i) for i in range(len(records))]
    assert [record.texts for record in read] == [["from txt"], ["only żson"], ["x"], ["a", "b"]]
    assert [record.key for record in read] == [f"00000000{i}" for i in range(4)] and read[3].image == PNG


def test_bad_records_are_left_out_with_their_reason(tmp_path):
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname, link.size = tarfile.SYMTYPE, "/etc/passwd", 0
    path = make_tar(tmp_path / "s.tar", [
        *pair("good"), ("noimage.txt", b"t"), ("notext.jpg", JPEG), ("emptyimage.jpg", b""), ("emptyimage.txt", b"t"),
        ("emptytext.jpg", JPEG), ("emptytext.txt", b""), ("../up.jpg", JPEG), ("/abs.jpg", JPEG), *pair("twice"),
        ("twice.png", PNG), *pair("big", b"t" * 2000), link, ("link.txt", b"t"), *pair("last"),
    ])
    seen = []
    records = ShardSet(path, "pairs", bad_record=lambda *bad: seen.append(bad), max_member_bytes=1500)
    assert [records.read(i).key for i in range(len(records))] == ["good", "last"]
    assert {shard for shard, _, _ in seen} == {path} and records.bad_records == len(seen) == 9
    reasons = {key: reason for _, key, reason in seen}
    for key, words in {"noimage": "no image", "notext": "no text", "emptyimage": "empty image", "emptytext": "empty text",
                       "../up.jpg": "unsafe", "/abs.jpg": "unsafe", "twice": "more than one image", "big": "2000 bytes",
                       "link": "not a regular file"}.items():
        assert words in reasons[key]
    assert len(ShardSet(path, "images", max_member_bytes=1500)) == 5  # a text that is not wanted cannot make a picture bad


def raw_header(name, size, type=b"0"):
    """A header block that declares any size, as no tar program would write it."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\x80" + size.to_bytes(11, "big")
    block[156:157] = type
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:512]))
    return bytes(block)


def test_a_member_of_ten_gigabytes_is_left_out_unread_when_it_is_there_and_an_error_when_not(tmp_path):
    path, size = str(tmp_path / "s.tar"), 10 << 30
    first = open(make_tar(path, pair("good")), "rb").read()[:2560]
    with open(path, "wb") as file:  # a file with a hole: its ten gigabytes are there and take no space
        file.write(first + raw_header("huge.jpg", size))
        file.seek(size, os.SEEK_CUR)
        file.write(open(make_tar(tmp_path / "rest.tar", pair("last")), "rb").read())
    bad, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    records = ShardSet(path, "pairs", bad_record=lambda *record: bad.append(record))
    assert [records.read(i).key for i in range(len(records))] == ["good", "last"]
    assert len(bad) == 1 and f"{size} bytes, more than" in bad[0][2]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"
    for declared in (size, 2**80):
        with open(path, "wb") as file:
            file.write(first + raw_header("huge.jpg", declared) + bytes(2048))
        with pytest.raises(DataError, match="truncated tar: the member at byte 2560 needs"):
            ShardSet(path, "pairs")
    with open(path, "wb") as file:
        file.write(first + raw_header("huge", size, b"x") + bytes(2048))
    with pytest.raises(DataError, match="truncated|extended header"):
        ShardSet(path, "pairs")


@pytest.mark.parametrize("type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_devices_and_pipes_are_never_followed_or_opened(tmp_path, type):
    odd = tarfile.TarInfo("odd.jpg")
    odd.type, odd.linkname, odd.devmajor, odd.devminor = type, "../../etc/passwd", 1, 5
    bad = []
    path = make_tar(tmp_path / "s.tar", [*pair("good"), odd, ("odd.txt", b"t"), tarfile.TarInfo("folder.jpg/"), *pair("last")])
    records = ShardSet(path, "pairs", bad_record=lambda *record: bad.append(record[1:]))
    assert [records.read(i).key for i in range(len(records))] == ["good", "last"]
    assert bad == [("odd", ".jpg is not a regular file")]


@pytest.mark.parametrize("member,message", [
    (("k.txt", b"\xff\xfe"), "not UTF-8"), (("k.txt", b" \n \n"), "empty text"), (("k.json", b"{"), "not a JSON object"),
    (("k.json", b"[1]"), "not a JSON object"), (("k.json", b'{"caption": null}'), 'without a "caption"'),
    (("k.json", b"[" * 100000), "not a JSON object"),
])
def test_unusable_content_names_shard_and_record(tmp_path, member, message):
    path = make_tar(tmp_path / "s.tar", [("k.jpg", JPEG), member])
    with pytest.raises(DataError, match=message) as caught:
        ShardSet(path, "pairs").read(0)
    assert path in str(caught.value) and "record k" in str(caught.value)


def test_patterns_expand_to_existing_shards_once(tmp_path):
    for name in ("a-08", "a-09", "a-10", "b[1]"):
        make_tar(tmp_path / f"{name}.tar", pair("k"))
    base = str(tmp_path)
    names = [os.path.basename(path) for path in expand_shards([base + "/a-{08..10}.tar", base + "/*.tar"])]
    assert names == ["a-08.tar", "a-09.tar", "a-10.tar", "b[1].tar"]
    assert len(expand_shards(base + "/a-{08,1{0,0}}.tar")) == 2
    assert expand_shards(tmp_path / "b[1].tar") == [base + "/b[1].tar"]


@pytest.mark.parametrize("pattern,message", [
    ("a-{08..10}.tar", "1 missing"), ("*.tgz", "no shard matches"), ("a-{3..1}.tar", "does not count upwards"),
    ("a-{x}.tar", "cannot expand"), ("", "directory"), ([], "no shards given"),
])
def test_patterns_that_find_nothing_are_errors(tmp_path, pattern, message):
    make_tar(tmp_path / "a-08.tar", pair("k"))
    make_tar(tmp_path / "a-09.tar", pair("k"))
    with pytest.raises(DataError, match=message):
        expand_shards(pattern if pattern == [] else os.path.join(tmp_path, pattern))


def test_every_truncation_is_noticed(tmp_path):
    whole = open(make_tar(tmp_path / "whole.tar", pair("k1") + pair("n" * 120)), "rb").read()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    cut_file = str(tmp_path / "cut.tar")
    for cut in sorted(set(range(0, end + 512, 256)) | {1, end - 1, end + 511}):
        with open(cut_file, "wb") as file:
            file.write(whole[:cut])
        with pytest.raises(DataError, match="cut.tar.*(truncated|empty)"):
            ShardSet(cut_file, "pairs")
    with open(cut_file, "wb") as file:
        file.write(whole[:end + 512])
    assert len(ShardSet(cut_file, "pairs")) == 2


def test_broken_and_foreign_files_are_named(tmp_path):
    path = make_tar(tmp_path / "s.tar", pair("k"))
    whole = bytearray(open(path, "rb").read())
    cases = {"compressed: unpack": gzip.compress(bytes(whole), compresslevel=0), "bad header at byte 0": b"x" * 2000}
    whole[1536 + 20] ^= 1
    cases["bad header at byte 1536"] = bytes(whole)
    for message, content in cases.items():
        with open(path, "wb") as file:
            file.write(content)
        with pytest.raises(DataError, match=message) as caught:
            ShardSet(path, "pairs")
        assert path in str(caught.value)
    for members, message in (([], "empty tar"), ([("a.txt", b"t")], "no usable record for pairs .*no image")):
        with pytest.raises(DataError, match=message):
            ShardSet(make_tar(path, members), "pairs")
    with pytest.raises(DataError, match="unknown kind"):
        ShardSet(path, "videos")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damage_does_more_than_raise_a_data_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damage")
    format = data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    path = make_tar(folder / "s.tar", pair("k") + pair("n" * 120), format)
    content = bytearray(open(path, "rb").read())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with open(path, "wb") as file:
        file.write(content)
    try:
        records = ShardSet(path, "pairs")
        for i in range(len(records)):
            records.read(i)
    except DataError:
        pass


def test_the_index_cache_replaces_the_scan_until_the_shard_changes(tmp_path, monkeypatch):
    path, cache = make_tar(tmp_path / "s.tar", pair("k1") + [("odd.jpg", JPEG)]), str(tmp_path / "cache")
    first, bad = ShardSet(path, "pairs", cache), []
    scans = []
    real = shards.tar_members
    monkeypatch.setattr(shards, "tar_members", lambda *args: scans.append(args) or real(*args))
    again = ShardSet(path, "pairs", cache, bad_record=lambda *record: bad.append(record))
    assert not scans and again.read(0) == first.read(0) and len(bad) == 1 and bad[0][1] == "odd"
    assert len(ShardSet(path, "images", cache)) == 2 and len(scans) == 1  # the kinds do not share an index
    for name in os.listdir(cache):
        with open(os.path.join(cache, name), "r+b") as file:
            file.truncate(40)
    assert ShardSet(path, "pairs", cache).read(0) == first.read(0) and len(scans) == 2
    make_tar(path, pair("k2") + pair("k3"))
    assert [ShardSet(path, "pairs", cache).read(i).key for i in (0, 1)] == ["k2", "k3"]
    assert not [name for name in os.listdir(cache) if name.endswith(".tmp")]
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot hold the shard indices"):
        ShardSet(path, "pairs", str(tmp_path / "file"))


def test_workers_share_the_indexing_and_find_the_same_records(tmp_path, monkeypatch):
    with ShardWriter(tmp_path, "p", 2) as writer:
        for i in range(16):
            writer.write(f"k{i}", texts=[str(i)])
    scanned = []
    real = shards.tar_members
    monkeypatch.setattr(shards, "tar_members", lambda *args: scanned.append(args[2]) or real(*args))
    pattern, cache, whole = str(tmp_path / "*.tar"), str(tmp_path / "cache"), ShardSet(str(tmp_path / "*.tar"), "texts")
    assert scanned == whole.paths
    for rank in range(3):
        scanned.clear()
        part = ShardSet(pattern, "texts", str(tmp_path / str(rank)), turn=(rank, 3))
        assert scanned[0] == whole.paths[(0, 2, 5)[rank]] and sorted(scanned) == whole.paths
        assert part.shard_lengths == whole.shard_lengths and [part.read(i) for i in range(16)] == [whole.read(i) for i in range(16)]
    ShardSet(pattern, "texts", cache)
    scanned.clear()
    ShardSet(pattern, "texts", cache, turn=(1, 3))
    assert not scanned


def test_a_shard_that_changes_under_the_reader_is_an_error(tmp_path):
    path = make_tar(tmp_path / "s.tar", pair("k1"))
    records = pickle.loads(pickle.dumps(ShardSet(path, "pairs")))
    shards._open_shard.cache_clear()
    make_tar(path, pair("k1") + pair("k2"))
    with pytest.raises(DataError, match="changed since it was indexed"):
        records.read(0)
    os.remove(path)
    with pytest.raises(DataError, match="cannot be read"):
        records.read(0)


def test_forked_and_pickled_sets_read_on_with_their_own_files(tmp_path):
    path = make_tar(tmp_path / "s.tar", [member for i in range(20) for member in pair(f"k{i}", b"text %d" % i)])
    records = ShardSet(path, "pairs")
    assert pickle.loads(pickle.dumps(records)).read(7) == records.read(7)
    child = os.fork()
    if child == 0:
        good = all(records.read(i).texts == [f"text {i}"] for i in range(20))
        os._exit(0 if good else 1)
    assert [records.read(i).key for i in range(20)] == [f"k{i}" for i in range(20)]
    assert os.waitpid(child, 0)[1] == 0


def test_open_files_are_bounded(tmp_path):
    with ShardWriter(tmp_path, "p", 1) as writer:
        for i in range(150):
            writer.write(f"k{i}", texts=[str(i)])
    shards._open_shard.cache_clear()
    before = len(os.listdir("/proc/self/fd"))
    records = ShardSet(str(tmp_path / "*.tar"), "texts", cache_dir=str(tmp_path / "cache"))
    assert [records.read(i).texts for i in (149, 0, 75)] == [["149"], ["0"], ["75"]]
    assert len(os.listdir("/proc/self/fd")) - before <= shards._MAX_OPEN_SHARDS
    shards._open_shard.cache_clear()
    assert len(os.listdir("/proc/self/fd")) == before


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12), seed=st.integers(0, 2**70), epoch=st.integers(0, 10**6),
       window=st.integers(1, 60))
def test_an_epoch_reads_every_record_exactly_once(lengths, seed, epoch, window):
    order = EpochOrder(lengths, seed, window)
    read = [order.index(epoch, position) for position in range(len(order))]
    assert sorted(read) == list(range(sum(lengths)))
    other = EpochOrder(lengths, seed, window)  # reading backwards, from scratch: nothing but (seed, epoch) counts
    assert [other.index(epoch, position) for position in reversed(range(len(order)))] == read[::-1]


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any), window=st.integers(1, 40))
def test_the_windows_of_an_epoch_name_the_shards_they_read_and_follow_each_other(lengths, window):
    order = EpochOrder(lengths, 5, window)
    ends, at = np.cumsum(lengths), (2, 0)
    for position in range(0, len(order), window):
        assert order.window_of(2, position) == at
        read = {int(np.searchsorted(ends, order.index(2, p), side="right")) for p in range(position, min(position + window, len(order)))}
        assert set(order.shards(*at)) == read
        at = order.window_after(*at)
    assert at == (3, 0)


def test_orders_differ_between_seeds_and_epochs_and_mix_whole_windows():
    lengths = [50] * 20
    orders = {(seed, epoch): tuple(EpochOrder(lengths, seed, 200).index(epoch, position) for position in range(1000))
              for seed in (0, 1, 2**32) for epoch in (0, 1)}
    assert len(set(orders.values())) == 6
    for order in orders.values():
        for start in range(0, 1000, 200):
            window = np.array(order[start:start + 200])
            assert len(set(window // 50)) == 4  # a window of 200 touches four shards, so reading stays local
            assert np.abs(np.diff(window // 50)).astype(bool).mean() > 0.5  # and they are mixed
    with pytest.raises(IndexError):
        EpochOrder(lengths, 0, 10).index(0, 1000)
    with pytest.raises(DataError, match="window"):
        EpochOrder(lengths, 0, 0)


def test_an_epoch_of_a_hundred_million_records_is_never_materialised():
    order = EpochOrder([10000] * 10000, seed=1, window=5000)
    drawn = [order.index(3, position) for position in (0, 4999, 50_000_000, 99_999_999)]
    assert len(set(drawn)) == 4 and all(0 <= index < 10**8 for index in drawn)
    assert len(pickle.dumps(order)) < 2_000_000


def test_json_captions_survive_the_round_trip_of_any_text(tmp_path):
    text = 'quo"te \u2028 emoji \U0001f600 ' + "word " * 10000
    path = make_tar(tmp_path / "s.tar", [("k.jpg", JPEG), ("k.json", json.dumps({"caption": text}).encode())])
    assert ShardSet(path, "pairs").read(0).texts == [" ".join(text.split())]
