"""What the arms of tools/claims.py are judged by: a pre-trained model as it is, and simple classifiers on its frozen features.

Every outcome is computed on the development split, which chooses hyper-parameters, and on the test split, which is reported:

- ``ir_r1``, ``tr_r1``: zero-shot retrieval (text to image, image to text), ``contrastive_...``: by the contrastive score alone, ``r1`` their mean;
- ``caption_loss``, ``text_loss``: cross entropy of masked words in captions without their pictures, and in texts;
- ``entailment``, ``classes``: accuracy in percent of logistic regression on frozen features.
"""
import dataclasses
import os
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F

from unimo2_paddle.data.collate import text_arrays, with_special_tokens
from unimo2_paddle.data.formats.image_classes import list_classes, read_class_folders
from unimo2_paddle.data.formats.snli_ve import read_snli_ve
from unimo2_paddle.data.images import decode_image, resize_image
from unimo2_paddle.data.masking import mask_spans
from unimo2_paddle.data.mixture import generator
from unimo2_paddle.data.tokenizer import Tokenizer
from unimo2_paddle.errors import DataError
from unimo2_paddle.tasks.base import normalise_tensor
from unimo2_paddle.tasks.retrieval import RetrievalData, retrieval_evaluators
from unimo2_paddle.tasks.retrieval_scoring import evaluation_mode

BATCH = 64
SPLITS = {"dev": ("val", "dev"), "test": ("test", "test")}  # split: its name in retrieval, texts and class folders; its name in SNLI-VE
MASK_SEED = 20220319
HIGHER_IS_BETTER = {"r1": True, "text_loss": False, "classes": True}  # what may choose hyper-parameters


def masked_word_loss(model, tokenizer, texts, max_text_len, mask_ratio=0.15):
    """Mean cross entropy of masked words that a model reads in texts alone; the masks are a function of the place in the list.

    Args:
        model: with the masked_lm head; texts: list of str; max_text_len: in tokens.
    """
    total, words = 0.0, 0
    encoded = [tokenizer.encode_with_word_starts(text) for text in texts]
    with evaluation_mode(model):
        for first in range(0, len(texts), BATCH):
            full, masked, chosen = [], [], []
            for place, (ids, starts) in enumerate(encoded[first: first + BATCH], first):
                sentence = with_special_tokens(ids, tokenizer, max_text_len)
                inside = len(sentence) - 2
                hidden, positions = mask_spans(sentence, [True, *starts[:inside], True], [True, *[False] * inside, True],
                                               generator(MASK_SEED, place), tokenizer.mask_id, tokenizer.vocab_size, mask_ratio)
                full.append(sentence)
                masked.append(hidden)
                chosen.append(positions)
            arrays = {key: paddle.to_tensor(value) for key, value in text_arrays(masked, tokenizer.pad_id).items()}
            states = model.encode_text(arrays["input_ids"], arrays["position_ids"], arrays["text_mask"])
            fused = model.fuse(text_states=states, text_mask=arrays["text_mask"], with_grounding_loss=False).fused_text
            rows = np.concatenate([np.asarray(positions, dtype=np.int64) + row * fused.shape[1] for row, positions in enumerate(chosen)])
            labels = np.concatenate([np.asarray(sentence, dtype=np.int64)[positions] for sentence, positions in zip(full, chosen)])
            logits = model.mlm_logits(paddle.index_select(fused.reshape([-1, fused.shape[-1]]), paddle.to_tensor(rows)))
            total += float(F.cross_entropy(logits, paddle.to_tensor(labels), reduction="sum"))
            words += len(labels)
    return total / words


def linear_probe(train, test, train_labels, test_labels):
    """Accuracy in percent of logistic regression on standardised features ``[N, D]``, the same settings for every model."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    probe.fit(train, train_labels)
    return {split: 100.0 * float(probe.score(features, test_labels[split])) for split, features in test.items()}


def _pooled(states, mask=None):
    """First position and mean over the real ones, ``[B, 2H]``."""
    mean = states.mean(axis=1) if mask is None else (states * mask.unsqueeze(2)).sum(axis=1) / mask.sum(axis=1, keepdim=True)
    return paddle.concat([states[:, 0], mean], axis=-1)


class Pictures:
    """Decoded pictures by path, kept for the next arm."""

    def __init__(self, size):
        self.size, self._kept = size, {}

    def tensor(self, paths):
        """The pictures as the model's input ``[B, S, S, 3]``."""
        for path in paths:
            if path not in self._kept:
                with open(path, "rb") as file:
                    self._kept[path] = resize_image(decode_image(file.read(), name=path), self.size)
        return normalise_tensor(paddle.to_tensor(np.stack([self._kept[path] for path in paths])))


