"""The arithmetic of polishing against autograd and brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from lighten.compress.polish.coded import CodedLinear, by_scales, dense
from lighten.compress.polish.divergence import Head, divergence
from lighten.model.quantized.packed import Codes


def codes(bits: int = 4, outputs: int = 12, inputs: int = 32, groups: int = 4, *, mixed: bool = False) -> Codes:
    generator = torch.Generator().manual_seed(bits)
    g_idx = torch.arange(inputs) // (inputs // groups)
    if mixed:
        g_idx = g_idx[torch.randperm(inputs, generator=generator)]
    found = torch.randint(0, 2**bits, (inputs, outputs), generator=generator, dtype=torch.int32)
    zeros = torch.randint(1, 2**bits, (groups, outputs), generator=generator, dtype=torch.int32)
    scales = (torch.rand(groups, outputs, generator=generator) / 8 + 0.01).half()
    return Codes(found, torch.where(zeros % 2 == 0, scales, -scales), zeros, g_idx, bits)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_outputs_and_derivatives_are_those_of_the_dense_weight(bits: int, mixed: bool) -> None:
    stored, bias = codes(bits, mixed=mixed), torch.randn(12)
    linear = CodedLinear(stored, bias)
    with torch.no_grad():
        linear.theta.normal_(0, 0.1)
    inputs = torch.randn(2, 5, 32, requires_grad=True)
    wanted = torch.randn(2, 5, 12)
    (linear(inputs) * wanted).sum().backward()

    theta = linear.theta.detach().clone().requires_grad_()
    again = inputs.detach().clone().requires_grad_()
    scales = (stored.scales.float().t() * theta.exp()).t()
    weight = ((stored.codes - stored.zeros[stored.g_idx]).float() * scales[stored.g_idx]).t()
    (functional.linear(again, weight, bias) * wanted).sum().backward()
    assert theta.grad is not None and linear.theta.grad is not None and inputs.grad is not None
    assert torch.allclose(linear.theta.grad, theta.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(inputs.grad, again.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixed", [False, True])
def test_it_begins_as_what_is_stored(mixed: bool) -> None:
    stored = codes(mixed=mixed)
    linear = CodedLinear(stored, None)
    inputs = torch.randn(7, 32)
    with torch.no_grad():
        assert torch.allclose(linear(inputs), inputs @ stored.weight().t(), atol=1e-4)
    assert torch.equal(linear.rounded().t(), stored.scales.float())


def test_what_is_judged_is_what_is_stored() -> None:
    linear = CodedLinear(codes(), None)
    with torch.no_grad():
        linear.theta.normal_(0, 0.1)
        assert torch.equal(linear.rounded(), linear.rounded().half().float())
        weight = dense(linear.codes, linear.rounded(), torch.float32)
        assert torch.equal(linear(torch.eye(32)), weight.t())


def test_sums_of_groups() -> None:
    by_weight, coded = torch.randn(300, 24), torch.randint(-8, 8, (300, 24), dtype=torch.int8)
    wanted = (by_weight.double() * coded).view(300, 3, 8).sum(-1)
    assert torch.allclose(by_scales(by_weight, coded, 3).double(), wanted, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("behind", [None, lambda logits: 5 * torch.tanh(logits / 5)], ids=["plain", "capped"])
def test_the_divergence_and_its_derivative(temperature: float, behind: Any) -> None:
    ours, theirs = (Head(torch.randn(50, 8), torch.randn(50), behind) for _ in range(2))
    states, taught = torch.randn(200, 8, requires_grad=True), torch.randn(200, 8)
    found, derived = divergence((ours, states), (theirs, taught), temperature, 1 / 200)

    def log_probs(head: Head, inputs: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(inputs, head.weight, head.bias)
        return torch.log_softmax((behind(logits) if behind else logits) / temperature, -1)

    said, wanted = log_probs(ours, states), log_probs(theirs, taught)
    loss = functional.kl_div(said, wanted, reduction="none", log_target=True).sum()
    (temperature**2 * loss / 200).backward()
    assert found == pytest.approx(float(loss.detach()), rel=1e-4)
    assert derived is not None and states.grad is not None
    assert torch.allclose(derived, states.grad, atol=1e-6)
    assert divergence((ours, states), (theirs, taught), temperature)[1] is None
