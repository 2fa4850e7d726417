"""Encoders and sequence-to-sequence models in transformers."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lighten.evaluate.runtimes.defaults import Defaults
from lighten.evaluate.runtimes.opener import Conditions
from lighten.evaluate.runtimes.runtime import Capability, Floats
from lighten.evaluate.runtimes.texts import Reader, Texts
from lighten.evaluate.runtimes.torch_loading import (
    arithmetic_for_quality,
    describe_quantizer,
    kernels_of,
    load_model,
    repack,
    unpack_linears,
    why_assembled,
)
from lighten.facts import Task
from lighten.model import accelerator
from lighten.model.answers import Rules, translated
from lighten.model.checkpoint import Checkpoint

CAPABILITIES: dict[Task, frozenset[Capability]] = {
    "seq2seq": frozenset({"translates"}),
    "masked": frozenset({"encodes", "fills"}),
    "embedding": frozenset({"encodes"}),
    "other": frozenset({"encodes"}),
}
"""What a model of each task can do."""


class TorchTexts(Defaults):
    """A model that reads whole texts. See `TextRuntime` for the methods."""

    name = "torch"

    def __init__(self, path: Path, conditions: Conditions) -> None:
        """Loads a model directory. Errors are those of `TorchRuntime`."""
        checkpoint = Checkpoint(path)
        checkpoint.weight_map  # noqa: B018  refuses pickles and names missing shards before anything is loaded
        self.task = checkpoint.facts.task
        self.capabilities = CAPABILITIES[self.task]
        self.device, self.folder = conditions.device, path
        for_quality = conditions.dtype is None
        self.dtype = conditions.dtype or conditions.arithmetic or arithmetic_for_quality(checkpoint, self.device)
        unpack = for_quality and self.dtype == "float32"
        method = (checkpoint.quantization or {}).get("quant_method")
        assembled = why_assembled(path, method, conditions.trust_remote_code, unpack=unpack)
        self.model = load_model(
            path,
            self.device,
            getattr(torch, self.dtype),
            method,
            unpack,
            conditions.trust_remote_code,
            None,
            assembled=assembled is not None,
        )
        kernels = kernels_of(self.model)
        unpacked = unpack and unpack_linears(self.model)
        if unpack and self.device == "cpu":
            repack(self.model)
        elif unpack:
            nn.Module.to(self.model, self.device)
        accelerator.reset_peak(self.device)
        told = [
            f"transformers {version('transformers')}",
            *describe_quantizer(checkpoint, kernels, unpacked, assembled),
        ]
        self.detail = " + ".join(told)
        settings = self.model.config.get_text_config()
        self.vocab = int(settings.vocab_size)
        self.context: int | None = checkpoint.facts.context
        self._rules = Rules.of(path) if self.task == "seq2seq" else None
        self._reader: Reader | None = None

    def _moved(self, texts: Texts) -> dict[str, torch.Tensor]:
        pairs = {"input_ids": texts.ids, "attention_mask": texts.mask}
        return {name: torch.from_numpy(value).to(self.device) for name, value in pairs.items()}

    def translate(self, texts: Texts, most: int) -> list[list[int]]:
        """See `TextRuntime`."""
        assert self._rules
        return translated(self.model, self._moved(texts), self._rules, most)

    @torch.inference_mode()
    def states(self, texts: Texts) -> Floats:
        """See `TextRuntime`."""
        return _to_numpy(self.model.base_model(**self._moved(texts)).last_hidden_state)

    @torch.inference_mode()
    def fill(self, texts: Texts) -> Floats:
        """See `TextRuntime`."""
        return _to_numpy(self.model(**self._moved(texts)).logits)

    def encode(self, text: str) -> list[int]:
        """See `Runtime`."""
        self._reader = self._reader or Reader(self.folder, None)
        return [int(each) for each in self._reader.read([text]).ids[0]]

    def peak_vram_bytes(self) -> int | None:
        """See `Runtime`."""
        return accelerator.peak_bytes(self.device)

    def close(self) -> None:
        """See `Runtime`."""
        del self.model


def _to_numpy(tensor: torch.Tensor) -> Floats:
    return np.ascontiguousarray(tensor.float().cpu().numpy())
