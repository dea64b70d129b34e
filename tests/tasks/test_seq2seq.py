"""Text generation from text by both systems: packing as the authors pack, loss, decoding, reports, commands, bad input."""
import copy
import json
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml

from unimo2_paddle import Predictor, Tokenizer
from unimo2_paddle.config import load_run_config
from unimo2_paddle.data.demo_tasks.seq2seq import write
from unimo2_paddle.data.tokenizer import vocabulary_keys
from unimo2_paddle.errors import ConfigError, DataError
from unimo2_paddle.models.generation import Decoding
from unimo2_paddle.tasks.base import to_tensors
from unimo2_paddle.tasks.seq2seq import Seq2SeqTask, word_logits, write_texts
from unimo2_paddle.tasks.seq2seq_data import pack_dialog, pack_source, pack_target, source_arrays, training_arrays

UNIMO = {"config": "unimo_demo", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "initializer_range": 0.2}
UNIMO2 = {"config": "unimo2_demo", "hidden_size": 16, "text_hidden_size": 16, "vit_hidden_size": 16, "num_attention_heads": 2,
          "text_num_attention_heads": 2, "vit_num_attention_heads": 2, "num_hidden_layers": 1, "text_num_hidden_layers": 1,
          "vit_num_hidden_layers": 1, "num_codebook": 16, "topk_value": 4, "initializer_range": 0.2, "text_max_position_embeddings": 130}
DIALOG = {**UNIMO, "role_type_size": 3, "turn_type_size": 16}
MODELS = {"unimo": UNIMO, "unimo2": UNIMO2}
CONFIGS = sorted((Path(__file__).resolve().parent.parent.parent / "run_configs" / "unimo").glob("[gs]*/*.yaml"))


class Marks:
    """The special tokens of the authors' tiny vectors."""

    cls_id, pad_id, sep_id, mask_id = 0, 1, 2, 119


@pytest.fixture(scope="module")
def texts(demo_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("seq2seq") / "seq2seq"
    write(str(out), str(demo_data), 1)
    return out


@pytest.fixture
def config(texts, demo_data, tmp_path):
    """A function that writes a tiny run of a data set with some keys replaced and returns its path."""

    def make(dataset, model=None, **changes):
        values = {
            "task": "seq2seq", "model": copy.deepcopy(model or (DIALOG if dataset == "coqa" else UNIMO)),
            "data": {"dataset": dataset, "directory": str(texts / dataset), "vocab": str(demo_data / "vocab"), "max_source_len": 128, "max_target_len": 60},
            "train": {"batch_size": 8, "max_steps": 2}, "optim": {"learning_rate": 1e-3},
            "eval": {"split": "val", "max_records": 6, "batch_size": 4, "every_epochs": 0, "java_metrics": False,
                     "decoding": {"beam_size": 2, "max_length": 6, "min_length": 2}},
            "run": {"output": str(tmp_path / f"run_{dataset}"), "progress": False},
        }
        for path, value in changes.items():
            *groups, key = path.split("__")
            target = values
            for group in groups:
                target = target.setdefault(group, {})
            target[key] = value
        path = tmp_path / f"{dataset}{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    return make


def task_of(path):
    return Seq2SeqTask(load_run_config(path))


def batch_of(task, count=4):
    data, rng = task.split("train"), np.random.default_rng(0)
    return to_tensors(task.collate([data.sample(i, rng) for i in range(count)]))


def test_sources_and_targets_are_packed_as_the_authors_reader_does():
    # golden case v1_20: the first two of its three records
    sources = [pack_source([(ids, 0, 0)], Marks, 64) for ids in ([88, 9, 21, 70, 13, 35, 12, 16, 10], [91, 75, 10, 4, 42])]
    targets = [pack_target(ids, Marks, 64) for ids in ([62, 58, 47, 42, 89, 72], [4, 103, 43, 111, 50, 36, 118, 50])]
    arrays = training_arrays(sources, targets, Marks.pad_id, dialog=False)
    assert arrays["input_ids"].tolist() == [[0, 88, 9, 21, 70, 13, 35, 12, 16, 10, 2, 0, 62, 58, 47, 42, 89, 72, 119],
                                            [0, 91, 75, 10, 4, 42, 2, 0, 4, 103, 43, 111, 50, 36, 118, 50, 119, 1, 1]]
    assert arrays["position_ids"].tolist() == [[2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 2, 3, 4, 5, 6, 7, 8, 9],
                                               [2, 3, 4, 5, 6, 7, 8, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1, 1]]
    assert arrays["labels"].tolist() == [62, 58, 47, 42, 89, 72, 119, 4, 103, 43, 111, 50, 36, 118, 50, 119]
    assert arrays["predict_from"].tolist() == [*range(11, 18), *range(26, 35)]
    mask = arrays["text_mask"]
    assert mask[0, :, :11].all() and not mask[0, :11, 11:].any() and mask[0, 11:, 11:].tolist() == np.tril(np.ones([8, 8])).tolist()
    assert not mask[1, 17:].any() and not mask[1, :, 17:].any()


def test_dialogues_are_packed_as_the_authors_reader_does():
    # golden case v1_21: a passage with three turns, one turn without a passage, a passage with four turns
    rows = [([83, 90, 68, 95, 38, 100], [[110, 60, 33, 102], [71, 89, 116], [117, 81, 43, 51, 6]]), (None, [[50, 24, 58, 102, 113, 49]]),
            ([115, 114, 15, 71, 89, 54, 12, 101, 118], [[86, 56], [64, 73, 51, 91, 42], [50, 45, 93], [56, 60, 90, 88]])]
    packed = [pack_dialog(turns, knowledge, Marks, 64, 15) for knowledge, turns in rows]
    targets = [pack_target(ids, Marks, 64) for ids in ([65, 61, 66, 111], [71, 87, 11, 59, 103, 26], [99, 94, 6])]
    arrays = training_arrays(packed, targets, Marks.pad_id, dialog=True)
    assert arrays["input_ids"][0].tolist() == [0, 83, 90, 68, 95, 38, 100, 2, 110, 60, 33, 102, 2, 71, 89, 116, 2, 117, 81, 43, 51, 6, 2,
                                               0, 65, 61, 66, 111, 119, 1, 1, 1, 1, 1]
    assert arrays["role_ids"].tolist() == [
        [1, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, *[1] * 18],
        [0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]]
    assert arrays["turn_ids"].tolist() == [
        [3, 0, 0, 0, 0, 0, 0, 0, 3, 3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, *[1] * 18],
        [4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]]
    assert arrays["position_ids"][0].tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 3, 4, 5, 6, 7, 3, 4, 5, 6, 3, 4, 5, 6, 7, 8, 2, 3, 4, 5, 6, 7, 1, 1, 1, 1, 1]


