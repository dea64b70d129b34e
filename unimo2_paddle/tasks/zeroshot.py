"""Zero-shot image classification: every class is a few sentences, a picture belongs to the class whose sentences fit it best."""
import os
from dataclasses import dataclass
from functools import partial

import numpy as np
import paddle

from unimo2_paddle.data.collate import text_arrays, with_special_tokens
from unimo2_paddle.data.formats.image_classes import names_of_folders, read_class_names
from unimo2_paddle.data.prompts import fill_template, read_templates
from unimo2_paddle.data.tokenizer import Tokenizer
from unimo2_paddle.errors import UserInputError
from unimo2_paddle.tasks.base import ModelSection, RunSection, Task, build_unimo2, check_vocabulary
from unimo2_paddle.tasks.imagenet import TABLE_ROWS as SHOWN
from unimo2_paddle.tasks.imagenet import ImagenetData, PictureDataset, class_metrics, class_table, explain_classes, read_classes, read_split
from unimo2_paddle.tasks.reporting import right_and_wrong, write_html_report, write_json, write_predictions
from unimo2_paddle.tasks.retrieval_scoring import encode_captions, encode_pictures, evaluation_mode, matching_logits


@dataclass
class ZeroShotData(ImagenetData):
    """Group ``data``: the keys of the task imagenet, the vocabulary folder, and the longest prompt in tokens."""

    vocab: str = ""
    max_text_len: int = 64

    def problems(self):
        found = super().problems() + ([] if self.vocab else ["vocab: is empty; give the folder of the vocabulary files"])
        return found + ([] if self.max_text_len >= 3 else [f"max_text_len: must be at least 3 ([CLS], a token, [SEP]), is {self.max_text_len}"])


@dataclass
class ZeroShotEval:
    """Group ``eval``.

    ``templates``: a bundled list (photos, shapes) or a text file. ``matching_top``: so many best classes of a picture are judged again by
    the whole model (matching + contrastive score, averaged over the first ``matching_templates`` sentences); 0 = contrastive score alone.
    """

    split: str = "val"
    templates: str = "photos"
    matching_top: int = 0
    matching_templates: int = 1
    image_batch: int = 32
    text_batch: int = 128
    pair_batch: int = 128

    def problems(self):
        lowest = {"matching_top": 0, "matching_templates": 1, "image_batch": 1, "text_batch": 1, "pair_batch": 1}
        found = [f"{key}: is empty" for key in ("split", "templates") if not getattr(self, key)]
        return found + [f"{key}: must be at least {low}, is {getattr(self, key)}" for key, low in lowest.items() if getattr(self, key) < low]


def encode_classes(encode, tokenizer, names, templates, max_text_len=64, text_batch=128, keep=0):
    """What zero-shot classification needs of the classes.

    Args:
        encode: function of input_ids, position_ids, text_mask (tensors) -> ``EncodedTexts``.
        names: of the classes; templates: sentences with ``{}``; max_text_len: in tokens; text_batch: sentences per forward.
        keep: of so many first templates the encoded sentences are returned too.

    Returns:
        mean contrastive features ``[C, H]`` over the templates, and for each kept template its list of ``EncodedTexts``.
    """
    total, kept = None, []
    for number, template in enumerate(templates):
        ids = tokenizer.encode_batch([fill_template(template, name) for name in names])
        sentences = [with_special_tokens(sentence, tokenizer, max_text_len) for sentence in ids]
        blocks = []
        for first in range(0, len(sentences), text_batch):
            arrays = text_arrays(sentences[first: first + text_batch], tokenizer.pad_id)
            blocks.append(encode(*(paddle.to_tensor(arrays[key]) for key in ("input_ids", "position_ids", "text_mask"))))
        features = paddle.concat([block.features for block in blocks])
        total = features if total is None else total + features
        if number < keep:
            kept.append(blocks)
    return total / len(templates), kept


