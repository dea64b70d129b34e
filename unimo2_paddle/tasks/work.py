"""How many tokens and floating-point operations a training batch is, from its shapes (``Task.work``; formulas: models/flops.py).

A training step counts as three forward passes. Poolers, small heads and the products of the contrastive loss are left out: together they
are less than a thousandth of base-size steps.
"""
import numpy as np

from unimo2_paddle.data.collate import PAD_POSITION
from unimo2_paddle.models.configuration import Unimo2Config, UnimoConfig
from unimo2_paddle.models.flops import Pass, fusion_flops, image_flops, pass_flops, patches, prediction_flops, text_flops, unimo_flops

TRAINING = 3.0  # forward, and twice that for the backward pass
PICTURES = ("image", "first_view", "second_view")


def count_tokens(config, batch):
    """Patches with their [CLS] or regions, and words (object tags too) without padding."""
    words = int((np.asarray(batch["position_ids"]) != PAD_POSITION).sum()) if "position_ids" in batch else 0
    pictures = sum(len(batch[name]) for name in PICTURES if name in batch)
    stored = sum(int(batch[name].sum()) for name in ("image_mask", "tag_mask") if name in batch and isinstance(config, UnimoConfig))
    return words + stored + (pictures * (1 + patches(config)) if pictures else 0)


def _regions(batch):
    return batch["image_mask"].shape[1] if "image_mask" in batch else 0


def classifier_work(config, batch, layout="pair"):
    """Work of a classifier on a picture, a text or both; (0, 0) of other models and of stored features."""
    samples = len(batch.get("image", batch.get("input_ids", ())))
    if not isinstance(config, (Unimo2Config, UnimoConfig)) or not samples:
        return 0, 0.0
    length = batch["input_ids"].shape[1] if "input_ids" in batch else 0
    if isinstance(config, UnimoConfig):
        return count_tokens(config, batch), TRAINING * unimo_flops(config, samples, _regions(batch), length=length, first_only=True)
    flops = fusion_flops(config, samples, "image" in batch, length, first_only=True, with_loss=False, layout=layout)
    if "image" in batch:
        flops += image_flops(config, samples)
    if length:
        flops += text_flops(config, samples, length)
    return count_tokens(config, batch), TRAINING * flops


def caption_work(config, batch):
    """Work of cross-entropy captioning."""
    if "predict_from" not in batch:
        return 0, 0.0
    samples, length = batch["input_ids"].shape
    if isinstance(config, UnimoConfig):
        tags = batch["tag_mask"].shape[1] if "tag_mask" in batch else 0
        flops = unimo_flops(config, samples, _regions(batch), tags, length) + prediction_flops(config, len(batch["labels"]), config.vocab_size)
        return count_tokens(config, batch), TRAINING * flops
    flops = image_flops(config, samples) + text_flops(config, samples, length) + prediction_flops(config, len(batch["labels"]), config.text_vocab_size)
    return count_tokens(config, batch), TRAINING * (flops + fusion_flops(config, samples, True, length, with_loss=False, layout="caption"))


def seq2seq_work(config, batch):
    """Work of text generation from text, by either system."""
    samples, length = batch["input_ids"].shape
    flops = prediction_flops(config, len(batch["labels"]), config.text_vocab_size)
    if isinstance(config, UnimoConfig):
        flops += unimo_flops(config, samples, length=length)
    else:
        flops += text_flops(config, samples, length) + fusion_flops(config, samples, False, length, with_loss=False)
    return count_tokens(config, batch), TRAINING * flops


def retrieval_work(config, batch, pairs):
    """Work of retrieval finetuning that matches ``pairs``; UNIMO-2 encodes every picture and text once, UNIMO every pair."""
    if isinstance(config, UnimoConfig):
        flops = unimo_flops(config, pairs, _regions(batch), length=batch["input_ids"].shape[1], first_only=True)
        return count_tokens(config, batch), TRAINING * flops
    images, (texts, length) = len(batch["image"]), batch["input_ids"].shape
    flops = image_flops(config, images) + text_flops(config, texts, length)
    # every side's codes are scored once, whatever the number of its pairs
    choosing = 2.0 * config.num_codebook * config.hidden_size if config.model_type == "grounded" and config.grounding_method == "topk" else 0.0
    positions = patches(config) + length - 1
    flops += choosing * (images * patches(config) + texts * (length - 1))
    flops += fusion_flops(config, pairs, True, length, first_only=True, with_loss=False) - pairs * choosing * positions
    return count_tokens(config, batch), TRAINING * flops


