"""From a network and a seed to images, whatever the batch size or the number of processes."""

import pytest
import torch

from dit_moe.autoencoders import FIRST_STAGES
from dit_moe.autoencoders.base import IdentityConfig
from dit_moe.config import ConfigError
from dit_moe.diffusion import OBJECTIVES, DDPMConfig, Flow, FlowConfig, GuidanceConfig, SamplingError
from dit_moe.diffusion.samplers.flow import EulerConfig, EulerMaruyamaConfig
from dit_moe.models import MODELS, DiTConfig
from dit_moe.moe import MoEConfig, measure_active
from dit_moe.sampling.generator import Generator, SampleConfig

SHAPE = (1, 8, 8)


def generator(name: str = "DiT-custom/2-4E2A", capacity_factor: float | None = None, **options) -> Generator:
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 2, "heads": 2, "in_channels": 1, "input_size": 8, "num_classes": 10}
    moe = {"moe": MoEConfig(capacity_factor=capacity_factor)} if capacity_factor else {}
    config = DiTConfig(name=name, **sizes, **moe)
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
    another_seed = generator(sampler=sampler, guidance=guidance, seed=1).latents([0], labels[:1])
    for other in (another_seed, parts.latents([0], torch.tensor([4]))):
        assert not torch.allclose(other[0], whole[0], atol=1e-2)


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
    sizes, identity = [], FIRST_STAGES.build(IdentityConfig())
    cut = generator(batch_size=5, decode_batch=2)
    cut.stage.decode = lambda latents: sizes.append(len(latents)) or identity.decode(latents)
    images = cut.generate(torch.arange(7)).images
    assert sizes == [2, 2, 1, 2] and torch.equal(images, generator(batch_size=5).generate(torch.arange(7)).images)
    with pytest.raises(ConfigError, match="decode_batch=0 must be at least 1, or null for batch_size"):
        SampleConfig(decode_batch=0)


def test_active_experts_are_measured_while_sampling_and_follow_a_recalibrated_target():
    labels = torch.arange(7)
    for target in (1.5, 3.0):
        made = generator(target=target).generate(labels)
        assert made.active_experts == pytest.approx(target, rel=0.01)
    assert generator("DiT-custom/2").generate(labels).active_experts is None


def test_another_target_changes_nothing_of_the_network_and_two_generators_share_one():
    labels = torch.arange(7)
    trained = generator()
    before = {key: value.clone() for key, value in trained.model.state_dict().items()}
    images = trained.generate(labels).images
    dialled = Generator(
        trained.model, trained.objective, trained.stage, SampleConfig(**vars(trained.config) | {"target": 3.0}), SHAPE
    )
    assert dialled.generate(labels).active_experts == pytest.approx(3.0, rel=0.01)
    assert len(set(dialled.thresholds)) == 1 and dialled.thresholds[0] > trained.thresholds[0]
    assert torch.equal(trained.generate(labels).images, images)
    assert all(torch.equal(value, before[key]) for key, value in trained.model.state_dict().items())


def test_times_of_ddpm_levels_are_their_places_on_the_way():
    ddpm, flow = OBJECTIVES.build(DDPMConfig(timesteps=1000), 10), OBJECTIVES.build(FlowConfig(), 10)
    assert [ddpm.place(n) for n in (0, 250, 999)] == [0, 0.25, 0.999]
    assert [flow.place(t) for t in (0.0, 250.0, 1000.0)] == [0, 0.25, 1]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"p": 0.8}, [0.8, 0.8]),
        ({"p": (0.3, 0.8)}, [0.3, 0.8]),
        ({"p": (0.3, 0.8), "vary": "time"}, [[0.3, 0.3], [0.8, 0.8]]),
    ],
)
def test_a_given_p_is_what_the_generator_samples_with(options, wanted):
    made = generator(**options)
    assert made.thresholds == wanted


def test_solved_thresholds_depend_neither_on_the_seed_nor_on_the_batch_size_and_so_do_no_images_on_the_count():
    few, many = generator(target=3.0, batch_size=2), generator(target=3.0, batch_size=50)
    assert few.thresholds == many.thresholds == generator(target=3.0, seed=5).thresholds
    assert torch.equal(few.generate(torch.arange(4)).images, many.generate(torch.arange(7)).images[:4])


@pytest.mark.parametrize(
    ("targets", "steps", "tolerance"), [((1.0, 3.0), 4, 0.05), (tuple(1 + number / 5 for number in range(10)), 10, 0.1)]
)
def test_targets_along_the_way_are_met_in_their_steps(targets, steps, tolerance):
    made = generator(target=targets, vary="time", sampler=EulerConfig(steps=steps))
    used = []

    def note(step, steps):
        used.append(seen.mean)
        seen.pairs = seen.tokens = 0

    with measure_active(made.model) as seen:
        made.latents(range(64), torch.arange(64) % 10, on_step=note)
    a_part = steps // len(targets)
    assert used == pytest.approx([target for target in targets for _ in range(a_part)], rel=tolerance)
    assert len(made.thresholds) == len(targets) and made.thresholds[0] == [0, 0]


@pytest.mark.parametrize("options", [{"target": (1.0, 2.0, 3.0)}, {"p": (0.2, 0.5, 0.9)}], ids=repr)
def test_a_part_of_the_way_without_a_step_is_refused_by_the_option_s_whole_name(options):
    with pytest.raises(ConfigError, match=rf"^sample\.{next(iter(options))}=.* no step of the sampler is in part 3"):
        generator(**options, vary="time", sampler=EulerConfig(steps=2))


def test_an_objective_that_knows_no_places_can_be_dialled_but_not_along_the_way(monkeypatch):
    monkeypatch.delattr(Flow, "place")
    generator(target=3.0).generate(torch.arange(2))
    with pytest.raises(
        ValueError, match=r"vary=time needs an objective that has the method `place`, and flow has none"
    ):
        generator(target=(1.0, 3.0), vary="time")


@pytest.mark.parametrize(
    ("where", "options", "remedy"),
    [
        ("_sample_some", {"target": 3.0}, r"set sample\.p in place of sample\.target"),
        ("decode", {}, r"lower sample\.batch_size or sample\.decode_batch"),
    ],
)
def test_running_out_of_memory_is_explained(monkeypatch, where, options, remedy):
    def run_out(*args, **kwargs):
        torch.empty(2**48)  # 1 PiB

    monkeypatch.setattr(Generator, where, run_out)
    with pytest.raises(SamplingError, match=f"out of memory; {remedy}"):
        generator(**options).generate(torch.zeros(2, dtype=torch.int64))
