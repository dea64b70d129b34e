"""UNIMO's pre-training batches: regions, captions, their rewritten and retrieved companions, as dictionaries of numpy arrays."""
from dataclasses import dataclass, field
from typing import List

import numpy as np

from unimo2_paddle.data.collate import flat_positions, pad, text_arrays, with_special_tokens
from unimo2_paddle.data.pretrain_batches import MAX_CHARACTERS_PER_TOKEN, PretrainBatchBuilder
from unimo2_paddle.data.region_inputs import region_arrays
from unimo2_paddle.data.region_masking import mask_regions
from unimo2_paddle.errors import DataError

LEVELS = ("sentence", "phrase", "word")


@dataclass
class Candidates:
    """What a pair is compared with in contrastive learning.

    ``group``: so many consecutive pairs give each other's random candidates. ``joint_per_group``: so many of each group go through the
    objectives that encode picture and text together (encoding alone is cheap); 0: all of them. The other numbers are per pair, and where
    fewer were made there are fewer: ``paraphrases`` (positive), ``hard_negatives`` (rewritten at ``levels``, which take turns) and
    ``random_negatives`` (alternately another caption and another picture of the group) are encoded jointly; ``related_texts`` and
    ``related_images`` (retrieved, positive) alone.
    """

    group: int = 16
    joint_per_group: int = 0
    paraphrases: int = 1
    hard_negatives: int = 3
    levels: List[str] = field(default_factory=lambda: list(LEVELS))
    random_negatives: int = 2
    related_texts: int = 1
    related_images: int = 1

    def problems(self):
        found = [f"{key}: must be at least {low}, is {getattr(self, key)}"
                 for key, low in (("group", 2), ("paraphrases", 0), ("hard_negatives", 0), ("random_negatives", 0), ("related_texts", 0),
                                  ("related_images", 0)) if getattr(self, key) < low]
        if not 0 <= self.joint_per_group <= self.group:
            found.append(f"joint_per_group: must be between 0 and group {self.group}, is {self.joint_per_group}")
        if self.random_negatives > 2 * (self.group - 1):
            found.append(f"random_negatives: a group of {self.group} has {2 * (self.group - 1)} others, {self.random_negatives} are asked for")
        unknown = [level for level in self.levels if level not in LEVELS]
        if unknown or not self.levels:
            found.append(f"levels: {', '.join(unknown) or 'nothing'} is not of {', '.join(LEVELS)}")
        return found

    @property
    def rewritten(self):
        """Whether augmentations are asked for."""
        return self.paraphrases + self.hard_negatives + self.related_texts + self.related_images > 0


@dataclass
class _PairSample:
    """What is drawn for one pair; ``None`` in a list: fewer were made than asked for."""

    regions: object
    text: tuple            # (ids, masked ids, masked positions, labels)
    hidden: np.ndarray     # bool [N]
    predicted: np.ndarray  # bool [N]
    rewritten: list        # token ids of the paraphrases, then of the hard negatives
    related_texts: list    # token ids
    related_images: list   # Regions
    others: np.ndarray     # distances (1 .. group - 1) to the group's pairs that lend their caption or picture


