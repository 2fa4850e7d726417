"""A LoRA adapter merged into its base, one weight at a time (Hu et al., 2021): W + s · B A, s = alpha / rank."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lighten.errors import Failure, RequestError
from lighten.model.checkpoint import Checkpoint
from lighten.model.files import read_json, refuse_pointer
from lighten.model.forms import ADAPTER_CONFIG

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt")
"""Files in an adapter's directory that replace those of its base."""
_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?$")


def is_adapter(path: Path) -> bool:
    """Returns whether a directory holds an adapter and no model."""
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()


def base_of(path: Path) -> str:
    """Returns the name or the path of the model that an adapter was trained on.

    Raises:
        RequestError: the adapter does not say.
    """
    base = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise RequestError(f"{path / ADAPTER_CONFIG} does not name its base: add base_model_name_or_path")
    beside = path / base
    return str(beside) if not Path(base).is_dir() and beside.is_dir() else base


class Merged(Checkpoint):
    """A model directory whose weights are read with an adapter merged into them, in the type of the base."""

    def __init__(self, adapter: Path, base: Path) -> None:
        """Opens the adapter and its base.

        Raises:
            RequestError: the adapter is no LoRA, or a kind of LoRA that is not merged here.
            Failure: its weights are damaged.
        """
        super().__init__(base)
        self.adapter = adapter
        self.settings = read_json(adapter / ADAPTER_CONFIG)
        self._check_kind()
        self.parts: dict[str, dict[str, str]] = {}
        """Stored names of A and B, by the module that they change."""
        self.whole: dict[str, str] = {}
        """Stored names of weights that take the place of the base's, by its names."""
        self._sort()

    def _check_kind(self) -> None:
        said = self.settings
        odd = [name for name in ("use_dora", "fan_in_fan_out", "layer_replication", "lora_bias") if said.get(name)]
        if said.get("peft_type", "LORA") != "LORA" or odd:
            what = f"sets {odd[0]}" if odd else f"is {said['peft_type']}"
            raise RequestError(
                f"{self.adapter} {what}, which is not merged here: merge it with peft (`merge_and_unload`), save the "
                "model, and give that directory"
            )
        if self.quantization:
            raise RequestError(f"{self.path}, the base of {self.adapter}, is quantized: name its original as the base")

    def _sort(self) -> None:
        known = set(self.weight_map)
        with self._adapter_file() as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        for stored in shapes:
            name = stored.removeprefix(_PREFIX).replace(".base_layer.", ".")
            found = _PART.match(name)
            if found and f"{found['module']}.weight" in known:
                self.parts.setdefault(found["module"], {})[found["part"][-1]] = stored
            elif name in known:
                self.whole[name] = stored
            else:
                raise RequestError(
                    f"{self.adapter / WEIGHTS}: {self.path} has no place for {stored}: is it the adapter's base?"
                )
        if halves := [module for module, parts in self.parts.items() if len(parts) != 2]:
            raise Failure(f"{self.adapter / WEIGHTS} has only one half of {halves[0]}: damaged; fetch it again")
        for name, stored in self.whole.items():
            if shapes[stored] != (wanted := self.shapes()[name]):
                raise RequestError(
                    f"{self.adapter / WEIGHTS}: {stored} is {list(shapes[stored])}, and {list(wanted)} in its base: "
                    "its vocabulary was changed, so merge it with peft and save the model"
                )

    def _adapter_file(self) -> Any:
        file = self.adapter / WEIGHTS
        if not file.is_file():
            raise RequestError(f"{self.adapter} has no {WEIGHTS}; pickled adapters are refused, save it again")
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            refuse_pointer(file)
            raise Failure(f"{file} cannot be read ({error}): cut short or damaged; fetch it again") from error

    def scale(self, module: str) -> float:
        """Returns the factor of B A for a module."""
        rank = float(self._of(module, "rank_pattern", "r"))
        alpha = float(self._of(module, "alpha_pattern", "lora_alpha"))
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _of(self, module: str, patterns: str, common: str) -> Any:
        own = self.settings.get(patterns) or {}
        return (
            next((value for key, value in own.items() if re.match(rf"(.*\.)?({key})$", module)), None)
            or (self.settings[common])
        )

    def tensor(self, name: str) -> torch.Tensor:
        """Returns one tensor, merged."""
        weight = super().tensor(name)
        module = name.removesuffix(".weight")
        changed = name == f"{module}.weight" and module in self.parts
        if name not in self.whole and not changed:
            return weight
        with self._adapter_file() as file:
            base: torch.Tensor = file.get_tensor(self.whole[name]) if name in self.whole else weight
            if not changed:
                return base.to(weight.dtype)
            first, second = (file.get_tensor(self.parts[module][part]).float() for part in "AB")
        change = second @ first
        if "embedding" in self.parts[module]["A"]:
            change = change.t()
        if change.shape != weight.shape:
            raise RequestError(
                f"{self.adapter}: its change of {name} is {list(change.shape)}, the base has {list(weight.shape)}"
            )
        merged: torch.Tensor = base.float() + self.scale(module) * change
        return merged.to(weight.dtype)

    def some(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Returns tensors by their names, merged."""
        return {name: self.tensor(name) for name in names}
