"""How a dictionary of grounded tokens is used, and whether a picture and its sentence choose the same tokens. Numpy only."""
import numpy as np

from unimo2_paddle.errors import DataError


def dictionary_health(joint_ids, image_ids, text_ids, codes):
    """Use of the codes, and agreement of the two sides (UNIMO-2's mechanism: both are grounded in the same tokens).

    Args:
        joint_ids: int ``[N, K]``, the codes that N pairs choose together; image_ids, text_ids: ``[N, K]``, those that each picture and
            each sentence choose alone; row n of both is a true pair. No code occurs twice in a row.
        codes: size of the dictionary.

    Returns:
        dict of floats: ``used`` (codes that some pair chooses), ``perplexity`` (of their frequencies; ``codes`` when all are as frequent),
        in percent of K ``overlap_true`` (codes that picture and sentence of a pair share), ``overlap_random`` (the same of all other
        combinations of a picture and a sentence) and ``overlap_gain``, their difference.

    Raises:
        DataError: the shapes differ, a code is outside of the dictionary, or there is only one pair.

    Example:
        >>> dictionary_health([[0], [1]], [[0], [1]], [[0], [1]], 4)["overlap_gain"]
        100.0
    """
    joint, image, text = (np.asarray(ids) for ids in (joint_ids, image_ids, text_ids))
    if joint.ndim != 2 or not joint.shape == image.shape == text.shape:
        raise DataError(f"chosen codes must have one shape [N, K], not {list(joint.shape)}, {list(image.shape)}, {list(text.shape)}")
    if len(joint) < 2:
        raise DataError("at least two pairs are needed to compare true pairs with random ones")
    if min(ids.min() for ids in (joint, image, text)) < 0 or max(ids.max() for ids in (joint, image, text)) >= codes:
        raise DataError(f"a chosen code is outside of the dictionary of {codes}")
    counts = np.bincount(joint.ravel(), minlength=codes)
    shares = counts[counts > 0] / counts.sum()
    shared = _members(image, codes) @ _members(text, codes).T / image.shape[1]  # [picture, sentence]
    true = float(np.trace(shared)) / len(shared)
    random = float(shared.sum() - np.trace(shared)) / (len(shared) * (len(shared) - 1))
    return {"used": float((counts > 0).sum()), "perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
            "overlap_true": 100.0 * true, "overlap_random": 100.0 * random, "overlap_gain": 100.0 * (true - random)}


def _members(ids, codes):
    """``[N, C]``, 1 where row n chooses code c."""
    members = np.zeros((len(ids), codes), dtype=np.float32)
    np.put_along_axis(members, ids, 1.0, axis=1)
    return members
