"""Pre-training batches: what is in them, bad records replaced and listed, everything a function of the draw."""
import json

import cv2
import numpy as np
import pytest

from unimo2_paddle.config import build
from unimo2_paddle.data.mixture import Batches, Draw, MixturePlan
from unimo2_paddle.data.pretrain_batches import BadRecords, PretrainBatchBuilder, PretrainData, open_sources
from unimo2_paddle.data.shards import ShardWriter
from unimo2_paddle.data.tokenizer import Tokenizer
from unimo2_paddle.errors import DataError
from unimo2_paddle.models.configuration import Unimo2Config

CONFIG = Unimo2Config(image_size=32, text_vocab_size=512, num_codebook=32, topk_value=4)
BATCH = {"pairs": 8, "images": 4, "texts": 8}


def jpeg(seed, size=40):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


@pytest.fixture
def world(demo_data, tmp_path):
    """Makes (builder, readers, orders) over the demo corpora, or over other shards."""

    def make(shards=None, corpora=("pairs", "images", "texts"), **options):
        values = {"vocab": str(demo_data / "vocab"), "max_text_len": options.pop("max_text_len", 40),
                  "max_bad_ratio": options.pop("max_bad_ratio", 0.01), **options.pop("data", {})}
        for corpus in corpora:
            values[corpus] = [{"shards": str((shards or {}).get(corpus, demo_data / corpus / "*.tar"))}]
        problems = []
        data = build(PretrainData, values, "data", problems)
        assert not problems
        bad = BadRecords(str(tmp_path / "run" / "bad_records.jsonl"), data.max_bad_ratio)
        readers, orders = open_sources(data, corpora, options.get("seed", 1), bad, options.pop("list_bad", True))
        settings = {"seed": 1, "mask_ratio": 0.15, "group": 4, "masked_grounding": [], "seq2seq": 0.0, **options}
        builder = PretrainBatchBuilder(data, readers, Tokenizer.from_directory(data.vocab), CONFIG, bad_records=bad, **settings)
        return builder, orders

    return make


def draws_of(orders, corpus, count, **plan):
    made = MixturePlan({corpus: orders[corpus]}, {corpus: 1.0}, BATCH, 1, **plan)
    return [draw for _ in range(count) for draw in made.next_step()]


