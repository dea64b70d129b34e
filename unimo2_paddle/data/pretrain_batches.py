"""Pre-training batches: shards and vocabulary in, dictionaries of numpy arrays out."""
import json
import os
from dataclasses import dataclass, field
from typing import List, Union

import numpy as np

from unimo2_paddle.data.collate import PAD_POSITION, flat_positions, pad, text_arrays, with_special_tokens
from unimo2_paddle.data.images import Augmentation, augment_image, decode_image
from unimo2_paddle.data.masking import mask_spans, sequence_fragments
from unimo2_paddle.data.mixture import STEP_DRAW, generator
from unimo2_paddle.data.shards import EpochOrder, ShardSet
from unimo2_paddle.errors import DataError

MAX_CHARACTERS_PER_TOKEN = 40  # a text is cut before tokenising: a 10,000-word caption must not cost 10,000 words of work
SUBSTITUTES = 20               # how many other records are tried in place of a bad one


@dataclass
class Source:
    """Shards (path, pattern or list) and their weight within the corpus."""

    shards: Union[str, List[str]]
    weight: float = 1.0

    def problems(self):
        return [] if self.weight > 0 else [f"weight: must be above 0, is {self.weight}"]


@dataclass
class PretrainData:
    """Group ``data`` of pre-training: three corpora, each a weighted list of shard sets."""

    vocab: str
    pairs: List[Source] = field(default_factory=list)
    images: List[Source] = field(default_factory=list)
    texts: List[Source] = field(default_factory=list)
    max_text_len: int = 128
    shuffle_window: int = 10000
    cache_dir: str = ""             # where shard indices are kept between runs; empty: in memory only
    num_workers: int = 0
    max_bad_ratio: float = 0.01
    pair_augmentation: Augmentation = field(default_factory=Augmentation)
    view_augmentation: Augmentation = field(default_factory=Augmentation)

    def problems(self):
        problems = [f"{key}: must be at least {low}, is {getattr(self, key)}"
                    for key, low in (("max_text_len", 3), ("shuffle_window", 1), ("num_workers", 0)) if getattr(self, key) < low]
        if not 0 <= self.max_bad_ratio <= 1:
            problems.append(f"max_bad_ratio: must be between 0 and 1, is {self.max_bad_ratio}")
        return problems


def open_sources(data, corpora, seed):
    """Open the shards of the corpora in use.

    Returns:
        readers: corpus -> list of ``ShardSet``; orders: corpus -> list of (weight, ``EpochOrder``).

    Raises:
        DataError: no shard matches, or a shard is empty or broken (see ``ShardSet``).
    """
    readers, orders = {}, {}
    for number, corpus in enumerate(corpora):
        sources = getattr(data, corpus)
        readers[corpus] = [ShardSet(s.shards, corpus, cache_dir=data.cache_dir or None) for s in sources]
        orders[corpus] = [(source.weight, EpochOrder(reader.shard_lengths, generator(seed, number, i).integers(1 << 62), data.shuffle_window))
                          for i, (source, reader) in enumerate(zip(sources, readers[corpus]))]
    return readers, orders


class BadRecords:
    """Counts bad records, writes each with its reason to a file, and stops the run when there are too many."""

    def __init__(self, path, max_ratio):
        self.path, self.max_ratio, self.seen, self.bad = path, max_ratio, 0, 0

    def note(self, key, shard, error):
        """Count one bad record; raises ``DataError`` when the share passes the limit (after 100 records)."""
        self.bad += 1
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"shard": shard, "key": key, "reason": str(error)}) + "\n")
        if self.seen >= 100 and self.bad > self.max_ratio * self.seen:
            raise TooManyBadRecords(f"{self.bad} of {self.seen} records are bad, more than data.max_bad_ratio {self.max_ratio} allows; "
                                    f"the last one: {error}. All are listed in {self.path}")


class TooManyBadRecords(DataError):
    """The share of bad records passed its limit."""


