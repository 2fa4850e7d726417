"""Damping, and the factor of the inverse that GPTQ and SparseGPT walk along."""

import pytest
import torch

from lighten.numerics.damping import damped, inverse_factor


@pytest.fixture
def gram() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 64, generator=generator) @ (torch.randn(64, 64, generator=generator) / 8)
    return inputs.t() @ inputs


def test_a_share_of_the_mean_diagonal_is_added_to_the_diagonal(gram: torch.Tensor) -> None:
    added = damped(gram, 0.01) - gram
    assert torch.allclose(added.diagonal(), 0.01 * gram.diagonal().mean().expand(64), rtol=1e-3)
    assert (added - added.diagonal().diag() == 0).all()
    assert torch.equal(damped(torch.zeros(4, 4), 0.01), torch.eye(4)), "inputs that are always zero"


def test_inverse_factor_is_the_upper_cholesky_factor_of_the_inverse(gram: torch.Tensor) -> None:
    factor, damping = inverse_factor(gram, 0.01)
    inverse = torch.linalg.inv(damped(gram, 0.01).double())
    assert damping == 0.01
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor, torch.linalg.cholesky(inverse, upper=True).float(), rtol=1e-3, atol=1e-6)


def test_damping_is_raised_until_the_gram_is_positive_definite(gram: torch.Tensor) -> None:
    indefinite = gram - 0.05 * gram.diagonal().mean() * torch.eye(64)
    indefinite -= torch.linalg.eigvalsh(indefinite)[0].clamp(min=0) * torch.eye(64)
    factor, damping = inverse_factor(indefinite, 1e-6)
    assert damping > 1e-6
    assert torch.isfinite(factor).all()


def test_a_hopeless_gram_is_an_error() -> None:
    with pytest.raises(ArithmeticError, match="not positive definite"):
        inverse_factor(torch.full((4, 4), float("nan")), 0.01)
