"""Pre-training batches: shards and vocabulary in, dictionaries of numpy arrays out."""
import fcntl
import json
import logging
import mmap
import os
from dataclasses import dataclass, field
from typing import List, Union

import numpy as np

from unimo2_paddle.data.collate import PAD_POSITION, flat_positions, pad, text_arrays, with_special_tokens
from unimo2_paddle.data.images import Augmentation, augment_image, decode_image
from unimo2_paddle.data.masking import mask_spans, sequence_fragments
from unimo2_paddle.data.mixture import CORPORA, ORDER_DRAW, STEP_DRAW, generator
from unimo2_paddle.data.remote_shards import Lookahead, ShardCache, is_remote
from unimo2_paddle.data.shards import EpochOrder, ShardSet
from unimo2_paddle.data.workers import note, process_number
from unimo2_paddle.errors import DataError

logger = logging.getLogger(__name__)

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
    allow_pipe: bool = False        # whether shards may be commands, "pipe:aws s3 cp s3://bucket/{000..099}.tar -"
    shard_cache: str = ""           # directory for copies of shards that commands fetch, one per machine
    shard_cache_gb: float = 100.0   # how large it may grow
    num_workers: int = 0
    max_bad_ratio: float = 0.01
    pair_augmentation: Augmentation = field(default_factory=Augmentation)
    view_augmentation: Augmentation = field(default_factory=Augmentation)

    def problems(self):
        problems = [f"{key}: must be at least {low}, is {getattr(self, key)}"
                    for key, low in (("max_text_len", 3), ("shuffle_window", 1), ("num_workers", 0)) if getattr(self, key) < low]
        if not 0 <= self.max_bad_ratio <= 1:
            problems.append(f"max_bad_ratio: must be between 0 and 1, is {self.max_bad_ratio}")
        problems += shard_problems(self, CORPORA)
        if self.shard_cache_gb <= 0:
            problems.append(f"shard_cache_gb: must be above 0, is {self.shard_cache_gb}")
        return problems


def shard_problems(data, corpora):
    """Problems of a data group with the shards of these corpora that commands fetch."""
    problems = []
    for corpus in corpora:
        for number, source in enumerate(getattr(data, corpus)):
            shards = [source.shards] if isinstance(source.shards, str) else source.shards
            pipes = [shard for shard in shards if is_remote(shard)]
            if pipes and not data.allow_pipe:
                problems.append(f"{corpus}[{number}].shards: {pipes[0]!r} runs a shell command, which is off by default; set "
                                "data.allow_pipe: true if you trust this configuration")
            elif pipes and not data.shard_cache:
                problems.append(f"shard_cache: is required because {corpus}[{number}].shards are fetched by commands")
    return problems


def open_sources(data, corpora, seed, bad_records, list_bad=True, turn=(0, 1)):
    """Open the shards of the corpora in use.

    Args:
        data: ``PretrainData``; corpora: names of those in use; seed: of their reading orders.
        bad_records: ``BadRecords``; learns what indexing leaves out, and with ``list_bad`` (one worker only) writes it down.
        turn: see ``ShardSet``.

    Returns:
        readers: corpus -> list of ``ShardSet``; orders: corpus -> list of (weight, ``EpochOrder``).

    Raises:
        DataError: no shard matches, a shard is empty or broken (see ``ShardSet``), or too many of its records are bad.
    """
    readers, orders, remote, indices = {}, {}, None, data.cache_dir
    if data.allow_pipe and data.shard_cache:
        remote = ShardCache(os.path.abspath(data.shard_cache), int(data.shard_cache_gb * 1e9))
        indices = indices or os.path.join(data.shard_cache, "index")  # without them every run would begin by fetching all shards
    for corpus in corpora:
        readers[corpus], orders[corpus] = [], []
        for number, source in enumerate(getattr(data, corpus)):
            reader = ShardSet(source.shards, corpus, cache_dir=indices or None, bad_record=bad_records.write if list_bad else None,
                              remote=remote, turn=turn)
            bad_records.check(reader.bad_records, reader.bad_records + len(reader), f"records of data.{corpus}[{number}]")
            order_seed = generator(seed, ORDER_DRAW, CORPORA.index(corpus), number).integers(1 << 62)
            readers[corpus].append(reader)
            orders[corpus].append((source.weight, EpochOrder(reader.shard_lengths, order_seed, data.shuffle_window)))
    return readers, orders


def lookahead_for(readers, orders):
    """The ``Lookahead`` over what :func:`open_sources` gave."""
    return Lookahead({(corpus, number): (reader, orders[corpus][number][1])
                      for corpus in readers for number, reader in enumerate(readers[corpus])})


