"""Pictures of images beside their reconstructions say which is which, and how much was lost."""

import pytest
import torch

from dit_moe.autoencoders import reconstructions
from dit_moe.autoencoders.reconstructions import reconstruction_grid


@pytest.mark.parametrize(("off_by", "said"), [(1, "decoded, 48.1 dB PSNR"), (0, "decoded, no loss")])
def test_originals_are_in_the_first_row_and_the_psnr_is_beside_the_second(monkeypatch, off_by, said):
    originals = torch.arange(3 * 64, dtype=torch.uint8).view(3, 1, 8, 8)
    asked = []
    monkeypatch.setattr(reconstructions, "image_grid", lambda *given: asked.append(given))
    reconstruction_grid(originals, originals + off_by)
    ((images, columns, captions),) = asked
    assert torch.equal(images[:3], originals) and columns == 3
    assert captions == ("original", said)
