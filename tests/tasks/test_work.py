"""Tokens and floating-point operations of batches, against a count of the matrix products that really run."""
import types

import numpy as np
import paddle
import pytest

from unimo2_paddle.config import load_run_config
from unimo2_paddle.data.collate import text_arrays
from unimo2_paddle.models import fused
from unimo2_paddle.models.classifier import Unimo2Classifier
from unimo2_paddle.models.configuration import Unimo2Config
from unimo2_paddle.models.unimo2 import Unimo2Model
from unimo2_paddle.tasks.base import Shard, normalise_tensor, task_class, to_tensors
from unimo2_paddle.tasks.retrieval_training import circle_terms, in_batch_terms
from unimo2_paddle.tasks.work import TRAINING, caption_work, classifier_work, count_tokens, retrieval_work

TOLERANCE = 0.02  # what the formulas leave out: poolers, small heads, contrastive products, visibility
SIZES = {"hidden_size": 64, "text_hidden_size": 64, "vit_hidden_size": 64}


@pytest.fixture
def counted(monkeypatch):
    """A list that receives the operations of every matrix product."""
    operations = []

    def matmul(x, y, transpose_x=False, transpose_y=False, name=None):
        out = plain["matmul"](x, y, transpose_x, transpose_y)
        operations.append(2.0 * np.prod(out.shape) * x.shape[-2 if transpose_x else -1])
        return out

    def linear(x, weight, bias=None, name=None):
        out = plain["linear"](x, weight, bias)
        operations.append(2.0 * np.prod(out.shape) * x.shape[-1])
        return out

    def einsum(equation, x, y):
        sizes = {}
        for part, tensor in zip(equation.split("->")[0].split(","), (x, y)):
            sizes.update(zip(part, tensor.shape))
        operations.append(2.0 * np.prod(list(sizes.values())))
        return plain["einsum"](equation, x, y)

    plain = {"matmul": paddle.matmul, "einsum": paddle.einsum, "linear": paddle.nn.functional.linear}
    monkeypatch.setattr(paddle, "matmul", matmul)
    monkeypatch.setattr(paddle, "einsum", einsum)
    monkeypatch.setattr(paddle.nn.functional, "linear", linear)
    with fused.plain():  # fused layers call no operations of Paddle's
        yield operations


def model_config(tiny_config, **overrides):
    return Unimo2Config.from_dict({**vars(tiny_config), **SIZES, **overrides})


def random_batch(config, images=0, texts=0):
    """Random pictures and texts of 15 to 20 words."""
    rng, batch = np.random.default_rng(0), {}
    if images:
        batch["image"] = rng.integers(0, 255, [images, config.image_size, config.image_size, 3]).astype("uint8")
    if texts:
        batch.update(text_arrays([rng.integers(10, 99, length).tolist() for length in rng.integers(15, 21, texts)], 1))
    return batch


@pytest.mark.parametrize("changes", [
    {}, {"train.text_for_matching": "masked"}, {"train.fused_per_group": 2, "train.matching_negatives": 1},
    {"train.pairs": {"contrastive": 1, "matching": 0, "caption": 1, "masked_grounding": 1}, "train.images": {"masked_grounding": 1},
     "model.with_grounding_mask": True},
    {"model.model_type": "baseline"}, {"model.grounding_method": "normal", "train.pairs": {"masked_lm": 0}},
], ids=lambda changes: ",".join(changes) or "default")
def test_the_formulas_of_pretraining_count_what_a_forward_pass_computes(pretrain_config, counted, changes):
    config = load_run_config(pretrain_config({**{f"model.{key}": value for key, value in SIZES.items()}, **changes,
                                              "mixture.weights": {"pairs": 1, "images": 1, "texts": 1}}))
    task = task_class("pretrain")(config)
    model, batches, seen = task.build_model(), task.train_batches(Shard()), set()
    while seen < {"pairs", "images", "texts"}:
        batch = next(batches)
        if batch["corpus"] not in seen:
            seen.add(batch["corpus"])
            counted.clear()
            task.loss(model, to_tensors(batch))
            assert task.work(batch)[1] / TRAINING == pytest.approx(sum(counted), rel=TOLERANCE), batch["corpus"]


@pytest.mark.parametrize("inputs, images, texts, layout", [("pair", 3, 3, "pair"), ("pair", 3, 3, "caption"), ("text", 0, 3, "pair"), ("image", 3, 0, "pair")])
def test_the_formulas_of_classifiers_count_what_a_forward_pass_computes(tiny_config, counted, inputs, images, texts, layout):
    config = model_config(tiny_config)
    with paddle.utils.unique_name.guard():
        model = Unimo2Classifier(config, inputs, 3, layout=layout)
    batch = random_batch(config, images, texts)
    tensors = to_tensors(batch)
    if images:
        tensors["image"] = normalise_tensor(tensors["image"])
    model(**tensors)
    assert classifier_work(config, batch, layout)[1] / TRAINING == pytest.approx(sum(counted), rel=TOLERANCE)


@pytest.mark.parametrize("objective", ["circle", "in_batch"])
def test_the_formulas_of_retrieval_count_what_a_forward_pass_computes(tiny_config, counted, objective):
    config = model_config(tiny_config)
    with paddle.utils.unique_name.guard():
        model = Unimo2Model(config, heads=("pooling", "matching"))
    batch = random_batch(config, 4, 4)
    if objective == "circle":
        batch["pair_image"], batch["pair_text"] = np.array([[0, 1, 2, 0, 0]]), np.array([[0, 0, 0, 1, 3]])
        circle_terms(model, to_tensors(batch), types.SimpleNamespace(margin=0.2, scale=1.0, image_negatives=2, use_sigmoid=False))
        pairs = 5
    else:
        batch["pair_image"] = batch["pair_text"] = np.arange(4)[:, None]
        batch["noise"] = np.zeros([4, 2, 4], "float32")
        in_batch_terms(model, to_tensors(batch), matched_pairs=2)
        pairs = 6
    assert retrieval_work(config, batch, pairs)[1] / TRAINING == pytest.approx(sum(counted), rel=TOLERANCE)


def test_the_formula_of_captioning_counts_what_a_forward_pass_computes(tiny_config, counted):
    config = model_config(tiny_config)
    with paddle.utils.unique_name.guard():
        model = Unimo2Model(config, heads=("masked_lm",))
    batch = random_batch(config, 3, 3)
    batch["predict_from"] = batch["labels"] = np.arange(20)
    tensors = to_tensors(batch)
    text = model.encode_text(tensors["input_ids"], tensors["position_ids"], tensors["text_mask"])
    out = model.fuse(model.encode_image(normalise_tensor(tensors["image"])), text, tensors["text_mask"], layout="caption", with_grounding_loss=False)
    model.mlm_logits(paddle.index_select(out.fused_text.reshape([-1, config.hidden_size]), tensors["predict_from"]))
    assert caption_work(config, batch)[1] / TRAINING == pytest.approx(sum(counted), rel=TOLERANCE)


def test_tokens_are_patches_with_cls_and_words_without_padding(tiny_config):
    assert count_tokens(tiny_config, {"image": np.zeros([2, 32, 32, 3])}) == 2 * (1 + 4)
    assert count_tokens(tiny_config, text_arrays([[5, 6, 7], [5]], 1)) == 4


def test_a_model_of_another_kind_or_stored_features_have_no_known_work(tiny_config):
    assert classifier_work(object(), {"input_ids": np.zeros([2, 3])}) == (0, 0.0)
    assert classifier_work(tiny_config, {"features": np.zeros([2, 3])}) == (0, 0.0)
