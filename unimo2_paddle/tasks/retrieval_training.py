"""Training batches and losses of retrieval finetuning: circle loss over drawn negatives, or hard negatives inside the batch."""
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F

from unimo2_paddle.errors import DataError
from unimo2_paddle.models.configuration import UnimoConfig
from unimo2_paddle.models.losses import contrastive_loss, retrieval_circle_loss
from unimo2_paddle.models.parallel import gather_rows, rank
from unimo2_paddle.tasks.finetune import FinetuneTrain
from unimo2_paddle.tasks.retrieval_scoring import contrastive_scores, encode_captions, encode_pictures, matching_logits
from unimo2_paddle.tasks.unimo_retrieval import batch_scores

OBJECTIVES = ("circle", "in_batch")


@dataclass
class RetrievalTrain(FinetuneTrain):
    """Group ``train`` of retrieval; the defaults are the authors' (reference notes, section 1.4).

    ``objective``: ``circle`` scores every caption with its picture, ``image_negatives`` other pictures and its picture with
    ``caption_negatives`` captions of others, and an epoch is every caption once. ``in_batch`` takes every picture with one of its
    captions once per epoch, contrasts all pairs of a batch and matches each with the hardest others; of ``matched_pairs`` above 0 only
    so many (the first of a worker's batch) go through the grounded encoder, because contrast is cheap and matching is not.
    ``margin``, ``scale``: of the circle loss. ``use_sigmoid``: it sees the scores' sigmoid (the authors' default, switched off in their runs).
    """

    epochs: int = 40
    batch_size: int = 2
    objective: str = "circle"
    image_negatives: int = 10
    caption_negatives: int = 10
    margin: float = 0.2
    scale: float = 1.0
    use_sigmoid: bool = False
    matched_pairs: int = 0

    def problems(self):
        found = super().problems()
        found += [f"{key}: must be at least 1, is {getattr(self, key)}" for key in ("image_negatives", "caption_negatives")
                  if getattr(self, key) < 1]
        found += [f"{key}: must be above 0, is {getattr(self, key)}" for key in ("margin", "scale") if getattr(self, key) <= 0]
        if self.objective not in OBJECTIVES:
            found.append(f"objective: {self.objective!r} is not one of {', '.join(OBJECTIVES)}")
        if not 0 <= self.matched_pairs <= self.batch_size:
            found.append(f"matched_pairs: must be between 0 and batch_size {self.batch_size}, is {self.matched_pairs}")
        if self.objective == "in_batch" and self.batch_size < 2:
            found.append(f"batch_size: objective in_batch needs at least 2 pairs to tell apart, is {self.batch_size}")
        return found


class CirclePairs:
    """Every caption of a ``RetrievalDataset`` with its picture and negatives drawn anew each time."""

    def __init__(self, dataset, image_negatives, caption_negatives):
        if max(image_negatives, caption_negatives) >= len(dataset):
            raise DataError(f"the training split has {len(dataset)} pictures, too few for {image_negatives} image and {caption_negatives} "
                            "caption negatives from others; lower train.image_negatives and train.caption_negatives")
        self.dataset, self.image_negatives, self.caption_negatives = dataset, image_negatives, caption_negatives
        self._captions = _caption_spans(dataset)

    def __len__(self):
        return len(self.dataset.captions)

    def sample(self, index, rng):
        """Pictures and captions of the pairs of caption ``index``: the true one, image negatives, caption negatives.

        A caption negative is a random caption of a random other picture, so it never describes the caption's own picture.

        Returns:
            dict of int64 ``[1 + N + M]``: ``images``, ``texts``.
        """
        own = int(self.dataset.text_image[index])
        images = self._others(own, self.image_negatives, rng)
        first, counts = (part[self._others(own, self.caption_negatives, rng)] for part in self._captions)
        texts = first + rng.integers(0, counts)
        return {"images": np.concatenate([[own], images, np.full(len(texts), own)]).astype("int64"),
                "texts": np.concatenate([[index], np.full(len(images), index), texts]).astype("int64")}

    def _others(self, own, count, rng):
        chosen = rng.choice(len(self.dataset) - 1, size=count, replace=False)
        return chosen + (chosen >= own)


class InBatchPairs:
    """Every picture of a ``RetrievalDataset`` with one of its captions, and the noise that draws hard negatives."""

    def __init__(self, dataset, batch_size):
        if len(dataset) < 2:
            raise DataError("the training split has one picture; objective in_batch needs others to tell it from")
        self.dataset, self.batch_size = dataset, batch_size
        self._captions = _caption_spans(dataset)

    def __len__(self):
        return len(self.dataset)

    def sample(self, index, rng):
        """dict of ``images``, ``texts`` int64 ``[1]`` and ``noise`` float32 ``[2, B]`` (Gumbel)."""
        first, counts = self._captions
        return {"images": np.array([index], dtype="int64"), "texts": np.array([first[index] + rng.integers(counts[index])], dtype="int64"),
                "noise": rng.gumbel(size=[2, self.batch_size]).astype("float32")}


