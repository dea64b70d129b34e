"""UNIMO's pre-training batches: regions, captions, rewritten and retrieved companions, whatever the number of workers."""
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from unimo2_paddle.augment.store import Augmentations
from unimo2_paddle.config import load_run_config
from unimo2_paddle.data.region_import import import_regions
from unimo2_paddle.data.region_inputs import with_global_region
from unimo2_paddle.data.region_store import Regions, RegionStore
from unimo2_paddle.data.unimo_batches import class_targets, drawn_in_turns
from unimo2_paddle.data.unimo_sources import CaptionFile, RelatedPictures
from unimo2_paddle.errors import DataError
from unimo2_paddle.models.configuration import UnimoConfig
from unimo2_paddle.tasks.base import Shard, task_class

ONE_WORKER = Shard()
ALL = {"mixture.weights": {"pairs": 1, "images": 1, "texts": 1}}


def task_of(path):
    config = load_run_config(path)
    return task_class(config.task)(config)


@pytest.fixture
def batches(unimo_pretrain_config):
    """A function: changes, shard -> endless batches."""
    return lambda changes=None, shard=ONE_WORKER: task_of(unimo_pretrain_config(changes)).train_batches(shard)


def first(found, corpus):
    return next(batch for batch in found if batch["corpus"] == corpus)


def tokens(batch, row, ids="input_ids", mask="text_mask"):
    return batch[ids][row][batch[mask][row] > 0].tolist()


def test_pictures_and_captions_are_those_of_the_records(batches, demo_data, unimo_corpora):
    found, store = batches(ALL), RegionStore(unimo_corpora / "train")
    tokenizer, batch = found.build.tokenizer, first(found, "pairs")
    made = Augmentations(unimo_corpora / "augmentations")
    for row, key in enumerate(name.rpartition(":")[2] for name in batch["keys"]):
        features, location = with_global_region(*[getattr(store[key], name) for name in ("features", "boxes", "width", "height")], 17)
        np.testing.assert_array_equal(batch["image_features"][row, : len(features)], features)
        np.testing.assert_array_equal(batch["image_location"][row, : len(location)], location)
        text = tokenizer.decode(tokens(batch, row)[1:-1]).strip()
        assert text in [caption.text for caption in made.get(key).captions]


