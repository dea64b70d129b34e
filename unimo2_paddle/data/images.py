"""Pictures: decode, resize, normalise, augment. uint8 RGB ``[H, W, 3]`` throughout, float32 only for the model.

JPEG files are decoded by Pillow, most others by OpenCV, which also augments. Resizing gives Pillow's pixels, because the released weights were
trained with its antialiased bicubic filter and OpenCV's ``INTER_CUBIC`` gives other pixels when it shrinks (2 to 4 grey levels on
average); ``resampling`` computes the same ten times faster. Pillow also reads sizes and EXIF from file headers; it is a dependency of
paddlepaddle, so it costs no extra install.
"""
import functools
import io
import os
from dataclasses import dataclass, field
from typing import List, Optional, Union

import cv2
import numpy as np
from PIL import Image

from unimo2_paddle.errors import ImageError
from unimo2_paddle.paths import PathLike
from unimo2_paddle.runtime import find_compile_cache

# Largest picture decoded by default: 8192 x 8192, 192 MB as RGB. Whatever is asked, Pillow stops at 179 million pixels.
MAX_PIXELS = 2 ** 26

# A progressive JPEG has about 10 scans, each of which decodes the whole picture again; a file of half a megabyte can hold thousands.
_MAX_SCANS = 100

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def decode_image(path_or_bytes, exif=True, max_pixels=MAX_PIXELS, name=None):
    """A picture file as an array.

    Greyscale, palette, CMYK and 16-bit pictures become 8-bit RGB, alpha is dropped without blending (as the authors do),
    an animation gives its first frame. Width and height are read from the header and checked before anything is decoded.

    Args:
        path_or_bytes: path of a picture file, or its content as bytes.
        exif: turn the picture as its EXIF orientation says; False reproduces the authors, who ignore it. (A TIFF is always
            turned.)
        max_pixels: refuse a picture of more pixels than this.
        name: what to call the picture in messages; default: the path.

    Returns:
        uint8 ndarray [H, W, 3], RGB.

    Raises:
        ImageError: the file is missing, empty, truncated, not a picture, damaged or too large.
    """
    data, name = _read(path_or_bytes, name)
    header = _read_header(data, name, max_pixels)
    if header.format in ("JPEG", "MPO") and not _has_jpeg_end(data):
        # OpenCV would fill what is missing with grey and report nothing.
        raise ImageError(f"{name}: truncated JPEG (no end marker); fetch the file again or remove it")
    if header.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > _MAX_SCANS:
        raise ImageError(f"{name}: a JPEG of more than {_MAX_SCANS} scans, which would take minutes to decode; remove it or store it anew")
    if header.format == "PNG" and _png_data_bytes(data) > _most_png_bytes(header.size):
        raise ImageError(f"{name}: a PNG with more data than a picture of its size has; remove it or store it anew")
    if _needs_pillow(header):
        image = _decode_with_pillow(header, name)
    else:
        image = _decode_with_opencv(data, header, name)
    if exif and header.format != "TIFF":
        image = _turn_upright(image, header)
    return image


def resize_image(image, size):
    """Resize to ``size`` x ``size`` without keeping the aspect ratio, by Pillow's antialiased bicubic filter.

    This is the authors' preprocessing (reference: unimo2.md section 1.3). Pillow's pixels and not OpenCV's: only its filter widens
    with the shrinking factor, and the released weights have seen nothing else. The width goes first, as in all of Pillow until 12;
    Pillow 13 shrinks tall pictures the other way round, which moves pixels by a grey level or two.

    Args:
        image: uint8 [H, W, 3].
        size: edge of the result in pixels.

    Returns:
        uint8 ndarray [size, size, 3], always a new array.
    """
    if image.shape[:2] == (size, size):
        return image.copy()
    return _bicubic()(image, size)


@functools.lru_cache(maxsize=None)
def _bicubic():
    """The compiled filter, or Pillow's own where numba is missing."""
    find_compile_cache()
    try:
        from unimo2_paddle.data.resampling import resize_bicubic
    except ImportError:
        return _pillow_bicubic
    return resize_bicubic


def _pillow_bicubic(image, size):
    return np.array(Image.fromarray(image).resize((size, len(image)), Image.BICUBIC).resize((size, size), Image.BICUBIC))


def normalise(images):
    """The model's input from 8-bit pictures: ``(x / 255 - 0.5) / 0.5``, so 0..255 becomes -1..1.

    Args:
        images: uint8 [..., 3], any leading dimensions.

    Returns:
        float32 ndarray of the same shape.
    """
    if images.dtype != np.uint8:
        raise TypeError(f"normalise wants uint8 pictures, not {images.dtype}")
    values = images.astype(np.float32)
    values /= 255  # in place: a batch is large and this runs for every one
    values -= 0.5
    values /= 0.5
    return values


