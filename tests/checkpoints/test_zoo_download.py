"""Downloads against a server that is slow, cut, wrong, gone, redirecting or without ranges."""
import hashlib
import random

import pytest

from unimo2_paddle.checkpoints import download as module
from unimo2_paddle.checkpoints.download import Patience, download
from unimo2_paddle.errors import DownloadError

CONTENT = random.Random(1).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
QUICK = Patience(retries=2, delay=0.0, stall=5.0)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "new" / "file.tar.gz"


def leftovers(target):
    return sorted(path.name for path in target.parent.iterdir())


def failed(server, target, path="/file", **arguments):
    with pytest.raises(DownloadError) as caught:
        download(server.url + path, str(target), patience=arguments.pop("patience", QUICK), **arguments)
    assert not target.exists(), "nothing unchecked may have the final name"
    return str(caught.value)


def test_a_file_arrives_whole_with_its_size_and_sha256(server, target):
    server.serve("/file", CONTENT)
    assert download(server.url + "/file", str(target), len(CONTENT), SHA256) == (len(CONTENT), SHA256)
    assert target.read_bytes() == CONTENT and leftovers(target) == ["file.tar.gz"]


def test_a_connection_that_breaks_again_and_again_is_continued_where_it_broke(server, target, monkeypatch):
    monkeypatch.setattr(module, "_ENOUGH", 10_000)
    served = server.serve("/file", CONTENT, cut_after=50_000)
    download(server.url + "/file", str(target), sha256=SHA256, patience=QUICK)
    assert target.read_bytes() == CONTENT
    assert [request.get("Range") for request in served.requests] == [None] + [f"bytes={50_000 * n}-" for n in range(1, 6)]
    assert served.requests[1]["If-Range"] == '"1"'


def test_a_later_call_goes_on_from_what_an_earlier_one_left(server, target):
    served = server.serve("/file", CONTENT, cut_after=100_000, cuts=1)
    text = failed(server, target, patience=Patience(retries=0))
    assert "ended after 100000 of 300000 bytes" in text and "100000 bytes are kept" in text
    download(server.url + "/file", str(target), sha256=SHA256)
    assert target.read_bytes() == CONTENT and served.requests[-1]["Range"] == "bytes=100000-"


def test_a_part_that_is_whole_needs_no_request(server, target):
    served = server.serve("/file", CONTENT, cut_after=100_000, cuts=1)
    failed(server, target, patience=Patience(retries=0))
    (target.parent / "file.tar.gz.part").write_bytes(CONTENT)
    download(server.url + "/file", str(target), sha256=SHA256)
    assert target.read_bytes() == CONTENT and len(served.requests) == 1


def test_a_server_without_ranges_gives_everything_again(server, target):
    served = server.serve("/file", CONTENT, cut_after=100_000, cuts=1, ranges=False)
    download(server.url + "/file", str(target), patience=QUICK)
    assert target.read_bytes() == CONTENT and len(served.requests) == 2


def test_a_file_that_changed_between_two_tries_is_not_mixed(server, target):
    served = server.serve("/file", CONTENT, cut_after=100_000, cuts=1)
    failed(server, target, patience=Patience(retries=0))
    served.content, served.settings["tag"] = CONTENT[::-1], '"2"'
    download(server.url + "/file", str(target))
    assert target.read_bytes() == CONTENT[::-1]


def test_damaged_bytes_of_an_earlier_try_are_fetched_again_before_the_hash_is_believed(server, target):
    server.serve("/file", CONTENT, cut_after=100_000, cuts=1)
    failed(server, target, patience=Patience(retries=0))
    (target.parent / "file.tar.gz.part").write_bytes(bytes(100_000))
    download(server.url + "/file", str(target), sha256=SHA256)
    assert target.read_bytes() == CONTENT


def test_a_part_of_another_address_is_not_continued(server, target):
    server.serve("/other", CONTENT[::-1], cut_after=100_000)
    failed(server, target, "/other", patience=Patience(retries=0))
    served = server.serve("/file", CONTENT)
    download(server.url + "/file", str(target))
    assert target.read_bytes() == CONTENT and "Range" not in served.requests[0]


def test_an_answer_with_another_range_starts_again(server, target):
    served = server.serve("/file", CONTENT, cut_after=100_000, cuts=1, range_start=5)
    download(server.url + "/file", str(target), patience=QUICK)
    assert target.read_bytes() == CONTENT and "Range" not in served.requests[-1]


