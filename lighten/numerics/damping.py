"""Damping: a share of a Gram's mean diagonal is added to its diagonal, so that the Gram can be inverted.

`damped` adds the share that it is given. `inverse_factor` raises the share until the Gram can be inverted.
"""

from __future__ import annotations

import torch

DAMPINGS = 10
"""Maximum number of shares that are tried."""
LEAF = 128
"""Maximum width of a triangular matrix that is inverted at once."""


def damped(gram: torch.Tensor, damp_percent: float) -> torch.Tensor:
    """Returns H with a share of its mean diagonal added, so that it can be inverted."""
    found = gram.clone()
    found.diagonal().add_(damp_percent * float(gram.diagonal().mean()) or 1.0)
    return found


def inverse_factor(gram: torch.Tensor, damp_percent: float) -> tuple[torch.Tensor, float]:
    """Returns U, upper triangular with (H + damping)⁻¹ = UᵀU, and the share of mean diag(H) added.

    With the rows and columns of H in reverse order, its Cholesky factor read backwards is an upper triangular R with H
    = RRᵀ, so U = R⁻¹. This takes one factorisation and one triangular inverse. If H is not positive definite, the
    damping is raised tenfold, up to ten times.

    Raises:
        ArithmeticError: no damping made H positive definite.
    """
    mean = gram.diagonal().mean()
    damping = damp_percent
    for _ in range(DAMPINGS):
        raised = gram.clone()
        raised.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(raised.flip(0, 1))
        if not failed and torch.isfinite(lower.diagonal()).all():
            return triangular_inverse(lower.flip(0, 1)), damping
        damping = max(damping, 1e-4) * 10
    raise ArithmeticError(f"not positive definite even with {damping / 10:g} of its mean diagonal added")


def triangular_inverse(upper: torch.Tensor) -> torch.Tensor:
    """Returns the inverse of an upper triangular matrix, block by block: a third of the products of a solve."""
    width = len(upper)
    if width <= LEAF:
        eye = torch.eye(width, device=upper.device)
        inverted: torch.Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
        return inverted
    half = width // 2
    inverse = torch.zeros_like(upper, memory_format=torch.contiguous_format)
    first = inverse[:half, :half] = triangular_inverse(upper[:half, :half])
    last = inverse[half:, half:] = triangular_inverse(upper[half:, half:])
    inverse[:half, half:] = (first @ upper[:half, half:]).neg_() @ last
    return inverse
