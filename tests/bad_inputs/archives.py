"""Images, and archives of them, that cannot be read or that lie about what they hold."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
import zlib

import numpy as np
from PIL import Image

from tests.bad_inputs.kinds import Case, Place, kind
from tests.bad_inputs.values import spoil_bytes


def png_header(width: int, height: int) -> bytes:
    """A PNG of two chunks that claims a size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def bad_image(place: Place) -> tuple[str, bytes]:
    good = io.BytesIO()
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(good, "PNG")
    return place.pick(
        ("a PNG of 10^5 × 10^5", png_header(100_000, 100_000)),
        ("a PNG of 2^31 × 1", png_header(2**31 - 1, 1)),
        ("a PNG of 0 × 0", png_header(0, 0)),
        ("a PNG without its rows", png_header(64, 64)),
        ("an SVG", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
        spoil_bytes(good.getvalue(), place.random)[::-1],
    )


@kind
def images(place: Place) -> Case:
    """A folder of images, one of which cannot be read, or in which there are none."""
    folder = place.folder / "images"
    words = place.pick(
        ["eval", "images", "digits", "--metrics", "fd", "--size", "8", "--channels", "1"],
        ["train", "digits.yaml", "data={name: image_folder, path: images, size: 8}", "--run", "run"],
        ["encode", "latent.yaml", "encode.images={name: image_folder, path: images, size: 16}", "data.path=new"],
    )
    for config in ("digits.yaml", "latent.yaml"):
        if config in words:
            place.copy(config)
    what = place.pick("bad", "bad", "bad", "bad", "empty", "missing", "a file", "only text", "empty classes")
    if what == "bad":
        place.copy("images")
        what, data = bad_image(place)
        (folder / "cats" / "9.png").write_bytes(data)
    elif what == "a file":
        folder.write_text("banana")
    elif what != "missing":
        folder.mkdir()
        if what == "only text":
            (folder / "readme.txt").write_text("banana")
        if what == "empty classes":
            (folder / "cats").mkdir()
            (folder / "dogs").mkdir()
    return Case(f"images: {what}", words)


@kind
def tars(place: Place) -> Case:
    """A tar whose headers lie, or a pattern of tars."""
    path = place.copy("latent.yaml").with_name("x.tar")
    good = (place.good / "images.tar").read_bytes()
    pattern = "x.tar"
    what = place.pick(
        "negative", "huge", "half", "bytes", "pattern", "fifo", "zero", "text", "broken image", "pax", "no labels"
    )
    if what in ("negative", "huge"):
        header = bytearray(good)
        size = -(2**40) if what == "negative" else 2**50
        header[124:136] = (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header[:512]):06o}\0 ".encode()
        path.write_bytes(header)
    elif what == "half":
        path.write_bytes(good[: place.random.randrange(513, len(good) - 11_000)])
    elif what == "pattern":
        pattern = place.pick(
            "x-{0..99999999999}.tar", "x-{0..}.tar", "x-{5..1}.tar", "x-{a..b}.tar", "x-*.tar", "{", "x-{0..3}.tar"
        )
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "zero":
        pattern = "/dev/zero"
    elif what in ("broken image", "pax", "no labels"):
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            member = tarfile.TarInfo("0.png")
            data = bad_image(place)[1] if what == "broken image" else b""
            if what == "pax":
                member.pax_headers = {"size": place.pick("-1", "banana", "9" * 30), "GNU.sparse.size": "-5"}
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    else:
        path.write_bytes(place.random.randbytes(5000) if what == "bytes" else b"banana\n" * 500)
    images = f"encode.images={{name: webdataset, path: '{pattern}', size: 16}}"
    return Case(f"tar: {what} {pattern}", ["encode", "latent.yaml", images, "data.path=new"])


def npy(shape: str, dtype: str, data: bytes, order: str = "False") -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@kind
def npz(place: Place) -> Case:
    """An archive of arrays that lies about them, or explodes."""
    path = place.folder / "x.npz"
    rows = place.random.randbytes(20 * 64)
    what, members = place.pick(
        ("no members", {}),
        ("10^13 rows", {"images": npy("(10000000000000, 8, 8, 1)", "'|u1'", rows)}),
        ("negative rows", {"images": npy("(-20, 8, 8, 1)", "'|u1'", rows)}),
        ("objects", {"images": npy("(20, 8, 8, 1)", "'|O'", rows)}),
        ("structures", {"images": npy("(20,)", "[('a', '<f8')]", rows)}),
        ("too few bytes", {"images": npy("(40, 8, 8, 1)", "'|u1'", rows)}),
        ("one dimension", {"images": npy("(1280,)", "'|u1'", rows)}),
        ("no rows", {"images": npy("(0, 8, 8, 1)", "'|u1'", b"")}),
        ("a bomb", {"images": npy("(70000000, 8, 8, 1)", "'|u1'", b"")}),
        ("NaN", {"images": npy("(20, 8, 8, 1)", "'<f4'", struct.pack("<f", float("nan")) * 1280)}),
        ("text", {"images": npy("(20, 8, 8, 1)", "'<U1'", rows * 4)}),
        ("too few labels", {"images": npy("(20, 8, 8, 1)", "'|u1'", rows), "labels": npy("(3,)", "'<i8'", bytes(24))}),
        ("another name", {"banana": npy("(20,)", "'|u1'", rows[:20])}),
        ("a header that is code", {"images": npy("__import__('os').getcwd()", "'|u1'", rows)}),
        ("no header", {"images": rows}),
        ("no sigma", {"mu": npy("(4,)", "'<f8'", bytes(32))}),
        (
            "a sigma that does not fit",
            {"mu": npy("(4,)", "'<f8'", bytes(32)), "sigma": npy("(2, 2)", "'<f8'", bytes(32))},
        ),
        (
            "a sigma of NaN",
            {
                "mu": npy("(64,)", "'<f8'", bytes(512)),
                "sigma": npy("(64, 64)", "'<f8'", struct.pack("<d", float("nan")) * 4096),
            },
        ),
    )
    compression = place.pick(zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED) if what != "a bomb" else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            with archive.open(name + ".npy", "w") as member:
                member.write(data)
                for _ in range(300 if what == "a bomb" else 0):
                    member.write(bytes(1_000_000))
    words = ["x.npz", "digits"] if place.random.random() < 0.6 else [str(place.good / "samples/images.npz"), "x.npz"]
    return Case(f"npz: {what}", ["eval", *words, "--metrics", "fd,class_accuracy" if "label" in what else "fd"])
