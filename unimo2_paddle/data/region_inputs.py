"""From regions to what UNIMO reads: features and boxes of a batch as padded arrays, a global region in front of every picture.

The numbers are those of the authors' readers (reference: unimo1.md section 1.3), in float32 throughout: a box is (x1 / W, y1 / H,
x2 / W, y2 / H, its share of the picture's area), the global region has the mean of the features (their sum divided by their number) and
the box (0, 0, 1, 1, 1). Boxes are not clipped.
"""
import numpy as np

from unimo2_paddle.errors import DataError

GLOBAL_LOCATION = (0.0, 0.0, 1.0, 1.0, 1.0)


def encode_boxes(boxes, width, height):
    """Boxes as fractions of the picture.

    Args:
        boxes: float [N, 4] (x1, y1, x2, y2) in pixels; width, height: of the picture in pixels.

    Returns:
        float32 [N, 5]: the four fractions and the share of the area.
    """
    boxes = np.asarray(boxes, np.float32)
    location = np.empty((len(boxes), 5), np.float32)
    location[:, :4] = boxes / np.array([width, height, width, height], np.float32)
    location[:, 4] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / np.float32(float(width) * float(height))
    return location


def with_global_region(features, boxes, width, height, max_regions=None):
    """A picture as the model reads it.

    Args:
        features: float [N, D], N at least 1; boxes: [N, 4] in pixels; width, height: of the picture.
        max_regions: keep the global region and the first ``max_regions - 1`` others; the mean is over all of them. None: keep all.

    Returns:
        (features float32 [1 + N, D], location float32 [1 + N, 5]).
    """
    features = np.asarray(features, np.float32)
    mean = features.sum(axis=0, dtype=np.float32) / np.float32(len(features))
    features = np.concatenate([mean[None], features])
    location = np.concatenate([np.array([GLOBAL_LOCATION], np.float32), encode_boxes(boxes, width, height)])
    return features[:max_regions], location[:max_regions]


def region_arrays(pictures, max_regions=None, feature_size=None):
    """A batch of pictures.

    Args:
        pictures: list of ``Regions`` (or anything with features, boxes, width, height); None stands for a sample without picture.
        max_regions: regions per picture including the global one (the authors' ``max_img_len``), None: no limit.
        feature_size: D, only needed when every picture may be None.

    Returns:
        dict of ``image_features`` float32 [B, N, D], ``image_location`` float32 [B, N, 5] and ``image_mask`` float32 [B, N] (1 = region,
        0 = padding; a sample without picture has only padding). Padding is 0 everywhere.

    Raises:
        DataError: no picture, widths that differ, or a picture without regions.
    """
    present = [picture for picture in pictures if picture is not None]
    if not pictures or (not present and feature_size is None):
        raise DataError("an empty batch: no picture with regions")
    empty = [picture for picture in present if not len(picture.features)]
    if empty:
        raise DataError(f"picture {getattr(empty[0], 'key', '?')!r} has no regions")
    sizes = sorted({picture.features.shape[1] for picture in present} | ({feature_size} if feature_size else set()))
    if len(sizes) > 1:
        raise DataError(f"region features of different widths meet in one batch: {', '.join(map(str, sizes))}; use one detector's features")
    encoded = [None if p is None else with_global_region(p.features, p.boxes, p.width, p.height, max_regions) for p in pictures]
    longest = max([len(row[0]) for row in encoded if row is not None], default=1)
    batch = {"image_features": np.zeros((len(pictures), longest, sizes[0]), np.float32),
             "image_location": np.zeros((len(pictures), longest, 5), np.float32),
             "image_mask": np.zeros((len(pictures), longest), np.float32)}
    for number, row in enumerate(encoded):
        if row is not None:
            count = len(row[0])
            batch["image_features"][number, :count], batch["image_location"][number, :count] = row
            batch["image_mask"][number, :count] = 1.0
    return batch
