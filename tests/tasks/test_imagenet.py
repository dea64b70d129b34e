"""Image classification end to end: finetuning, linear probe, zero-shot, their reports and refusals."""
import json
import os

import numpy as np
import paddle
import pytest
import yaml
from PIL import Image

from unimo2_paddle.checkpoints.convert import read_safetensors
from unimo2_paddle.checkpoints.pretrained import save_pretrained
from unimo2_paddle.config import load_run_config
from unimo2_paddle.errors import CheckpointError, ConfigError, DataError, UserInputError
from unimo2_paddle.models.unimo2 import Unimo2Model
from unimo2_paddle.tasks import imagenet
from unimo2_paddle.tasks.base import normalise_tensor
from unimo2_paddle.tasks.imagenet import ImagenetTask, centre_crop, class_metrics, class_table, soft_cross_entropy
from unimo2_paddle.tasks.retrieval_scoring import evaluation_mode
from unimo2_paddle.tasks.zeroshot import ZeroShotTask
from unimo2_paddle.training.loop import evaluate_from_config, train_from_config

COLOURS = {"red_dot": (220, 30, 30), "green_dot": (30, 200, 30), "blue_dot": (30, 30, 220)}


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """Three classes of noisy coloured pictures as class folders and lists; not to be changed."""
    root, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 5), ("test", 6)):
        lines = []
        for name, colour in sorted(COLOURS.items()):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                picture = np.clip(rng.normal(colour, 25, (40, 48, 3)), 0, 255).astype("uint8")
                Image.fromarray(picture).save(root / split / name / f"{number:02d}.png")
                lines.append(f"{split}/{name}/{number:02d}.png {sorted(COLOURS).index(name)}\n")
        (root / f"{split}_list.txt").write_text("".join(lines))
    return root


@pytest.fixture
def run(colours, tiny_pretrain, tmp_path):
    """A function that writes a tiny run config, with some keys replaced, and returns its path."""
    values = {
        "task": "imagenet", "model": tiny_pretrain("unused")["model"], "data": {"images": str(colours)},
        "train": {"epochs": 5, "batch_size": 12, "augmentation": {"crop": 1.0, "crop_scale": [0.5, 1.0], "flip": 0.5},
                  "randaugment": {"operations": 1, "magnitude": 3}, "mixing": {"mixup": 0.2, "cutmix": 0.5, "probability": 0.5}},
        "optim": {"learning_rate": 3e-3, "layer_decay": 0.9, "ema": 0.5, "schedule": "cosine"},
        "eval": {"every_epochs": 2, "batch_size": 7}, "run": {"output": str(tmp_path / "run"), "progress": False},
    }

    def write(changes=None, name="run.yaml", **groups):
        chosen = json.loads(json.dumps({**values, **groups}))
        for path, value in (changes or {}).items():
            group, key = path.split(".")
            chosen[group][key] = value
        (tmp_path / name).write_text(yaml.safe_dump({key: value for key, value in chosen.items() if value is not None}))
        return str(tmp_path / name)

    return write


@pytest.fixture
def pretrained(tiny_config, tmp_path):
    """A directory with a random model that has everything, as pre-training leaves it."""
    paddle.seed(5)
    with paddle.utils.unique_name.guard():
        save_pretrained(Unimo2Model(tiny_config), str(tmp_path / "pretrained"))
    return str(tmp_path / "pretrained")


def task_of(path, overrides=()):
    return ImagenetTask(load_run_config(path, overrides))


