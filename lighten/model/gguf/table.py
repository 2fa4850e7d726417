"""All families that GGUF export writes and that .gguf sources are read as."""

from __future__ import annotations

from lighten.errors import RequestError
from lighten.facts import ModelFacts
from lighten.model.gguf import dense, gemma
from lighten.model.gguf.family import Family

FAMILIES: dict[str, Family] = {**dense.FAMILIES, **gemma.FAMILIES}
"""Families by the name in config.json's `architectures`."""
BY_ARCH: dict[str, Family] = {}
"""Families by llama.cpp's name: what a file of that name becomes. Mistral models are stored as "llama"."""
for _family in FAMILIES.values():
    BY_ARCH.setdefault(_family.arch, _family)


def family_of(facts: ModelFacts) -> Family:
    """Returns the row of a model.

    In llama.cpp's qwen2, all heads together must be as wide as the hidden states. With pruned heads they are not.
    llama.cpp's llama has optional biases and only rotates other pairs of rows, so it computes the same.

    Raises:
        RequestError: there is no row.
    """
    if facts.architecture not in FAMILIES:
        raise RequestError(
            f"GGUF export does not know {facts.architecture}; it knows {', '.join(FAMILIES)}. Quantize the model "
            "instead (`lighten quantize --method gptq` or awq): transformers, vLLM and SGLang open the result"
        )
    family = FAMILIES[facts.architecture]
    narrow = family.arch == "qwen2" and facts.heads * facts.head_dim != facts.hidden
    return dense.LLAMA_ROW if narrow else family
