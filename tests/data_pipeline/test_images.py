"""Pictures: decoding against Pillow's pixels, the authors' preprocessing, bad files, augmentation.

tests/data/preprocess holds pictures and, as ``*.expected.png``, what the authors' image reader (224 pixels, Pillow 8.2) made
of them before normalisation.
"""
import io
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from unimo2_paddle.config import build
from unimo2_paddle.data.images import Augmentation, augment_image, decode_image, load_image, normalise, resize_image
from unimo2_paddle.errors import ImageError

FIXTURES = Path(__file__).resolve().parents[1] / "data" / "preprocess"


def colourful(height=60, width=80, seed=0):
    """A smooth coloured picture without symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


RGB = colourful()
ALPHA = np.random.default_rng(1).integers(0, 256, RGB.shape[:2], dtype=np.uint8)


def stored(image, file_format, **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, file_format, **options)
    return buffer.getvalue()


def stored_by_opencv(image, extension):
    return cv2.imencode(extension, image)[1].tobytes()


def mean_difference(a, b):
    assert a.shape == b.shape
    return np.abs(a.astype(int) - b.astype(int)).mean()


def by_pillow(image, size):
    """Pillow's bicubic resize, the width first: until Pillow 12 one call did so, 13 does tall pictures the other way round."""
    return np.array(Image.fromarray(image).resize((size, len(image)), Image.BICUBIC).resize((size, size), Image.BICUBIC))


# --- the authors' preprocessing -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, tolerance", [("tall_300x500.jpg", 1.3), ("small_90x70.jpg", 1.3), ("grey_320x240.jpg", 0),
                                             ("palette_180x150.png", 0), ("alpha_200x260.png", 3)])
def test_decoding_and_resizing_equal_the_authors_image_reader(name, tolerance):
    expected = np.array(Image.open(FIXTURES / (name.split(".")[0] + ".expected.png")).convert("RGB"))
    result = resize_image(decode_image(FIXTURES / name), 224)
    assert mean_difference(result, expected) <= tolerance
    assert np.abs(normalise(result) - (expected / 255 - 0.5) / 0.5).mean() <= tolerance / 127.5 + 1e-6


@pytest.mark.parametrize("height, width, size", [(60, 80, 16), (60, 80, 224), (500, 30, 64), (1, 1, 8), (64, 64, 64), (64, 90, 64), (90, 64, 64),
                                                 (375, 500, 384), (1200, 1600, 224), (2000, 3, 7)])
def test_resizing_equals_pillows_antialiased_bicubic(height, width, size):
    image = colourful(height, width)
    before = image.copy()
    result = resize_image(image, size)
    assert np.array_equal(result, by_pillow(image, size))
    result[:] = 0  # a new array, also when the size fits already
    assert np.array_equal(image, before)