class UnimoBatchBuilder(PretrainBatchBuilder):
    """Builds the batch of a ``Draw``; texts as in UNIMO-2, pairs and images of regions. A function of the draw alone.

    Args:
        data: ``UnimoPretrainData``; readers: from ``open_unimo_sources``; related: ``RelatedPictures``; tokenizer; model_config: ``UnimoConfig``,
            which has the mask ratios; seed: of everything random; candidates: :class:`Candidates`.
        words, regions: whether masked words and masked regions of pairs are asked for; classes: the corpora whose regions' classes are.
        seq2seq: share of the text steps made of fragments; bad_records: ``BadRecords``.
    """

    def __init__(self, data, readers, related, tokenizer, model_config, seed, candidates, words, regions, classes, seq2seq, bad_records):
        super().__init__(data, readers, tokenizer, model_config, seed, model_config.txt_mask_ratio, candidates.group, (), seq2seq, bad_records)
        self.related, self.candidates, self.words, self.regions, self.classes = related, candidates, words, regions, classes

    def _ids(self, text):
        ids = self.tokenizer.encode(text[: MAX_CHARACTERS_PER_TOKEN * self.data.max_text_len])
        return with_special_tokens(ids, self.tokenizer, self.data.max_text_len)

    def _hide(self, regions, rng):
        """(hidden, predicted) of the regions that the model sees."""
        return mask_regions(regions.boxes[: self.config.max_img_len - 1], rng, self.config.vl_mask_ratio, self.config.overlap_ratio)

    def _image_batch(self, draw):
        """image_features [B, N, D], image_location [B, N, 5], image_mask [B, N]; hidden [B, N]; predict_regions [M] (places in the flattened
        [B, N]) and region_classes [M, C]."""
        def make(record, rng):
            return record.regions, *self._hide(record.regions, rng)

        regions, hidden, predicted = zip(*self._samples(draw, make))
        arrays = region_arrays(regions, self.config.max_img_len)
        return {**arrays, **self._hidden_arrays(draw, regions, hidden, predicted, arrays["image_mask"].shape[1])}

    def _hidden_arrays(self, draw, regions, hidden, predicted, length):
        places = [1 + np.flatnonzero(row) for row in predicted]  # the global region stands in front
        arrays = {"hidden": pad([np.concatenate([[False], row]) for row in hidden], 0.0, np.float32, length),
                  "predict_regions": flat_positions(places, length)}
        if draw.corpus in self.classes:
            arrays["region_classes"] = np.concatenate([class_targets(r, p - 1, self.config) for r, p in zip(regions, places)])
        return arrays

    def _pair_batch(self, draw):
        """The B pairs, each alone: image_features [B, N, D], image_location, image_mask; input_ids, position_ids, text_mask [T, L], of which
        the first B rows are the pairs' captions and the rest rewritten ones. related_text_... and related_image_...: retrieved ones with
        the owner's row in ..._of and 0 in ..._real where there was none (k a pair, so that all workers have as many).

        What is encoded jointly: fused [J], the pairs in question; joint_image, joint_text [J * C] (rows of the arrays above),
        joint_positive and joint_real [J, C]; masked_ids [J, L'], predict_from, labels; hidden [J, N], predict_regions, region_classes.
        """
        samples = self._samples(draw, self._draw_pair)
        # by place in the group, which is the same however many workers share the global batch
        places, per = np.arange(len(samples)) % self.group, self.candidates.joint_per_group or self.group
        fused = np.flatnonzero(places < per)
        own = [sample.text[0] for sample in samples]
        joint, rewritten = self._joint(samples, fused)
        images = region_arrays([sample.regions for sample in samples], self.config.max_img_len)
        return {**images, **text_arrays(own + rewritten, self.tokenizer.pad_id), "fused": fused, **joint,
                **self._masked_pairs(draw, samples, fused, images["image_mask"].shape[1]), **self._related(samples)}

    def _draw_pair(self, record, rng):
        chosen = int(rng.integers(len(record.texts)))
        text = record.texts[chosen][: MAX_CHARACTERS_PER_TOKEN * self.data.max_text_len]
        ids, starts = self.tokenizer.encode_with_word_starts(text)
        if not ids:
            raise DataError(f"{record.shard}, record {record.key}: the text is empty")
        wanted, made = self.candidates, record.augmentations
        rewritten = [None] * (wanted.paraphrases + wanted.hard_negatives)
        texts, images = [None] * wanted.related_texts, [None] * wanted.related_images
        masked, hide = self._masked(ids, starts, rng), self._hide(record.regions, rng)
        others = rng.permutation(self.group - 1)[: (wanted.random_negatives + 1) // 2] + 1
        if made is not None:
            rewritten = self._draw_rewritten(record, record.texts[chosen], rng)
            texts = _drawn([row["text"] for row in made.texts], wanted.related_texts, rng)
            texts = [None if one is None else self._ids(one) for one in texts]
            images = _drawn([row["key"] for row in made.images], wanted.related_images, rng)
            images = [None if one is None else self.related.find(one) for one in images]
        return _PairSample(record.regions, masked, *hide, rewritten, texts, images, others)

    def _draw_rewritten(self, record, text, rng):
        wanted, captions = self.candidates, record.augmentations.captions
        entry = next((caption for caption in captions if caption.text == text), None)
        if entry is None and captions and not any(caption.text in record.texts for caption in captions):
            raise DataError(f"{record.shard}, record {record.key}: its rewritten captions are of others than it has; repeat unimo2 augment rewrite")
        positives = entry.positives if entry is not None else []
        negatives = {level: entry.negatives.get(level, []) for level in wanted.levels} if entry is not None else {}
        hard = drawn_in_turns([[row["text"] for row in rows] for rows in negatives.values()], wanted.hard_negatives, rng)
        found = _drawn(positives, wanted.paraphrases, rng) + hard
        return [None if one is None else self._ids(one) for one in found]

    def _joint(self, samples, fused):
        """The joint candidates of the pairs ``fused``, and the rewritten texts among them in the order of their rows behind the captions."""
        wanted, count, rewritten = self.candidates, len(samples), []
        images, texts, positive, real = [], [], [], []
        for row in fused:
            sample, start = samples[row], row // self.group * self.group
            here = [(row, row, 1, 1)]
            for number, ids in enumerate(sample.rewritten):
                here.append((row, row if ids is None else count + len(rewritten), number < wanted.paraphrases, ids is not None))
                rewritten += [] if ids is None else [ids]
            for number in range(wanted.random_negatives):
                other = start + (row - start + sample.others[number // 2]) % self.group
                here.append((row, other, 0, 1) if number % 2 == 0 else (other, row, 0, 1))
            for part, values in zip((images, texts, positive, real), zip(*here)):
                part.append(values)
        return {"joint_image": np.array(images, np.int64).reshape(-1), "joint_text": np.array(texts, np.int64).reshape(-1),
                "joint_positive": np.array(positive, np.float32) * np.array(real, np.float32), "joint_real": np.array(real, np.float32)}, rewritten

    def _masked_pairs(self, draw, samples, fused, length):
        """Every second pair has words masked, the others regions: what is masked must be recoverable from the other side."""
        slots = np.array([slot for slot, _, _ in draw.slots])[fused]
        word_turn = np.full(len(fused), self.words) if self.words != self.regions else slots % 2 == 0
        chosen = [samples[row] for row in fused]
        texts = [(sample.text[1], sample.text[2], sample.text[3]) if turn else (sample.text[0], np.zeros(0, np.int64), np.zeros(0, np.int64))
                 for sample, turn in zip(chosen, word_turn)]
        ids, positions, labels = zip(*texts)
        ids = pad(ids, self.tokenizer.pad_id)
        hidden, predicted = ([row * (not turn) for row, turn in zip(rows, word_turn)]
                             for rows in ([s.hidden for s in chosen], [s.predicted for s in chosen]))
        return {"masked_ids": ids, "predict_from": flat_positions(positions, ids.shape[1]), "labels": np.concatenate(labels),
                **self._hidden_arrays(draw, [sample.regions for sample in chosen], hidden, predicted, length)}

    def _related(self, samples):
        arrays = {}
        if self.candidates.related_texts:
            found = [ids for sample in samples for ids in sample.related_texts]
            stand_in = [self.tokenizer.cls_id, self.tokenizer.sep_id]
            texts = text_arrays([stand_in if ids is None else ids for ids in found], self.tokenizer.pad_id)
            arrays.update({f"related_text_{name}": value for name, value in texts.items()}, related_text_real=_real(found))
        if self.candidates.related_images:
            found = [regions for sample in samples for regions in sample.related_images]
            owners = [sample.regions for sample in samples for _ in sample.related_images]
            pictures = region_arrays([own if regions is None else regions for regions, own in zip(found, owners)], self.config.max_img_len)
            arrays.update({f"related_{name}": value for name, value in pictures.items()}, related_image_real=_real(found))
        return arrays


def _real(found):
    return np.array([one is not None for one in found], np.float32)


def _drawn(items, count, rng):
    """``count`` different items, ``None`` for those that are missing."""
    chosen = [items[i] for i in rng.permutation(len(items))[:count]]
    return chosen + [None] * (count - len(chosen))


def drawn_in_turns(lists, count, rng):
    """``count`` items of several lists, which take turns from a drawn one on; ``None`` for those that are missing."""
    queues = [[items[i] for i in rng.permutation(len(items))] for items in lists]
    queues = [queues[i] for i in rng.permutation(len(queues))]
    longest = max(map(len, queues), default=0)
    turns = [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)][:count]
    return turns + [None] * (count - len(turns))


def class_targets(regions, chosen, config):
    """What the detector took regions for.

    Args:
        regions: ``Regions``; chosen: numbers of regions; config: ``UnimoConfig``: ``image_class_size`` C, ``image_use_soft_label``.

    Returns:
        float32 [M, C]: the detector's distribution where it is stored (column 0 is "none") and asked for, else 1 for the most
        probable class.

    Raises:
        DataError: the detector knows more classes than the model.
    """
    classes, probabilities = config.image_class_size, regions.object_probs
    known = int(regions.object_ids.max()) + 2 if probabilities is None else probabilities.shape[1]
    if known > classes:
        raise DataError(f"picture {regions.key!r}: its detector tells {known} classes and more, the model's image_class_size is {classes}")
    targets = np.zeros((len(chosen), classes), np.float32)
    if probabilities is not None and config.image_use_soft_label:
        targets[:, : probabilities.shape[1]] = probabilities[chosen]
        return targets / np.maximum(targets.sum(axis=1, keepdims=True), 1e-12)
    targets[np.arange(len(chosen)), 1 + regions.object_ids[chosen]] = 1.0
    return targets
