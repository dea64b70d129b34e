"""Sharding, resuming, sources and the reader."""
import json
import os
import pickle
import shutil

import cv2
import numpy as np
import pytest

from unimo2_paddle.augment.sources import Source
from unimo2_paddle.augment.store import Augmentations
from unimo2_paddle.errors import DataError, UserInputError


def snapshot(directory):
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "lock"}


def rewrite(run, corpus, out, *arguments):
    run("rewrite", "--source", corpus[0], "--index", corpus[1], "--out", out, *arguments)


@pytest.fixture(scope="module")
def made(run, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "out"
    rewrite(run, corpus, out)
    run("retrieve", "--source", corpus[0], "--index", corpus[1], "--out", out, "--top", "4")
    return out


def test_the_number_of_processes_does_not_change_a_byte(run, corpus, made, tmp_path):
    for share in ("2/3", "0/3"):
        rewrite(run, corpus, tmp_path, "--shard", share)
        assert not (tmp_path / "rewrites" / "manifest.json").exists()
    rewrite(run, corpus, tmp_path, "--shard", "1/3")
    assert snapshot(tmp_path / "rewrites") == snapshot(made / "rewrites")


def test_the_index_does_not_depend_on_the_number_of_processes(run, corpus, tmp_path):
    for share in ("1/2", "0/2"):
        run("index", "--source", corpus[0], "--out", tmp_path / "index", "--shard", share)
    assert snapshot(tmp_path / "index") == snapshot(corpus[1])


def test_rows_do_not_depend_on_how_the_corpus_is_cut_into_shards(run, corpus, write_pairs, made, tmp_path):
    pattern = write_pairs(tmp_path / "pairs", per_shard=60)
    run("index", "--source", pattern, "--out", tmp_path / "index")
    rewrite(run, (pattern, tmp_path / "index"), tmp_path / "out")
    one, other = Augmentations(made), Augmentations(tmp_path / "out")
    assert len(one.shards()) == 3 and len(other.shards()) == 1
    for key in other.keys("pairs-00000"):
        assert one.get(key).captions == other.get(key).captions


def test_an_interrupted_run_goes_on_and_gives_the_same(run, corpus, made, tmp_path, monkeypatch):
    from unimo2_paddle.augment import rewriting

    original, calls = rewriting.Rewriter.rewrite, []

    def failing(self, record):
        calls.append(record.key)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return original(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(rewriting.Rewriter, "rewrite", failing)
        with pytest.raises(KeyboardInterrupt):
            rewrite(run, corpus, tmp_path)
    assert not [path for path in tmp_path.rglob("*.tmp")]
    with pytest.raises(DataError, match="unfinished"):
        Augmentations(tmp_path)
    calls.clear()
    monkeypatch.setattr(rewriting.Rewriter, "rewrite", lambda self, record: calls.append(1) or original(self, record))
    rewrite(run, corpus, tmp_path)
    assert len(calls) == 40  # the first shard's 20 records were kept
    assert snapshot(tmp_path / "rewrites") == snapshot(made / "rewrites")
    calls.clear()
    rewrite(run, corpus, tmp_path)
    assert not calls


def test_a_damaged_part_or_a_changed_input_is_made_again(run, write_pairs, tmp_path):
    pattern = write_pairs(tmp_path / "pairs", count=8, per_shard=4)
    corpus = pattern, tmp_path / "index"
    run("index", "--source", pattern, "--out", corpus[1])
    rewrite(run, corpus, tmp_path / "out")
    part = tmp_path / "out" / "rewrites" / "parts" / "pairs-00001.jsonl"
    whole = part.read_bytes()
    part.write_bytes(whole[:-10])
    rewrite(run, corpus, tmp_path / "out")
    assert part.read_bytes() == whole
    os.utime(tmp_path / "pairs" / "pairs-00001.tar", ns=(1, 1))
    part.write_bytes(whole[:-2] + b" \n")
    rewrite(run, corpus, tmp_path / "out")
    assert part.read_bytes() == whole


def test_other_settings_are_refused(run, corpus, made):
    before = snapshot(made)
    with pytest.raises(UserInputError, match="seed 1, now 2"):
        rewrite(run, corpus, made, "--seed", "2")
    assert snapshot(made) == before


def test_the_reader_finds_every_record_by_key(made):
    store = Augmentations(made)
    for shard in store.shards():
        for key in store.keys(shard):
            record = store.get(key, f"somewhere/{shard}.tar")
            assert record.key == key and len(record.captions) == 2 and len(record.texts) == 4 and record.images == []
            assert record == store.get(key)
    assert pickle.loads(pickle.dumps(store)).get(key) == record


@pytest.mark.parametrize("key, shard, says", [("nobody", None, "nobody"), ("00001", "pairs-00002", "in shard 'pairs-00002'"), ("00001", "x", "'x'")])
def test_an_unknown_record_is_named(made, key, shard, says):
    with pytest.raises(DataError, match=says):
        Augmentations(made).get(key, shard)


def test_a_key_of_two_shards_needs_the_shard(made, tmp_path):
    shutil.copytree(made, tmp_path / "out")
    parts = tmp_path / "out" / "rewrites" / "parts"
    for ending in (".jsonl", ".index.npy"):
        shutil.copy(parts / f"pairs-00000{ending}", parts / f"pairs-00001{ending}")
    store = Augmentations(tmp_path / "out")
    with pytest.raises(DataError, match="2 shards"):
        store.get("00001")
    assert store.get("00001", "pairs-00001").captions


def test_a_directory_without_augmentations_and_a_damaged_row_are_named(made, tmp_path):
    with pytest.raises(DataError, match="no augmentations here"):
        Augmentations(tmp_path)
    shutil.copytree(made, tmp_path / "out")
    path = tmp_path / "out" / "rewrites" / "parts" / "pairs-00000.jsonl"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match="pairs-00000.jsonl: damaged at byte"):
        Augmentations(tmp_path / "out").get("00001")


def test_a_line_file_is_cut_into_blocks_that_keep_the_line_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("unimo2_paddle.augment.sources.BLOCK", 4)
    (tmp_path / "captions.txt").write_bytes("a dög\n\nb\r\nc\nd".encode() + b"\n\xff\xfe\ne")
    bad = []
    shards = Source([str(tmp_path / "captions.txt")], "lines").shards()
    records = [record for shard in shards for record in shard.read(bad=lambda key, reason: bad.append((key, reason)))]
    assert [shard.name for shard in shards] == ["captions-00000", "captions-00001"]
    assert [(record.key, record.captions) for record in records] == [("0", ["a dög"]), ("1", []), ("2", ["b"]), ("3", ["c"]), ("4", ["d"]), ("6", ["e"])]
    assert len(bad) == 1 and bad[0][0] == "5" and "captions.txt:6: not UTF-8" in bad[0][1]


def test_too_many_bad_records_stop_the_step_and_are_listed(run, unimo2, tmp_path):
    (tmp_path / "captions.txt").write_bytes(b"a dog on a bench\n" * 190 + b"\xff\n" * 10)
    arguments = ("index", "--source", tmp_path / "captions.txt", "--format", "lines", "--out", tmp_path / "out")
    outcome = unimo2("augment", *arguments)
    assert outcome.status == 2 and "--max-bad-ratio" in outcome.err
    listed = (tmp_path / "out" / "bad_records.jsonl").read_text().splitlines()
    assert 1 <= len(listed) <= 10 and json.loads(listed[0])["key"] == "190"
    assert unimo2("augment", *arguments, "--max-bad-ratio", "0.1").status == 0


def test_karpathy_and_coco_files_are_sources(tmp_path):
    picture = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    (tmp_path / "a.jpg").write_bytes(picture)
    (tmp_path / "k.json").write_text(json.dumps({"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "a dog"}]}]}))
    (tmp_path / "c.json").write_text(json.dumps({"images": [{"id": 7, "file_name": "a.jpg"}], "annotations": [{"image_id": 7, "caption": "a cat"}]}))
    for name, format, key, text in (("k.json", "karpathy", "a", "a dog"), ("c.json", "coco", "7", "a cat")):
        (shard,) = Source([str(tmp_path / name)], format, images=str(tmp_path)).shards()
        (record,) = shard.read(bad=pytest.fail)
        assert (record.key, record.captions, record.image) == (key, [text], str(tmp_path / "a.jpg"))


def test_two_shards_of_one_name_are_refused(write_pairs, tmp_path):
    patterns = [write_pairs(tmp_path / name, count=2) for name in "ab"]
    with pytest.raises(UserInputError, match="several input shards are called pairs-00000"):
        Source(patterns, kind="texts").shards()


def test_bad_input_through_the_command_ends_with_status_2(unimo2, corpus, tmp_path):
    for arguments, says in (
        (("rewrite", "--source", corpus[0], "--index", tmp_path / "none", "--out", tmp_path / "out"), "no text index here"),
        (("rewrite", "--index", corpus[1], "--out", tmp_path / "out"), "--source"),
        (("index", "--source", tmp_path / "none.tar", "--out", tmp_path / "out"), "none.tar"),
        (("index", "--kind", "images", "--source", corpus[0], "--out", tmp_path / "out"), "--model"),
        (("retrieve", "--index", corpus[1], "--queries", corpus[1], "--out", tmp_path / "out"), "ask with --source"),
        (("report", "--augmentations", tmp_path), "no augmentations here"),
    ):
        outcome = unimo2("augment", *arguments)
        assert outcome.status == 2 and says in outcome.err and "Traceback" not in outcome.err, outcome.err
    assert not (tmp_path / "out").exists()


def test_the_report_shows_samples_with_their_pictures(made, tmp_path, unimo2):
    outcome = unimo2("augment", "report", "--augmentations", made, "--samples", "3", "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert outcome.status == 0 and page.count("<section>") == 3
    assert "related texts" in page and "<ins>" in page and "sentence negatives" in page