def test_a_slow_server_is_waited_for_and_a_silent_one_is_not(server, target):
    server.serve("/file", CONTENT, pause=0.05)
    download(server.url + "/file", str(target), patience=QUICK)
    assert target.read_bytes() == CONTENT
    target.unlink()
    server.serve("/silent", CONTENT, pause=1.0)
    assert "timed out" in failed(server, target, "/silent", patience=Patience(retries=0, stall=0.1))


def test_a_wrong_length_is_refused_before_anything_is_fetched(server, target):
    served = server.serve("/file", CONTENT)
    assert "offers 300000 bytes, expected are 299999" in failed(server, target, size=299_999)
    assert len(served.requests) == 1 and leftovers(target) == []


def test_a_length_that_the_body_does_not_reach_is_a_broken_connection(server, target):
    served = server.serve("/file", CONTENT, length=400_000, ranges=False)
    assert "ended after 300000 of 400000 bytes (tried 3 times)" in failed(server, target)
    assert len(served.requests) == 3


def test_without_a_stated_length_the_registry_s_size_decides(server, target):
    server.serve("/file", CONTENT, length=False)
    download(server.url + "/file", str(target), size=300_000)
    assert target.read_bytes() == CONTENT
    target.unlink()
    assert "sent more than the 200000 bytes expected" in failed(server, target, size=200_000)


def test_a_wrong_hash_names_both_and_leaves_nothing(server, target):
    server.serve("/file", CONTENT)
    text = failed(server, target, sha256="0" * 64)
    assert SHA256 in text and "0" * 64 in text and "mirror" in text
    assert leftovers(target) == []


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_an_address_that_will_not_get_better_is_asked_once(server, target, status):
    served = server.serve("/file", CONTENT, statuses=[status] * 9)
    assert f"HTTP status {status}" in failed(server, target)
    assert len(served.requests) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, target, status):
    served = server.serve("/file", CONTENT, statuses=[status] * 2)
    download(server.url + "/file", str(target), patience=QUICK)
    assert target.read_bytes() == CONTENT and len(served.requests) == 3
    served.settings["statuses"] = [status] * 9
    target.unlink()
    assert f"HTTP status {status}" in failed(server, target) and len(served.requests) == 6


def test_waiting_grows_and_is_bounded(server, target, monkeypatch):
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    server.serve("/file", CONTENT, statuses=[500] * 99)
    failed(server, target, patience=Patience(retries=8, delay=1.0))
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_redirects_are_followed_with_the_range_and_a_circle_ends(server, target):
    served = server.serve("/real", CONTENT, cut_after=100_000, cuts=1)
    server.serve("/file", b"", redirect=server.url + "/real")
    download(server.url + "/file", str(target), patience=QUICK)
    assert target.read_bytes() == CONTENT and served.requests[1]["Range"] == "bytes=100000-"
    target.unlink()
    server.serve("/circle", b"", redirect=server.url + "/circle")
    assert "HTTP status 302" in failed(server, target, "/circle")


@pytest.mark.parametrize("place", ["ftp://127.0.0.1/x", "file:///etc/passwd"])
def test_redirects_to_other_schemes_are_refused(server, target, place):
    server.serve("/file", b"", redirect=place)
    failed(server, target)


def test_a_redirect_from_https_to_http_is_refused():
    request = module.urllib.request.Request("https://example.org/a")
    with pytest.raises(DownloadError, match="redirected to http://example.org/b"):
        module._Redirects().redirect_request(request, None, 302, "Found", {}, "http://example.org/b")


def test_nobody_listening_and_unusable_addresses_are_named(server, target, tmp_path):
    address = server.url
    server.socket.close()
    with pytest.raises(DownloadError, match="cannot be reached: Connection refused .tried 3 times"):
        download(address + "/file", str(target), patience=QUICK)
    for url in ("ftp://127.0.0.1/a", "file:///a", "nowhere", "http:///a"):
        with pytest.raises(DownloadError, match="not an http or https address"):
            download(url, str(target))


def test_a_disk_without_room_is_said_before_the_download(server, target, monkeypatch):
    server.serve("/file", CONTENT)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert "300000 bytes are to come and 1000 are free" in failed(server, target)


def test_a_log_gets_lines_instead_of_a_bar(server, target, monkeypatch, capsys):
    monkeypatch.setattr(module._Progress, "EVERY", 0.0)
    server.serve("/file", CONTENT)
    download(server.url + "/file", str(target), title="some-name")
    assert "some-name: 0.3 of 0.3 MB" in capsys.readouterr().err