def load_image(path_or_bytes: Union[PathLike, bytes], image_size: int, exif: bool = True, max_pixels: int = MAX_PIXELS,
               name: Optional[str] = None) -> np.ndarray:
    """A picture file ready for the model: decoded, resized and normalised.

    Args:
        path_or_bytes, exif, max_pixels, name: as in ``decode_image``.
        image_size: edge S of the model's input in pixels.

    Returns:
        float32 ndarray [S, S, 3] in -1..1.

    Raises:
        ImageError: as in ``decode_image``.
    """
    return normalise(resize_image(decode_image(path_or_bytes, exif, max_pixels, name), image_size))


@dataclass
class Augmentation:
    """Random changes of training pictures. What is marked p below is a probability; 0, the default, is off.

    Mirroring and turning break captions that name sides ("left of"): keep them off for such pairs.

    Attributes:
        crop: p of a random resized crop, keeping a share of the area in ``crop_scale`` at a width/height ratio in
            ``crop_ratio``.
        flip: p of mirroring left and right.
        jitter: p of colour jitter: factors within 1 +- ``brightness``, ``contrast``, ``saturation`` and a hue shift within
            +- ``hue`` of the colour circle, in random order.
        greyscale: p of dropping the colours.
        blur: p of a Gaussian blur of ``blur_sigma`` pixels, meant for a 224-pixel picture and scaled with the size.
        authors_crop: p of the authors' crop: a window of the model's size out of the unresized picture (they use 0.5).
        authors_turn: p of the authors' flip: one of mirror, upside down, 90, 180, 270 degrees (they use 0.5).
    """
    crop: float = 0.0
    crop_scale: List[float] = field(default_factory=lambda: [0.2, 1.0])
    crop_ratio: List[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    flip: float = 0.0
    jitter: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    greyscale: float = 0.0
    blur: float = 0.0
    blur_sigma: List[float] = field(default_factory=lambda: [0.1, 2.0])
    authors_crop: float = 0.0
    authors_turn: float = 0.0

    def problems(self):
        """Wrong values in words, each beginning with its key; empty when everything fits."""
        found = []
        for key in ("crop", "flip", "jitter", "greyscale", "blur", "authors_crop", "authors_turn"):
            if not 0 <= getattr(self, key) <= 1:
                found.append(f"{key}: {getattr(self, key)} is not a probability in 0..1")
        for key, upper in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)):
            if not 0 <= getattr(self, key) <= upper:
                found.append(f"{key}: {getattr(self, key)} is not in 0..{upper}")
        for key, upper in (("crop_scale", 1), ("crop_ratio", 100), ("blur_sigma", 100)):
            pair = getattr(self, key)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= upper:
                found.append(f"{key}: {list(pair)} is not [low, high] with 0 < low <= high <= {upper}")
        if self.crop and self.authors_crop:
            found.append("crop: excludes authors_crop; set one of them to 0")
        return found


def augment_image(image, size, augmentation, rng):
    """A randomly changed picture of the model's size. With everything off it equals ``resize_image``.

    Args:
        image: uint8 [H, W, 3], RGB; is not changed.
        size: edge of the result in pixels.
        augmentation: an ``Augmentation``.
        rng: ``np.random.Generator``; the only source of randomness.

    Returns:
        uint8 ndarray [size, size, 3].
    """
    def drawn(probability):
        return probability > 0 and rng.random() < probability

    if drawn(augmentation.authors_crop):
        image = _window(image, size, rng)
    if drawn(augmentation.crop):
        image = _random_crop(image, augmentation.crop_scale, augmentation.crop_ratio, rng)
    if drawn(augmentation.authors_turn):
        image = _AUTHORS_TURNS[rng.integers(len(_AUTHORS_TURNS))](image)
    image = resize_image(image, size)
    if drawn(augmentation.flip):
        image = cv2.flip(image, 1)
    if drawn(augmentation.jitter):
        image = _jitter(image, augmentation, rng)
    if drawn(augmentation.greyscale):
        image = _grey(image)
    if drawn(augmentation.blur):
        sigma = rng.uniform(*augmentation.blur_sigma) * size / 224
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    return image


def _read(path_or_bytes, name):
    if isinstance(path_or_bytes, (bytes, bytearray, memoryview)):
        data, name = bytes(path_or_bytes), name or "picture given as bytes"
    else:
        path = os.fspath(path_or_bytes)
        name = name or path
        if not os.path.isfile(path):  # also keeps away from devices and pipes, which may never end
            raise ImageError(f"{name}: no such picture file")
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError as error:
            raise ImageError(f"{name}: cannot read the picture file ({error.strerror})") from error
    if not data:
        raise ImageError(f"{name}: the picture file is empty")
    return data, name


def _read_header(data, name, max_pixels):
    """The picture opened by Pillow, which reads the header only, after the size check."""
    try:
        header = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: too large to decode ({error})") from error
    except Exception as error:  # what Pillow raises on a damaged header depends on the format
        raise ImageError(f"{name}: not a picture that can be read ({', '.join(FORMATS)}), or its header is damaged") from error
    width, height = header.size
    if width * height > max_pixels:
        raise ImageError(f"{name}: {width} x {height} pixels, more than the limit of {max_pixels}; shrink the picture or "
                         f"raise max_pixels")
    return header


