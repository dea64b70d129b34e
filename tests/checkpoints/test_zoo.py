"""The zoo: its registry, the cache, offline mode, publishing, and a name wherever a directory can stand."""
import hashlib
import io
import json
import os
import re
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml

from unimo2_paddle.checkpoints import zoo
from unimo2_paddle.checkpoints.download import Patience
from unimo2_paddle.errors import ArchiveError, CheckpointError, ConfigError, DownloadError, ZooError

ROOT = Path(__file__).resolve().parent.parent.parent
RELEASE = ROOT / "tests" / "data" / "tiny_release"
QUICK = Patience(retries=0, delay=0.0, stall=5.0)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty cache, no further registries, the network allowed (to this machine)."""
    monkeypatch.setenv("UNIMO2_HOME", str(tmp_path / "home"))
    for name in ("UNIMO2_ZOO", "UNIMO2_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def release():
    """The tiny authors' directory as an archive, with a folder around it."""
    return packed({f"UNIMO-2/{path.name}": path.read_bytes() for path in sorted(RELEASE.iterdir())})


def packed(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def register(tmp_path, monkeypatch):
    """A function that writes entries into a zoo directory which UNIMO2_ZOO then names."""

    def write(**entries):
        directory = tmp_path / "registry"
        directory.mkdir(exist_ok=True)
        defaults = {"kind": "model", "about": "for the test", "urls": ["a.tar.gz"]}
        (directory / "test.yaml").write_text(yaml.safe_dump({name.replace("_", "-"): {**defaults, **values} for name, values in entries.items()}))
        monkeypatch.setenv("UNIMO2_ZOO", str(directory))
        return directory

    return write


@pytest.fixture
def tiny(server, register, release):
    """A model ``tiny`` that the server has."""
    served = server.serve("/model/tiny.tar.gz", release)
    register(tiny={"urls": [server.url + "/model/tiny.tar.gz"]})
    return served


# ---- the registry ----


def test_the_project_s_registry_is_sound_and_promises_nothing_unknown():
    found = zoo.entries()
    assert {"unimo2-base", "unimo-base", "unimo-large", "unimo-base-mnli", "unimo-large-mnli"} <= {n for n, e in found.items() if e.kind == "model"}
    for name, entry in found.items():
        assert all(re.fullmatch(r"https://[a-z0-9-]+\.bj\.bcebos\.com/\S+\.tar\.gz", url) for url in entry.urls), name
        assert entry.use_at and entry.root, name
        assert entry.kind != "model" or (entry.config and entry.table), name
        for path in entry.used_by:
            assert (ROOT / path).is_file(), f"{name}: {path}"
        assert entry.sha256 == zoo.UNKNOWN and entry.size == zoo.UNKNOWN, "nobody has measured these yet"
    assert len({url for entry in found.values() for url in entry.urls}) == sum(len(entry.urls) for entry in found.values())


@pytest.mark.parametrize("values, words", [
    ({"kind": "modle"}, "kind: 'modle' is not one of"), ({"sha256": "abc"}, "sha256: 'abc'"), ({"size": -1}, "size: -1"),
    ({"urls": []}, "at least one"), ({"urls": ["ftp://x/a"]}, "ftp://x/a"), ({"urls": ["/etc/passwd"]}, "/etc/passwd"),
    ({"urls": ["../a.tar.gz"]}, "../a.tar.gz"), ({"licnce": "MIT"}, "did you mean 'licence'"), ({"config": "nothing"}, "'nothing'"),
])
def test_a_wrong_entry_is_named_with_its_file(register, values, words):
    directory = register(wrong=values)
    with pytest.raises(ZooError) as caught:
        zoo.entries()
    assert words in str(caught.value) and str(directory / "test.yaml") in str(caught.value) and "wrong" in str(caught.value)


def test_names_are_checked_unique_and_suggested(register, tmp_path):
    register(unimo2_base={})
    with pytest.raises(ZooError, match="unimo2-base is named in .*unimo2.yaml already"):
        zoo.entries()
    (tmp_path / "registry" / "test.yaml").write_text("../evil: {kind: data, about: x, urls: [a]}")
    with pytest.raises(ZooError, match="'../evil': a name has"):
        zoo.entries()
    (tmp_path / "registry" / "test.yaml").unlink()
    with pytest.raises(ZooError, match="'unimo2-bose' is not in the model zoo; did you mean 'unimo2-base'"):
        zoo.find("unimo2-bose")
    with pytest.raises(ZooError, match="no such zoo directory"):
        zoo.entries([str(tmp_path / "nothing")])


# ---- the cache ----


def test_a_model_is_fetched_once_checked_placed_and_recorded(tiny, home, release):
    path = zoo.fetch("tiny", patience=QUICK)
    assert path == str(home / "zoo" / "tiny") == zoo.fetch("zoo:tiny") and len(tiny.requests) == 1
    assert {p.name for p in Path(path).iterdir()} == {p.name for p in RELEASE.iterdir()}, "the folder around the variables is taken off"
    assert json.loads((home / "zoo.lock.json").read_text())["tiny"]["sha256"] == hashlib.sha256(release).hexdigest()
    assert sorted(os.listdir(home / "downloads")) == ["tiny.lock"] and os.listdir(home / "zoo") == ["tiny"]


def test_authors_weights_get_the_config_they_lack(server, register, release, home):
    server.serve("/a.tar.gz", release)
    register(tiny={"urls": [server.url + "/a.tar.gz"], "config": "unimo2_demo"})
    config = json.loads(Path(zoo.fetch("tiny"), "config.json").read_text())
    assert config == json.loads((ROOT / "unimo2_paddle" / "models" / "configs" / "unimo2_demo.json").read_text())


def test_what_was_recorded_must_come_again(tiny, home):
    path = zoo.fetch("tiny", patience=QUICK)
    os.rename(path, home / "away")
    tiny.content = packed({"x": b"another"})
    with pytest.raises(DownloadError, match="replaced or damaged.*zoo.lock.json, recorded at the first download") as caught:
        zoo.fetch("tiny", patience=QUICK)
    assert "--from-file" in str(caught.value) and not os.path.exists(path)


def test_a_cached_version_other_than_the_registry_s_is_not_used(tiny, register):
    path = zoo.fetch("tiny", patience=QUICK)
    register(tiny={"sha256": "1" * 64})
    with pytest.raises(ZooError, match="holds another version of tiny") as caught:
        zoo.fetch("tiny")
    assert path in str(caught.value)


def test_the_second_address_is_tried_and_all_failures_are_told(server, register, release, tmp_path):
    server.serve("/second.tar.gz", release)
    register(tiny={"urls": [server.url + "/first.tar.gz", server.url + "/second.tar.gz"]})
    assert zoo.fetch("tiny", to=str(tmp_path / "here"), patience=QUICK) == str(tmp_path / "here")
    server.files.clear()
    with pytest.raises(DownloadError) as caught:
        zoo.fetch("tiny", patience=QUICK)
    text = str(caught.value)
    assert "first.tar.gz: HTTP status 404" in text and "second.tar.gz: HTTP status 404" in text and "By hand" in text and "--mirror" in text


def test_a_mirror_has_the_same_path_or_is_the_archive(server, register, release, home):
    register(tiny={"urls": ["https://nowhere.invalid/model/tiny.tar.gz"]}, other={"urls": ["https://nowhere.invalid/x.tar.gz"]})
    server.serve("/mirror/model/tiny.tar.gz", release)
    zoo.fetch("tiny", mirror=server.url + "/mirror/", patience=QUICK)
    zoo.fetch("other", mirror=server.url + "/mirror/model/tiny.tar.gz", patience=QUICK)
    assert sorted(os.listdir(home / "zoo")) == ["other", "tiny"]


def test_offline_the_network_is_not_touched_and_the_manual_way_is_told(tiny, tmp_path, monkeypatch, release):
    monkeypatch.setenv("UNIMO2_OFFLINE", "1")
    with pytest.raises(ZooError, match="UNIMO2_OFFLINE forbids the network. By hand: fetch http.*/model/tiny.tar.gz.*--from-file ARCHIVE"):
        zoo.fetch("tiny")
    (tmp_path / "by-hand.tgz").write_bytes(release)
    path = zoo.fetch("tiny", from_file=str(tmp_path / "by-hand.tgz"))
    assert zoo.fetch("tiny") == path and not tiny.requests and (tmp_path / "by-hand.tgz").exists()


def test_a_given_archive_is_checked(tiny, register, tmp_path, home):
    with pytest.raises(ZooError, match="nothing.tgz: no such archive file"):
        zoo.fetch("tiny", from_file=str(tmp_path / "nothing.tgz"))
    (tmp_path / "page.tgz").write_bytes(b"<html>")
    with pytest.raises(ArchiveError, match="page.tgz: a web page"):
        zoo.fetch("tiny", from_file=str(tmp_path / "page.tgz"))
    register(tiny={"sha256": "2" * 64})
    with pytest.raises(ZooError, match=f"expected for tiny is {'2' * 64}"):
        zoo.fetch("tiny", from_file=str(tmp_path / "page.tgz"))
    assert not os.listdir(home / "zoo") and not (home / "zoo.lock.json").exists()


@pytest.mark.parametrize("files, words", [({"../evil": b"1"}, "leads out"), ({"a/readme.txt": b"no weights"}, "not to a checkpoint"), ({}, "holds no files")])
def test_an_archive_that_is_hostile_or_no_model_leaves_no_trace(server, register, home, files, words):
    server.serve("/a.tar.gz", packed(files))
    register(tiny={"urls": [server.url + "/a.tar.gz"]})
    with pytest.raises((ArchiveError, CheckpointError), match=words):
        zoo.fetch("tiny", patience=QUICK)
    assert os.listdir(home / "zoo") == [] and not (home / "zoo.lock.json").exists(), "its hash must not be believed next time"
    assert not list(home.parent.glob("**/evil"))


def test_data_lose_the_folder_that_the_registry_names_and_no_other(server, register):
    server.serve("/a.tar.gz", packed({"coco/only/x": b"1", "coco/._x": b"2"}))
    register(named={"kind": "data", "root": "data/coco", "urls": [server.url + "/a.tar.gz"]},
             unnamed={"kind": "data", "urls": [server.url + "/a.tar.gz"]})
    assert os.listdir(zoo.fetch("named", patience=QUICK)) == ["only"]
    assert os.listdir(zoo.fetch("unnamed", patience=QUICK)) == ["coco"]


def test_a_folder_inside_one_of_the_same_name_survives(server, register):
    server.serve("/a.tar.gz", packed({"coco/coco": b"1"}))
    register(named={"kind": "data", "root": "data/coco", "urls": [server.url + "/a.tar.gz"]})
    assert Path(zoo.fetch("named", patience=QUICK), "coco").read_bytes() == b"1"


def test_an_existing_directory_is_neither_overwritten_nor_downloaded_for(tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(ZooError, match="mine: exists already; nothing is overwritten"):
        zoo.fetch("tiny", to=str(tmp_path / "mine"))
    assert not tiny.requests and (tmp_path / "mine" / "file").read_text() == "mine"


def test_what_a_killed_process_left_in_the_cache_goes(tiny, home):
    (home / "zoo" / ".tiny.tmp-1-1").mkdir(parents=True)
    zoo.fetch("tiny", patience=QUICK)
    assert os.listdir(home / "zoo") == ["tiny"]


def test_of_several_that_want_the_same_one_downloads(tiny, home):
    tiny.settings["pause"] = 0.05
    paths, threads = [], [threading.Thread(target=lambda: paths.append(zoo.fetch("tiny", patience=QUICK))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [str(home / "zoo" / "tiny")] * 3 and len(tiny.requests) == 1


def test_a_cache_that_cannot_be_is_named_with_its_variable(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNIMO2_HOME", str(tmp_path / "file"))
    with pytest.raises(ZooError, match="file.*UNIMO2_HOME"):
        zoo.fetch("tiny")


# ---- publishing, and names where directories can stand ----


@pytest.fixture
def trained(tiny_config, demo_data, tmp_path):
    """A model directory as best/ is one, with its vocabulary."""
    import paddle

    from unimo2_paddle import Unimo2Model, save_pretrained
    from unimo2_paddle.tasks.finetune import copy_vocabulary

    with paddle.utils.unique_name.guard():
        save_pretrained(Unimo2Model(tiny_config), str(tmp_path / "best"))
    copy_vocabulary(str(demo_data / "vocab"), str(tmp_path / "best" / "vocab"))
    return tmp_path / "best"


@pytest.fixture
def published(unimo2, trained, tmp_path, monkeypatch):
    outcome = unimo2("zoo", "publish", trained, "--name", "my-demo", "--to", tmp_path / "shared" / "zoo", "--about", "mine", "--licence", "MIT")
    assert outcome.status == 0, outcome.err
    monkeypatch.setenv("UNIMO2_ZOO", str(tmp_path / "shared" / "zoo"))
    monkeypatch.setenv("UNIMO2_OFFLINE", "1")
    return tmp_path / "shared" / "zoo"


def same(one, two):
    a, b = ({p.name: p.numpy() for p in model.parameters()} for model in (one, two))
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_a_published_checkpoint_loads_by_name_with_everything_in_it(published, trained, home):
    from unimo2_paddle import Predictor, from_pretrained

    entry = zoo.find("my-demo")
    assert (entry.about, entry.licence, entry.system, entry.kind) == ("mine", "MIT", "UNIMO-2", "model")
    assert sorted(os.listdir(published)) == ["my-demo.tar.gz", "my-demo.yaml"]
    assert same(from_pretrained("my-demo"), from_pretrained(str(trained))) and same(from_pretrained("zoo:my-demo"), from_pretrained(str(trained)))
    assert sorted(os.listdir(home / "zoo" / "my-demo")) == ["config.json", "model.safetensors", "vocab"]
    assert 0 <= Predictor("zoo:my-demo").predict_batch([{"image": np.zeros((32, 32, 3), np.uint8), "text": "a red circle"}])[0].probability <= 1


def test_a_taken_or_unusable_name_and_what_is_no_model_are_refused(published, trained, unimo2, tmp_path):
    before = (published / "my-demo.tar.gz").read_bytes()
    for name, words in (("my-demo", "is taken"), ("unimo2-base", "is taken"), ("My Demo", "lower-case")):
        outcome = unimo2("zoo", "publish", trained, "--name", name, "--to", published)
        assert outcome.status == 2 and words in outcome.err
    outcome = unimo2("zoo", "publish", tmp_path / "nothing", "--name", "nothing", "--to", published)
    assert outcome.status == 2 and "nothing does not exist" in outcome.err
    (trained / "optimizer.safetensors").write_bytes(b"")
    outcome = unimo2("zoo", "publish", trained, "--name", "state", "--to", published)
    assert outcome.status == 2 and "publish the best/ directory" in outcome.err
    assert sorted(os.listdir(published)) == ["my-demo.tar.gz", "my-demo.yaml"] and (published / "my-demo.tar.gz").read_bytes() == before


def test_a_run_starts_from_a_name_and_its_config_keeps_the_name(published, pretrain_config, unimo2, tmp_path, home):
    outcome = unimo2("validate", "-c", pretrain_config({"model": {"init": "zoo:my-demo"}}))
    assert outcome.status == 2 and "run unimo2 download my-demo first, or name a model.config" in outcome.err
    config = pretrain_config({"model.init": "zoo:my-demo", "train.steps": 1})
    assert "zoo:my-demo" in unimo2("validate", "-c", config).out and not (home / "zoo").exists(), "checking a config downloads nothing"
    outcome = unimo2("train", "-c", config)
    assert outcome.status == 0, outcome.err
    assert (home / "zoo" / "my-demo").is_dir()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["init"] == "zoo:my-demo"


def test_a_run_config_with_an_unknown_name_says_so(pretrain_config):
    from unimo2_paddle.config import load_run_config

    with pytest.raises(ConfigError, match="model.init: 'unimo2-bas' is not in the model zoo; did you mean 'unimo2-base'"):
        load_run_config(pretrain_config({"model.init": "zoo:unimo2-bas"}))


def test_loading_by_name_says_what_is_no_model_and_what_cannot_be_fetched(monkeypatch):
    from unimo2_paddle import from_pretrained

    monkeypatch.setenv("UNIMO2_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="'unimo2-coco' is data in the zoo"):
        from_pretrained("unimo2-coco")
    with pytest.raises(ZooError, match=r"not in the cache.*By hand: fetch https://\S+/UNIMO-2\.tar\.gz.*model_files/UNIMO-2"):
        from_pretrained("unimo2-base")


# ---- the commands ----


def test_list_and_show_tell_what_is_known_and_what_is_here(published, unimo2):
    listing = unimo2("zoo", "list", "--kind", "model").out
    assert re.search(r"^my-demo .* - +mine$", listing, re.M) and "unimo2-base" in listing and "unimo2-coco" not in listing
    assert unimo2("download", "my-demo").status == 0
    assert re.search(r"^my-demo .* yes +mine$", unimo2("zoo", "list").out, re.M)
    shown = unimo2("zoo", "show", "my-demo").out
    for word in ("licence:        MIT", "sha256:", "first download:", str(published / "my-demo.yaml")):
        assert word in shown
    for word in ("https://unimo-2.bj.bcebos.com/model/UNIMO-2.tar.gz", "sha256:         unknown", "Table 1", "model_files/UNIMO-2", "By hand"):
        assert word in unimo2("zoo", "show", "unimo2-base").out


def test_download_ends_with_1_when_the_network_fails_and_2_when_the_request_is_wrong(tiny, unimo2, tmp_path):
    outcome = unimo2("download", "tiny", "--to", tmp_path / "model_files" / "tiny")
    assert outcome.status == 0 and f"model.init={tmp_path / 'model_files' / 'tiny'}" in outcome.out and "sha256 of the archive" in outcome.out
    tiny.settings["statuses"] = [404]
    outcome = unimo2("download", "tiny")
    assert outcome.status == 1 and "HTTP status 404" in outcome.err and "Traceback" not in outcome.err
    for arguments in (["download", "tinny"], ["download", "tiny", "--from-file", "nothing.tgz"], ["download", "tiny", "--retries", "-1"],
                      ["zoo", "show", "x"], ["zoo", "list", "--zoo", "nothing"]):
        assert unimo2(*arguments).status == 2, arguments
