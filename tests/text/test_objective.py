"""The loss of the next token."""

import pytest
import torch
import torch.nn.functional as F

from dit_moe.config import ConfigError
from dit_moe.randomness import BatchRandom
from dit_moe.text.objective import NextToken, NextTokenConfig, next_token_losses

RANDOM = BatchRandom(0, total=2)


def table(tokens_BS, weight_VV):
    """A network that knows the last token only."""
    return weight_VV[tokens_BS]


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_the_cross_entropy_of_each_token_behind_those_before_it(masked):
    weight_VV, tokens = torch.randn(7, 7), torch.randint(7, (2, 6))
    batch = {"tokens": tokens} | ({"documents": torch.arange(12).view(2, 6)} if masked else {})
    seen = []
    terms = NextToken(NextTokenConfig())(lambda *args: seen.append(args) or table(args[0], weight_VV), batch, RANDOM)
    expected = F.cross_entropy(weight_VV[tokens[:, :-1]].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(terms["loss"], expected)
    assert set(terms) == {"loss", "next_token"}
    for argument, rows in zip(seen[0], batch.values(), strict=True):
        assert torch.equal(argument, rows[:, :-1])


def test_the_z_loss_is_the_mean_squared_log_denominator():
    weight_VV, tokens = 3 * torch.randn(7, 7), torch.randint(7, (2, 6))
    terms = NextToken(NextTokenConfig(z_loss=0.1))(lambda seen: table(seen, weight_VV), {"tokens": tokens}, RANDOM)
    z = weight_VV[tokens[:, :-1]].logsumexp(-1).square().mean()
    torch.testing.assert_close(terms["z_loss"], z)
    torch.testing.assert_close(terms["loss"], terms["next_token"] + 0.1 * z)
    with pytest.raises(ConfigError, match=r"z_loss=-1\.0 must be at least 0"):
        NextTokenConfig(z_loss=-1.0)


@pytest.mark.parametrize("chunk", [1, 20, 33, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_neither_losses_nor_gradients(chunk, dtype):
    logits_NV, targets_N = torch.randn(10, 11, dtype=dtype), torch.randint(11, (10,))
    found = []
    for size in (chunk, 2**30):
        leaf = logits_NV.clone().requires_grad_()
        loss, z = next_token_losses(leaf, targets_N, size)
        (loss + 0.1 * z).backward()
        found.append((loss.detach(), z.detach(), leaf.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_loss_of_bf16_logits_is_computed_in_fp32():
    logits_NV, targets_N = (20 * torch.randn(64, 512)).bfloat16(), torch.randint(512, (64,))
    loss, z = next_token_losses(logits_NV, targets_N)
    assert loss.dtype == z.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits_NV.float(), targets_N))
