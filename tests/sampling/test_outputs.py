"""What sampling leaves in its folder: what was asked for, whole, of one run, in constant memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_moe.sampling.outputs import OUTPUTS, open_outputs, parse_outputs, require_writable_outputs
from tests.folders import contents

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "streaming.py"
IMAGES = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 4


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def save(out: Path, kinds, images=IMAGES, labels=LABELS):
    with open_outputs(out, kinds, labels) as take:
        for part in images.split(5):
            take(part)


@pytest.mark.parametrize("kinds", [["npz"], ["png"], ["grid"], ["npz", "png", "grid"]], ids=",".join)
def test_what_is_asked_for_is_written_alone_and_takes_the_description_of_older_images_away(tmp_path, kinds):
    (tmp_path / "sample.json").write_text("{}")
    save(tmp_path, kinds)
    assert names(tmp_path) == {"sample.json", *(OUTPUTS[kind][0] for kind in kinds)}
    assert json.loads((tmp_path / "sample.json").read_text()) == {"files": []}


def test_all_kinds_show_the_same_images(tmp_path):
    save(tmp_path, ["npz", "png", "grid"])
    arrays = np.load(tmp_path / "images.npz")
    assert np.array_equal(arrays["arr_0"], IMAGES.permute(0, 2, 3, 1)) and np.array_equal(arrays["labels"], LABELS)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "png" / "000007.png")), IMAGES[7, 0])
    corner = np.asarray(Image.open(tmp_path / "grid.png"))[2 + 66, -2 * 66]  # second class, second image of three
    assert corner == IMAGES[5, 0, 0, 0]


def test_an_error_leaves_every_file_of_the_run_before_and_what_describes_them(tmp_path):
    save(tmp_path, ["npz", "png", "grid"])
    (tmp_path / "sample.json").write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="dtype"):
        save(tmp_path, ["npz", "png", "grid"], images=torch.cat([IMAGES[:5].float(), IMAGES[5:].float()]))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("facts", [None, '{"files": "of something else', '{"steps": 3}'])
def test_no_images_of_other_origin_are_replaced(tmp_path, facts):
    (tmp_path / "images.npz").write_bytes(b"of a paper")
    if facts is not None:
        (tmp_path / "sample.json").write_text(facts)
    with pytest.raises(ValueError, match=r"is there already, and nothing says that dit-moe wrote it; move it away, or"):
        require_writable_outputs(tmp_path, ["npz"])
    save(tmp_path, ["npz"])
    require_writable_outputs(tmp_path, ["npz", "grid"])


def test_kinds_are_read_in_any_order_and_unknown_ones_refused():
    assert parse_outputs("grid,npz,grid") == ("grid", "npz")
    for text in ("jpg", "npz,", ""):
        with pytest.raises(ValueError, match=r"--save=.* is no kind of output; choose from npz, png, grid"):
            parse_outputs(text)


def test_a_png_folder_with_other_files_is_refused_before_anything_is_sampled(tmp_path):
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / "holiday.png").write_bytes(b"")
    require_writable_outputs(tmp_path, ["npz"])
    with pytest.raises(ValueError, match=r"holiday.png, which would be lost"):
        require_writable_outputs(tmp_path, ["png"])


def test_writing_takes_the_memory_of_a_batch_and_not_of_the_set():
    done = subprocess.run([sys.executable, BENCHMARK, "--images", "2000"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["shape"] == [2000, 256, 256, 3] and found["bytes"] > 375 * 2**20
    assert found["peak_mib"] - found["before_mib"] < 250  # 120 of 50 000 images; batches of 100 are 19, in some copies
