"""Sizes of a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Task = Literal["causal", "seq2seq", "masked", "embedding", "other"]
"""What a model is for, found in its config (`lighten.model.auto_classes`):

- causal: it predicts the next token of a text.
- seq2seq: it reads a text, and writes another.
- masked: it fills gaps in a text.
- embedding: it turns a text into vectors.
- other: an encoder with another head.
"""
TASKS: tuple[Task, ...] = get_args(Task)
TITLES: dict[Task, str] = {
    "causal": "a causal language model",
    "seq2seq": "a sequence-to-sequence model",
    "masked": "an encoder that fills gaps",
    "embedding": "an encoder that gives embeddings",
    "other": "an encoder with a head of its own",
}
"""Task of a model in words."""


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a language model, read from its config without loading it."""

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    task: Task = "causal"
    """What the model is for."""
    counted: int | None = None
    """Number of all weights, if they were counted because the sizes do not give it."""
    context: int | None = None
    """Number of positions that the model takes; None if nothing says it."""

    @property
    def family(self) -> Literal["causal", "encoder", "seq2seq"]:
        """Type of model: it predicts the next token, encodes a text, or does both with a text for each."""
        return "causal" if self.task == "causal" else "seq2seq" if self.task == "seq2seq" else "encoder"

    @property
    def layer_linear_params(self) -> int:
        """Weights in the linear layers of one decoder layer."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def embedding_params(self) -> int:
        """Weights in the embedding, and in the head if it is not tied."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def params(self) -> int:
        """All weights, norms included."""
        if self.counted is not None:
            return self.counted
        return self.layers * (self.layer_linear_params + 2 * self.hidden) + self.embedding_params + self.hidden

    def cache_bytes(self, tokens: int, bits: float = 16) -> int:
        """Returns the bytes of the keys and values of that many tokens, of `bits` bits each, in all layers."""
        return round(self.layers * 2 * self.kv_heads * self.head_dim * tokens * bits / 8)

    @property
    def gram_elements(self) -> int:
        """Entries of the packed Gram triangles of one layer: inputs of qkv, o, gate/up and down."""
        widths = (self.hidden, self.heads * self.head_dim, self.hidden, self.intermediate)
        return sum(width * (width + 1) // 2 for width in widths)
