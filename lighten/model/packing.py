"""The `gptq` checkpoint format: integer codes packed into int32 words, and back.

A column of codes is one little-endian bit stream cut into 32-bit words (so 3-bit codes cross word borders).
`qweight` packs along the input dimension, `qzeros` along the output dimension; this first version of the format
stores every zero point less one.
"""

from __future__ import annotations

import torch

BITS = (2, 3, 4, 8)
_PERIOD = 32  # codes after which word borders repeat, for any number of bits


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs integer codes in 0 … 2^bits − 1, `[n, columns]`, into int32 words, `[n · bits / 32, columns]`.

    Raises:
        ValueError: n · bits is not a multiple of 32.
    """
    count, columns = codes.shape
    if count * bits % 32:
        raise ValueError(f"{count} codes of {bits} bits do not fill whole 32-bit words")
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, 0, 0, -count % _PERIOD))
    periods = padded.reshape(-1, _PERIOD, columns)
    words = torch.zeros(periods.shape[0], bits, columns, dtype=torch.int64, device=codes.device)
    for place in range(_PERIOD):
        word, shift = divmod(place * bits, 32)
        words[:, word] |= periods[:, place] << shift
        if shift + bits > 32:
            words[:, word + 1] |= periods[:, place] >> (32 - shift)
    words &= 0xFFFFFFFF
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return signed.reshape(-1, columns)[: count * bits // 32].contiguous()


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Returns the `count` codes per column that `pack` packed, as int32 `[count, columns]`."""
    columns = words.shape[1]
    stream = words.to(torch.int64) & 0xFFFFFFFF
    stream = torch.nn.functional.pad(stream, (0, 0, 0, -words.shape[0] % bits)).reshape(-1, bits, columns)
    codes = torch.empty(stream.shape[0], _PERIOD, columns, dtype=torch.int64, device=words.device)
    for place in range(_PERIOD):
        word, shift = divmod(place * bits, 32)
        value = stream[:, word] >> shift
        if shift + bits > 32:
            value = value | (stream[:, word + 1] << (32 - shift))
        codes[:, place] = value & ((1 << bits) - 1)
    return codes.reshape(-1, columns)[:count].to(torch.int32)


def pack_linear(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor, bits: int
) -> dict[str, torch.Tensor]:
    """Returns the tensors of one linear in the `gptq` format.

    Args:
        codes: `[in, out]`, 0 … 2^bits − 1.
        scales: `[groups, out]`, exactly representable in float16.
        zeros: `[groups, out]`, 1 … 2^bits − 1 (0 cannot be stored less one).
        g_idx: `[in]`, the group of every input.
        bits: 2, 3, 4 or 8.
    """
    return {
        "qweight": pack(codes, bits),
        "qzeros": pack((zeros - 1).t().contiguous(), bits).t().contiguous(),
        "scales": scales.to(torch.float16),
        "g_idx": g_idx.to(torch.int32),
    }


def unpack_linear(tensors: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """Returns the weight `[out, in]` in float32 that a linear in the `gptq` format stands for."""
    g_idx = tensors["g_idx"].long()
    scales = tensors["scales"].float()
    codes = unpack(tensors["qweight"], bits, g_idx.numel())
    zeros = unpack(tensors["qzeros"].t().contiguous(), bits, scales.shape[1]).t() + 1
    return ((codes - zeros[g_idx]).float() * scales[g_idx]).t().contiguous()