def _caption_spans(dataset):
    """First caption and number of captions of every picture, int64 ``[I]`` each."""
    counts = np.bincount(dataset.text_image, minlength=len(dataset))
    return np.cumsum(counts) - counts, counts


def collate_pairs(samples, dataset, image_size):
    """A batch in which every picture and caption stands once, however many pairs it belongs to.

    Args:
        samples: of :class:`CirclePairs` or :class:`InBatchPairs`; dataset: their ``RetrievalDataset``; image_size: pixels.

    Returns:
        dict: ``image`` uint8 ``[U, S, S, 3]`` or the regions of U pictures, ``input_ids``, ``position_ids``, ``text_mask`` ``[V, L]``, the pairs as rows of
        these, ``pair_image`` and ``pair_text`` int64 ``[B, C]``, and ``noise`` where samples have it.
    """
    images, pair_image = np.unique(np.stack([sample["images"] for sample in samples]), return_inverse=True)
    texts, pair_text = np.unique(np.stack([sample["texts"] for sample in samples]), return_inverse=True)
    ids, positions, mask = dataset.text_batch(texts)
    batch = {**dataset.picture_arrays(images.tolist(), image_size), "input_ids": ids, "position_ids": positions, "text_mask": mask,
             "pair_image": pair_image.reshape(len(samples), -1), "pair_text": pair_text.reshape(len(samples), -1)}
    if "noise" in samples[0]:
        batch["noise"] = np.stack([sample["noise"] for sample in samples])
    return batch


def _encode(model, batch):
    return (encode_pictures(model, batch["image"]),
            encode_captions(model, batch["input_ids"], batch["position_ids"], batch["text_mask"]))


def circle_terms(model, batch, train):
    """Loss terms of a batch from :class:`CirclePairs`, and the share of true pairs that score above all their negatives.

    UNIMO-2: the distinct pictures and captions are encoded once and gathered, so the pairs of a batch share the encoders' dropout, where the
    authors encode a picture anew for each of its pairs.
    """
    scores = batch_scores(model, batch) if isinstance(model.config, UnimoConfig) else _grounded_scores(model, batch)
    scores = F.sigmoid(scores) if train.use_sigmoid else scores
    loss, caption_side, image_side = retrieval_circle_loss(scores, train.margin, train.scale, train.image_negatives)
    best = (scores[:, 0] > scores[:, 1:].max(axis=1)).astype("float32").mean()
    return {"loss": loss, "caption_negatives": caption_side, "image_negatives": image_side, "accuracy": best}


def _grounded_scores(model, batch):
    """Scores ``[B, C]`` of a batch's pairs by UNIMO-2."""
    images, texts = _encode(model, batch)
    images, texts = images.take(batch["pair_image"].reshape([-1])), texts.take(batch["pair_text"].reshape([-1]))
    scores = matching_logits(model, images, texts)[:, 1] + model.config.cmcl_score_weight * contrastive_scores(images, texts)
    return scores.reshape(batch["pair_image"].shape)


def in_batch_terms(model, batch, matched_pairs=0):
    """Contrastive loss over all workers' pairs, and matching of ``matched_pairs`` (0: all) with hard negatives from this worker's batch."""
    images, texts = _encode(model, batch)
    pair_image, pair_text = batch["pair_image"].reshape([-1]), batch["pair_text"].reshape([-1])
    images, texts, size = images.take(pair_image), texts.take(pair_text), pair_image.shape[0]
    contrastive, logits, _ = contrastive_loss(
        images.features, texts.features, model.temperature(), all_image=gather_rows(images.features), all_text=gather_rows(texts.features),
        offset=rank() * size)
    with paddle.no_grad():
        here = paddle.arange(size)
        similarity = paddle.matmul(images.features, texts.features, transpose_y=True) / model.temperature()
        # two captions of one picture are no negatives of each other; they meet where a batch reaches into the next epoch
        same = (pair_image.unsqueeze(1) == pair_image.unsqueeze(0)).astype("float32") * 1e9
        noise = batch["noise"][:, :, :size]
        other_text = (similarity - same + noise[:, 0]).argmax(axis=1)
        other_image = (similarity.t() - same + noise[:, 1]).argmax(axis=1)
        count = min(matched_pairs or size, size)
        here, other_text, other_image = here[:count], other_text[:count], other_image[:count]
        picture, caption = paddle.concat([here, here, other_image]), paddle.concat([here, other_text, here])
        labels = paddle.concat([paddle.ones([count], dtype="int64"), paddle.zeros([2 * count], dtype="int64")])
    matched = matching_logits(model, images.take(picture), texts.take(caption))
    losses = F.cross_entropy(matched, labels, reduction="none").reshape([-1])
    matching = (losses[:count].mean() + losses[count:].mean()) / 2  # true and false pairs weigh the same
    right = (logits.argmax(axis=1) == paddle.arange(size) + rank() * size).astype("float32").mean()
    return {"loss": contrastive + matching, "contrastive": contrastive, "matching": matching, "contrastive_accuracy": right}
