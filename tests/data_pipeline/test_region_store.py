"""The store of region features: imports that are whole or not there, random access that costs no memory."""
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from tests.data_pipeline.region_records import CAPTION, HYPOTHESIS, record, with_objects, with_probabilities
from unimo2_paddle.data import region_command, region_import
from unimo2_paddle.data.formats.bottom_up import BOTTOM_UP
from unimo2_paddle.data.formats.regions import format_regions
from unimo2_paddle.data.formats.unimo_records import CAPTIONING, ENTAILMENT, RETRIEVAL
from unimo2_paddle.data.region_import import import_regions
from unimo2_paddle.data.region_store import RegionStore
from unimo2_paddle.errors import DataError, UserInputError


def write(path, records, layout=BOTTOM_UP):
    path.write_text("".join((r if isinstance(r, str) else format_regions(r, layout)) + "\n" for r in records), encoding="utf-8")
    return str(path)


def run(paths, out, layout="bottom_up", **more):
    return import_regions(paths, out, layout, show_progress=False, **more)


def files(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_was_imported_is_read_back_by_name(tmp_path, dtype):
    records = [with_objects(record(n, boxes=1 + n % 4, width=100 + n), n) for n in range(30)]
    paths = [write(tmp_path / "a.tsv", records[:20]), write(tmp_path / "b.tsv", records[20:])]
    manifest = run(paths, tmp_path / "store", dtype=dtype)
    store = RegionStore(tmp_path / "store")
    assert len(store) == manifest["pictures"] == 30 and list(store) == [r.image_id for r in records]
    assert "7" in store and 7 in store and "nobody" not in store and store.feature_size == 6
    for wanted in records[::-1]:
        found = store[wanted.image_id]
        assert (found.width, found.height) == (wanted.width, 480) and found.features.dtype == np.float32
        np.testing.assert_array_equal(found.features, wanted.features.astype(dtype).astype(np.float32))
        for name in ("boxes", "object_ids", "object_confidence", "attribute_ids", "attribute_confidence"):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    with pytest.raises(DataError, match="no regions of picture 'nobody'; it holds 30 pictures, the first is '0'"):
        store["nobody"]


def test_the_arrays_are_plain_npy_files(tmp_path):
    records = [record(n) for n in range(3)]
    run([write(tmp_path / "a.tsv", records)], tmp_path / "store", dtype="float32")
    np.testing.assert_array_equal(np.load(tmp_path / "store" / "features.npy", mmap_mode="r"), np.concatenate([r.features for r in records]))
    np.testing.assert_array_equal(np.load(tmp_path / "store" / "pictures.npy"), [[0, 3, 640, 480], [3, 3, 640, 480], [6, 3, 640, 480]])


def test_captions_keep_their_pictures_features_once(tmp_path):
    lines = [format_regions(replace(with_probabilities(record(n)), text=replace(CAPTION, text_id=str(k))), CAPTIONING, image_id=f"COCO_val_{n}")
             for n in (5, 6) for k in range(3)]
    manifest = run([write(tmp_path / "a.ids", lines)], tmp_path / "store", "captioning", probabilities=True, dtype="float32")
    assert (manifest["pictures"], manifest["texts"], manifest["parts"][0]["repeated"]) == (2, 6, 4)
    store = RegionStore(tmp_path / "store")
    np.testing.assert_allclose(store["6"].object_probs, with_probabilities(record(6)).object_probs, atol=1e-3)
    texts = list(store.texts())
    assert [(t["image_id"], t["text_id"]) for t in texts] == [(str(n), str(k)) for n in (5, 6) for k in range(3)]
    assert texts[0]["token_ids"] == [0, 7, 8, 2] and texts[0]["source"] == "a.ids" and texts[0]["segment_labels"] == [-1, 0, 1, -1]


def test_entailment_texts_keep_their_labels(tmp_path):
    path = write(tmp_path / "a", [replace(record(5), text=HYPOTHESIS)], ENTAILMENT)
    run([path], tmp_path / "store", "entailment")
    assert [t["label"] for t in RegionStore(tmp_path / "store").texts()] == ["2"]


def test_tags_are_named_by_confidence(tmp_path):
    (tmp_path / "objects.txt").write_text("disc,circle\nbox\n", encoding="utf-8")
    (tmp_path / "attributes.txt").write_text("red\nblue\n", encoding="utf-8")
    one = replace(record(1, boxes=4), object_ids=np.array([0, 1, 1, 0]), object_confidence=np.array([.3, .9, .5, .1], np.float32),
                  attribute_ids=np.array([0, 1, 1, 0]), attribute_confidence=np.ones(4, np.float32))
    run([write(tmp_path / "a.tsv", [one])], tmp_path / "store", object_names=tmp_path / "objects.txt", attribute_names=tmp_path / "attributes.txt")
    store = RegionStore(tmp_path / "store")
    assert store.names("1") == ["blue box", "red disc"] and store.names("1", 0.5) == ["blue box"]
    assert store.names("1", with_attributes=False) == ["box", "disc"]
    run([write(tmp_path / "b.tsv", [record(1)])], tmp_path / "untold")
    with pytest.raises(DataError, match="has no object ids, so there are no tags"):
        RegionStore(tmp_path / "untold").names("1")


def test_exchanged_sizes_are_detected_for_the_whole_file(tmp_path, caplog):
    telling = [replace(record(n, width=600, height=300), width=300, height=600,
                       boxes=np.array([[0, 0, 590, 250]] * 3, np.float32)) for n in range(3)]
    silent = replace(record(3, width=600, height=300), width=300, height=600, boxes=np.array([[0, 0, 90, 90]] * 3, np.float32))
    stated = replace(record(4, width=300, height=600), boxes=np.array([[0, 0, 90, 590]] * 3, np.float32))
    manifest = run([write(tmp_path / "a", [*telling, silent, stated], RETRIEVAL)], tmp_path / "store", "retrieval")
    store = RegionStore(tmp_path / "store")
    assert [(store[str(n)].width, store[str(n)].height) for n in range(5)] == [(600, 300)] * 4 + [(300, 600)]
    assert manifest["parts"][0]["order"] == "swapped" and manifest["parts"][0]["swapped"] == 4
    assert [r.getMessage() for r in caplog.records if "width and height exchanged" in r.getMessage() and "3 of 5" in r.getMessage()]


def test_bad_records_are_skipped_listed_and_counted(tmp_path):
    good = [format_regions(record(n), BOTTOM_UP) for n in range(4)]
    other_width, outside = format_regions(record(8, features=5), BOTTOM_UP), format_regions(record(9, width=9, height=9), BOTTOM_UP)
    outside = outside.replace("\t9\t9\t", "\t3\t3\t")
    changed = format_regions(record(2, seed=1), BOTTOM_UP)
    path = write(tmp_path / "a.tsv", [good[0], "1\t2", good[1], other_width, good[2], outside, changed, good[3]])
    manifest = run([path], tmp_path / "store")
    assert (manifest["pictures"], manifest["bad_records"]) == (4, 4) and list(RegionStore(tmp_path / "store")) == ["0", "1", "2", "3"]
    rows = [json.loads(line) for line in (tmp_path / "store" / "bad_records.jsonl").read_text().splitlines()]
    assert [(row["shard"], row["key"]) for row in rows] == [(path, "2"), (path, "4"), (path, "6"), (path, "7")]
    for row, told in zip(rows, ("2 fields instead of", "features are 5 wide where the store has 6", "outside a picture of 3 x 3 in either order",
                                "was stored already, with other boxes")):
        assert told in row["reason"]


def test_too_many_bad_records_stop_the_import_and_no_store_appears(tmp_path):
    path = write(tmp_path / "a.tsv", [format_regions(record(n), BOTTOM_UP) if n % 10 else "broken" for n in range(300)])
    with pytest.raises(DataError, match="more than --max-bad-ratio 0.05 allows.*1 fields instead of"):
        run([path], tmp_path / "store", max_bad_ratio=0.05)
    assert not (tmp_path / "store").exists()
    assert run([path], tmp_path / "store", max_bad_ratio=0.2)["bad_records"] == 30


def test_a_store_needs_one_usable_record(tmp_path):
    with pytest.raises(DataError, match="no usable record in 1 file"):
        run([write(tmp_path / "a.tsv", ["broken"])], tmp_path / "store")
    with pytest.raises(DataError, match="no usable record"):
        run([write(tmp_path / "b.tsv", [])], tmp_path / "empty")
    assert not (tmp_path / "empty").exists() and not (tmp_path / "empty.unfinished").exists()


def test_records_with_and_without_object_columns_do_not_mix_unless_those_are_left_out(tmp_path):
    path = write(tmp_path / "a.tsv", [record(0), with_objects(record(1))])
    assert run([path], tmp_path / "mixed")["bad_records"] == 1
    assert "where the store has no object columns; import with --no-objects" in (tmp_path / "mixed" / "bad_records.jsonl").read_text()
    assert run([path], tmp_path / "plain", objects=False)["pictures"] == 2


def test_features_that_overflow_float16_are_bad_records(tmp_path):
    large = replace(record(1), features=np.full((3, 6), 1e5, np.float32))
    path = write(tmp_path / "a.tsv", [record(0), large])
    assert run([path], tmp_path / "half")["bad_records"] == 1
    assert run([path], tmp_path / "single", dtype="float32")["bad_records"] == 0


def test_an_interrupted_import_goes_on_with_the_next_file_and_ends_in_the_same_bytes(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"{k}.ids", [replace(with_probabilities(record(10 * k + n)), text=CAPTION) for n in range(6)], CAPTIONING)
             for k in range(3)]
    run(paths, tmp_path / "whole", "captioning")
    read, seen = region_import.read_regions, []

    def interrupted(path, *rest):
        seen.append(path)
        for number, found in enumerate(read(path, *rest)):
            if path == paths[1] and number == 3 and seen.count(path) == 1:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(region_import, "read_regions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(paths, tmp_path / "store", "captioning")
    assert not (tmp_path / "store").exists()
    with pytest.raises(DataError, match="its import was interrupted, run it again"):
        RegionStore(tmp_path / "store")
    with pytest.raises(UserInputError, match="interrupted import with other arguments"):
        run(paths, tmp_path / "store", "captioning", dtype="float32")
    run(paths, tmp_path / "store", "captioning")
    assert seen == [paths[0], paths[1], paths[1], paths[2]]
    assert files(tmp_path / "store") == files(tmp_path / "whole") and not (tmp_path / "store.unfinished").exists()


def test_two_imports_cannot_write_one_store(tmp_path):
    path = write(tmp_path / "a.tsv", [record(0)])
    with region_import._locked(str(tmp_path / "store.unfinished")):
        with pytest.raises(UserInputError, match="another import is writing this store"):
            run([path], tmp_path / "store")
        assert (tmp_path / "store.unfinished").is_dir()
    assert run([path], tmp_path / "store")["pictures"] == 1


def test_a_finished_store_is_kept_and_anything_else_is_never_touched(tmp_path):
    path = write(tmp_path / "a.tsv", [record(0)])
    run([path], tmp_path / "store")
    before = (tmp_path / "store" / "features.npy").stat().st_mtime_ns
    run([path], tmp_path / "store")
    assert (tmp_path / "store" / "features.npy").stat().st_mtime_ns == before
    with pytest.raises(UserInputError, match="another value of dtype; remove it"):
        run([path], tmp_path / "store", dtype="float32")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(UserInputError, match="not a store of region features"):
        run([path], tmp_path / "mine")
    (tmp_path / "new.unfinished").mkdir()
    (tmp_path / "new.unfinished" / "file").write_text("x")
    with pytest.raises(UserInputError, match="is in the way"):
        run([path], tmp_path / "new")
    assert (tmp_path / "new.unfinished" / "file").read_text() == "x"


@pytest.mark.parametrize("damage, told", [("cut", "features.npy has .* bytes, .* were written"), ("lose", "boxes.npy is missing"), ("old", "version 0")])
def test_a_damaged_store_is_refused_when_it_is_opened(tmp_path, damage, told):
    run([write(tmp_path / "a.tsv", [record(0)])], tmp_path / "store")
    if damage == "cut":
        with open(tmp_path / "store" / "features.npy", "r+b") as file:
            file.truncate(130)
    elif damage == "lose":
        os.remove(tmp_path / "store" / "boxes.npy")
    else:
        manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
        (tmp_path / "store" / "manifest.json").write_text(json.dumps({**manifest, "version": 0}))
    with pytest.raises(DataError, match=told):
        RegionStore(tmp_path / "store")


def _read_in_child(store, key, results):
    results.put(store[key].features)


def test_a_store_in_use_can_be_forked_and_pickled(tmp_path):
    records = [record(n) for n in range(5)]
    run([write(tmp_path / "a.tsv", records)], tmp_path / "store", dtype="float32")
    store = RegionStore(tmp_path / "store")
    store["0"]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_read_in_child, args=(store, "3", results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for _ in workers:
        np.testing.assert_array_equal(results.get(timeout=60), records[3].features)
    for worker in workers:
        worker.join()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store))["4"].features, records[4].features)


