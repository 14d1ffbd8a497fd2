import pytest
import torch

from dit_moe.autoencoders.base import from_uint8, to_uint8

EVERY_GREY_LEVEL = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)


def test_uint8_survives_the_way_to_floats_and_back():
    assert torch.equal(to_uint8(from_uint8(EVERY_GREY_LEVEL)), EVERY_GREY_LEVEL)


def test_pixels_become_minus_one_to_one():
    x = from_uint8(EVERY_GREY_LEVEL)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1


def test_floats_become_pixels_by_adms_rule_clamp_then_truncate():
    x = torch.tensor([-9.0, -1.0, -0.9999, 0.0, 0.9999, 1.0, 9.0])
    expected = [0, 0, 0, 128, 255, 255, 255]  # 127.5·x + 128 in between is 0.5, 0.51, 128, 255.49, 255.5
    assert to_uint8(x.view(1, 1, 1, 7)).flatten().tolist() == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused_before_it_turns_black(value):
    images = torch.zeros(5, 1, 8, 8)
    images[3, 0, 1, 1] = value
    with pytest.raises(ValueError, match="1 of 5 images hold NaN or infinity, the first is number 3"):
        to_uint8(images)


def test_floats_are_not_taken_for_pixels():
    with pytest.raises(ValueError, match="float32; first stages take uint8"):
        from_uint8(torch.zeros(1, 1, 8, 8))
