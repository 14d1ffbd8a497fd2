"""What is counted of an image model's routing is what its routers do at each noise level, class and patch."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_moe.analysis.collect_images import collect_images, noise_levels, of_many_classes
from dit_moe.analysis.statistics import specialisation
from dit_moe.config import ConfigError
from dit_moe.data import DATASETS
from dit_moe.diffusion import OBJECTIVES
from dit_moe.moe import ROUTERS, measure_layers
from dit_moe.tasks import images
from tests.analysis.runs import Chosen, image_run, with_sample

HELDOUT = DATASETS.build(DATASETS.config_class("digits")(), "heldout")


def seen_by(run, dataset, **options):
    """What the network was called with: latents, times, labels, call by call."""
    calls = []
    handle = run.model.register_forward_pre_hook(lambda model, args: calls.append([each.clone() for each in args]))
    stats = collect_images(run, dataset, **options)
    handle.remove()
    return stats, calls


def ddpm(**options):
    return OBJECTIVES.build(OBJECTIVES.config_class("ddpm")(**options), num_classes=10)


def flow(**options):
    return OBJECTIVES.build(OBJECTIVES.config_class("flow")(**options), num_classes=10)


@pytest.mark.parametrize("objective, router", [*(("flow", each) for each in ROUTERS.names()), ("ddpm", "dtopp")])
def test_means_by_level_class_and_patch_agree_with_the_whole(router, objective):
    run = image_run(f"model.moe={{router: {router}, every: 2}}", f"objective={objective}", "sample.sampler=null")
    with measure_layers(run.model) as layers:
        stats = collect_images(run, Chosen(list(range(30))), times=4)
    assert stats.layers_L == [0, 2] and stats.kind == "images" and stats.facts["images"] == 30
    tokens = 30 * 4 * 16
    assert stats.facts["tokens counted"] == tokens
    examples = stats.examples.active_MTLS  # their passes are the network's, too
    for layer, (seen, active) in enumerate(zip(layers, stats.active_L, strict=True)):
        assert seen.pairs == pytest.approx(active * tokens + examples[:, :, layer].sum())
    np.testing.assert_allclose(stats.active_LT.mean(1), stats.active_L)
    np.testing.assert_allclose(stats.active_LS.mean(1), stats.active_L)
    labels = HELDOUT.__getitems__(range(30))["labels"].numpy()
    weights = np.array([(labels == int(name)).mean() for name in stats.class_names_C])
    np.testing.assert_allclose(stats.active_LC @ weights, stats.active_L)
    assert (stats.share_LE.sum(1) <= 1 + 1e-12).all()  # the rest have no expert
    for shares in (stats.load_LE, stats.load_LTE, stats.load_LCE):
        np.testing.assert_allclose(shares.sum(-1), 1)
    mean_LTE = stats.load_LTE * stats.active_LT[..., None]  # a level counts by its pairs
    np.testing.assert_allclose(mean_LTE.sum(1) / stats.active_LT.sum(1)[:, None], stats.load_LE)


def test_a_report_of_promoe_says_that_the_expert_of_images_without_a_class_is_not_used():
    stats = collect_images(image_run("model.moe.router=promoe"), Chosen(list(range(30))), times=2)
    assert (stats.load_LE[:, :3] > 0).all() and (stats.load_LE[:, 3] == 0).all()
    assert stats.remark.startswith("Expert 3 serves images without a class alone")


def test_each_image_has_one_noise_at_all_levels_its_own_label_and_the_times_of_the_objective():
    stats, calls = seen_by(image_run(), Chosen([3, 5, 9]), times=5)
    labels = HELDOUT.__getitems__([3, 5, 9])["labels"]
    x0 = HELDOUT.__getitems__([3, 5, 9])["images"].float() / 127.5 - 1
    noises = []
    for t, (x, times_B, labels_B) in zip(stats.times_T, calls[:5], strict=True):
        assert torch.equal(labels_B, labels) and times_B.tolist() == pytest.approx([1000 * t] * 3)
        noises.append((x - (1 - t) * x0) / t)
    for noise in noises[:-1]:
        torch.testing.assert_close(noise, noises[-1], atol=1e-4, rtol=0)  # divided by t = 0.1
    assert abs(noises[-1].mean()) < 0.2 and abs(noises[-1].std() - 1) < 0.2
    assert not torch.allclose(noises[-1][0], noises[-1][1])


def test_counts_depend_on_the_seed_and_the_precision_of_sampling_and_not_on_the_batch_size():
    run, dataset = image_run(), Chosen(list(range(23)))
    whole = collect_images(run, dataset, times=3)
    parts = collect_images(with_sample(run, batch_size=5), dataset, times=3)
    for name in ("active_L", "share_LE", "together_LEE", "active_LS", "load_LTE", "load_LCE"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-3)  # ties fall either way
    assert np.array_equal(parts.examples.active_MTLS, whole.examples.active_MTLS)
    other = collect_images(with_sample(run, seed=1), dataset, times=3)
    assert not np.allclose(other.active_LS, whole.active_LS)
    bf16 = collect_images(with_sample(run, precision="bf16"), dataset, times=3)
    assert np.abs(bf16.active_LS - whole.active_LS).max() > 0 and abs(bf16.active - whole.active) < 0.05


def test_examples_are_the_images_as_the_network_saw_them():
    run, rows = image_run(), [list(HELDOUT.__getitems__(range(450))["labels"]).index(label) for label in range(8)]
    stats = collect_images(run, Chosen(rows), times=5)
    examples = stats.examples
    assert examples.classes_M == list("01234567") and examples.times_T.tolist() == stats.times_T.tolist()
    images = HELDOUT.__getitems__(rows)["images"].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(examples.images_MHWC, images)
    error_T = np.abs(examples.noisy_MTHWC - images[:, None].astype(float)).mean((0, 2, 3, 4))
    assert (np.diff(error_T) > 0).all() and examples.noisy_MTHWC.dtype == np.uint8
    np.testing.assert_allclose(examples.active_MTLS.mean((0, 3)).T, stats.active_LT, atol=0.02)  # alone or in a batch


def test_only_classes_that_were_met_are_named():
    rows = [i for i, label in enumerate(HELDOUT.__getitems__(range(60))["labels"].tolist()) if label in (2, 7)]
    stats = collect_images(image_run(), Chosen(rows), times=2)
    assert stats.class_names_C == ["2", "7"] and stats.active_LC.shape == (3, 2) and stats.load_LCE.shape == (3, 2, 4)
    assert np.isfinite(stats.active_LC).all() and stats.images_C.sum() == len(rows) and len(stats.images_C) == 2


def test_shuffled_labels_take_nothing_from_the_counts_and_leave_only_chance_between_classes():
    stats = collect_images(image_run(), Chosen(list(range(300))), times=2)
    assert stats.images_C.sum() == 300 and stats.shuffled_LCE.shape == stats.load_LCE.shape
    by_class, by_chance = specialisation(stats.load_LCE), specialisation(stats.shuffled_LCE)
    assert (by_chance > 0).all() and by_chance.mean() < 0.5 * by_class.mean()


def test_fewer_images_are_evenly_spaced_over_the_data_and_progress_counts_all():
    done = []
    stats, calls = seen_by(image_run(), Chosen(list(range(40))), images=4, times=2, on_progress=done.append)
    wanted = HELDOUT.__getitems__([0, 10, 20, 30])["labels"]
    assert torch.equal(calls[0][2], wanted) and stats.facts["images"] == 4
    assert sum(done) == 4 * 2


def test_a_target_asked_for_is_the_one_reported_and_what_the_routers_do():
    dataset = Chosen(list(range(20)))
    trained = collect_images(image_run(), dataset, times=4)
    run = with_sample(image_run(), target=1.25)
    stats = collect_images(run, dataset, times=4)
    assert stats.target.mean == 1.25 and stats.facts["trained target"] == 2.0
    assert stats.facts["asked for"] == "target=1.25"
    assert abs(stats.active - 1.25) < 0.2 < abs(trained.active - 1.25)  # solved on what is sampled, not on these
    assert collect_images(image_run(), dataset, times=4).active == trained.active
    with_p = collect_images(with_sample(image_run(), p=(0.05, 1.0), vary="time"), dataset, times=4)
    assert with_p.active_LT[:, 0].tolist() == [4, 4, 4] and with_p.active_LT[:, -1].tolist() == [1, 1, 1]


class Encoded(Chosen):
    """Latents as an autoencoder that is unsure by `std` makes them."""

    std = 0.5

    def __getitems__(self, indices):
        rows = super().__getitems__(indices)
        mean = rows["images"].float() / 127.5 - 1
        return {"moments": torch.stack([mean, torch.full_like(mean, self.std)], 1), "labels": rows["labels"]}


def test_encoded_latents_are_drawn_as_in_training_the_same_ones_for_all_levels():
    (_, calls), (_, plain) = (seen_by(image_run(), data([3, 5]), times=4) for data in (Encoded, Chosen))
    latents, noise = ends_of(calls)
    for t, (x, *_) in zip((0.125, 0.375, 0.625, 0.875), calls, strict=False):
        torch.testing.assert_close(x, (1 - t) * latents + t * noise, atol=1e-5, rtol=0)
    assert abs((latents - ends_of(plain)[0]).std() - Encoded.std) < 0.1


def ends_of(calls, low=0.125, high=0.875):
    """Latents and noise behind the first and the last of four levels of the linear path."""
    first, last = calls[0][0], calls[3][0]
    return (first * high - last * low) / (high - low), (last * (1 - low) - first * (1 - high)) / (high - low)


# ---------------------------------------------------------------------------------------------------------- the levels


@pytest.mark.parametrize("timesteps, count", [(1000, 7), (50, 50), (33, 32)])
def test_levels_are_the_middles_of_equal_parts_and_of_ddpm_distinct_whole_ones(timesteps, count):
    assert noise_levels(flow(), 4) == noise_levels(ddpm(), 4) == [0.125, 0.375, 0.625, 0.875]
    objective = ddpm(timesteps=timesteps)
    levels = noise_levels(objective, count)
    numbers = [t * timesteps for t in levels]
    assert numbers == pytest.approx([round(n) for n in numbers]) and len(set(numbers)) == count
    assert min(levels) >= 0 and max(levels) < 1 and levels == sorted(levels)


@pytest.mark.parametrize("count", [0, 51])
def test_levels_that_there_are_not_are_refused(count):
    with pytest.raises(ConfigError, match=f"times={count} (must be at least 1|exceeds the objective's 50 noise)"):
        noise_levels(ddpm(timesteps=50), count)


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_every_objective_can_be_shown_noise(name):
    objective = OBJECTIVES.build(OBJECTIVES.config_class(name)(), num_classes=10)
    x0, eps = torch.full((2, 1, 2, 2), 0.5), torch.full((2, 1, 2, 2), -1.0)
    errors = []
    for t in noise_levels(objective, 10):
        x, times_B = objective.noisy_at(x0, eps, t)
        assert objective.place(times_B[0].item()) == pytest.approx(t)
        errors.append((x - x0).abs().max().item())
    assert errors == sorted(errors) and errors[0] < 0.5 < errors[-1]


# -------------------------------------------------------------------------------------------------------- the examples


def test_examples_are_of_as_many_classes_as_can_be():
    rows, labels = list(range(100, 112)), [0, 0, 0, 1, 1, 2, 3, 3, 4, 5, 6, 7]
    assert of_many_classes(rows, labels, 4) == [100, 105, 108, 110]  # classes 0, 2, 4, 6
    assert of_many_classes(rows, labels, 8) == [100, 103, 105, 106, 108, 109, 110, 111]
    assert sorted(of_many_classes(rows, labels, 50)) == rows
    assert of_many_classes(rows[:5], labels[:5], 4) == [100, 103, 101, 104]  # the first of each, then the second


def test_data_whose_labels_mean_other_classes_than_in_training_are_refused(monkeypatch):
    small = image_run()
    network = replace(small.experiment.model, num_classes=3)
    run = replace(small, experiment=replace(small.experiment, model=network), class_names=["ant", "bee", "cat"])

    def opened(*names, run=run):
        data = SimpleNamespace(class_names=names)
        monkeypatch.setattr(images.image, "open_split", lambda *given: (data, "heldout"))
        return images.open_split(run, "heldout")

    for known, names in (
        (run.class_names, run.class_names),
        (None, "xyz"),
        (run.class_names, "012"),
        ([*"012"], "xyz"),
    ):
        assert opened(*names, run=replace(run, class_names=known))[1] == "heldout"
    with pytest.raises(
        ConfigError, match="data has bee for class 0, which was ant in training; name data with the same"
    ):
        opened("bee", "cat")
    with pytest.raises(ConfigError, match="data has 4 classes, where the run was trained on 3"):
        opened("ant", "bee", "cat", "dog")
