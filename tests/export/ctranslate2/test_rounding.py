"""Weights lie on the grid of CTranslate2's converter, whose codes are then those that error feedback chose."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lighten.export.ctranslate2 import rounding
from lighten.export.ctranslate2.rounding import MOST, round_linears, rounded
from lighten.step import silent


def problem(seed: int, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a weight, and inputs that depend on each other."""
    torch.manual_seed(seed)
    return torch.randn(outputs, inputs), torch.randn(4 * inputs, inputs) @ torch.randn(inputs, inputs)


def nearest(weight: torch.Tensor) -> torch.Tensor:
    scales = weight.abs().amax(1, keepdim=True) / MOST
    return (weight / scales).round() * scales


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(2, 24))
def test_the_converter_finds_the_same_codes_again(seed: int, outputs: int, inputs: int) -> None:
    weight, x = problem(seed, outputs, inputs)
    found = rounded(weight, x.t() @ x)
    torch.testing.assert_close(found.abs().amax(1), weight.abs().amax(1))
    codes = found / (found.abs().amax(1, keepdim=True) / MOST)
    assert float((codes - codes.round()).abs().max()) < 1e-3


def test_outputs_are_closer_than_by_nearest_codes() -> None:
    weight, x = problem(0, 64, 48)
    found = rounded(weight, x.t() @ x)
    error = float(((found - weight) @ x.t()).square().sum())
    assert error < 0.6 * float(((nearest(weight) - weight) @ x.t()).square().sum())


def test_inputs_that_never_come_keep_their_weights() -> None:
    weight, x = problem(1, 16, 24)
    x[:, 7] = 0
    found = rounded(weight, x.t() @ x)
    step = weight.abs().amax(1) / MOST
    assert bool(((found - weight)[:, 7].abs() <= step / 2 + 1e-6).all())
    assert bool((found[:, 7] != 0).any())


def test_the_librarys_codes_are_ours() -> None:
    specs = pytest.importorskip("ctranslate2.specs")
    weight, x = problem(2, 32, 40)
    found = rounded(weight, x.t() @ x)
    spec = specs.common_spec.LinearSpec()
    spec.weight = found.numpy().copy()
    spec.bias = np.zeros(32, np.float32)
    spec.validate()
    spec.optimize(quantization="int8")
    back = spec.weight.numpy().astype(np.float32) / spec.weight_scale.numpy()[:, None]
    np.testing.assert_allclose(back, found.numpy(), rtol=1e-5, atol=1e-6)


class Two(nn.Module):
    """Two linears that read the same inputs, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 24)
        self.a, self.b, self.c = nn.Linear(24, 16), nn.Linear(24, 16), nn.Linear(16, 8)
        self.never = nn.Linear(24, 4)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        rows = self.table(input_ids)
        return self.c(self.a(rows) * self.b(rows))


@pytest.mark.parametrize("at_once", [1, 2**31])
def test_all_linears_that_run_are_rounded_with_little_memory_too(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "AT_ONCE", at_once)
    torch.manual_seed(3)
    model, ids = Two(), torch.randint(0, 50, (2, 64))
    kept, before = {name: each.weight.detach().clone() for name, each in model.named_children()}, model(ids)
    told = round_linears(model, ids, silent)
    assert told == {"linears_rounded_with_feedback": 3, "linears_rounded_to_nearest": 1}
    assert torch.equal(kept["never"], model.never.weight)
    for name in "abc":
        weight = model.get_submodule(name).get_parameter("weight")
        codes = weight / (weight.abs().amax(1, keepdim=True) / MOST)
        assert float((codes - codes.round()).abs().max()) < 1e-3
        assert not torch.equal(kept[name], weight)
    assert float((model(ids) - before).abs().max()) < 0.05 * float(before.abs().max())
