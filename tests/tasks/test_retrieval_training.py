"""Retrieval finetuning: gathered pairs equal separate forwards, negatives are negatives, the shortlist keeps its promises, runs end to end."""
import json
import os

import numpy as np
import paddle
import pytest
import yaml

from unimo2_paddle import Tokenizer, Unimo2Config, Unimo2Model
from unimo2_paddle.config import load_run_config
from unimo2_paddle.data.mixture import generator
from unimo2_paddle.errors import ConfigError, DataError
from unimo2_paddle.models.losses import retrieval_circle_loss
from unimo2_paddle.tasks import retrieval_scoring
from unimo2_paddle.tasks.base import Shard, normalise_tensor, to_tensors
from unimo2_paddle.tasks.retrieval import RetrievalDataset, RetrievalEvaluator, RetrievalTask, shortlist_metrics
from unimo2_paddle.tasks.retrieval_training import CirclePairs, InBatchPairs, RetrievalTrain, circle_terms, collate_pairs, in_batch_terms
from unimo2_paddle.training.loop import schedule_of

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture(scope="module")
def train_split(demo_data):
    """The training pictures of the tiny demo data."""
    return RetrievalDataset.from_karpathy(str(demo_data / "retrieval" / "dataset_shapes.json"), str(demo_data / "retrieval" / "images"),
                                          Tokenizer.from_directory(str(demo_data / "vocab")), split="val", max_images=8)


def random_model(config, **overrides):
    """A model in evaluation mode whose every weight matters."""
    config = Unimo2Config.from_dict({**config.to_dict(), **overrides})
    with paddle.utils.unique_name.guard():
        model = Unimo2Model(config, heads=("pooling", "matching"))
    rng = np.random.default_rng(5)
    for parameter in sorted(model.parameters(), key=lambda p: p.name):
        if parameter.name == "topk_temperature":
            parameter.set_value(np.array([1.0], "float32"))
        elif parameter.name != "cmcl_temperature":
            parameter.set_value(rng.normal(float(parameter.name.endswith("_scale")), 0.2, parameter.shape).astype("float32"))
    model.eval()
    return model


def gradients(model, loss):
    """Gradients by parameter name; those of an earlier loss are dropped."""
    for parameter in model.parameters():
        parameter.clear_gradient(False)
    loss.backward()
    return {p.name: p.grad.numpy().copy() for p in model.parameters() if p.grad is not None}


def one_pair(model, dataset, image, text):
    """The output of a plain forward of one pair, nothing shared, no padding."""
    ids, positions, mask = (paddle.to_tensor(a) for a in dataset.text_batch([text]))
    picture = normalise_tensor(paddle.to_tensor(dataset.pictures(image, image + 1, model.config.image_size)))
    return model(picture, ids, positions, mask)


def circle_batch(dataset, count, negatives, image_size):
    data = CirclePairs(dataset, *negatives)
    samples = [data.sample(index, generator(3, index)) for index in range(0, 3 * count, 3)]
    return samples, collate_pairs(samples, dataset, image_size)


@pytest.mark.parametrize("overrides", [{}, {"model_type": "baseline"}, {"grounding_method": "normal"},
                                       {"with_cmcl_projection": True, "with_grounding_projection": True, "cmcl_share_parameters": True}],
                         ids=["grounded", "baseline", "nearest", "projections"])
def test_gathered_pairs_give_the_loss_and_gradients_of_separate_forwards(tiny_config, train_split, overrides):
    model, train = random_model(tiny_config, **overrides), RetrievalTrain(image_negatives=2, caption_negatives=3)
    samples, batch = circle_batch(train_split, 2, (2, 3), model.config.image_size)
    terms = circle_terms(model, to_tensors(batch), train)
    found = gradients(model, terms["loss"])

    scores = paddle.stack([paddle.concat([model.retrieval_score(one_pair(model, train_split, i, t))
                                          for i, t in zip(sample["images"].tolist(), sample["texts"].tolist())]) for sample in samples])
    loss, caption_side, image_side = retrieval_circle_loss(scores, train.margin, train.scale, 2)
    expected = gradients(model, loss)
    assert scores.numpy().std() > 0.01
    np.testing.assert_allclose([float(terms[n]) for n in ("loss", "caption_negatives", "image_negatives")],
                               [float(loss), float(caption_side), float(image_side)], atol=1e-5)
    assert float(terms["accuracy"]) == pytest.approx((scores.numpy().argmax(axis=1) == 0).mean())
    assert {name for name, g in found.items() if g.any()} == {name for name, g in expected.items() if g.any()}
    for name, gradient in expected.items():
        np.testing.assert_allclose(found.get(name, 0.0), gradient, atol=1e-4, err_msg=name)


