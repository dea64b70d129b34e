"""JPEG files to normalised batches on one core, against bare OpenCV."""
import tempfile
from pathlib import Path

import cv2
import numpy as np
from bench import alternate, compare
from PIL import Image

from unimo2_paddle.data.images import decode_image, normalise, resize_image

SIZES = {"tiny": 64, "base": 384}
SOURCE = (375, 500)  # Flickr30k's usual height and width; COCO's are 480 and 640


def photograph(seed, height, width):
    """A picture whose JPEG is about as large as one of Flickr30k (4.4 GB of 31,783 files: 140 KB each): noise at several scales."""
    rng = np.random.default_rng(seed)
    picture = np.zeros([height, width, 3], np.float32)
    for edge, strength in ((4, 60), (16, 35), (64, 18), (256, 9)):
        grid = rng.standard_normal([edge, edge, 3]).astype(np.float32) * strength
        picture += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    picture += rng.standard_normal([height, width, 1]).astype(np.float32) * 9
    return np.clip(picture + 128, 0, 255).astype(np.uint8)


def write_photographs(directory, count, height=SOURCE[0], width=SOURCE[1]):
    """JPEG files in a directory: their paths."""
    paths = []
    for number in range(count):
        paths.append(str(Path(directory) / f"{number:05d}.jpg"))
        cv2.imwrite(paths[-1], photograph(number, height, width), [cv2.IMWRITE_JPEG_QUALITY, 96])
    return paths


def measure(options):
    size = SIZES[options.size]
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as directory:
        paths = write_photographs(directory, 24)
        size_of_file = np.mean([Path(path).stat().st_size for path in paths]) / 1024

        def ours():
            return normalise(np.stack([resize_image(decode_image(path), size) for path in paths]))

        def bare(resize):
            def run():
                for path in paths:
                    resize(cv2.imread(path))
            return run

        times = alternate({"ours": ours, "same": bare(lambda picture: np.array(Image.fromarray(picture).resize((size, size), Image.BICUBIC))),
                           "area": bare(lambda picture: cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)),
                           "cubic": bare(lambda picture: cv2.resize(picture, (size, size), interpolation=cv2.INTER_CUBIC))}, max(5, options.repeats))
    what = f"{SOURCE[1]} x {SOURCE[0]} JPEG of {size_of_file:.0f} KB to {size} px; ours includes RGB order, checks of the file, and normalising the batch."
    others = {
        "same": ("OpenCV decode + the same filter", "Both sides make the same pixels."),
        "area": ("OpenCV decode + area resize", "Area antialiases too where it shrinks, but the pixels are others."),
        "cubic": ("OpenCV decode + cubic resize", "INTER_CUBIC does not antialias: 2 to 4 grey levels away from what the released weights have seen."),
    }
    return [compare(f"picture pipeline, one core, against {name}", times["ours"], times[key], "pictures/s", amount=len(paths), at_least=0.9,
                    note=f"{what} {why}")
            for key, (name, why) in others.items()]
