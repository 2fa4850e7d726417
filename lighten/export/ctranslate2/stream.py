"""A model turned so that no input of its linears is much louder than the others; what it computes stays the same.

CTranslate2 rounds the inputs of linears to 8 bits while it runs, all inputs of a token with one scale, so a loud input
takes the digits of the others. Two changes of the weights help, and cost nothing when the model runs:

- The states between the blocks are turned by an orthogonal matrix: what makes them (embeddings, the last linear of
  attention and MLP) is turned, and what reads them, behind a norm, is turned back (Ashkboos et al., "QuaRot", 2024).
  The matrix leaves the mean of the states as it is, so this holds behind a LayerNorm as well as behind an RMSNorm.
- Inputs that are still louder than others are divided by a number each, which a norm can do.

Norms, their readers and the writers are found by watching a run. Whether the model still computes the same is then
seen on a text; a model with another structure does not, and is not changed.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lighten.export.ctranslate2.matrices import is_linear, matrix, place
from lighten.model.folds import is_norm

POWER = 0.25
"""Power of the loudness that inputs are divided by. On SmolLM2-135M, of 0, 1/4 and 1/2 it cost the fewest nats."""
TOLERANCE = 1e-4
"""Largest change of a logit, as a share of the largest logit, that counts as the same: float32 leaves about 1e-6."""
WATCHED = 64
"""Tokens that show how a model is built, and whether it still computes the same."""


@dataclass
class Norm:
    """A norm of the states, and what reads it."""

    module: nn.Module
    offset: float
    """1 if it multiplies by 1 + weight."""
    readers: list[Any] = field(default_factory=list)


@dataclass
class Stream:
    """What writes and reads the states between the blocks."""

    norms: list[Norm]
    writers: list[Any]
    tables: list[nn.Embedding]
    unread: list[nn.Module]
    """Norms as wide as the states that no linear reads, so that they may write to them."""


@torch.no_grad()
def changed(model: Any, ids: torch.Tensor, *, turned: bool) -> bool:
    """Makes the inputs of linears behind norms more alike. Returns whether the model still computes the same.

    If it does not, its weights are of no use any more.

    Args:
        model: a causal model in float32. Its head gets a weight of its own.
        ids: tokens, `[samples, length]`.
        turned: turns the states too.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return False
    if head.weight is table.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    seen = ids[:1, :WATCHED]
    before = model(input_ids=seen, use_cache=False).logits
    stream = watched(model, seen)
    if not stream.norms or (turned and stream.unread):
        return False
    if turned:
        turn(stream)
    even(model, stream, ids)
    after = model(input_ids=seen, use_cache=False).logits
    return bool((after - before).abs().max() <= TOLERANCE * before.abs().max())


def watched(model: Any, ids: torch.Tensor) -> Stream:
    """Returns what writes and reads the states, as far as a run on some tokens shows it."""
    width = model.get_input_embeddings().weight.shape[1]
    made: dict[int, Norm] = {}
    norms: list[Norm] = []
    writers: list[Any] = []
    held: list[torch.Tensor] = []  # a freed tensor's place could be taken by another

    def normed(module: nn.Module, inputs: Any, output: Any) -> None:
        offset = _offset(module, inputs[0], output)
        if offset is not None:
            held.append(output)
            norms.append(Norm(module, offset))
            made[output.data_ptr()] = norms[-1]

    def read(linear: nn.Module, inputs: Any) -> None:
        norm = made.get(inputs[0].data_ptr())
        if norm is not None and linear not in norm.readers:
            norm.readers.append(linear)
        elif norm is None and len(matrix(linear)) == width and linear not in writers:
            writers.append(linear)

    with ExitStack() as hooks:
        for module in model.modules():
            if is_norm(module) and module.get_parameter("weight").numel() == width:
                hooks.callback(module.register_forward_hook(normed).remove)
            elif is_linear(module):
                hooks.callback(module.register_forward_pre_hook(read).remove)
        model(input_ids=ids, use_cache=False)
    tables = [each for each in model.modules() if isinstance(each, nn.Embedding) and each.embedding_dim == width]
    unread = [each.module for each in norms if not each.readers]
    return Stream([each for each in norms if each.readers], writers, tables, unread)


