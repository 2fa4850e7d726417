"""Text to token ids by the tokenizer of a model directory, without loading the model or torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lighten.data.origin import Origin, parts
from lighten.data.pairs import load as load_pairs
from lighten.data.text import Part, Render, load_text, wanted_letters
from lighten.errors import RequestError
from lighten.model import tokenizer_files
from lighten.model.template import renderer

SHORTEST = 4
"""Tokens of a pair at least, roughly: with so many pairs there are surely enough."""
SURE = 16
"""Letters for each token with which a text is surely long enough, so that the tokenizer need not read it."""


def load_tokenizer(model: Path) -> Any:
    """Returns the `tokenizers.Tokenizer` of a .gguf file, or of a directory with the tokens that other files add.

    Raises:
        RequestError: the directory has no tokenizer.json, the other files contradict it, or a kind that is not read.
    """
    from tokenizers import Tokenizer

    if model.is_file():
        from lighten.model import gguf_header, tokenizer_table

        return Tokenizer.from_str(json.dumps(tokenizer_table.tokenizer_json(gguf_header.read_header(model).fields)))
    if tokenizer_files.is_whole(model):
        return _whole(Tokenizer.from_file(str(model / tokenizer_files.FILE)))
    return _whole(Tokenizer.from_str(json.dumps(tokenizer_files.read_tokenizer(model))))


def _whole(tokenizer: Any) -> Any:
    """Returns a tokenizer that reads a text to its end. Those of embedding models may say where they stop."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_text(
    model: Path, data: str | Origin | Sequence[Origin], part: Part, length: int, samples: int | None = None
) -> None:
    """Checks that a model can be given a text, before any work: that it can be read, written out, and is long enough.

    Args:
        model: the directory or .gguf file of the source.
        data: the text, or several with shares.
        part: as for `lighten.data.text.read`.
        length: tokens that there must be at least.
        samples: sequences that are wanted; None for all there are.

    Raises:
        RequestError: none of known fields, conversations for a model without a template, or too short a text.
        Failure: a file that is damaged.
    """
    for origin in parts(data):
        render = None if origin.id == "builtin" else renderer(model)
        text = load_text(origin, part, render, wanted_letters(samples, length))
        if not text.strip():
            raise RequestError(f"the text {origin.name!r} is empty")
        if len(text) < SURE * length and (tokenizer := _known_tokenizer(model)) is not None:
            found = len(_encoded(tokenizer, text))
            if found < length:
                raise _short(origin, part, found, length)


def _known_tokenizer(model: Path) -> Any:
    """Returns the tokenizer of a model; None for a tokenizer that only its own runtime can read."""
    model = model.parent if model.suffix == ".onnx" else model
    try:
        return load_tokenizer(model)
    except RequestError:
        if model.is_file():  # llama.cpp knows more of them
            return None
        raise


def _short(origin: Origin, part: Part, found: int, length: int) -> RequestError:
    return RequestError(
        f"the {part} text {origin.name!r} is shorter than one sample: {found} tokens, length {length}; "
        "give a longer text or a smaller length"
    )


def _encoded(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def calibration_ids(
    model: Path,
    data: str | Origin | Sequence[Origin],
    samples: int | None,
    length: int,
    warnings: list[str] | None = None,
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Returns token ids `[at most samples, length]`: chunks of the text spread evenly over it, in order.

    Of a mixture, each part gives its share of the sequences, and the parts take turns.

    Args:
        model: the directory whose tokenizer and chat template read the text.
        data: the text, or several with shares.
        samples: sequences at most; None takes as many as there are (of a mixture, as the scarcest part allows).
        length: tokens of each.
        warnings: gets a message about parts that are too short to give their share.

    Raises:
        RequestError: the text, or a part of it, is shorter than one sample.
    """
    tokenizer, render, origins = load_tokenizer(model), renderer(model), parts(data)
    chunks = [_chunks(tokenizer, render, origin, length, wanted_letters(samples, length)) for origin in origins]
    shares = [origin.share or 1.0 for origin in origins]
    if samples is None:
        samples = max(1, int(min(len(each) / share for each, share in zip(chunks, shares, strict=True)) + 1e-9))
    found = []
    for origin, own, count in zip(origins, chunks, divided(samples, shares), strict=True):
        if len(own) < count and len(origins) > 1 and warnings is not None:
            warnings.append(
                f"{origin.name} gives {len(own)} sequences of {length} tokens, not the {count} that its share asks for"
            )
        count = min(count, len(own))
        found.append(own[np.arange(count) * len(own) // max(1, count)])
    turns = np.concatenate([(np.arange(len(each)) + 0.5) / max(1, len(each)) for each in found])
    spread: np.ndarray[Any, np.dtype[np.int64]] = np.concatenate(found)[np.argsort(turns, kind="stable")]
    return spread


def paired_ids(
    model: Path, data: str, samples: int, length: int
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Returns token ids of texts and of their translations, `[at most samples, length]` each.

    A sample is several pairs, one after the other. Its shorter side begins again from its start, so that no token is
    padding.
    """
    tokenizer = load_tokenizer(model)
    found = load_pairs(data, "train", max(1, samples * length // SHORTEST))
    sides = [[each.ids for each in tokenizer.encode_batch([pair[side] for pair in found])] for side in (0, 1)]
    whole: list[list[list[int]]] = []
    parts: list[list[int]] = [[], []]
    for ids in zip(*sides, strict=True):
        for part, more in zip(parts, ids, strict=True):
            part += more
        if max(map(len, parts)) >= length:
            whole.append([(part * length)[:length] for part in parts])
            parts = [[], []]
        if len(whole) == samples:
            break
    if not whole:
        raise RequestError(f"{data} has fewer tokens than one sample of {length}: give more pairs or a smaller length")
    stacked = np.asarray(whole, dtype=np.int64)
    return stacked[:, 0], stacked[:, 1]


def divided(count: int, shares: Sequence[float]) -> list[int]:
    """Returns whole numbers that add up to `count`, as near to the shares as possible, and not 0 if possible."""
    whole = [int(count * share + 1e-9) for share in shares]
    rest = sorted(range(len(shares)), key=lambda at: (whole[at] > 0, whole[at] - count * shares[at]))
    for at in rest[: count - sum(whole)]:
        whole[at] += 1
    return whole


def _chunks(
    tokenizer: Any, render: Render | None, origin: Origin, length: int, letters: int | None
) -> np.ndarray[Any, np.dtype[np.int64]]:
    text = load_text(origin, "calibration", render, letters)
    ids = _encoded(tokenizer, text)
    available = len(ids) // length
    if not available:
        raise _short(origin, "calibration", len(ids), length)
    return np.asarray(ids[: available * length], dtype=np.int64).reshape(available, length)
