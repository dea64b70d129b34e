"""Bad input through the command line: one clear message that names the thing and the remedy, status 2, nothing half-written."""
import io
import json
import shutil
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from unimo2_paddle.data.shards import ShardWriter

JPEG = cv2.imencode(".jpg", np.full((40, 40, 3), 128, np.uint8))[1].tobytes()


def tar_of(path, members):
    """A tar file with these (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


def snapshot(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() if p.is_file() else None for p in directory.rglob("*")}


@pytest.fixture
def refused(unimo2, pretrain_config, tmp_path):
    """Runs the tiny pre-training with changes, which must be refused without leaving anything; returns the message."""

    def run(changes=None, *arguments, command="train", kept=()):
        path = pretrain_config(changes)
        before = snapshot(tmp_path)
        outcome = unimo2(command, "-c", path, *arguments)
        assert outcome.status == 2, outcome.out + outcome.err
        assert outcome.err.startswith(f"unimo2 {command}: ") and "Traceback" not in outcome.err
        after = {name: data for name, data in snapshot(tmp_path).items() if name not in kept}
        assert after == before, "something was written"
        return outcome.err

    return run


def says(message, *parts):
    """Whether the message has all of these parts: the thing, the place, the remedy."""
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("command", ["train", "validate", "eval"])
def test_wrong_keys_are_all_listed_with_the_nearest_known_ones(refused, command):
    message = refused({"train.stepz": 3, "modle": {}, "data.max_text_length": 5, "optim.learning_rate": "fast"}, command=command)
    says(message, "run.yaml: 4 problems", "modle: unknown group; did you mean 'model'?", "train.stepz: unknown key; did you mean 'steps'?",
         "data.max_text_length: unknown key; did you mean 'max_text_len'?", "optim.learning_rate: 'fast' is not float")


def test_a_wrong_override_is_named(refused):
    says(refused(None, "-o", "train.stepz=3", "-o", "whatever"), "train.stepz: unknown key; did you mean 'steps'?",
         "override 'whatever': write key=value, for example -o train.steps=100")


@pytest.mark.parametrize("text, part", [("task: [", "not valid YAML"), ("", "must be a mapping"), ("task: a\ntask: b\n", "line 2: key 'task' is given twice")])
def test_an_unreadable_config_file_is_named(unimo2, tmp_path, text, part):
    (tmp_path / "broken.yaml").write_text(text)
    outcome = unimo2("train", "-c", tmp_path / "broken.yaml")
    assert outcome.status == 2
    says(outcome.err, str(tmp_path / "broken.yaml"), part)


@pytest.mark.parametrize("command", ["train", "validate", "eval"])
def test_an_unknown_config_file_is_named(unimo2, tmp_path, command):
    outcome = unimo2(command, "-c", tmp_path / "nowhere.yaml")
    assert outcome.status == 2
    says(outcome.err, "nowhere.yaml", "No such file or directory")


@pytest.mark.parametrize("task, hint", [("pretrian", "did you mean 'pretrain'?"), ("chess", "pretrain, retrieval"), (None, "is not a known task")])
def test_an_unknown_task_is_answered_with_the_known_ones(refused, task, hint):
    says(refused({"task": task}), "run.yaml", "task:", hint)


@pytest.mark.parametrize("name, parts", [
    ("unimo2_bas", ["unimo2_bas", "did you mean 'unimo2_base'?", "unimo2_demo"]), ("my.json", ["my.json", "cannot read the model config"]),
])
def test_an_unknown_model_config_is_answered_with_the_known_ones(refused, name, parts):
    says(refused({"model.config": name}), "model.config", *parts)


def test_a_model_config_with_an_unknown_key_is_named(refused, tmp_path):
    (tmp_path / "model.json").write_text('{"hiden_size": 32}')
    says(refused({"model.config": str(tmp_path / "model.json")}), "model.json", "'hiden_size'", "did you mean 'hidden_size'?")


@pytest.mark.parametrize("changes, parts", [
    ({"model.image_size": 40}, ["model.image_size: 40 is not a multiple of the patch size (resolution) 16", "for example"]),
    ({"model.topk_value": 64}, ["model.topk_value: 64 is larger than the codebook (num_codebook 32)"]),
    ({"model.hidden_size": 30}, ["model.", "30"]),
    ({"mixture.global_batch": {"pairs": 1, "images": 4, "texts": 8}, "train.pairs": {"matching": 0}},
     ["mixture.global_batch.pairs: contrastive learning needs at least 2 samples"]),
    ({"mixture.global_batch": {"pairs": 8, "images": 2, "texts": 8}, "train.accumulate": 2, "train.matching_group": 2},
     ["mixture.global_batch.images: contrastive learning needs at least 2 samples per micro-batch, has 1"]),
    ({"data.max_text_len": 200}, ["data.max_text_len: 200 tokens need 202 text positions, the model has 66"]),
    ({"model.grounding_method": "normal", "model.with_grounding_mask": True, "train.pairs": {"masked_grounding": 1}},
     ["train.pairs.masked_grounding", "model.grounding_method: topk"]),
    ({"optim.schedule": "noam", "optim.warmup_steps": 0}, ["schedule: noam needs warmup_steps >= 1"]),
])
def test_sizes_that_do_not_fit_are_explained(refused, changes, parts):
    says(refused(changes), *parts)


@pytest.mark.parametrize("corpus", ["pairs", "images", "texts"])
def test_missing_shards_are_named(refused, corpus):
    says(refused({f"data.{corpus}": [{"shards": "no/such/*.tar"}]}), "no shard matches 'no/such/*.tar'", "check the path, or prepare the data first")


def test_a_directory_instead_of_shards_is_explained(refused, demo_data):
    says(refused({"data.pairs": [{"shards": str(demo_data / "pairs")}]}), str(demo_data / "pairs"), "name its tar files")


@pytest.mark.parametrize("members, parts", [
    ([], ["no usable record for pairs", "empty tar"]),
    ([("a.jpg", JPEG)], ["no usable record for pairs", "a: no text"]),
    ([("a.jpg", JPEG), ("a.txt", b"")], ["no usable record for pairs", "a: empty text"]),
    ([("a.jpg", b""), ("a.txt", b"a circle")], ["no usable record for pairs", "a: empty image"]),
])
def test_a_shard_without_usable_records_is_named_with_the_reason(refused, tmp_path, members, parts):
    shard = tar_of(tmp_path / "shards" / "x.tar", members)
    says(refused({"data.pairs": [{"shards": shard}]}), shard, *parts)


@pytest.mark.parametrize("content", [b"", b"not a tar" * 200])
def test_a_file_that_is_no_tar_is_named(refused, tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    says(refused({"data.texts": [{"shards": str(tmp_path / "x.tar")}]}), str(tmp_path / "x.tar"))


def test_a_truncated_shard_is_named(refused, demo_data, tmp_path):
    data = (demo_data / "pairs" / "pairs-00000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:len(data) // 2])
    says(refused({"data.pairs": [{"shards": str(tmp_path / "cut.tar")}]}), str(tmp_path / "cut.tar"), "truncated")


def bad_record_run(unimo2, pretrain_config, tmp_path, members):
    """Runs pre-training on a shard of only these bad records; returns (message, entries of bad_records.jsonl)."""
    shard = tar_of(tmp_path / "shards" / "x.tar", members)
    outcome = unimo2("train", "-c", pretrain_config({"data.pairs": [{"shards": shard}], "mixture.weights": {"pairs": 1}}))
    assert outcome.status == 2 and "Traceback" not in outcome.err
    says(outcome.err, shard, "20 records in a row are bad", str(tmp_path / "run" / "bad_records.jsonl"))
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "best").exists()
    return [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("image, reason", [(b"no picture", "not a picture that can be read"), (JPEG[:-30], "truncated JPEG")])
def test_unreadable_images_are_listed_with_their_reason_and_stop_the_run(unimo2, pretrain_config, tmp_path, image, reason):
    entries = bad_record_run(unimo2, pretrain_config, tmp_path, [("a.jpg", image), ("a.txt", b"a circle")])
    assert [entry["key"] for entry in entries] == ["a"] and reason in entries[0]["reason"]


@pytest.mark.parametrize("text, reason", [(b"  \n \n", "empty text"), (b"\xff\xfe\xfa", "not UTF-8")])
def test_empty_or_undecodable_captions_are_listed_with_their_reason(unimo2, pretrain_config, tmp_path, text, reason):
    entries = bad_record_run(unimo2, pretrain_config, tmp_path, [("a.jpg", JPEG), ("a.txt", text)])
    assert len(entries) == 1 and reason in entries[0]["reason"]


def test_a_few_bad_records_do_not_stop_a_run(unimo2, pretrain_config, tmp_path):
    members = [(f"good{i}.{kind}", data) for i in range(6) for kind, data in (("jpg", JPEG), ("txt", b"a red circle"))]
    members += [("broken.jpg", b"no picture"), ("broken.txt", b"a circle"), ("mute.jpg", JPEG), ("mute.txt", b"")]
    shard = tar_of(tmp_path / "shards" / "x.tar", members)
    outcome = unimo2("train", "-c", pretrain_config({"data.pairs": [{"shards": shard}], "mixture.weights": {"pairs": 1}, "data.num_workers": 1}))
    assert outcome.status == 0, outcome.err
    entries = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert {entry["key"]: entry["reason"] for entry in entries}.keys() == {"broken", "mute"}


def test_too_many_bad_records_stop_a_run_that_reads_in_worker_processes(unimo2, pretrain_config, tmp_path):
    members = [(f"good{i}.{kind}", data) for i in range(6) for kind, data in (("jpg", JPEG), ("txt", b"a red circle"))]
    shard = tar_of(tmp_path / "shards" / "x.tar", members + [("broken.jpg", b"no picture"), ("broken.txt", b"a circle")])
    outcome = unimo2("train", "-c", pretrain_config({"data.pairs": [{"shards": shard}], "mixture.weights": {"pairs": 1}, "train.steps": 40,
                                                     "data.num_workers": 1}))
    assert outcome.status == 2
    says(outcome.err, "records read are bad, more than data.max_bad_ratio 0.01 allows", "bad_records.jsonl", "raise data.max_bad_ratio")


@pytest.mark.parametrize("corpus", ["pairs", "texts"])
def test_a_text_of_ten_thousand_words_is_cut_and_trains(unimo2, pretrain_config, tmp_path, corpus):
    with ShardWriter(tmp_path / "long", corpus) as writer:
        for number in range(8):
            writer.write(f"r{number}", JPEG if corpus == "pairs" else None, ["many " * 10000 + "words"])
    outcome = unimo2("train", "-c", pretrain_config({f"data.{corpus}": [{"shards": str(tmp_path / "long" / "*.tar")}],
                                                     "mixture.weights": {corpus: 1}, "train.steps": 2}))
    assert outcome.status == 0, outcome.err


def test_a_missing_vocabulary_is_named(refused, tmp_path):
    says(refused({"data.vocab": str(tmp_path / "none")}), str(tmp_path / "none"), "cannot read the vocabulary directory")
    (tmp_path / "empty").mkdir()
    says(refused({"data.vocab": str(tmp_path / "empty")}), str(tmp_path / "empty"), "expected vocab.txt, encoder.json, vocab.bpe")


@pytest.fixture
def vocabulary(demo_data, tmp_path):
    """A copy of the demo vocabulary that may be damaged."""
    return Path(shutil.copytree(demo_data / "vocab", tmp_path / "vocab"))


def test_vocabulary_files_that_disagree_are_named(refused, vocabulary):
    table = json.loads((vocabulary / "encoder.json").read_text())
    last = max(table, key=table.get)
    (vocabulary / "encoder.json").write_text(json.dumps({piece: i for piece, i in table.items() if piece != last}))
    says(refused({"data.vocab": str(vocabulary)}), "encoder.json", "the files belong to different vocabularies")


def test_an_incomplete_vocabulary_is_named(refused, vocabulary):
    (vocabulary / "vocab.bpe").unlink()
    says(refused({"data.vocab": str(vocabulary)}), str(vocabulary), "vocab.bpe missing")


def test_a_vocabulary_of_another_size_than_the_model_is_explained(refused, demo_data):
    says(refused({"model.text_vocab_size": 600}), str(demo_data / "vocab"), "has 512 entries", "text_vocab_size is 600",
         "use the vocabulary the model was made with, or set model.text_vocab_size")


@pytest.fixture
def other_model(tiny_config, tmp_path):
    """A saved model with a smaller codebook."""
    import paddle

    from unimo2_paddle.checkpoints.pretrained import save_pretrained
    from unimo2_paddle.models.configuration import Unimo2Config
    from unimo2_paddle.models.unimo2 import Unimo2Model

    with paddle.utils.unique_name.guard():
        model = Unimo2Model(Unimo2Config.from_dict({**tiny_config.to_dict(), "num_codebook": 16}))
    save_pretrained(model, tmp_path / "other")
    return tmp_path / "other"


def test_weights_of_another_size_are_listed(refused, other_model):
    says(refused({"model.init": str(other_model)}), str(other_model), "does not fit the model", "vq_emb", "[32, 32]", "[16, 32]",
         "Use the config the checkpoint was made with")


def test_damaged_weights_are_named(refused, other_model):
    (other_model / "model.safetensors").write_bytes((other_model / "model.safetensors").read_bytes()[:1000])
    says(refused({"model.init": str(other_model)}), "model.safetensors", "damaged")


@pytest.mark.parametrize("changes", [{}, {"model.config": ""}])
def test_missing_weights_are_named(refused, changes):
    says(refused({"model.init": "not/there", **changes}), "model.init: not/there does not exist", "give a checkpoint directory")


def test_an_output_path_that_is_a_file_is_refused(refused, tmp_path):
    (tmp_path / "run").write_text("mine")
    says(refused(), f"run.output {tmp_path / 'run'} is a file", "give a directory")


def test_an_output_path_below_a_file_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    says(refused({"run.output": str(tmp_path / "file" / "run")}), f"run.output {tmp_path / 'file' / 'run'}", "give another directory")


@pytest.mark.parametrize("resume", ["nowhere", "."])
def test_resuming_from_what_is_no_checkpoint_is_explained(refused, resume):
    says(refused(None, "--resume", resume), f"{resume} is not a complete training checkpoint", "step-000500")


def test_missing_annotations_are_named(refused, demo_data):
    says(refused({"eval.annotations": "not/there.json", "eval.images": str(demo_data)}), "not/there.json")


def test_an_unknown_split_is_named(refused, demo_data):
    message = refused({"eval.annotations": str(demo_data / "retrieval" / "dataset_shapes.json"),
                       "eval.images": str(demo_data / "retrieval" / "images"), "eval.split": "dev"})
    says(message, "dataset_shapes.json", "dev")


def test_evaluating_needs_something_to_evaluate(refused, demo_data):
    says(refused(command="eval"), "nothing to evaluate", "group eval")
    says(refused({"eval.annotations": str(demo_data / "retrieval" / "dataset_shapes.json"),
                  "eval.images": str(demo_data / "retrieval" / "images")}, command="eval"), "model.init is empty", "-o model.init=")


def test_a_number_where_a_path_belongs_is_not_taken_for_one(refused):
    says(refused({"data.vocab": 5, "run.seed": 1.5}), "data.vocab: 5 is not str", "run.seed: 1.5 is not int")
