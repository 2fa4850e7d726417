"""Text to token ids by the tokenizer of a model directory, without loading the model or torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lighten.data.text import load_text
from lighten.errors import RequestError
from lighten.model import tokenizer_files


def load_tokenizer(model: Path) -> Any:
    """Returns the `tokenizers.Tokenizer` of a model directory, with the tokens that other files add.

    Raises:
        RequestError: the directory has no tokenizer.json, or the other files contradict it.
    """
    from tokenizers import Tokenizer

    if tokenizer_files.is_whole(model):
        return Tokenizer.from_file(str(model / tokenizer_files.FILE))
    return Tokenizer.from_str(json.dumps(tokenizer_files.read_tokenizer(model)))


def calibration_ids(model: Path, data: str, samples: int, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Returns token ids `[at most samples, length]`: chunks of the text spread evenly over it, in order.

    Raises:
        RequestError: the text is shorter than one sample.
    """
    text = load_text(data, "calibration")
    ids = load_tokenizer(model).encode(text, add_special_tokens=False).ids
    available = len(ids) // length
    if not available:
        raise RequestError(
            f"the calibration text {data!r} is shorter than one sample: {len(ids)} tokens, length {length}; "
            "give a longer text or a smaller length"
        )
    count = min(samples, available)
    chunks = np.asarray(ids[: available * length], dtype=np.int64).reshape(available, length)
    spread: np.ndarray[Any, np.dtype[np.int64]] = chunks[np.arange(count) * available // count]
    return spread
