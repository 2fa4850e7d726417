"""Text that a model writes by sampling, many sequences side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

CACHE_BYTES = 768_000_000
"""What the keys and values of the sequences that are written side by side may take."""
MOST = 128
"""Sequences side by side, at most."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in tensors with room for more, so that a token is not paid for with a copy of all before it."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Appends keys and values `[samples, heads, new, size]`; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._room: list[torch.Tensor] = []
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        if not self._room or stop > self._room[0].shape[2]:
            old, wide = self._room, max(64, 2 * stop)
            self._room = [new.new_empty(*new.shape[:2], wide, new.shape[3]) for new in (key_states, value_states)]
            for before, room in zip(old, self._room, strict=False):
                room[:, :, :start] = before[:, :, :start]
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:stop] = new
        self.keys, self.values = (room[:, :, :stop] for room in self._room)
        return self.keys, self.values


def side_by_side(config: Any, length: int) -> int:
    """Returns how many sequences of a length are written at once."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    each = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * size * 2 * length
    return int(max(1, min(MOST, CACHE_BYTES // each)))


@torch.inference_mode()
def write(
    model: Any, prompts: torch.Tensor, length: int, generator: torch.Generator, report: Callable[[int], None]
) -> torch.Tensor:
    """Returns `prompts` `[sequences, some]` with what the model samples after them, `[sequences, length]`.

    Args:
        model: a causal language model of transformers.
        prompts: token ids to begin with, equally many for every sequence.
        length: tokens of a sequence, prompt included.
        generator: of the random numbers, on the CPU.
        report: told how many tokens there are.
    """
    found = []
    count = side_by_side(model.config, length)
    for first in range(0, len(prompts), count):
        now = prompts[first : first + count]
        whole, cache = [now], Cache(layer_class_to_replicate=RoomyLayer)
        for position in range(prompts.shape[1], length):
            output = model(input_ids=now.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
            probabilities = torch.softmax(output.logits[:, -1].float(), -1).cpu()
            now = torch.multinomial(probabilities, 1, generator=generator)
            whole.append(now)
            report(first * length + len(now) * (position + 1))
        found.append(torch.cat(whole, 1))
    return torch.cat(found)