def test_long_segments_keep_their_separator_long_targets_lose_their_end_token_and_old_turns_go():
    packed = pack_source([(list(range(10, 20)), 0, 0), ([30], 0, 0)], Marks, 5)
    assert packed.ids == [0, 10, 11, 12, 2, 30, 2] and packed.positions == [2, 3, 4, 5, 6, 3, 4]
    assert pack_target([7, 8], Marks, 4).ids == [0, 7, 8, 119] and pack_target([7, 8, 9], Marks, 4).ids == [0, 7, 8, 9]
    dialog = pack_dialog([[10], [11], [12]], None, Marks, 8, max_turns=2)
    assert dialog.ids == [0, 11, 2, 12, 2] and dialog.turns == [2, 2, 2, 1, 1] and dialog.roles == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("system", list(MODELS))
@pytest.mark.parametrize("dataset", ["squad_qg", "coqa"])
def test_decoding_gives_every_token_the_probability_that_training_gives_it(config, system, dataset):
    task = task_of(config(dataset, UNIMO2 if system == "unimo2" else None))
    model, data = task.build_model(), task.split("train")
    model.eval()
    batch = to_tensors(task.collate([data.sample(i, None) for i in range(3)]))
    found = write_texts(model, batch, task.tokenizer, Decoding(method="greedy", min_length=0, max_length=5))
    sources = [data.source(data.file[i]) for i in range(3)]
    targets = [pack_target([], task.tokenizer, 8) for _ in range(3)]
    for target, own in zip(targets, found):
        target.ids, count = own[0].ids, len(own[0].ids)
        target.positions, target.roles, target.turns = list(range(2, 2 + count)), [0] * count, [0] * count
    arrays = to_tensors(training_arrays(sources, targets, task.tokenizer.pad_id, task.roles))
    values = paddle.nn.functional.log_softmax(word_logits(model, arrays)).numpy()
    taken = values[np.arange(len(values)), arrays["labels"].numpy()]
    stepwise = np.concatenate([np.diff(own[0].scores) for own in found])
    np.testing.assert_allclose(stepwise, taken, atol=2e-5)


@pytest.mark.parametrize("system", list(MODELS))
def test_training_lowers_the_loss_and_reaches_every_parameter(config, system):
    task = task_of(config("gigaword", MODELS[system], train__label_smoothing=0.0))
    model, batch = task.build_model(), batch_of(task, 8)
    names = {parameter.name for parameter in model.parameters()}
    assert not any(name.startswith(("image_", "vit.", "role_embedding")) for name in names)
    optimizer = paddle.optimizer.Adam(1e-2, parameters=model.parameters())
    losses = []
    for step in range(10):
        loss = task.loss(model, batch)["loss"]
        loss.backward()
        if step == 0 and system == "unimo":
            assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert task.work({key: value.numpy() for key, value in batch.items()})[1] > 1e5
    task.config.train.label_smoothing = 0.3
    model.eval()
    smoothed = float(task.loss(model, batch)["loss"])
    task.config.train.label_smoothing = 0.0
    assert smoothed > float(task.loss(model, batch)["loss"])


