"""Features are computed in full precision whatever the program around them does."""

import pytest
import torch

from dit_moe.extractors.base import full_precision

BACKENDS = (
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.matmul,
    torch.backends.cudnn.conv,
    torch.backends.mkldnn.conv,
)


def older_switch():
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it contradicts the newer ones
        return None


def settings():
    return [older_switch(), *(each.fp32_precision for each in BACKENDS)]


@pytest.fixture(autouse=True)
def put_back():
    before = [each.fp32_precision for each in BACKENDS]
    yield
    torch.set_float32_matmul_precision("highest")
    for each, precision in zip(BACKENDS, before, strict=True):
        each.fp32_precision = precision


def by_the_old_switches():
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True


def by_the_new_switches():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    torch.backends.mkldnn.conv.fp32_precision = "bf16"


@pytest.mark.parametrize("loosen", [lambda: None, by_the_old_switches, by_the_new_switches])
def test_reduced_precision_is_off_inside_and_as_before_outside(loosen):
    loosen()
    before = settings()
    with full_precision(torch.device("cpu")):
        assert settings() == ["highest", *["ieee"] * 4]
        assert not torch.backends.cuda.matmul.allow_tf32  # torch raises where old and new switches contradict
    assert settings() == before
    with pytest.raises(KeyError), full_precision(torch.device("cpu")):
        raise KeyError
    assert settings() == before


def test_products_under_autocast_are_exact_and_carry_no_gradient():
    a = torch.full((1, 3), 1 + 2**-20, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision(a.device):
            product = a @ torch.ones(3, 1)
        assert (a @ torch.ones(3, 1)).dtype == torch.bfloat16
    assert product.dtype == torch.float32 and product.item() == 3 * (1 + 2**-20) and not product.requires_grad
