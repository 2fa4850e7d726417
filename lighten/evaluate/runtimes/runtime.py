"""What runs a model: one protocol, and what a runtime may be able to do."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lighten.evaluate.runtimes.wanted import Wanted
from lighten.step import Report

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]

Capability = Literal["logits", "scores", "decodes", "rewinds", "translates", "encodes", "fills"]
"""Name of something that a runtime can do:

- logits: gives the logits at every position of a text (`logits`). Perplexity and divergence are made of them.
- scores: gives the log-probability of an ending after its context (`choose`, `choose_many`). Accuracy is made of them.
- decodes: writes token after token behind a prompt, with a cache (`generate`, `decode`). Speed is measured on that.
- rewinds: takes back the last tokens of a text (`text`). Speculative decoding needs that.
- translates, encodes, fills: writes a text for a text, gives its states, or fills its gaps (`texts.TextRuntime`).
"""


class Score(NamedTuple):
    """Log-probability (nats) of an ending after its context; `greedy` if every token of it was the most likely one."""

    logprob: float
    greedy: bool


@dataclass(frozen=True)
class Question:
    """Token ids of a context (at least one), and of the endings (at least one token each) that may follow it."""

    context: list[int]
    endings: list[list[int]]

    @property
    def packed(self) -> int:
        """Number of tokens to compute: the context once, and every ending without its last token."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


@dataclass(frozen=True)
class Timings:
    """Seconds to the first token of every sequence, and of each decoding step after it."""

    ttft_s: float
    token_s: list[float]
    ids: Ids | None = None
    """Written ids, `[batch, steps]`, if the runtime keeps them."""


class Tokenizer(Protocol):
    """Turns text into ids; `bos` is the id it puts first by its own default, or None if it puts none."""

    bos: int | None
    prefix: int | None
    """Id of an empty context: beginning of text, or end of text if there is none."""
    eos: int | None

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, no special tokens added."""

    def decode(self, ids: list[int], special: bool = False) -> str:
        """Returns the text of ids; special tokens are left out, or spelled out where `special` is true."""


Decoding = Generator[Floats, int, None]
"""Generator that gives the logits `[vocab]` of the next token, and is sent the chosen token."""

Choose = Callable[[int, Floats], int | None]
"""Function that is given the number of a text and the logits `[vocab]` of its next token, valid until it returns.

It returns the chosen token, or None if the text ends here.
"""


class Text(Protocol):
    """A text in the cache of a model, whose end can be removed."""

    length: int

    def extend(self, ids: list[int], wanted: int) -> list[int]:
        """Adds tokens. Returns the likeliest next token after each of the last `wanted`."""

    def cut(self, length: int) -> None:
        """Removes all tokens but the first `length`."""


class Server(Protocol):
    """A running server of one model, reached over HTTP."""

    name: str
    """Program and version."""
    device: str

    def check(self, when: str) -> None:
        """Raises Failure if it has ended."""

    def stream(self, prompt: str, steps: int, banned: list[int]) -> list[float]:
        """Returns the moments (`time.perf_counter`) at which each token of a greedy answer arrived."""


class Runtime(Protocol):
    """A loaded model."""

    name: str
    """Name of its row in the table of runtimes: "torch", "llama.cpp", "onnxruntime"."""
    capabilities: frozenset[Capability]
    """What it can do. Methods of other capabilities are not called."""
    lacks: Mapping[str, str]
    """Why it cannot do something, in words, for capabilities that it lacks for a reason of its own."""
    elsewhere: bool
    """Whether it computes outside of this process, so that memory and energy here say nothing about it."""
    parallel: int
    """Number of questions that it answers at the same time."""
    device: str
    dtype: str
    """Arithmetic of the weights: "float32", "bfloat16", "int4", or the type of the GGUF file: "Q4_K - Medium"."""
    detail: str
    """Versions and kernels."""
    vocab: int
    context: int | None
    """Number of positions that the model takes; None if it does not say."""
    options: Mapping[str, str]
    """Attention, compile and cache in use; empty if a runtime has no such choice."""

    def logits(self, ids: Ids) -> Floats:
        """Returns the logits `[n, vocab]` at every position of `ids [n]`; valid until the next call."""

    def hidden(self) -> Floats | None:
        """Returns the inputs of the head in the last `logits`, `[n, hidden]`; None if it does not show them."""

    def choose(self, context: list[int], endings: list[list[int]]) -> list[Score]:
        """Returns the score of each ending; the context is computed once."""

    def choose_many(self, questions: Sequence[Question], report: Report) -> list[list[Score]]:
        """Returns the scores of many questions, computed together in batches of similar length."""

    def generate(self, prompt: Ids, steps: int) -> Timings:
        """Decodes `steps` tokens greedily after `prompt [batch, n]`, with a cache, through any end of text."""

    def decode(self, prompt: list[int], most: int) -> Decoding:
        """Continues after a prompt, with a cache, for at most `most` tokens. One such decoding runs at a time."""

    def decode_many(self, prompts: Sequence[list[int]], most: Sequence[int], choose: Choose) -> None:
        """Continues after many prompts, together where the runtime can, each for at most its number of tokens.

        `choose` is called for every token of every text, with the place of the prompt as the number of its text. Texts
        take turns in no order that may be relied on.
        """

    def answer_many(self, asked: Sequence[Wanted], report: Report) -> list[str] | None:
        """Returns what the model writes for many requests if it chooses tokens itself; None if it has `decode_many`.

        The texts may go on after what ends them.
        """

    def text(self, most: int) -> Text:
        """Returns an empty text of at most `most` tokens. There is one at a time.

        Raises:
            Failure: the runtime cannot remove tokens.
        """

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text by the model's own tokenizer, no special tokens added."""

    def peak_vram_bytes(self) -> int | None:
        """Returns the peak of accelerator memory; None if there is no accelerator."""

    def close(self) -> None:
        """Frees the model."""
