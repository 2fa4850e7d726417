"""What a block adds to its states, on blocks of real families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lighten.model import whole
from lighten.observe.residual import added, adds_up
from tests.families.models import make


def watched(family: str, folder: Path) -> dict[str, float]:
    """Returns what the second block of a model of a family adds."""
    make(family, folder)
    model = whole.load(folder, torch.float32).eval()
    (name,) = (name for name, each in model.named_modules() if name.endswith((".layers.1", ".h.1")))
    block: Any = model.get_submodule(name)
    calls: list[tuple[Any, ...]] = []
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.arange(40)[None] % 50, use_cache=False)
        hook.remove()
        (args, kwargs), own = calls[0], block.forward
        modules = {name: each for name, each in block.named_modules() if name and not list(each.children())}
        outer = {name: each for name, each in modules.items() if isinstance(each, nn.Linear) or "Conv1D" in str(each)}
        stacks = {name: each for name, each in block.named_modules() if type(each).__name__.endswith("Experts")}
        return added(own, args, kwargs, outer | stacks)


@pytest.mark.parametrize(
    ("family", "names", "factor"),
    [
        ("llama", ("self_attn.o_proj", "mlp.down_proj"), 1.0),
        ("gpt2", ("attn.c_proj", "mlp.c_proj"), 1.0),
        ("qwen3_moe", ("self_attn.o_proj", "mlp.experts"), 1.0),
        ("granite", ("self_attn.o_proj", "mlp.down_proj"), None),
    ],
)
def test_outputs_that_are_added_are_found(
    family: str, names: tuple[str, ...], factor: float | None, tmp_path: Path
) -> None:
    found = watched(family, tmp_path)
    assert set(found) == set(names)
    wanted = [factor or whole.load(tmp_path, torch.float32).config.residual_multiplier] * 2
    assert list(found.values()) == pytest.approx(wanted, rel=1e-3)


def test_a_block_that_norms_what_it_adds_is_left_alone(tmp_path: Path) -> None:
    assert watched("gemma3_text", tmp_path) == {}


def test_a_block_that_writes_into_its_states_is_left_alone() -> None:
    linear = nn.Linear(8, 8)
    states = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert added(lambda x: x + linear(x), (states.clone(),), {}, {"linear": linear}) == {"linear": 1.0}
        assert added(lambda x: x.add_(linear(x)), (states.clone(),), {}, {"linear": linear}) == {}


def test_sums_are_told_from_what_is_near_them() -> None:
    states, part = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)), torch.ones(6, 8)
    assert adds_up(states.bfloat16(), [part.bfloat16()], (states + 1).bfloat16())
    assert not adds_up(states, [part], states + 1.1)