class BadRecords:
    """Counts bad records over all workers of a process, lists each once with its reason, and stops the run when there are too many.

    Args:
        path: JSON lines file, made when the first bad record is found and continued by a resumed run.
        max_ratio: share of bad records above which the run stops, once ``ENOUGH_RECORDS`` were seen.
        option: how the user sets ``max_ratio``, for the message.
    """

    ENOUGH_RECORDS = 100
    _PROCESSES = 512

    def __init__(self, path, max_ratio, option="data.max_bad_ratio"):
        self.path, self.max_ratio, self.option = path, max_ratio, option
        # one row per worker, so that counting needs no lock that a dying worker could keep
        self._counts = np.frombuffer(mmap.mmap(-1, 16 * self._PROCESSES), np.int64).reshape(-1, 2)
        self._written, self._offset, self._mend = set(), 0, b""

    @property
    def seen(self):
        """Records read so far, by all workers."""
        return int(self._counts[:, 0].sum())

    @property
    def bad(self):
        """How many of them were bad."""
        return int(self._counts[:, 1].sum())

    def saw(self):
        """Count one record that was read."""
        self._counts[process_number() % self._PROCESSES, 0] += 1

    def note(self, shard, key, error):
        """Count and write down one bad record; raises ``DataError`` when the share passes the limit."""
        self._counts[process_number() % self._PROCESSES, 1] += 1
        self.write(shard, key, str(error))
        bad, seen = self.bad, self.seen
        if bad in (1, 10, 100) or bad % 1000 == 0:
            logger.warning("bad records so far: %d of %d, each listed once in %s; the last one: %s", bad, seen, self.path, error)
        self.check(bad, seen, "records read", f"; the last one: {error}")

    def write(self, shard, key, reason):
        """Write down one bad record, unless the file already has it.

        Raises:
            DataError: the file cannot be written.
        """
        if (shard, key) in self._written:
            return
        try:
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            with open(self.path, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # what other workers found is read before anything is added
                self._read(file)
                if (shard, key) not in self._written:
                    entry = json.dumps({"shard": shard, "key": key, "reason": reason}) + "\n"
                    file.write(self._mend + entry.encode("utf-8"))
        except OSError as error:
            raise DataError(f"{self.path}: cannot list bad records: {error.strerror}") from None
        self._written.add((shard, key))

    def check(self, bad, seen, what, detail=""):
        """Raise ``DataError`` when ``bad`` of ``seen`` is too much."""
        if seen >= self.ENOUGH_RECORDS and bad > self.max_ratio * seen:
            raise DataError(f"{bad} of {seen} {what} are bad, more than {self.option} {self.max_ratio} allows{detail}. "
                            f"They are listed in {self.path}; repair the data or raise {self.option}")

    def _read(self, file):
        """Take in the lines that were added since the last time."""
        file.seek(self._offset)
        added = file.read()
        self._mend = b"\n" if added and not added.endswith(b"\n") else b""  # a killed run left half a line
        for line in added.splitlines():
            try:
                entry = json.loads(line)
                self._written.add((entry["shard"], entry["key"]))
            except (ValueError, KeyError, TypeError):
                continue  # cut off when a run was killed
        self._offset = file.tell()


class PretrainBatchBuilder:
    """Builds the batch of a ``Draw``: reads, decodes, tokenises, masks. A function of the draw alone (and safe in worker processes).

    Batches are dicts of numpy arrays (images uint8) with the corpus name under ``"corpus"`` and the records as ``shard:key`` under
    ``"keys"``; see the ``_..._batch`` methods for the arrays.

    Args:
        data: ``PretrainData``; readers: from :func:`open_sources`; tokenizer: ``Tokenizer``; model_config: ``Unimo2Config``.
        seed: of everything random; mask_ratio: share of masked words; group: size of the groups hard negatives are drawn in;
            fused_per_group: how many pairs of a group are masked and matched.
        masked_grounding: the corpora that train on masked grounded tokens; seq2seq: share of the text steps made of fragments.
        bad_records: ``BadRecords``.
    """

    def __init__(self, data, readers, tokenizer, model_config, seed, mask_ratio, group, masked_grounding, seq2seq, bad_records,
                 fused_per_group=None):
        self.data, self.readers, self.tokenizer, self.config = data, readers, tokenizer, model_config
        self.seed, self.mask_ratio, self.group, self.seq2seq = seed, mask_ratio, group, seq2seq
        self.fused_per_group = fused_per_group or group
        self.masked_grounding, self.bad_records = masked_grounding, bad_records

    def __call__(self, draw):
        build = {"pairs": self._pair_batch, "images": self._image_batch, "texts": self._text_batch}[draw.corpus]
        arrays = build(draw)
        return {"corpus": draw.corpus, "samples": draw.size, "keys": draw.keys, **arrays}

    def _samples(self, draw, make):
        """``make(record, rng)`` for every slot; a bad record is replaced by another one, first from the same shard."""
        samples, draw.keys = [], []
        for slot, source, index in draw.slots:
            rng = draw.record_generator(self.seed, slot)
            reader = self.readers[draw.corpus][source]
            for attempt in range(SUBSTITUTES):
                self.bad_records.saw()
                shard, key = reader.place(index)
                note(f"{shard}, record {key}")
                try:
                    samples.append(make(reader.read(index), rng))
                    draw.keys.append(f"{shard}:{key}")
                    break
                except DataError as error:
                    self.bad_records.note(shard, key, error)
                    # its own shard is at hand, another one may have to be fetched; but a shard can be bad as a whole
                    near = reader.neighbours(index) if attempt < SUBSTITUTES // 2 else range(len(reader))
                    index = int(rng.integers(near.start, near.stop))
            else:
                raise DataError(f"{SUBSTITUTES} records in a row are bad in {shard} and its fellows; they are listed in "
                                f"{self.bad_records.path}")
        return samples

    def _picture(self, record, augmentation, rng, count):
        image = decode_image(record.image, name=f"{record.shard}, record {record.key}")
        return [augment_image(image, self.config.image_size, augmentation, rng) for _ in range(count)]

    def _caption(self, record, rng):
        texts = record.texts
        text = texts[int(rng.integers(len(texts)))][: MAX_CHARACTERS_PER_TOKEN * self.data.max_text_len]
        ids, starts = self.tokenizer.encode_with_word_starts(text)
        if not ids:
            raise DataError(f"{record.shard}, record {record.key}: the text is empty")
        return ids, starts

    def _masked(self, ids, starts, rng):
        """(full ids, masked ids, masked positions, labels) of a text with its special tokens."""
        full = with_special_tokens(ids, self.tokenizer, self.data.max_text_len)
        starts = [True] + list(starts[: len(full) - 2]) + [True]
        special = [True] + [False] * (len(full) - 2) + [True]
        masked, positions = mask_spans(full, starts, special, rng, self.tokenizer.mask_id, self.tokenizer.vocab_size, self.mask_ratio)
        return full, masked, positions, np.asarray(full, dtype=np.int64)[positions]

    def _masked_text_arrays(self, texts, rows=None):
        """Padded texts; masked words of the texts numbered ``rows`` (default: all), ``predict_from`` counting in those alone."""
        full = [text[0] for text in texts]
        _, masked, positions, labels = zip(*(texts if rows is None else [texts[row] for row in rows]))
        arrays = text_arrays(full, self.tokenizer.pad_id)
        length = arrays["input_ids"].shape[1]
        arrays["masked_ids"] = pad(masked, self.tokenizer.pad_id, length=length)
        arrays["predict_from"] = flat_positions(positions, length)
        arrays["labels"] = np.concatenate(labels)
        return arrays

    def _token_mask(self, draw, rows, chosen=slice(None)):
        """Which grounded tokens of the chosen samples are hidden, ``[rows * B, K]``, when the corpus trains on them."""
        if draw.corpus not in self.masked_grounding:
            return {}
        masks = [generator(self.seed, STEP_DRAW, 1, draw.step, slot).random((rows, self.config.topk_value))
                 for slot, _, _ in np.asarray(draw.slots)[chosen]]
        masks = np.stack(masks, axis=1).reshape([-1, self.config.topk_value])
        return {"token_mask": (masks < self.config.grounding_mask_ratio).astype(np.float32)}

    def _pair_batch(self, draw):
        """image [B, S, S, 3]; input_ids, position_ids, text_mask [B, L]; fused [F]: the pairs that are masked and matched, with
        masked_ids [F, L]; predict_from, labels [M]; noise [F, 2, group]."""
        def make(record, rng):
            ids, starts = self._caption(record, rng)
            (image,) = self._picture(record, self.data.pair_augmentation, rng, 1)
            return image, self._masked(ids, starts, rng), rng.gumbel(size=(2, self.group))

        images, texts, noise = zip(*self._samples(draw, make))
        # by place in the group, which is the same however many workers share the global batch
        fused = np.flatnonzero(np.arange(len(images)) % self.group < self.fused_per_group)
        return {"image": np.stack(images), "noise": np.stack(noise)[fused].astype(np.float32), "fused": fused,
                **self._masked_text_arrays(texts, fused), **self._token_mask(draw, 1, fused)}

    def _image_batch(self, draw):
        """first_view, second_view [B, S, S, 3]: two augmentations of each image."""
        def make(record, rng):
            return self._picture(record, self.data.view_augmentation, rng, 2)

        first, second = zip(*self._samples(draw, make))
        return {"first_view": np.stack(first), "second_view": np.stack(second), **self._token_mask(draw, 2)}

    def _text_batch(self, draw):
        """Masked words as in pairs; or fragments: input_ids, position_ids [B, L], text_mask [B, L, L], predict_from, labels [M]."""
        fragments = generator(self.seed, STEP_DRAW, 0, draw.step).random() < self.seq2seq

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

