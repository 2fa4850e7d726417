"""A causal language model with keys and values of its own, in the form that ExecuTorch's runner for texts calls.

The model is transformers' own code. Its attention goes to ExecuTorch's operator, which reads only the places of the
cache that are filled. Attention that this operator does not have is computed by plain operators over the whole cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lighten.errors import Failure
from lighten.export.executorch.linears import shared
from lighten.export.executorch.products import Constants, Products

ATTENTION = "lighten_executorch"
"""Name of this attention in transformers."""
_PROBED = 3
"""Tokens that show the shapes of a cache."""


@dataclass
class _Place:
    """Where the tokens of the present call stand."""

    start: Any = 0
    """Position of the first of them, `int` or a symbol."""
    context: int = 0
    """Positions of the cache."""


_PLACE = _Place()


class Layer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, in buffers `[1, context, heads, width]`."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """See transformers: the buffers are there already."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the states `[1, heads, n, width]` of the present tokens; returns those of all positions."""
        torch.ops.llama.update_cache(key_states.transpose(1, 2), self.keys, _PLACE.start)
        torch.ops.llama.update_cache(value_states.transpose(1, 2), self.values, _PLACE.start)
        return self.keys.transpose(1, 2), self.values.transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See transformers."""
        return _PLACE.context, 0

    def get_seq_length(self) -> int:
        """See transformers."""
        found: int = _PLACE.start
        return found

    def get_max_length(self) -> int:
        """See transformers."""
        return _PLACE.context


class Cached(nn.Module):
    """Takes ids `[1, n]` and the position of the first, `[1]`. Returns the logits of all, `[1, n, vocab]`."""

    def __init__(self, model: Any, context: int) -> None:
        """Gives a model its cache.

        Args:
            model: a causal model, loaded with the attention `ATTENTION`.
            context: positions of the cache.

        Raises:
            Failure: the model keeps something else than keys and values of all tokens.
        """
        super().__init__()
        self.model, self.context, self.constants = model, context, Constants()
        self._layers = len(shapes := _shapes(model, self.constants))
        self.constants.fixed = True
        for number, (keys, values) in enumerate(shapes):
            for name, (heads, width) in (("keys", keys), ("values", values)):
                self.register_buffer(f"{name}_{number}", torch.zeros(1, context, heads, width), persistent=False)

    def forward(self, input_ids: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        """See the class."""
        count = input_ids.shape[1]
        start = input_pos[0].item()
        for known in (start >= 0, start < self.context, start + count <= self.context):
            torch._check(known)  # type: ignore[no-untyped-call]
        buffers = [(getattr(self, f"keys_{n}"), getattr(self, f"values_{n}")) for n in range(self._layers)]
        with _placed(start, self.context), Products(self.constants), shared():
            found: torch.Tensor = self.model(
                input_ids=input_ids,
                position_ids=(torch.arange(count) + input_pos)[None],
                past_key_values=Cache(layers=[Layer(*each) for each in buffers]),
                use_cache=True,
            ).logits
        return found


def _shapes(model: Any, constants: Constants) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Returns heads and width of the keys and of the values of every layer, which a short text shows."""
    ids = torch.zeros((1, _PROBED), dtype=torch.int64)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad(), Products(constants):
            cache = model(input_ids=ids, use_cache=True).past_key_values
    finally:
        model.set_attn_implementation(ATTENTION)
    if not isinstance(cache, DynamicCache):
        raise Failure(f"{type(model).__name__} keeps a {type(cache).__name__}, which has no form in ExecuTorch")
    for layer in cache.layers:
        kept = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        if not kept or layer.keys.dim() != 4 or layer.keys.shape[2] != _PROBED:
            raise Failure(
                f"{type(model).__name__} keeps more than keys and values of its tokens ({type(layer).__name__}), which "
                "has no form in ExecuTorch"
            )
    return [
        ((each.keys.shape[1], each.keys.shape[3]), (each.values.shape[1], each.values.shape[3]))
        for each in cache.layers
    ]


@contextmanager
def _placed(start: Any, context: int) -> Iterator[None]:
    _PLACE.start, _PLACE.context = start, context
    try:
        yield
    finally:
        _PLACE.start, _PLACE.context = 0, 0


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Returns attention `[1, n, heads, width]` to all positions of a cache, in the form of transformers' functions."""
    odd = [name for name, given in others.items() if given is not None and name in ("position_bias", "block_table")]
    if odd:
        raise Failure(f"{type(module).__name__} attends with {odd[0]}, which has no form in ExecuTorch")
    if softcap is None and s_aux is None and key.shape == value.shape and query.shape[-1] == key.shape[-1]:
        q, k, v = (each.transpose(1, 2) for each in (query, key, value))
        causal = attention_mask is None
        return torch.ops.llama.custom_sdpa(q, k, v, _PLACE.start, attention_mask, 0.0, causal, scaling), None
    return _plain(query, key, value, attention_mask, scaling, softcap, s_aux), None


def _plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Returns the same by plain operators."""
    shared = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(shared, 1) for each in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + (_mask(query.shape[2], causal_mask_function) if mask is None else mask)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(1, -1, query.shape[2], 1)
        shares = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        shares = scores.softmax(-1)
    return (shares @ value).transpose(1, 2)


def _mask(count: int, allowed: Callable[..., Any]) -> torch.Tensor:
    """Returns 0 where a token `[count]` attends to a position `[context]`, and minus infinity elsewhere."""
    zero = torch.zeros((1, 1), dtype=torch.int64)
    mine = (torch.arange(count) + _PLACE.start)[:, None]
    theirs = torch.arange(_PLACE.context)[None]
    seen = allowed(zero, zero, mine, theirs)
    return torch.where(seen, 0.0, float("-inf"))


def mask(*_: Any, q_length: int, mask_function: Callable[..., Any] = causal_mask_function, **__: Any) -> Any:
    """Returns the mask of a kind of layers, `[n, context]`; None for plain causal ones, which need none."""
    return None if mask_function is causal_mask_function else _mask(q_length, mask_function)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, mask)