class PretrainBatchBuilder:
    """Builds the batch of a ``Draw``: reads, decodes, tokenises, masks. A function of the draw alone (and safe in worker processes).

    Batches are dicts of numpy arrays (images uint8) with the corpus name under ``"corpus"``; see the ``_..._batch`` methods for keys.
    """

    def __init__(self, data, readers, tokenizer, model_config, seed, mask_ratio, group, grounding_mask_ratio, seq2seq, bad_records):
        self.data, self.readers, self.tokenizer, self.config = data, readers, tokenizer, model_config
        self.seed, self.mask_ratio, self.group, self.seq2seq = seed, mask_ratio, group, seq2seq
        self.masked_grounding = grounding_mask_ratio
        self.bad_records = BadRecords(bad_records, data.max_bad_ratio)

    def __call__(self, draw):
        build = {"pairs": self._pair_batch, "images": self._image_batch, "texts": self._text_batch}[draw.corpus]
        return {"corpus": draw.corpus, "samples": draw.size, **build(draw)}

    def _samples(self, draw, make):
        """``make(record, rng)`` for every slot; a bad record is replaced by another one drawn from the same source."""
        samples = []
        for slot, source, index in draw.slots:
            rng = draw.record_generator(self.seed, slot)
            reader = self.readers[draw.corpus][source]
            for _ in range(SUBSTITUTES):
                self.bad_records.seen += 1
                record = None
                try:
                    record = reader.read(index)
                    samples.append(make(record, rng))
                    break
                except TooManyBadRecords:
                    raise
                except DataError as error:
                    self.bad_records.note(record.key if record else index, record.shard if record else reader.paths[0], error)
                    index = int(rng.integers(len(reader)))
            else:
                raise DataError(f"{SUBSTITUTES} records in a row are bad in {reader.paths[0]} and its fellows; see {self.bad_records.path}")
        return samples

    def _caption(self, record, rng):
        texts = record.texts
        text = texts[int(rng.integers(len(texts)))][: MAX_CHARACTERS_PER_TOKEN * self.data.max_text_len]
        ids, starts = self.tokenizer.encode_with_word_starts(text)
        if not ids:
            raise DataError(f"record {record.key}: the text is empty")
        return ids, starts

    def _masked(self, ids, starts, rng):
        """(full ids, masked ids, masked positions, labels) of a text with its special tokens."""
        full = with_special_tokens(ids, self.tokenizer, self.data.max_text_len)
        starts = [True] + list(starts[: len(full) - 2]) + [True]
        special = [True] + [False] * (len(full) - 2) + [True]
        masked, positions = mask_spans(full, starts, special, rng, self.tokenizer.mask_id, self.tokenizer.vocab_size, self.mask_ratio)
        return full, masked, positions, np.asarray(full, dtype=np.int64)[positions]

    def _masked_text_arrays(self, texts):
        full, masked, positions, labels = zip(*texts)
        arrays = text_arrays(full, self.tokenizer.pad_id)
        arrays["masked_ids"] = pad(masked, self.tokenizer.pad_id)
        arrays["predict_from"] = flat_positions(positions, arrays["input_ids"].shape[1])
        arrays["labels"] = np.concatenate(labels)
        return arrays

    def _token_mask(self, draw, rows):
        """Which grounded tokens are hidden, ``[rows, K]``, when the corpus trains on them."""
        if not self.masked_grounding.get(draw.corpus):
            return {}
        masks = [generator(self.seed, STEP_DRAW, 1, draw.step, draw.micro, slot).random((rows, self.config.topk_value))
                 for slot, _, _ in draw.slots]
        masks = np.stack(masks, axis=1).reshape([-1, self.config.topk_value])
        return {"token_mask": (masks < self.config.grounding_mask_ratio).astype(np.float32)}

    def _pair_batch(self, draw):
        """image [B, S, S, 3]; input_ids, masked_ids, position_ids, text_mask [B, L]; predict_from, labels [M]; noise [B, 2, group]."""
        def make(record, rng):
            ids, starts = self._caption(record, rng)
            image = decode_image(record.image)
            image = augment_image(image, self.config.image_size, self.data.pair_augmentation, rng)
            return image, self._masked(ids, starts, rng), rng.gumbel(size=(2, self.group))

        images, texts, noise = zip(*self._samples(draw, make))
        return {"image": np.stack(images), "noise": np.stack(noise).astype(np.float32), **self._masked_text_arrays(texts),
                **self._token_mask(draw, 1)}

    def _image_batch(self, draw):
        """first_view, second_view [B, S, S, 3]: two augmentations of each image."""
        def make(record, rng):
            image = decode_image(record.image)
            return [augment_image(image, self.config.image_size, self.data.view_augmentation, rng) for _ in range(2)]

        first, second = zip(*self._samples(draw, make))
        return {"first_view": np.stack(first), "second_view": np.stack(second), **self._token_mask(draw, 2)}

    def _text_batch(self, draw):
        """Masked words as in pairs; or fragments: input_ids, position_ids [B, L], text_mask [B, L, L], predict_from, labels [M]."""
        fragments = self.seq2seq and generator(self.seed, STEP_DRAW, 0, draw.step).random() < 0.5

        def make(record, rng):
            ids, starts = self._caption(record, rng)
            if not fragments:
                return self._masked(ids, starts, rng)
            # every fragment adds a [CLS], at most one per four tokens
            return sequence_fragments(ids[: max(1, int(0.8 * (self.data.max_text_len - 4)))], rng, self.tokenizer.cls_id, self.tokenizer.sep_id)

        samples = self._samples(draw, make)
        if not fragments:
            return self._masked_text_arrays(samples)
        ids = pad([f.ids for f in samples], self.tokenizer.pad_id)
        length = ids.shape[1]
        mask = np.zeros((len(samples), length, length), dtype=np.float32)
        for square, fragment in zip(mask, samples):
            square[: len(fragment.ids), : len(fragment.ids)] = fragment.mask
        return {"input_ids": ids, "position_ids": pad([f.position_ids for f in samples], PAD_POSITION), "text_mask": mask,
                "predict_from": flat_positions([f.predict_from for f in samples], length),
                "labels": np.concatenate([f.labels for f in samples])}