def test_distinct_pictures_and_captions_are_encoded_once(tiny_config, train_split, monkeypatch):
    model, seen = random_model(tiny_config), {}
    samples, batch = circle_batch(train_split, 3, (4, 4), model.config.image_size)

    def counted(name):
        function = getattr(model, name)

        def wrapper(*args):
            seen[name] = seen.get(name, 0) + args[0].shape[0]
            return function(*args)
        monkeypatch.setattr(model, name, wrapper)

    counted("encode_image")
    counted("encode_text")
    circle_terms(model, to_tensors(batch), RetrievalTrain(image_negatives=4, caption_negatives=4))
    assert seen == {"encode_image": len({int(i) for s in samples for i in s["images"]}),
                    "encode_text": len({int(t) for s in samples for t in s["texts"]})}
    assert seen["encode_image"] <= 8 and batch["pair_image"].shape == (3, 9)


def test_collated_pairs_are_the_pairs_of_the_samples(train_split):
    samples, batch = circle_batch(train_split, 3, (2, 2), 32)
    for sample, images, texts in zip(samples, batch["pair_image"], batch["pair_text"]):
        np.testing.assert_array_equal(batch["image"][images], train_split.chosen_pictures(sample["images"].tolist(), 32))
        for text, row in zip(sample["texts"], texts):
            tokens = train_split.tokens[text]
            assert batch["input_ids"][row, :len(tokens)].tolist() == tokens and batch["text_mask"][row].sum() == len(tokens)


def test_negatives_are_of_other_pictures_and_all_of_them_come_up(train_split):
    data, owner = CirclePairs(train_split, 3, 4), train_split.text_image
    images, texts = set(), set()
    for draw in range(300):
        index = draw % len(data)
        sample = data.sample(index, generator(1, draw))
        own = owner[index]
        assert sample["images"].tolist()[0] == own and (sample["images"][4:] == own).all()
        assert (sample["texts"][:4] == index).all()
        assert own not in sample["images"][1:4] and len(set(sample["images"][1:4].tolist())) == 3
        negatives = owner[sample["texts"][4:]]
        assert own not in negatives and len(set(negatives.tolist())) == 4
        images |= set(sample["images"][1:4].tolist())
        texts |= set(sample["texts"][4:].tolist())
    assert images == set(range(len(train_split))) and texts == set(range(len(train_split.captions)))


def test_negatives_depend_on_the_record_generator_alone(train_split):
    data = CirclePairs(train_split, 3, 3)
    first, again, other = (data.sample(4, generator(1, key)) for key in (8, 8, 9))
    np.testing.assert_array_equal(first["texts"], again["texts"])
    np.testing.assert_array_equal(first["images"], again["images"])
    assert first["texts"].tolist() != other["texts"].tolist()


def test_too_few_pictures_for_the_negatives_are_refused(train_split):
    with pytest.raises(DataError, match="has 8 pictures, too few for 8 image and 2 caption negatives"):
        CirclePairs(train_split, 8, 2)
    assert len(CirclePairs(train_split, 7, 7)) == len(train_split.captions)


