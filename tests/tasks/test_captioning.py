"""Captioning end to end: training and evaluating through the commands, object tags, the self-critical stage."""
import copy
import json

import numpy as np
import paddle
import pytest
import yaml

from unimo2_paddle.config import load_run_config
from unimo2_paddle.data.demo_tasks.captioning import write
from unimo2_paddle.data.formats.coco_captions import result_problems
from unimo2_paddle.metrics.caption import CiderD
from unimo2_paddle.models.generation import Hypothesis
from unimo2_paddle.tasks.base import task_class, to_tensors
from unimo2_paddle.tasks.captioning import consensus
from unimo2_paddle.tasks.captioning_data import target_arrays


@pytest.fixture(scope="module")
def captioning_data(demo_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("captioning") / "data"
    write(str(out), str(demo_data), 1)
    return out


@pytest.fixture
def run_config(demo_data, captioning_data, tiny_config, tmp_path):
    """A function that writes the tiny run with some keys replaced and returns the file's path."""
    (tmp_path / "model.json").write_text(json.dumps(tiny_config.to_dict()))
    base = {
        "task": "captioning", "model": {"config": str(tmp_path / "model.json")},
        "data": {"annotations": str(captioning_data / "dataset_shapes.json"), "images": str(captioning_data),
                 "vocab": str(demo_data / "vocab"), "max_text_len": 40},
        "train": {"batch_size": 8, "max_steps": 2}, "optim": {"learning_rate": 1e-3},
        "eval": {"split": "val", "max_images": 6, "batch_size": 4, "every_epochs": 0, "java_metrics": False,
                 "decoding": {"beam_size": 2, "max_length": 8, "min_length": 2}},
        "run": {"output": str(tmp_path / "run"), "progress": False, "log_every": 1},
    }

    def build(**changes):
        values = copy.deepcopy(base)
        for path, value in changes.items():
            *groups, key = path.split("__")
            target = values
            for group in groups:
                target = target.setdefault(group, {})
            target[key] = value
        path = tmp_path / f"run{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return build


def task_of(path):
    config = load_run_config(path)
    return task_class("captioning")(config)


def test_training_and_evaluation_leave_a_model_captions_and_a_report(run_config, unimo2, tmp_path, captioning_data):
    config = run_config(eval__neighbours=2)
    trained = unimo2("train", "-c", config)
    assert trained.status == 0, trained.err
    best = tmp_path / "run" / "best"
    assert json.loads((best / "task.json").read_text())["task"] == "captioning" and (best / "vocab" / "vocab.txt").is_file()
    judged = unimo2("eval", "-c", config, "-o", f"model.init={best}", "-o", "eval.split=test", "-o", f"run.output={tmp_path / 'judged'}")
    assert judged.status == 0, judged.err
    for word in ("bleu_4", "rouge_l", "cider", "nearest_neighbour"):
        assert word in judged.out
    out = tmp_path / "judged" / "predictions"
    rows = [json.loads(line) for line in (out / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(len(row["references"]) == 5 for row in rows)
    assert "<img" in (out / "test.html").read_text()
    results = out / "captions_test_results.json"
    assert [r["caption"] for r in json.loads(results.read_text())] == [row["caption"] for row in rows]
    assert all("empty" in told for told in result_problems(results, [row["image_id"] for row in rows]))  # an untrained model may say nothing
    copied = [json.loads(line)["caption"] for line in (out / "nearest_neighbour.jsonl").read_text().splitlines()]
    told = {s["raw"] for image in json.loads((captioning_data / "dataset_shapes.json").read_text())["images"]
            if image["split"] == "train" for s in image["sentences"]}
    assert set(copied) <= told


def test_the_authors_files_with_object_tags_train_and_are_judged_by_coco_references(run_config, unimo2, captioning_data):
    config = run_config(data__format="filelist", data__annotations=str(captioning_data / "{split}_filelist"), train__max_steps=1,
                        data__max_objects=60, data__objects=str(captioning_data / "objects.ids"),
                        data__references=str(captioning_data / "captions_{split}.json"))
    trained = unimo2("train", "-c", config)
    assert trained.status == 0, trained.err
    assert "cider" in trained.out


def test_nocaps_is_reported_per_domain_and_pictures_without_references_are_only_captioned(run_config, captioning_data, tmp_path):
    content = json.loads((captioning_data / "captions_nocaps.json").read_text())
    images = content["images"][:2] + content["images"][-2:]
    (tmp_path / "nocaps_val.json").write_text(json.dumps({**content, "images": images, "annotations": [
        a for a in content["annotations"] if a["image_id"] in {i["id"] for i in images}]}))
    (tmp_path / "nocaps_test.json").write_text(json.dumps({"images": images}))
    path = run_config(data__format="coco", data__annotations=str(tmp_path / "nocaps_{split}.json"))
    task = task_of(path)
    model = task.build_model()
    metrics = task.evaluators()[0].run(model)
    assert {"cider", "cider_in-domain", "cider_out-domain"} <= set(metrics)
    task.config.eval.split = "test"
    evaluator = task.evaluators()[0]
    assert evaluator.run(model) == {} and "no references" in evaluator.table()
    evaluator.write_report(str(tmp_path))
    assert len(json.loads((tmp_path / "captions_test_results.json").read_text())) == 4


def test_training_lowers_the_loss_and_label_smoothing_enters_it(run_config):
    task = task_of(run_config(train__label_smoothing=0.0))
    model = task.build_model()
    data = task.split("train")
    batch = to_tensors(task.collate([data.sample(i, None) for i in range(8)]))
    optimizer = paddle.optimizer.Adam(3e-3, parameters=model.parameters())
    losses = []
    for _ in range(12):
        loss = task.loss(model, batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.85 * losses[0]
    task.config.train.label_smoothing = 0.3
    assert float(task.loss(model, batch)["loss"]) > float(losses[-1])


def test_targets_are_tags_then_caption_and_nobody_sees_the_future():
    arrays = target_arrays([[0, 7, 8, 2], [0, 9, 2]], [[0, 5, 2], [0, 2]], pad_id=1)
    assert arrays["input_ids"].tolist() == [[0, 5, 2, 0, 7, 8, 2], [0, 2, 0, 9, 2, 1, 1]]
    assert arrays["position_ids"].tolist() == [[2, 3, 4, 2, 3, 4, 5], [2, 3, 2, 3, 4, 1, 1]]
    assert arrays["predict_from"].tolist() == [3, 4, 5, 9, 10] and arrays["labels"].tolist() == [7, 8, 2, 9, 2]
    mask = arrays["text_mask"]
    assert mask[0, :, :3].all() and not mask[0, :3, 3:].any()
    np.testing.assert_array_equal(mask[0, 3:, 3:], np.tril(np.ones([4, 4])))
    assert not mask[1, 5:].any() and not mask[1, :, 5:].any()


def test_a_picture_without_tags_is_refused(run_config, unimo2, captioning_data, tmp_path):
    lines = (captioning_data / "objects.ids").read_text().splitlines()
    (tmp_path / "few.ids").write_text("\n".join(lines[:3]) + "\n")
    outcome = unimo2("train", "-c", run_config(data__max_objects=60, data__objects=str(tmp_path / "few.ids")))
    assert outcome.status == 2 and "no object tags for 21 of 24 pictures" in outcome.err


def test_wrong_settings_are_listed_together(run_config, unimo2):
    config = run_config(data__format="coco", eval__decoding__max_length=500, eval__decoding__method="dream", train__scst_samples=0)
    outcome = unimo2("validate", "-c", config)
    assert outcome.status == 2
    for part in ("{split}", "'dream'", "scst_samples"):
        assert part in outcome.err
    outcome = unimo2("validate", "-c", run_config(eval__decoding__max_length=500))
    assert outcome.status == 2 and "eval.decoding.max_length: 500 tokens" in outcome.err


def test_self_critical_training_runs_and_its_gradient_follows_the_advantage(run_config, captioning_data, monkeypatch):
    task = task_of(run_config(train__scst=True, train__scst_samples=2, data__max_objects=60, data__objects=str(captioning_data / "objects.ids")))
    model = task.build_model()
    data = task.split("train")
    assert len(data) == 24  # a sample is a picture
    batch = to_tensors(task.collate([data.sample(i, None) for i in range(2)]))
    terms = task.loss(model, batch)
    assert set(terms) == {"loss", "reward", "greedy_reward"} and np.isfinite(float(terms["loss"]))
    task.config.train.scst_baseline = "others"
    assert set(task.loss(model, batch)) == {"loss", "reward"}
    task.config.train.scst_baseline = "greedy"
    # captions with the end token early get all the reward: their probability must rise
    words = {"good": [task.tokenizer.cls_id, 10, task.tokenizer.sep_id], "bad": [task.tokenizer.cls_id, 11, 12, 13]}

    def drawn(model, image, start, end, options, tags=None, word_starts=None):
        kinds = ["bad"] if options.method == "greedy" else ["good", "bad"]
        return [[Hypothesis(words[kind], [0.0] * len(words[kind])) for kind in kinds] for _ in range(image.shape[0])]

    monkeypatch.setattr("unimo2_paddle.tasks.captioners.generate", drawn)
    monkeypatch.setattr(task, "_reward", lambda picture, h: float(h.ids == words["good"]))
    optimizer = paddle.optimizer.Adam(1e-3, parameters=model.parameters())
    losses = []
    for _ in range(5):
        loss = task.loss(model, batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    assert losses[0] > 0 and losses[-1] < losses[0]


def test_rewards_are_cider_with_the_training_references_frequencies(run_config):
    task = task_of(run_config(train__scst=True))
    data, tokenizer = task.split("train"), task.tokenizer
    text = data.references(3)[0]
    ended = Hypothesis([tokenizer.cls_id, *tokenizer.encode(text), tokenizer.sep_id])
    cut = Hypothesis(ended.ids[:-1])
    assert task._reward(3, ended) > task._reward(3, cut) > task._reward(4, ended)
    from unimo2_paddle.metrics.ptb import caption_tokens
    references = [[caption_tokens(t) + ["[end]"] for t in data.references(i)] for i in range(len(data))]
    cider = CiderD(references)
    assert task._reward(3, ended) == pytest.approx(cider.score(caption_tokens(text) + ["[end]"], [cider.vector(r) for r in references[3]]))


def test_the_consensus_caption_is_the_one_the_others_agree_with():
    cider = CiderD([[text.split()] for text in ("a tree", "two red boxes lie here", "a dog", "a green box")])
    assert consensus(["a tree", "two red boxes lie here", "two red boxes lie there"], cider) == "two red boxes lie here"
    assert consensus(["one caption"], cider) == "one caption"
