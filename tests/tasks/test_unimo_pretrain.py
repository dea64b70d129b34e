"""UNIMO's pre-training task: objectives and what they may see, resuming, other numbers of workers, zero-shot retrieval."""
import json
import math
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml
from safetensors.numpy import load_file

from unimo2_paddle.checkpoints.pretrained import save_pretrained
from unimo2_paddle.config import load_run_config
from unimo2_paddle.errors import ConfigError
from unimo2_paddle.models.configuration import UnimoConfig
from unimo2_paddle.models.unimo import UnimoModel
from unimo2_paddle.tasks.base import Shard, task_class, to_tensors
from unimo2_paddle.tasks.unimo_inputs import REGION_INPUTS
from unimo2_paddle.tasks.unimo_pretrain import hide_regions
from unimo2_paddle.tasks.unimo_retrieval import TEXT_INPUTS, take
from unimo2_paddle.tasks.unimo_zeroshot import alone_scores, pool_pictures, pool_texts

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "unimo2_paddle" / "models" / "configs"

NAMES = {"pairs": ("contrastive", "rewriting", "masked_lm", "region_classes", "region_features", "caption"),
         "images": ("region_classes", "region_features"), "texts": ("masked_lm", "seq2seq")}
SINGLE = [(corpus, name) for corpus, names in NAMES.items() for name in names]
ALL_ON = {"train.pairs": {"caption": 0.5}, "mixture.weights": {"pairs": 1, "images": 1, "texts": 1}}


class Run:
    """A task with its model and batches, without the loop."""

    def __init__(self, path, shard=None):
        self.config = load_run_config(path)
        self.task = task_class(self.config.task)(self.config)
        self.model = self.task.build_model()
        self.model.train()
        self.batches = self.task.train_batches(shard or Shard())

    def arrays(self, corpus):
        """The next batch of a corpus."""
        while True:
            batch = next(self.batches)
            if batch["corpus"] == corpus:
                return batch

    def batch(self, corpus):
        return to_tensors(self.arrays(corpus))

    def terms(self, batch):
        return {name: float(value) for name, value in self.task.loss(self.model, batch).items()}


@pytest.fixture
def run(unimo_pretrain_config):
    return lambda changes=None: Run(unimo_pretrain_config(changes))


def alone(corpus, name):
    """Changes that leave one objective of one corpus."""
    return {"mixture.weights": {corpus: 1}, "train.steps": 2, f"train.{corpus}": {other: float(other == name) for other in NAMES[corpus]}}


def test_every_objective_at_once_trains_through_the_command_line(unimo_pretrain_config, unimo2, tmp_path):
    outcome = unimo2("train", "-c", unimo_pretrain_config({**ALL_ON, "train.steps": 16}))
    assert outcome.status == 0, outcome.err
    seen = {key for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() for key in json.loads(line) if "/" in key}
    assert {name for name in seen if "accuracy" not in name} == {f"{corpus}/{name}" for corpus, name in SINGLE}
    assert "got no gradient" not in outcome.out


def test_untrained_losses_start_where_guessing_would(run):
    made = run({**ALL_ON, "model.initializer_range": 0.002})
    terms = {**made.terms(made.batch("pairs")), **made.terms(made.batch("images")), **made.terms(made.batch("texts"))}
    assert terms["pairs/masked_lm"] == pytest.approx(math.log(512), abs=0.3) == pytest.approx(terms["pairs/caption"], abs=0.3)
    assert terms["pairs/region_classes"] == pytest.approx(math.log(16), abs=0.3) == pytest.approx(terms["images/region_classes"], abs=0.3)
    # 8 pictures with 8 texts and as many retrieved ones, of which 2 are right; 1 of 8 the other way
    assert terms["pairs/contrastive"] == pytest.approx(math.log(8), abs=0.4)
    # the pair and one paraphrase against two rewritten and two random pairs
    assert terms["pairs/rewriting"] == pytest.approx(math.log(3), abs=0.1)
    assert all(0 <= value <= 1 for name, value in terms.items() if name.endswith("accuracy"))