def turn(stream: Stream) -> None:
    """Turns the states of a model; norms multiply by one from then on, and add nothing."""
    turning = rotation(stream.norms[0].module.get_parameter("weight").numel())
    for norm in stream.norms:
        weight, bias = norm.module.get_parameter("weight"), getattr(norm.module, "bias", None)
        for reader in norm.readers:
            weights = matrix(reader)
            if bias is not None:
                added = weights @ bias
                reader.bias = nn.Parameter(added if reader.bias is None else reader.bias + added, requires_grad=False)
            place(reader, _turned(weights * (weight + norm.offset), turning))
        weight.data = torch.full_like(weight, 1 - norm.offset)
        if bias is not None:
            bias.data = torch.zeros_like(bias)
    for table in stream.tables:
        table.weight.data = _turned(table.weight, turning)
    for writer in stream.writers:
        place(writer, _turned(matrix(writer).t(), turning).t())
        if writer.bias is not None:
            writer.bias.data = _turned(writer.bias[None], turning)[0]


def even(model: Any, stream: Stream, ids: torch.Tensor) -> None:
    """Divides the inputs behind norms by a power of how loud each is among those of its token.

    Loudness is (mean of (x / mean |x| of the token)⁴)^(1/4), which a few tokens with a very loud input raise.
    """
    sums: dict[nn.Module, torch.Tensor] = {}

    def hear(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        rows = output.flatten(0, -2).float()
        share = rows / rows.abs().mean(-1, keepdim=True).clamp(min=1e-30)
        sums[module] = sums.get(module, torch.zeros(rows.shape[1])) + share.pow(4).sum(0)

    with ExitStack() as hooks:
        for norm in stream.norms:
            hooks.callback(norm.module.register_forward_hook(hear).remove)
        for sequence in ids:
            model(input_ids=sequence[None], use_cache=False)
    for norm in stream.norms:
        loud = sums[norm.module].pow(POWER / 4)
        loud = torch.where(loud > 0, loud, loud[loud > 0].amin() if bool((loud > 0).any()) else torch.ones(()))
        loud /= loud.log().mean().exp()
        weight, bias = norm.module.get_parameter("weight"), getattr(norm.module, "bias", None)
        weight.data = (weight + norm.offset) / loud - norm.offset
        if bias is not None:
            bias.data = bias / loud
        for reader in norm.readers:
            place(reader, matrix(reader) * loud)


def rotation(width: int) -> torch.Tensor:
    """Returns an orthogonal matrix `[width, width]` in float64 that leaves the mean of a row as it is: R 1 = 1."""
    draws = torch.Generator().manual_seed(0)
    ones = torch.full((width, 1), width**-0.5, dtype=torch.float64)
    rest = torch.randn(width, width - 1, generator=draws, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones, rest], 1)).Q  # its first column is the direction of the mean, or its minus
    other = torch.linalg.qr(torch.randn(width - 1, width - 1, generator=draws, dtype=torch.float64)).Q
    found: torch.Tensor = basis[:, :1] @ basis[:, :1].t() + basis[:, 1:] @ other @ basis[:, 1:].t()
    return found


def _turned(rows: torch.Tensor, turning: torch.Tensor) -> torch.Tensor:
    """Returns rows `[n, width]` times a matrix, computed in float64 a part at a time."""
    return torch.cat([(part.double() @ turning).float() for part in torch.split(rows, 8192)])


def _offset(module: nn.Module, inputs: torch.Tensor, output: torch.Tensor) -> float | None:
    """Returns what is added to the weight of a norm before it multiplies; None if neither 0 nor 1 is."""
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    plain = (output if bias is None else output - bias).detach()
    kept = weight.data
    weight.data = torch.zeros_like(kept)
    try:
        without = type(module).forward(module, inputs)
    finally:
        weight.data = kept
    without = without if bias is None else without - bias
    for offset in (0.0, 1.0):
        unit = plain / torch.where(kept + offset == 0, 1, kept + offset)
        if torch.allclose(without, unit * offset, rtol=1e-4, atol=1e-5 * float(unit.abs().max())):
            return offset
    return None
