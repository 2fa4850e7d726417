"""The architectures that can be run layer by layer; kept apart so that a plan can ask without loading torch."""

from __future__ import annotations

from lighten.errors import RequestError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""Architectures that can be swept: decoder layers at `model.layers`, embedding at `model.embed_tokens`."""


def check_architecture(architecture: str) -> None:
    """Raises RequestError, naming those that are supported, if `architecture` is not."""
    if architecture not in ARCHITECTURES:
        raise RequestError(
            f"the architecture {architecture} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