@pytest.mark.parametrize("matched", [0, 2], ids=["all matched", "two matched"])
def test_in_batch_terms_match_with_the_most_similar_pair_of_another_picture(tiny_config, train_split, matched):
    model = random_model(tiny_config)
    data = InBatchPairs(train_split, 5)
    assert len(data) == 8
    samples = [data.sample(index, generator(2, number)) for number, index in enumerate([0, 1, 2, 3, 1])]  # picture 1 twice
    batch = to_tensors(collate_pairs(samples, train_split, model.config.image_size))
    batch["noise"] = batch["noise"] * 0.0
    terms = in_batch_terms(model, batch, matched)
    images, texts = ([int(sample[key][0]) for sample in samples] for key in ("images", "texts"))
    out = {(i, t): one_pair(model, train_split, i, t) for i in set(images) for t in texts}
    temperature = float(model.temperature())
    similarity = np.array([[float(model.contrastive_score(out[i, t])) for t in texts] for i in images]) / temperature
    masked = similarity.copy()
    masked[1, 4] = masked[4, 1] = masked[np.arange(5), np.arange(5)] = -np.inf

    def cross_entropy(rows):
        return np.log(np.exp(rows - rows.max(axis=1, keepdims=True)).sum(axis=1)) + rows.max(axis=1) - np.diag(rows)

    def matching(i, t, label):
        logits = model.matching_logits(out[i, t]).numpy()[0].astype("float64")
        return np.log(np.exp(logits).sum()) - logits[label]

    contrastive = (cross_entropy(similarity) + cross_entropy(similarity.T)).mean() / 2
    true = np.mean([matching(i, t, 1) for i, t in list(zip(images, texts))[: matched or 5]])
    false = np.mean([matching(images[n], texts[masked[n].argmax()], 0) for n in range(matched or 5)]
                    + [matching(images[masked[:, n].argmax()], texts[n], 0) for n in range(matched or 5)])
    assert float(terms["contrastive"]) == pytest.approx(contrastive, rel=1e-4)
    assert float(terms["matching"]) == pytest.approx((true + false) / 2, rel=1e-4)
    assert float(terms["loss"]) == pytest.approx(contrastive + (true + false) / 2, rel=1e-4)


def brute_force(model, dataset):
    evaluator = RetrievalEvaluator(dataset, image_batch=3, pair_batch=16)
    return evaluator, evaluator.run(model)


@pytest.mark.parametrize("states_kept", [0, 1 << 30], ids=["encoded twice", "kept"])
@pytest.mark.parametrize("overrides", [{}, {"model_type": "baseline"}], ids=["grounded", "baseline"])
def test_a_shortlist_of_everything_equals_brute_force(tiny_config, train_split, monkeypatch, states_kept, overrides):
    monkeypatch.setattr(retrieval_scoring, "STATES_KEPT", states_kept)
    model = random_model(tiny_config, **overrides)
    whole, metrics = brute_force(model, train_split)
    evaluator = RetrievalEvaluator(train_split, image_batch=3, pair_batch=7, rerank_k=8)
    listed = evaluator.run(model)
    np.testing.assert_allclose(evaluator.scores.retrieval, whole.scores.retrieval, atol=1e-5)
    assert (listed["shortlist_ir"], listed["shortlist_tr"], listed["shortlist_pairs"]) == (100.0, 100.0, 100.0)
    assert {key: listed[key] for key in metrics} == pytest.approx(metrics)


def test_pairs_outside_the_shortlist_rank_behind_it_in_contrastive_order(tiny_config, train_split):
    model = random_model(tiny_config)
    whole, _ = brute_force(model, train_split)
    evaluator = RetrievalEvaluator(train_split, image_batch=3, pair_batch=7, rerank_k=2)
    evaluator.run(model)
    scores, contrastive, listed = evaluator.scores.retrieval, evaluator.scores.contrastive, evaluator.scores.shortlist
    assert 0.2 < listed.mean() < 0.8
    np.testing.assert_allclose(scores[listed], whole.scores.retrieval[listed], atol=1e-5)
    assert scores[~listed].max() < scores[listed].min()
    order = np.argsort(contrastive[~listed], kind="stable")
    assert (np.diff(scores[~listed][order]) >= 0).all()
    for t in range(len(train_split.captions)):
        assert listed[t, np.argsort(-contrastive[t])[:2]].all()
    for i in range(len(train_split)):
        assert listed[np.argsort(-contrastive[:, i])[:2], i].all()
    assert listed.sum() <= 2 * sum(listed.shape)
    assert "shortlist of 2" in evaluator.table()


def test_shortlist_recall_is_the_share_of_queries_that_can_still_be_right():
    shortlist = np.array([[1, 0], [0, 1], [0, 1], [0, 0]], dtype=bool)
    assert shortlist_metrics(shortlist, np.array([0, 0, 1, 1])) == {"shortlist_ir": 50.0, "shortlist_tr": 100.0, "shortlist_pairs": 37.5}


