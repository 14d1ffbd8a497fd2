"""Features on disk: the same whoever makes them and however often, and refused where they are of something else."""

import fcntl
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from dit_moe.config import WorkFailed
from dit_moe.evaluation.extraction import Extraction, thumbnails
from dit_moe.evaluation.features import FeatureFolder
from dit_moe.evaluation.sources.base import FEATURES_MANIFEST

from .fakes import NoiseSource, PixelExtractor


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_features_are_those_of_every_image_in_order_and_only_what_is_needed_is_read(tmp_path):
    source, extractor = NoiseSource(count=103), PixelExtractor()
    source.batch_size = 10
    found = Extraction(source, extractor, tmp_path).run()
    wanted = extractor(source.images)
    assert torch.equal(found.features.features_ND, wanted.features_BD)
    assert torch.equal(found.features.spatial_NS, wanted.spatial_BS)
    assert torch.equal(found.features.labels_N, source.labels_N)
    assert torch.equal(found.features.thumbnails_NP, source.images.flatten(1))
    assert found.features.count == 103 and sorted(source.asked) == list(range(103))
    needed = Extraction(source, extractor, tmp_path).run(needs=frozenset({"features_ND"})).features
    assert needed.spatial_NS is needed.thumbnails_NP is None and needed.labels_N is not None


def test_exchanged_shards_are_refused_and_those_of_older_versions_read(tmp_path):
    first, other = (Extraction(NoiseSource(seed=seed), PixelExtractor(), tmp_path / str(seed)) for seed in (0, 1))
    found = [each.run().features.features_ND for each in (first, other)]
    here, there = (first.folder.shard_path(shard) for shard in (0, 1))
    before = files(first.folder.path)
    for wrong in (there, other.folder.shard_path(0)):
        here.write_bytes(wrong.read_bytes())
        for call in (first.images_to_make, lambda: FeatureFolder.open(first.folder.path)):
            with pytest.raises(ValueError, match=r"00000.safetensors holds the features of other images.*delete it"):
                call()
    for name, content in before.items():
        if name.endswith(".safetensors"):
            tally = json.dumps(NoiseSource().take_counts())
            (first.folder.path / name).write_bytes(save(load(content), {"tally": tally}))
    read = FeatureFolder.open(first.folder.path).read(PixelExtractor())
    assert torch.equal(read.features.features_ND, found[0]) and first.images_to_make() == 0


def test_only_lost_and_damaged_shards_are_made_again_and_come_out_the_same(tmp_path):
    first = Extraction(NoiseSource(), PixelExtractor(), tmp_path).run()
    before = files(tmp_path)
    (tmp_path / "00000.safetensors").unlink()
    (tmp_path / "00002.safetensors").write_bytes(before["00002.safetensors"][:100])
    for again, made in ((NoiseSource(), [*range(32), *range(64, 96)]), (NoiseSource(), [])):
        found = Extraction(again, PixelExtractor(), tmp_path).run()
        assert again.asked == made and files(tmp_path) == before
        assert torch.equal(first.features.features_ND, found.features.features_ND)
        assert first.described == found.described


@pytest.mark.parametrize(
    "changed, problem",
    [
        (lambda tensors, facts: b"<!DOCTYPE html>" * 9, "cannot be read"),
        (lambda tensors, facts: (2**43).to_bytes(8, "little") + b"{}" * 9, "cannot be read"),
        (lambda tensors, facts: save(tensors, {"shard": "[" * 10**5}), "holds no features"),
        (lambda tensors, facts: save(tensors, {"shard": '{"tally": {"pairs": "3"}}'}), "holds no features"),
        (lambda tensors, facts: save({"thumbnails": tensors["thumbnails"]}, facts), "cannot be read .*features"),
        (lambda tensors, facts: save(tensors | {"features": tensors["features"][1:]}, facts), r"float64 \[31, 6\]"),
        (lambda tensors, facts: save(tensors | {"features": tensors["features"].int()}, facts), r"int32 \[32, 6\]"),
        (lambda tensors, facts: save(tensors | {"features": tensors["features"] / 0}, facts), "NaN or infinite"),
        (
            lambda tensors, facts: save(tensors | {"labels": tensors["labels"].double()}, facts),
            "labels of another kind",
        ),
    ],
)
def test_damaged_shards_are_refused_by_name_with_the_remedy(tmp_path, changed, problem):
    folder = Extraction(NoiseSource(), PixelExtractor(), tmp_path).run() and FeatureFolder.open(tmp_path)
    path = folder.shard_path(1)
    with safe_open(path, "pt") as file:
        path.write_bytes(changed(load(path.read_bytes()), file.metadata()))
    with pytest.raises(ValueError, match=f"00001.safetensors .*{problem}.*; delete it and run the command") as caught:
        FeatureFolder.open(tmp_path).read(PixelExtractor())
    assert "\n" not in str(caught.value)


def test_an_extractor_without_memory_for_the_images_says_how_many_it_takes(tmp_path):
    class Huge(PixelExtractor):
        def __call__(self, images_BCHW):
            return torch.empty(2**48)  # 1 PiB

    with pytest.raises(WorkFailed, match="out of memory; pixels takes 32 images 1×4×4 at once, make them smaller"):
        Extraction(NoiseSource(), Huge(), tmp_path).run()