_MEASURE = """
import resource, sys
from unimo2_paddle.data.region_store import RegionStore

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

store = RegionStore(sys.argv[1])
keys = list(store)
store[keys[0]]
before, most, total = resident(), 0, 0
for key in keys:
    total += store[key].features.nbytes
    most = max(most, resident())
print(most - before, total)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_reading_a_whole_store_does_not_make_the_process_grow(tmp_path):
    features = np.ones((100, 1024), np.float32)
    boxes = np.tile(np.array([0, 0, 9, 9], np.float32), (100, 1))
    end = format_regions(replace(record(0, boxes=1), boxes=boxes, features=features), BOTTOM_UP).split("\t", 1)[1]
    with open(tmp_path / "a.tsv", "w") as file:
        file.writelines(f"{n}\t{end}\n" for n in range(100))
    run([str(tmp_path / "a.tsv")], tmp_path / "store", dtype="float32")
    os.remove(tmp_path / "a.tsv")
    output = subprocess.run([sys.executable, "-c", _MEASURE, str(tmp_path / "store")], capture_output=True, text=True, check=True).stdout
    grown, read = map(int, output.split())
    shutil.rmtree(tmp_path / "store")
    assert read == 100 * features.nbytes and grown < read / 8


def test_the_command_imports_and_shows(tmp_path, unimo2):
    path = write(tmp_path / "part", [with_objects(record(n)) for n in range(3)])
    (tmp_path / "filelist").write_text("part\n")
    assert region_command.FORMATS == tuple(sorted(region_import.FORMATS))
    outcome = unimo2("features", "import", "--format", "bottom_up", "--filelist", tmp_path / "filelist", "--out", tmp_path / "store")
    assert outcome.status == 0 and "3, with 3 to 3 regions (mean 3), 9 in all" in outcome.out and "6 wide, float16" in outcome.out
    outcome = unimo2("features", "show", tmp_path / "store", "--key", "2")
    assert outcome.status == 0 and "640 x 480 pixels, 3 regions" in outcome.out and len(outcome.out.splitlines()) == 5
    assert unimo2("features", "show", tmp_path / "store").out.count("\n") >= 5
    for arguments, told in ((("show", tmp_path / "none"), "no store of region features here; make one with unimo2 features import"),
                            (("show", tmp_path / "store", "--key", "9"), "no regions of picture '9'"),
                            (("import", "--format", "retrieval", path, path, "--out", tmp_path / "new"), "named twice"),
                            (("import", "--format", "retrieval", tmp_path, "--out", tmp_path / "new"), "a directory stands where"),
                            (("import", "--format", "retrieval", path + "x", "--out", tmp_path / "new"), "cannot read the region features"),
                            (("import", "--format", "retrieval", path, "--out", tmp_path / "store"), "made with another value of format"),
                            (("import", "--format", "retrieval", "--out", tmp_path / "new"), "no region file is named"),
                            (("import", "--format", "retrieval", path, "--out", tmp_path / "new"), "no usable record")):
        outcome = unimo2("features", *arguments)
        assert outcome.status == 2 and told in outcome.err, outcome.err
    assert not (tmp_path / "new").exists()
