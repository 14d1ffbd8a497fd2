"""Reading npz files: images where they lie, labels, statistics, and every way in which a file can be wrong."""

import json
import tracemalloc
import zipfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_moe.data.npz import image_writer, require_shape
from dit_moe.evaluation.sources import ReadOptions, npz
from dit_moe.evaluation.sources.npz import open_npz
from tests.npz_files import write_images

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), dtype=np.uint8)
LABELS = np.array([3, 1, 4, 1, 5, 9])


def read(source, parts=None):
    """[N, H, W, C] of all images, or of those in `parts`."""
    return torch.cat(list(source.batches(parts or [range(len(source))]))).permute(0, 2, 3, 1).numpy()


def is_mapped(path):
    """Whether this process has the file in its address space; only Linux tells."""
    maps = Path("/proc/self/maps")
    return maps.exists() and str(path) in maps.read_text()


@pytest.mark.parametrize("save", [write_images, np.savez, np.savez_compressed])
@pytest.mark.parametrize("layout", ["C", "F"])
def test_images_are_the_same_in_any_parts_and_order(tmp_path, save, layout):
    save(tmp_path / "images.npz", np.asarray(IMAGES, order=layout), LABELS)  # as `labels`, or else as arr_1
    source = open_npz(tmp_path / "images.npz").source
    assert isinstance(source.images, np.ndarray) == (save is np.savez_compressed or (save, layout) == (np.savez, "F"))
    assert np.array_equal(read(source, [[5], [0, 3], [], [1, 1, 4]]), IMAGES[[5, 0, 3, 1, 1, 4]])
    batch = next(source.batches([[2, 0]]))
    assert batch.dtype == torch.uint8 and batch.shape == (2, 3, 8, 10) and batch.is_contiguous()
    batch.zero_()  # is the caller's
    assert np.array_equal(read(source), IMAGES) and (len(source), source.image_shape) == (6, (3, 8, 10))
    assert source.labels_N.tolist() == LABELS.tolist() and source.labels_N.dtype == torch.int64


def test_a_large_file_takes_no_memory(tmp_path):
    """40 MB, which a process would notice: at its peak it holds a batch of 2, and no map when it is done."""
    path, images = tmp_path / "images.npz", np.zeros((1000, 128, 104, 3), np.uint8)
    images[::100] = np.arange(10, dtype=np.uint8)[:, None, None, None]
    write_images(path, images)
    tracemalloc.start()
    source = open_npz(path).source
    for i, batch in enumerate(source.batches([[100 * i, 100 * i + 1] for i in range(10)])):
        assert batch.flatten(1).amax(1).tolist() == [i, 0]
    source.identity()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 39e6 and peak < 3e6  # a megabyte of the hash, a batch twice
    assert not is_mapped(path)


def test_an_opened_file_stays_the_same_when_it_is_replaced(tmp_path):
    write_images(tmp_path / "images.npz", IMAGES)
    source = open_npz(tmp_path / "images.npz").source
    write_images(tmp_path / "images.npz", 255 - IMAGES)
    assert np.array_equal(read(source), IMAGES)


def test_identity_is_of_the_images_and_labels_however_they_are_kept(tmp_path):
    write_images(tmp_path / "a.npz", IMAGES, LABELS)
    np.savez_compressed(tmp_path / "b.npz", labels=LABELS.astype(np.uint16), arr_0=np.asfortranarray(IMAGES))
    write_images(tmp_path / "labels.npz", IMAGES, LABELS + 1)
    write_images(tmp_path / "images.npz", 255 - IMAGES, LABELS)
    write_images(tmp_path / "shape.npz", IMAGES.reshape(6, 10, 8, 3), LABELS)
    a, b, *others = (
        open_npz(tmp_path / f"{name}.npz").source.identity() for name in ("a", "b", "labels", "images", "shape")
    )
    assert a == b == json.loads(json.dumps(a)) and a["kind"] == "images" and str(tmp_path) not in json.dumps(a)
    assert all(other != a for other in others)


