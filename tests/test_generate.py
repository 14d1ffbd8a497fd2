"""From a network and a seed to images, whatever the batch size or the number of processes."""

import pytest
import torch

from dit_moe.config import ConfigError
from dit_moe.diffusion import OBJECTIVES, FlowConfig, GuidanceConfig, SamplingError
from dit_moe.diffusion.samplers.flow import EulerConfig, EulerMaruyamaConfig
from dit_moe.generate import Generator, SampleConfig, choose_labels
from dit_moe.latents import FIRST_STAGES
from dit_moe.latents.identity import IdentityConfig
from dit_moe.models import MODELS, DiTConfig
from dit_moe.moe import routers_of

SHAPE = (1, 8, 8)


def generator(name: str = "DiT-custom/2-4E2A", **options) -> Generator:
    torch.manual_seed(0)
    config = DiTConfig(name=name, width=32, depth=2, heads=2, in_channels=1, input_size=8, num_classes=10)
    model = MODELS.build(config)
    for module in [*model.blocks, model.final_layer]:
        torch.nn.init.normal_(module.adaLN_modulation[-1].weight, std=0.1)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    objective = OBJECTIVES.build(FlowConfig(), num_classes=10)
    sample = SampleConfig(**{"sampler": EulerMaruyamaConfig(steps=4), "count": 7, **options})
    return Generator(model, objective, FIRST_STAGES.build(IdentityConfig()), sample, SHAPE)


@pytest.mark.parametrize("sampler", [EulerConfig(steps=4), EulerMaruyamaConfig(steps=4)])
def test_an_image_depends_on_seed_index_and_label_and_not_on_its_batch(sampler):
    labels = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    guidance = GuidanceConfig(scale=2.0)
    whole = generator(sampler=sampler, guidance=guidance).latents(range(7), labels)
    parts = generator(sampler=sampler, guidance=guidance)
    for i in (0, 4, 6):
        alone = parts.latents([i], labels[i : i + 1])
        torch.testing.assert_close(alone[0], whole[i], atol=1e-5, rtol=1e-4)  # GEMMs of another shape, 4 steps


def test_batch_size_changes_no_pixel_and_strided_shares_make_the_same_set():
    labels = torch.arange(7)
    whole = generator(batch_size=7).generate(labels).images
    cut = generator(batch_size=3).generate(labels).images
    shares = [torch.cat(list(generator().batches(range(rank, 7, 2), labels))) for rank in range(2)]
    merged = torch.empty_like(whole)
    for rank, share in enumerate(shares):
        merged[rank::2] = share
    assert torch.equal(whole, cut) and torch.equal(whole, merged)


def test_latents_are_decoded_in_batches_of_their_own_and_no_image_changes():
    labels = torch.arange(7)
    sizes = []

    def decode(latents):
        sizes.append(len(latents))
        return FIRST_STAGES.build(IdentityConfig()).decode(latents)

    cut = generator(batch_size=5, decode_batch=2)
    cut.stage.decode = decode
    images = cut.generate(labels).images
    assert sizes == [2, 2, 1, 2]
    assert torch.equal(images, generator(batch_size=5).generate(labels).images)
    with pytest.raises(ConfigError, match="decode_batch=0 must be at least 1, or null for batch_size"):
        SampleConfig(decode_batch=0)


def test_another_seed_or_label_gives_another_image():
    one = generator().latents([0], torch.tensor([3]))
    assert not torch.equal(one, generator(seed=1).latents([0], torch.tensor([3])))
    assert not torch.equal(one, generator().latents([0], torch.tensor([4])))
    assert torch.equal(one, generator().latents([0], torch.tensor([3])))


def test_label_plans_are_stable_under_the_count():
    for labels in ("balanced", "random", "data", (7, 2)):
        few, many = (choose_labels(SampleConfig(labels=labels, count=count), 10, [3] * 10) for count in (5, 50))
        assert torch.equal(few, many[:5])
    assert choose_labels(SampleConfig(count=20), 10).bincount().tolist() == [2] * 10
    assert choose_labels(SampleConfig(count=3, labels=(7, 2)), 10).tolist() == [7, 2, 7]
    with pytest.raises(ConfigError, match=r"labels=\[10\] must lie in 0\.\.9"):
        choose_labels(SampleConfig(labels=(10,)), 10)


def test_labels_from_the_data_have_its_class_frequencies():
    plan = SampleConfig(labels="data", count=4000)
    counts = choose_labels(plan, 4, [10, 0, 1_200_000, 400_000]).bincount(minlength=4)
    assert counts[:2].tolist() == [0, 0]
    assert counts[2:] / 4000 == pytest.approx([0.75, 0.25], abs=0.03)  # 4 standard errors
    assert choose_labels(plan, 3, [0, 0, 7]).unique().tolist() == [2]
    uniform = choose_labels(SampleConfig(labels="random", count=50), 10)
    assert torch.equal(choose_labels(SampleConfig(labels="data", count=50), 10, [1] * 10), uniform)


def test_labels_from_data_whose_frequencies_are_not_known_are_refused():
    with pytest.raises(ConfigError, match=r"labels=data needs the class frequencies .*; choose random or balanced"):
        choose_labels(SampleConfig(labels="data"), 10)


def test_active_experts_are_measured_while_sampling_and_follow_a_recalibrated_target():
    labels = torch.arange(7)
    for target in (1.5, 3.0):
        made = generator(target=target).generate(labels)
        assert made.active_experts == pytest.approx(target, rel=0.01)
    assert generator("DiT-custom/2").generate(labels).active_experts is None


def test_recalibration_touches_thresholds_only():
    before = generator().model.state_dict()
    after = generator(target=3.0).model.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed and all("controller" in key for key in changed)
    assert len({router.controller.p.item() for router in routers_of(generator(target=3.0).model)}) == 1


def test_recalibrated_images_depend_neither_on_batch_size_nor_on_count():
    few = generator(target=3.0, batch_size=2).generate(torch.arange(4)).images
    many = generator(target=3.0, batch_size=50).generate(torch.arange(7)).images
    assert torch.equal(few, many[:4])


def test_running_out_of_memory_is_explained(monkeypatch):
    def too_much(self, latents_BCHW):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Generator, "decode", too_much)
    with pytest.raises(SamplingError, match=r"out of memory; lower sample.batch_size or sample.decode_batch"):
        generator().generate(torch.zeros(2, dtype=torch.int64))
