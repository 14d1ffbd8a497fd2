"""Grids and folders of samples."""

import json

import pytest
import torch
from PIL import Image

from dit_moe.pictures import class_captions, foreign_pictures, grid_layout, image_grid, png_folder, save_grid

IMAGES = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 4


def saved(folder, images=IMAGES, labels=LABELS, size=5, class_names=None):
    with png_folder(folder, labels, class_names) as add:
        for part in images.split(size):
            add(part)


def test_a_grid_has_a_row_for_each_class_and_shows_images_as_they_come_if_there_are_more_classes():
    assert grid_layout(torch.arange(64)) == (list(range(64)), 10)
    assert grid_layout(torch.tensor([7])) == ([0], 1)
    assert len(grid_layout(torch.arange(1000))[0]) == 160
    assert grid_layout(torch.tensor([1, 0, 1, 0])) == ([1, 3, 0, 2], 2)
    shown, columns = grid_layout(torch.arange(50_000) % 1000)
    assert columns == 10 and len(shown) == 160 and shown[:3] == [0, 1000, 2000] and shown[10] == 1


def test_a_grid_shows_all_of_up_to_a_hundred_images_in_rows_of_ten():
    assert grid_layout(torch.tensor([1, 0, 1, 0, 1])) == ([1, 3, 0, 2, 4], 5)
    assert grid_layout(torch.full((16,), 3)) == (list(range(16)), 10)
    assert grid_layout(torch.full((450,), 3)) == (list(range(100)), 10)
    assert grid_layout(torch.arange(100) % 10)[1] == 10 and len(grid_layout(torch.arange(450) % 10)[0]) == 100


def test_a_saved_grid_has_its_images_in_place_and_the_name_of_a_class_left_of_its_row(tmp_path):
    names = ["cat", "dog", "ship", "n" * 99]  # too long, and cut
    save_grid(IMAGES[grid_layout(LABELS)[0]], LABELS, tmp_path / "grid.png", names)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.height == 4 * 66 + 2 and 3 * 66 + 2 + 60 < grid.width < 3 * 66 + 2 + 180
    images = grid.crop((grid.width - 3 * 66 - 2, 0, *grid.size))
    assert images.getpixel((2, 2)) == tuple(IMAGES[0, :, 0, 0].tolist())
    assert images.getpixel((2 + 66, 2 + 66)) == tuple(IMAGES[5, :, 0, 0].tolist())  # class 1, its second image
    named = [grid.crop((0, row * 66, grid.width - 3 * 66 - 2, (row + 1) * 66)) for row in range(4)]
    assert all(part.convert("L").getextrema()[0] < 64 for part in named)
    assert image_grid(IMAGES, 3).size == (3 * 66 + 2, 4 * 66 + 2)


def test_a_grid_with_several_classes_in_a_row_names_each_image_beneath_it():
    labels = torch.tensor([2, 0, 1])
    captions = class_captions(labels, 3, ["cat", "dog", "a long name of a ship"])
    assert captions == ["a long name of a ship", "cat", "dog"]
    assert class_captions(LABELS.sort().values, 3, "abcd") == list("abcd")
    grid = image_grid(IMAGES[:3], 3, captions)
    assert 3 * 140 < grid.width < 3 * 180 and 66 + 15 < grid.height < 66 + 30
    assert grid.crop((0, 66, *grid.size)).convert("L").getextrema()[0] < 64


def test_every_image_becomes_a_file_that_holds_its_pixels_and_has_its_label(tmp_path):
    saved(tmp_path / "png")
    labels = json.loads((tmp_path / "png" / "labels.json").read_text())
    files = sorted((tmp_path / "png").glob("*.png"))
    assert [file.name for file in files] == list(labels) == [f"{i:06d}.png" for i in range(12)]
    for file, image, label in zip(files, IMAGES, LABELS.tolist(), strict=True):
        found = torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8).view(8, 8, 3)
        assert torch.equal(found.permute(2, 0, 1), image) and labels[file.name] == label
    assert [path.name for path in tmp_path.iterdir()] == ["png"]
    saved(tmp_path / "grey", IMAGES[:, :1])
    assert Image.open(tmp_path / "grey" / "000003.png").mode == "L"


def test_a_shorter_set_replaces_a_longer_one_and_nothing_else(tmp_path):
    saved(tmp_path / "png")
    for name in ("png.partial", "png.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "000099.png").write_bytes(b"a user's")
    saved(tmp_path / "png", IMAGES[:3], LABELS[:3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["png", "png.old", "png.partial"]
    assert all((tmp_path / name / "000099.png").read_bytes() == b"a user's" for name in ("png.partial", "png.old"))
    names = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert names == ["000000.png", "000001.png", "000002.png", "labels.json"]


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