def listed(tmp_path):
    with open(tmp_path / "run" / "bad_records.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_a_pair_batch_holds_pictures_words_masks_and_noise(world):
    builder, orders = world()
    (draw,) = draws_of(orders, "pairs", 1)
    batch = builder(draw)
    length = batch["input_ids"].shape[1]
    assert batch["corpus"] == "pairs" and batch["samples"] == 8
    assert batch["image"].shape == (8, 32, 32, 3) and batch["image"].dtype == np.uint8
    assert batch["noise"].shape == (8, 2, 4) and batch["noise"].dtype == np.float32
    for key in ("input_ids", "masked_ids", "position_ids"):
        assert batch[key].shape == (8, length) and batch[key].dtype == np.int64
    tokenizer, mask = builder.tokenizer, batch["text_mask"].astype(bool)
    lengths = mask.sum(axis=1)
    assert (batch["input_ids"][:, 0] == tokenizer.cls_id).all() and lengths.max() == length <= 40
    assert (batch["input_ids"][np.arange(8), lengths - 1] == tokenizer.sep_id).all()
    assert (batch["input_ids"][~mask] == tokenizer.pad_id).all() and (batch["position_ids"][~mask] == 1).all()
    assert all((row[:n] == np.arange(2, 2 + n)).all() for row, n in zip(batch["position_ids"], lengths))
    assert "token_mask" not in batch


def test_masked_positions_and_labels_restore_the_text(world):
    builder, orders = world()
    (draw,) = draws_of(orders, "pairs", 1)
    batch = builder(draw)
    restored = batch["masked_ids"].reshape(-1).copy()
    restored[batch["predict_from"]] = batch["labels"]
    assert (restored == batch["input_ids"].reshape(-1)).all()
    counts = np.bincount(batch["predict_from"] // batch["input_ids"].shape[1], minlength=8)
    assert (counts == np.ceil(0.15 * batch["text_mask"].sum(axis=1))).all()
    assert not np.isin(batch["labels"], [builder.tokenizer.cls_id, builder.tokenizer.sep_id]).any()


def test_an_image_batch_holds_two_different_views(world):
    builder, orders = world(data={"view_augmentation": {"crop": 1.0, "jitter": 1.0}})
    (draw,) = draws_of(orders, "images", 1)
    batch = builder(draw)
    for key in ("first_view", "second_view"):
        assert batch[key].shape == (4, 32, 32, 3) and batch[key].dtype == np.uint8
    assert (batch["first_view"] != batch["second_view"]).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("corpus, rows", [("pairs", 8), ("images", 8)])
def test_grounded_tokens_are_hidden_only_where_a_corpus_trains_on_them(world, corpus, rows):
    builder, orders = world(masked_grounding=[corpus])
    masks = [builder(draw)["token_mask"] for draw in draws_of(orders, corpus, 30)]
    assert all(mask.shape == (rows, 4) and mask.dtype == np.float32 for mask in masks)
    assert abs(np.mean(masks) - 0.15) < 0.05
    assert "token_mask" not in builder(draws_of(orders, "texts", 1)[0])


def test_fragments_fill_the_share_of_text_steps_asked_for(world):
    for share in (0.0, 0.5, 1.0):
        builder, orders = world(seq2seq=share)
        kinds = ["masked_ids" not in builder(draw) for draw in draws_of(orders, "texts", 60)]
        assert abs(np.mean(kinds) - share) < 0.2 and (share == 0.5 or np.mean(kinds) == share)


def test_a_fragment_batch_pads_its_square_masks(world):
    builder, orders = world(seq2seq=1.0)
    batch = builder(draws_of(orders, "texts", 1)[0])
    length = batch["input_ids"].shape[1]
    assert length <= 40 and batch["text_mask"].shape == (8, length, length)
    padding = batch["input_ids"] == builder.tokenizer.pad_id
    assert (batch["text_mask"].max(axis=2)[padding] == 0).all() and (batch["text_mask"].max(axis=1)[padding] == 0).all()
    assert (batch["text_mask"][:, 0, 0] == 1).all() and (batch["position_ids"] < CONFIG.text_max_position_embeddings).all()
    inside = ~padding.reshape(-1)
    assert inside[batch["predict_from"]].all()
    assert (batch["input_ids"].reshape(-1)[batch["predict_from"] + 1] == batch["labels"]).all()


def test_batches_are_a_function_of_seed_and_step(world):
    first, orders = world(masked_grounding=["pairs"])
    second, _ = world(masked_grounding=["pairs"])
    other, _ = world(masked_grounding=["pairs"], seed=2)
    draws = draws_of(orders, "pairs", 3)
    second(draws[2])  # what was built before does not matter
    for key, value in first(draws[1]).items():
        assert np.array_equal(value, second(draws[1])[key]), key
    assert not np.array_equal(first(draws[1])["masked_ids"], other(draws[1])["masked_ids"])


def test_workers_and_micro_batches_share_out_the_same_samples(world):
    builder, orders = world(masked_grounding=["pairs"])
    (whole,) = draws_of(orders, "pairs", 1)
    wanted = builder(whole)
    parts = [builder(draw) for rank in range(2) for draw in draws_of(orders, "pairs", 1, rank=rank, world_size=2, accumulate=2)]
    parts = [parts[0], parts[2], parts[1], parts[3]]  # micro-batch by micro-batch
    for key in ("image", "noise", "token_mask"):
        assert np.array_equal(np.concatenate([part[key] for part in parts]), wanted[key]), key
    assert np.array_equal(np.concatenate([part["labels"] for part in parts]), wanted["labels"])


@pytest.mark.parametrize("words", [10000, 1])
def test_a_caption_of_any_length_fits(world, tmp_path, words):
    with ShardWriter(tmp_path / "long", "pairs") as writer:
        writer.write("a", jpeg(1), [" ".join(["circle"] * words)])
    builder, _ = world({"pairs": tmp_path / "long" / "*.tar"}, ["pairs"])
    batch = builder(Draw(0, "pairs", [(0, 0, 0)], 1))
    assert batch["input_ids"].shape[1] == min(40, batch["input_ids"].shape[1])
    if words > 40:
        assert batch["input_ids"].shape[1] == 40 and batch["input_ids"][0, -1] == builder.tokenizer.sep_id


def test_a_long_caption_is_cut_before_it_is_tokenised(world, tmp_path, monkeypatch):
    with ShardWriter(tmp_path / "long", "texts") as writer:
        writer.write("a", None, [" ".join(["circle"] * 100000)])
    builder, _ = world({"texts": tmp_path / "long" / "*.tar"}, ["texts"])
    seen = []
    original = Tokenizer.encode_with_word_starts
    monkeypatch.setattr(Tokenizer, "encode_with_word_starts", lambda self, text: seen.append(len(text)) or original(self, text))
    builder(Draw(0, "texts", [(0, 0, 0)], 1))
    assert seen == [1600]


def write_pairs(path, good, bad_images=(), empty_texts=()):
    """A shard of ``good`` fine pairs, some whose picture is broken and some whose text is only white space."""
    import io
    import tarfile

    path.mkdir(parents=True)
    with tarfile.open(path / "pairs-00000.tar", "w") as tar:
        for key in [f"good{i}" for i in range(good)] + list(bad_images) + list(empty_texts):
            image = jpeg(len(key))[:-20] if key in bad_images else jpeg(len(key))
            for name, data in ((f"{key}.jpg", image), (f"{key}.txt", b" \n" if key in empty_texts else b"a red circle\n")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path / "*.tar"


def test_a_bad_record_is_replaced_listed_once_with_its_reason_and_the_rest_is_untouched(world, tmp_path):
    shards = write_pairs(tmp_path / "shards", 5, ["broken"], ["blank"])
    builder, orders = world({"pairs": shards}, ["pairs"])
    for draw in draws_of(orders, "pairs", 4):
        assert builder(draw)["image"].shape == (8, 32, 32, 3)
    entries = {entry["key"]: entry for entry in listed(tmp_path)}
    assert len(listed(tmp_path)) == 2, "read in every epoch, listed once"
    broken, blank = entries["broken"], entries["blank"]
    assert "truncated JPEG" in broken["reason"] and "record broken" in broken["reason"]
    assert "empty text" in blank["reason"] and "record blank" in blank["reason"]
    assert {entry["shard"] for entry in entries.values()} == {str(tmp_path / "shards" / "pairs-00000.tar")}


def test_replacements_are_the_same_in_every_run(world, tmp_path):
    shards = write_pairs(tmp_path / "shards", 3, ["broken1", "broken2"])
    builder, orders = world({"pairs": shards}, ["pairs"])
    again, _ = world({"pairs": shards}, ["pairs"])
    for draw in draws_of(orders, "pairs", 2):
        assert np.array_equal(builder(draw)["image"], again(draw)["image"])


def test_a_record_in_another_shard_is_listed_with_that_shard(world, tmp_path):
    write_pairs(tmp_path / "a", 3)
    write_pairs(tmp_path / "b", 3, ["broken"])
    builder, orders = world({"pairs": tmp_path / "{a,b}" / "*.tar"}, ["pairs"])
    for draw in draws_of(orders, "pairs", 3):
        builder(draw)
    assert [entry["shard"] for entry in listed(tmp_path)] == [str(tmp_path / "b" / "pairs-00000.tar")]


def test_too_many_bad_records_stop_the_run(world, tmp_path):
    shards = write_pairs(tmp_path / "shards", 15, ["broken"])
    builder, orders = world({"pairs": shards}, ["pairs"], max_bad_ratio=0.02)
    with pytest.raises(DataError) as error:
        for draw in draws_of(orders, "pairs", 100):
            builder(draw)
    text = str(error.value)
    assert "max_bad_ratio 0.02" in text and "truncated JPEG" in text and "bad_records.jsonl" in text
    assert builder.bad_records.seen >= 100, "a few records prove nothing"


def test_a_ratio_of_one_never_stops_but_the_log_counts(world, tmp_path, caplog):
    builder, orders = world({"pairs": write_pairs(tmp_path / "shards", 2, ["broken1", "broken2", "broken3"])}, ["pairs"], max_bad_ratio=1)
    for draw in draws_of(orders, "pairs", 30):
        builder(draw)
    assert builder.bad_records.bad > 60
    assert [record.args[0] for record in caplog.records] == [1, 10] + [100] * (builder.bad_records.bad >= 100)


def test_nothing_but_bad_records_is_an_error_not_an_endless_search(world, tmp_path):
    builder, orders = world({"pairs": write_pairs(tmp_path / "shards", 0, ["broken"])}, ["pairs"], max_bad_ratio=1)
    with pytest.raises(DataError, match="20 records in a row are bad"):
        builder(draws_of(orders, "pairs", 1)[0])


def test_what_indexing_leaves_out_is_listed_once_and_by_one_worker(world, tmp_path):
    with ShardWriter(tmp_path / "shards", "pairs") as writer:
        writer.write("whole", jpeg(1), ["a red circle"])
        writer.write("textless", jpeg(2))
        writer.write("pictureless", None, ["a blue square"])
    shards = {"pairs": tmp_path / "shards" / "*.tar"}
    world(shards, ["pairs"], list_bad=False)
    assert not (tmp_path / "run").exists()
    for _ in range(2):  # the second time as a resumed run would
        world(shards, ["pairs"])
    assert {entry["key"]: entry["reason"] for entry in listed(tmp_path)} == {
        "textless": "no text (txt, json)", "pictureless": "no image (jpg, jpeg, png, webp)"}
    assert len(listed(tmp_path)) == 2


@pytest.mark.parametrize("list_bad", [True, False])
def test_too_many_records_left_out_by_indexing_stop_every_worker(world, tmp_path, list_bad):
    with ShardWriter(tmp_path / "shards", "pairs") as writer:
        for number in range(100):
            writer.write(f"r{number}", jpeg(1, 8), ["a red circle"] if number > 4 else ())
    with pytest.raises(DataError, match=r"5 of 100 records of data.pairs\[0\] are bad, more than data.max_bad_ratio 0.01"):
        world({"pairs": tmp_path / "shards" / "*.tar"}, ["pairs"], list_bad=list_bad)


def test_a_list_with_a_line_cut_off_by_a_crash_is_gone_on_with(tmp_path):
    path = tmp_path / "bad_records.jsonl"
    path.write_text('{"shard": "a.t\n{"shard": "a.tar", "key": "x", "reason": "r"}\n')
    bad = BadRecords(str(path), 0.01)
    bad.write("a.tar", "y", "reason")
    bad.write("a.tar", "x", "known already")
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()[1:]] == ["x", "y"]


def test_half_a_line_left_by_a_crash_does_not_swallow_the_next_entry(tmp_path):
    path = tmp_path / "bad_records.jsonl"
    path.write_text('{"shard": "a.t')
    BadRecords(str(path), 0.01).write("a.tar", "y", "reason")
    assert json.loads(path.read_text().splitlines()[1])["key"] == "y"


def test_several_workers_count_together_and_list_every_record_once(world, tmp_path):
    shards = write_pairs(tmp_path / "shards", 40, ["broken1", "broken2"])
    builder, orders = world({"pairs": shards}, ["pairs"], max_bad_ratio=0.2)
    batches = Batches(MixturePlan({"pairs": orders["pairs"]}, {"pairs": 1.0}, BATCH, 1), builder, num_workers=3)
    try:
        for _ in range(30):
            next(batches)
    finally:
        batches.close()
    assert builder.bad_records.seen >= 240 and builder.bad_records.bad >= 10
    assert sorted(entry["key"] for entry in listed(tmp_path)) == ["broken1", "broken2"]


def test_too_many_bad_records_stop_the_run_through_workers_too(world, tmp_path):
    builder, orders = world({"pairs": write_pairs(tmp_path / "shards", 15, ["broken"])}, ["pairs"], max_bad_ratio=0.02)
    batches = Batches(MixturePlan({"pairs": orders["pairs"]}, {"pairs": 1.0}, BATCH, 1), builder, num_workers=2)
    try:
        with pytest.raises(DataError, match="max_bad_ratio 0.02"):
            for _ in range(100):
                next(batches)
    finally:
        batches.close()
    assert 100 <= builder.bad_records.seen < 200, "counted together, not a hundred for each worker"


def test_a_list_of_bad_records_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot list bad records"):
        BadRecords(str(tmp_path / "file" / "bad.jsonl"), 0.01).write("a.tar", "y", "reason")


def test_a_shard_that_is_bad_as_a_whole_is_replaced_by_others(world, tmp_path):
    write_pairs(tmp_path / "a", 9)
    write_pairs(tmp_path / "b", 0, ["broken1"])
    builder, orders = world({"pairs": tmp_path / "{a,b}" / "*.tar"}, ["pairs"], max_bad_ratio=1)
    for draw in draws_of(orders, "pairs", 5):
        assert len(builder(draw)["image"]) == 8
