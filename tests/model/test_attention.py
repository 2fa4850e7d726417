"""Causal attention in blocks is attention: against the formula in double precision, and torch's own kernel."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.model.attention import attend, forward


def inputs(samples: int, heads: int, shared: int, length: int, size: int, spread: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length * heads)
    counts = (heads, shared, shared)
    return [
        (torch.randn(samples, length, count, size, generator=generator) * spread).bfloat16().transpose(1, 2)
        for count in counts
    ]


def formula(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, *, rounded: bool = False
) -> torch.Tensor:
    """softmax(scale QK' + mask) V in float64, `[samples, length, heads, size]`; probabilities may be bfloat16's."""
    repeats = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double().repeat_interleave(repeats, 1), value.double()
    scores = scale * query @ key.transpose(2, 3)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    probabilities = scores.masked_fill(later, -torch.inf).softmax(-1)
    probabilities = probabilities.bfloat16().double() if rounded else probabilities
    return (probabilities @ value.repeat_interleave(repeats, 1)).transpose(1, 2)


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(1, 2),
    shared=st.sampled_from([1, 2, 3]),
    repeats=st.sampled_from([1, 3]),
    length=st.sampled_from([1, 2, 127, 128, 129, 300]),
    size=st.sampled_from([16, 24]),
    scale=st.sampled_from([0.25, 0.0884]),
)
def test_it_is_the_formula(samples: int, shared: int, repeats: int, length: int, size: int, scale: float) -> None:
    query, key, value = inputs(samples, shared * repeats, shared, length, size)
    found = attend(query, key, value, scale)
    expected = formula(query, key, value, scale)
    assert found.shape == (samples, length, shared * repeats, size)
    # probabilities and what is returned are rounded to bfloat16, each by 2^-9 at most
    assert float((found.double() - expected).norm() / expected.norm()) < 2**-8


def test_it_is_no_further_from_the_formula_than_rounding_explains() -> None:
    """Torch's kernel is no measure: some processors give it wider units than others."""
    query, key, value = inputs(2, 6, 2, 256, 64, spread=1.5)
    expected = formula(query, key, value, 0.125)
    ours = attend(query, key, value, 0.125).double()
    rounded = formula(query, key, value, 0.125, rounded=True).bfloat16().double()
    assert (ours - expected).norm() <= 1.05 * (rounded - expected).norm()


@pytest.mark.parametrize("grad", [True, False])
def test_gradients_and_masks_go_through_torch(grad: bool) -> None:
    query, key, value = inputs(1, 4, 4, 40, 16)
    module = torch.nn.Module()
    module.is_causal = True
    mask = None if grad else torch.ones(40, 40, dtype=torch.bool).tril(0).triu(-3)[None, None]
    query.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        found, _ = forward(module, query, key, value, mask, scaling=0.25)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=grad, scale=0.25)
    assert torch.equal(found, expected.transpose(1, 2))
    assert found.requires_grad == grad