@pytest.mark.parametrize("corpus, name", SINGLE)
def test_each_objective_alone_has_its_gradients_and_is_the_loss(run, corpus, name):
    made = run(alone(corpus, name))
    terms = made.task.loss(made.model, made.batch(corpus))
    assert {key.split("/")[1] for key in terms if "/" in key and "accuracy" not in key} == {name}
    assert float(terms["loss"]) == float(terms[f"{corpus}/{name}"]) > 0
    terms["loss"].backward()
    trained = {p.name for p in made.model.parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0}
    head = {"contrastive": None, "rewriting": "match_fc.w_0", "region_classes": "mask_region_class_fc.w_0",
            "region_features": "mask_region_feature_fc.w_0"}.get(name, "mask_lm_trans_fc.w_0")
    heads = {"match_fc.w_0", "mask_region_class_fc.w_0", "mask_region_feature_fc.w_0", "mask_lm_trans_fc.w_0"}
    assert trained & heads == {head} - {None} and "encoder_layer_0_ffn_fc_0.w_0" in trained
    assert ("image_emb.w_0" in trained) == (corpus != "texts") and ("word_embedding" in trained) == (corpus != "images")


def test_every_parameter_is_trained_by_some_objective(run):
    made = run(ALL_ON)
    for corpus in ("pairs", "images", "texts"):
        made.task.loss(made.model, made.batch(corpus))["loss"].backward()
    untrained = {p.name for p in made.model.parameters() if p.grad is None or float(p.grad.abs().sum()) == 0}
    assert untrained <= {"match_fc.b_0"}, "adding the same to all scores changes no choice among them"


def test_the_loss_is_the_weighted_sum_of_the_terms(run):
    weights = {"contrastive": 2.0, "rewriting": 0.5, "masked_lm": 1.5, "region_classes": 0.25, "region_features": 3.0, "caption": 0.75}
    made = run({**ALL_ON, "train.pairs": weights})
    terms = made.terms(made.batch("pairs"))
    assert terms["loss"] == pytest.approx(sum(weights[name] * terms[f"pairs/{name}"] for name in weights), rel=1e-5)


def test_hidden_regions_leave_nothing_in_the_features():
    features = paddle.randn([3, 5, 4])
    features[:, 0] = features[:, 1:4].mean(axis=1)
    mask = paddle.to_tensor([[1, 1, 1, 1, 0]] * 3, dtype="float32")
    hidden = paddle.to_tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0]], dtype="float32")
    found = hide_regions(features, mask, hidden).numpy()
    clean = features.numpy()
    np.testing.assert_allclose(found[0, 0], (clean[0, 1] + clean[0, 3]) / 2, rtol=1e-5)
    assert (found[0, 2] == 0).all() and (found[0, 1] == clean[0, 1]).all()
    np.testing.assert_array_equal(found[1, :4], clean[1, :4])
    assert (found[2] == 0).all(), "a picture whose regions are all hidden shows nothing"


@pytest.mark.parametrize("corpus", ["pairs", "images"])
def test_a_masked_region_is_predicted_without_its_features(run, corpus):
    made = run({**ALL_ON, "train.pairs": {"contrastive": 0, "rewriting": 0}})
    made.model.eval()
    batch = made.batch(corpus)
    hidden = batch["hidden"].unsqueeze(2)
    changed = dict(batch)
    features = batch["image_features"]
    changed["image_features"] = features * (1 - hidden) + 7.0 * hidden  # their share of the global region is hidden as well
    changed["image_features"][:, 0] = features[:, 0] + (hidden.sum(axis=1) > 0).astype("float32")
    first, second = made.terms(batch), made.terms(changed)
    assert second[f"{corpus}/region_classes"] == first[f"{corpus}/region_classes"]
    assert second[f"{corpus}/region_features"] != first[f"{corpus}/region_features"], "they are what is to be predicted"