@pytest.mark.parametrize(
    "changed, key",
    [
        ((NoiseSource(seed=1), PixelExtractor()), "seed=0, not 1"),
        ((NoiseSource(count=99), PixelExtractor()), "count=100, not 99"),
        ((NoiseSource(), PixelExtractor(sha256="1" * 64)), "extractor.sha256=0000"),
        ((NoiseSource(), PixelExtractor(name="other")), "extractor.name=pixels, not other"),
    ],
    ids=["seed", "count", "weights", "extractor"],
)
def test_features_of_something_else_are_refused_and_left_alone(tmp_path, changed, key):
    Extraction(NoiseSource(), PixelExtractor(), tmp_path).run()
    before = files(tmp_path)
    with pytest.raises(ValueError, match=f"holds features with .*{key}.*--features"):
        Extraction(*changed, tmp_path)
    assert files(tmp_path) == before


def test_a_result_records_the_source_with_facts_that_may_change_and_what_was_counted_as_it_was_made(tmp_path):
    Extraction(NoiseSource(), PixelExtractor(), tmp_path).run()
    moved = NoiseSource()
    moved.name, moved.facts = "moved", lambda: {"run": "elsewhere"}
    assert Extraction(moved, PixelExtractor(), tmp_path).run().described == {
        "name": "moved",
        "kind": "noise",
        "seed": 0,
        "run": "elsewhere",
        "count": 100,
        "image_shape": [1, 4, 4],
        "device": "cpu",
        "active_experts": 1.5,
    }


def test_a_folder_of_features_can_be_read_without_its_source(tmp_path):
    source = NoiseSource()
    made = Extraction(source, PixelExtractor(), tmp_path).run()
    folder = FeatureFolder.open(tmp_path)
    assert folder.known == {"features_ND", "spatial_NS", "thumbnails_NP", "labels_N"}
    assert folder.manifest.count == 100 and folder.manifest.image_shape == (1, 4, 4)
    assert torch.equal(folder.labels_N, source.labels_N)
    read = folder.read(PixelExtractor())
    assert torch.equal(made.features.features_ND, read.features.features_ND) and read.described == made.described
    assert torch.equal(made.features.labels_N, read.features.labels_N) and read.identity == made.identity
    with pytest.raises(ValueError, match=r"another extractor, name=pixels, not other.*--extractor"):
        folder.require_extractor(PixelExtractor(name="other"))
    (tmp_path / "00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"00001.safetensors is not there; run the command that makes it again"):
        FeatureFolder.open(tmp_path)


def test_kept_images_come_back_in_order_and_are_added_to_features_that_were_made_without(tmp_path):
    source = NoiseSource(count=70)
    Extraction(source, PixelExtractor(), tmp_path / "features").run()
    extraction = Extraction(source, PixelExtractor(), tmp_path / "features", keep_images=True)
    extraction.run()
    extraction.save_npz(tmp_path / "images.npz")
    arrays = np.load(tmp_path / "images.npz")
    assert np.array_equal(arrays["arr_0"], source.images.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(arrays["labels"], source.labels_N.numpy())
    again = NoiseSource(count=70)
    Extraction(again, PixelExtractor(), tmp_path / "features").run()  # who does not want them needs no new features
    assert again.asked == []


def test_two_commands_do_not_make_the_same_features_at_once(tmp_path):
    extraction = Extraction(NoiseSource(), PixelExtractor(), tmp_path)
    with (tmp_path / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="in use by another process; wait for it"):
            extraction.run()
    assert extraction.run() is not None


def test_of_two_commands_that_found_a_folder_empty_the_second_is_refused(tmp_path):
    first, second = (Extraction(NoiseSource(seed=seed), PixelExtractor(), tmp_path) for seed in (0, 1))
    second.run()
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"holds features with .*; name another folder by --features"):
        first.run()
    assert files(tmp_path) == before


def test_images_that_the_extractor_does_not_take_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="try --size"):
        Extraction(NoiseSource(side=5), PixelExtractor(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("which, bad", [(0, float("nan")), (1, float("inf"))], ids=["features", "spatial"])
def test_features_that_are_not_finite_name_the_image(tmp_path, which, bad):
    class Broken(PixelExtractor):
        def __call__(self, images_BCHW):
            features = super().__call__(images_BCHW)
            features[which][3, 0] = bad
            return features

    with pytest.raises(ValueError, match="noise: the features of image 3 are NaN or infinite"):
        Extraction(NoiseSource(), Broken(), tmp_path).run()
    assert {path.name for path in tmp_path.iterdir()} == {FEATURES_MANIFEST}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is truncated, or still being written; name another folder by --features"),
        ("{}", "is no file of dit-moe, or damaged: it has no `format`; name another folder by --features"),
        ('{"format": 99}', "has format 99, this version reads 1; use a dit_moe to match"),
        ('{"format": 1, "source": []}', r": source=\[\] must be an object; name another folder by --features"),
    ],
)
def test_another_file_of_the_manifests_name_is_refused(tmp_path, content, problem):
    (tmp_path / FEATURES_MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=rf"features.json ?{problem}"):
        Extraction(NoiseSource(), PixelExtractor(), tmp_path)


def test_shards_keep_the_size_that_they_were_begun_with(tmp_path):
    manifest = asdict(Extraction(NoiseSource(), PixelExtractor(), tmp_path).folder.manifest)
    (tmp_path / FEATURES_MANIFEST).write_text(json.dumps(manifest | {"shard_size": 50}))
    Extraction(NoiseSource(), PixelExtractor(), tmp_path).run()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_small_images_are_their_own_thumbnails_and_large_ones_are_averaged():
    small = torch.randint(256, (2, 3, 8, 8)).to(torch.uint8)
    assert torch.equal(thumbnails(small), small.flatten(1))
    large = torch.randint(256, (2, 3, 64, 96)).to(torch.uint8)
    means = large.numpy().reshape(2, 3, 32, 2, 32, 3).mean((3, 5)).round().astype(np.uint8)
    assert np.array_equal(thumbnails(large).numpy(), means.reshape(2, -1))
