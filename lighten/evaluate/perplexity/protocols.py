"""How a text becomes chunks, and which positions are scored: the protocols of perplexity.

A perplexity belongs to its protocol: the same model on the same text has another perplexity under each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lighten.errors import RequestError
from lighten.evaluate.perplexity.settings import Perplexity
from lighten.evaluate.runtimes.runtime import Ids, Tokenizer

METHODS = {
    "lighten": (
        "exp of the mean negative log-likelihood of every position but the first of each chunk, given the positions "
        "before it in the chunk; chunks do not overlap, the rest of the text is dropped; stderr by the delta method "
        "over chunk means"
    ),
    "gptq": (
        "as the GPTQ papers: the text is tokenized whole without BOS and cut into chunks that do not overlap; exp of "
        "the mean negative log-likelihood of every position but the first of each; the rest of the text is dropped"
    ),
    "llama.cpp": (
        "as llama.cpp's perplexity tool: chunks that do not overlap, their first token replaced by BOS where the model "
        "adds one; exp of the mean negative log-likelihood of the positions after the middle one of each chunk; the "
        "rest of the text is dropped"
    ),
    "lm-eval": (
        "as lm-eval's rolling log-likelihood: every token of every document, the first given the token that stands for "
        "an empty context, in windows of `length`; exp of the negative log-likelihood by word (runs without white "
        "space); stderr by the delta method over documents"
    ),
}


@dataclass(frozen=True)
class Chunks:
    """A text in chunks."""

    ids: Ids
    """`[chunks, length]`"""
    first: int
    """First scored position. All positions after it are scored too."""
    stride: int
    """Number of tokens of the text between the starts of two chunks."""
    bos: bool
    """Whether a token was put first."""
    of: int = 0
    """Number of chunks of the whole text."""


def prepare(text: str, protocol: str) -> str:
    """Returns the text that is tokenized. llama.cpp drops one line end at the end of a file."""
    return text.removesuffix("\n") if protocol == "llama.cpp" else text


def chunked(ids: list[int], settings: Perplexity, tokenizer: Tokenizer) -> Chunks:
    """Returns a text's tokens, cut as a protocol says.

    Raises:
        RequestError: the text is shorter than one chunk.
    """
    assert settings.length
    length, bos = settings.length, tokenizer.bos
    if settings.protocol == "gptq":
        found = Chunks(cut(ids, length, None, None), 1, length, False)
    elif settings.protocol == "llama.cpp":
        whole = cut(ids if bos is None else [bos, *ids], length, None, None)
        if bos is not None:
            whole[:, 0] = bos
        found = Chunks(whole, length // 2 + 1, length, bos is not None)
    else:
        found = Chunks(cut(ids, length, None, bos), 1, length - (bos is not None), bos is not None)
    of = len(found.ids)
    count = min(of, settings.most or of)
    # what `within` asks for stands for the whole text; `samples` are its first chunks, as in the protocols' own tools
    places = np.arange(count) * of // count if settings.within else np.arange(count)
    return replace(found, ids=found.ids[places], of=of)


def cut(ids: list[int], length: int, samples: int | None, bos: int | None) -> Ids:
    """Returns the chunks `[chunks, length]` of a text; the first id of each is `bos`, if there is one.

    Raises:
        RequestError: the text is shorter than one chunk.
    """
    stride = length if bos is None else length - 1
    count = len(ids) // stride
    if not count:
        raise RequestError(f"the text has {len(ids)} tokens, fewer than one chunk of {length}: set a smaller `length`")
    count = min(count, samples or count)
    chunks = np.array(ids[: count * stride], dtype=np.int64).reshape(count, stride)
    return chunks if bos is None else np.insert(chunks, 0, bos, axis=1)
