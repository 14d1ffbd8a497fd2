"""What a name or path of the command line opens, and images converted to a size and a number of channels."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dit_moe.data.images import crop
from dit_moe.evaluation.sources import EvaluationInput, ReadOptions, open_input
from dit_moe.evaluation.sources.dataset import DatasetSource, LatentSource
from dit_moe.evaluation.sources.folder import FolderSource
from dit_moe.evaluation.sources.npz import NpzSource
from dit_moe.files import write_atomically
from dit_moe.sampling.outputs import OUTPUTS, open_outputs
from tests.autoencoders.encoded import encode
from tests.data.examples import class_files, write_tree
from tests.npz_files import write_images

COLOUR = np.random.default_rng(0).integers(0, 256, (3, 12, 16, 3), dtype=np.uint8)
GREY = COLOUR[..., :1]


@pytest.fixture
def npz(tmp_path):
    """A folder of c.npz, in colour, and g.npz, grey."""
    write_images(tmp_path / "c.npz", COLOUR)
    write_images(tmp_path / "g.npz", GREY)
    return tmp_path


def images(opened):
    """[N, H, W, C]."""
    source = opened.source
    return next(source.batches([range(len(source))])).permute(0, 2, 3, 1).numpy()


def test_files_of_images_and_of_statistics_and_folders_of_images_and_of_latents_are_opened(tmp_path):
    write_images(tmp_path / "images.npz", COLOUR)
    write_tree(tmp_path, class_files(1))  # beside it
    shutil.copy(tmp_path / "images.npz", tmp_path / "images.zip")
    for given in (tmp_path, tmp_path / "images.zip"):
        opened = open_input(str(given))
        assert isinstance(opened.source, NpzSource) and np.array_equal(images(opened), COLOUR)
    np.savez(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    statistics = open_input(str(tmp_path / "s.npz"), ReadOptions(size=8, channels=3))
    assert statistics.source is None and statistics.heldout is None and statistics.statistics.moments.n is None
    other_config = {"config.yaml": b"a: b"}  # of another program than ours
    folder = open_input(str(write_tree(tmp_path / "images", class_files(2) | other_config)))
    assert isinstance(folder.source, FolderSource) and len(folder.source) == 4 and folder.heldout is None
    encode(tmp_path / "latents")
    latents = open_input(str(tmp_path / "latents"), ReadOptions(channels=3))
    assert isinstance(latents.source.source, LatentSource) and latents.source.image_shape == (3, 16, 16)


@pytest.mark.parametrize(
    "given, split, size, count",
    [("digits/heldout", "heldout", 8, 450), ("{name: digits, size: 16}", "train", 16, 898)],
)
def test_a_dataset_is_opened_with_a_split_and_options(given, split, size, count):
    opened = open_input(given)
    if opened.heldout:
        assert open_input(given, ReadOptions(channels=3)).heldout.image_shape == (3, size, size)  # converted, too
    assert isinstance(opened.source, DatasetSource) and opened.source.name == f"digits/{split}"
    assert (len(opened.source), opened.source.image_shape) == (count, (1, size, size))
    assert (opened.heldout is not None) == (split == "train")


def test_a_dataset_with_a_path_is_opened_and_a_file_goes_before_a_dataset(tmp_path, monkeypatch):
    tree = write_tree(tmp_path / "digits", class_files(2))
    source = open_input(f"{{name: image_folder, path: {tree}, heldout: {tree}, split: heldout, size: 8}}").source
    assert source.name == str(tree) and source.image_shape == (3, 8, 8)
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_input("digits").source, FolderSource)
    assert isinstance(open_input("{name: digits}").source, DatasetSource)


@pytest.mark.parametrize(
    "given, message",
    [
        ("digit", "digit does not exist, and is no dataset; name an npz file, .*did you mean 'digits'\\? datasets are"),
        ("digits/test", "the digits have no split 'test'; .*known: train, heldout"),
        ("image_folder", r"image_folder: path is missing; .*'\{name: image_folder, path: …"),
        ("{name: image_folder, path: /nowhere}", r"path=/nowhere does not exist"),
        ("{name: digits, sise: 8}", "sise is not a known key; did you mean 'size'"),
        ("{name: digit}", "no dataset 'digit'; did you mean 'digits'"),
        ("{path: here}", "has no name; wanted"),
        ("{name: [", "is not valid YAML"),
        ("{name: image_folder, path: '${oc.env:HOME}', size: 8}", r"path=\$\{oc\.env:HOME\} does not exist"),
    ],
)
def test_an_unknown_name_is_refused_with_what_was_probably_meant(given, message):
    with pytest.raises(ValueError, match=message):
        open_input(given)


def test_runs_folders_around_them_and_other_files_are_refused_with_what_to_name_instead(tmp_path):
    def refused(path, message):
        with pytest.raises(ValueError, match=message):
            open_input(str(path))

    run = tmp_path / "run"
    step = run / "checkpoints" / "step_00000010"
    step.mkdir(parents=True)
    refused(run, r"run is a run, which can only be SAMPLES; put it first$")
    refused(run / "checkpoints", r"run/checkpoints holds the checkpoints of a run; name the run, .*run, as")
    write_tree(run, {"samples/step_00000010.png": b""})
    refused(run / "samples", r"run/samples holds the grids of samples of a run; name the run, .*run, as")
    write_tree(run, {"png/000000.png": b""})
    refused(run, r"put it first, or name its images, .*run/png$")
    write_images(run / "images.npz", COLOUR)
    refused(run, r"put it first, or name its images, .*run/images.npz")
    (step / "state.json").write_text("{}")
    refused(step, "step_00000010 is a run")
    begun = write_tree(tmp_path / "begun", {"config.yaml": b"model: dit\nobjective: flow\n"})
    refused(begun, "begun is a run without a checkpoint; train it")
    features = {f"{name}/features.json": b"{}" for name in ("heldout", "reference", "samples_0")}
    above = write_tree(tmp_path / "features", features)
    refused(above, r"holds folders of features; name one of them, for instance .*samples_0")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "pipe is a pipe, socket or device; name a file")
    write_tree(tmp_path, {"a.png": b"pixels", "empty/.hidden": b""})
    refused(tmp_path / "a.png", r"a.png is no npz; name an npz file, a run, a folder of images")
    refused(tmp_path / "empty", "empty has no images")


def test_what_sampling_leaves_in_or_below_a_run_is_opened_as_images_wherever_it_lies_and_a_grid_is_none(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000010").mkdir(parents=True)
    labels_N, images_NCHW = torch.arange(3), torch.from_numpy(COLOUR).permute(0, 3, 1, 2)
    for out, kinds in ((run, ["png", "grid"]), (run / "x", ["png", "grid"]), (run / "g", ["grid"])):
        out.mkdir(exist_ok=True)
        with open_outputs(out, kinds, labels_N) as write:
            write(images_NCHW)
        write_atomically(out / "sample.json", json.dumps({"files": [OUTPUTS[kind][0] for kind in kinds], "step": 9}))
    shutil.copytree(run / "png", tmp_path / "flat")
    shutil.copy(run / "grid.png", tmp_path / "flat")
    write_atomically(tmp_path / "flat" / "sample.json", json.dumps({"files": ["grid.png"]}))
    flat = open_input(str(tmp_path / "flat")).source
    assert len(flat) == 3 and flat.passed_over == {"grids of samples": {"count": 1, "first": "grid.png"}}
    (tmp_path / "link").symlink_to(run / "png")
    for place in (run / "png", run / "x", run / "x" / "png", tmp_path / "link"):
        source = open_input(str(place)).source
        assert np.array_equal(images(EvaluationInput(source)), COLOUR) and source.labels_N.tolist() == [0, 1, 2]
        assert source.facts()["sample"] == {"step": 9}
    with pytest.raises(ValueError, match=r"run/g holds a grid of samples, grid.png, and not the samples themselves"):
        open_input(str(run / "g"))


# --------------------------------------------------------------------------------------------------- size and channels


def test_every_colour_of_a_lattice_becomes_the_grey_that_pillow_makes_of_it_and_grey_is_repeated(npz):
    levels = np.array([*range(0, 256, 15), 1, 254], np.uint8)
    lattice = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, len(levels), -1, 3)
    write_images(npz / "lattice.npz", lattice)
    grey = open_input(str(npz / "lattice.npz"), ReadOptions(channels=1))
    assert grey.source.image_shape == (1, *lattice.shape[1:3])
    assert np.array_equal(images(grey)[0, ..., 0], np.asarray(Image.fromarray(lattice[0]).convert("L")))
    colour = open_input(str(npz / "g.npz"), ReadOptions(channels=3))
    assert colour.source.image_shape == (3, 12, 16) and np.array_equal(images(colour), GREY.repeat(3, -1))


@pytest.mark.parametrize("name, pixels", [("c.npz", COLOUR), ("g.npz", GREY)])
def test_another_size_is_adms_crop(npz, name, pixels):
    opened = open_input(str(npz / name), ReadOptions(size=6))
    wanted = np.stack([crop(Image.fromarray(image.squeeze()), 6).reshape(6, 6, -1) for image in pixels])
    assert opened.source.image_shape == (pixels.shape[-1], 6, 6) and np.array_equal(images(opened), wanted)
    parts = torch.cat(list(opened.source.batches([[2], [], [0, 1]])))
    assert np.array_equal(parts.permute(0, 2, 3, 1).numpy(), wanted[[2, 0, 1]])


def test_images_that_are_as_wanted_are_not_converted_and_converted_ones_have_another_identity(tmp_path):
    write_images(tmp_path / "a.npz", COLOUR[:, :, :12], np.arange(3))
    plain, same, *changed = (
        open_input(str(tmp_path / "a.npz"), ReadOptions(**options)).source
        for options in ({}, {"size": 12, "channels": 3}, {"channels": 1}, {"size": 6}, {"size": 6, "channels": 1})
    )
    assert isinstance(same, NpzSource) and same.identity() == plain.identity()
    identities = [plain.identity(), *(source.identity() for source in changed)]
    assert all(identities.count(identity) == 1 for identity in identities)
    assert all(source.labels_N.tolist() == [0, 1, 2] and len(source) == 3 for source in changed)
    assert all(source.label_remedy == plain.label_remedy for source in changed)
    assert all(source.facts().items() > plain.facts().items() and source.take_counts() == {} for source in changed)
    stored = [source.facts()["stored"] for source in changed]
    assert stored == [{"converted": "3 to 1 channels"}, {"resized_from": "12×12"}, stored[0] | stored[1]]