def test_facts_have_the_record_of_the_sampling_that_made_the_file_and_no_other(tmp_path):
    write_images(tmp_path / "images.npz", IMAGES)
    write_images(tmp_path / "other.npz", IMAGES)
    measured = {"seconds": 3.2, "device": "cpu", "processes": 2, "versions": {"torch": "2"}}
    (tmp_path / "sample.json").write_text(json.dumps({"step": 7, "files": ["images.npz", "grid.png"], **measured}))
    facts, others = (open_npz(tmp_path / name).source.facts() for name in ("images.npz", "other.npz"))
    assert facts["path"] == str(tmp_path / "images.npz") and facts["sample"] == {"step": 7}
    assert "sample" not in others


def test_a_description_of_the_samples_that_cannot_be_read_is_said(tmp_path, capsys):
    write_images(tmp_path / "images.npz", IMAGES)
    (tmp_path / "sample.json").write_text("<!DOCTYPE html>")
    assert "sample" not in open_npz(tmp_path / "images.npz").source.facts()
    assert "sample.json has no readable description: how the images were" in capsys.readouterr().err


def test_adms_reference_batch_gives_its_images_and_its_statistics(tmp_path):
    mu, sigma = np.arange(4.0), np.diag([1.0, 2, 3, 4])
    numbers = {"mu": mu, "sigma": sigma, "mu_s": mu[:3], "sigma_s": sigma[:3, :3]}
    np.savez(tmp_path / "reference.npz", arr_0=IMAGES, **numbers)
    opened = open_npz(tmp_path / "reference.npz")
    assert np.array_equal(read(opened.source), IMAGES) and opened.source.labels_N is None
    assert np.array_equal(opened.statistics.moments.mean_D, mu)
    assert np.array_equal(opened.statistics.spatial_moments.covariance(), sigma[:3, :3])
    assert opened.statistics.moments.n is None and opened.statistics.extractor is None
    np.savez(tmp_path / "statistics.npz", **numbers)
    alone = open_npz(tmp_path / "statistics.npz")
    assert alone.source is None and alone.statistics.sha256 == opened.statistics.sha256


# -------------------------------------------------------------------------------------------------------- float images


@pytest.mark.parametrize("dtype, low, high", [(np.float16, -1, 1), (np.float32, 0, 1), (np.float64, 0, 255)])
def test_floats_become_the_nearest_level_of_their_range_halves_the_upper_one(tmp_path, dtype, low, high):
    floats = (IMAGES / 255 * (high - low) + low).astype(dtype)
    np.savez(tmp_path / "images.npz", floats)
    source = open_npz(tmp_path / "images.npz", ReadOptions(value_range=(low, high))).source
    assert np.array_equal(read(source, [[], range(6)]), IMAGES) and source.identity()["range"] == [low, high]
    levels = np.array([-0.5, 0.499, 0.5, 1.5, 254.5, 255.499], np.float64).reshape(1, 2, 3, 1)
    np.savez(tmp_path / "halves.npz", levels)
    halves = open_npz(tmp_path / "halves.npz", ReadOptions(value_range=(0, 255))).source
    assert read(halves).flatten().tolist() == [0, 0, 1, 2, 255, 255]