@pytest.fixture
def finetune_config(demo_data, tiny_config, tmp_path):
    """A function that writes a tiny retrieval run with some groups changed and returns the file's path."""

    tiny_config.to_json(str(tmp_path / "model.json"))

    def write(**changes):
        values = {
            "task": "retrieval", "model": {"config": str(tmp_path / "model.json")},
            "data": {"annotations": str(demo_data / "retrieval" / "dataset_shapes.json"), "images": str(demo_data / "retrieval" / "images"),
                     "vocab": str(demo_data / "vocab"), "max_text_len": 40},
            "train": {"epochs": 1, "batch_size": 3, "image_negatives": 2, "caption_negatives": 2, "max_steps": 3},
            "optim": {"learning_rate": 1e-3}, "eval": {"split": "val", "max_images": 6, "captions_per_image": 1, "rerank_k": 3},
            "run": {"output": str(tmp_path / "run"), "progress": False, "log_every": 1},
        }
        for group, keys in changes.items():
            values[group] = {**values[group], **keys}
        (tmp_path / "retrieval.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(tmp_path / "retrieval.yaml")

    return write


@pytest.mark.parametrize("train", [{}, {"objective": "in_batch"}, {"accumulate": 2}], ids=["circle", "in_batch", "accumulated"])
def test_train_and_eval_commands_run_end_to_end(finetune_config, unimo2, tmp_path, train):
    path, out = finetune_config(train=train), tmp_path / "run"
    trained = unimo2("train", "-c", path)
    assert trained.status == 0, trained.err
    assert sorted(p.name for p in (out / "best").iterdir()) == ["config.json", "model.safetensors", "task.json", "vocab"]
    assert json.loads((out / "best" / "task.json").read_text())["task"] == "retrieval"
    assert sum(p.stat().st_size > 0 for p in (out / "best" / "vocab").iterdir()) == 3
    judged = unimo2("eval", "-c", path, "-o", f"model.init={out}/best", "-o", "model.config=", "-o", "eval.split=test", "-o", "eval.rerank_k=all")
    assert judged.status == 0, judged.err
    assert "retrieval, test: 6 pictures, 6 captions" in judged.out and "shortlist" not in judged.out
    assert (out / "predictions" / "retrieval.html").stat().st_size > 1000


def test_resumed_training_equals_the_uninterrupted_run(finetune_config, unimo2, tmp_path):
    from unimo2_paddle.checkpoints.convert import read_checkpoint

    path = finetune_config(train={"max_steps": 4}, optim={"schedule": "constant", "warmup_steps": 0})
    assert unimo2("train", "-c", path, "-o", f"run.output={tmp_path}/whole").status == 0
    for steps, resume in ((2, "none"), (4, "auto")):
        assert unimo2("train", "-c", path, "-o", f"run.output={tmp_path}/halves", "-o", f"train.max_steps={steps}", "--resume", resume).status == 0
    halves, whole = (read_checkpoint(str(tmp_path / name / "checkpoints" / "step-000004")).arrays for name in ("halves", "whole"))
    assert all(np.array_equal(halves[name], whole[name]) for name in whole)


def test_evaluation_needs_no_training_data(finetune_config, demo_data, tmp_path):
    """A file without a train split, and a configuration without a train group, are enough to evaluate."""
    annotations = json.loads((demo_data / "retrieval" / "dataset_shapes.json").read_text())
    annotations["images"] = [image for image in annotations["images"] if image["split"] == "test"]
    (tmp_path / "test_only.json").write_text(json.dumps(annotations))
    path = finetune_config(data={"annotations": str(tmp_path / "test_only.json")}, eval={"split": "test"})
    values = yaml.safe_load(open(path, encoding="utf-8"))
    del values["train"], values["optim"]
    open(path, "w", encoding="utf-8").write(yaml.safe_dump(values))
    task = RetrievalTask(load_run_config(path))
    evaluator, = task.evaluators()
    assert (evaluator.name, evaluator.every_steps, evaluator.rerank_k) == ("test", 0, 3)
    assert evaluator.run(task.build_model())["ir_r10"] >= 0


def test_the_test_split_cannot_choose_the_checkpoint(finetune_config, unimo2, tmp_path):
    outcome = unimo2("train", "-c", finetune_config(eval={"split": "test"}))
    assert outcome.status == 2 and "eval.split=val" in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes, problem", [
    ({"train": {"objective": "triplet"}}, "train.objective: 'triplet' is not one of circle, in_batch"),
    ({"train": {"objective": "in_batch", "batch_size": 1}}, "train.batch_size: objective in_batch needs at least 2"),
    ({"train": {"image_negatives": 0}}, "train.image_negatives: must be at least 1, is 0"),
    ({"train": {"margin": 0}}, "train.margin: must be above 0"),
    ({"train": {"epochs": 0}}, "train.epochs: must be at least 1"),
    ({"train": {"caption_negative": 3}}, "did you mean 'caption_negatives'?"),
    ({"eval": {"rerank_k": "some"}}, "eval.rerank_k: must be all or a number of at least 1, is 'some'"),
    ({"eval": {"rerank_k": 0}}, "eval.rerank_k: must be all or a number of at least 1, is 0"),
    ({"eval": {"every_epochs": -1}}, "eval.every_epochs: must be at least 0"),
    ({"data": {"num_workers": -1}}, "data.num_workers: must be at least 0"),
])
def test_wrong_values_are_refused(finetune_config, changes, problem):
    with pytest.raises(ConfigError) as error:
        load_run_config(finetune_config(**changes))
    assert problem in str(error.value)


