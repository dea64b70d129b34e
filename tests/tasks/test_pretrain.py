"""Pre-training objectives: which terms a corpus has, what they weigh, and that each one trains."""
import math

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from unimo2_paddle.config import load_run_config
from unimo2_paddle.tasks.base import Shard, task_class

ALL_ON = {
    "model.with_grounding_mask": True,
    "train.pairs": {"contrastive": 1, "matching": 0.5, "masked_lm": 1, "dictionary": 1, "caption": 0.5, "masked_grounding": 0.25},
    "train.images": {"visual_contrastive": 1, "dictionary": 0.5, "masked_grounding": 0.25},
    "train.texts": {"masked_lm": 1, "dictionary": 1, "seq2seq": 0.5},
    "mixture.weights": {"pairs": 1, "images": 1, "texts": 1},
}
NAMES = {"pairs": ("contrastive", "matching", "masked_lm", "dictionary", "caption", "masked_grounding"),
         "images": ("visual_contrastive", "dictionary", "masked_grounding"), "texts": ("masked_lm", "dictionary", "seq2seq")}
SINGLE = [(corpus, name) for corpus, names in NAMES.items() for name in names]


class Run:
    """A task with its model and batches, without the loop."""

    def __init__(self, path):
        self.config = load_run_config(path)
        self.task = task_class(self.config.task)(self.config)
        self.model = self.task.build_model()
        self.model.train()
        self.batches = self.task.train_batches(Shard())

    def batch(self, corpus):
        """The next batch of a corpus, as tensors."""
        while True:
            batch = next(self.batches)
            if batch["corpus"] == corpus:
                return {key: paddle.to_tensor(value) if isinstance(value, np.ndarray) else value for key, value in batch.items()}

    def terms(self, batch):
        return {name: float(value) for name, value in self.task.loss(self.model, batch).items()}


@pytest.fixture
def run(pretrain_config):
    return lambda changes=None: Run(pretrain_config(changes))


def alone(corpus, name):
    """Changes that leave one objective of one corpus."""
    return {"model.with_grounding_mask": True, "mixture.weights": {corpus: 1}, "train.steps": 2,
            f"train.{corpus}": {other: float(other == name) for other in NAMES[corpus]}}


def test_every_objective_at_once_trains_through_the_command_line(pretrain_config, unimo2, tmp_path):
    import json

    outcome = unimo2("train", "-c", pretrain_config({**ALL_ON, "train.steps": 16}))
    assert outcome.status == 0, outcome.err
    seen = {key for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() for key in json.loads(line) if "/" in key}
    assert {name for name in seen if "accuracy" not in name} == {f"{corpus}/{name}" for corpus, name in SINGLE}


def test_every_parameter_is_trained_by_some_objective(run):
    made = run(ALL_ON)
    for corpus in ("pairs", "images", "texts", "texts", "texts", "texts"):  # half of the text steps are fragments
        made.task.loss(made.model, made.batch(corpus))["loss"].backward()
    untrained = [p.name for p in made.model.parameters() if p.grad is None or float(p.grad.abs().sum()) == 0]
    assert untrained == []


@pytest.mark.parametrize("corpus, name", SINGLE)
def test_each_objective_alone_trains(pretrain_config, unimo2, tmp_path, corpus, name):
    changes = alone(corpus, name)
    before = Run(pretrain_config(changes, "before.yaml")).model
    outcome = unimo2("train", "-c", pretrain_config(changes), "-o", "optim.warmup_steps=0")
    assert outcome.status == 0, outcome.err
    after = load_file(tmp_path / "run" / "best" / "model.safetensors")
    moved = {p.name for p in before.parameters() if np.abs(p.numpy() - after[p.name]).max() > 1e-4}
    assert moved, "nothing was trained"
    head = {"matching": "grounded.img_text_matching_fc.w_0", "masked_lm": "grounded.mask_lm_trans_fc.w_0",
            "caption": "grounded.mask_lm_trans_fc.w_0", "seq2seq": "grounded.mask_lm_trans_fc.w_0", "dictionary": "vq_emb",
            "masked_grounding": "grounded.mask_g_trans_fc.w_0", "contrastive": "cmcl_temperature",
            "visual_contrastive": "grounded.pooled_fc_image.w_0"}
    assert head[name] in moved
    if name == "contrastive":
        assert not any(n.startswith("grounded.encoder") for n in moved), "contrastive learning stays in front of the fusion"


