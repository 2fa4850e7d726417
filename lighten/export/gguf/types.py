"""llama.cpp's names of the types to which the weights of a file are rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TypeName = Literal[
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K_M",
    "Q5_K_S",
    "Q5_1",
    "Q5_0",
    "Q4_K_M",
    "Q4_K_S",
    "Q4_1",
    "Q4_0",
    "MXFP4",
    "IQ4_NL",
    "IQ4_XS",
    "Q3_K_L",
    "Q3_K_M",
    "Q3_K_S",
    "IQ3_M",
    "IQ3_S",
    "IQ3_XS",
    "IQ3_XXS",
    "Q2_K",
    "Q2_K_S",
    "IQ2_M",
    "IQ2_S",
    "IQ2_XS",
    "IQ2_XXS",
    "TQ2_0",
    "TQ1_0",
    "IQ1_M",
    "IQ1_S",
    "budget",
]
"""Values of `type`: a key of TYPES, or "budget" for a type chosen for every tensor."""


@dataclass(frozen=True)
class Type:
    """One of llama.cpp's `llama_ftype`: a mixture of ggml's types."""

    ftype: int
    bits: float
    """Bits per weight if every row is a multiple of 256 (or 32, for types with such blocks), for predictions."""
    fallback_bits: float | None = None
    """Bits per weight if rows of the hidden size are no multiple of 256; None if that does not matter."""
    needs_imatrix: bool = False
    """Whether llama.cpp refuses to round some tensors to it without an importance matrix."""
    block: int = 1
    """Number that must divide the length of a row, because llama.cpp has no other type to fall back to."""


TYPES: dict[str, Type] = {
    "F32": Type(0, 32.0),
    "F16": Type(1, 16.0),
    "BF16": Type(32, 16.0),
    "Q8_0": Type(7, 8.5, block=32),
    "Q6_K": Type(18, 6.56, 8.1),
    "Q5_K_M": Type(17, 5.7, 6.6),
    "Q5_K_S": Type(16, 5.6, 6.4),
    "Q5_1": Type(9, 6.2, block=32),
    "Q5_0": Type(8, 5.7, block=32),
    "Q4_K_M": Type(15, 4.9, 6.2),
    "Q4_K_S": Type(14, 4.7, 6.0),
    "Q4_1": Type(3, 5.1, block=32),
    "Q4_0": Type(2, 4.6, block=32),
    "MXFP4": Type(38, 8.5, block=32),  # llama.cpp gives it to experts, and Q8_0 to everything that sizes tell of
    "IQ4_NL": Type(25, 4.7, block=32),
    "IQ4_XS": Type(30, 4.5, 5.5),
    "Q3_K_L": Type(13, 4.3, 5.6),
    "Q3_K_M": Type(12, 3.95, 5.5),
    "Q3_K_S": Type(11, 3.6, 5.3),
    "IQ3_M": Type(27, 3.8, 5.4),
    "IQ3_S": Type(26, 3.6, 5.3),
    "IQ3_XS": Type(22, 3.5, 5.3, needs_imatrix=True),
    "IQ3_XXS": Type(23, 3.3, 5.3, needs_imatrix=True),
    "Q2_K": Type(10, 3.2, 5.2),
    "Q2_K_S": Type(21, 3.0, 5.2, needs_imatrix=True),
    "IQ2_M": Type(29, 2.9, 5.2, needs_imatrix=True),
    "IQ2_S": Type(28, 2.7, 5.2, needs_imatrix=True),
    "IQ2_XS": Type(20, 2.5, 5.2, needs_imatrix=True),
    "IQ2_XXS": Type(19, 2.3, 5.2, needs_imatrix=True),
    "TQ2_0": Type(37, 2.3, 4.9),
    "TQ1_0": Type(36, 1.9, 4.9),
    "IQ1_M": Type(31, 2.0, 5.2, needs_imatrix=True),
    "IQ1_S": Type(24, 1.8, 5.2, needs_imatrix=True),
}
PLAIN = ("F32", "F16", "BF16")
COMPENSATED = (
    *("Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "budget"),
)
"""Types whose matrices lighten can round so that their errors make good for each other."""
KEEPING = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Types that can hold the codes of a quantized source."""
