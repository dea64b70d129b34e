"""Visual question answering: classes, targets, held-out pictures, and train, eval and submission through the commands."""
import json
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml

from unimo2_paddle.config import load_run_config
from unimo2_paddle.data.demo_tasks.vqa import write
from unimo2_paddle.data.formats.vqa import read_vqa
from unimo2_paddle.errors import ConfigError
from unimo2_paddle.tasks.base import to_tensors
from unimo2_paddle.tasks.vqa import VqaTask

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = {
    "config": "unimo2_demo", "hidden_size": 16, "text_hidden_size": 16, "vit_hidden_size": 16, "num_attention_heads": 2, "text_num_attention_heads": 2,
    "vit_num_attention_heads": 2, "num_hidden_layers": 1, "text_num_hidden_layers": 1, "vit_num_hidden_layers": 1, "image_size": 32,
    "resolution": 16, "position_grid": 2, "num_codebook": 16, "topk_value": 4,
}
SUBTYPES = {"train": "train2014", "val": "val2014", "test": "test2015"}


@pytest.fixture(scope="module")
def questions(demo_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("vqa")
    write(str(out), str(demo_data), 1)
    return out


@pytest.fixture
def config(questions, demo_data, tmp_path):
    """A function that writes the tiny run with some keys replaced and returns the file's path."""

    def make(**changes):
        values = {
            "task": "vqa", "model": dict(MODEL),
            "data": {"questions": {split: str(questions / f"v2_OpenEnded_mscoco_{name}_questions.json") for split, name in SUBTYPES.items()},
                     "annotations": {split: str(questions / f"v2_mscoco_{name}_annotations.json") for split, name in SUBTYPES.items()},
                     "answers_from": ["train"], "min_answer_count": 2, "images": str(questions), "vocab": str(demo_data / "vocab"),
                     "max_text_len": 40},
            "train": {"epochs": 1, "batch_size": 60, "max_steps": 2}, "optim": {"learning_rate": 1e-3},
            "eval": {"split": "val"}, "run": {"output": str(tmp_path / "run"), "progress": False},
        }
        for path, value in changes.items():
            group, _, key = path.partition("__")
            values[group][key] = value
        path = tmp_path / "vqa.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    return make


def task_of(path, *overrides):
    return VqaTask(load_run_config(path, overrides))


def test_the_demo_files_are_the_same_for_the_same_seed(questions, demo_data, tmp_path):
    write(str(tmp_path), str(demo_data), 1)
    for path in sorted(questions.rglob("*.json")):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    picture = "val2014/COCO_val2014_000001000001.jpg"
    assert (tmp_path / picture).read_bytes() == (questions / picture).read_bytes()


def test_demo_answers_are_true_of_the_scenes(questions, demo_data):
    scenes = [json.loads(line)["objects"] for line in (demo_data / "scenes" / "test.jsonl").read_text().splitlines()]
    found = read_vqa(questions / "v2_OpenEnded_mscoco_test2015_questions.json", str(questions), questions / "v2_mscoco_test2015_annotations.json")
    asked = set()
    for question in found:
        objects, words = scenes[question.image_id % 1000000 - 1], question.text.rstrip("?").split()
        kind, truth = question.annotation.question_type, question.annotation.common
        asked.add(kind)
        if question.text == "How many objects are there?":
            assert truth == str(len(objects))
        elif kind == "how many" and words[-3] == "things":
            assert truth == str(sum(o["colour"] == words[2] for o in objects))
        elif kind == "what shape is the" and len([o for o in objects if o["colour"] == words[-2]]) == 1:
            assert truth == next(o["shape"] for o in objects if o["colour"] == words[-2])
        elif kind == "is there a" and words[-1] in ("circle", "square", "star", "ring", "cross", "triangle"):
            assert truth == ("yes" if any((o["colour"], o["shape"]) == (words[-2], words[-1]) for o in objects) else "no")
    assert asked == {"what color is the", "what shape is the", "how many", "is there a", "is the"}


def test_targets_are_soft_and_the_loss_sums_over_the_answers(config):
    task = task_of(config())
    data = task.split("train")
    batch = task.collate([data.sample(i, None) for i in range(5)])
    people = data.records[0].annotation.answers
    assert batch["labels"].shape == (5, len(task.answers)) and batch["image"].dtype == np.uint8
    for number, answer in enumerate(task.answers):
        matches = sum({"yes": "yes", "no": "no"}.get(text.lower(), text.lower()) == answer for text in people)
        if not any(character.isdigit() for character in answer):
            assert batch["labels"][0, number] == pytest.approx(min(1, matches / 3))
    model = task.build_model()
    model.eval()
    tensors = to_tensors(batch)
    loss = float(task.loss(model, tensors)["loss"])
    z = model(tensors["image"].astype("float32") * (2 / 255) - 1, *(tensors[k] for k in ("input_ids", "position_ids", "text_mask"))).numpy()
    entropy = np.log1p(np.exp(z)) - batch["labels"] * z
    assert loss == pytest.approx(entropy.sum(axis=1).mean(), rel=1e-4)


def test_learning_from_train_and_val_keeps_the_held_out_pictures_apart(config):
    task = task_of(config(data__train_on=["train", "val"], data__held_out_images=5, eval__split="minival"))
    judged = {r.path for r in task.split("minival").records}
    learnt = {r.path for r in task.split("train").records}
    assert len(judged) == 5 and not judged & learnt
    assert len(learnt | judged) == len({r.path for split in ("train", "val") for r in task._read(split)})


@pytest.mark.parametrize("changes, told", [
    ({"data__train_on": ["train", "val"]}, "eval.split: val is in data.train_on"),
    ({"eval__split": "minival"}, "minival needs data.held_out_images"),
    ({"eval__split": "dev"}, "'dev' has no data.questions; known: test, train, val"),
    ({"data__answers_from": ["trian"]}, "answers_from: split 'trian' has no annotations"),
    ({"data__max_text_len": 80}, "80 tokens need 82 text positions"),
    ({"data__images": ""}, "data.images: is empty"),
    ({"data__visual_genome": "qa.json"}, "visual_genome_images: is needed"),
])
def test_wrong_configurations_are_refused(config, changes, told):
    with pytest.raises(ConfigError) as caught:
        load_run_config(config(**changes))
    assert told in str(caught.value)


def test_train_judge_once_and_submit_through_the_commands(config, unimo2, tmp_path, questions, capsys):
    path = config()
    assert unimo2("train", "-c", path).status == 0
    best = tmp_path / "run" / "best"
    about = json.loads((best / "task.json").read_text())
    assert about["task"] == "vqa" and set(about["frequent_answers"]) >= {"", "how many"} and (best / "vocab" / "vocab.txt").is_file()

    # other answers in the annotations do not change the classes of a finetuned model
    overrides = ["-o", f"model.init={best}", "-o", "data.min_answer_count=1"]
    outcome = unimo2("eval", "-c", path, *overrides, "-o", "eval.split=test")
    assert outcome.status == 0, outcome.err
    assert "baseline" in outcome.out and "what color is the" in outcome.out
    predictions = tmp_path / "run" / "predictions"
    rows = [json.loads(line) for line in (predictions / "test.jsonl").read_text().splitlines()]
    assert {"question", "prediction", "probability", "answer", "people", "accuracy", "correct"} <= set(rows[0])
    assert {row["prediction"] for row in rows} <= set(about["answers"])
    mean = np.mean([100 * row["accuracy"] for row in rows])
    assert json.loads((predictions / "test.json").read_text())["accuracy"] == pytest.approx(mean, abs=0.1)
    assert "Accuracy per question type" in (predictions / "test.html").read_text()

    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import validate_submission
    finally:
        sys.path.remove(str(ROOT / "tools"))
    files = [str(predictions / "test_submission.json"), str(questions / "v2_OpenEnded_mscoco_test2015_questions.json")]
    assert validate_submission.main(["vqa", *files]) == 0
    assert validate_submission.main(["vqa", files[0], files[1].replace("test2015", "val2014")]) == 2
    assert "would refuse" in capsys.readouterr().err

    # without the (usually secret) answers the split is answered all the same
    for kept in predictions.iterdir():
        kept.unlink()
    values = yaml.safe_load(Path(path).read_text())
    del values["data"]["annotations"]["test"]
    Path(path).write_text(yaml.safe_dump(values))
    outcome = unimo2("eval", "-c", path, *overrides, "-o", "eval.split=test")
    assert outcome.status == 0 and "not public" in outcome.out
    assert sorted(p.name for p in predictions.iterdir()) == ["evaluations.json", "test.jsonl", "test_submission.json"]


def test_the_model_without_dictionary_learns_too(config, unimo2):
    assert unimo2("train", "-c", config(model__model_type="baseline", train__max_steps=1)).status == 0


def test_gradients_reach_both_encoders(config):
    task = task_of(config())
    data = task.split("train")
    model = task.build_model()
    task.loss(model, to_tensors(task.collate([data.sample(i, None) for i in range(4)])))["loss"].backward()
    reached = {p.name for p in model.parameters() if p.grad is not None and float(paddle.abs(p.grad).sum()) > 0}
    assert "cls_out_w" in reached and any(n.startswith("vit.") for n in reached) and any(n.startswith("text.") for n in reached)
