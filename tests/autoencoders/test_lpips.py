"""LPIPS against torch-fidelity's, with random weights in the files that torch would download."""

import pytest
import torch
import torch_fidelity.sample_similarity_lpips as fidelity
from torchvision.models.vgg import cfgs, make_layers

from dit_moe.autoencoders.kl import KLLoss, KLLossConfig
from dit_moe.autoencoders.lpips import LINEAR, LPIPS, VGG, WIDTHS
from dit_moe.config import ConfigError
from dit_moe.randomness import BatchRandom


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("lpips"), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    features = make_layers(cfgs["D"])  # Kaiming's random weights keep the activations alive
    classifier = {"classifier.0.weight": torch.zeros(1)}  # the real file holds a classifier, too
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()} | classifier, folder / VGG)
    linear = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=random) for i, width in enumerate(WIDTHS)}
    torch.save(linear, folder / LINEAR)
    return folder


def images(channels=3, count=2):
    return torch.rand(2, count, channels, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.fixture
def theirs(folder, monkeypatch):
    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.features = make_layers(cfgs["D"])
            self.features.load_state_dict(
                {
                    name.removeprefix("features."): value
                    for name, value in torch.load(folder / VGG).items()
                    if name.startswith("features.")
                }
            )

    monkeypatch.setattr(fidelity, "torchvision_load_pretrained_vgg16", Features)
    monkeypatch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: torch.load(folder / LINEAR))
    return fidelity.SampleSimilarityLPIPS("lpips")


def test_distances_are_torch_fidelitys(folder, theirs):
    a, b = images()
    ours = LPIPS.load(folder)(a, b)
    assert ours.shape == (2,) and ours.min() > 0
    expected = theirs((a + 1) * 127.5, (b + 1) * 127.5).flatten()  # it takes pixels 0..255
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=0)


def test_one_channel_is_grey_and_equal_images_are_at_no_distance(folder):
    network = LPIPS.load(folder)
    a, b = images(channels=1)
    assert torch.equal(network(a, b), network(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)))
    assert torch.equal(network(a, a), torch.zeros(2))


def test_gradients_reach_the_images_only_and_are_finite_where_features_die(folder):
    network = LPIPS.load(folder)
    a, b = images(count=1)
    with torch.no_grad():
        network.slices[0][0].bias.fill_(-100.0)  # no feature of the first slice is active anywhere
    a.requires_grad_()
    network(a, b).sum().backward()
    assert a.grad.isfinite().all()
    assert all(parameter.grad is None for parameter in network.parameters())


def test_the_loss_takes_it_in_with_its_weight(folder):
    a, b = images()
    loss = KLLoss(KLLossConfig(kl_weight=0.0, lpips_weight=2.0, lpips_folder=str(folder)))
    terms = loss(
        lambda *args: (b, torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4)), {"images": a}, BatchRandom(0, total=2)
    )
    assert torch.allclose(terms["lpips"], LPIPS.load(folder)(b, a).mean())
    assert torch.allclose(terms["loss"], terms["reconstruction"] + 2 * terms["lpips"])


class Evil:
    """Code that loading would run."""

    def __reduce__(self):
        return (print, ("it ran",))


def refused(folder, message):
    with pytest.raises(
        ConfigError, match=f"{message}; get it as dit_moe/autoencoders/lpips.py says, or set lpips_weight=0"
    ):
        KLLoss(KLLossConfig(lpips_weight=1.0, lpips_folder=str(folder)))


def test_files_that_are_missing_broken_of_something_else_or_would_run_code_are_refused(folder, tmp_path):
    refused(tmp_path, rf"lpips_folder: the weights {tmp_path}/{VGG} cannot be read \(No such file or directory\)")
    (tmp_path / LINEAR).write_bytes((folder / LINEAR).read_bytes())
    (tmp_path / VGG).write_bytes((folder / VGG).read_bytes()[:1000])
    refused(tmp_path, rf"lpips_folder: {tmp_path}/{VGG} is no file of weights .*, or it is damaged")
    torch.save(Evil(), tmp_path / VGG)
    refused(tmp_path, f"{VGG} is no file of weights .*")
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / VGG)
    refused(tmp_path, rf"lpips_folder: {tmp_path} holds other weights than LPIPS's \('features.0.bias'\)")
