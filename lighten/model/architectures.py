"""The architectures whose layers steps know by name; kept apart so that a plan can ask without loading torch."""

from __future__ import annotations

from lighten.errors import RequestError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""Architectures whose layers have the names in `anatomy`. The others are found by `discovery`."""


def check_architecture(architecture: str) -> None:
    """Raises RequestError, naming those that are supported, if `architecture` is not."""
    if architecture not in ARCHITECTURES:
        raise RequestError(
            f"this step knows the layers of {', '.join(ARCHITECTURES)}, and not those of {architecture}. Quantization, "
            "pruning and distillation take every family"
        )
