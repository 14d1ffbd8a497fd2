"""One image file → pixels: whatever its format and mode, uint8 RGB, cropped and resized as ADM does.

A camera's orientation tag (EXIF) is ignored, as ADM ignores it: published results are of such crops. So is a JPEG
decoder's fast reduced size (`draft`), which gives other pixels.
"""

# C channels, H height, W width

from __future__ import annotations

import io
import threading
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")  # no other parser of Pillow's is let near a file
BITS_16_TO_8 = ((np.arange(2**16) * 255 + (2**16 - 1) // 2) // (2**16 - 1)).astype(np.uint8)  # rounded

_opening = threading.Lock()


class BadImage(ValueError):
    """What is wrong with an image file, worded to stand behind its name: "is empty"."""


def decode(content: bytes, size: int | None, min_side: int, max_megapixels: float) -> np.ndarray:
    """The bytes of an image file → uint8 RGB [3, H, W]. Grey is repeated, and what is transparent shows white.

    Args:
        size: H and W after `crop`; None keeps the image as it is.
        min_side: least height and width in pixels.
        max_megapixels: most pixels of the image, also once `crop` has enlarged it, in millions. What exceeds it is
            refused by its header, before anything is decoded.

    Raises:
        BadImage: not an image, damaged, or outside of the limits.
    """
    if not content:
        raise BadImage("is empty (0 bytes)")
    try:
        image = _open(content)
        _check_size(image.size, size, min_side, max_megapixels)
        image = to_rgb(image)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImage(f"is not an image that can be read ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's parsers raise OSError, SyntaxError, struct.error, zlib.error, …
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(f"cannot be decoded ({reason})") from None
    pixels_HWC = np.asarray(image) if size is None else crop(image, size)
    return pixels_HWC.transpose(2, 0, 1)


def _open(content: bytes) -> Image.Image:
    """Read the header. Pillow's own limit on pixels gives way to ours, and it does not warn of odd metadata.

    Both are settings of the whole process; they are changed for the moment that a header takes.
    """
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(content), formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_size(found: tuple[int, int], size: int | None, min_side: int, max_megapixels: float) -> None:
    (width, height), shorter = found, min(found)
    if shorter < min_side:
        raise BadImage(f"is {width}×{height} pixels, less than min_side={min_side}")
    enlarged = max(1.0, (size or 0) / shorter)
    megapixels = width * height * enlarged**2 / 1e6
    if megapixels > max_megapixels:
        scaled = f" when its shorter side is enlarged to {size}" if enlarged > 1 else ""
        count = f"{width}×{height} pixels, {megapixels:.4g} million{scaled}"
        raise BadImage(f"is {count}, more than max_megapixels={max_megapixels:g}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow's → RGB, transparency composited over white. BadImage if the range of values is unknown."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # both: 0..65535
        grey_HW, transparent = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray(BITS_16_TO_8[grey_HW])
        if transparent is not None:
            image.putalpha(Image.fromarray(grey_HW != transparent).convert("L"))
    elif image.mode in ("I", "F"):
        raise BadImage(
            f"has 32-bit pixels (mode {image.mode}), whose black and white are unknown; convert it to 8 bits"
        )
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


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
