"""What tasks on a picture and a sentence share (VQA, visual entailment): pictures from files or a store of regions, tokens, batches."""
import os
from collections import OrderedDict
from dataclasses import dataclass, field

from unimo2_paddle.data.collate import text_arrays, with_special_tokens
from unimo2_paddle.data.images import Augmentation, augment_image, decode_image, resize_image
from unimo2_paddle.data.tokenizer import Tokenizer
from unimo2_paddle.models.configuration import UnimoConfig
from unimo2_paddle.tasks.base import check_vocabulary
from unimo2_paddle.tasks.classification import ClassificationTask, build_classifier
from unimo2_paddle.tasks.unimo_inputs import MAX_REGIONS, image_arrays, known_system, mismatch, open_regions, region_problems

PICTURE_CACHE = 1 << 30  # bytes of resized pictures kept in memory; those used least recently go first


@dataclass
class PairData:
    """The keys of group ``data`` that tasks on pairs have in common.

    ``images``: picture folder; ``vocab``: folder of the three vocabulary files; ``max_text_len``: tokens with [CLS] and [SEP];
    ``exif``: turn pictures as their EXIF orientation says; ``num_workers``: processes that build batches;
    ``augmentation``: random changes of training pictures (mirroring makes "left" and "right" wrong). For UNIMO ``regions`` is the store of
    region features (``{split}`` in it is replaced) and ``max_regions`` how many a picture has at most with the global one; ``images`` may
    then be empty, reports have no pictures then.
    """

    images: str = ""
    vocab: str = ""
    max_text_len: int = 64
    exif: bool = True
    num_workers: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)
    regions: str = ""
    max_regions: int = MAX_REGIONS

    def problems(self):
        found = ([] if self.vocab else ["vocab: is empty; give a path"]) + region_problems(self)
        if self.max_text_len < 3:
            found.append(f"max_text_len: must be at least 3 ([CLS], a token, [SEP]), is {self.max_text_len}")
        if self.num_workers < 0:
            found.append(f"num_workers: must be at least 0, is {self.num_workers}")
        return found + [f"augmentation.{text}" for text in self.augmentation.problems()]


@dataclass
class PairHead:
    """Group ``head``: how picture and sentence meet under the classifier.

    ``layout``: "pair" (through grounded tokens only, as in pre-training and retrieval) or "caption" (the sentence also sees the patches,
    as in captioning; the grounded tokens are those of the picture alone). ``dropout``: before the last layer. ``contrastive``: the last
    layer also reads the product of the contrastive features (ours; of use after a short pre-training).
    """

    layout: str = "pair"
    dropout: float = 0.1
    contrastive: bool = False

    def problems(self):
        found = [] if self.layout in ("pair", "caption") else [f"layout: {self.layout!r} is not one of pair, caption"]
        return found + ([] if 0 <= self.dropout < 1 else [f"dropout: must be in [0, 1), is {self.dropout}"])


class Pictures:
    """Picture files at the model's size: uint8 ``[S, S, 3]``, decoded once as long as memory lasts."""

    def __init__(self, size, exif=True, augmentation=None, cache_bytes=PICTURE_CACHE):
        self.size, self.exif, self.augmentation = size, exif, augmentation
        self._cache, self._most = OrderedDict(), cache_bytes // (size * size * 3)

    def get(self, path, rng=None):
        """The picture at ``path``; changed at random when ``rng`` and an augmentation are given.

        Raises:
            ImageError: the file is missing or cannot be decoded.
        """
        if rng is not None and self._augments():
            return augment_image(decode_image(path, exif=self.exif), self.size, self.augmentation, rng)
        picture = self._cache.pop(path, None)
        if picture is None:
            picture = resize_image(decode_image(path, exif=self.exif), self.size)
        self._cache[path] = picture
        if len(self._cache) > self._most:
            self._cache.popitem(last=False)
        return picture

    def _augments(self):
        chances = ("crop", "flip", "jitter", "greyscale", "blur", "authors_crop", "authors_turn")
        return self.augmentation is not None and any(getattr(self.augmentation, key) > 0 for key in chances)


