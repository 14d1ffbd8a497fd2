"""Image files → pixels: whatever their format and mode, uint8 RGB, cropped and resized as ADM does.

A camera's orientation tag (EXIF) is ignored unless a config asks for it, as ADM ignores it: published results are of
such crops. (TIFF files are always turned, by Pillow.) A JPEG decoder's fast reduced size (`draft`) is not used, which
gives other pixels.
"""

# H height, W width

from __future__ import annotations

import io
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

from dit_moe.data.listing import (
    OTHER_KINDS,
    Listing,
    first_bytes,
    list_files,
)
from dit_moe.files import stand_in

EXTENSIONS = (
    *(".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg"),
    *(".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
OTHER_EXTENSIONS = (  # of files that are not looked into, lest a million captions be opened
    *(".cls", ".csv", ".gz", ".htm", ".html", ".json", ".jsonl", ".log", ".lst", ".md", ".mat", ".npy", ".npz"),
    *(".parquet", ".pdf", ".pkl", ".pt", ".pth", ".py", ".safetensors", ".sh", ".sha256", ".tar", ".toml", ".tsv"),
    *(".txt", ".xml", ".yaml", ".yml", ".zip"),
)
NO_FORMAT = "images of formats that are not read"
NO_FORMAT_EXTENSIONS = (
    *(".arw", ".cr2", ".cr3", ".dds", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heif", ".icns", ".ico", ".jxl"),
    *(".nef", ".orf", ".pcx", ".pfm", ".psd", ".qoi", ".raf", ".rw2", ".sgi", ".svg", ".svs", ".tga", ".xbm", ".xpm"),
)
FORMATS = (  # no other parser of Pillow's is let near a file
    *("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "JPEG2000"),
    *(["AVIF"] if features.check("avif") else []),
)
SIGNATURES = (  # of formats that are certain from their first bytes
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"RIFF....WEBP"),
    *(b"\0\0\0\x0cjP  \r\n\x87\n", b"....ftypavif", b"....ftypavis"),
)
IMAGE_SIGNATURE = re.compile(b"|".join(re.escape(each).replace(rb"\.", b".") for each in SIGNATURES), re.DOTALL)
BITS_16_TO_8 = ((np.arange(2**16) * 255 + (2**16 - 1) // 2) // (2**16 - 1)).astype(np.uint8)  # rounded

TURNS = {  # EXIF orientation → what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_opening = threading.Lock()


class BadImage(ValueError):
    """What is wrong with an image file, worded to stand behind its name: "is empty"."""


def why_no_image(name: str, begins: Callable[[], bytes]) -> str | None:
    """Why a file does not count as an image; None if it does. Its extension decides, or else how it begins.

    A file with the extension of an image counts whatever it holds: one that is broken is to be seen.
    """
    extension = os.path.splitext(name)[1].lower()
    if extension in EXTENSIONS:
        return None
    if extension in NO_FORMAT_EXTENSIONS:
        return NO_FORMAT
    known = extension in OTHER_EXTENSIONS
    return None if not known and IMAGE_SIGNATURE.match(begins()) else OTHER_KINDS


def list_images(folder: str, own: Sequence[str] = ()) -> Listing:
    """The images in a folder, at any depth; see `list_files`."""
    return list_files(folder, lambda name, path: why_no_image(name, lambda: first_bytes(path)), own)


def decode(
    content: bytes,
    size: int | None,
    min_side: int,
    max_megapixels: float,
    turn: Callable[[int], bool] = lambda orientation: False,
) -> np.ndarray:
    """The bytes of an image file → uint8 RGB [3, H, W]. Grey is repeated, and what is transparent shows white.

    Args:
        size: H and W after `crop`; None keeps the image as it is.
        min_side: least height and width in pixels.
        max_megapixels: most pixels of the image, also once `crop` has enlarged it, in millions. What exceeds it is
            refused by its header, before anything is decoded.
        turn: called with an EXIF orientation from 2 to 8, whether to turn the image by it.

    Raises:
        BadImage: not an image, damaged, or outside of the limits.
    """
    if not content:
        raise BadImage("is empty (0 bytes)")
    try:
        with own_limits():
            image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
            orientation = _orientation(image)
        require_size(image.size, size, min_side, max_megapixels)
        image = _to_rgb(image)
        if orientation in TURNS and turn(orientation):
            image = image.transpose(TURNS[orientation])
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImage(no_image(content)) from None
    except Exception as error:  # Pillow's parsers raise OSError, SyntaxError, struct.error, zlib.error, …
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(f"cannot be decoded ({reason})") from None
    pixels_HWC = np.asarray(image) if size is None else crop(image, size)
    return pixels_HWC.transpose(2, 0, 1)


@contextmanager
def own_limits() -> Iterator[None]:
    """Where headers are read: Pillow's limit on pixels gives way to `require_size`, and odd metadata causes no warning.

    Both are settings of the whole process; they are changed for the moment that the headers take.
    """
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _orientation(image: Image.Image) -> int:
    """By EXIF; 1, upright, if there is none."""
    with suppress(Exception):  # damaged metadata
        return image.getexif().get(ExifTags.Base.Orientation, 1) if "exif" in image.info else 1
    return 1


def no_image(content: bytes) -> str:
    """What is wrong with a file that begins so, if it is of no format that is read; worded as in `BadImage`."""
    return stand_in(content[:1024]) or f"is not an image that can be read ({', '.join(FORMATS)})"


def read_file(path: str, max_megapixels: float) -> bytes:
    """An image file. OSError, or BadImage as `require_bytes` does."""
    with open(path, "rb", buffering=0) as file:
        require_bytes(os.fstat(file.fileno()).st_size, max_megapixels)
        return file.read()


def require_bytes(count: int, max_megapixels: float) -> None:
    """BadImage for a file that is larger than any image within the limit: 8 bytes a pixel, and 64 MB of metadata."""
    if count > (8 * max_megapixels + 64) * 1e6:
        raise BadImage(f"has {count / 1e9:,.4g} GB, more than any image of max_megapixels={max_megapixels:g}")


def require_size(found: tuple[int, int], size: int | None, min_side: int, max_megapixels: float) -> None:
    """BadImage unless (width, height) are within the limits of `decode`."""
    width, height = found
    if min(found) < min_side:
        raise BadImage(f"is {width}×{height} pixels, less than min_side={min_side}")
    enlarged = max(1.0, (size or 0) / min(found))
    megapixels = width * height * enlarged**2 / 1e6
    if megapixels > max_megapixels:
        scaled = f" when its shorter side is enlarged to {size}" if enlarged > 1 else ""
        count = f"{width}×{height} pixels, {round(megapixels, 1):.10g} million{scaled}"
        raise BadImage(f"is {count}, more than max_megapixels={max_megapixels:g}")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow's → RGB, transparency composited over white. BadImage if the range of values is unknown."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # both: 0..65535
        grey_HW, transparent = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray(BITS_16_TO_8[grey_HW])
        if transparent is not None:
            image.putalpha(Image.fromarray(grey_HW != transparent).convert("L"))
    elif image.mode in ("I", "F"):
        problem = f"has 32-bit pixels (mode {image.mode}), whose black and white are unknown"
        raise BadImage(f"{problem}; convert it to 8 bits")
    if not image.has_transparency_data:
        return _converted(image, "RGB")
    image = _converted(image, "RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """Without the copy that Pillow makes of an image that has the mode already: large ones fill the memory."""
    image.load()
    return image if image.mode == mode else image.convert(mode)


def crop(image: Image.Image, size: int) -> np.ndarray:
    """The middle of an RGB image as uint8 [size, size, 3], as ADM cuts it (Dhariwal & Nichol 2021).

    Halved by averaging while the shorter side is at least twice `size`, then resized bicubically to shorter side
    `size`; of an odd rest, the extra pixel goes at the end.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]