@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 150), st.booleans(), st.integers(0, 2 ** 32 - 1))
@settings(max_examples=150, deadline=None)
def test_resizing_equals_pillow_for_noise_of_any_size(height, width, size, harsh, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if harsh:  # overshoots of the cubic are clipped on both sides
        image = np.where(image > 127, np.uint8(255), np.uint8(0))
    expected = by_pillow(image, size)
    assert np.array_equal(resize_image(image, size), expected)
    crop = image[height // 3:, width // 4:]  # rows apart, as a random crop has them
    assert np.array_equal(resize_image(crop, size), by_pillow(crop, size))


def test_resizing_gives_the_same_pixels_without_numba():
    code = ("import sys; sys.modules['numba'] = None; import numpy as np; from unimo2_paddle.data import images\n"
            "noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)\n"
            "sys.stdout.buffer.write(images.resize_image(noise, 32).tobytes())")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    assert found == resize_image(noise, 32).tobytes()


def test_shrinking_averages_instead_of_picking_pixels():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize_image(stripes, 32)[:, 4:-4].astype(int) - 127).max() <= 2


def test_normalising_maps_levels_to_minus_one_to_one_in_any_shape():
    levels = np.arange(256, dtype=np.uint8)
    expected = (levels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    assert np.array_equal(normalise(levels), expected)
    assert (expected[0], expected[255]) == (-1, 1)
    batch = np.stack([RGB, RGB])[None]
    assert normalise(batch).shape == batch.shape and normalise(batch).dtype == np.float32
    with pytest.raises(TypeError, match="uint8"):
        normalise(levels.astype(np.float32))


def test_loading_gives_the_models_input():
    data = stored(RGB, "PNG")
    image = load_image(data, 32)
    assert image.shape == (32, 32, 3) and image.dtype == np.float32
    assert np.array_equal(image, normalise(resize_image(RGB, 32)))


def test_importing_images_does_not_import_paddle():
    code = "import sys, unimo2_paddle.data.images as i, unimo2_paddle; assert unimo2_paddle.load_image is i.load_image; " \
           "sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- decoding -----------------------------------------------------------------------------------------------------------

GREY = cv2.cvtColor(RGB, cv2.COLOR_RGB2GRAY)
GREY_RGB = np.dstack([GREY] * 3)
WITH_ALPHA = np.dstack([RGB, ALPHA])
PALETTE = Image.fromarray(RGB).quantize(200)
BLACK_WHITE = Image.fromarray(GREY).point(lambda level: 255 * (level > 127)).convert("1")


@pytest.mark.parametrize("data, expected", [
    pytest.param(stored(RGB, "PNG"), RGB, id="png"),
    pytest.param(stored(GREY, "PNG"), GREY_RGB, id="png grey"),
    pytest.param(stored(WITH_ALPHA, "PNG"), RGB, id="png alpha"),
    pytest.param(stored(np.dstack([GREY, ALPHA]), "PNG"), GREY_RGB, id="png grey alpha"),
    pytest.param(stored(PALETTE, "PNG"), np.array(PALETTE.convert("RGB")), id="png palette"),
    pytest.param(stored(PALETTE, "PNG", transparency=3), np.array(PALETTE.convert("RGB")), id="png palette transparency"),
    pytest.param(stored(BLACK_WHITE, "PNG"), np.array(BLACK_WHITE.convert("RGB")), id="png 1 bit"),
    pytest.param(stored(GREY.astype(np.uint16) * 257, "PNG"), GREY_RGB, id="png 16 bit grey"),
    pytest.param(stored_by_opencv(RGB[..., ::-1].astype(np.uint16) * 257, ".png"), RGB, id="png 16 bit"),
    pytest.param(stored_by_opencv(np.dstack([RGB[..., ::-1], ALPHA]).astype(np.uint16) * 257, ".png"), RGB, id="png 16 bit alpha"),
    pytest.param(stored(RGB, "WEBP", lossless=True), RGB, id="webp"),
    pytest.param(stored(WITH_ALPHA, "WEBP", lossless=True, exact=True), RGB, id="webp alpha"),
    pytest.param(stored(RGB, "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(255 - RGB)]), RGB,
                 id="webp animated"),
    pytest.param(stored(RGB, "BMP"), RGB, id="bmp"),
    pytest.param(stored(RGB, "TIFF"), RGB, id="tiff"),
    pytest.param(stored(WITH_ALPHA, "TIFF"), RGB, id="tiff alpha"),
    pytest.param(stored(GREY.astype(np.uint16) * 257, "TIFF"), GREY_RGB, id="tiff 16 bit grey"),
    pytest.param(stored(RGB, "PPM"), RGB, id="ppm"),
    pytest.param(stored(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]), np.array(PALETTE.convert("RGB")),
                 id="gif animated"),
])
def test_lossless_files_of_every_kind_give_their_rgb_pixels(data, expected):
    image = decode_image(data)
    assert image.dtype == np.uint8 and image.flags.c_contiguous
    assert np.array_equal(image, expected)


@pytest.mark.parametrize("data, tolerance", [
    (stored(RGB, "JPEG"), 1), (stored(RGB, "JPEG", progressive=True), 1), (stored(GREY, "JPEG"), 1),
    (stored(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95), 2)])
def test_jpegs_of_every_kind_are_decoded_as_pillow_does(data, tolerance):
    assert mean_difference(decode_image(data), np.array(Image.open(io.BytesIO(data)).convert("RGB"))) <= tolerance


def test_path_text_path_and_every_kind_of_bytes_are_equal(tmp_path):
    path = tmp_path / "picture with no suffix"
    data = stored(RGB, "PNG")
    path.write_bytes(data)
    for source in (path, str(path), data, bytearray(data), memoryview(data)):
        assert np.array_equal(decode_image(source), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100})])