@pytest.mark.parametrize("corpus, name", SINGLE)
def test_the_loss_is_the_weighted_sum_of_the_terms(run, corpus, name):
    made = run({**ALL_ON, f"train.{corpus}": {**ALL_ON[f"train.{corpus}"], name: 2.5}})
    for _ in range(4):
        terms = made.terms(made.batch(corpus))
        weights = vars(getattr(made.config.train, corpus))
        wanted = sum(weights[key.split("/")[1]] * value for key, value in terms.items() if key.split("/")[-1] in weights)
        assert terms["loss"] == pytest.approx(wanted, rel=1e-5)
        if name != "seq2seq":
            break
        if f"{corpus}/seq2seq" in terms:
            break
    else:
        pytest.fail("no step of fragments among four")


def test_untrained_losses_start_where_guessing_would(run):
    made = run({**ALL_ON, "optim.learning_rate": 0.0})
    terms = {**made.terms(made.batch("pairs")), **made.terms(made.batch("images"))}
    assert terms["pairs/masked_lm"] == pytest.approx(math.log(512), abs=0.3)
    assert terms["pairs/caption"] == pytest.approx(math.log(512), abs=0.3)
    assert terms["pairs/matching"] == pytest.approx(math.log(2), abs=0.02)
    assert terms["pairs/masked_grounding"] == pytest.approx(math.log(32), abs=0.3)
    assert 0 < terms["images/visual_contrastive"] <= math.log(7) + 0.5
    assert 0 <= terms["pairs/contrastive_accuracy"] <= 1 and 0 <= terms["pairs/matching_accuracy"] <= 1


@pytest.mark.parametrize("settings", [
    {"model.model_type": "baseline"},
    {"model.grounding_method": "normal"},
    {"model.with_cmcl_projection": True, "model.with_grounding_projection": True},
    {"model.with_grounding_pos": True, "model.weight_sharing": False},
    {"train.text_for_matching": "masked", "train.matching_negatives": 1},
    {"train.text_for_matching": "masked", "train.pairs": {"masked_lm": 0}},
    {"model.text_enc_layers": [0], "model.grounding_enc_layers": [1]},
])
def test_every_kind_of_model_trains_on_all_three_corpora(pretrain_config, unimo2, settings):
    outcome = unimo2("train", "-c", pretrain_config({"train.steps": 8, "mixture.weights": {"pairs": 1, "images": 1, "texts": 1}, **settings}))
    assert outcome.status == 0, outcome.err
    for corpus in NAMES:
        assert f"{corpus}/" in outcome.out
    assert ("dictionary" in outcome.out) == ("model.model_type" not in settings)


def drawn_negatives(made, batch, monkeypatch):
    """(images, texts) of the negative pairs, as rows of the batch."""
    selected, original = [], paddle.index_select
    monkeypatch.setattr(paddle, "index_select", lambda x, index, axis=0: selected.append(index.numpy()) or original(x, index, axis))
    made.task.loss(made.model, batch)
    monkeypatch.undo()
    rows = [index for index in selected if len(index) >= 8]
    return rows[0], rows[1]


