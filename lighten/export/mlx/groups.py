"""What MLX can hold of a quantized directory's groups, looked at before any work."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from lighten.errors import RequestError

if TYPE_CHECKING:
    from lighten.model.checkpoint import Checkpoint

GROUPS = (128, 64, 32)
"""Numbers of weights that can share a scale, largest first."""


def check_groups(checkpoint: Checkpoint) -> None:
    """Checks that groups are runs of neighbouring inputs, in multiples of 32.

    Raises:
        RequestError: they are not; the message names the first linear.
    """
    settings = checkpoint.quantization or {}
    for size in _sizes(settings):
        if size > 0 and size % GROUPS[-1]:
            raise RequestError(f"{checkpoint.path} has groups of {size} weights, and those of MLX have 32, 64 or 128")
    for name in checkpoint.weight_map:
        if name.endswith("g_idx"):
            places = _read(checkpoint, name)
            if any(one > other for one, other in pairwise(places)):
                raise refused(name.rpartition(".")[0])


def refused(linear: str) -> RequestError:
    """Returns the error for a linear whose groups are scattered by act-order."""
    return RequestError(
        f"the groups of {linear} are scattered over its inputs (desc_act), and MLX holds groups of neighbours only: "
        "quantize with desc_act: static, which rounds in the same order and keeps groups together"
    )


def largest(places: list[int]) -> int | None:
    """Returns the largest number of neighbours that MLX can give one scale; None if there is none.

    Args:
        places: the group of every input.
    """
    return next((size for size in GROUPS if not len(places) % size and _uniform(places, size)), None)


def _uniform(places: list[int], size: int) -> bool:
    return all(len(set(places[start : start + size])) == 1 for start in range(0, len(places), size))


def _sizes(settings: dict[str, Any]) -> list[int]:
    """Returns the sizes of groups in a `quantization_config`."""
    groups = [each.get("weights") or {} for each in (settings.get("config_groups") or {}).values()]
    found = [each.get("group_size") for each in (settings, *groups)]
    return [size for size in found if isinstance(size, int)]


def _read(checkpoint: Checkpoint, name: str) -> list[int]:
    """Returns a tensor of whole numbers, without torch."""
    with safe_open(checkpoint.path / checkpoint.weight_map[name], framework="numpy") as shard:
        return [int(each) for each in shard.get_tensor(checkpoint.stored[name])]
