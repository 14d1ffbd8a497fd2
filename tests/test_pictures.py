"""Grids and folders of samples, and curves."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dit_moe import files
from dit_moe.pictures import (
    _means,
    draw_training,
    foreign_pictures,
    grid_layout,
    png_folder,
    read_log,
    router_curves,
    save_curves,
    save_grid,
)

IMAGES = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 4


def saved(folder, images=IMAGES, labels=LABELS, size=5):
    with png_folder(folder, labels) as add:
        for part in images.split(size):
            add(part)


def test_a_grid_has_a_row_for_each_class():
    assert grid_layout(torch.tensor([1, 0, 1, 0, 1])) == ([1, 3, 0, 2], 2)
    shown, columns = grid_layout(torch.arange(50_000) % 1000)
    assert columns == 10 and len(shown) == 160 and shown[:3] == [0, 1000, 2000] and shown[10] == 1


def test_a_grid_of_more_classes_than_images_shows_the_images_as_they_come():
    assert grid_layout(torch.arange(64)) == (list(range(64)), 10)
    assert grid_layout(torch.tensor([7])) == ([0], 1)
    assert len(grid_layout(torch.arange(1000))[0]) == 160


def test_a_saved_grid_has_its_images_in_place(tmp_path):
    save_grid(IMAGES, LABELS, tmp_path / "grid.png")
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (3 * 66 + 2, 4 * 66 + 2)
    assert grid.getpixel((2, 2)) == tuple(IMAGES[0, :, 0, 0].tolist())
    assert grid.getpixel((2 + 66, 2 + 66)) == tuple(IMAGES[5, :, 0, 0].tolist())  # class 1, its second image


def test_every_image_becomes_a_file_that_holds_its_pixels_and_has_its_label(tmp_path):
    saved(tmp_path / "png")
    labels = json.loads((tmp_path / "png" / "labels.json").read_text())
    files = sorted((tmp_path / "png").glob("*.png"))
    assert [file.name for file in files] == list(labels) == [f"{i:06d}.png" for i in range(12)]
    for file, image, label in zip(files, IMAGES, LABELS.tolist(), strict=True):
        found = torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8).view(8, 8, 3)
        assert torch.equal(found.permute(2, 0, 1), image) and labels[file.name] == label
    assert [path.name for path in tmp_path.iterdir()] == ["png"]


def test_grey_images_are_saved_as_such(tmp_path):
    saved(tmp_path / "png", IMAGES[:, :1])
    assert Image.open(tmp_path / "png" / "000003.png").mode == "L"


def test_a_shorter_set_replaces_a_longer_one_and_nothing_else(tmp_path):
    saved(tmp_path / "png")
    for name in ("png.partial", "png.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "000099.png").write_bytes(b"a user's")
    saved(tmp_path / "png", IMAGES[:3], LABELS[:3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["png", "png.old", "png.partial"]
    assert all((tmp_path / name / "000099.png").read_bytes() == b"a user's" for name in ("png.partial", "png.old"))
    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == [
        "000000.png",
        "000001.png",
        "000002.png",
        "labels.json",
    ]


@pytest.mark.parametrize("failing", [(Image.Image, "save"), (files, "sync")], ids=["save", "sync"])
def test_a_set_that_is_not_finished_leaves_the_old_one(tmp_path, monkeypatch, failing):
    saved(tmp_path / "png")
    before = {path.name: path.read_bytes() for path in (tmp_path / "png").iterdir()}

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(*failing, full)
    with pytest.raises(OSError, match="no space"):
        saved(tmp_path / "png", IMAGES[:3], LABELS[:3])
    assert {path.name: path.read_bytes() for path in (tmp_path / "png").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["png"]


def test_a_set_with_images_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"png: 5 of 12 images"), png_folder(tmp_path / "png", LABELS) as add:
        add(IMAGES[:5])
    assert not any(tmp_path.iterdir())


def test_a_folder_with_files_of_other_origin_is_never_replaced(tmp_path):
    saved(tmp_path / "png")
    assert foreign_pictures(tmp_path / "png") == []
    (tmp_path / "png" / "cat.png").write_bytes(b"")
    (tmp_path / "png" / "000012.png").write_bytes(b"")  # named as ours, but labels.json does not list it
    with pytest.raises(ValueError, match=r"png is there already and holds 000012.png and 1 more, which would be lost"):
        saved(tmp_path / "png")
    (tmp_path / "png" / "labels.json").unlink()
    assert len(foreign_pictures(tmp_path / "png")) == 14


# ------------------------------------------------------------------------------------------------------------ curves


def log_line(step, **layers):
    layers = {"active": [1.0 + step, 3.0 + step], **layers}
    return {"step": step, "loss": 1 / step, "active": 2.0 + step, "layers": layers}


def test_a_log_is_read_line_by_line_and_a_damaged_one_is_named(tmp_path):
    assert read_log(tmp_path / "gone.jsonl") == []
    (tmp_path / "damaged.jsonl").write_bytes(b'{"step": 5}\n\xff\x00\n{"step": 15}\n')
    with pytest.raises(ValueError, match=r"damaged.jsonl: line 2 is damaged and cannot be read; take it out, or let"):
        read_log(tmp_path / "damaged.jsonl")


def test_curves_of_routers_are_the_log_up_to_a_step():
    log = [log_line(step, p=[0.1 * step, 0.2], theta=[1.0, 1.1]) for step in (1, 2, 3, 4)]
    found = router_curves(log, 3)
    assert found.step_U.tolist() == [1, 2, 3] and found.active_U.tolist() == [3, 4, 5]
    assert found.active_LU.tolist() == [[2, 3, 4], [4, 5, 6]]
    assert found.p_LU[0] == pytest.approx([0.1, 0.2, 0.3]) and found.theta_LU.shape == (2, 3)
    assert len(router_curves(log).step_U) == 4
    bare = router_curves([log_line(1)])
    assert bare.p_LU is None and bare.theta_LU is None
    assert router_curves([]) is router_curves(log, 0) is router_curves([{"step": 1, "loss": 2.0}]) is None


def test_long_curves_become_means_of_windows_and_short_ones_are_left_alone():
    curve = np.random.default_rng(2).standard_normal((3, 960))
    (short,) = _means([curve], most=240)
    assert short.shape == (3, 240) and short.mean(1) == pytest.approx(curve.mean(1))
    assert (_means([curve[:, :100]], most=240)[0] == curve[:, :100]).all()
    assert _means([np.arange(5.0)], most=3)[0].tolist() == [0.5, 2.5, 4.0]  # the last may be of fewer


def test_there_is_a_panel_for_the_loss_each_number_of_the_routers_and_each_distance_with_a_floor(tmp_path):
    log = [log_line(step, p=[0.5, 0.5], theta=[1.0, 1.1]) for step in range(1, 9)]
    lines = [{"step": s, "fd_n100": 100 / s, "fd_n100_floor": 2.0, "active": 2.0, "heldout_loss": 1.0} for s in (4, 8)]
    figure = draw_training(router_curves(log), [0, 1], (2.0, "target 2"), log, lines)
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "Loss",
        "Active experts per token",
        "Threshold p",
        "Scale of the logits θ",
        "fd_n100",
    ]
    labels = [axis.get_legend_handles_labels()[1] for axis in figure.axes]
    assert labels == [
        ["logged", "mean of 1", "held out"],
        ["layer 0", "layer 1", "mean of layers", "target 2"],
        ["all layers"],
        ["layer 0", "layer 1"],
        ["fd_n100", "floor"],
    ]
    dense = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    heights = []
    for evaluations in ([], lines, [line | {"fd_n100": None} for line in lines]):
        save_curves(dense, None, tmp_path / "curves.png", evaluations)
        heights.append(Image.open(tmp_path / "curves.png").size[1])
    assert heights[0] < heights[1] == heights[2]
