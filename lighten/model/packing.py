"""Integer codes packed into int32 words, as the `gptq`, `awq` and `compressed-tensors` formats do it, and back.

A column of codes is one little-endian bit stream cut into 32-bit words (so 3-bit codes cross word borders).

- `gptq`: `qweight` packs along the input dimension, `qzeros` along the output dimension; its first version, which
  every loader reads, stores each zero point less one.
- `awq` (GEMM): both pack along the output dimension, eight codes to a word, in an order of their own.
- `compressed-tensors` (pack-quantized): each row packs along the input dimension, zero points along the output one.
"""

from __future__ import annotations

import torch

BITS = (2, 3, 4, 8)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output, of eight neighbours, at each place of a word of the `awq` format, lowest bits first."""
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


def pack_gptq(
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


def gptq_zeros(words: torch.Tensor, bits: int, outputs: int, *, less_one: bool = True) -> torch.Tensor:
    """Returns the zero points `[groups, out]` of the `gptq` format, `less_one` in its first version.

    As in GPTQModel, the one is added to whole words. A zero point of 0, whose -1 borrowed from the next code when it
    was stored, comes back in this way. Codes of 3 bits cross the borders of words, so each gets the one by itself.
    """
    packed = words.t().contiguous()
    if less_one and bits != 3:
        one = pack(torch.ones(32 // bits, 1, dtype=torch.int32, device=words.device), bits)
        packed = (packed.to(torch.int64) + one) & 0xFFFFFFFF
    zeros = unpack(packed, bits, outputs).t()
    return (zeros + 1) & 7 if less_one and bits == 3 else zeros


def _awq_words(codes: torch.Tensor) -> torch.Tensor:
    """Packs `[n, out]` along the outputs, `[n, out / 8]`."""
    ordered = codes.reshape(len(codes), -1, 8)[..., list(AWQ_ORDER)].flatten(1)
    return pack(ordered.t(), 4).t().contiguous()


def awq_codes(words: torch.Tensor) -> torch.Tensor:
    """Returns the codes `[n, out]` that words of the `awq` format hold, `[n, out / 8]`."""
    codes = unpack(words.t(), 4, words.shape[1] * 8).t().reshape(len(words), -1, 8)
    return codes[..., [AWQ_ORDER.index(place) for place in range(8)]].flatten(1)


def pack_awq(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the tensors of one 4-bit linear in the `awq` GEMM format; arguments as for `pack_gptq`, zeros from 0."""
    return {"qweight": _awq_words(codes), "qzeros": _awq_words(zeros), "scales": scales.to(torch.float16)}


def pack_compressed(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, sym: bool
) -> dict[str, torch.Tensor]:
    """Returns the tensors of one linear in the `pack-quantized` format of compressed-tensors.

    Args:
        codes: `[in, out]`, 0 … 2^bits − 1.
        scales: `[groups, out]`, in the type they are to be stored in.
        zeros: `[groups, out]`, 0 … 2^bits − 1; not stored if `sym`, for then they are 2^(bits−1).
        bits: 2, 3, 4 or 8.
        sym: symmetric grid.
    """
    packed = {
        "weight_packed": _pack_filled(codes, bits).t().contiguous(),
        "weight_scale": scales.t().contiguous(),
        "weight_shape": torch.tensor([codes.shape[1], codes.shape[0]]),
    }
    if not sym:
        packed["weight_zero_point"] = _pack_filled(zeros.t(), bits)
    return packed


def _pack_filled(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes into as many words as they need, filling the last one up with zeros."""
    words = -(-len(codes) * bits // 32)
    return pack(torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % _PERIOD)), bits)[:words]
