"""What was counted is kept: everything as arrays, and what is small as JSON that anyone can read."""

import json

import numpy as np
import pytest

from dit_moe.analysis.collect_images import collect_images
from dit_moe.analysis.saved import write_stats
from tests.analysis.runs import Chosen, image_run


@pytest.fixture(scope="module")
def stats():
    return collect_images(image_run(), Chosen(list(range(12))), times=3)


def saved(stats, folder, pictures=()):
    write_stats(stats, folder, pictures)
    return json.loads((folder / "routing.json").read_text()), np.load(folder / "routing.npz")


def test_all_arrays_come_back_as_they_were(stats, tmp_path):
    _, arrays = saved(stats, tmp_path)
    assert np.array_equal(arrays["load_LTE"], stats.load_LTE)
    assert np.array_equal(arrays["examples.noisy_MTHWC"], stats.examples.noisy_MTHWC)
    assert "position_S" not in arrays  # there is none


def test_the_json_has_facts_names_and_small_arrays_and_says_what_it_leaves_out(stats, tmp_path):
    body, arrays = saved(stats, tmp_path)
    assert body["facts"] == stats.facts and body["layers_L"] == [0, 1, 2] and body["training"] is None
    assert body["active"] == pytest.approx(stats.active, rel=1e-5)
    np.testing.assert_allclose(body["load_LCE"], stats.load_LCE, rtol=1e-5)
    np.testing.assert_array_equal(body["examples"]["active_MTLS"], stats.examples.active_MTLS)
    assert body["only in routing.npz"] == ["examples.images_MHWC", "examples.noisy_MTHWC"]
    assert set(body["only in routing.npz"]) <= set(arrays)


def test_an_array_that_is_large_stays_out_of_the_json(stats, tmp_path, monkeypatch):
    monkeypatch.setattr("dit_moe.analysis.saved.SMALL", stats.load_LCE.size - 1)
    body, _ = saved(stats, tmp_path)
    assert "load_LCE" not in body and "load_LCE" in body["only in routing.npz"] and "load_LE" in body


def test_pictures_of_an_earlier_report_go_and_nobody_elses(stats, tmp_path):
    for name in ("load.png", "maps.png", "mine.png"):
        (tmp_path / name).touch()
    body, _ = saved(stats, tmp_path, ["load.png", "maps.png"])
    assert body["pictures"] == ["load.png", "maps.png"]
    saved(stats, tmp_path, ["load.png"])
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["load.png", "mine.png"]


@pytest.mark.parametrize("text", ["{", "[]", '{"pictures": 3}', '{"pictures": ["../mine.png", 3]}'])
def test_a_list_that_is_damaged_deletes_nothing(stats, tmp_path, text):
    (tmp_path / "mine.png").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "routing.json").write_text(text)
    saved(stats, tmp_path / "out")
    assert (tmp_path / "mine.png").exists()


def test_a_network_of_one_expert_is_kept(tmp_path):
    run = image_run(name="DiT-custom/2-1E1A")
    body, _ = saved(collect_images(run, Chosen(list(range(12))), times=3), tmp_path)
    assert body["balance_L"] == [1, 1, 1]
