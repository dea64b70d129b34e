"""Zero-shot retrieval of a pre-trained UNIMO: pairs read together, and for comparison each side encoded alone.

Together, a pair's score is the matching head's on the product of both poolers. Alone, it is the cosine of the two pooled vectors, so every side is
encoded once.
"""
import numpy as np
import paddle
import paddle.nn.functional as F

from unimo2_paddle.metrics.retrieval import retrieval_metrics
from unimo2_paddle.tasks.retrieval import RetrievalEvaluator
from unimo2_paddle.tasks.retrieval_scoring import evaluation_mode
from unimo2_paddle.tasks.unimo_inputs import REGION_INPUTS
from unimo2_paddle.tasks.unimo_retrieval import TEXT_INPUTS


def pool_pictures(model, batch, prefix=""):
    """Pooled pictures ``[B, H]``, encoded without text, of a batch's arrays (``image_features`` ... with ``prefix``)."""
    return model.pool_image(model(**{name: batch[prefix + name] for name in REGION_INPUTS}, first_only=True))


def pool_texts(model, batch, count=None, prefix=""):
    """Pooled texts ``[B, H]``, encoded without a picture: the first ``count`` of a batch (default: all)."""
    return model.pool_text(model(**{name: batch[prefix + name][:count] for name in TEXT_INPUTS}, first_only=True))


def alone_scores(query, candidates):
    """Cosines ``[B, M]`` of pooled vectors ``[B, H]`` of one side with those ``[M, H]`` of the other."""
    return paddle.matmul(F.normalize(query, axis=-1), F.normalize(candidates, axis=-1), transpose_y=True)


class ZeroShotEvaluator(RetrievalEvaluator):
    """Retrieval with the pair read together, and under ``alone_...`` with both sides encoded alone."""

    def run(self, model):
        """As of ``RetrievalEvaluator``."""
        super().run(model)
        with evaluation_mode(model):
            alone = self._alone(model)
        self.metrics.update((f"alone_{key}", value) for key, value in retrieval_metrics(alone, self.dataset.text_image).items())
        return dict(self.metrics)

    def _alone(self, model):
        """Scores ``[T, I]`` of everything encoded alone."""
        dataset, images, texts = self.dataset, [], []
        for first in range(0, len(dataset), self.image_batch):
            arrays = dataset.picture_arrays(range(first, min(first + self.image_batch, len(dataset))))
            images.append(pool_pictures(model, {name: paddle.to_tensor(array) for name, array in arrays.items()}))
        for rows in np.array_split(np.arange(len(dataset.captions)), -(-len(dataset.captions) // self.pair_batch)):
            arrays = dict(zip(TEXT_INPUTS, map(paddle.to_tensor, dataset.text_batch(rows))))
            texts.append(pool_texts(model, arrays))
        return alone_scores(paddle.concat(texts), paddle.concat(images)).numpy()
