"""Causal attention on a CPU that multiplies bfloat16, for whole sequences at once.

torch's kernel computes the scores of the full square, with products that are slow on some CPUs. Here a block of queries
meets only the keys up to its end, and the query heads that share a key head are one product. Scores and probabilities
are float32. Only the products take bfloat16 inputs.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lighten.model.products import exact_products

NAME = "lighten_causal"
_ASKS = re.compile(r"""_attn_implementation (in \(|== "sdpa")""")
BLOCK = 128
"""Number of queries whose scores are in memory at a time, for every head of one sequence."""


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns softmax(scale · QKᵀ, keys up to each query's own position) V.

    Args:
        query: `[samples, heads, length, head_dim]`, bfloat16.
        key: `[samples, key heads, length, head_dim]`; every key head serves as many query heads that follow another.
        value: like `key`.
        scale: what the scores are multiplied by.

    Returns:
        `[samples, length, heads, head_dim]`.
    """
    samples, heads, length, size = query.shape
    shared = key.shape[1]
    out = query.new_empty(samples, length, heads, size)
    later = torch.full((BLOCK, BLOCK), -torch.inf).triu_(1)
    with exact_products(query.dtype):
        for sample in range(samples):
            wide = query[sample].float().view(shared, heads // shared, length, size)
            keys, values = key[sample].float().transpose(1, 2), value[sample].float()
            for start in range(0, length, BLOCK):
                stop = min(start + BLOCK, length)
                rows = wide[:, :, start:stop].reshape(shared, -1, size)
                scores = torch.bmm(rows, keys[:, :, :stop]).mul_(scale)
                each = scores.view(shared, -1, stop - start, stop)
                each[..., start:] += later[: stop - start, : stop - start]
                torch.softmax(scores, -1, out=scores)
                part = torch.bmm(scores, values[:, :stop]).view(heads, stop - start, size)
                out[sample, start:stop] = part.transpose(0, 1)
    return out


def attend_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Returns the attention of one query of every head and sequence to all keys: `attend` for the next token.

    Query heads that share a key head are one product, so that keys are read once. Products are float32, because torch's
    bfloat16 products with so few rows are slow on a CPU. Keys and values that are already float32 are not copied.
    """
    samples, heads, _, size = query.shape
    shared = key.shape[1]
    wide = query.float().view(samples, shared, heads // shared, size).mul(scale)
    scores = wide @ key.float().transpose(2, 3)
    found = torch.softmax(scores, -1, out=scores) @ value.float()
    return found.reshape(samples, 1, heads, size).to(query.dtype)


def forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`attend` where it applies, in the form that transformers calls; torch's own kernel elsewhere."""
    plain = attention_mask is None and key.shape[-1] == value.shape[-1]
    fast = query.dtype == torch.bfloat16 and query.device.type == "cpu" and not torch.is_grad_enabled()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if plain and fast and query.shape[2] == 1:
        return attend_one(query, key, value, scale), None
    plain = plain and query.shape[2] == key.shape[2]
    if plain and fast and kwargs.get("is_causal", getattr(module, "is_causal", False)) is not False:
        return attend(query, key, value, scale), None
    found = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return found[0], None


def suited(model: Any) -> str:
    """Returns the kernel of attention that computes what a model's own eager code computes.

    The kernels here and in torch know no soft caps and no sinks. A class that needs either says that it takes no sdpa,
    or has a cap in its config. A class whose code asks whether the kernel is torch's gets that one.
    """
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if capped or not getattr(model, "_supports_sdpa", False):
        return "eager"
    code = sys.modules.get(type(model).__module__)
    try:
        asks = code is not None and _ASKS.search(inspect.getsource(code)) is not None
    except (OSError, TypeError):
        asks = True
    return NAME if getattr(model, "_supports_attention_backend", False) and not asks else "sdpa"


AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
