"""Writing several texts at the same time in transformers, padded on the left."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lighten.evaluate.runtimes.runtime import Choose

CACHE_BYTES = {"cpu": 1_600_000_000, "cuda": 8_000_000_000}
"""Maximum number of bytes of the keys and values of a batch, as if they were float32, by the kind of device."""
PROMPT_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Maximum number of tokens of the prompts of a batch."""


@torch.inference_mode()
def write_batch(model: nn.Module, prompts: Mapping[int, list[int]], most: Sequence[int], choose: Choose) -> None:
    """Continues after several prompts together. See `Runtime.decode_many`.

    A text that has ended stays in the batch, unseen, until half of the texts have. Then those leave it.

    Args:
        model: a causal language model of transformers.
        prompts: ids of each prompt, by its number.
        most: tokens of each text, at most, by the same numbers.
        choose: chooses every token.
    """
    device = next(model.parameters()).device
    width = max(map(len, prompts.values()))
    ids = torch.tensor([[0] * (width - len(each)) + each for each in prompts.values()], device=device)
    mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts.values()], device=device)
    rows: list[int | None] = list(prompts)
    left = {number: most[number] for number in prompts}
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    cache: Any = None
    while any(row is not None for row in rows):
        given: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        if takes_positions:
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(input_ids=ids, attention_mask=mask, **given)
        cache = output.past_key_values
        logits = output.logits[:, -1].float().cpu().numpy()
        chosen = [0] * len(rows)
        for place, number in enumerate(rows):
            if number is None:
                continue
            token = choose(number, logits[place])
            left[number] -= 1
            if token is None or not left[number]:
                rows[place] = None
            else:
                chosen[place] = token
        ids = torch.tensor(chosen, device=device)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        alive = [place for place, number in enumerate(rows) if number is not None]
        if alive and 2 * len(alive) <= len(rows) and _selects(cache):
            ids, mask = _leave(cache, torch.tensor(alive, device=device), ids, mask)
            rows = [rows[place] for place in alive]


def _selects(cache: Any) -> bool:
    """Returns whether texts can be taken out of every layer of a cache."""
    return all(hasattr(layer, "batch_select_indices") for layer in getattr(cache, "layers", [None]))


def _leave(cache: Any, alive: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Takes all texts but those at `alive` out of the cache. Returns what is left of `ids` and `mask`."""
    cache.batch_select_indices(alive)
    return ids[alive], mask[alive]
