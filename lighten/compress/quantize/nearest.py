"""Methods that use the weights alone: each weight is rounded to the nearest value of the format."""

from __future__ import annotations

from functools import partial

from lighten.compress.quantize import formats, grid
from lighten.compress.quantize.formats import Stored
from lighten.compress.quantize.linears import Linears
from lighten.compress.quantize.methods.bitsandbytes import FourBits
from lighten.compress.quantize.methods.coded import Coded
from lighten.compress.quantize.settings import Quantize


def codes(step: Coded, linears: Linears) -> list[Stored]:
    """Rounds to the nearest codes of the full range of each group."""
    found = grid.rtn(linears.together, linears.bits, step.group_size, step.symmetry, linears.scale_type)
    return linears.store(found, partial(formats.coded, step.format, linears.bits, step.sym, linears.scale_type))


def integers(step: Quantize, linears: Linears) -> list[Stored]:
    """Rounds to 8-bit integers with a scale per output."""
    found = grid.rtn(linears.together, 8, -1, True, linears.scale_type)
    return linears.store(found, partial(formats.int_quantized, scale_type=linears.scale_type))


def floats(step: Quantize, linears: Linears) -> list[Stored]:
    """Rounds to 8-bit floats with a scale per output."""
    return [formats.float_quantized(weight, linears.scale_type) for weight in linears.weights]


def bnb_4bit(step: FourBits, linears: Linears) -> list[Stored]:
    """Rounds to the 16 values of "nf4" or "fp4"."""
    return [formats.bnb_4bit(weight, step.method, step.block_size, step.double_quant) for weight in linears.weights]


def bnb_8bit(step: Quantize, linears: Linears) -> list[Stored]:
    """Rounds to 8-bit integers as LLM.int8() does."""
    return [formats.bnb_8bit(weight) for weight in linears.weights]