def test_exif_orientation_is_applied_unless_switched_off(orientation, file_format, options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = stored(RGB, file_format, exif=exif, **options)
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert mean_difference(decode_image(data), upright) <= 2
    assert mean_difference(decode_image(data, exif=False), RGB) <= 2


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks about metadata
def test_broken_exif_leaves_the_picture_as_stored():
    data = stored(RGB, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 40)
    assert decode_image(data).shape == RGB.shape


# --- bad files ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content, message", [
    (None, "no such picture file"), (b"", "is empty"), (b"<html>404 not found</html>", "not a picture"),
    (b"\x89PNG\r\n\x1a\n", "not a picture"), (b"\xff\xd8\xff", "not a picture"), (stored(RGB, "PNG")[:-300], "damaged or truncated"),
    (stored(RGB, "JPEG")[:-2], "truncated JPEG")])
def test_unusable_files_are_named_with_the_reason(tmp_path, content, message):
    path = tmp_path / "cat.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"cat\.jpg: .*{message}"):
        load_image(path, 32)
    if content:
        with pytest.raises(ImageError, match=f"shard 3, key 17: .*{message}"):
            load_image(content, 32, name="shard 3, key 17")


def test_a_directory_is_not_a_picture(tmp_path):
    with pytest.raises(ImageError, match="no such picture file"):
        decode_image(tmp_path)


WHOLE_FILES = {
    "jpeg": stored(colourful(200, 300), "JPEG"), "progressive": stored(colourful(200, 300), "JPEG", progressive=True),
    "grey": stored(colourful(200, 300)[..., 0], "JPEG"), "png": stored(RGB, "PNG"), "webp": stored(RGB, "WEBP"),
    "bmp": stored(RGB, "BMP"), "tiff": stored(RGB, "TIFF"), "tiff alpha": stored(WITH_ALPHA, "TIFF"), "ppm": stored(RGB, "PPM"),
    "gif": stored(PALETTE, "GIF"),
}


@pytest.mark.parametrize("kind", WHOLE_FILES)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.98])
def test_a_truncated_file_is_an_error_and_never_a_half_grey_picture(kind, share):
    data = WHOLE_FILES[kind]
    decode_image(data)
    with pytest.raises(ImageError):
        decode_image(data[:int(len(data) * share)])