@pytest.mark.parametrize("corpus", ["pairs", "texts"])
def test_masked_words_are_predicted_from_the_masked_text_alone(run, corpus):
    made = run({**ALL_ON, "train.pairs": {"contrastive": 0, "rewriting": 0, "caption": 0}, "train.texts": {"seq2seq": 0}})
    made.model.eval()
    batch = made.batch(corpus)
    first = made.terms(batch)[f"{corpus}/masked_lm"]
    assert made.terms({**batch, "input_ids": paddle.full_like(batch["input_ids"], 9)})[f"{corpus}/masked_lm"] == first
    assert made.terms({**batch, "masked_ids": paddle.full_like(batch["masked_ids"], 9)})[f"{corpus}/masked_lm"] != first


def test_a_caption_token_is_predicted_from_what_stands_before_it(run):
    made = run(alone("pairs", "caption"))
    made.model.eval()
    batch = made.batch("pairs")
    picture, text = made.task._fused(batch, causal=True)
    changed = {**text, "input_ids": text["input_ids"].clone()}
    changed["input_ids"][:, 6] = (changed["input_ids"][:, 6] + 7) % 500 + 4
    first, second = (made.model(**picture, **given).text_states.numpy() for given in (text, changed))
    assert np.abs(first[:, :6] - second[:, :6]).max() < 1e-5 < np.abs(first[:, 6] - second[:, 6]).max()


def test_padding_does_not_change_a_loss(run):
    made = run(ALL_ON)
    made.model.eval()
    batch, extra = made.batch("pairs"), 3
    wider = dict(batch)
    for key, value in batch.items():
        if isinstance(value, paddle.Tensor) and key.endswith(("image_features", "image_location", "image_mask", "hidden")):
            shape = [value.shape[0], extra, *value.shape[2:]]
            wider[key] = paddle.concat([value, paddle.zeros(shape, value.dtype)], axis=1)
        if isinstance(value, paddle.Tensor) and key.endswith(("_ids", "text_mask")):
            wider[key] = paddle.concat([value, paddle.full([value.shape[0], extra], 0 if key.endswith("mask") else 1, value.dtype)], axis=1)
    for key, old in (("predict_from", batch["masked_ids"]), ("predict_regions", batch["image_mask"])):
        wider[key] = batch[key] + batch[key] // old.shape[1] * extra
    first, second = made.terms(batch), made.terms(wider)
    assert first.keys() == second.keys()
    for key in first:
        assert second[key] == pytest.approx(first[key], rel=2e-5, abs=2e-6), key


def test_retrieved_companions_are_right_answers_of_their_owner_alone(run):
    """Moving a retrieved text to another owner changes the loss; one that is not there counts neither way."""
    made = run({**alone("pairs", "contrastive"), "model.initializer_range": 0.3})
    made.model.eval()
    batch = made.batch("pairs")
    first = made.terms(batch)["pairs/contrastive"]
    order = paddle.to_tensor([4, 5, 6, 7, 0, 1, 2, 3])
    names = [key for key in batch if key.startswith("related_text_")]
    moved = {**batch, **{key: paddle.index_select(batch[key], order) for key in names}}
    assert made.terms(moved)["pairs/contrastive"] != pytest.approx(first, rel=1e-4)
    nobody = {**batch, "related_text_real": paddle.zeros([8])}
    garbage = {**nobody, "related_text_input_ids": paddle.full_like(batch["related_text_input_ids"], 11)}
    without = {key: value for key, value in batch.items() if key not in names}
    for other in (nobody, garbage):
        assert made.terms(other)["pairs/contrastive"] == pytest.approx(made.terms(without)["pairs/contrastive"], rel=1e-5)


def test_a_pair_is_judged_alone_by_the_cosine_of_its_pooled_sides(run):
    made = run(ALL_ON)
    made.model.eval()
    batch = made.batch("pairs")
    images, texts = pool_pictures(made.model, batch), pool_texts(made.model, batch, 8)
    found = alone_scores(images, texts).numpy()
    one, other = images.numpy()[3], texts.numpy()[5]
    assert found[3, 5] == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), rel=1e-4)
    np.testing.assert_allclose(alone_scores(texts, images).numpy().T, found, rtol=1e-4, atol=1e-5)
    together = made.model(**take(batch, REGION_INPUTS, np.arange(8)), **take(batch, TEXT_INPUTS, np.arange(8)), first_only=True)
    assert np.abs(made.model.pool_image(together).numpy() - images.numpy()).max() > 1e-3, "alone, a picture is read without its caption"


