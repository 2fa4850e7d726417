"""The linears that a pattern names, and the weights that are zero."""

from __future__ import annotations

import fnmatch
import re

import torch

MASKED = 0.25
"""Share of exact zeros from which a matrix counts as pruned. Rounding alone leaves far fewer."""


def ignored(name: str, patterns: tuple[str, ...]) -> str | None:
    """Returns the first pattern that a module's full name matches, or None."""
    for pattern in patterns:
        found = re.search(pattern[3:], name) if pattern.startswith("re:") else fnmatch.fnmatchcase(name, pattern)
        if found:
            return pattern
    return None


def zeros_of(weights: list[torch.Tensor]) -> torch.Tensor | None:
    """Returns which weights of pruned, stacked matrices are zero; None if none of them was pruned."""
    zeros = [weight == 0 for weight in weights]
    pruned = [float(each.float().mean()) >= MASKED for each in zeros]
    if not any(pruned):
        return None
    return torch.cat([each if was else torch.zeros_like(each) for each, was in zip(zeros, pruned, strict=True)])
