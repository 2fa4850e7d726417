"""Means and turned halves as products: the same numbers, and the operators that are spared."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lighten.export.executorch.products import WIDEST, Constants, Products


def turned(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def partly(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([turned(x[..., :16]), x[..., 16:]], dim=-1)


def normed(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("function", [turned, partly, normed])
def test_products_give_the_same(function: Any) -> None:
    x, constants = torch.randn(1, 3, 5, 32, generator=torch.Generator().manual_seed(0)), Constants()
    with Products(constants):
        found = function(x)
    assert torch.allclose(found, function(x), rtol=1e-5, atol=1e-6) and list(constants.buffers())


def test_a_traced_model_has_them_as_its_own() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constants = Constants()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with Products(self.constants):
                return normed(turned(x))

    model, x = Model(), torch.randn(2, 3, 64)
    wanted = model(x)
    shapes = ({1: torch.export.Dim("tokens", min=1, max=9)},)
    traced = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
    traced = traced.run_decompositions({})
    names = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert not [name for name in names if "cat" in name or "mean" in name or "slice" in name]
    assert torch.allclose(traced.module()(x), wanted, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mean(-1),
        lambda x: x.mean(1, keepdim=True),
        lambda x: torch.cat((x[..., :8], x[..., 8:]), dim=0),
        lambda x: torch.cat((x[..., ::2], x[..., 1::2]), dim=-1),
        lambda x: torch.cat((x[..., :8], 2 * x[..., 8:]), dim=-1),
    ],
)
def test_the_rest_stays(function: Any) -> None:
    x, constants = torch.randn(2, 3, 16), Constants()
    with Products(constants):
        found = function(x)
    assert torch.equal(found, function(x)) and not list(constants.buffers())


def test_dimensions_that_change_and_constants_that_are_missing_stay() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constants = Constants()
            self.constants.fixed = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with Products(self.constants):
                turned_rows = x.transpose(0, 1)  # its last dimension changes
                return (
                    torch.cat((turned_rows[..., 1:], turned_rows[..., :1]), dim=-1).mean(-1, keepdim=True)
                    + normed(x).mean()
                )

    model, x = Model(), torch.randn(4, 8)
    traced = torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=3, max=9)},), strict=False
    )
    other = torch.randn(7, 8)
    assert torch.allclose(traced.module()(other), model(other)) and not list(model.constants.buffers())


def test_wide_vectors_stay() -> None:
    x, constants = torch.randn(2, WIDEST * 2), Constants()
    with Products(constants):
        found = turned(x)
    assert torch.equal(found, turned(x)) and not list(constants.buffers())


def rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embeddings as transformers computes them, of heads that lie behind the positions; turned back."""
    x = heads.transpose(1, 2)
    return (x * cos.unsqueeze(1) + turned(x) * sin.unsqueeze(1) + 1.5).transpose(1, 2)


def test_heads_are_computed_as_they_lie() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constants = Constants()

        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            with Products(self.constants):
                return rotated(x, cos, sin)

    numbers = torch.Generator().manual_seed(0)
    given = tuple(torch.randn(shape, generator=numbers) for shape in ((1, 7, 3, 32), (1, 7, 32), (1, 7, 32)))
    model = Model()
    assert torch.allclose(model(*given), rotated(*given), rtol=1e-5, atol=1e-6)
    model.constants.fixed = True
    tokens = torch.export.Dim("tokens", min=2, max=9)
    traced = torch.export.export(model, given, dynamic_shapes=({1: tokens},) * 3, strict=False).run_decompositions({})
    turns = [node for node in traced.graph.nodes if "permute" in str(node.target) or "transpose" in str(node.target)]
    assert len(turns) == 2  # of the cosines and the sines, which all layers share
    assert torch.allclose(traced.module()(*given), rotated(*given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.transpose(1, 2) + torch.ones(5, 3)[..., None],  # rows of three dimensions, which would need turning
        lambda x: x.transpose(1, 2) * x.transpose(1, 2).sum(-1, keepdim=True),
        lambda x: (x.transpose(1, 2) * 2).transpose(2, 3),
        lambda x: x.transpose(1, 2).transpose(-3, -2) + x.transpose(0, 1).transpose(0, 1),
        lambda x: 2 + x.transpose(2, 1) * torch.arange(4.0),
    ],
)
def test_what_is_computed_of_turned_heads_is_the_same(function: Any) -> None:
    x = torch.randn(1, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    with Products(Constants()):
        found = function(x)
    assert found.shape == function(x).shape and torch.equal(found, function(x))


def test_a_shape_that_names_the_tokens_leaves_them_to_be_inferred() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with Products(Constants()):
                heads = x.view(*x.shape[:-1], -1, 8)
                return torch.reshape(heads + 1, (*x.shape[:2], -1)).reshape(x.shape[1], 16).view(-1).view(torch.int32)

    model, x = Model(), torch.randn(1, 5, 16)
    tokens = torch.export.Dim("tokens", min=2, max=9)
    traced = torch.export.export(model, (x,), dynamic_shapes=({1: tokens},), strict=False).run_decompositions({})
    shapes = [node.args[1] for node in traced.graph.nodes if node.op == "call_function" and "view" in str(node.target)]
    assert [list(each) for each in shapes[:3]] == [[1, -1, 2, 8], [1, -1, 16], [-1, 16]]
    other = torch.randn(1, 3, 16)
    assert torch.equal(traced.module()(other), model(other))
