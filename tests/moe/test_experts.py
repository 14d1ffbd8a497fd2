"""The fast engines against the plain loop: outputs and every gradient, ugly cases included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from dit_moe.moe.experts import Experts, fastest
from dit_moe.moe.routing import routing_from_mask

WIDTH, HIDDEN = 16, 24
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def mask_of(case: str, tokens: int, experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(tokens, experts, generator=generator) < 0.3
    if case == "an empty expert":
        mask[:, 0] = False
    if case == "one expert for all":
        mask[:] = False
        mask[:, -1] = True
    if case == "every expert":
        mask[:] = True
    if case == "a token without experts":
        mask[0] = False
    if case == "zero pairs":
        mask[:] = False
    return mask


def compute(
    engine: str,
    activation: str,
    mask: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    capacity: int | None = None,
    width: int = WIDTH,
) -> list[torch.Tensor]:
    """Output and all gradients, on the CPU. "silu_bias" are experts with biases.

    The engine "capacity" has a list of pairs of that length; None: of 7 rows more than there are pairs.
    """
    torch.manual_seed(0)
    activation, _, bias = activation.partition("_")
    if engine == "capacity":
        engine, capacity = "auto", int(mask.sum()) + 7 if capacity is None else capacity
    experts = Experts(mask.shape[1], width, HIDDEN, activation, engine, bias == "bias").to(device)
    for parameter in (experts.bias_in, experts.bias_out) if bias else ():
        torch.nn.init.normal_(parameter)
    x = torch.randn(mask.shape[0], width).to(device).requires_grad_()
    weight = torch.rand(mask.shape).to(device).requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = experts(x, routing_from_mask(mask.to(device), weight, capacity=capacity))
    (out * torch.linspace(-1, 1, width, device=device)).sum().backward()
    gradients = [parameter.grad for parameter in experts.parameters()]
    return [each.detach().cpu() for each in (out, x.grad, weight.grad, *gradients)]


CASES = [
    "random", "an empty expert", "one expert for all", "every expert", "a token without experts", "zero pairs",
]  # fmt: skip


ENGINES = [("by_expert", "cpu"), *((engine, device) for engine in ("grouped", "capacity") for device in DEVICES)]


@pytest.mark.parametrize(("engine", "device"), ENGINES)
@pytest.mark.parametrize("activation", ["gelu", "swiglu", "silu_bias", "swiglu_bias"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("tokens", "experts"), [(33, 8), (1, 4), (5, 1)])
def test_an_engine_equals_reference_in_outputs_and_all_gradients(engine, device, activation, case, tokens, experts):
    mask = mask_of(case, tokens, experts)
    found, reference = compute(engine, activation, mask, device=device), compute("reference", activation, mask)
    for fast, slow in zip(found, reference, strict=True):
        torch.testing.assert_close(fast, slow, atol=2e-5, rtol=1e-4)  # sums of 24 products in another order


@pytest.mark.parametrize(("engine", "device"), ENGINES)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("case", CASES)
def test_an_engine_in_bf16_stays_near_the_fp32_reference(engine, device, activation, case):
    mask = mask_of(case, 64, 8)
    fast = compute(engine, activation, mask, torch.bfloat16, device)
    slow = compute("reference", activation, mask)
    for a, b in zip(fast, slow, strict=True):
        assert a.dtype == torch.float32  # parameters' gradients and the output keep the input's dtype
        assert (a - b).norm() <= 0.02 * b.norm()  # bf16 has 8 bits: 0.4 % a rounding, three in a row


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 40),
    experts=st.integers(1, 12),
    width=st.integers(1, 5),
    density=st.floats(0, 1),
    activation=st.sampled_from(["gelu", "swiglu_bias"]),
)
def test_every_engine_equals_reference_at_any_shape(seed, tokens, experts, width, density, activation):
    mask = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < density
    reference = compute("reference", activation, mask, width=8 * width)
    for engine, device in ENGINES:
        found = compute(engine, activation, mask, device=device, width=8 * width)
        for fast, slow in zip(found, reference, strict=True):
            torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)  # sums of up to 40 products


@pytest.mark.parametrize("capacity", [1, 40])
@pytest.mark.parametrize("device", DEVICES)
def test_of_more_pairs_than_rows_exactly_those_without_a_row_are_missing(device, capacity):
    mask, kept = mask_of("random", 33, 8), torch.zeros(33, 8, dtype=torch.bool)
    routing = routing_from_mask(mask, torch.ones(33, 8), capacity=capacity)
    kept[routing.token_R, routing.expert_R] = True
    assert mask.sum() > kept.sum() == capacity
    found = compute("capacity", "swiglu_bias", mask, device=device, capacity=capacity)
    for fast, slow in zip(found, compute("reference", "swiglu_bias", kept), strict=True):
        torch.testing.assert_close(fast, slow, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_memory_of_rows_without_a_pair_held_reaches_no_output_and_no_gradient(dtype):
    mask = mask_of("an empty expert", 33, 8)
    torch.use_deterministic_algorithms(True)  # fills what is not initialised with NaN
    try:
        found = compute("capacity", "swiglu_bias", mask, dtype, capacity=200)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(each.isfinite().all() for each in found)


@pytest.mark.parametrize("engine", ["by_expert", "grouped", "capacity"])
def test_a_token_without_experts_gets_zeros_and_zero_pairs_give_zero_and_not_missing_gradients(engine):
    mask = mask_of("a token without experts", 6, 4)
    assert compute(engine, "gelu", mask)[0][0].abs().max() == 0
    for value in compute(engine, "swiglu_bias", mask_of("zero pairs", 3, 4)):
        assert value is not None and value.abs().max() == 0


def test_threads_chunks_and_the_number_of_threads_do_not_change_what_expert_by_expert_computes(monkeypatch):
    mask, threads = mask_of("an empty expert", 64, 8), torch.get_num_threads()
    found = []
    try:
        for count, chunk in ((1, 1024), (2, 1024), (3, 8)):
            torch.set_num_threads(count)
            monkeypatch.setattr("dit_moe.moe.expert_by_expert.CHUNK", chunk)
            found.append(compute("by_expert", "swiglu_bias", mask))
            assert torch.get_num_threads() == count  # the workers' own setting stays theirs
    finally:
        torch.set_num_threads(threads)
    for one, two, chunked in zip(*found, strict=True):
        assert torch.equal(one, two)  # so that a run may go on where more threads are
        torch.testing.assert_close(one, chunked, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_expert_by_expert_keeps_no_rows_and_computes_the_same_on_several_threads(mode):
    threads, made = torch.get_num_threads(), []

    class Shapes(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if function is torch.Tensor.new_empty:
                made.append(tuple(found.shape))
            return found

    experts, x = Experts(8, WIDTH, HIDDEN, "swiglu", "by_expert", bias=True), torch.randn(40, WIDTH)
    routing = routing_from_mask(torch.ones(40, 8, dtype=torch.bool), torch.rand(40, 8))
    wanted = experts(x, routing).detach()
    torch.set_num_threads(2)
    try:
        with mode(), Shapes():
            found = experts(x, routing)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found, wanted)
    assert (0, 2 * HIDDEN) in made and (320, 2 * HIDDEN) not in made


@pytest.mark.parametrize(
    ("device", "dtype", "work", "experts", "wanted"),
    [
        ("cuda", torch.bfloat16, 2**40, 64, "grouped"),
        ("cpu", torch.float32, 2**30, 64, "by_expert"),
        ("cpu", torch.float32, 2**20, 64, "grouped"),
        ("cpu", torch.bfloat16, 2**20, 64, "by_expert"),
        ("cpu", torch.bfloat16, 2**30, 0, "grouped"),
    ],
)
def test_auto_takes_what_was_measured_as_the_fastest(device, dtype, work, experts, wanted):
    assert fastest(device, dtype, work, experts) == wanted
