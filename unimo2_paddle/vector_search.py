"""The nearest of many vectors by inner product: faiss where it is installed, numpy where it is not, the same neighbours from both.

Both only propose candidates: their scores are computed again in float64, rounded to ``DIGITS``, and ordered by (score, position).
"""
import numpy as np

from unimo2_paddle.errors import UserInputError

DIGITS = 6
_MARGIN = 1e-4   # more than float32 products of unit vectors can be off
_ROWS = 1 << 16  # rows compared at once


class VectorSearch:
    """Rows to be searched.

    Args:
        features: float32 ``[N, H]``, N at least 1, may be memory-mapped; backend: "faiss", "numpy", or "auto" (faiss where it is installed).

    Raises:
        UserInputError: no such backend, or faiss is asked for and not installed.
    """

    def __init__(self, features, backend="auto"):
        self.features, self._faiss = features, _faiss_index(features, backend)
        blocks = range(0, len(features), _ROWS)
        self._longest = max((float(np.sqrt((features[first:first + _ROWS].astype(np.float64) ** 2).sum(1).max())) for first in blocks), default=0.0)

    def __len__(self):
        return len(self.features)

    def search(self, queries, number):
        """The rows with the largest products.

        Args:
            queries: float32 ``[Q, H]``; number: rows per query.

        Returns:
            list of Q pairs (rows int64 ``[M]``, products float64 ``[M]``), M = min(number, N), best first, equal ones in order.
        """
        number, found = min(number, len(self)), [None] * len(queries)
        margins = _MARGIN * self._longest * np.sqrt((queries.astype(np.float64) ** 2).sum(1))
        left, wanted = np.arange(len(queries)), min(len(self), number + 16)
        while len(left):
            rows, rough = self._candidates(queries[left], wanted)
            again = []
            for query, candidates, scores in zip(left, rows, rough):
                candidates = np.sort(candidates)
                exact = (self.features[candidates].astype(np.float64) * queries[query].astype(np.float64)).sum(1).round(DIGITS)
                best = np.lexsort((candidates, -exact))[:number]
                if wanted < len(self) and scores.min() > exact[best[-1]] - margins[query]:
                    again.append(query)  # what was left out may be as good as the last one
                else:
                    found[query] = (candidates[best], exact[best])
            left, wanted = np.array(again, np.int64), min(len(self), 4 * wanted)
        return found

    def _candidates(self, queries, number):
        if self._faiss is not None:
            scores, rows = self._faiss.search(queries, number)
            return rows, scores
        rows = np.zeros((len(queries), 0), np.int64)
        scores = np.zeros((len(queries), 0), np.float32)
        for first in range(0, len(self), _ROWS):
            block = queries @ self.features[first:first + _ROWS].T
            scores = np.concatenate([scores, block], 1)
            rows = np.concatenate([rows, np.broadcast_to(np.arange(first, first + block.shape[1]), block.shape)], 1)
            if scores.shape[1] > number:
                best = np.argpartition(-scores, number - 1, axis=1)[:, :number]
                scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
        return rows, scores


def _faiss_index(features, backend):
    if backend not in ("auto", "faiss", "numpy"):
        raise UserInputError(f"--backend {backend}: use auto, faiss or numpy")
    if backend == "numpy":
        return None
    try:
        import faiss
    except ImportError:
        if backend == "faiss":
            raise UserInputError("--backend faiss: faiss is not installed; pip install faiss-cpu, or use --backend numpy (same results)") from None
        return None
    index = faiss.IndexFlatIP(features.shape[1])
    for first in range(0, len(features), _ROWS):
        index.add(np.ascontiguousarray(features[first:first + _ROWS], dtype=np.float32))
    return index