def test_rerank_k_is_overridden_as_number_or_word(finetune_config):
    path = finetune_config()
    assert load_run_config(path, ["eval.rerank_k=16"]).eval.rerank_k == 16
    assert load_run_config(path, ["eval.rerank_k=all"]).eval.rerank_k == "all"


def test_epochs_count_captions_and_the_rate_drops_at_its_epochs(finetune_config):
    config = load_run_config(finetune_config(
        train={"max_steps": 0, "epochs": 5, "batch_size": 2},
        optim={"learning_rate": 5e-6, "schedule": "piecewise", "drop_at_epochs": [2, 4], "drop_factor": 0.1}))
    task = RetrievalTask(config)
    captions = len(task.split("train").dataset.captions)
    per_epoch = -(-captions // 2)
    assert task.steps_per_epoch() == per_epoch and task.total_steps() == 5 * per_epoch and task.evaluate_every() == per_epoch
    rate = schedule_of(config.optim, task)
    assert [rate(step) for step in (0, 2 * per_epoch - 1, 2 * per_epoch, 4 * per_epoch)] == pytest.approx([5e-6, 5e-6, 5e-7, 5e-8])
    batches = task.train_batches(Shard())
    texts = [text for _ in range(per_epoch) for text in own_captions(task, next(batches))]
    assert len(texts) == 2 * per_epoch and set(texts[:captions]) == set(range(captions))  # every caption once


def own_captions(task, batch):
    """The captions that the samples of a batch are about, found by their tokens."""
    tokens = {tuple(ids): number for number, ids in enumerate(task.split("train").dataset.tokens)}
    found = []
    for row in batch["pair_text"][:, 0]:
        found.append(tokens[tuple(batch["input_ids"][row, :int(batch["text_mask"][row].sum())].tolist())])
    return found


@pytest.mark.parametrize("name", ["flickr30k", "coco"])
def test_released_hyper_parameters_are_those_of_the_authors(name):
    config = load_run_config(os.path.join(ROOT, "run_configs", "retrieval", f"{name}.yaml"))
    train, optim = config.train, config.optim
    assert (train.objective, train.epochs, train.batch_size, train.image_negatives, train.caption_negatives, train.margin, train.scale) == (
        "circle", 40, 2, 10, 10, 0.2, 1.0)
    assert (optim.learning_rate, optim.schedule, optim.drop_at_epochs, optim.drop_factor) == (5e-6, "piecewise", [24, 32], 0.1)
    assert (optim.beta1, optim.beta2, optim.epsilon, optim.weight_decay, optim.clip_norm) == (0.9, 0.98, 1e-6, 0.0, 1.0)
    assert config.eval.split == "val" and config.data.max_text_len == 128 and config.run.recompute
    assert config.model.overrides["image_size"] == 384
