"""Scales and codes improved in turn: the loss falls, the codes stay on the grid."""

import pytest
import torch

from lighten.compress.quantize.gptq import gptq
from lighten.compress.quantize.grid import Quantized, Symmetry
from lighten.compress.quantize.refine import refined


def problem(seed: int = 0, out: int = 24, width: int = 192) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a weight and the Gram of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(400, width, generator=generator) @ torch.randn(width, width, generator=generator)
    inputs = mixed / width**0.5 + torch.randn(400, width, generator=generator)
    return torch.randn(out, width, generator=generator), inputs.t() @ inputs


def loss(weight: torch.Tensor, found: Quantized, gram: torch.Tensor) -> float:
    """Returns tr((W − Ŵ)H(W − Ŵ)ᵀ) with the damping that was used."""
    damped = gram.double()
    damped += found.damping * float(gram.diagonal().mean()) * torch.eye(len(gram))
    change = weight.double() - found.weight().double()
    return float(((change @ damped) * change).sum())


SETTINGS = {"group_size": 32, "damp_percent": 0.01}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False, "positive"])
@pytest.mark.parametrize("order", [False, True, "static"])
def test_every_round_lowers_the_loss(bits: int, sym: Symmetry, order: bool | str) -> None:
    weight, gram = problem()
    first = gptq(weight, gram, bits=bits, sym=sym, desc_act=order, **SETTINGS)
    losses = [loss(weight, first, gram)]
    for rounds in (1, 2, 3):
        found = refined(weight, gram, first, bits=bits, rounds=rounds)
        losses.append(loss(weight, found, gram))
        assert int(found.codes.max()) < 2**bits
        assert torch.equal(found.scales, found.scales.half().float())
        assert torch.equal(found.zeros, first.zeros)
        assert torch.equal(found.scales > 0, first.scales > 0)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < (0.95 if bits < 8 else 0.999) * losses[0]


def test_no_single_code_can_be_bettered() -> None:
    """After many rounds, moving any code by one makes the loss larger: a local minimum, by brute force."""
    weight, gram = problem(out=3, width=64)
    first = gptq(weight, gram, bits=3, sym=True, desc_act=False, **SETTINGS)
    found = refined(weight, gram, first, bits=3, rounds=30)
    least = loss(weight, found, gram)
    for row in range(64):
        for output in range(3):
            for change in (-1, 1):
                if 0 <= int(found.codes[row, output]) + change < 8:
                    codes = found.codes.clone()
                    codes[row, output] += change
                    other = Quantized(codes, found.scales, found.zeros, found.g_idx, found.damping)
                    assert loss(weight, other, gram) >= least * (1 - 1e-5)


def test_pruned_and_unread_weights_stay_zero() -> None:
    weight, gram = problem()
    gram[7], gram[:, 7] = 0, 0
    gone = torch.zeros_like(weight, dtype=torch.bool)
    gone[:, ::3] = True
    weight[gone] = 0
    first = gptq(weight, gram, bits=3, sym=True, desc_act=False, gone=gone, **SETTINGS)
    found = refined(weight, gram, first, bits=3, rounds=2, gone=gone).weight()
    assert not found[gone].any()
    assert not found[:, 7].any()
