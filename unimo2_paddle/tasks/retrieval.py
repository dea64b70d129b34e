"""Image-text retrieval: which picture does a sentence describe, which sentence describes a picture (UNIMO-2, Table 1; UNIMO, Table 1)."""
import contextlib
import os
from dataclasses import dataclass
from typing import List, Union

import numpy as np

from unimo2_paddle.data.collate import FIRST_POSITION, PAD_POSITION, pad, with_special_tokens
from unimo2_paddle.data.formats.ids import read_ids_dataset
from unimo2_paddle.data.formats.karpathy import CaptionedImage, read_karpathy
from unimo2_paddle.data.images import decode_image, resize_image
from unimo2_paddle.data.picture_cache import MemoryPictures, PictureFile
from unimo2_paddle.data.tokenizer import Tokenizer
from unimo2_paddle.errors import ConfigError, DataError, UserInputError
from unimo2_paddle.metrics.retrieval import chance_metrics, retrieval_metrics
from unimo2_paddle.models.configuration import Unimo2Config, UnimoConfig
from unimo2_paddle.runtime import local_workers
from unimo2_paddle.tasks.base import build_backbone, check_vocabulary
from unimo2_paddle.tasks.finetune import FinetuneTask
from unimo2_paddle.tasks.retrieval_report import write_retrieval_report
from unimo2_paddle.tasks.retrieval_scoring import encode_images, encode_texts, evaluation_mode, score_matrix, shortlist_scores
from unimo2_paddle.tasks.retrieval_training import CirclePairs, InBatchPairs, RetrievalTrain, circle_terms, collate_pairs, in_batch_terms
from unimo2_paddle.tasks.unimo_inputs import MAX_REGIONS, known_system, mismatch, open_regions, region_problems, stored_limit
from unimo2_paddle.tasks.unimo_retrieval import all_scores
from unimo2_paddle.tasks.work import retrieval_work

PIXEL_CACHE = 1 << 30  # bytes of decoded pictures kept in the memory of a machine, for each split
NO_SHORTLIST = "UNIMO reads picture and sentence together and has no cheap score that could choose a shortlist; set eval.rerank_k=all"


@dataclass
class RetrievalData:
    """Group ``data``: captions and pictures.

    ``annotations`` is a Karpathy JSON file, or for ``format: ids`` an authors' ``.ids`` file or the folder of
    ``<split>.all.ids`` or ``<split>.ids``. ``vocab`` is the folder of the three vocabulary files. ``image_suffix`` completes
    picture names of ``.ids`` files. ``exif``: turn pictures as their EXIF orientation says (the authors ignore it).
    ``restval``: train on COCO's split "restval" too, as is usual. ``num_workers``: processes that read training batches. ``picture_cache``:
    folder in which decoded pictures are kept, for all processes of a machine (S x S x 3 bytes of disk each). For UNIMO
    ``regions`` is the store of region features (``{split}`` in it is replaced) and ``max_regions`` how many a picture has at most with the
    global one; ``images`` may then be empty, reports have no pictures then.
    """

    annotations: str
    vocab: str
    images: str = ""
    format: str = "karpathy"
    max_text_len: int = 128
    image_suffix: str = ".jpg"
    exif: bool = True
    restval: bool = True
    num_workers: int = 0
    picture_cache: str = ""
    regions: str = ""
    max_regions: int = MAX_REGIONS

    def problems(self):
        found = [f"{key}: is empty; give a path" for key in ("annotations", "vocab") if not getattr(self, key)] + region_problems(self)
        if self.format not in ("karpathy", "ids"):
            found.append(f"format: {self.format!r} is not one of karpathy, ids")
        if self.max_text_len < 3:
            found.append(f"max_text_len: must be at least 3 ([CLS], a token, [SEP]), is {self.max_text_len}")
        if self.num_workers < 0:
            found.append(f"num_workers: must be at least 0, is {self.num_workers}")
        return found


