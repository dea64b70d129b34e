"""UNIMO's tasks on pictures: regions instead of pixels in captioning, retrieval and entailment; adversarial training; what is refused."""
import copy
import dataclasses
import json

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
import yaml

from unimo2_paddle.checkpoints.pretrained import save_pretrained
from unimo2_paddle.config import load_run_config
from unimo2_paddle.data.demo_tasks import captioning, entailment, regions
from unimo2_paddle.data.formats.bottom_up import BOTTOM_UP
from unimo2_paddle.data.formats.coco_captions import filelist_paths
from unimo2_paddle.data.formats.regions import read_regions
from unimo2_paddle.data.region_import import import_regions
from unimo2_paddle.errors import ConfigError, DataError, UserInputError
from unimo2_paddle.models.flops import prediction_flops, unimo_flops
from unimo2_paddle.models.losses import retrieval_circle_loss, smoothed_cross_entropy
from unimo2_paddle.serving.predictor import Predictor
from unimo2_paddle.tasks.base import task_class, to_tensors
from unimo2_paddle.tasks.unimo_retrieval import all_scores

SMALL = {"config": "unimo_demo", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def world(demo_data, tmp_path_factory):
    """A folder with the demo's annotations, its region files and their stores: ``store`` of all pictures, ``told_{split}`` and
    ``judged_{split}`` of the authors' captioning and entailment records, ``found`` of their retrieval files."""
    out = tmp_path_factory.mktemp("unimo")
    captioning.write(str(out / "captioning"), str(demo_data), 1)
    entailment.write(str(out / "entailment"), str(demo_data), 1)
    regions.write(str(out / "regions"), str(demo_data), 1)

    def keep(name, paths, layout):
        import_regions([str(path) for path in paths], out / name, layout, show_progress=False)

    keep("store", sorted((out / "regions" / "bottom_up").glob("*.tsv")), "bottom_up")
    for own, split in (("train", "train"), ("valid", "val")):
        keep(f"told_{split}", filelist_paths(out / "regions" / "captioning" / f"{own}_filelist"), "captioning")
    for split in ("train", "dev", "test"):
        keep(f"judged_{split}", filelist_paths(out / "regions" / "entailment" / f"{split}_filelist"), "entailment")
    keep("found", sorted((out / "regions" / "retrieval" / "features").glob("*/part*")), "retrieval")
    return out


@pytest.fixture
def make(world, demo_data, tmp_path):
    """A function: task, changes -> path of its tiny run config."""
    base = {
        "captioning": {
            "data": {"annotations": str(world / "captioning" / "dataset_shapes.json"), "max_text_len": 40,
                     "objects": str(world / "regions" / "captioning" / "shapes_object_0.35_tot.ids")},
            "eval": {"split": "val", "max_images": 6, "batch_size": 4, "java_metrics": False, "every_epochs": 0,
                     "decoding": {"beam_size": 2, "max_length": 8, "min_length": 2}},
        },
        "retrieval": {
            "data": {"annotations": str(demo_data / "retrieval" / "dataset_shapes.json"), "max_text_len": 40},
            "train": {"image_negatives": 2, "caption_negatives": 3},
            "eval": {"split": "val", "max_images": 5, "pair_batch": 7, "image_batch": 3, "every_epochs": 0},
        },
        "entailment": {
            "data": {"annotations": str(world / "entailment" / "snli_ve_{split}.jsonl"), "max_text_len": 40},
            "eval": {"split": "dev", "every_epochs": 0},
        },
    }

    def build(task, **changes):
        values = {"task": task, "model": dict(SMALL), "train": {}, "optim": {"learning_rate": 1e-3},
                  "run": {"output": str(tmp_path / "run"), "progress": False, "log_every": 1}, **copy.deepcopy(base[task])}
        # the demo's entailment files number their pictures, so their features are those of the entailment records
        values["data"].update(vocab=str(demo_data / "vocab"), regions=str(world / ("judged_{split}" if task == "entailment" else "store")))
        values["train"].update(batch_size=4, max_steps=2)
        for path, value in changes.items():
            *groups, key = path.split("__")
            target = values
            for group in groups:
                target = target.setdefault(group, {})
            target[key] = value
        path = tmp_path / f"run{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    return build


def task_of(path):
    config = load_run_config(path)
    return task_class(config.task)(config)


def batch_of(task, count=3):
    data = task.split("train")
    return task.collate([data.sample(index, np.random.default_rng(index)) for index in range(count)])


def lively(model):
    """A model in evaluation mode whose weights are large enough that every input matters."""
    paddle.seed(5)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.set_value(paddle.randn(parameter.shape) * 0.2)
    model.eval()
    return model


@pytest.mark.parametrize("task", ["captioning", "retrieval", "entailment"])
def test_a_task_trains_judges_and_predicts_through_the_commands(make, unimo2, world, tmp_path, task):
    config = make(task)
    trained = unimo2("train", "-c", config)
    assert trained.status == 0, trained.err
    best = tmp_path / "run" / "best"
    assert json.loads((best / "config.json").read_text())["vocab_size"] == 512
    judged = unimo2("eval", "-c", config, "-o", f"model.init={best}", "-o", "eval.split=test", "-o", f"run.output={tmp_path / 'judged'}")
    assert judged.status == 0, judged.err
    predicted = unimo2("predict", "--model", best, "--regions", world / "store", "--image", "test00000",
                       "--text", {"captioning": "red square", "retrieval": "A red square.", "entailment": "There is a red square."}[task])
    assert predicted.status == 0, predicted.err
    assert set(json.loads(predicted.out)) >= {{"captioning": "caption", "retrieval": "score", "entailment": "label"}[task]}
    assert {"captioning": "cider", "retrieval": "matching", "entailment": "accuracy"}[task] in judged.out
    page = next((tmp_path / "judged" / "predictions").glob("*.html")).read_text()
    assert "<img" not in page or task == "retrieval"  # there are no picture files


def test_object_tags_are_a_segment_of_their_own_and_the_loss_is_that_of_the_caption(make):
    task = task_of(make("captioning"))
    model, batch = lively(task.build_model()), to_tensors(batch_of(task))
    assert set(batch) >= {"image_features", "image_location", "image_mask", "tag_ids", "input_ids", "predict_from"} and "image" not in batch
    assert batch["input_ids"].shape[1] == max(len(task.split("train").caption_ids(0, k)) for k in range(3)), "no tags before the caption"
    inputs = {name: batch[name] for name in ("image_features", "image_location", "image_mask", "input_ids", "position_ids", "text_mask")}
    out = model(**inputs, object_ids=batch["tag_ids"], object_positions=batch["tag_positions"], object_mask=batch["tag_mask"])
    states = out.text_states.reshape([-1, 16]).numpy()[batch["predict_from"].numpy()]
    expected = smoothed_cross_entropy(model.mlm_logits(paddle.to_tensor(states)), batch["labels"], 0.1)
    assert float(task.loss(model, batch)["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_the_authors_records_give_the_captions_and_hypotheses_of_the_annotations(make, world):
    told = task_of(make("captioning", data__format="store", data__annotations="", data__regions=str(world / "told_{split}"),
                        data__references=str(world / "captioning" / "captions_{split}.json")))
    plain = task_of(make("captioning"))
    one, other = told.split("train"), plain.split("train")
    assert len(one) == len(other) and one.references(3) == [text for text in other.references(3)]
    for number in (0, 7, 20):
        a, b = one.sample(number, None), other.sample(number, None)
        assert a["caption"] == b["caption"] and a["tags"] == b["tags"]
        np.testing.assert_array_equal(a["image"].features, b["image"].features)
    assert told.split("val").references(0) == plain.split("val").references(0)
    judged = task_of(make("entailment", data__format="store", data__annotations="", data__regions=str(world / "judged_{split}")))
    other = task_of(make("entailment")).split("train")
    one = judged.split("train")
    assert [h.label for h in one.records] == [h.label for h in other.records] and [h.text for h in one.records] == [h.text for h in other.records]
    assert one.sample(4, None)["ids"] == other.sample(4, None)["ids"]


def test_retrieval_by_the_authors_ids_reads_the_pictures_those_name(make, world, demo_data):
    ids = task_of(make("retrieval", data__format="ids", data__annotations=str(world / "regions" / "retrieval" / "textids"),
                       data__regions=str(world / "found"))).split("val").dataset
    plain = task_of(make("retrieval")).split("val").dataset
    assert ids.tokens == plain.tokens and ids.text_image.tolist() == plain.text_image.tolist()
    np.testing.assert_allclose(ids.picture_arrays([2, 0])["image_location"], plain.picture_arrays([2, 0])["image_location"], atol=1e-6)


def test_scores_of_all_pairs_equal_a_forward_of_each(make):
    task = task_of(make("retrieval"))
    model, evaluator = lively(task.build_model()), task.evaluators()[0]
    evaluator.run(model)
    dataset, found = evaluator.dataset, evaluator.scores.retrieval
    expected = np.zeros_like(found)
    with paddle.no_grad():
        for text in range(len(dataset.captions)):
            for image in range(len(dataset)):
                pair = to_tensors({**dataset.picture_arrays([image]), **dict(zip(("input_ids", "position_ids", "text_mask"), dataset.text_batch([text])))})
                expected[text, image] = float(model.matching_score(model(**pair)))
    assert expected.std() > 0.01 and evaluator.scores.contrastive is None
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(all_scores(model, dataset, 2, 3).retrieval, expected, atol=1e-5)


@pytest.mark.parametrize("use_sigmoid", [False, True])
def test_the_circle_loss_is_that_of_separate_forwards(make, use_sigmoid):
    task = task_of(make("retrieval", train__use_sigmoid=use_sigmoid))
    model, dataset = lively(task.build_model()), task.split("train").dataset
    samples = [task.split("train").sample(index, np.random.default_rng(index)) for index in (0, 9)]
    terms = task.loss(model, to_tensors(task.collate(samples)))
    scores = []
    for sample in samples:
        for image, text in zip(sample["images"].tolist(), sample["texts"].tolist()):
            pair = {**dataset.picture_arrays([image]), **dict(zip(("input_ids", "position_ids", "text_mask"), dataset.text_batch([text])))}
            scores.append(float(model.matching_score(model(**to_tensors(pair)))))
    scores = paddle.to_tensor(np.array(scores, "float32").reshape(2, 6))
    loss, captions, images = retrieval_circle_loss(F.sigmoid(scores) if use_sigmoid else scores, 0.2, 1.0, 2)
    assert [float(terms[name]) for name in ("loss", "caption_negatives", "image_negatives")] == pytest.approx([float(loss), float(captions), float(images)],
                                                                                                              abs=1e-5)


@pytest.mark.parametrize("task", ["captioning", "entailment"])
@pytest.mark.parametrize("form", ["authors", "textbook"])
def test_adversarial_training_without_perturbation_is_the_plain_loss_three_times(make, task, form):
    """Nothing to start from and no step: all three passes of an iteration are clean, and they do not diverge."""
    perturbed = task_of(make(task, adversarial={"adv_type": "villa", "adv_step": 2, "adv_init_mag": 0.0, "adv_lr": 0.0, "form": form}))
    model = lively(perturbed.build_model())
    batch = to_tensors(batch_of(perturbed))
    plain, terms = task_of(make(task)).loss(model, batch), perturbed.loss(model, batch)
    assert float(terms["loss"]) == pytest.approx(3 * float(plain["loss"]), rel=1e-5)
    assert float(terms["adversarial_divergence"]) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("task", ["captioning", "entailment"])
def test_perturbed_inputs_cost_more_and_every_weight_learns_from_them(make, task):
    perturbed = task_of(make(task, adversarial={"adv_type": "villa", "adv_step": 3, "adv_init_mag": 0.5, "adv_lr": 2.0, "adv_max_norm": 0.0}))
    model, batch = lively(perturbed.build_model()), to_tensors(batch_of(perturbed))
    terms = perturbed.loss(model, batch)
    assert float(terms["adversarial_text"]) > float(terms["adversarial_clean"]) < float(terms["adversarial_image"])
    terms["loss"].backward()
    unused = {p.name for p in model.parameters() if p.grad is None or not np.abs(p.grad.numpy()).max() > 0}
    assert not {name for name in unused if "key_fc.b_0" not in name}, unused


@pytest.mark.parametrize("task", ["captioning", "entailment"])
def test_an_adversarial_run_goes_through_the_command(make, unimo2, tmp_path, task):
    outcome = unimo2("train", "-c", make(task, train__max_steps=1, adversarial={"adv_type": "villa", "adv_step": 2}))
    assert outcome.status == 0, outcome.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("adversarial_divergence" in row for row in rows)


def test_captions_learn_from_rewards_with_regions_too(make):
    task = task_of(make("captioning", train__scst=True, train__scst_samples=2, train__scst_baseline="others"))
    model = task.build_model()
    terms = task.loss(model, to_tensors(batch_of(task, 2)))
    terms["loss"].backward()
    assert np.isfinite(float(terms["loss"])) and np.isfinite(float(terms["reward"]))


def test_captions_beyond_the_limit_are_counted_with_or_without_token_ids(make, world, caplog):
    for changes in ({}, {"data__format": "store", "data__annotations": "", "data__regions": str(world / "told_{split}")}):
        caplog.clear()
        data = task_of(make("captioning", data__max_text_len=12, **changes)).split("train")
        cut = sum(len(data.references(n)[k].split()) > 10 for n, k in data.items)
        assert "captions are longer than data.max_text_len 12 and lose their end" in caplog.text and cut <= data.cut_captions() < len(data)
        assert max(len(data.sample(index, None)["caption"]) for index in range(20)) == 12
    caplog.clear()
    task_of(make("captioning", data__max_text_len=60)).split("train")
    assert "lose their end" not in caplog.text


@pytest.mark.parametrize("task, changes, told", [
    ("entailment", {"data__regions": ""}, ["images: is empty", "store of region features"]),
    ("entailment", {"data__regions": "", "data__images": "pictures"}, ["data.regions: is empty", "unimo2 features import"]),
    ("captioning", {"model__config": "unimo2_demo", "model__hidden_size": 96, "model__num_attention_heads": 4}, ["data.regions: UNIMO-2 reads pixels"]),
    ("retrieval", {"eval__rerank_k": 8}, ["eval.rerank_k", "set eval.rerank_k=all"]),
    ("retrieval", {"train__objective": "in_batch"}, ["train.objective", "circle"]),
    ("entailment", {"head": {"contrastive": True}}, ["head: layout and contrastive are UNIMO-2's"]),
    ("entailment", {"adversarial": {"adv_type": "villla", "adv_step": 0}}, ["adversarial.adv_type: 'villla'", "adversarial.adv_step: must be at least 1"]),
    ("captioning", {"adversarial": {"adv_type": "villa"}, "run__graph": "static"}, ["run.graph=static cannot", "set run.graph=dynamic"]),
    ("captioning", {"adversarial": {"adv_type": "villa"}, "train__scst": True}, ["train.scst set none"]),
    ("captioning", {"data__max_regions": 1}, ["data.max_regions: must be at least 2"]),
    ("captioning", {"data__format": "store"}, ["data.regions: must contain {split}"]),
])
def test_what_does_not_go_together_is_said_before_anything_is_read(make, unimo2, task, changes, told):
    outcome = unimo2("validate", "-c", make(task, **changes))
    assert outcome.status == 2
    for words in told:
        assert words in outcome.err, outcome.err


def test_features_of_another_width_are_refused_with_both_widths(make, unimo2):
    outcome = unimo2("train", "-c", make("entailment", model__image_embedding_size=2048))
    assert outcome.status == 2 and "features are 64 wide, the model's image_embedding_size is 2048" in outcome.err


def test_pictures_without_features_are_counted_and_named(make, world):
    with pytest.raises(DataError, match=r"judged_dev: has no regions for \d+ of \d+ pictures of split 'train', the first is '\w+'"):
        task_of(make("entailment", data__regions=str(world / "judged_dev"), data__annotations=str(world / "entailment" / "snli_ve_{split}.jsonl"))
                ).split("train")


def test_pictures_without_object_tags_are_counted_and_named(make, world, tmp_path):
    lines = (world / "regions" / "captioning" / "shapes_object_0.35_tot.ids").read_text().splitlines()
    (tmp_path / "few.ids").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(DataError, match=r"few.ids: no object tags for 1 of \d+ pictures, the first is 1$"):
        task_of(make("captioning", data__objects=str(tmp_path / "few.ids"))).split("train")


def test_a_store_without_texts_is_no_store_of_captions_or_hypotheses(make, world):
    (world / "plain_train").exists() or (world / "plain_train").symlink_to(world / "store")
    for task, told in (("captioning", "--format captioning"), ("entailment", "--format entailment")):
        with pytest.raises(DataError, match=told):
            task_of(make(task, data__format="store", data__annotations="", data__regions=str(world / "plain_{split}"))).split("train")


def test_a_model_of_unimo_2_is_not_read_as_one_of_unimo(make, demo_data):
    with pytest.raises((ConfigError, UserInputError), match="UNIMO"):
        task_of(make("retrieval", model={"config": "unimo2_demo"}))


@pytest.fixture
def predictor(make, world, tmp_path):
    """A predictor of an untrained captioner without tags that decodes short texts."""
    task = task_of(make("captioning", data__objects=""))
    save_pretrained(task.build_model(), str(tmp_path / "model"))
    task.save_assets(str(tmp_path / "model"))
    return lambda **more: Predictor(str(tmp_path / "model"), **more)


def test_a_prediction_takes_a_name_in_the_store_regions_or_a_record(predictor, world):
    found = predictor(regions=world / "store")
    regions = found.kind.regions.store["dev00001"]
    place, record = next(read_regions(world / "regions" / "bottom_up" / "dev.tsv", BOTTOM_UP))
    assert found(image="dev00001") == found(image=regions)
    assert found(image=record).caption == found(image=record.image_id).caption
    assert predictor()(image=regions) == found(image=regions)


def test_what_a_prediction_cannot_read_is_said(predictor, world, tmp_path):
    found = predictor(regions=world / "store")
    with pytest.raises(DataError, match="has no regions of picture 'nobody'"):
        found(image="nobody")
    with pytest.raises(UserInputError, match="request 1: a model of UNIMO reads region features: name their store"):
        predictor()(image="dev00001")
    with pytest.raises(UserInputError, match="must be the name of a picture in the store"):
        found(image=b"bytes")
    regions = found.kind.regions.store["dev00001"]
    with pytest.raises(UserInputError, match=r"features are \[\d+, 3\], the model needs at least one region of 64"):
        found(image=dataclasses.replace(regions, features=regions.features[:, :3]))
    with pytest.raises(UserInputError, match=r"features are \[0, 64\]"):
        found(image=dataclasses.replace(regions, features=regions.features[:0]))


@pytest.mark.parametrize("task, passes", [("captioning", 1), ("entailment", 1), ("entailment", 6), ("retrieval", 1)])
def test_the_work_of_a_batch_is_that_of_its_encoder_passes(make, task, passes):
    changes = {"adversarial": {"adv_type": "villa", "adv_step": 2}} if passes > 1 else {}
    task = task_of(make(task, **changes))
    batch, config = batch_of(task), task.config.model.model_config()
    tokens, flops = task.work(batch)
    pairs, rows = (batch["pair_image"].size, 2) if "pair_image" in batch else (3, None if "predict_from" in batch else 2)
    tags = batch["tag_mask"] if "tag_mask" in batch else np.zeros([3, 0])
    expected = unimo_flops(config, pairs, batch["image_mask"].shape[1], tags.shape[1], batch["input_ids"].shape[1], first_only=rows is not None)
    if rows is None:
        expected += prediction_flops(config, len(batch["labels"]), 512)
    assert flops == pytest.approx(3 * passes * expected)
    assert tokens == batch["image_mask"].sum() + tags.sum() + (batch["position_ids"] != 1).sum()


@pytest.mark.skipif(paddle.__version__.startswith("2."), reason="Paddle 2.6.2 cannot recompute on CPU")
def test_recomputed_activations_give_the_same_adversarial_gradients(make):
    task = task_of(make("entailment", adversarial={"adv_type": "villa", "adv_step": 2}))
    model, batch, found = lively(task.build_model()), to_tensors(batch_of(task)), []
    model.train()  # in evaluation mode nothing is recomputed; the head's dropout is the same by the seed
    for recompute in (False, True):
        model.set_recompute(recompute)
        model.clear_gradients()
        paddle.seed(3)
        task.loss(model, batch)["loss"].backward()
        found.append({p.name: p.grad.numpy().copy() for p in model.parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, gradient in found[0].items():
        np.testing.assert_allclose(found[1][name], gradient, atol=1e-6, err_msg=name)
