"""Trials on blocks with experts, whose matrices lie in one another."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lighten.model import blockwise
from lighten.model.channels import prunable_of
from lighten.model.checkpoint import Checkpoint
from lighten.model.empty import Filler, empty_model
from lighten.model.folds import Fold
from lighten.model.kinds import INSIDE, of_kinds
from tests.families.models import config_of

WIDTH = 2 * INSIDE


def saved(family: str, folder: Path, **settings: Any) -> Checkpoint:
    config = config_of(family, 300, {"moe_intermediate_size": WIDTH, **settings})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return Checkpoint(folder)


def stored_bytes(block: nn.Module) -> int:
    return sum(
        {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in block.parameters()}.values()
    )


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4_text", "gpt_oss"])
def test_a_block_of_many_experts_takes_little_memory(family: str, tmp_path: Path) -> None:
    settings = {"num_experts": 64, "num_local_experts": 64, "intermediate_size": WIDTH}
    checkpoint = saved(family, tmp_path, **settings)
    anatomy = blockwise.known_anatomy(checkpoint, None)
    experts = max(sum(math.prod(each.shape) for each in layer.linears if each.inside) for layer in anatomy.layers)
    assert experts > 64 * 2 * WIDTH * 64
    model = empty_model(checkpoint, torch.float32)
    Filler(model, checkpoint.weight_map)
    sizes = of_kinds(model, anatomy, lambda layer, block, turn, call: stored_bytes(block))
    assert max(sizes.values()) < experts  # a quarter of the experts in float32
    assert prunable_of(checkpoint, anatomy)


def test_folds_of_narrowed_experts_are_those_of_the_model(tmp_path: Path) -> None:
    apart, both = (tmp_path / name for name in ("apart", "both"))
    checkpoint = saved("qwen3_moe", apart)
    found = blockwise.known_folds(checkpoint, blockwise.known_anatomy(checkpoint, None))[0]
    assert Fold(("mlp.experts.3.down_proj",), "mlp.experts.3.up_proj") in found
    checkpoint = saved("llama4_text", both, intermediate_size=WIDTH)
    found = blockwise.known_folds(checkpoint, blockwise.known_anatomy(checkpoint, None))[1]
    assert Fold(("feed_forward.experts.3.down_proj",), "feed_forward.experts.3.up_proj") in found


def test_experts_whose_gate_is_bounded_take_no_scale(tmp_path: Path) -> None:
    checkpoint = saved("gpt_oss", tmp_path, intermediate_size=WIDTH)
    found = blockwise.known_folds(checkpoint, blockwise.known_anatomy(checkpoint, None))[0]
    assert found
    assert not [fold for fold in found if "experts" in fold.before]


def test_a_visit_that_fails_tells_why(tmp_path: Path) -> None:
    """A first run that leaves layers out may fail; the second, with all of them, says what is wrong."""
    checkpoint = saved("qwen3_moe", tmp_path)
    model = empty_model(checkpoint, torch.float32)
    anatomy = blockwise.known_anatomy(checkpoint, None)
    visits = []

    def visit(layer: Any, *_: Any) -> None:
        visits.append(layer.module)
        raise ArithmeticError("this block is wrong")

    with pytest.raises(ArithmeticError, match="this block is wrong"):
        of_kinds(model, anatomy, visit)
    assert len(visits) == 2


def test_the_trials_of_a_model_find_the_same_each_time(tmp_path: Path) -> None:
    """OPT reads the weights of its positions itself: what stands for them is drawn from the same numbers too."""
    checkpoint = saved("opt", tmp_path)
    anatomy = blockwise.known_anatomy(checkpoint, None)
    for _ in range(3):
        for found in prunable_of(checkpoint, anatomy):
            assert found.mlp and found.mlp.reader == "fc2"
            assert found.heads and found.heads.reader == "self_attn.out_proj"
