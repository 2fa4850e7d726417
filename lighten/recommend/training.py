"""The memory that training a model takes, by published arithmetic, and which way of training fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lighten.facts import ModelFacts

RANK = 16
TOKENS = 512
NF4_BITS = 4.127
"""Bits of a weight in NF4 with quantized scales: 4 + 8/64 + 32/(64·256) (QLoRA, section 3)."""
ADAM = 16
"""Bytes of a weight that is trained: 2 + 2 + 12 (ZeRO, section 3.1)."""
ACTIVATIONS = (
    "activations: 2 bytes × tokens × width × layers are kept between layers (Korthikanti et al. 2022, "
    "arXiv:2205.05198, full recomputation in table 2), 34 bytes × tokens × width in the layer that is computed again "
    "(its equation 1 without the scores, which no attention kernel of today keeps), "
    "8 bytes × tokens × vocabulary for logits and their gradient in float32 (counted here, not published)"
)
SOURCES = {
    "full": "16 bytes × weights: 2 the weight, 2 its gradient, 4 its master copy, 8 Adam's moments "
    "(Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 3.1)",
    "lora": "2 bytes × weights, frozen, and 16 bytes × weights of the adapters "
    "(Hu et al. 2021, LoRA, arXiv:2106.09685, section 4.2: no optimizer states for what is frozen; "
    "the 16 bytes as for full training)",
    "qlora": "4.127 bits × weights of linear layers (NF4, scales quantized too), 2 bytes × the other weights, "
    "and 16 bytes × weights of the adapters (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3)",
}
"""Publication of each formula."""


@dataclass(frozen=True)
class Way:
    """One way of training: bytes that are kept for weights, and bytes of activations."""

    name: str
    weights: int
    activations: int
    formula: str
    trained: int
    """Number of weights that change."""

    @property
    def total(self) -> int:
        """Bytes of weights and activations together."""
        return self.weights + self.activations


def ways(facts: ModelFacts, tokens: int = TOKENS, rank: int = RANK) -> list[Way]:
    """Returns full, LoRA and QLoRA training of a model on batches of so many tokens, the most capable first.

    LoRA matrices of `rank` stand beside every linear layer of the decoder. Activations are computed twice instead of
    kept (gradient checkpointing).
    """
    active = 2 * tokens * facts.hidden * facts.layers + 34 * tokens * facts.hidden + 8 * tokens * facts.vocab
    adapter = rank * facts.layers * _edges(facts)
    linear = facts.layers * facts.layer_linear_params
    frozen = {
        "full": (ADAM * facts.params, facts.params),
        "lora": (2 * facts.params + ADAM * adapter, adapter),
        "qlora": (round(NF4_BITS / 8 * linear) + 2 * (facts.params - linear) + ADAM * adapter, adapter),
    }
    return [Way(name, held, active, SOURCES[name], trained) for name, (held, trained) in frozen.items()]


def _edges(facts: ModelFacts) -> int:
    """Returns the sum of the inputs and outputs of all linear layers of a decoder layer."""
    query, keys = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    attention = 2 * (facts.hidden + query) + 2 * (facts.hidden + keys)
    return attention + 3 * (facts.hidden + facts.intermediate)


def variants(way: Way, tokens: int) -> dict[str, list[dict[str, Any]]]:
    """Returns the variants of a recipe that tries it: the training, or for QLoRA the weights it starts from."""
    if way.name == "qlora":
        return {"nf4": [{"quantize": {"method": "nf4"}}]}
    settings: dict[str, Any] = {"alpha": 0.0, "length": tokens, "batch": 1, "gradient_checkpointing": True}
    if way.name == "lora":
        settings["lora"] = RANK
    return {f"tuned-{way.name}": [{"distill": settings}]}