@pytest.mark.parametrize("name, keys", [("masked_lm", ("labels", "predict_from")), ("region_classes", ("region_classes", "predict_regions")),
                                        ("region_features", ("region_classes", "predict_regions"))])
def test_a_worker_without_masked_words_or_regions_has_no_loss_of_them(run, name, keys):
    made = run({**alone("pairs", name), "train.pairs": {**{other: 0.0 for other in NAMES["pairs"]}, name: 1.0, "region_classes": 1.0}})
    batch = made.batch("pairs")
    for key in keys:
        batch[key] = batch[key][:0]
    terms = made.task.loss(made.model, batch)
    terms["loss"].backward()
    assert float(terms[f"pairs/{name}"]) == 0 and math.isfinite(float(terms["loss"]))


def test_zero_shot_retrieval_during_training_and_from_the_command_line(unimo_pretrain_config, unimo2, tmp_path, demo_data, unimo_corpora):
    settings = {"split": "val", "annotations": str(demo_data / "retrieval" / "dataset_shapes.json"), "max_images": 6, "captions_per_image": 1,
                "regions": str(unimo_corpora / "dev")}
    path = unimo_pretrain_config({**ALL_ON, "train.steps": 2, "eval": settings})
    outcome = unimo2("train", "-c", path)
    assert outcome.status == 0, outcome.err
    (judged,) = [row for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "val"]
    outcome = unimo2("eval", "-c", path, "-o", f"model.init={tmp_path / 'run' / 'best'}")
    assert outcome.status == 0, outcome.err
    again = json.loads((tmp_path / "run" / "predictions" / "results.json").read_text())["metrics"]
    assert {"ir_r1", "tr_r1", "recall_mean", "alone_ir_r1", "alone_recall_mean"} <= set(again)
    told = {key.split("/")[-1]: value for key, value in judged.items()}
    assert {key: told[key] for key in ("recall_mean", "alone_recall_mean")} == {key: again[key] for key in ("recall_mean", "alone_recall_mean")}


def test_a_run_resumed_in_the_middle_ends_as_the_uninterrupted_one(unimo_pretrain_config, unimo2, tmp_path):
    changes = {**ALL_ON, "train.steps": 6, "run.save_every": 3, "data.num_workers": 0}
    whole = unimo2("train", "-c", unimo_pretrain_config({**changes, "run.output": str(tmp_path / "whole")}))
    assert whole.status == 0, whole.err
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoints" / "step-000006")
    shutil.rmtree(tmp_path / "half" / "best")
    outcome = unimo2("train", "-c", unimo_pretrain_config({**changes, "run.output": str(tmp_path / "half")}), "--resume", "auto")
    assert outcome.status == 0 and "steps 3 to 6" in outcome.out, outcome.err
    one, other = (load_file(tmp_path / name / "best" / "model.safetensors") for name in ("whole", "half"))
    assert all((one[name] == other[name]).all() for name in one)