@pytest.mark.parametrize("negatives", [1, 2])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
def test_hard_negatives_are_never_the_pair_itself_and_stay_in_their_group(run, monkeypatch, negatives, temperature):
    made = run({"train.matching_negatives": negatives, "train.matching_temperature": temperature, "mixture.weights": {"pairs": 1},
                "train.pairs": {"masked_lm": 0}})
    for _ in range(5):
        images, texts = drawn_negatives(made, made.batch("pairs"), monkeypatch)
        assert len(images) == len(texts) == 8 * negatives
        assert (images != texts).all()
        assert (images // 4 == texts // 4).all()
        own = np.arange(8) if negatives == 1 else np.tile(np.arange(8), 2)
        assert ((images == own) | (texts == own)).all(), "one side is the pair's own"


def test_a_low_temperature_draws_the_most_similar_negative(run, monkeypatch):
    made = run({"train.matching_temperature": 1e-6, "mixture.weights": {"pairs": 1}, "train.pairs": {"masked_lm": 0}})
    made.model.eval()
    batch = made.batch("pairs")
    image = made.model.encode_image(batch["image"].astype("float32") * (2 / 255) - 1)
    text = made.model.encode_text(batch["input_ids"], batch["position_ids"], batch["text_mask"])
    similarity = paddle.matmul(*made.model.contrastive_features(image, text), transpose_y=True).numpy()
    similarity[np.arange(8)[:, None] // 4 != np.arange(8)[None] // 4] = -np.inf
    np.fill_diagonal(similarity, -np.inf)
    images, texts = drawn_negatives(made, batch, monkeypatch)
    assert texts[:8].tolist() == similarity.argmax(axis=1).tolist()
    assert images[8:].tolist() == similarity.argmax(axis=0).tolist()


def test_a_high_temperature_draws_every_fellow(run, monkeypatch):
    made = run({"train.matching_temperature": 1e6, "mixture.weights": {"pairs": 1}, "train.pairs": {"masked_lm": 0}})
    drawn = np.zeros((4, 4))
    for _ in range(40):
        _, texts = drawn_negatives(made, made.batch("pairs"), monkeypatch)
        for row, text in enumerate(texts[:8]):
            drawn[row % 4, text % 4] += 1
    assert (np.diag(drawn) == 0).all() and (drawn[~np.eye(4, dtype=bool)] > 80 / 3 - 20).all()


def test_padding_does_not_change_a_loss(run):
    """A batch padded further than needed has the same loss: padding counts nowhere."""
    made = run({**ALL_ON, "train.pairs": {**ALL_ON["train.pairs"], "masked_grounding": 0}})
    made.model.eval()
    batch = made.batch("pairs")
    batch.pop("token_mask", None)
    length, extra = batch["input_ids"].shape[1], 5
    wider = dict(batch)
    for key, value in (("input_ids", 1), ("masked_ids", 1), ("position_ids", 1), ("text_mask", 0)):
        wider[key] = paddle.nn.functional.pad(batch[key].astype("float32"), [0, 0, 0, extra], value=value).astype(batch[key].dtype)
    rows = batch["predict_from"] // length
    wider["predict_from"] = batch["predict_from"] + rows * extra
    first, second = made.terms(batch), made.terms(wider)
    assert first.keys() == second.keys()
    for key in first:
        assert second[key] == pytest.approx(first[key], rel=2e-5, abs=2e-6), key


def test_a_caption_token_is_predicted_without_seeing_itself_or_what_follows(run, monkeypatch):
    made = run(alone("pairs", "caption"))
    made.model.eval()
    batch = made.batch("pairs")

    def token_losses(ids):
        seen, original = [], paddle.nn.functional.cross_entropy
        with monkeypatch.context() as patch:
            patch.setattr(paddle.nn.functional, "cross_entropy",
                          lambda logits, labels, **options: seen.append(original(logits, labels, **options)) or seen[-1])
            made.task.loss(made.model, {**batch, "input_ids": ids})
        (losses,) = seen
        return losses.reshape([8, -1]).numpy()

    changed = batch["input_ids"].clone()
    changed[:, 6] = (changed[:, 6] + 7) % 500 + 4
    first, second = token_losses(batch["input_ids"]), token_losses(changed)
    assert np.abs(first[:, :5] - second[:, :5]).max() < 1e-5, "column 5 predicts token 6"
    assert np.abs(first[:, 5] - second[:, 5]).min() > 1e-6


@pytest.mark.parametrize("corpus", ["pairs", "texts"])
def test_masked_words_are_predicted_from_the_masked_text_alone(run, corpus):
    """The true words must not reach their prediction, not even through the grounded tokens."""
    made = run({"mixture.weights": {corpus: 1}})
    made.model.eval()
    batch = made.batch(corpus)
    first = made.terms(batch)[f"{corpus}/masked_lm"]
    assert made.terms({**batch, "input_ids": paddle.full_like(batch["input_ids"], 9)})[f"{corpus}/masked_lm"] == first
    assert made.terms({**batch, "masked_ids": batch["input_ids"]})[f"{corpus}/masked_lm"] != first


@pytest.mark.parametrize("share, found", [(0.0, 0), (1.0, None)])
def test_fragments_come_only_when_asked_for_and_always_without_masked_words(run, share, found):
    weights = {"masked_lm": 1.0 - share, "seq2seq": share, "dictionary": 1}
    made = run({"mixture.weights": {"texts": 1}, "train.texts": weights})
    kinds = ["masked_ids" not in next(made.batches) for _ in range(8)]
    assert sum(kinds) == (8 if found is None else found)
