"""Untrained models and made-up batches that the rows measure; imported after ``prepare_process``."""
import zlib  # noqa: F401  before paddle: Paddle 2.6.2 exports zlib's symbols

import numpy as np
import paddle

from unimo2_paddle.models.unimo2 import Unimo2Model
from unimo2_paddle.tasks.base import ModelSection
from unimo2_paddle.tasks.retrieval import RetrievalDataset

PICTURE = {"tiny": 64, "base": 384}
NO_DROPOUT = {f"{part}{kind}_dropout_prob": 0.0 for part in ("", "text_", "vit_") for kind in ("hidden", "attention_probs")}


def build(size, **overrides):
    """An untrained ``Unimo2Model`` of demo size, or of base width at 384 pixels, in evaluation mode; ``overrides``: keys of its config."""
    name = "unimo2_demo" if size == "tiny" else "unimo2_base"
    config = ModelSection(name, overrides={"image_size": PICTURE[size], **NO_DROPOUT, **overrides}).model_config()
    paddle.seed(1)
    with paddle.utils.unique_name.guard():
        model = Unimo2Model(config)
    model.eval()
    return model


def short(layers):
    """Overrides that give every encoder so many layers; costs are linear in them."""
    return {"num_hidden_layers": layers, "text_num_hidden_layers": layers, "vit_num_hidden_layers": layers}


def caption_lengths(count, seed=0):
    """Tokens of captions with [CLS] and [SEP] as in Flickr30k: 15 on average, 8 to 40, the longer the rarer."""
    return np.clip(np.random.default_rng(seed).lognormal(2.65, 0.35, count).round().astype(int), 8, 40)


def pixels(config, count, seed=0):
    """uint8 ``[N, S, S, 3]``."""
    return np.random.default_rng(seed).integers(0, 256, [count, config.image_size, config.image_size, 3], dtype="uint8")


def text_arrays(config, lengths, seed=0):
    """Ids, positions and mask of random texts of these lengths, padded to the longest."""
    valid = np.arange(max(lengths)) < np.asarray(lengths)[:, None]
    ids = np.random.default_rng(seed).integers(5, config.text_vocab_size - 1, valid.shape)
    return np.where(valid, ids, 1), np.where(valid, np.arange(2, 2 + valid.shape[1]), 1), valid.astype("float32")


class MadeUpDataset(RetrievalDataset):
    """Random pictures, and captions of real lengths."""

    def __init__(self, config, images, captions):
        super().__init__(pad_id=1)
        self.made = pixels(config, images)
        self.image_ids = self.image_paths = [str(number) for number in range(images)]
        for length, ids in zip(caption_lengths(captions), np.random.default_rng(1).integers(5, config.text_vocab_size - 1, [captions, 64]).tolist()):
            self.tokens.append(ids[:length])
            self.positions.append(list(range(2, 2 + length)))
            self.captions.append("")

    def chosen_pictures(self, numbers, size):
        return self.made[list(numbers)]