@dataclass
class RetrievalEval:
    """Group ``eval``: which split, how much of it (0 = all; the first ones in file order), and how large the batches are.

    ``rerank_k``: ``all`` scores every pair with the whole model; a number only the pairs among the best so many, by contrastive score,
    of their caption or of their picture. ``every_steps``: how often during training; 0 = only at the end.
    """

    split: str = "test"
    max_images: int = 0
    captions_per_image: int = 0
    rerank_k: Union[int, str] = "all"
    image_batch: int = 32
    pair_batch: int = 128
    every_steps: int = 0

    def problems(self):
        found = [] if self.split else ["split: is empty; for example val or test"]
        if self.rerank_k != "all" and (isinstance(self.rerank_k, str) or self.rerank_k < 1):
            found.append(f"rerank_k: must be all or a number of at least 1, is {self.rerank_k!r}")
        lowest = {"max_images": 0, "captions_per_image": 0, "image_batch": 1, "pair_batch": 1, "every_steps": 0}
        return found + [f"{key}: must be at least {low}, is {getattr(self, key)}"
                        for key, low in lowest.items() if getattr(self, key) < low]


@dataclass
class RetrievalTaskEval(RetrievalEval):
    """Group ``eval`` of the retrieval task. ``every_epochs``: how often when ``every_steps`` is 0; 0 = only at the end."""

    every_epochs: float = 1.0

    def problems(self):
        return super().problems() + ([f"every_epochs: must be at least 0, is {self.every_epochs}"] if self.every_epochs < 0 else [])


