"""Visual entailment: generated hypotheses, loss, and train and eval through the commands."""
import json
from collections import Counter

import numpy as np
import pytest
import yaml

from unimo2_paddle.config import load_run_config
from unimo2_paddle.data.demo_tasks.entailment import write
from unimo2_paddle.data.demo_tasks.scenes import read_scenes
from unimo2_paddle.data.formats.snli_ve import LABELS, read_snli_ve
from unimo2_paddle.data.shapes import SHAPES, SIZES
from unimo2_paddle.errors import CheckpointError, ConfigError
from unimo2_paddle.tasks.base import to_tensors
from unimo2_paddle.tasks.entailment import EntailmentTask

MODEL = {
    "config": "unimo2_demo", "hidden_size": 16, "text_hidden_size": 16, "vit_hidden_size": 16, "num_attention_heads": 2, "text_num_attention_heads": 2,
    "vit_num_attention_heads": 2, "num_hidden_layers": 1, "text_num_hidden_layers": 1, "vit_num_hidden_layers": 1, "image_size": 32,
    "resolution": 16, "position_grid": 2, "num_codebook": 16, "topk_value": 4,
}
NAMES = {word: shape for shape, words in SHAPES.items() for word in words}
SIZE_NAMES = {word: size for size, words in SIZES.items() for word in words}


