"""Weights that are no numbers are found wherever they are."""

import pytest
import torch

from lighten.model.finite import finite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_one_number_is_enough(dtype: torch.dtype) -> None:
    sound = torch.randn(37, 101).to(dtype)
    broken = []
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 15, 16, 1000, -1):
            broken.append(sound.clone())
            broken[-1].view(-1)[place] = value
    assert finite([sound, *broken, sound.t()]) == [True, *[False] * len(broken), True]


def test_types_of_one_byte_and_types_that_are_always_finite() -> None:
    eighth = torch.randn(64).to(torch.float8_e5m2)
    broken = eighth.clone()
    broken[3] = float("inf")
    wave = torch.complex(torch.ones(3), torch.tensor([0.0, float("nan"), 0.0]))
    assert finite([eighth, broken, torch.arange(3), torch.empty(0), wave]) == [True, False, True, True, False]
    assert finite([]) == []