@pytest.mark.parametrize("dataset, metric", [("coqa", "exact_match"), ("squad_qg", "bleu_4")])
def test_training_evaluation_and_prediction_through_the_commands(config, unimo2, tmp_path, texts, dataset, metric):
    path = config(dataset)
    trained = unimo2("train", "-c", path)
    assert trained.status == 0, trained.err
    best = tmp_path / f"run_{dataset}" / "best"
    assert json.loads((best / "task.json").read_text())["dialog"] == (dataset == "coqa")
    judged = unimo2("eval", "-c", path, "-o", "model={init: %s}" % best, "-o", "eval.split=test", "-o", f"run.output={tmp_path / 'judged'}")
    assert judged.status == 0, judged.err
    for word in (metric, "baseline: first sentence", "baseline: most frequent target"):
        assert word in judged.out
    out = tmp_path / "judged" / "predictions"
    rows = [json.loads(line) for line in (out / "test.jsonl").read_text().splitlines()]
    source = json.loads((texts / dataset / "test.json").read_text())
    assert [row["id"] for row in rows] == list(range(6)) and [row["references"] for row in rows] == [[one["tgt"]] for one in source[:6]]
    assert [row["source"] for row in rows] == [one["src"] for one in source[:6]]
    assert (out / "test.txt").read_text() == "".join(f"{row['id']}\t{row['text']}\n" for row in rows)
    assert "Texts, test" in (out / "test.html").read_text() and metric in json.loads((out / "test.json").read_text())
    predictor = Predictor(str(best))
    requests = [{"text": one["src"], **({"text_b": one["knowledge"]} if dataset == "coqa" else {})} for one in source[:3]]
    found = predictor.predict_batch(requests)
    assert [own.text for own in found] == [row["text"] for row in rows[:3]]
    assert found[0].score == pytest.approx(rows[0]["score"], abs=1e-4) and len(found[0].others) == 1


def test_plain_text_files_give_the_same_batches_as_token_files(config, texts, tmp_path, demo_data):
    plain = tmp_path / "plain"
    plain.mkdir()
    for split in ("train", "dev", "test"):
        rows = json.loads((texts / "coqa" / f"{split}.json").read_text())
        (plain / f"{split}.tsv").write_text("\t".join(rows[0]) + "\n" + "".join("\t".join(row.values()) + "\n" for row in rows))
    one, other = (batch_of(task_of(path)) for path in (config("coqa"), config("coqa", data__directory=str(plain), data__tokenized=False)))
    for key, value in one.items():
        np.testing.assert_array_equal(value.numpy(), other[key].numpy(), err_msg=key)


def test_targets_beyond_the_limit_are_counted_and_judged_whole(config, caplog, texts):
    task = task_of(config("cnndm", data__max_target_len=12))
    data = task.split("train")
    assert data.cut_targets == len(data) == 36 and "36 of 36 targets are longer than data.max_target_len 12" in caplog.text
    _, target = data.sample(0, np.random.default_rng(0))
    assert len(target.ids) == 12 and target.ids[-1] != task.tokenizer.mask_id
    assert data.references(0) == [json.loads((texts / "cnndm" / "train.json").read_text())[0]["tgt"]]


def test_cells_that_are_no_vocabulary_keys_are_named_with_their_line(config, texts, tmp_path, unimo2):
    folder = tmp_path / "words"
    folder.mkdir()
    for name in ("train.tsv", "dev.tsv", "test.tsv"):
        (folder / name).write_text("src\ttgt\n5 6\t7\na red box\t8\n")
    outcome = unimo2("train", "-c", config("squad_qg", data__directory=str(folder)))
    assert outcome.status == 2 and "train.tsv:3: 'a' is no key of the vocabulary" in outcome.err and "data.tokenized: false" in outcome.err


def test_a_training_file_needs_targets_a_judged_one_does_not(config, texts, tmp_path, demo_data):
    folder = tmp_path / "open"
    folder.mkdir()
    for name in ("train.tsv", "dev.tsv", "test.tsv"):
        (folder / name).write_text("src\n5 6\n")
    task = task_of(config("squad_qg", data__directory=str(folder)))
    with pytest.raises(DataError, match="train.tsv: has no column tgt to learn from"):
        task.split("train")
    evaluator = task.evaluators()[0]
    assert evaluator.run(task.build_model()) == {} and "nothing was measured" in evaluator.table() and evaluator.baselines() == {}
    evaluator.write_report(str(tmp_path))
    assert (tmp_path / "val.txt").read_text().startswith("0\t")