def test_a_released_model_gets_the_heads_it_lacks(unimo_pretrain_config, tmp_path):
    config = UnimoConfig.from_json(str(CONFIGS / "unimo_demo.json"), hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    with paddle.utils.unique_name.guard():
        released = UnimoModel(config)
    save_pretrained(released, str(tmp_path / "released"))
    made = Run(unimo_pretrain_config({"model.init": str(tmp_path / "released")}))
    own = {p.name: p for p in made.model.parameters()}
    assert all((own[p.name].numpy() == p.numpy()).all() for p in released.parameters())
    assert {"match_fc.w_0", "mask_region_trans_fc.w_0"} <= set(own) - {p.name for p in released.parameters()}


@pytest.mark.parametrize("changes, problem", [
    ({"mixture.global_batch": {"pairs": 6, "images": 4, "texts": 8}}, "6 pairs per micro-batch are not a multiple of train.candidates.group 4"),
    ({"train.candidates": {"hard_negatives": 0, "random_negatives": 0}}, "candidates: rewriting needs negatives"),
    ({"train.candidates": {"group": 1}}, "group: must be at least 2, is 1"),
    ({"train.candidates": {"group": 4, "random_negatives": 7}}, "random_negatives: a group of 4 has 6 others, 7 are asked for"),
    ({"train.candidates": {"group": 4, "levels": ["letter"]}}, "levels: letter is not of sentence, phrase, word"),
    ({"train.candidates": {"group": 4, "joint_per_group": 5}}, "joint_per_group: must be between 0 and group 4, is 5"),
    ({"data.pairs": [{"regions": "r", "captions": "c"}]}, "train.candidates: asks for rewritten or related candidates, but no source"),
    ({"data.pairs": [{"regions": "r", "captions": "c", "format": "tsv"}]}, "format: 'tsv' is not one of shards, karpathy"),
    ({"data.images": [], "mixture.weights": {"pairs": 1}, "train.candidates": {"group": 4}}, "data.related: is required"),
    ({"train.texts": {"masked_lm": 0, "seq2seq": 0}}, "train.texts: no objective is above 0"),
    ({"train.images": {"region_classes": -1}}, "region_classes: a weight must not be negative"),
    ({"model.image_predict_class": False}, "train.pairs.region_classes: the model does not predict them; set model.image_predict_class: true"),
    ({"train.temperature": 0}, "temperature: must be above 0"),
    ({"eval": {"annotations": "a.json"}}, "regions: is empty; give the store of the pictures"),
    ({"run.graph": "static"}, "run.graph: unimo_pretrain does not run as a static Program"),
])
def test_settings_that_cannot_work_are_refused_before_anything_runs(unimo_pretrain_config, changes, problem):
    with pytest.raises(ConfigError) as caught:
        load_run_config(unimo_pretrain_config(changes))
    assert problem in str(caught.value)


def test_a_model_of_the_other_system_is_refused(unimo_pretrain_config):
    with pytest.raises(ConfigError, match="unimo2_demo is a model of UNIMO-2"):
        Run(unimo_pretrain_config({"model": {"config": "unimo2_demo"}}))


@pytest.mark.parametrize("size", ["base", "large", "demo"])
def test_the_bundled_configs_run_two_steps_in_small(size, tiny_unimo_pretrain, unimo_corpora, demo_data, tmp_path, unimo2):
    values = yaml.safe_load((ROOT / "run_configs" / "unimo" / f"pretrain_{size}.yaml").read_text(encoding="utf-8"))
    tiny = tiny_unimo_pretrain(tmp_path / "run")
    values["model"] = {**values["model"], **{key: value for key, value in tiny["model"].items() if key != "config"}, "init": "", "vocab_size": 512,
                       "image_embedding_size": 64, "max_position_embeddings": 130, "image_class_size": 16}
    values["data"].update({key: tiny["data"][key] for key in ("vocab", "pairs", "images", "texts")}, cache_dir=str(tmp_path / "index"), num_workers=0)
    values["train"]["steps"] = 2
    values["train"]["candidates"].update(group=4, joint_per_group=2)
    values["mixture"]["global_batch"] = {"pairs": 4, "images": 2, "texts": 2}
    values["eval"].update(annotations=str(demo_data / "retrieval" / "dataset_shapes.json"), regions=str(unimo_corpora / "dev"), max_images=4)
    values["run"].update(output=str(tmp_path / "run"), progress=False, log_every=1)
    if paddle.__version__.startswith("2."):
        values["run"]["recompute"] = False  # Paddle 2.6.2 cannot recompute on CPU
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    outcome = unimo2("train", "-c", tmp_path / "small.yaml")
    assert outcome.status == 0, outcome.err
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["train", "train", "val"]