class PairDataset:
    """Records with ``path`` and ``text`` as samples for training and evaluation.

    Attributes:
        records: in file order; target: ``target(record)`` gives a sample's target, ``None`` where there is none.
    """

    def __init__(self, records, tokenizer, pictures, max_text_len, target):
        self.records, self.tokenizer, self.pictures = records, tokenizer, pictures
        self.max_text_len, self.target = max_text_len, target

    def __len__(self):
        return len(self.records)

    def sample(self, index, rng):
        """Picture, token ids and target of one record; ``rng`` only in training."""
        record = self.records[index]
        return {"image": self.pictures.get(record.path, rng), "ids": self._ids(record), "target": self.target(record)}

    def _ids(self, record):
        tokens, most = getattr(record, "tokens", ()), self.max_text_len
        if not tokens:
            return with_special_tokens(self.tokenizer.encode(record.text), self.tokenizer, most)
        return list(tokens if len(tokens) <= most else (*tokens[: most - 1], self.tokenizer.sep_id))


class PairTask(ClassificationTask):
    """A classifier on pairs. Subclasses implement ``records(split)``, ``target(record)``, ``target_array(targets)`` and the metrics."""

    sections = {**ClassificationTask.sections, "head": PairHead}
    inputs = "pair"

    def __init__(self, config):
        super().__init__(config)
        self.model_config = config.model.model_config()
        self.tokenizer = Tokenizer.from_directory(config.data.vocab)
        check_vocabulary(self.tokenizer, self.model_config, config.data.vocab)

    @classmethod
    def check(cls, config):
        return super().check(config) + text_length_problems(config) + _system_problems(config)

    def build_model(self):
        head = self.config.head
        return build_classifier(self.config.model, self.config.run.seed, self.model_config, self.inputs, self.num_labels(), head.dropout,
                                new_head=self.is_training(), layout=head.layout, contrastive=head.contrastive)

    def records(self, split):
        """The records of a split, with ``path`` and ``text``."""
        raise NotImplementedError

    def target(self, record):
        """The target of a record, or ``None``."""
        raise NotImplementedError

    def target_array(self, targets):
        """The targets of a batch as an array."""
        raise NotImplementedError

    def dataset(self, split):
        data, records = self.config.data, self.records(split)
        pictures = open_regions(data, self.model_config, split)
        if pictures is None:
            pictures = Pictures(self.model_config.image_size, data.exif, data.augmentation)
        else:
            pictures.name(records, f"split {split!r}")
        return PairDataset(records, self.tokenizer, pictures, data.max_text_len, self.target)

    def collate(self, samples):
        batch = {**image_arrays([sample["image"] for sample in samples], self.config.data.max_regions or None),
                 **text_arrays([sample["ids"] for sample in samples], self.tokenizer.pad_id)}
        targets = [sample["target"] for sample in samples]
        if all(target is not None for target in targets):
            batch["labels"] = self.target_array(targets)
        return batch


def _system_problems(config):
    """Problems between the model's system and the data and head that it is to have."""
    model = known_system(config.model)
    if model is None:
        return []
    found = [told for told in [mismatch(config.data, model)] if told]
    if isinstance(model, UnimoConfig) and (config.head.layout != "pair" or config.head.contrastive):
        found.append("head: layout and contrastive are UNIMO-2's; UNIMO reads picture and sentence in one sequence. Leave both out")
    return found


def text_length_problems(config):
    """A problem when the model has fewer text positions than ``data.max_text_len`` needs."""
    section = config.model
    if not section.config and not os.path.exists(section.init_path):
        return []  # said when the run starts: a checkpoint may still have to be made
    positions = section.model_config().text_max_position_embeddings
    needed = config.data.max_text_len + 2
    return [] if needed <= positions else [f"data.max_text_len: {config.data.max_text_len} tokens need {needed} text positions, "
                                           f"the model has {positions}"]