def test_finetuning_through_the_commands_learns_and_reports(run, unimo2, tmp_path):
    config = run()
    assert unimo2("train", "-c", config).status == 0
    best = tmp_path / "run" / "best"
    stored = json.loads((best / "task.json").read_text())
    assert stored["task"] == "imagenet" and stored["classes"] == sorted(COLOURS) and stored["names"][0] == "blue dot"
    outcome = unimo2("eval", "-c", config, "-o", f"model.init={best}", "-o", "eval.split=test", "-o", f"run.output={tmp_path / 'judged'}")
    assert outcome.status == 0 and "test: 18 samples" in outcome.out
    report = tmp_path / "judged" / "predictions"
    assert json.loads((report / "test.json").read_text())["top1"] >= 90
    rows = [json.loads(line) for line in (report / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 18 and sum(rows[0]["guesses"].values()) == pytest.approx(1, abs=0.01)
    page = (report / "test.html").read_text()
    assert "Classes, worst first" in page and "data:image/jpeg" in page


def test_lists_and_folders_give_the_same_data(run, colours):
    one, other = task_of(run()), task_of(run({"data.format": "lists"}, "lists.yaml"))
    assert other.classes == ["0", "1", "2"]
    for split in ("train", "test"):
        np.testing.assert_array_equal(one.split(split).labels, other.split(split).labels)
        assert [os.path.normpath(p) for p in one.split(split).images.paths] == [os.path.normpath(p) for p in other.split(split).images.paths]


def test_evaluation_alone_never_reads_the_training_pictures(run, pretrained, monkeypatch):
    task = task_of(run({"model.init": pretrained}))
    monkeypatch.setattr(imagenet, "read_split", lambda data, split, classes, real=imagenet.read_split: pytest.fail("train") if split == "train"
                        else real(data, split, classes))
    task.evaluators()
    with pytest.raises(CheckpointError, match="cls_out_w"):  # and it refuses a model that has no head
        task.build_model()


def test_a_model_of_other_classes_is_refused_in_evaluation_but_trains_on(run, pretrained, tmp_path):
    with open(os.path.join(pretrained, "task.json"), "w") as file:
        json.dump({"task": "imagenet", "classes": ["cat", "dog", "eel"]}, file)
    path = run({"model.init": pretrained})
    with pytest.raises(CheckpointError, match="trained on 3 classes \\(cat, dog, eel"):
        evaluate_from_config(path)
    train_from_config(path, ["train.max_steps=1", "run.evaluate_at_end=false"])


def test_a_finetuned_directory_tells_the_classes_where_the_training_data_are_away(run, colours, pretrained, tmp_path):
    (tmp_path / "small").mkdir()
    os.symlink(colours / "test", tmp_path / "small" / "test")
    with open(os.path.join(pretrained, "task.json"), "w") as file:
        json.dump({"task": "imagenet", "classes": ["a_first", *sorted(COLOURS)]}, file)
    task = task_of(run({"model.init": pretrained, "data.images": str(tmp_path / "small"), "eval.split": "test"}))
    assert task.num_labels() == 4 and set(task.split("test").labels.tolist()) == {1, 2, 3}


def test_held_out_pictures_leave_training(run):
    task = task_of(run({"data.held_out": 0.3}))
    train, dev, whole = task.split("train").images, task.split("dev").images, task_of(run()).split("train").images
    assert not set(train.paths) & set(dev.paths) and set(train.paths) | set(dev.paths) == set(whole.paths) and 4 < len(dev) < 26
    with pytest.raises(DataError, match="dev: no such directory"):
        task_of(run()).split("dev")


def test_training_samples_vary_and_evaluation_samples_do_not(run):
    task = task_of(run())
    train, val = task.split("train"), task.split("val")
    one, other = (train.sample(3, np.random.default_rng(seed))["image"] for seed in (1, 2))
    assert (one != other).any() and one.shape == other.shape == (32, 32, 3)
    np.testing.assert_array_equal(val.sample(3, np.random.default_rng(1))["image"], val.sample(3, None)["image"])
    batch = task.collate([train.sample(i, np.random.default_rng(i)) for i in range(6)])
    assert batch["image"].shape == (6, 32, 32, 3) and batch["targets"].shape == (6, 3) and "targets" not in task.collate([val.sample(0, None)])


def test_the_centre_crop_looks_at_the_middle():
    image = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    np.testing.assert_array_equal(centre_crop(image, 40, 1.0), image[:, 10:50])
    np.testing.assert_array_equal(centre_crop(image, 20, 0.5), image[10:30, 20:40])
    assert centre_crop(image, 16, 0.0).shape == (16, 16, 3)


def test_soft_cross_entropy_equals_the_hard_one_on_hard_targets():
    logits, labels = paddle.randn([5, 4]), paddle.to_tensor([0, 3, 1, 1, 2])
    hard = paddle.nn.functional.cross_entropy(logits, labels)
    assert float(soft_cross_entropy(logits, paddle.nn.functional.one_hot(labels, 4))) == pytest.approx(float(hard), rel=1e-5)


def test_a_run_with_averaging_and_mixing_resumes_exactly(run, tmp_path):
    path = run({"train.max_steps": 4, "run.save_every": 2, "run.evaluate_at_end": False, "eval.every_epochs": 0})
    train_from_config(path)
    train_from_config(path, [f"run.output={tmp_path / 'again'}"], resume=str(tmp_path / "run" / "checkpoints" / "step-000002"))
    for name in ("model.safetensors", "average.safetensors"):
        whole, resumed = (read_safetensors(str(tmp_path / r / "checkpoints" / "step-000004" / name)) for r in ("run", "again"))
        assert all(np.array_equal(whole[key], resumed[key]) for key in whole)


def test_the_baseline_without_a_dictionary_trains_too(run, tmp_path):
    train_from_config(run(), ["model.model_type=baseline", "train.max_steps=2"])
    assert "vq_emb" not in read_safetensors(str(tmp_path / "run" / "best" / "model.safetensors"))


def test_a_linear_probe_encodes_every_picture_once_and_trains_the_head_alone(run, pretrained, tmp_path, monkeypatch):
    decoded, real = [], imagenet.decode_image
    monkeypatch.setattr(imagenet, "decode_image", lambda path, *rest: decoded.append(path) or real(path, *rest))
    path = run({"model.init": pretrained, "train.method": "linear_probe", "train.epochs": 20, "optim.learning_rate": 0.05, "eval.every_epochs": 5})
    train_from_config(path)
    assert len(decoded) == len(set(decoded)) == 3 * (16 + 5)
    before, after = read_safetensors(os.path.join(pretrained, "model.safetensors")), read_safetensors(str(tmp_path / "run" / "best" / "model.safetensors"))
    assert {name for name in after if name not in before or not np.array_equal(after[name], before[name])} == {"cls_out_w", "cls_out_b"}
    judge = [f"model.init={tmp_path / 'run' / 'best'}", "eval.split=test", f"run.output={tmp_path / 'judged'}"]
    probed = evaluate_from_config(path, judge)["test"]
    whole = evaluate_from_config(path, [*judge, "train.method=finetune"])["test"]  # best/ is an ordinary classifier
    assert probed == whole and whole["top1"] > 60
    decoded.clear()
    train_from_config(path, [f"run.output={tmp_path / 'second'}", f"train.feature_cache={tmp_path / 'run' / 'features'}", "train.max_steps=1"])
    assert not decoded  # another run over the same features


def test_stale_features_are_not_read_and_damaged_ones_are_refused(run, pretrained, tmp_path, tiny_config):
    path = run({"model.init": pretrained, "train.method": "linear_probe", "train.max_steps": 1})
    train_from_config(path)
    cache = tmp_path / "run" / "features"
    kept = sorted(cache.glob("train-*.npy"))
    paddle.seed(6)
    with paddle.utils.unique_name.guard():
        save_pretrained(Unimo2Model(tiny_config), str(tmp_path / "other"))
    train_from_config(path, [f"model.init={tmp_path / 'other'}", f"run.output={tmp_path / 'two'}", f"train.feature_cache={cache}"])
    assert len(list(cache.glob("train-*.npy"))) == 2
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    with pytest.raises(DataError, match="remove the file"):
        train_from_config(path, [f"run.output={tmp_path / 'three'}", f"train.feature_cache={cache}"])


def test_class_metrics_and_table_on_a_worked_example():
    scores = np.array([[3, 2, 1, 0, 0, 0, 0], [3, 2, 1, 0, 0, 0, 0], [0, 0, 5, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6]], dtype=float)
    labels = np.array([0, 1, 2, 0])
    assert class_metrics(scores, labels) == {"top1": 50.0, "top5": 75.0, "class_mean": 50.0}
    _, _, rows = class_table(scores, labels, list("abcdefg"))
    assert rows == [["b", 1, "0.0", "a (1)"], ["a", 2, "50.0", "g (1)"], ["c", 1, "100.0", ""]]


@pytest.mark.parametrize("changes, text", [
    ({"data.format": "tar"}, "data.format: 'tar' is not one of folders, lists"), ({"data.held_out": 1.0}, "data.held_out"),
    ({"train.method": "probe"}, "train.method: 'probe' is not one of finetune, linear_probe"), ({"train.label_smoothing": 1}, "train.label_smoothing"),
    ({"train.randaugment": {"magnitude": 20}}, "train.randaugment.magnitude"), ({"eval.centre_crop": 2}, "eval.centre_crop"),
    ({"data.imags": "x"}, "did you mean 'images'"),
])
def test_wrong_configurations_name_their_key(run, changes, text):
    with pytest.raises(ConfigError) as caught:
        load_run_config(run(changes))
    assert text in str(caught.value)


def zeroshot(run, demo_data, pretrained, **changes):
    settings = {"split": "test", "templates": "shapes", "image_batch": 7, "text_batch": 2, "pair_batch": 5, **changes}
    return run(task="zeroshot", model={"init": pretrained}, optim=None, train=None, eval=settings,
               data={"images": None, "vocab": str(demo_data / "vocab"), "max_text_len": 40}, name="zeroshot.yaml")


@pytest.fixture
def zero(run, colours, demo_data, pretrained):
    """A function that runs the evaluator with some settings; returns (evaluator, model, metrics)."""

    def evaluate(**changes):
        config = load_run_config(zeroshot(run, demo_data, pretrained, **changes), [f"data.images={colours}"])
        task = ZeroShotTask(config)
        evaluator, model = task.evaluators()[0], task.build_model()
        model.eval()
        return evaluator, model, evaluator.run(model)

    return evaluate


def forwards(evaluator, model, template):
    """Matching and contrastive scores ``[2, N, C]`` of every picture with every class's sentence, by plain forwards of pairs."""
    from unimo2_paddle.data.collate import text_arrays, with_special_tokens
    from unimo2_paddle.data.prompts import fill_template

    count = len(evaluator.dataset)
    scores = np.zeros((2, count, len(evaluator.names)))
    pictures = np.stack([evaluator.dataset.sample(row, None)["image"] for row in range(count)])
    with evaluation_mode(model):
        for label, name in enumerate(evaluator.names):
            ids = with_special_tokens(evaluator.tokenizer.encode(fill_template(template, name)), evaluator.tokenizer, 40)
            text = {key: paddle.to_tensor(array) for key, array in text_arrays([ids] * count, evaluator.tokenizer.pad_id).items()}
            out = model(image=normalise_tensor(paddle.to_tensor(pictures)), **text)
            scores[1, :, label] = model.contrastive_score(out).numpy()
            if "matching" in model.heads:
                scores[0, :, label] = model.matching_logits(out)[:, 1].numpy()
    return scores


def test_contrastive_zero_shot_equals_plain_forwards_averaged_over_the_sentences(zero):
    evaluator, model, metrics = zero()
    plain = np.mean([forwards(evaluator, model, template)[1] for template in evaluator.templates], axis=0)
    np.testing.assert_allclose(evaluator.scores, plain, atol=2e-5)
    assert set(metrics) == {"top1", "class_mean"} and evaluator.baselines["top1"] == pytest.approx(100 / 3)


def test_judging_all_classes_by_matching_equals_plain_forwards(zero):
    evaluator, model, metrics = zero(matching_top=3, matching_templates=2)
    first, second = (forwards(evaluator, model, template)[0] for template in evaluator.templates[:2])
    contrastive = np.mean([forwards(evaluator, model, template)[1] for template in evaluator.templates], axis=0)
    np.testing.assert_allclose(evaluator.scores, (first + second) / 2 + 0.3 * contrastive, atol=5e-5)
    assert {"top1", "contrastive_top1"} <= set(metrics)


def test_classes_outside_the_shortlist_stay_behind_it_in_contrastive_order(zero):
    evaluator, model, _ = zero(matching_top=1)
    contrastive = np.mean([forwards(evaluator, model, template)[1] for template in evaluator.templates], axis=0)
    np.testing.assert_array_equal(np.argsort(-evaluator.scores, axis=1), np.argsort(-contrastive, axis=1))


def test_zero_shot_through_the_command_writes_its_report(run, unimo2, colours, demo_data, pretrained, tmp_path):
    outcome = unimo2("eval", "-c", zeroshot(run, demo_data, pretrained), "-o", f"data.images={colours}")
    assert outcome.status == 0 and "(chance 33.33)" in outcome.out and "classes, worst first" in outcome.out
    report = tmp_path / "run" / "predictions"
    assert "sentences per class, for example: a picture of a blue dot." in (report / "test.html").read_text()
    assert len((report / "test.jsonl").read_text().splitlines()) == 18 and "top1" in json.loads((report / "test.json").read_text())
    outcome = unimo2("train", "-c", zeroshot(run, demo_data, pretrained), "-o", f"data.images={colours}")
    assert outcome.status == 2 and "cannot be trained" in outcome.err


def test_zero_shot_refuses_a_model_that_cannot_do_it(zero, tiny_config):
    evaluator, _, _ = zero()
    with paddle.utils.unique_name.guard(), pytest.raises(UserInputError, match="needs a pre-trained model"):
        evaluator.run(Unimo2Model(tiny_config, text=False))
    evaluator.max_text_len = 100
    with paddle.utils.unique_name.guard(), pytest.raises(UserInputError, match="data.max_text_len 100 needs 102"):
        evaluator.run(Unimo2Model(tiny_config))


@pytest.mark.parametrize("name", ["demo_digits", "demo_zeroshot", "finetune_224", "finetune_384", "linear_probe", "zeroshot"])
def test_the_bundled_configs_are_valid(name):
    load_run_config(os.path.join(os.path.dirname(imagenet.__file__), "..", "..", "run_configs", "imagenet", f"{name}.yaml"))


def test_the_demo_digits_and_shapes_are_the_same_every_time(tmp_path, monkeypatch):
    from unimo2_paddle.data.demo_tasks import classes

    monkeypatch.setattr(classes, "PICTURES_PER_CLASS", {"val": 1, "test": 1})
    assert "400 test, 200 val, 1197 train" in classes.write(str(tmp_path / "one"), "", 3)
    digits = list((tmp_path / "one" / "digits").rglob("*.png"))
    assert len({path.name for path in digits}) == len(digits) == 1797  # no digit in two splits
    lines = (tmp_path / "one" / "digits" / "test_list.txt").read_text().splitlines()
    assert len(lines) == 400 and all((tmp_path / "one" / "digits" / line.split()[0]).is_file() for line in lines)
    monkeypatch.setattr(classes, "_write_digits", lambda directory, seed: "")
    classes.write(str(tmp_path / "two"), "", 3)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one" / "shapes").rglob("*.*"))
    assert len(files) == 97 and all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