class RetrievalDataset:
    """The pictures of one split with their tokenised captions.

    Attributes:
        image_ids, image_paths: names and files of the I pictures.
        captions: text of the T captions, those of a picture in a row; tokens, positions: their ids with [CLS] and [SEP];
            text_image: int64 ``[T]``, the picture of every caption.
        pad_id: id that fills up short captions; regions: the pictures' ``RegionPictures``, ``None`` for UNIMO-2.
    """

    def __init__(self, pad_id, exif=True):
        self.pad_id, self.exif, self.regions = pad_id, exif, None
        self.image_ids, self.image_paths = [], []
        self.captions, self.tokens, self.positions = [], [], []
        self.text_image, self._counts = np.zeros(0, dtype="int64"), []
        self.cache_directory, self.readers, self._cache, self._cached_size = "", 1, None, None

    @classmethod
    def read(cls, data, tokenizer, split, max_images=0, captions_per_image=0, regions=None):
        """The data set that a :class:`RetrievalData` group describes; ``regions`` are those of its pictures (UNIMO).

        Raises:
            DataError: files are missing or malformed.
        """
        reader = cls.from_karpathy if data.format == "karpathy" else cls.from_ids
        place = data.annotations if data.format == "karpathy" else ids_file(data.annotations, split)
        extra = {"split": split, "restval": data.restval} if data.format == "karpathy" else {"suffix": data.image_suffix}
        dataset = reader(place, data.images, tokenizer, max_text_len=data.max_text_len, max_images=max_images,
                         captions_per_image=captions_per_image, exif=data.exif, check_pictures=bool(data.images), **extra)
        dataset.cache_directory, dataset.readers = data.picture_cache, max(1, data.num_workers) * local_workers()
        if regions is not None:
            regions.name([CaptionedImage(i, path, []) for i, path in zip(dataset.image_ids, dataset.image_paths)], place)
            dataset.regions = regions
        return dataset

    @classmethod
    def from_karpathy(cls, annotations, images_dir, tokenizer, split="test", max_text_len=128, max_images=0,
                      captions_per_image=0, exif=True, restval=False, check_pictures=True):
        """One split of a Karpathy JSON file; captions longer than ``max_text_len`` ids lose their end but keep [SEP].

        With ``restval`` the split "train" includes "restval".
        """
        dataset = cls(tokenizer.pad_id, exif)
        for image in _first(read_karpathy(annotations, images_dir, split, restval, check_pictures), max_images):
            captions = _first(image.captions, captions_per_image)
            tokens = [with_special_tokens(ids, tokenizer, max_text_len) for ids in tokenizer.encode_batch(captions)]
            positions = [list(range(FIRST_POSITION, FIRST_POSITION + len(ids))) for ids in tokens]
            dataset._add(image, captions, tokens, positions)
        return dataset._finish()

    @classmethod
    def from_ids(cls, path, images_dir, tokenizer, suffix=".jpg", max_text_len=128, max_images=0, captions_per_image=0,
                 exif=True, check_pictures=True):
        """The authors' ``.ids`` file, whose token and position ids are taken as they are (and cut as above)."""
        dataset = cls(tokenizer.pad_id, exif)
        for image in _first(read_ids_dataset(path, images_dir, suffix, check_pictures), max_images):
            captions = _first(image.captions, captions_per_image)
            largest = max(max(caption.token_ids) for caption in captions)
            if largest >= tokenizer.vocab_size:
                raise DataError(f"{path}: image {image.image_id} has token id {largest}, the vocabulary has "
                                f"{tokenizer.vocab_size} entries; data.vocab must be the vocabulary these ids were made with")
            texts = [tokenizer.decode(caption.token_ids).strip() for caption in captions]
            tokens = [c.token_ids if len(c.token_ids) <= max_text_len else c.token_ids[:max_text_len - 1] + c.token_ids[-1:]
                      for c in captions]
            dataset._add(image, texts, tokens, [c.position_ids[:max_text_len] for c in captions])
        return dataset._finish()

    def _add(self, image, captions, tokens, positions):
        self._counts.append(len(captions))
        self.image_ids.append(image.image_id)
        self.image_paths.append(image.path)
        self.captions.extend(captions)
        self.tokens.extend(tokens)
        self.positions.extend(positions)

    def _finish(self):
        self.text_image = np.repeat(np.arange(len(self), dtype="int64"), self._counts)
        return self

    def __len__(self):
        return len(self.image_ids)

    def picture_arrays(self, numbers, size=0):
        """The pictures ``numbers`` as arrays of a batch: pixels at ``size``, or regions."""
        if self.regions is not None:
            return self.regions.arrays([self.image_paths[number] for number in numbers])
        return {"image": self.chosen_pictures(numbers, size)}

    def pictures(self, first, last, size):
        """Pictures ``first`` to ``last - 1`` at ``size`` pixels: uint8 ``[N, S, S, 3]``; see :meth:`chosen_pictures`."""
        return self.chosen_pictures(range(first, min(last, len(self))), size)

    def chosen_pictures(self, numbers, size):
        """The pictures ``numbers`` at ``size`` pixels: uint8 ``[N, S, S, 3]``.

        Decoded pictures are kept, so that repeated evaluations and epochs decode them once: in the file of ``data.picture_cache``, or in memory
        up to the share that this process has of ``PIXEL_CACHE`` bytes.

        Raises:
            ImageError: a picture cannot be decoded; the message names its file.
        """
        if size != self._cached_size:
            self._cached_size = size
            self._cache = (PictureFile(self.cache_directory, self.image_paths, size, self.exif) if self.cache_directory else
                           MemoryPictures(PIXEL_CACHE // self.readers))
        pictures = []
        for number in numbers:
            picture = self._cache.get(number)
            if picture is None:
                picture = resize_image(decode_image(self.image_paths[number], exif=self.exif), size)
                self._cache.put(number, picture)
            pictures.append(picture)
        return np.stack(pictures)

    def text_batch(self, rows):
        """Captions ``rows`` padded to the longest: input ids and positions int64 ``[N, L]``, mask float32 ``[N, L]``."""
        tokens = [self.tokens[row] for row in rows]
        return (pad(tokens, self.pad_id), pad([self.positions[row] for row in rows], PAD_POSITION),
                pad([[1.0] * len(ids) for ids in tokens], 0.0, np.float32))


def _first(items, count):
    return items[:count] if count else items


def ids_file(annotations, split):
    """The ``.ids`` file of a split: ``annotations`` itself, or ``<split>.all.ids`` or ``<split>.ids`` in that folder.

    Raises:
        DataError: no such file in the folder, or the file named is another split's (the authors' test run read the
            development file).
    """
    if not os.path.isdir(annotations):
        named = os.path.basename(annotations).split(".")[0]
        if named in ("train", "val", "dev", "test") and named != split:
            raise DataError(f"{annotations}: is by its name the split {named!r}, but the split {split!r} is wanted; name the right "
                            "file or, for training, only the folder")
        return annotations
    for name in (f"{split}.all.ids", f"{split}.ids"):
        if os.path.isfile(os.path.join(annotations, name)):
            return os.path.join(annotations, name)
    present = ", ".join(sorted(n for n in os.listdir(annotations) if n.endswith(".ids"))) or "no .ids file"
    raise DataError(f"{annotations}: neither {split}.all.ids nor {split}.ids in this folder; it has {present}")


class RetrievalEvaluator:
    """Zero-shot or finetuned retrieval over all pairs of a data set.

    Args:
        dataset: a :class:`RetrievalDataset`.
        name: what the metrics are reported under, usually the split.
        image_batch, pair_batch, every_steps, rerank_k: as in :class:`RetrievalEval`.
        show_progress: draw a progress bar over the pairs.
    """

    def __init__(self, dataset, name="test", image_batch=32, pair_batch=128, every_steps=0, show_progress=False, rerank_k="all"):
        self.dataset, self.name, self.every_steps, self.rerank_k = dataset, name, every_steps, rerank_k
        self.image_batch, self.pair_batch, self.show_progress = image_batch, pair_batch, show_progress
        self.scores, self.metrics, self.score_weight = None, None, None

    def run(self, model):
        """Score all pairs, or those of the shortlist; the model's mode is restored.

        Returns:
            dict of floats: :func:`~unimo2_paddle.metrics.retrieval.retrieval_metrics` of the retrieval score, and (UNIMO-2) of the
            contrastive score alone under ``contrastive_...``. With a shortlist also, in percent, ``shortlist_ir`` and ``shortlist_tr``
            (queries whose right answer, or one of them, is in it: no recall can be higher) and ``shortlist_pairs`` (of all pairs).

        Raises:
            UserInputError: the model lacks a head or cannot hold these captions.
            DataError: a picture cannot be read.
        """
        self._check(model)
        unimo = isinstance(model.config, UnimoConfig)
        with evaluation_mode(model), self._progress() as bar:
            texts = None if unimo else encode_texts(model, self.dataset, self.pair_batch)
            if unimo:
                self.scores = all_scores(model, self.dataset, self.image_batch, self.pair_batch, bar and bar.update)
            elif self.rerank_k == "all":
                images = encode_images(model, self.dataset, self.image_batch)
                self.scores = score_matrix(model, images, texts, self.pair_batch, bar and bar.update)
            else:
                self.scores = shortlist_scores(model, self.dataset, texts, self.rerank_k, self.image_batch, self.pair_batch,
                                               bar and bar.update)
        self.score_weight = None if unimo else model.config.cmcl_score_weight
        self.metrics = retrieval_metrics(self.scores.retrieval, self.dataset.text_image)
        if self.scores.contrastive is not None:
            alone = retrieval_metrics(self.scores.contrastive, self.dataset.text_image)
            self.metrics.update((f"contrastive_{key}", value) for key, value in alone.items())
        if self.scores.shortlist is not None:
            self.metrics.update(shortlist_metrics(self.scores.shortlist, self.dataset.text_image))
        return dict(self.metrics)

    def _check(self, model):
        config = model.config
        if model.vision is None or model.text is None or not {"pooling", "matching"} <= set(model.heads):
            raise UserInputError("retrieval needs a model with its visual and text Transformers and the pooling and matching heads")
        if isinstance(config, UnimoConfig) and self.dataset.regions is None:
            raise UserInputError("retrieval by UNIMO needs region features of the pictures; give data.regions")
        if isinstance(config, UnimoConfig) and self.rerank_k != "all":
            raise UserInputError(f"rerank_k {self.rerank_k}: {NO_SHORTLIST}")
        largest_id = max(max(ids) for ids in self.dataset.tokens)
        if largest_id >= config.text_vocab_size:
            raise UserInputError(f"a caption has token id {largest_id}, the model's vocabulary has {config.text_vocab_size} "
                                 "entries; data.vocab must be the vocabulary the model was trained with")
        last = max(max(ids) for ids in self.dataset.positions)
        if last >= config.text_max_position_embeddings:
            raise UserInputError(f"a caption reaches position {last}, the model has {config.text_max_position_embeddings} "
                                 f"positions; set data.max_text_len to at most "
                                 f"{config.text_max_position_embeddings - FIRST_POSITION}")

    def _progress(self):
        if not self.show_progress:
            return contextlib.nullcontext()
        from tqdm import tqdm

        texts, images = len(self.dataset.captions), len(self.dataset)
        pairs = texts * images
        if self.rerank_k != "all":
            pairs = min(pairs, self.rerank_k * (texts + images))  # at most: both shortlists may name the same pair
        return tqdm(total=pairs, desc=f"retrieval {self.name}", unit="pair", unit_scale=True, leave=False, disable=None)

    def chance(self):
        """What a random order scores on average, keys as the metrics."""
        return chance_metrics(self.dataset.text_image, len(self.dataset))

    def _require_run(self):
        if self.metrics is None:
            raise RuntimeError("RetrievalEvaluator: call run(model) first")

    def table(self):
        """The last run as text for the screen."""
        self._require_run()
        lines = [f"retrieval, {self.name}: {len(self.dataset)} pictures, {len(self.dataset.captions)} captions",
                 f"{'':<38}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'median rank':>13}"]
        kinds = (("matching", self.metrics, ""),) if self.scores.contrastive is None else (
            ("matching + contrastive", self.metrics, ""), ("contrastive alone", self.metrics, "contrastive_"))
        for title, values, prefix in (*kinds, ("chance", self.chance(), "")):
            for arrow, key in (("text -> image", "ir"), ("image -> text", "tr")):
                recalls = "".join(f"{values[f'{prefix}{key}_r{k}']:>8.2f}" for k in (1, 5, 10))
                lines.append(f"{arrow + '  ' + title:<38}{recalls}{values[f'{prefix}{key}_median_rank']:>13.1f}")
        if self.scores.shortlist is not None:
            lines.append(f"shortlist of {self.rerank_k} by contrastive score: {self.metrics['shortlist_pairs']:.2f} % of the pairs; it has the "
                         f"right answer for {self.metrics['shortlist_ir']:.2f} % (text -> image), {self.metrics['shortlist_tr']:.2f} % "
                         "(image -> text)")
        return "\n".join(lines)

    def write_report(self, directory):
        """Write ``results.json``, ``retrieval.jsonl``, ``retrieval.png`` and ``retrieval.html`` of the last run; returns their paths."""
        self._require_run()
        return write_retrieval_report(self, directory)


def shortlist_metrics(shortlist, text_image):
    """What a shortlist leaves possible, in percent: see :meth:`RetrievalEvaluator.run`.

    Args:
        shortlist: bool ``[T, I]``; text_image: int ``[T]``, the picture of every caption.
    """
    own = shortlist[np.arange(len(text_image)), text_image]
    found = np.bincount(text_image[own], minlength=shortlist.shape[1]) > 0
    return {"shortlist_ir": 100.0 * float(own.mean()), "shortlist_tr": 100.0 * float(found.mean()),
            "shortlist_pairs": 100.0 * float(shortlist.mean())}


def retrieval_evaluators(data, settings, model_config, tokenizer, show_progress=False) -> List[RetrievalEvaluator]:
    """The evaluators that the groups ``data`` (:class:`RetrievalData`) and ``eval`` (:class:`RetrievalEval`) ask for.

    Raises:
        VocabularyError: the tokenizer is not the model's.
        DataError: files are missing or malformed.
    """
    check_vocabulary(tokenizer, model_config, data.vocab)
    dataset = RetrievalDataset.read(data, tokenizer, settings.split, settings.max_images, settings.captions_per_image,
                                    open_regions(data, model_config, settings.split))
    return [RetrievalEvaluator(dataset, settings.split, settings.image_batch, settings.pair_batch, settings.every_steps,
                               show_progress, settings.rerank_k)]


class RetrievalTask(FinetuneTask):
    """Retrieval finetuning, and evaluation of any model with the pooling and matching heads."""

    sections = {**FinetuneTask.sections, "data": RetrievalData, "train": RetrievalTrain, "eval": RetrievalTaskEval}
    systems = (Unimo2Config, UnimoConfig)

    @classmethod
    def check(cls, config):
        model = known_system(config.model)
        found = [] if model is None else [told for told in [mismatch(config.data, model)] if told]
        if isinstance(model, UnimoConfig):
            if config.eval.rerank_k != "all":
                found.append(f"eval.rerank_k: {NO_SHORTLIST}")
            if config.train.objective == "in_batch":
                found.append("train.objective: in_batch needs UNIMO-2's contrastive features; UNIMO learns by circle")
        return found

    @property
    def selection(self):
        return f"{self.config.eval.split}/recall_mean"

    def build_model(self):
        section = self.config.model
        config = section.model_config()
        # pre-trained and text models have no matching head, in UNIMO it is the task's own
        patterns = ("match_fc*",) if isinstance(config, UnimoConfig) and self.is_training() else ()
        return build_backbone(section, self.config.run.seed, config, heads=("pooling", "matching"), head_patterns=patterns)

    def description(self):
        return stored_limit(self.config.data)

    def dataset(self, split):
        config, train = self.config, self.config.train
        if config.eval.split == "test":
            raise ConfigError("eval.split is test, but the test split must not choose the best checkpoint; train with "
                              "-o eval.split=val and judge it once by unimo2 eval")
        tokenizer = Tokenizer.from_directory(config.data.vocab)
        self.model_config = config.model.model_config()
        check_vocabulary(tokenizer, self.model_config, config.data.vocab)
        dataset = RetrievalDataset.read(config.data, tokenizer, split, regions=open_regions(config.data, self.model_config, split))
        if train.objective == "in_batch":
            return InBatchPairs(dataset, train.batch_size)
        return CirclePairs(dataset, train.image_negatives, train.caption_negatives)

    def collate(self, samples):
        return collate_pairs(samples, self.split("train").dataset, getattr(self.model_config, "image_size", 0))

    def work(self, batch):
        train, pairs = self.config.train, batch["pair_image"].size
        if train.objective == "in_batch":
            pairs = 3 * min(train.matched_pairs or pairs, pairs)  # the true pair, another text, another picture
        return retrieval_work(self.model_config, batch, pairs)

    def loss(self, model, batch):
        train = self.config.train
        return in_batch_terms(model, batch, train.matched_pairs) if train.objective == "in_batch" else circle_terms(model, batch, train)

    def evaluators(self):
        config = self.config
        tokenizer = Tokenizer.from_directory(config.data.vocab)
        evaluators = retrieval_evaluators(config.data, config.eval, config.model.model_config(), tokenizer, config.run.progress)
        for evaluator in evaluators:
            evaluator.every_steps = self.evaluate_every()
        return evaluators
