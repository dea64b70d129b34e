"""Hostile, damaged and honest archives."""
import gzip
import io
import os
import tarfile
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimo2_paddle.checkpoints.archives import Limits, check_room, extract, pack
from unimo2_paddle.errors import ArchiveError

LINK, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE


def archive(path, *members, mode="w:gz"):
    """A tar file of (name, content) or (name, type, link target)."""
    with tarfile.open(path, mode) as tar:
        for name, *rest in members:
            member = tarfile.TarInfo(name)
            if len(rest) == 1:
                member.size = len(rest[0])
                tar.addfile(member, io.BytesIO(rest[0]))
            else:
                member.type, member.linkname = rest
                tar.addfile(member)
    return str(path)


@pytest.fixture
def room(tmp_path):
    """An empty directory inside another one that must stay as it is."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "target").mkdir()
    return tmp_path / "outside" / "target"


def refused(path, room, *words, limits=None):
    with pytest.raises(ArchiveError) as caught:
        extract(path, str(room), limits)
    assert sorted(os.listdir(room.parent)) == ["target"], "something was written outside"
    assert not [name for place, folders, names in os.walk(room) for name in folders + names if os.path.islink(os.path.join(place, name))]
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_files_and_folders_arrive_as_they_were(tmp_path, room, mode):
    path = archive(tmp_path / "a", ("a/b.txt", b"one"), ("a/empty", tarfile.DIRTYPE, ""), ("c", bytes(700_000)), ("./d/e", b"x" * 512), ("z", b""), mode=mode)
    assert extract(path, str(room)) == 4
    assert (room / "a" / "b.txt").read_bytes() == b"one" and (room / "a" / "empty").is_dir()
    assert (room / "c").read_bytes() == bytes(700_000) and (room / "d" / "e").read_bytes() == b"x" * 512


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "a/../x", "..", "C:\\x", "a\\..\\..\\x", "c:/x", "x" * 300])
def test_names_that_lead_elsewhere_are_refused(tmp_path, room, name):
    refused(archive(tmp_path / "a.tar.gz", ("good", b"1"), (name, b"evil")), room, "not unpacked")


@pytest.mark.parametrize("kind, target", [(LINK, "/etc/passwd"), (LINK, "../../x"), (LINK, ".."), (HARD, "/etc/passwd"), (HARD, "../x"),
                                          (LINK, "nothing"), (LINK, "l"), (LINK, ".")])
def test_links_that_lead_elsewhere_or_nowhere_are_refused(tmp_path, room, kind, target):
    refused(archive(tmp_path / "a.tar.gz", ("good", b"1"), ("l", kind, target)), room, "l: a link to")


def test_nothing_is_written_through_a_link(tmp_path, room):
    refused(archive(tmp_path / "a.tar.gz", ("d", LINK, ".."), ("d/evil", b"1")), room)
    for name in os.listdir(room):
        os.rename(room / name, tmp_path / name)
    refused(archive(tmp_path / "b.tar.gz", ("d/l", LINK, ".."), ("x", LINK, "d/l/.."), ("x/evil", b"1")), room)


def test_links_to_files_inside_become_copies(tmp_path, room):
    path = archive(tmp_path / "a.tar.gz", ("d/early", LINK, "../late"), ("late", b"here"), ("hard", HARD, "late"), ("chain", LINK, "d/early"))
    assert extract(path, str(room)) == 4
    for name in ("d/early", "hard", "chain"):
        assert (room / name).read_bytes() == b"here" and not (room / name).is_symlink() and (room / name).stat().st_nlink == 1


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices_and_pipes_are_refused(tmp_path, room, kind):
    refused(archive(tmp_path / "a.tar.gz", ("dev", kind, "")), room, "dev: a device, pipe")


def test_a_repeated_name_and_a_file_that_is_also_a_folder_are_refused(tmp_path, room):
    refused(archive(tmp_path / "a.tar.gz", ("a", b"1"), ("./a", b"2")), room, "a: is in the archive twice")
    (room / "a").unlink()
    refused(archive(tmp_path / "b.tar.gz", ("a", b"1"), ("a/b", b"2")), room, "both a file and a directory")


def test_limits_on_bytes_ratio_and_members_hold(tmp_path, room):
    path = archive(tmp_path / "a.tar.gz", ("zeros", bytes(70 << 20)))
    refused(path, room, "more than 67108864 bytes")  # a ratio of a thousand
    assert sum(file.stat().st_size for file in room.iterdir()) <= 64 << 20
    (room / "zeros").unlink()
    refused(path, room, "more than 1000 bytes", limits=Limits(total=1000))
    (room / "zeros").unlink()
    refused(archive(tmp_path / "b.tar.gz", *[(str(n), b"") for n in range(5)]), room, "more than 4 members", limits=Limits(members=4))


def test_a_header_that_asks_for_all_memory_is_refused(tmp_path, room):
    member = tarfile.TarInfo("././@PaxHeader")
    member.type, member.size = tarfile.XHDTYPE, 1 << 32
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(member.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 20)))
    refused(path, room, "a header of 4294967296 bytes")


def test_every_truncation_is_noticed(tmp_path, room):
    whole = open(archive(tmp_path / "a.tar", ("a", b"1" * 2000), ("b", b"2" * 100), mode="w"), "rb").read()
    end = 512 * (1 + 4 + 1 + 1)
    for length in (0, 100, 512, 1500, 512 * 5, 512 * 5 + 300, 512 * 6 + 50, end):
        for packed in (False, True):
            path = tmp_path / f"cut-{length}-{packed}"
            path.write_bytes(gzip.compress(whole[:length]) if packed else whole[:length])
            refused(path, room)
            for name in os.listdir(room):
                (room / name).unlink()
    path = tmp_path / "cut.tar.gz"
    path.write_bytes(gzip.compress(whole)[:-4])
    refused(path, room, "damaged or truncated; fetch it again")


def test_a_broken_header_in_the_middle_is_not_taken_for_the_end(tmp_path, room):
    content = bytearray(open(archive(tmp_path / "a.tar", ("a", b"1"), ("b", b"2"), mode="w"), "rb").read())
    content[1024 + 10] ^= 1
    (tmp_path / "broken.tar").write_bytes(content)
    refused(tmp_path / "broken.tar", room, "damaged or truncated")


def test_what_is_no_tar_file_is_called_by_its_name(tmp_path, room):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a", "1")
    refused(tmp_path / "a.zip", room, "a zip file; unpack it and pack it again as tar.gz")
    (tmp_path / "page").write_bytes(b"\n<html>Please log in</html>")
    refused(tmp_path / "page", room, "a web page")
    (tmp_path / "empty").write_bytes(b"")
    refused(tmp_path / "empty", room, "an empty file")
    (tmp_path / "noise").write_bytes(b"noise" * 1000)
    refused(tmp_path / "noise", room, "no tar archive")


def test_what_macos_adds_is_left_out(tmp_path, room):
    path = archive(tmp_path / "a.tar.gz", ("m/._w", b"1"), ("m/w", b"2"), ("m/.DS_Store", b"3"))
    assert extract(path, str(room)) == 1 and os.listdir(room / "m") == ["w"]


@given(st.data())
def test_a_damaged_archive_never_ends_in_another_error(data):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.tar")
        content = bytearray(open(archive(path, ("a/b", b"1" * 600), ("l", LINK, "a/b"), ("c", b"2"), mode="w"), "rb").read()[:5120])
        for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
            content[position] = data.draw(st.integers(0, 255))
        with open(path, "wb") as file:
            file.write(content)
        target = os.path.join(folder, "t")
        os.mkdir(target)
        try:
            extract(path, target)
        except ArchiveError:
            pass
        assert sorted(os.listdir(folder)) == ["a.tar", "t"]


def test_packing_the_same_directory_gives_the_same_bytes_and_comes_back(tmp_path, room):
    for number in (1, 2):
        source = tmp_path / f"source{number}"
        (source / "vocab").mkdir(parents=True)
        for name in (("w", "vocab/v") if number == 1 else ("vocab/v", "w")):
            (source / name).write_text(name)
            os.utime(source / name, (number * 1000, number * 1000))
        assert pack(str(source), str(tmp_path / f"{number}.tar.gz"), "name") == 2
    assert (tmp_path / "1.tar.gz").read_bytes() == (tmp_path / "2.tar.gz").read_bytes()
    extract(str(tmp_path / "1.tar.gz"), str(room))
    assert (room / "name" / "vocab" / "v").read_text() == "vocab/v"
    (tmp_path / "source1" / "link").symlink_to("w")
    with pytest.raises(ArchiveError, match="is a link"):
        pack(str(tmp_path / "source1"), str(tmp_path / "3.tar.gz"), "name")


def test_a_disk_smaller_than_the_archive_is_said_first(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.tar.gz", ("a", b"1"))
    monkeypatch.setattr("unimo2_paddle.checkpoints.archives.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1}))
    with pytest.raises(ArchiveError, match="1 are free"):
        check_room(path, str(tmp_path))