def pretraining_work(config, batch, train):
    """Work of a pre-training batch under the objectives of ``PretrainTrain``."""
    return count_tokens(config, batch), TRAINING * sum(pass_flops(config, one) for one in pretraining_passes(config, batch, train))


def pretraining_passes(config, batch, train):
    """The trips of a pre-training batch through the model's parts, a list of ``Pass`` in the order of ``PretrainTask.loss``."""
    return {"pairs": _pair_passes, "images": _image_passes, "texts": _text_passes}[batch["corpus"]](config, batch, train)


def _pair_passes(config, batch, train):
    weights, (pairs, length), fused = train.pairs, batch["input_ids"].shape, len(batch["fused"])
    shared = train.text_for_matching == "masked"
    passes = [Pass("image", pairs), Pass("text", pairs, length)]
    if weights.masked_lm or shared:
        passes.append(Pass("text", fused, length))
    if weights.matching or weights.dictionary or weights.masked_grounding or (shared and weights.masked_lm):
        first_only = not (weights.masked_grounding or (shared and weights.masked_lm))
        passes.append(Pass("fusion", fused, length, first_only=first_only))
    if weights.matching:
        passes.append(Pass("fusion", fused * train.matching_negatives, length, first_only=True, with_loss=False))
    if weights.masked_grounding and "token_mask" in batch:
        passes.append(Pass("codes", fused * config.topk_value))
    if weights.masked_lm:
        if not shared:
            passes.append(Pass("fusion", fused, length, with_loss=False))
        passes.append(Pass("words", len(batch["labels"])))
    if weights.caption:
        passes += [Pass("text", fused, length), Pass("fusion", fused, length, layout="caption"), Pass("words", fused * (length - 1))]
    return passes


def _image_passes(config, batch, train):
    views = 2 * len(batch["first_view"])
    codes = [Pass("codes", views * config.topk_value)] if train.images.masked_grounding and "token_mask" in batch else []
    return [Pass("image", views), Pass("fusion", views), *codes]


def _text_passes(config, batch, _):
    texts, length = batch["input_ids"].shape
    return [Pass("text", texts, length), Pass("fusion", texts, length, image=False), Pass("words", len(batch["labels"]))]


def unimo_pretraining_work(config, batch, train):
    """Tokens (regions and words without padding, each once) and work of a batch of UNIMO's pre-training (``UnimoPretrainTrain``)."""
    tokens = sum(int(np.asarray(batch[name]).sum()) for name in batch if name.endswith("image_mask"))
    tokens += sum(int((np.asarray(batch[name]) != PAD_POSITION).sum()) for name in batch if name.endswith("position_ids"))
    regions, length = (batch[name].shape[1] if name in batch else 0 for name in ("image_mask", "input_ids"))
    words = prediction_flops(config, len(batch["labels"]), config.vocab_size) if "labels" in batch else 0.0
    if batch["corpus"] != "pairs":
        return tokens, TRAINING * (words + unimo_flops(config, len(batch.get("image_mask", batch.get("input_ids"))), regions, length=length))
    weights, pairs, fused, flops = train.pairs, len(batch["image_mask"]), len(batch["fused"]), 0.0
    if weights.contrastive:
        flops += unimo_flops(config, pairs, regions, first_only=True) + unimo_flops(config, pairs, length=length, first_only=True)
        if "related_text_real" in batch:
            flops += unimo_flops(config, *batch["related_text_input_ids"].shape[:1], length=batch["related_text_input_ids"].shape[1], first_only=True)
        if "related_image_real" in batch:
            flops += unimo_flops(config, *batch["related_image_mask"].shape, first_only=True)
    if weights.rewriting:
        flops += unimo_flops(config, len(batch["joint_text"]), regions, length=length, first_only=True)
    together = unimo_flops(config, fused, regions, length=batch["masked_ids"].shape[1])
    if weights.masked_lm or weights.region_classes or weights.region_features:
        flops += together + words * bool(weights.masked_lm)
    if weights.caption:
        flops += together + prediction_flops(config, fused * (batch["masked_ids"].shape[1] - 1), config.vocab_size)
    return tokens, TRAINING * flops