def test_references_of_their_own_replace_the_targets(config, tmp_path):
    (tmp_path / "val.jsonl").write_text("".join(json.dumps([f"answer {n}", "it"]) + "\n" for n in range(20)))
    task = task_of(config("coqa", data__references=str(tmp_path / "{split}.jsonl")))
    data = task.split("val")
    assert len(data) == 6 and data.references(2) == ["answer 2", "it"]


@pytest.mark.parametrize("dataset, model, changes, text", [
    ("coqa", UNIMO, {}, "CoQA is a dialogue, which needs role_type_size 3 and turn_type_size 16"),
    ("gigaword", DIALOG, {}, "Gigaword is no dialogue"),
    ("gigaword", UNIMO, {"data__max_source_len": 500}, "data.max_source_len: 500 tokens, but the model has positions for 128"),
    ("gigaword", UNIMO2, {"eval__decoding__max_length": 500}, "eval.decoding.max_length: 500 tokens"),
    ("xsum", UNIMO, {}, "'xsum' is not one of cnndm, gigaword, squad_qg, coqa"),
    ("gigaword", UNIMO, {"data__max_bad_ratio": 1.0}, "max_bad_ratio: must be in [0, 1)"),
])
def test_settings_that_cannot_work_are_refused_before_anything_runs(config, dataset, model, changes, text):
    with pytest.raises(ConfigError) as caught:
        load_run_config(config(dataset, model, **changes))
    assert text in str(caught.value)


def test_dialogue_tables_are_new_in_finetuning_and_required_afterwards(config, unimo2, tmp_path):
    assert unimo2("train", "-c", config("gigaword")).status == 0
    pretrained = str(tmp_path / "run_gigaword" / "best")
    task = task_of(config("coqa", {"init": pretrained, "role_type_size": 3, "turn_type_size": 16}))
    with pytest.raises(Exception, match="role_embedding"):
        task.build_model()
    task.split("train")
    assert {"role_embedding", "turn_embedding"} <= {parameter.name for parameter in task.build_model().parameters()}


def test_vocabulary_keys_are_the_lines_of_the_file(demo_data):
    keys, tokenizer = vocabulary_keys(demo_data / "vocab"), Tokenizer.from_directory(demo_data / "vocab")
    assert len(keys) == tokenizer.vocab_size and keys["[MASK]"] == tokenizer.mask_id and keys["[SEP]"] == tokenizer.sep_id


def test_padding_does_not_change_what_is_written(config):
    task = task_of(config("squad_qg"))
    model, data = task.build_model(), task.split("train")
    model.eval()
    samples = [data.sample(i, None) for i in range(3)]
    decoding = Decoding(beam_size=2, max_length=6, min_length=2)
    together = write_texts(model, to_tensors(task.collate(samples)), task.tokenizer, decoding)
    alone = write_texts(model, to_tensors(source_arrays([samples[1][0]], task.tokenizer.pad_id, False)), task.tokenizer, decoding)
    assert [h.ids for h in together[1]] == [h.ids for h in alone[0]]
    np.testing.assert_allclose(together[1][0].scores, alone[0][0].scores, atol=1e-5)


TITLES = {"sst2": "SST-2", "mnli": "MNLI", "cola": "CoLA", "stsb": "STS-B"}


@pytest.fixture(scope="module")
def sentences(demo_data, tmp_path_factory):
    from unimo2_paddle.data.demo_tasks import glue

    out = tmp_path_factory.mktemp("sentences")
    glue.write(str(out), str(demo_data), 1)
    return out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_of_unimos_text_tasks_runs_two_steps_in_small(path, texts, sentences, demo_data, tmp_path, unimo2):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    roles = {key: value for key, value in values["model"].items() if key.endswith("_type_size")}
    values["model"], dataset, generates = {**UNIMO, **roles}, values["data"]["dataset"], values["task"] == "seq2seq"
    values["data"].update(directory=str(texts / dataset if generates else sentences / TITLES[dataset]), vocab=str(demo_data / "vocab"))
    values["data"].pop("answers", None)
    values["train"].update(max_steps=2, batch_size=4)
    if generates:
        values["data"].update(max_source_len=128, max_target_len=32)
        values["eval"].update(max_records=2, every_steps=0, every_epochs=0)
        values["eval"]["decoding"].update(max_length=6, min_length=1)
    else:
        values["data"]["max_text_len"] = 64
    values["run"].update(output=str(tmp_path / "run"), progress=False, log_every=1, save_every=0)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    outcome = unimo2("train", "-c", tmp_path / "small.yaml")
    assert outcome.status == 0, outcome.err
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("train") == 2 and len(kinds) > 2, "two steps, then an evaluation"