@pytest.mark.parametrize("value, main", [(-1.004, True), (1.004, True), (1.004, False)])
def test_floats_out_of_range_are_refused_by_the_main_process_which_alone_reads_them_once(
    tmp_path, monkeypatch, value, main
):
    floats, scans, calls = np.zeros((3, 4, 4, 3), np.float32), [], []
    floats[2, 1, 1, 1] = value
    np.savez(tmp_path / "images.npz", floats)
    memmap = np.memmap
    monkeypatch.setattr(np, "memmap", lambda *args: scans.append(args) or memmap(*args))
    monkeypatch.setattr(npz, "on_main", lambda call: calls.append(call) or (call() if main else None))
    message = r"images.npz: image 2 has values from .*1.004.*outside of --range=-1,1"
    with pytest.raises(ValueError, match=message) if main else nullcontext():
        open_npz(tmp_path / "images.npz", ReadOptions(value_range=(-1, 1)))
    assert (len(calls), len(scans)) == (1, int(main))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_named_before_dtype_and_range(tmp_path, monkeypatch, value):
    monkeypatch.setattr(npz, "BLOCK", 2 * 4 * 4 * 3 * 4)  # two images
    for image, range_ in [(0, None), (1, None), (2, None), (1, (-1, 1))]:
        floats = np.full((3, 4, 4, 3), 99, np.float32)
        floats[image, 0, 0, 0] = value
        np.savez(tmp_path / "images.npz", floats)
        with pytest.raises(ValueError, match=rf"images.npz: image {image} holds NaN or infinity"):
            open_npz(tmp_path / "images.npz", ReadOptions(value_range=range_))


# --------------------------------------------------------------------------------------------------------- wrong files

RAGGED = np.empty(2, dtype=object)
RAGGED[:] = [IMAGES[0], IMAGES[0, :4]]


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"arr_0": IMAGES / 255}, "dtype float64; save them as uint8 0..255, or .* for instance --range=-1,1"),
        ({"arr_0": IMAGES[:0] / 255}, "nothing in images of shape"),
        ({"arr_0": IMAGES > 7}, "dtype bool; save them as uint8"),
        ({"arr_0": RAGGED}, "not a readable npz of plain arrays: arr_0 holds Python objects"),
        ({"arr_0": IMAGES, "arr_1": LABELS / 2}, "labels are float64"),
        ({"arr_0": IMAGES, "labels": LABELS - 2}, "label -1 of image 1 is negative"),
        ({"images": IMAGES, "y": LABELS}, "no array arr_0 but images, y; save images as arr_0, or statistics as mu"),
        ({}, "has no array arr_0 but none"),
    ],
)
def test_an_npz_of_something_else_is_refused_naming_the_file_and_a_remedy(tmp_path, arrays, message):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(ValueError, match=rf"wrong.npz.*{message}"):
        open_npz(tmp_path / "wrong.npz")


@pytest.mark.parametrize(
    "name, members, message",
    [
        ("images.zip", [f"{i}.png" for i in range(50)], r"a zip of other files \(0.png and 49 more\); unpack it"),
        (
            "dit.pt",
            ["dit/data.pkl", "dit/data/0"],
            r"the weights of a network \(dit/data.pkl and 1 more\); name its images",
        ),
    ],
)
def test_a_zip_of_images_or_weights_is_told_from_an_npz(tmp_path, name, members, message):
    with zipfile.ZipFile(tmp_path / name, "w") as file:
        for member in members:
            file.writestr(member, b"")
    with pytest.raises(ValueError, match=rf"{name} is {message}"):
        open_npz(tmp_path / name)


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "sprung").touch, ()

    for name in ("arr_0", "labels", "mu"):
        np.savez(tmp_path / "trap.npz", **{"arr_0": IMAGES} | {name: np.array([Trap()], dtype=object)})
        with pytest.raises(ValueError, match="not a readable npz of plain arrays"):
            open_npz(tmp_path / "trap.npz")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_file_is_refused_at_the_latest_when_the_identity_is_asked_for(tmp_path, save):
    save(tmp_path / "images.npz", IMAGES)
    content = (tmp_path / "images.npz").read_bytes()
    for cut in (1, 500, -30):
        (tmp_path / "cut.npz").write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"cut.npz is not a readable npz.*copy it again"):
            open_npz(tmp_path / "cut.npz")
    with pytest.raises(ValueError, match=r"nothing.npz does not exist.*; name an npz file"):
        open_npz(tmp_path / "nothing.npz")
    (tmp_path / "flipped.npz").write_bytes(content[:400] + bytes([content[400] ^ 1]) + content[401:])
    with pytest.raises(ValueError, match=r"flipped.npz is not a readable npz"):
        open_npz(tmp_path / "flipped.npz").source.identity()
    with zipfile.ZipFile(tmp_path / "images.npz") as whole, zipfile.ZipFile(tmp_path / "short.npz", "w") as short:
        short.writestr("arr_0.npy", whole.read("arr_0.npy")[:-100])  # a whole zip
    with pytest.raises(ValueError, match=r"short.npz is not a readable npz.*1468 bytes where its header says 1568"):
        open_npz(tmp_path / "short.npz")


