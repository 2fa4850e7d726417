"""The language model within a model that also sees or hears, as a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.facts import ModelFacts
from lighten.model import anatomy
from lighten.model.gguf.family import Config
from lighten.model.gguf.turns import Model

if TYPE_CHECKING:
    import torch

    from lighten.model.checkpoint import Checkpoint

WRAPPERS = {
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Gemma4ForConditionalGeneration": "Gemma4ForCausalLM",
    "Llama4ForConditionalGeneration": "Llama4ForCausalLM",
    "Mistral3ForConditionalGeneration": "MistralForCausalLM",
    "Qwen3_5ForConditionalGeneration": "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3_5MoeForCausalLM",
    "Qwen3VLForConditionalGeneration": "Qwen3ForCausalLM",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3MoeForCausalLM",
}
"""Classes of language models by the class of the model that has one inside."""
_OTHERS = {"ministral3": "Ministral3ForCausalLM"}
"""Classes where the type under text_config is another than usual."""
_BODIES = ("language_model.model.", "model.language_model.", "model.language_model.model.")
_HEADS = ("lm_head.", "language_model.lm_head.", "model.lm_head.")


def name_in(config: Config, stored: str) -> str | None:
    """Returns the name of a stored tensor in the language model by itself; None if it is of another part."""
    if not wraps(config):
        return stored
    for beginning in sorted(_BODIES, key=len, reverse=True):
        if stored.startswith(beginning):
            return anatomy.BODY + stored.removeprefix(beginning)
    head = next((beginning for beginning in _HEADS if stored.startswith(beginning)), None)
    return f"{anatomy.HEAD}.{stored.removeprefix(head)}" if head else None


def wraps(config: Config) -> bool:
    """Returns whether a config is of a model with a language model inside that GGUF export knows."""
    named = (config.get("architectures") or [""])[0]
    return named in WRAPPERS and isinstance(config.get("text_config"), dict)


def text_config(config: Config, names: Any) -> Config:
    """Returns the config of the language model alone. `names` are those of its tensors."""
    if not wraps(config):
        return config
    inner = config["text_config"]
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    architecture = _OTHERS.get(str(inner.get("model_type")), WRAPPERS[config["architectures"][0]])
    tied = anatomy.HEAD_WEIGHT not in names
    found = {**ids, **inner, "architectures": [architecture], "tie_word_embeddings": tied}
    return (
        found if "quantization_config" not in config else found | {"quantization_config": config["quantization_config"]}
    )


class Tower:
    """The language model of a checkpoint. A checkpoint that is nothing else stays as it is."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from lighten.model.checkpoint import facts_of

        self.checkpoint = checkpoint
        self._stored = {}
        self.others: list[str] = []
        """Stored tensors of other parts, such as what sees."""
        for stored in checkpoint.shapes():
            name = name_in(checkpoint.config, stored)
            if name is None:
                self.others.append(stored)
            else:
                self._stored[name] = stored
        self.config: Config = text_config(checkpoint.config, self._stored)
        whole = self.config is checkpoint.config
        self.facts: ModelFacts = checkpoint.facts if whole else facts_of(self.config, str(checkpoint.path))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of its tensors, by the names that they have in a language model by itself."""
        shapes = self.checkpoint.shapes()
        return {name: shapes[stored] for name, stored in self._stored.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """Returns one tensor, on the CPU."""
        return self.checkpoint.tensor(self.stored(name))

    def stored(self, name: str) -> str:
        """Returns the name that a tensor has in the checkpoint."""
        return self._stored[name]


def model_of(path: Path) -> Model:
    """Returns what turns depend on, of a model directory."""
    from lighten.model.checkpoint import Checkpoint

    tower = Tower(Checkpoint(path))
    return Model(tower.config, tower.facts, tower.checkpoint.config)
