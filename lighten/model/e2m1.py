"""4-bit floats (E2M1) in blocks that share a scale: MXFP4 and NVFP4, as compressed-tensors and gpt-oss store them.

A byte holds two codes, the first one in the lower half. A code is a sign in the highest bit and one of eight values. In
MXFP4 (OCP Microscaling specification, v1.0) 32 weights share a power of two, stored as its exponent plus 127 (E8M0). In
NVFP4 16 weights share a scale in E4M3, and a matrix has a float32 by which its scales were multiplied.
"""

from __future__ import annotations

import torch

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the codes without the sign."""
LARGEST = VALUES[-1]
SIGN = 8
BIAS = 127
NO_POWER = 255
"""The exponent that stands for NaN."""
_EXPONENT = 0x7F800000
_WHOLE = 3.0 * 2**22
"""Number whose unit in the last place is one: what is added to it and taken off again is whole."""


def nearest(weights: torch.Tensor) -> torch.Tensor:
    """Returns the nearest value of a code for each float32 number. Between two it is the one with an even code."""
    values = weights.clamp(-LARGEST, LARGEST)
    # codes lie a half apart below 2, one between 2 and 4, and two above: half the power of two below the number
    unit = values.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32).clamp_(1.0, 4.0).mul_(_WHOLE / 2)
    return values.add_(unit).sub_(unit)


def codes_of(values: torch.Tensor) -> torch.Tensor:
    """Returns the codes of values that codes have, uint8. Zero has no sign."""
    doubled = (values * 2).to(torch.int32)
    places = torch.zeros(2 * int(LARGEST) + 1, dtype=torch.uint8, device=values.device)
    for code, value in enumerate(VALUES):
        places[int(2 * value)] = code
    return places[doubled.abs()] | ((doubled < 0).to(torch.uint8) * SIGN)


def values_of(codes: torch.Tensor) -> torch.Tensor:
    """Returns the values of codes, float32."""
    table = torch.tensor([*VALUES, *(-value for value in VALUES)], device=codes.device)
    return table[codes.int()]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Packs codes `[…, n]` into bytes `[…, n / 2]`."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Returns the codes `[…, n]` that bytes `[…, n / 2]` hold."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def powers(exponents: torch.Tensor) -> torch.Tensor:
    """Returns the powers of two of E8M0 exponents, float32.

    Raises:
        ValueError: one of them stands for NaN.
    """
    if bool((exponents == NO_POWER).any()):
        raise ValueError("a scale is NaN (exponent 255)")
    return powers_of(exponents.int())


def powers_of(exponents: torch.Tensor) -> torch.Tensor:
    """Returns the powers of two of int32 exponents from 0 to 254, plus 127, float32: its own exponents but for 0."""
    smallest = 1 << 22
    return torch.where(exponents == 0, smallest, exponents << 23).view(torch.float32)


def scales(stored: torch.Tensor, divisor: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the scales of stored ones, float32.

    Args:
        stored: uint8 exponents of MXFP4; or E4M3, or floats with values of it, of NVFP4.
        divisor: what the scales of NVFP4 were multiplied by, one number.

    Raises:
        ValueError: a scale is not finite, or the divisor is no positive number.
    """
    if not stored.is_floating_point():
        return powers(stored)
    found = stored.float()
    if not bool(found.isfinite().all()):
        raise ValueError("a scale is NaN")
    if divisor is None:
        return found
    if divisor.numel() != 1 or not bool(divisor.isfinite().all()) or not float(divisor) > 0:
        raise ValueError(f"its global scale is no positive number ({divisor.flatten()[:3].tolist()})")
    return found / divisor.float()


def weight(packed: torch.Tensor, by_block: torch.Tensor) -> torch.Tensor:
    """Returns the weight `[out, in]` of packed codes `[out, in / 2]` and scales `[out, blocks]`, float32.

    Raises:
        ValueError: a weight is beyond float32.
    """
    values = values_of(unpack(packed))
    rows, columns = values.shape
    found = (values.view(rows, by_block.shape[1], -1) * by_block[..., None]).view(rows, columns)
    if not bool(torch.stack(torch.aminmax(found)).isfinite().all()):
        raise ValueError("a weight is infinite")
    return found