class ZeroShotEvaluator:
    """Scores a split against class sentences.

    Args:
        name: of the split; dataset: a ``PictureDataset``; names: of the classes; templates: sentences with ``{}``.
        tokenizer, settings: the model's ``Tokenizer``, a :class:`ZeroShotEval`; max_text_len: in tokens.
    """

    every_steps = 0

    def __init__(self, name, dataset, names, templates, tokenizer, settings, max_text_len=64, progress=False):
        self.name, self.dataset, self.names, self.templates = name, dataset, names, templates
        self.tokenizer, self.settings, self.max_text_len, self.progress = tokenizer, settings, max_text_len, progress
        self.scores = self.metrics = None
        classes = len(names)
        self.baselines = {"top1": 100.0 / classes, "top5": 100.0 * min(5, classes) / classes}

    def run(self, model):
        """Metrics of the scores; with matching also those of the contrastive scores alone, as ``contrastive_top1`` ...

        Raises:
            UserInputError: the model lacks an encoder or a head, or cannot hold the sentences.
        """
        self._check(model)
        with evaluation_mode(model):
            features, kept = encode_classes(partial(encode_captions, model), self.tokenizer, self.names, self.templates, self.max_text_len,
                                            self.settings.text_batch, self.settings.matching_templates if self.settings.matching_top else 0)
            contrastive, scores = [], []
            for block in self._pictures(model):
                contrastive.append(paddle.matmul(block.features, features, transpose_y=True).numpy())
                scores.append(self._judge(model, block, contrastive[-1], kept) if kept else contrastive[-1])
        self.scores = np.concatenate(scores)
        self.metrics = class_metrics(self.scores, self.dataset.labels)
        if kept:
            alone = class_metrics(np.concatenate(contrastive), self.dataset.labels)
            self.metrics.update((f"contrastive_{key}", value) for key, value in alone.items())
        return dict(self.metrics)

    def _check(self, model):
        heads = {"pooling", "matching"} if self.settings.matching_top else set()
        if model.vision is None or model.text is None or not heads <= set(model.heads):
            raise UserInputError("zero-shot classification needs a pre-trained model with its visual and text Transformers (and the pooling and "
                                 "matching heads for eval.matching_top), not a finetuned classifier")
        if self.max_text_len + 2 > model.config.text_max_position_embeddings:
            raise UserInputError(f"data.max_text_len {self.max_text_len} needs {self.max_text_len + 2} text positions, the model has "
                                 f"{model.config.text_max_position_embeddings}")

    def _pictures(self, model):
        from tqdm import tqdm

        batch = self.settings.image_batch
        with tqdm(total=len(self.dataset), desc=f"zero-shot {self.name}", unit="picture", leave=False, disable=None if self.progress else True) as bar:
            for first in range(0, len(self.dataset), batch):
                rows = range(first, min(first + batch, len(self.dataset)))
                yield encode_pictures(model, paddle.to_tensor(np.stack([self.dataset.sample(row, None)["image"] for row in rows])))
                bar.update(len(rows))

    def _judge(self, model, block, contrastive, kept):
        """Scores ``[N, C]`` in which the whole model orders each picture's best classes; the others keep their order behind them."""
        count, classes = contrastive.shape
        top = np.argsort(-contrastive, axis=1, kind="stable")[:, : self.settings.matching_top]
        chosen = np.zeros((count, classes), dtype=bool)
        np.put_along_axis(chosen, top, True, axis=1)
        matching = np.zeros((count, classes), dtype=np.float32)
        for blocks in kept:
            for number, texts in enumerate(blocks):
                first = number * self.settings.text_batch
                pictures, sentences = np.nonzero(chosen[:, first: first + self.settings.text_batch])
                for start in range(0, len(pictures), self.settings.pair_batch):
                    image, text = (rows[start: start + self.settings.pair_batch] for rows in (pictures, sentences))
                    logits = matching_logits(model, block.take(image), texts.take(text))[:, 1].numpy()
                    matching[image, first + text] += logits / len(kept)
        scores = matching + model.config.cmcl_score_weight * contrastive
        lowest = np.where(chosen, scores, np.inf).min(axis=1, keepdims=True)
        highest_left = np.where(chosen, -np.inf, contrastive).max(axis=1, keepdims=True)
        behind = lowest - 1.0 - (np.where(chosen, 0.0, highest_left) - contrastive)
        return np.where(chosen, scores, behind).astype(np.float32)

    def table(self):
        """The last run as text for the screen, with the worst classes."""
        lines = [f"zero-shot, {self.name}: {len(self.dataset)} pictures, {len(self.names)} classes, {len(self.templates)} sentences per class"]
        for key, value in self.metrics.items():
            chance = self.baselines.get(key.replace("contrastive_", ""))
            lines.append(f"  {key:<24}{value:7.2f}" + (f"   (chance {chance:.2f})" if chance else ""))
        caption, _, rows = class_table(self.scores, self.dataset.labels, self.names)
        lines.append(f"{caption.lower()}{f' ({SHOWN} of {len(rows)})' if len(rows) > SHOWN else ''}:")
        lines += [f"  {name:<24}{right:>6} % of {count:<5} {taken}" for name, count, right, taken in rows[:SHOWN]]
        return "\n".join(lines)

    def write_report(self, directory):
        """``<name>.jsonl`` (guesses for every picture), ``<name>.json`` (metrics) and ``<name>.html`` (classes, right and wrong examples)."""
        rows = explain_classes(self.scores, self.dataset.images, self.names)
        write_predictions(os.path.join(directory, f"{self.name}.jsonl"), rows)
        write_json(os.path.join(directory, f"{self.name}.json"), self.metrics)
        table = class_table(self.scores, self.dataset.labels, self.names)
        write_html_report(os.path.join(directory, f"{self.name}.html"), f"Zero-shot classification, {self.name}", self.metrics, right_and_wrong(rows),
                          notes=[f"{len(self.templates)} sentences per class, for example: {fill_template(self.templates[0], self.names[0])}"],
                          tables=[table])


class ZeroShotTask(Task):
    """Zero-shot classification by a pre-trained model; nothing is trained."""

    sections = {"model": ModelSection, "data": ZeroShotData, "eval": ZeroShotEval, "run": RunSection}

    def build_model(self):
        section = self.config.model
        heads = ("pooling", "matching") if self.config.eval.matching_top else ("pooling",)
        return build_unimo2(section, self.config.run.seed, section.model_config(), heads=heads)

    def evaluators(self):
        data, settings, model_config = self.config.data, self.config.eval, self.config.model.model_config()
        classes = read_classes(data)
        names = read_class_names(data.class_names, classes) if data.class_names else names_of_folders(classes)
        tokenizer = Tokenizer.from_directory(data.vocab)
        check_vocabulary(tokenizer, model_config, data.vocab)
        pictures = PictureDataset(read_split(data, settings.split, classes), model_config.image_size, exif=data.exif)
        return [ZeroShotEvaluator(settings.split, pictures, names, read_templates(settings.templates), tokenizer, settings, data.max_text_len,
                                  self.config.run.progress)]