def test_joint_candidates_are_the_pair_its_rewrites_and_others_of_its_group(batches, unimo_corpora):
    found = batches(ALL)
    tokenizer, made = found.build.tokenizer, Augmentations(unimo_corpora / "augmentations")
    for _ in range(3):
        batch = first(found, "pairs")
        images, texts = batch["joint_image"].reshape(8, -1), batch["joint_text"].reshape(8, -1)
        assert images.shape == (8, 1 + 1 + 2 + 2) == batch["joint_real"].shape
        for row, key in enumerate(name.rpartition(":")[2] for name in batch["keys"]):
            caption = next(c for c in made.get(key).captions if c.text == tokenizer.decode(tokens(batch, row)[1:-1]).strip())
            wrong = [entry["text"] for rows in caption.negatives.values() for entry in rows]
            read = [tokenizer.decode(tokens(batch, text)[1:-1]).strip() for text in texts[row]]
            assert (images[row, :4] == row).all() and texts[row, 0] == row
            assert batch["joint_positive"][row].tolist() == [1, 1, 0, 0, 0, 0] and batch["joint_real"][row].all()
            assert read[1] in caption.positives and set(read[2:4]) <= set(wrong) and len(set(read[2:4])) == 2
            assert images[row, 4] == row != texts[row, 4] and texts[row, 5] == row != images[row, 5], "another caption, then another picture"
            assert {texts[row, 4] // 4, images[row, 5] // 4} == {row // 4}, "of the group"


def test_levels_take_turns(batches, unimo_corpora):
    assert [one and one[0] for one in drawn_in_turns([["a1", "a2"], ["b1"], []], 4, np.random.default_rng(1))].count("a") == 2
    assert drawn_in_turns([["a1", "a2"], ["b1"], []], 4, np.random.default_rng(1))[-1] is None
    for seed in range(10):
        assert {one[0] for one in drawn_in_turns([["a1", "a2"], ["b1", "b2"]], 2, np.random.default_rng(seed))} == {"a", "b"}
    found = batches({**ALL, "train.candidates.levels": ["word"]})
    made, batch = Augmentations(unimo_corpora / "augmentations"), first(found, "pairs")
    key = batch["keys"][0].rpartition(":")[2]
    words = [entry["text"] for caption in made.get(key).captions for entry in caption.negatives["word"]]
    read = [found.build.tokenizer.decode(tokens(batch, text)[1:-1]).strip() for text in batch["joint_text"][2:4]]
    assert set(read) <= set(words)


def test_retrieved_texts_stand_with_their_owner(batches, unimo_corpora):
    found = batches({**ALL, "train.candidates.related_texts": 2})
    made, batch = Augmentations(unimo_corpora / "augmentations"), first(found, "pairs")
    assert batch["related_text_input_ids"].shape[0] == 16 and batch["related_text_real"].all()
    for row, key in enumerate(name.rpartition(":")[2] for name in batch["keys"]):
        told = [entry["text"] for entry in made.get(key).texts]
        for place in (2 * row, 2 * row + 1):
            ids = tokens(batch, place, "related_text_input_ids", "related_text_text_mask")[1:-1]
            assert any(text.startswith(found.build.tokenizer.decode(ids).strip()[:30]) for text in told)


def test_retrieved_pictures_come_from_the_stores_that_have_them(batches, unimo_corpora):
    related = RelatedPictures([str(unimo_corpora / "dev"), str(unimo_corpora / "train")])
    assert related.find("pair0000003").key == "pair0000003" and related.find("dev00001").key == "dev00001" and related.find("nobody") is None
    found = batches({**ALL, "train.candidates.related_images": 2})
    sample = found.build._draw_pair
    found.build._draw_pair = lambda record, rng: replace(sample(record, rng), related_images=[related.find("dev00001"), None])
    batch, wanted = first(found, "pairs"), RegionStore(unimo_corpora / "dev")["dev00001"]
    assert batch["related_image_real"].tolist() == [1, 0] * 8 and batch["related_image_features"].shape[0] == 16
    for row in range(0, 16, 2):
        np.testing.assert_array_equal(batch["related_image_features"][row, 1:1 + len(wanted.features)], wanted.features)


def test_every_second_pair_has_words_masked_and_the_others_regions(batches):
    batch = first(batches(ALL), "pairs")
    length, regions = batch["masked_ids"].shape[1], batch["image_mask"].shape[1]
    in_words, in_regions = np.unique(batch["predict_from"] // length), np.unique(batch["predict_regions"] // regions)
    assert in_words.tolist() == [0, 2, 4, 6] and in_regions.tolist() == [1, 3, 5, 7]
    changed = (batch["masked_ids"] != batch["input_ids"][:8, :length]).any(axis=1)
    assert not changed[1::2].any() and not batch["hidden"][0::2].any()
    assert not batch["hidden"][:, 0].any(), "the global region is never one of them"
    predicted = np.zeros_like(batch["hidden"], bool).reshape(-1)
    predicted[batch["predict_regions"]] = True
    assert (batch["hidden"].reshape(-1)[predicted] == 1).all()
    np.testing.assert_array_equal(batch["labels"], batch["input_ids"][:8, :length].reshape(-1)[batch["predict_from"]])


@pytest.mark.parametrize("changes, words, regions", [
    ({"train.pairs": {"masked_lm": 0}}, [], list(range(8))),
    ({"train.pairs": {"region_classes": 0, "region_features": 0}}, list(range(8)), []),
])
def test_all_pairs_are_masked_alike_where_one_kind_is_off(batches, changes, words, regions):
    batch = first(batches({**ALL, **changes}), "pairs")
    assert np.unique(batch["predict_from"] // batch["masked_ids"].shape[1]).tolist() == words
    assert np.unique(batch["predict_regions"] // batch["image_mask"].shape[1]).tolist() == regions
    assert ("region_classes" in batch) == bool(regions)


def test_only_some_pairs_of_a_group_are_read_together(batches):
    batch = first(batches({**ALL, "train.candidates.joint_per_group": 1}), "pairs")
    assert batch["fused"].tolist() == [0, 4] and len(batch["joint_real"]) == 2 == len(batch["masked_ids"]) == len(batch["hidden"])
    assert batch["image_features"].shape[0] == 8


@pytest.mark.parametrize("corpus", ["pairs", "images", "texts"])
def test_two_workers_read_what_one_reads(batches, corpus):
    whole, parts = batches(ALL), [batches(ALL, Shard(rank, 2)) for rank in (0, 1)]
    for _ in range(2):
        one, halves = first(whole, corpus), [first(part, corpus) for part in parts]
        assert one["keys"] == halves[0]["keys"] + halves[1]["keys"]
        if corpus == "pairs":
            for row in range(8):
                half, place = halves[row // 4], row % 4
                assert tokens(one, row) == tokens(half, place)
                for column in range(one["joint_real"].shape[1]):
                    assert tokens(one, one["joint_text"].reshape(8, -1)[row, column]) == tokens(half, half["joint_text"].reshape(4, -1)[place, column])
                    assert one["joint_image"].reshape(8, -1)[row, column] == half["joint_image"].reshape(4, -1)[place, column] + row // 4 * 4
        if corpus != "texts":
            assert one["hidden"].sum() == sum(half["hidden"].sum() for half in halves)
            np.testing.assert_array_equal(one["region_classes"], np.concatenate([half["region_classes"] for half in halves]))


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key], err_msg=key)


def test_worker_processes_build_the_same_batches(batches):
    plain, working = batches(ALL), batches({**ALL, "data.num_workers": 2})
    try:
        for _ in range(6):
            same(next(plain), next(working))
    finally:
        working.close()


def test_a_resumed_run_reads_on_where_it_stopped(batches, unimo_pretrain_config):
    found = batches(ALL)
    for _ in range(3):
        next(found)
    resumed = task_of(unimo_pretrain_config(ALL)).train_batches(Shard(), found.state_dict())
    for _ in range(4):
        same(next(found), next(resumed))


def test_a_picture_without_regions_in_the_store_is_a_bad_record(batches, demo_data, unimo_corpora, tmp_path):
    lines = (unimo_corpora / "regions" / "bottom_up" / "train.tsv").read_text().splitlines()
    few = tmp_path / "few.tsv"
    few.write_text("".join(line + "\n" for line in lines if not line.startswith("pair0000005\t")))
    import_regions([str(few)], str(tmp_path / "few"), "bottom_up", show_progress=False)
    source = {"regions": str(tmp_path / "few"), "captions": str(demo_data / "pairs" / "*.tar"), "augmentations": str(unimo_corpora / "augmentations")}
    found = batches({"mixture.weights": {"pairs": 1}, "data.pairs": [source]})
    keys = [key for _ in range(6) for key in next(found)["keys"]]
    assert not any(key.endswith(":pair0000005") for key in keys)
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert row["key"] == "pair0000005" and "has no regions of picture 'pair0000005'" in row["reason"]


def test_captions_may_stand_in_a_karpathy_file_without_the_pictures(batches, demo_data, unimo_corpora, tmp_path):
    shutil.copy(demo_data / "retrieval" / "dataset_shapes.json", tmp_path / "captions.json")
    source = {"regions": str(unimo_corpora / "train"), "captions": str(tmp_path / "captions.json"), "format": "karpathy"}
    few = {"paraphrases": 0, "hard_negatives": 0, "related_texts": 0, "related_images": 0, "group": 4}
    found = batches({"mixture.weights": {"pairs": 1}, "data.pairs": [source], "train.candidates": few, "mixture.global_batch": {"pairs": 4}})
    assert all(key.startswith("captions.json:pair") for key in next(found)["keys"])
    assert len(CaptionFile(str(tmp_path / "captions.json"), "val", False)) == 20


@pytest.mark.parametrize("changes, message", [
    ({"model.image_embedding_size": 32}, "features are 64 wide, the model's image_embedding_size is 32"),
    ({"data.images": [{"regions": "nowhere"}]}, "nowhere: no store of region features here"),
])
def test_stores_that_do_not_fit_are_refused_before_training(batches, changes, message):
    with pytest.raises(DataError, match=message):
        batches({**ALL, **changes})


def test_rewrites_of_other_captions_are_refused(batches):
    found = batches({"mixture.weights": {"pairs": 1}})
    record = found.build.readers["pairs"][0].read(0)
    for change, refused in (({"texts": ["A star."]}, True), ({"augmentations": replace(record.augmentations, captions=[])}, False)):
        changed = replace(record, **change)
        if refused:
            with pytest.raises(DataError, match="pair0000000: its rewritten captions are of others than it has; repeat unimo2 augment rewrite"):
                found.build._draw_pair(changed, np.random.default_rng(1))
        else:
            assert found.build._draw_pair(changed, np.random.default_rng(1)).rewritten == [None] * 3


def test_missing_rewrites_do_not_count(batches):
    found = batches({"mixture.weights": {"pairs": 1}})
    sample = found.build._draw_pair
    found.build._draw_pair = lambda record, rng: replace(sample(record, rng), rewritten=[None] * 3, related_texts=[None])
    batch = next(found)
    assert (batch["joint_real"] == [1, 0, 0, 0, 1, 1]).all() and (batch["joint_positive"] == [1, 0, 0, 0, 0, 0]).all()
    assert not batch["related_text_real"].any() and len(batch["input_ids"]) == 8


def regions(**more):
    return Regions("7", 10, 10, np.ones((2, 3), np.float32), np.array([[0, 0, 1, 1], [2, 2, 3, 3]], np.float32), **more)


def test_class_targets_are_the_detectors_distribution_or_its_best_guess():
    probabilities = np.array([[0.1, 0.2, 0.7], [0.0, 0.5, 0.5]], np.float32)
    known = regions(object_ids=np.array([1, 0]), object_probs=probabilities)
    config = UnimoConfig(image_class_size=4)
    np.testing.assert_allclose(class_targets(known, [0, 1], config), np.pad(probabilities, ((0, 0), (0, 1))))
    hard = [[0, 0, 1, 0], [0, 1, 0, 0]]  # column 0 is "none"
    np.testing.assert_array_equal(class_targets(known, [0, 1], UnimoConfig(image_class_size=4, image_use_soft_label=False)), hard)
    np.testing.assert_array_equal(class_targets(regions(object_ids=np.array([1, 0])), [0, 1], config), hard)
    with pytest.raises(DataError, match="image_class_size is 2"):
        class_targets(regions(object_ids=np.array([1, 0])), [0], UnimoConfig(image_class_size=2))