def npy(descr="|u1", shape="(6, 8, 10, 3)", content=None, length=None):
    """An npy file whose header need not be true."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    magic = b"\x93NUMPY\2\0" + (length or len(text)).to_bytes(4, "little")
    return magic + text + (IMAGES.tobytes() if content is None else content)


@pytest.mark.parametrize(
    "entry, problem",
    [
        (npy(shape=f"({10**13}, 8, 10, 3)"), r"arr_0 has \d+ bytes where its header says 24000000000000\d\d"),
        (npy(shape=f"({10**13},)", descr="|V0", content=b""), "images have dtype"),
        (npy(shape="(-6, -8, 10, 3)"), r"arr_0 holds numbers of shape \(-6, -8, 10, 3\)"),
        (npy(descr="|O"), "arr_0 holds Python objects"),
        (npy(length=2**30, content=b" " * 2**20), "the header of an array is damaged"),
        (npy(shape="(" * 3000), "the header of an array is damaged"),
        (npy(shape="f()"), "the header of an array is damaged"),
        (b"", "not a readable npz"),
        (b"\x93NUMPY\3\0" + npy()[8:], "npy version"),
    ],
    ids=["huge", "no bytes", "negative", "objects", "header", "nested", "code", "empty", "version"],
)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_what_a_header_claims_is_neither_believed_nor_allocated(tmp_path, entry, problem, method):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("arr_0.npy", entry)
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"a.npz.*{problem}") as error:
        open_npz(tmp_path / "a.npz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", "is empty; get it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a pointer of Git LFS .*; run git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "is a web page that was saved in place of the file; download the file itself"),
    ],
)
def test_what_stands_in_place_of_the_file_is_told(tmp_path, content, problem):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a.npz {problem}"):
        open_npz(tmp_path / "a.npz")


def test_images_of_more_pixels_than_training_takes_are_refused():
    with pytest.raises(ValueError, match=r"a.npz: images are 20000×20000 pixels, more than 200 million"):
        require_shape((1, 20_000, 20_000, 3), "a.npz")


def test_an_entry_that_unpacks_to_many_times_its_size_is_refused_before_it_does(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", np.zeros((100, 64, 64, 3), np.uint8))
    assert len(open_npz(tmp_path / "a.npz").source) == 100
    monkeypatch.setattr("dit_moe.data.npz.PLAUSIBLE", (2**20, 100))  # 256 times as little
    with pytest.raises(ValueError, match="arr_0 would unpack to 0"):
        open_npz(tmp_path / "a.npz")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_arrays_of_one_name_and_other_packings_than_numpys_are_refused(tmp_path):
    for names, method, problem in (
        (["arr_0.npy"] * 2, zipfile.ZIP_STORED, "there are two arrays arr_0"),
        (["arr_0.npy"], zipfile.ZIP_LZMA, "arr_0 is packed in another way than by np.savez_compressed"),
    ):
        with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
            for name in names:
                archive.writestr(name, npy())
        with pytest.raises(ValueError, match=f"a.npz is not a readable npz.*{problem}"):
            open_npz(tmp_path / "a.npz")


def test_entries_beyond_four_gigabytes_are_found_by_their_zip64_headers(tmp_path, monkeypatch):
    """Their local headers have an extra field, so that the images begin further back."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 500)
    with image_writer(tmp_path / "images.npz", 6, LABELS) as add:
        add(IMAGES)
    assert (tmp_path / "images.npz").read_bytes()[28] == 20  # bytes of that field
    assert np.array_equal(read(open_npz(tmp_path / "images.npz").source), IMAGES)
