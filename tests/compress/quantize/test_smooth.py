import math

import pytest
import torch

from lighten.compress.quantize.smooth import SMALLEST, smooth


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_is_the_formula_of_the_paper(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(9, 6, generator=generator), 40 * torch.randn(50, 6, generator=generator)
    found = smooth(weight, inputs.abs().amax(0), alpha, 1, 6)
    for channel in range(6):
        largest = max(abs(float(value)) for value in inputs[:, channel])
        other = max(abs(float(value)) for value in weight[:, channel])
        assert float(found[channel]) == pytest.approx(math.pow(largest, alpha) / math.pow(other, 1 - alpha), rel=1e-5)


def test_at_one_activations_become_equally_large_at_zero_weights_do() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, absmax = torch.randn(9, 6, generator=generator), torch.rand(6, generator=generator) + 0.1
    assert torch.allclose(absmax / smooth(weight, absmax, 1.0, 1, 6), torch.ones(6))
    assert torch.allclose((weight * smooth(weight, absmax, 0.0, 1, 6)).abs().amax(0), torch.ones(6))


def test_heads_that_repeat_a_channel_share_its_scale() -> None:
    generator = torch.Generator().manual_seed(2)
    found = smooth(torch.randn(5, 24, generator=generator), torch.rand(24, generator=generator), 0.5, 3, 4)
    heads = found.reshape(2, 3, 4)
    assert torch.equal(heads, heads[:, :1].expand(-1, 3, -1))
    assert not torch.equal(heads[0], heads[1])


def test_channels_that_are_always_zero_get_a_finite_scale() -> None:
    found = smooth(torch.zeros(4, 4), torch.tensor([0.0, 1.0, 0.0, 5.0]), 0.5, 1, 4)
    assert torch.isfinite(found).all()
    assert (found >= SMALLEST).all()
