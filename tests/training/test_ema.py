import torch
from torch import nn

from dit_moe.training import EMA


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("p", torch.tensor(0.5, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))


def test_parameters_are_averaged_and_buffers_copied():
    model = Module()
    ema = EMA(model, decay=0.9)
    expected = model.w.detach().clone()
    for n in range(200):
        with torch.no_grad():
            model.w += 1
            model.p += 0.001
            model.count += 1
        ema.update(model, n)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.w.detach()
        torch.testing.assert_close(ema.module.w, expected)
        assert torch.equal(ema.module.p, model.p)
        assert torch.equal(ema.module.count, model.count)


def test_the_average_of_a_short_run_has_forgotten_the_start():
    model = Module()
    ema = EMA(model, decay=0.9999)
    with torch.no_grad():
        model.w.fill_(100.0)
    for n in range(50):
        ema.update(model, n)
    assert (ema.module.w > 99.999).all()


def test_the_copy_is_fp32_frozen_in_evaluation_mode_and_shares_nothing():
    model = Module().bfloat16()
    model.p = model.p.double()
    ema = EMA(model, decay=0.9)
    assert ema.module.w.dtype == torch.float32
    assert ema.module.p.dtype == torch.float64
    assert not ema.module.training
    assert not ema.module.w.requires_grad
    assert model.training
    assert model.w.requires_grad
    ema.update(model, 0)
    ema.update(model, 1)
    assert ema.module.p.data_ptr() != model.p.data_ptr()