def _has_jpeg_end(data):
    """Whether the first picture of a JPEG file ends: an EOI marker after its first scan begins.

    Thumbnails in the metadata have end markers of their own, so the segments before the scan are skipped by their lengths.
    """
    position = 2
    while True:
        position = data.find(b"\xff", position)
        if position < 0 or position + 4 > len(data):
            return False
        marker = data[position + 1]
        if marker == 0xDA:  # start of scan; in its data 0xFF is never followed by 0xD9
            return data.rfind(b"\xff\xd9", position) >= 0  # searched from the end, where it usually is
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD9:  # no length follows
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2:position + 4], "big")


def _png_data_bytes(data):
    """How many bytes the compressed picture of a PNG file has."""
    position, total = 8, 0
    while position + 8 <= len(data):
        length = int.from_bytes(data[position:position + 4], "big")
        total += length if data[position + 4:position + 8] == b"IDAT" else 0
        position += 12 + length
    return total


def _most_png_bytes(size):
    """What an incompressible picture takes: 16-bit RGBA, a filter byte per row, twice that for interlacing and poor compressors.

    What comes after the last row is unpacked by OpenCV although nobody sees it, and unpacking multiplies it by up to 1000.
    """
    width, height = size
    return 2 * height * (8 * width + 16) + (1 << 16)


def _needs_pillow(header):
    """OpenCV cannot read GIF and animated WebP, and it multiplies the colours of a TIFF by their alpha.

    A usual JPEG is Pillow's too: the same pixels in half the time (Pillow 13 against OpenCV 4.6: 1.1 and 2.2 ms for 640 x 480). Of CMYK the two
    make different colours; it stays with OpenCV.
    """
    return (header.format in ("JPEG", "MPO") and header.mode in ("RGB", "L")
            or header.format == "GIF" or (header.format == "WEBP" and header.is_animated)
            or (header.format == "TIFF" and "A" in header.mode))


def _decode_with_pillow(header, name):
    try:
        return np.array(header if header.mode == "RGB" else header.convert("RGB"))
    except Exception as error:  # what Pillow raises on damaged data depends on the format
        raise ImageError(f"{name}: the {header.format} data are damaged or truncated ({error})") from error


def _decode_with_opencv(data, header, name):
    # Orientation is ignored here because OpenCV 4.6 knows it for some formats only.
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise ImageError(f"{name}: the {header.format} data cannot be decoded ({error.err})") from error
    if image is None:
        raise ImageError(f"{name}: the {header.format} data are damaged or truncated; fetch the file again or remove it")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _turn_upright(image, header):
    try:
        orientation = header.getexif().get(0x0112, 1)
    except Exception:  # broken metadata do not make the pixels unusable
        return image
    if orientation in (5, 6, 7, 8):
        image = cv2.transpose(image)
    if orientation in (2, 6, 3, 7):
        image = cv2.flip(image, 1)
    if orientation in (4, 8, 3, 7):
        image = cv2.flip(image, 0)
    return image


_AUTHORS_TURNS = (
    lambda image: cv2.flip(image, 1),
    lambda image: cv2.flip(image, 0),
    lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
    lambda image: cv2.rotate(image, cv2.ROTATE_180),
    lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
)


def _window(image, size, rng):
    """The authors' crop: at most ``size`` pixels of each side, at a uniform place, not resized."""
    height, width = image.shape[:2]
    left = rng.integers(max(width - size, 0) + 1)
    top = rng.integers(max(height - size, 0) + 1)
    return image[top:top + size, left:left + size]


def _random_crop(image, scale, ratio, rng):
    """A part of the picture with a random share of its area and a log-uniform width/height ratio."""
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        wanted_ratio = np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1])))
        crop_width, crop_height = round(np.sqrt(area * wanted_ratio)), round(np.sqrt(area / wanted_ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            break
    else:  # a very long picture: its largest centred part with an allowed ratio
        wanted_ratio = min(max(width / height, ratio[0]), ratio[1])
        crop_width = max(1, min(width, round(height * wanted_ratio)))
        crop_height = max(1, min(height, round(width / wanted_ratio)))
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        return image[top:top + crop_height, left:left + crop_width]
    top, left = rng.integers(height - crop_height + 1), rng.integers(width - crop_width + 1)
    return image[top:top + crop_height, left:left + crop_width]


def _jitter(image, augmentation, rng):
    changes = ((_change_brightness, augmentation.brightness), (_change_contrast, augmentation.contrast),
               (_change_saturation, augmentation.saturation), (_change_hue, augmentation.hue))
    for i in rng.permutation(len(changes)):
        change, strength = changes[i]
        if strength:
            image = change(image, rng.uniform(-strength, strength))
    return image


def _change_brightness(image, change):
    return cv2.LUT(image, _levels(np.arange(256) * (1 + change)))


def _change_contrast(image, change):
    mean = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean()
    return cv2.LUT(image, _levels(mean + (np.arange(256) - mean) * (1 + change)))


def _change_saturation(image, change):
    return cv2.addWeighted(image, 1 + change, _grey(image), -change, 0)


def _change_hue(image, change):
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(change * 256) % 256)  # the full circle is 256 steps: uint8 wraps around by itself
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _grey(image):
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _levels(values):
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
