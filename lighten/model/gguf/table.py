"""All families that GGUF export writes and that .gguf sources are read as."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lighten.errors import RequestError
from lighten.facts import ModelFacts
from lighten.model.gguf import dense, experts, gemma, gemma4, hybrids, latent, nemotron, states
from lighten.model.gguf.family import Config, Family
from lighten.model.gguf.towers import WRAPPERS

if TYPE_CHECKING:
    from lighten.model.gguf_header import Header

FAMILIES: dict[str, Family] = {
    **dense.FAMILIES,
    **gemma.FAMILIES,
    **gemma4.FAMILIES,
    **experts.FAMILIES,
    **hybrids.FAMILIES,
    **latent.FAMILIES,
    **states.FAMILIES,
    **nemotron.FAMILIES,
}
"""Families by the name in config.json's `architectures`."""
ROWS = (*FAMILIES.values(), *(family.other for family in FAMILIES.values() if family.other))
"""All rows. Some classes have two."""
ARCHITECTURES = tuple(dict.fromkeys(family.arch for family in ROWS))
"""llama.cpp's names of them. Mistral models are stored as "llama"."""


def family_in(header: Header) -> Family | None:
    """Returns the row by which a file is read; None if there is none."""
    return next((each for each in ROWS if each.arch == header.arch and each.reads(header)), None)


def family_of(facts: ModelFacts, config: Config | None = None) -> Family:
    """Returns the row of a model. `config` is its config.json, where the class alone does not say which row it is.

    In llama.cpp's qwen2, all heads together must be as wide as the hidden states. With pruned heads they are not.
    llama.cpp's llama has optional biases and only rotates other pairs of rows, so it computes the same.

    Raises:
        RequestError: there is no row.
    """
    architecture = WRAPPERS.get(facts.architecture, facts.architecture)
    if architecture not in FAMILIES:
        raise RequestError(
            f"GGUF export does not know {facts.architecture}; it knows {', '.join(FAMILIES)}. Quantize the model "
            "instead (`lighten quantize --method gptq` or awq): transformers, vLLM and SGLang open the result"
        )
    family = FAMILIES[architecture]
    if family.other and family.when and config is not None and not family.when(config):
        return family.other
    narrow = family.arch == "qwen2" and facts.heads * facts.head_dim != facts.hidden
    return dense.LLAMA_ROW if narrow else family