@pytest.fixture(scope="module")
def hypotheses(demo_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("entailment")
    write(str(out), str(demo_data), 1)
    return out


@pytest.fixture
def config(hypotheses, demo_data, tmp_path):
    """A function that writes the tiny run with some keys replaced and returns the file's path."""

    def make(**changes):
        values = {
            "task": "entailment", "model": dict(MODEL),
            "data": {"annotations": str(hypotheses / "snli_ve_{split}.jsonl"), "images": str(hypotheses / "flickr30k-images"),
                     "vocab": str(demo_data / "vocab"), "max_text_len": 40},
            "train": {"epochs": 1, "batch_size": 36}, "optim": {"learning_rate": 1e-3},
            "eval": {"split": "val"}, "run": {"output": str(tmp_path / "run"), "progress": False},
        }
        for path, value in changes.items():
            group, separator, key = path.partition("__")
            if separator:
                values[group][key] = value
            else:
                values[group] = value
        path = tmp_path / "entailment.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    return make


def things_named(text):
    """The (size or None, colour, shape) that a sentence names with an article."""
    words, found = text.rstrip(".").lower().split(), []
    for place, word in enumerate(words):
        name = " ".join(words[place:place + 2]) if " ".join(words[place:place + 2]) in NAMES else word
        if name in NAMES and (place == 0 or words[place - 1] not in ("five-pointed", "plus", "three-sided")):
            found.append((SIZE_NAMES.get(words[place - 2]), words[place - 1], NAMES[name]))
    return found


def test_every_picture_has_a_hypothesis_of_each_label_that_fits_the_scene(hypotheses, demo_data):
    found = read_snli_ve(hypotheses / "snli_ve_test.jsonl", hypotheses / "flickr30k-images")
    scenes = [scene for _, scene in read_scenes(str(demo_data), "test")]
    assert len(found) == 3 * len(scenes)
    for place, scene in enumerate(scenes):
        group = found[3 * place:3 * place + 3]
        assert {h.label for h in group} == {0, 1, 2} and len({h.path for h in group}) == 1
        for hypothesis in group:
            label = LABELS[hypothesis.label]
            named = [t for t in things_named(hypothesis.text)]
            there = all(any(o.type == t[1:] and t[0] in (None, o.size) for o in scene.objects) for t in named)
            assert named
            if label in ("entailment", "neutral"):
                assert there, (label, hypothesis.text)
            if hypothesis.text.startswith("There is"):
                assert there == (label == "entailment"), hypothesis.text


def test_the_demo_files_are_the_same_for_the_same_seed(hypotheses, demo_data, tmp_path):
    write(str(tmp_path), str(demo_data), 1)
    for split in ("train", "dev", "test"):
        assert (tmp_path / f"snli_ve_{split}.jsonl").read_bytes() == (hypotheses / f"snli_ve_{split}.jsonl").read_bytes()


def test_the_sentence_alone_does_not_give_the_label_away(hypotheses):
    """Words of the hypothesis that stand for one label only are not many: the best rule per kind of sentence stays below 70 %."""
    kinds = {}
    for hypothesis in read_snli_ve(hypotheses / "snli_ve_train.jsonl", hypotheses / "flickr30k-images"):
        text = hypothesis.text
        kind = "than" if " than " in text else "there" if text.startswith("There") else "size or place" if any(
            f" {w}" in text for w in (*SIZE_NAMES, "left", "right", "above", "over", "below", "under")) else "invisible"
        kinds.setdefault(kind, Counter())[hypothesis.label] += 1
    best, total = sum(max(c.values()) for c in kinds.values()), sum(sum(c.values()) for c in kinds.values())
    assert set(kinds) == {"than", "there", "size or place", "invisible"} and best / total < 0.7


def test_the_loss_is_cross_entropy_over_the_three_labels(config):
    task = EntailmentTask(load_run_config(config()))
    data = task.split("train")
    batch = task.collate([data.sample(i, None) for i in range(6)])
    assert batch["labels"].tolist() == [data.records[i].label for i in range(6)]
    model, tensors = task.build_model(), to_tensors(batch)
    model.eval()
    z = model(tensors["image"].astype("float32") * (2 / 255) - 1, *(tensors[k] for k in ("input_ids", "position_ids", "text_mask"))).numpy()
    wanted = np.mean([np.log(np.exp(row).sum()) - row[label] for row, label in zip(z, batch["labels"])])
    assert float(task.loss(model, tensors)["loss"]) == pytest.approx(wanted, rel=1e-4)


def test_train_and_judge_through_the_commands(config, unimo2, tmp_path):
    path = config()
    assert unimo2("train", "-c", path).status == 0
    best = tmp_path / "run" / "best"
    assert json.loads((best / "task.json").read_text())["labels"] == list(LABELS)
    outcome = unimo2("eval", "-c", path, "-o", f"model.init={best}", "-o", "eval.split=test")
    assert outcome.status == 0, outcome.err
    assert "confusion matrix" in outcome.out and "33.33" in outcome.out
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions" / "test.jsonl").read_text().splitlines()]
    metrics = json.loads((tmp_path / "run" / "predictions" / "test.json").read_text())
    assert metrics["accuracy"] == pytest.approx(100 * np.mean([row["label"] == row["prediction"] for row in rows]))
    assert all(abs(sum(row["scores"].values()) - 1) < 1e-3 for row in rows)
    assert "Confusion matrix" in (tmp_path / "run" / "predictions" / "test.html").read_text()


def test_a_model_whose_head_was_never_trained_is_not_judged(config, unimo2, tmp_path, tiny_pretrained):
    outcome = unimo2("eval", "-c", config(), "-o", f"model.init={tiny_pretrained}")
    assert outcome.status == 2 and "cls_out" in outcome.err


@pytest.fixture
def tiny_pretrained(tmp_path):
    """A directory with the weights of the tiny model but without a classification head."""
    import paddle

    from unimo2_paddle.checkpoints.pretrained import save_pretrained
    from unimo2_paddle.models.unimo2 import Unimo2Model
    from unimo2_paddle.tasks.base import ModelSection

    section = ModelSection(MODEL["config"], overrides={key: value for key, value in MODEL.items() if key != "config"})
    with paddle.utils.unique_name.guard():
        save_pretrained(Unimo2Model(section.model_config()), str(tmp_path / "pretrained"))
    return tmp_path / "pretrained"


def test_wrong_configurations_are_refused(config, tmp_path):
    with pytest.raises(ConfigError, match=r"must contain \{split\}"):
        load_run_config(config(data__annotations="snli.jsonl"))
    task = EntailmentTask(load_run_config(config(model__init=str(tmp_path / "none"))))
    with pytest.raises(CheckpointError, match="does not exist"):
        task.build_model()


def test_in_the_caption_layout_the_sentence_sees_the_patches(config):
    """Without the dictionary's choice of the sentence, only sight of the patches makes the fused text depend on them."""
    import paddle

    from unimo2_paddle.models import fused

    task = EntailmentTask(load_run_config(config(head={"layout": "caption"})))
    data = task.split("train")
    model = task.build_model()
    model.eval()
    batch = to_tensors(task.collate([data.sample(i, None) for i in range(2)]))
    image, text = model.backbone.encode_image(batch["image"].astype("float32") / 255), [batch[k] for k in ("input_ids", "position_ids", "text_mask")]
    text_states = model.backbone.encode_text(*text)
    image.stop_gradient = False
    with fused.plain():
        out = model.backbone.fuse(image, text_states, batch["text_mask"], model.layout, first_only=True, with_grounding_loss=False)
    gradient = paddle.grad(model.backbone.pool_text(out).sum(), image)[0]
    assert float(paddle.abs(gradient[:, 1:]).sum()) > 0
    with pytest.raises(ConfigError, match="layout: 'side' is not one of pair, caption"):
        load_run_config(config(head={"layout": "side"}))
