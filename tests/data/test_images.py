"""One image file → pixels."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from dit_moe.data.images import BadImage, decode
from tests.data.examples import encoded, pixels


def read(content, size=None, min_side=1, max_megapixels=200.0, **options):
    """uint8 [H, W, 3]."""
    image = decode(content, size, min_side, max_megapixels, **options)
    assert image.dtype == np.uint8 and image.shape[0] == 3
    return image.transpose(1, 2, 0)


def pixel(content):
    return read(content)[0, 0].tolist()


# ------------------------------------------------------------------------------------------------- formats and modes


@pytest.mark.parametrize("form", ["PNG", "BMP", "PPM", "TIFF", "WEBP"])
def test_the_same_picture_has_the_same_pixels_in_every_lossless_format(form):
    picture = pixels(0, 9, 14)
    options = {"lossless": True} if form == "WEBP" else {}
    assert np.array_equal(read(encoded(picture, form, **options)), picture)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "PPM"])
def test_grey_is_repeated_in_all_three_channels_and_one_bit_is_black_or_white(form):
    grey = pixels(0)[..., 0]
    image = read(encoded(grey, form))
    assert (image == image[..., :1]).all()
    assert form == "JPEG" or np.array_equal(image[..., 0], grey)
    assert read(encoded(Image.fromarray(np.array([[True, False]])))).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("alpha", [0, 1, 100, 128, 254, 255])
@pytest.mark.parametrize("mode, colour", [("RGBA", (10, 0, 250)), ("LA", (40,))])
def test_alpha_is_composited_over_white(mode, colour, alpha):
    content = encoded(Image.new(mode, (2, 2), (*colour, alpha)))
    rgb = colour if mode == "RGBA" else colour * 3
    assert pixel(content) == [round((c * alpha + 255 * (255 - alpha)) / 255) for c in rgb]


def test_a_palette_gives_its_colours_and_what_it_calls_transparent_is_white():
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert read(encoded(image)).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert read(encoded(image, transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    half = round((10 * 128 + 255 * 127) / 255)
    assert read(encoded(image, transparency=b"\x80\xff"))[0, :, 0].tolist() == [half, 40]


def test_a_colour_that_a_file_calls_transparent_is_white():
    colours = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert read(encoded(colours, transparency=(4, 5, 6))).tolist() == [[[1, 2, 3], [255, 255, 255]]]
    grey = Image.fromarray(np.array([[1, 2]], dtype=np.uint8))
    assert read(encoded(grey, transparency=2))[..., 0].tolist() == [[1, 255]]


SIXTEEN = np.array([[0, 128, 129, 257, 1000, 32768, 65278, 65407, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_grey_are_scaled_to_the_nearest_of_eight(form):
    image = read(encoded(Image.fromarray(SIXTEEN), form))
    assert image[..., 0].tolist() == image[..., 2].tolist() == [[round(v / 257) for v in SIXTEEN[0].tolist()]]


def test_a_transparent_grey_of_sixteen_bits_is_white():
    image = read(with_chunk(encoded(Image.fromarray(SIXTEEN)), b"tRNS", struct.pack(">H", 1000)))
    assert image[0, :, 0].tolist() == [0, 0, 1, 1, 255, 128, 254, 255, 255]


def with_chunk(png, kind, body):
    """A PNG file with one more chunk before its pixels."""
    at = png.index(b"IDAT") - 4
    return png[:at] + struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) + png[at:]


@pytest.mark.parametrize("dtype, mode", [(np.int32, "I"), (np.float32, "F")])
def test_pixels_of_unknown_range_are_refused(dtype, mode):
    with pytest.raises(BadImage, match=rf"has 32-bit pixels \(mode {mode}\), whose black and white are unknown"):
        read(encoded(Image.fromarray(np.ones((8, 8), dtype=dtype)), "TIFF"))


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])  # JPEGs hold CMYK inverted, as Adobe began it
@pytest.mark.parametrize("cmyk", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 128, 0, 0), (0, 0, 200, 64), (9, 9, 9, 255)])
def test_cmyk_becomes_the_light_that_the_inks_leave(form, cmyk):
    *inks, black = cmyk
    expected = [(255 - ink) * (255 - black) / 255 for ink in inks]
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    found = pixel(encoded(Image.new("CMYK", (16, 16), cmyk), form, **options))
    assert np.abs(np.array(found) - expected).max() <= 2  # the JPEG's rounding; TIFF's is below 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_cameras_orientation_is_ignored_as_adm_does_unless_it_is_asked_for(form):
    picture, exif = Image.fromarray(pixels(0, 16, 32)), Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        content = encoded(picture, form, exif=exif)
        with Image.open(io.BytesIO(content)) as image:
            plain, turned = np.asarray(image.convert("RGB")), np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert np.array_equal(read(content), plain)
        assert np.array_equal(read(content, turn=lambda found: True), turned)


# ------------------------------------------------------------------------------------------------------ crop and resize


# Halves of odd sides are chosen odd here, lest a pixel lie on the border of two and rounding errors choose.


def adm_crop(image_HWC, size):
    """ADM's crop in plain NumPy: filters as sums over weights, one axis after the other, each rounded to 8 bits."""
    while min(image_HWC.shape[:2]) >= 2 * size:
        image_HWC = resize(image_HWC, image_HWC.shape[0] // 2, image_HWC.shape[1] // 2, box)
    height, width = image_HWC.shape[:2]
    scale = size / min(height, width)
    image_HWC = resize(image_HWC, round(height * scale), round(width * scale), bicubic)
    top, left = (image_HWC.shape[0] - size) // 2, (image_HWC.shape[1] - size) // 2
    return image_HWC[top : top + size, left : left + size]


def box(x):
    return (x > -0.5) & (x <= 0.5)


def bicubic(x, a=-0.5):  # Keys 1981
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    return np.where(x < 1, near, np.where(x < 2, a * (x**3 - 5 * x**2 + 8 * x - 4), 0))


def resize(image_HWC, height, width, kernel):
    for axis, new in ((1, width), (0, height)):
        old = image_HWC.shape[axis]
        step = max(1, old / new)  # the kernel is as wide as what a new pixel covers
        centres = (np.arange(new) + 0.5) * old / new
        weights = kernel((np.arange(old) + 0.5 - centres[:, None]) / step)
        weights = weights / weights.sum(1, keepdims=True)
        sums = np.moveaxis(np.tensordot(weights, image_HWC, (1, axis)), 0, axis)
        image_HWC = np.floor(sums + 0.5).clip(0, 255)
    return image_HWC


@pytest.mark.parametrize(
    "height, width, size",
    [(24, 24, 24), (30, 41, 24), (41, 30, 24), (64, 90, 16), (95, 127, 16), (9, 12, 32), (35, 250, 16)],
    ids=lambda value: str(value),
)
def test_crops_are_those_of_adm(height, width, size):
    picture = pixels(1, height, width)
    found, expected = read(encoded(picture), size), adm_crop(picture.astype(float), size)
    assert found.shape == (size, size, 3)
    difference = np.abs(found - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02  # Pillow's weights have 22 bits; halves may tip


def test_a_crop_to_the_shorter_side_changes_no_pixel_and_leaves_the_odd_one_at_the_end():
    picture = pixels(2, 8, 11)
    assert np.array_equal(read(encoded(picture), 8), picture[:, 1:9])
    assert np.array_equal(read(encoded(picture.transpose(1, 0, 2)), 8), picture.transpose(1, 0, 2)[1:9])


def test_a_jpeg_is_decoded_in_full_before_it_is_made_smaller():
    content = encoded(pixels(3, 256, 256), "JPEG")
    with Image.open(io.BytesIO(content)) as image:
        whole = np.asarray(image)
    assert np.array_equal(read(content, 16), read(encoded(whole), 16))


# --------------------------------------------------------------------------------------------------- limits and damage


DECODING = r"""
import re, sys
from pathlib import Path
from dit_moe.data.images import decode

def peak():
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

content = sys.stdin.buffer.read()
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
before = peak()
assert decode(content, 256, 1, 200.0).shape == (3, 256, 256)
print(peak() - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory cannot be reset")
def test_an_image_of_30_megapixels_takes_bounded_memory_and_can_be_refused():
    content = encoded(Image.linear_gradient("L").resize((6000, 5000)).convert("RGB"), "JPEG")
    # In a process of its own: this one may hold freed memory, which would be taken first.
    done = subprocess.run([sys.executable, "-c", DECODING], input=content, capture_output=True, check=True, timeout=60)
    # MiB; 114 at four bytes a pixel, and while halving, once the half and the quarter of it
    assert 100 < float(done.stdout) < 240
    with pytest.raises(BadImage, match=r"is 6000×5000 pixels, 30 million, more than max_megapixels=20"):
        read(content, 256, max_megapixels=20)


def test_a_bomb_is_refused_by_its_header():
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match=r"is 60000×60000 pixels, 3600 million, more than max_megapixels=200"):
            read(bomb + b"\0\0\0\0IDAT", 256)


def test_pillows_own_limit_is_neither_felt_nor_changed_and_odd_metadata_gives_no_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    broken_exif = b"Exif\0\0II*\0\x08\0\0\0\xff\0" + b"\x1a\x01\x05\0\x01\0\0\0\xff\xff\0\0"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(encoded(pixels(0), "JPEG", exif=broken_exif)).shape == (16, 16, 3)
        with pytest.raises(BadImage):
            read(b"no image")
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize(
    "height, width, limits, problem",
    [
        (1, 1, {"size": 16, "min_side": 8}, "is 1×1 pixels, less than min_side=8"),
        (20, 7, {"min_side": 8}, "is 7×20 pixels, less than min_side=8"),
        (8, 20_000, {"size": 256, "max_megapixels": 100}, "20000×8 pixels, 163.8 million when its shorter side is enl"),
    ],
)
def test_images_beyond_the_limits_are_refused_with_their_size(height, width, limits, problem):
    content = encoded(np.zeros((height, width), dtype=np.uint8))
    assert read(content).shape == (height, width, 3)
    with pytest.raises(BadImage, match=problem):
        read(content, **limits)


JPEG, PNG = encoded(pixels(0, 64, 64), "JPEG"), encoded(pixels(0, 64, 64))


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"<html>404 not found</html>", "is a web page that was saved in place of the file; download the file itself"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a pointer of Git LFS and not the file itself; run git lfs",
        ),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", r"is not an image that can be read \(JPEG, PNG, "),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image that can be read"),
        (JPEG[: len(JPEG) // 2], r"cannot be decoded \(.*truncated"),
        (PNG[: len(PNG) // 2], r"cannot be decoded \("),
        (JPEG[:30], "cannot be decoded|is not an image"),
        (PNG[:20], "cannot be decoded|is not an image"),
    ],
    ids=[
        "zero-byte",
        "web page",
        "pointer",
        "drawing",
        "postscript",
        "half a JPEG",
        "half a PNG",
        "start of a JPEG",
        "start of a PNG",
    ],
)
def test_a_broken_file_is_refused_with_the_reason(content, problem):
    with pytest.raises(BadImage, match=problem) as error:
        read(content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "BMP", "PPM", "WEBP"])
def test_damage_never_raises_anything_else(form):
    content, random = encoded(pixels(0), form), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        for at in random.integers(len(content), size=3):
            damaged[at] = random.integers(256)
        with contextlib.suppress(BadImage):
            read(bytes(damaged[: random.integers(1, len(content) + 1)]), 8, max_megapixels=1)