class Outcomes:
    """The judges of a sweep; they read their data once.

    Args:
        config: run config (``RunConfig``) of an arm, of which the groups data, eval and model are used.
        entailment: folder of ``snli_ve_{train,dev,test}.jsonl`` and ``flickr30k-images``; classes: folder of ``{train,val,test}/CLASS/``;
            texts: folder of ``{val,test}.txt``, a text per line; an empty one leaves its outcome out.
        most: at most so many pictures for retrieval and hypotheses or texts of a split.

    Raises:
        DataError: a file is missing or malformed.
    """

    def __init__(self, config, entailment="", classes="", texts="", most=600):
        self.max_text_len = config.data.max_text_len
        self.tokenizer = Tokenizer.from_directory(config.data.vocab)
        model_config = config.model.model_config()
        self.pictures = Pictures(model_config.image_size)
        data = RetrievalData(annotations=config.eval.annotations, images=config.eval.images, vocab=config.data.vocab, format=config.eval.format,
                             max_text_len=self.max_text_len)
        self.retrieval = {}
        for split, (name, _) in SPLITS.items():
            settings = dataclasses.replace(config.eval, split=name)
            self.retrieval[split] = retrieval_evaluators(data, settings, model_config, self.tokenizer)[0]
        self.hypotheses = {}
        if entailment:
            for split, name in {"train": "train", **{split: names[1] for split, names in SPLITS.items()}}.items():
                told = read_snli_ve(os.path.join(entailment, f"snli_ve_{name}.jsonl"), os.path.join(entailment, "flickr30k-images"))
                self.hypotheses[split] = told[:2 * most if split == "train" else most]
        self.classes, self.texts = {}, {}
        if classes:
            names = list_classes(os.path.join(classes, "train"))
            for split, name in {"train": "train", **{split: names[0] for split, names in SPLITS.items()}}.items():
                self.classes[split] = read_class_folders(os.path.join(classes, name), names)
        if texts:
            self.texts = {split: _lines(os.path.join(texts, f"{name}.txt"))[:most] for split, (name, _) in SPLITS.items()}

    def judge(self, model):
        """``{"dev": {outcome: value}, "test": ...}`` of a pre-trained model (retrieval and masked words need its heads)."""
        told = {split: {} for split in SPLITS}
        for split, evaluator in self.retrieval.items():
            metrics = evaluator.run(model)
            kept = {key: metrics[key] for key in ("ir_r1", "tr_r1", "contrastive_ir_r1", "contrastive_tr_r1", "recall_mean")}
            captions = evaluator.dataset.captions
            told[split].update(r1=(kept["ir_r1"] + kept["tr_r1"]) / 2, **kept,
                               caption_loss=masked_word_loss(model, self.tokenizer, captions, self.max_text_len))
        for split, texts in self.texts.items():
            told[split]["text_loss"] = masked_word_loss(model, self.tokenizer, texts, self.max_text_len)
        for name, records, features in (("entailment", self.hypotheses, self._pair_features), ("classes", self.classes, self._picture_features)):
            if records:
                x = {split: features(model, some) for split, some in records.items()}
                y = {split: _labels(some) for split, some in records.items()}
                for split, accuracy in linear_probe(x.pop("train"), x, y.pop("train"), y).items():
                    told[split][name] = accuracy
        return told

    def _picture_features(self, model, images):
        parts = []
        with evaluation_mode(model):
            for first in range(0, len(images), BATCH):
                states = model.encode_image(self.pictures.tensor(images.paths[first: first + BATCH]))
                parts.append(_pooled(model.fuse(states, with_grounding_loss=False).fused_image).numpy())
        return np.concatenate(parts)

    def _pair_features(self, model, hypotheses):
        """Fused picture and sentence, and what they have in common."""
        parts = []
        with evaluation_mode(model):
            for first in range(0, len(hypotheses), BATCH):
                some = hypotheses[first: first + BATCH]
                sentences = [with_special_tokens(ids, self.tokenizer, self.max_text_len)
                             for ids in self.tokenizer.encode_batch([record.text for record in some])]
                arrays = {key: paddle.to_tensor(value) for key, value in text_arrays(sentences, self.tokenizer.pad_id).items()}
                image = model.encode_image(self.pictures.tensor([record.path for record in some]))
                text = model.encode_text(arrays["input_ids"], arrays["position_ids"], arrays["text_mask"])
                out = model.fuse(image, text, arrays["text_mask"], with_grounding_loss=False)
                one, other = _pooled(out.fused_image), _pooled(out.fused_text, arrays["text_mask"])
                parts.append(paddle.concat([one, other, one * other], axis=-1).numpy())
        return np.concatenate(parts)


def _labels(records):
    return records.labels if hasattr(records, "labels") else np.array([record.label for record in records])


def _lines(path):
    try:
        return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
