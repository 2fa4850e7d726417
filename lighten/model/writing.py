"""Text that a model writes by sampling, many sequences side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from lighten.model.architectures import ARCHITECTURES

CACHE_BYTES = 1_600_000_000
"""Maximum number of bytes of the keys and values of the sequences that are written side by side."""
MOST = 128
"""Maximum number of sequences side by side."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in tensors with room for all tokens to come, so that adding a token copies nothing.

    On a CPU they are float32, the type that `attention.attend_one` multiplies.
    """

    def __init__(self, length: int) -> None:
        """Makes room for sequences of a length."""
        super().__init__()
        self._length = length

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Appends keys and values `[samples, heads, new, size]`. Returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            dtype = torch.float32 if key_states.device.type == "cpu" else key_states.dtype
            states, room = (key_states, value_states), self._length
            self._room = [new.new_empty(*new.shape[:2], room, new.shape[3], dtype=dtype) for new in states]
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        for room_of, new in zip(self._room, (key_states, value_states), strict=True):
            room_of[:, :, start:stop] = new
        self.keys, self.values = (room_of[:, :, :stop] for room_of in self._room)
        if start == 0:  # the prompt meets itself alone, in the type it came in
            return key_states, value_states
        return self.keys, self.values


def side_by_side(config: Any, length: int, budget: int = CACHE_BYTES) -> int:
    """Returns the number of sequences of a length that are written at once, with `budget` bytes for keys and values.

    Where a config does not tell the heads, a token counts as if it left keys and values as wide as its states.
    """
    text = config.get_text_config()
    heads, hidden = getattr(text, "num_attention_heads", None), int(text.hidden_size)
    size = getattr(text, "head_dim", None) or (hidden // heads if heads else hidden)
    shared = getattr(text, "num_key_value_heads", None) or heads or 1
    each = 2 * text.num_hidden_layers * shared * size * 4 * length
    return int(max(1, min(MOST, budget // each)))


class _Told(StoppingCriteria):  # type: ignore[misc]
    """Reports every token, and stops nothing."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self.report = report

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Reports the number of tokens. Returns for every sequence that it goes on."""
        self.report(input_ids.numel())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generated(
    model: Any, prompts: torch.Tensor, length: int, generator: torch.Generator, report: Callable[[int], None]
) -> torch.Tensor:
    """Returns what `write` returns, by transformers' own loop, which knows the states of every family."""
    found = []
    count = side_by_side(model.config, length)
    own = model.generation_config
    try:
        # what the model's own file says of other ways to sample, and of ends of texts, is for conversations
        model.generation_config = GenerationConfig()
        for first in range(0, len(prompts), count):
            now = prompts[first : first + count].to(model.device)
            seed = int(torch.randint(0, 2**31 - 1, (1,), generator=generator))
            how = GenerationConfig(
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=length - now.shape[1],
                pad_token_id=0,
            )
            told = _Told(lambda done, first=first: report(first * length + done))  # type: ignore[misc]
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                written = model.generate(
                    now,
                    attention_mask=torch.ones_like(now),
                    generation_config=how,
                    stopping_criteria=StoppingCriteriaList([told]),
                )
            found.append(written.cpu())
    finally:
        model.generation_config = own
    return torch.cat(found)


@torch.inference_mode()
def write(
    model: Any, prompts: torch.Tensor, length: int, generator: torch.Generator, report: Callable[[int], None]
) -> torch.Tensor:
    """Returns `prompts` `[sequences, some]` with what the model samples after them, `[sequences, length]`.

    Args:
        model: a causal language model of transformers.
        prompts: token ids to begin with, equally many for every sequence.
        length: tokens of a sequence, prompt included.
        generator: generator of the random numbers, on the CPU.
        report: called with the number of tokens.
    """
    if type(model).__name__ not in ARCHITECTURES:
        return _generated(model, prompts, length, generator, report)
    found = []
    count = side_by_side(model.config, length)
    for first in range(0, len(prompts), count):
        now = prompts[first : first + count]
        whole, cache = [now], Cache(layers=[RoomyLayer(length) for _ in range(model.config.num_hidden_layers)])
        for position in range(prompts.shape[1], length):
            output = model(input_ids=now.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
            probabilities = torch.softmax(output.logits[:, -1].float(), -1).cpu()
            now = torch.multinomial(probabilities, 1, generator=generator)
            whole.append(now)
            report(first * length + len(now) * (position + 1))
        found.append(torch.cat(whole, 1))
    return torch.cat(found)