def test_a_jpeg_padded_with_zeros_like_an_interrupted_download_is_truncated():
    data = WHOLE_FILES["jpeg"]
    with pytest.raises(ImageError, match="truncated"):
        decode_image(data[:len(data) // 2] + bytes(len(data) // 2))


def test_the_end_marker_of_a_thumbnail_does_not_hide_truncation():
    thumbnail = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + stored(colourful(20, 20), "JPEG")
    data = stored(colourful(200, 300), "JPEG", exif=thumbnail)
    decode_image(data)
    with pytest.raises(ImageError, match="truncated"):
        decode_image(data[:len(data) * 2 // 3])


def test_bytes_after_the_end_of_a_jpeg_do_no_harm():
    data = WHOLE_FILES["jpeg"]
    assert np.array_equal(decode_image(data + b"\0" * 500 + b"trailer"), decode_image(data))


def png_header(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width, height", [(9000, 9000), (10_000, 10_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1), (70_000_000, 1)])
def test_a_decompression_bomb_is_refused_before_decoding(monkeypatch, width, height):
    def never(*_):
        raise AssertionError("a bomb was decoded")

    monkeypatch.setattr(cv2, "imdecode", never)
    monkeypatch.setattr(Image.Image, "convert", never)
    with pytest.raises(ImageError, match="bomb.png: .*(too large|more than the limit)"):
        decode_image(png_header(width, height), name="bomb.png")


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


BLACK_ROWS = zlib.compress(bytes(10 * 31))


def png_of(*chunks, idat=BLACK_ROWS):
    return (b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 10, 10, 8, 2, 0, 0, 0)) + b"".join(chunks)
            + png_chunk(b"IDAT", idat) + png_chunk(b"IEND", b""))


def riff(*chunks):
    body = b"WEBP" + b"".join(name + struct.pack("<I", len(content)) + content for name, content in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bombs():
    """Small files that would fill memory or run for minutes: name -> (content, words of the error, "" for a picture all the same)."""
    packed = zlib.compress(bytes(2 * 10**8), 1)  # 200 MB in 900 kB
    progressive = stored(np.zeros((2048, 2048, 3), np.uint8), "JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda"):-2]
    frame = progressive.index(b"\xff\xc2")
    header = progressive[frame:frame + 2 + int.from_bytes(progressive[frame + 2:frame + 4], "big")]
    huge, small = (header[:5] + struct.pack(">HH", size, size) + header[9:] for size in (60_000, 10))
    (inner,) = [(b"VP8 ", stored(np.zeros((3000, 3000, 3), np.uint8), "WEBP", quality=1)[20:])]
    canvas = b"\0" * 4 + (9).to_bytes(3, "little") * 2
    gif = bytearray(stored(PALETTE, "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    return {
        "png whose 200 MB of data are for 300 bytes": (png_of(idat=packed), "more data than a picture of its size"),
        "png with a colour profile of 200 MB": (png_of(png_chunk(b"iCCP", b"p\0\0" + packed)), "not a picture|header is damaged"),
        "png with a text of 200 MB": (png_of(png_chunk(b"zTXt", b"p\0\0" + packed)), "not a picture|header is damaged"),
        "png with 300 texts of 1 MB": (png_of(*[png_chunk(b"zTXt", b"p\0\0" + zlib.compress(bytes(10**6)))] * 300), "not a picture"),
        "jpeg of 2000 scans": (progressive[:-2] + scan * 2000 + b"\xff\xd9", "more than 100 scans"),
        "jpeg that is huge, then small": (progressive[:frame] + huge + small + progressive[frame + len(header):], "damaged|too large"),
        "jpeg that is small, then huge": (progressive[:frame] + small + huge + progressive[frame + len(header):], "damaged|too large"),
        "webp whose canvas hides a larger picture": (riff((b"VP8X", canvas), inner), "not a picture|damaged"),
        "webp animation whose frame is larger than its canvas":
            (riff((b"VP8X", b"\2" + canvas[1:]), (b"ANIM", bytes(6)),
                  (b"ANMF", bytes(6) + (2999).to_bytes(3, "little") * 2 + bytes(4) + b"VP8 " + struct.pack("<I", len(inner[1])) + inner[1])),
             "not a picture|damaged"),
        # which of both, by Pillow's version
        "webp of 16383 x 16383": (riff((b"VP8L", b"\x2f" + (16382 | 16382 << 14).to_bytes(4, "little") + bytes(60))), "too large|not a picture"),
        "gif of 65535 x 65535": (bytes(gif), "too large"),
        "bmp of 30000 x 30000": (stored(RGB, "BMP")[:18] + struct.pack("<ii", 30000, 30000) + stored(RGB, "BMP")[26:], "too large|more than the limit"),
        "ppm without its 8000 x 8000 pixels": (b"P6 8000 8000 255\n", "damaged"),
    }


BOMBED = """
import resource, sys, warnings
warnings.simplefilter("ignore")
from unimo2_paddle.data.images import decode_image
from unimo2_paddle.errors import ImageError
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        print(decode_image(path).shape)
    except ImageError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024)
"""


def test_bombs_are_errors_in_bounded_time_and_memory(tmp_path):
    """Decoded in a process that may use 30 s of a processor (unguarded, the scans alone take 100) and is asked for its memory."""
    made = bombs()
    for name, (content, _) in made.items():
        (tmp_path / name).write_bytes(content)
    result = subprocess.run([sys.executable, "-c", BOMBED, *(str(tmp_path / name) for name in made)], stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, text=True)
    assert result.returncode == 0, result.stdout
    *errors, megabytes = result.stdout.splitlines()
    for (name, (_, message)), error in zip(made.items(), errors):
        assert re.search(message, error), (name, error)
    assert len(errors) == len(made) and int(megabytes) < 500


def test_noise_in_16_bits_and_interlaced_is_no_bomb():
    noise = np.random.default_rng(0).integers(0, 65536, (64, 64, 4)).astype(np.uint16)
    assert decode_image(stored_by_opencv(noise, ".png")).shape == (64, 64, 3)
    tiny = cv2.imencode(".png", noise[:1, :1], [cv2.IMWRITE_PNG_COMPRESSION, 0])[1].tobytes()
    assert decode_image(tiny).shape == (1, 1, 3)


def test_the_size_limit_counts_pixels_and_can_be_moved():
    data = stored(RGB, "PNG")
    assert decode_image(data, max_pixels=60 * 80).shape == (60, 80, 3)
    with pytest.raises(ImageError, match="80 x 60 pixels, more than the limit of 4799"):
        decode_image(data, max_pixels=60 * 80 - 1)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks about metadata
@settings(max_examples=300)
@given(kind=st.sampled_from(sorted(WHOLE_FILES)), place=st.floats(0, 1), junk=st.binary(min_size=1, max_size=8))
def test_damaged_bytes_give_a_picture_or_an_image_error(kind, place, junk):
    data = bytearray(WHOLE_FILES[kind])
    start = int(place * len(data)) if place > 0.5 else int(place * 200)  # headers are the interesting half
    data[start:start + len(junk)] = junk
    try:
        image = decode_image(bytes(data), max_pixels=2**20)
    except ImageError:
        return
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size <= 3 * 2**20


# --- augmentation -------------------------------------------------------------------------------------------------------

EVERYTHING = Augmentation(crop=0.8, flip=0.5, jitter=0.8, greyscale=0.2, blur=0.5, authors_turn=0.5)


def generator(seed=0):
    return np.random.default_rng(seed)


def test_without_options_augmentation_only_resizes_and_draws_nothing():
    rng = generator()
    assert np.array_equal(augment_image(RGB, 48, Augmentation(), rng), resize_image(RGB, 48))
    assert rng.random() == generator().random()


@pytest.mark.parametrize("shape", [(60, 80), (300, 200), (1, 1), (3, 900), (48, 48)])
def test_augmentation_is_deterministic_keeps_its_input_and_its_shape(shape):
    image = colourful(*shape)
    before = image.copy()
    for options in (EVERYTHING, Augmentation(authors_crop=0.5, authors_turn=0.5)):
        views = [augment_image(image, 48, options, generator(seed)) for seed in range(20)]
        again = [augment_image(image, 48, options, generator(seed)) for seed in range(20)]
        assert all(view.shape == (48, 48, 3) and view.dtype == np.uint8 for view in views)
        assert all(np.array_equal(a, b) for a, b in zip(views, again))
        if min(shape) > 1:
            assert len({view.tobytes() for view in views}) > 5
    assert np.array_equal(image, before)


def test_flip_mirrors_left_and_right_as_often_as_asked():
    plain = resize_image(RGB, 32)
    rng = generator()
    mirrored = 0
    for _ in range(400):
        view = augment_image(RGB, 32, Augmentation(flip=0.25), rng)
        if not np.array_equal(view, plain):
            assert np.array_equal(view, plain[:, ::-1])
            mirrored += 1
    assert 70 <= mirrored <= 130


def test_the_authors_turn_is_one_of_five_equally_often():
    image = colourful(64, 64)
    pillow = Image.fromarray(image)
    turns = [np.array(pillow.transpose(method)).tobytes() for method in
             (Image.FLIP_LEFT_RIGHT, Image.FLIP_TOP_BOTTOM, Image.ROTATE_90, Image.ROTATE_180, Image.ROTATE_270)]
    rng = generator()
    seen = [augment_image(image, 64, Augmentation(authors_turn=1.0), rng).tobytes() for _ in range(500)]
    assert all(70 <= seen.count(turn) <= 130 for turn in turns) and set(seen) == set(turns)


@pytest.mark.parametrize("height, width", [(40, 50), (40, 20), (20, 50), (20, 20), (32, 32)])
def test_the_authors_crop_is_an_unresized_window_wherever_the_picture_is_larger(height, width):
    image = np.dstack([np.repeat(np.arange(height)[:, None], width, 1), np.repeat(np.arange(width)[None], height, 0),
                       np.zeros((height, width))]).astype(np.uint8)
    windows = {resize_image(image[top:top + 32, left:left + 32], 32).tobytes()
               for top in range(max(height - 32, 0) + 1) for left in range(max(width - 32, 0) + 1)}
    rng = generator()
    views = {augment_image(image, 32, Augmentation(authors_crop=1.0), rng).tobytes() for _ in range(2000)}
    assert views == windows


def test_random_crop_keeps_the_asked_share_of_the_area_and_ratio():
    height, width = 200, 240
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.dstack([rows, columns, columns * 0]).astype(np.uint8)  # a pixel knows where it was
    rng = generator()
    for _ in range(100):
        view = augment_image(image, 64, Augmentation(crop=1.0, crop_scale=[0.3, 0.6], crop_ratio=[0.8, 1.25]), rng).astype(float)
        crop_height = (view[62, :, 0].mean() - view[1, :, 0].mean()) / 61 * 64
        crop_width = (view[:, 62, 1].mean() - view[:, 1, 1].mean()) / 61 * 64
        assert 0.27 <= crop_height * crop_width / (height * width) <= 0.65
        assert 0.75 <= crop_width / crop_height <= 1.33


def test_a_crop_too_long_for_the_ratio_is_the_centred_largest_one():
    image = colourful(10, 400)
    view = augment_image(image, 10, Augmentation(crop=1.0, crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0]), generator())
    assert np.array_equal(view, image[:, 195:205])


def test_jitter_changes_stay_within_their_strength():
    grey = np.full((32, 32, 3), 100, np.uint8)
    rng = generator()
    only = dict(jitter=1.0, brightness=0, contrast=0, saturation=0, hue=0)
    levels = [augment_image(grey, 32, Augmentation(**{**only, "brightness": 0.4}), rng)[0, 0, 0] for _ in range(300)]
    assert 60 <= min(levels) < 65 and 135 < max(levels) <= 140
    assert np.array_equal(augment_image(RGB, 32, Augmentation(**only), rng), resize_image(RGB, 32))

    plain = resize_image(RGB, 32)
    for _ in range(30):
        contrast = augment_image(RGB, 32, Augmentation(**{**only, "contrast": 0.5}), rng)
        assert 0.45 <= contrast.std() / plain.std() <= 1.55
        saturation = augment_image(grey, 32, Augmentation(**{**only, "saturation": 1.0}), rng)
        assert np.array_equal(saturation, grey)  # no colour to strengthen
        hue = augment_image(RGB, 32, Augmentation(**{**only, "hue": 0.5}), rng)
        assert mean_difference(hue.max(axis=2), plain.max(axis=2)) <= 2  # the HSV value stays


def test_hue_turns_red_into_every_colour_and_a_small_shift_keeps_it_red():
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    rng = generator()
    only = dict(jitter=1.0, brightness=0, contrast=0, saturation=0)
    brightest = {int(augment_image(red, 8, Augmentation(hue=0.5, **only), rng)[0, 0].argmax()) for _ in range(50)}
    assert brightest == {0, 1, 2}
    assert all(augment_image(red, 8, Augmentation(hue=0.1, **only), rng)[0, 0].argmax() == 0 for _ in range(50))


def test_greyscale_and_blur_do_what_they_say():
    rng = generator()
    grey = augment_image(RGB, 32, Augmentation(greyscale=1.0), rng)
    assert (grey == grey[..., :1]).all()
    plain = resize_image(RGB, 64)
    blurred = augment_image(RGB, 64, Augmentation(blur=1.0, blur_sigma=[10.0, 10.0]), rng)
    assert np.abs(np.diff(blurred.astype(int), axis=1)).mean() < 0.9 * np.abs(np.diff(plain.astype(int), axis=1)).mean()


def test_augmentation_settings_come_from_a_config_and_all_problems_are_listed():
    problems = []
    loaded = build(Augmentation, {"crop": 1, "crop_scale": [0.3, 1], "flip": "5e-1"}, "data.augmentation", problems)
    assert not problems and (loaded.crop, loaded.crop_scale, loaded.flip) == (1.0, [0.3, 1.0], 0.5)
    build(Augmentation, {"flip": 2, "crop": 0.5, "authors_crop": 0.5, "hue": 0.7, "crop_scale": [0.9, 0.1], "blur_sigma": [1.0]},
          "data.augmentation", problems)
    assert [p.split(":")[0].split(".")[-1] for p in problems] == ["flip", "hue", "crop_scale", "blur_sigma", "crop"]
    assert all(p.startswith("data.augmentation.") for p in problems)
    assert not Augmentation().problems() and not EVERYTHING.problems()
