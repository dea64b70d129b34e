"""Training losses as pure functions of tensors; sources are the authors' code as stated in the reference notes."""
import paddle
import paddle.nn.functional as F


def log_softmax(logits):
    """Log-probabilities over the last axis.

    Not ``F.log_softmax``: on CPU (Paddle 3.3.1) it adds up all exponentials anew for every class, 1.4 s for one row of 50,265.
    """
    return logits - logits.logsumexp(axis=-1, keepdim=True)


def contrastive_loss(image, text, temperature, weights=None, all_image=None, all_text=None, offset=0):
    """Symmetric InfoNCE (cross-modal contrastive learning, CMCL).

    Args:
        image, text: features ``[B, H]`` of this worker; row i of both is one pair.
        temperature: scalar tensor.
        weights: ``[B]``; 0 takes a row's loss out (it still serves as a candidate). The mean stays over B, as the authors have it.
        all_image, all_text: candidates of all workers ``[G, H]``; default: this worker's own.
        offset: index of this worker's first row among the candidates.

    Returns:
        (scalar loss, image-to-text logits ``[B, G]``, text-to-image logits ``[B, G]``).
    """
    all_image = image if all_image is None else all_image
    all_text = text if all_text is None else all_text
    labels = paddle.arange(offset, offset + image.shape[0], dtype="int64")
    image_to_text = paddle.matmul(image, all_text, transpose_y=True) / temperature
    text_to_image = paddle.matmul(text, all_image, transpose_y=True) / temperature
    loss = (F.cross_entropy(image_to_text, labels, reduction="none") + F.cross_entropy(text_to_image, labels, reduction="none")) / 2
    loss = loss.reshape([-1])
    return (loss if weights is None else loss * weights).mean(), image_to_text, text_to_image


def visual_contrastive_loss(first, second, temperature, all_first=None, all_second=None, offset=0):
    """NT-Xent between two augmented views (SimCLR form): the other view is the positive, all other views are negatives.

    Args:
        first, second: L2-normalised features ``[B, H]``; all_first, all_second: of all workers ``[G, H]``; offset: as above.

    Returns:
        scalar loss.
    """
    all_first = first if all_first is None else all_first
    all_second = second if all_second is None else all_second
    size, total = first.shape[0], all_first.shape[0]
    own = F.one_hot(paddle.arange(offset, offset + size, dtype="int64"), total) * 1e4  # a view is no candidate for itself
    losses = []
    for anchor, same, other in ((first, all_first, all_second), (second, all_second, all_first)):
        to_other = paddle.matmul(anchor, other, transpose_y=True) / temperature
        to_same = paddle.matmul(anchor, same, transpose_y=True) / temperature - own
        labels = paddle.arange(offset, offset + size, dtype="int64")
        losses.append(F.cross_entropy(paddle.concat([to_other, to_same], axis=1), labels))
    return (losses[0] + losses[1]) / 2


def multi_positive_contrastive_loss(scores, positives, candidates=None):
    """Contrastive loss with several positives per sample (UNIMO's CMCL: rewritten texts, retrieved images and texts).

    Args:
        scores: ``[B, M]`` similarities divided by the temperature.
        positives: ``[B, M]``, 1 where a candidate belongs to the sample; at least one per row.
        candidates: ``[B, M]``, 0 for padding that is neither positive nor negative; default: all count.

    Returns:
        scalar mean of -log(sum over positives of exp(score) / sum over candidates of exp(score)), after arXiv 2012.15409 (the authors
        did not release their code of it).
    """
    if candidates is not None:
        scores = scores + (candidates - 1.0) * 1e9
    return (scores.logsumexp(axis=1) - (scores + (positives - 1.0) * 1e9).logsumexp(axis=1)).mean()


def masked_region_losses(class_logits, features, target_classes, target_features):
    """What masked regions were: cross entropy with the detector's class distribution, and squared error of the features (UNIMO).

    Args:
        class_logits: ``[N, C]`` or ``None``; target_classes: ``[N, C]`` probabilities (soft labels), or int64 ``[N]``.
        features, target_features: ``[N, D]``, or ``features`` ``None``.

    Returns:
        (class loss, feature loss) scalars, means over regions (and features); ``None`` for what the model does not predict. Without
        masked regions both are 0.
    """
    classes = regression = None
    if class_logits is not None:
        soft = len(target_classes.shape) == 2
        # an empty sum keeps the graph; cross entropy of nothing is not defined everywhere
        classes = F.cross_entropy(class_logits, target_classes, soft_label=soft) if class_logits.shape[0] else class_logits.sum()
    if features is not None:
        regression = (features - target_features).square().sum() / max(features.shape[0] * features.shape[1], 1)
    return classes, regression


def masked_mean(values, weights):
    """sum(values * weights) / sum(weights), 0 when nothing is weighted."""
    return (values * weights).sum() / weights.sum().clip(min=1e-12)


def circle_loss(positive, negatives, margin, scale):
    """Circle loss of one positive against several negatives, in float64 as the authors compute it.

    Args:
        positive: ``[B, 1]`` scores; negatives: ``[B, N]`` scores; margin, scale: floats.

    Returns:
        scalar mean over B.
    """
    weight_positive = F.relu(1.0 + margin - positive).detach()
    weight_negative = F.relu(negatives + margin).detach()
    logit_positive = (-scale * weight_positive * (positive - (1.0 - margin))).astype("float64")
    logit_negative = (scale * weight_negative * (negatives - margin)).astype("float64")
    # log(1 + sum exp(n) * sum exp(p)) without the product, which overflows when a pair is badly ranked at a large scale
    total = logit_negative.logsumexp(axis=1) + logit_positive.logsumexp(axis=1)
    return F.softplus(total, threshold=40).mean().astype(positive.dtype)


def retrieval_circle_loss(scores, margin=0.2, scale=1.0, image_negatives=None):
    """Mean of the caption-side and image-side circle losses (UNIMO-2 retrieval finetuning).

    Args:
        scores: ``[B, 1 + N + M]``: positive, N image negatives, M caption negatives.
        margin, scale: as in :func:`circle_loss`; image_negatives: N, by default half of the negatives.

    Returns:
        (total, caption part, image part) scalars.
    """
    negatives = (scores.shape[1] - 1) // 2 if image_negatives is None else image_negatives
    image_side = circle_loss(scores[:, :1], scores[:, 1: 1 + negatives], margin, scale)
    caption_side = circle_loss(scores[:, :1], scores[:, 1 + negatives:], margin, scale)
    return (image_side + caption_side) / 2, caption_side, image_side


def smoothed_cross_entropy(logits, labels, smoothing=0.0, reduction="mean"):
    """Cross entropy with the target ``(1 - s) * onehot + s / C``.

    Args:
        logits: ``[N, C]``; labels: int64 ``[N]``.

    Returns:
        scalar mean, or ``[N]`` with ``reduction="none"``.
    """
    loss = F.cross_entropy(logits, labels, reduction="none").reshape([-1])
    if smoothing:
        uniform = logits.logsumexp(axis=-1) - logits.mean(axis=-1)  # minus the mean log-probability
        loss = (1.0 - smoothing) * loss + smoothing * uniform
    return loss.mean() if reduction == "mean" else loss
