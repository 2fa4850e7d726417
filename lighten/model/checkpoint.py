"""A Hugging Face model directory, read one tensor at a time from its safetensors shards."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lighten.errors import Failure, RequestError
from lighten.facts import ModelFacts
from lighten.model import forms, tokenizer_files
from lighten.model.anatomy import EMBEDDING_WEIGHT, HEAD, HEAD_WEIGHT
from lighten.model.auto_classes import task_of
from lighten.model.config_checks import size
from lighten.model.files import refuse_pointer, without_pickles
from lighten.model.forms import INDEX, SINGLE, read_config, refuse_pickle
from lighten.model.pooling import copy_pooling
from lighten.store.files import MANIFEST

if TYPE_CHECKING:
    import torch

__all__ = ["INDEX", "SINGLE", "Checkpoint", "facts_of", "read_config", "refuse_pickle"]
_PIECE = 1 << 22


class Checkpoint:
    """Config and tensors of a model directory. It holds no weights.

    Shards are mapped only while they are read, and what is read is copied. Pages of a mapping that stays open count as
    memory of the process, up to the whole model.
    """

    def __init__(self, path: Path, config: dict[str, Any] | None = None) -> None:
        """Opens the directory. `config` replaces its config.json.

        Raises:
            RequestError: there is no model, or only a pickled one.
            Failure: a shard that its index names is missing.
        """
        self.path = path
        self.notes: list[str] = []
        """Remarks for the person on how the directory was read."""
        self.config = read_config(path) if config is None else config
        if config is None:
            self._settle_tie()

    @cached_property
    def _files(self) -> dict[str, str]:
        """File name of the shard of every tensor, by its stored name."""
        files, index, notes = forms.weight_files(self.path)
        self.notes += notes
        found: dict[str, str] = {}
        for file in files:
            with self._open(file, "numpy") as shard:
                found |= dict.fromkeys(shard.keys(), file)
        if index is not None and (lacking := sorted(name for name in index if name not in found)):
            raise RequestError(
                f"{self.path}: {INDEX} names {lacking[0]}, which {index[lacking[0]]} does not hold"
                + (f", and {len(lacking) - 1} more" if lacking[1:] else "")
                + ": the index and the shards are not of the same model; fetch both again"
            )
        return {**{name: found[name] for name in index or ()}, **found}

    @cached_property
    def stored(self) -> dict[str, str]:
        """Stored name of every tensor, by its name in a language model that was saved whole."""
        if task_of(self.config) != "causal":
            return {name: name for name in self._files}
        return forms.canonical(self._files, self.config)

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """File name of the shard of every tensor."""
        return {name: self._files[stored] for name, stored in self.stored.items()}

    def _settle_tie(self) -> None:
        """Unties a head that differs from the embedding, whatever config.json says."""
        says = self.config.get("tie_word_embeddings")
        if says is False or task_of(self.config) != "causal" or not any(self.path.glob("*.safetensors")):
            return
        if {EMBEDDING_WEIGHT, HEAD_WEIGHT} <= self.weight_map.keys():
            if not self._alike(EMBEDDING_WEIGHT, HEAD_WEIGHT):
                self.config = {**self.config, "tie_word_embeddings": False}
                if says:
                    self.notes.append(
                        f"config.json ties the head to the embedding, but {HEAD_WEIGHT} differs from "
                        f"{EMBEDDING_WEIGHT}: it is kept, as a head of its own"
                    )
        elif says is None and EMBEDDING_WEIGHT in self.weight_map and f"{HEAD}.qweight" not in self.weight_map:
            self.config = {**self.config, "tie_word_embeddings": True}  # the default of some architectures

    def _alike(self, first: str, second: str) -> bool:
        """Returns whether two tensors are the same, byte for byte."""
        places = [self._place(name) for name in (first, second)]
        if places[0][1:] != places[1][1:]:
            return False
        files = [place[0][0].open("rb") for place in places]
        try:
            for file, ((_, start), *_) in zip(files, places, strict=True):
                file.seek(start)
            left = places[0][1]
            while left > 0:
                piece = min(_PIECE, left)
                if files[0].read(piece) != files[1].read(piece):
                    return False
                left -= piece
        finally:
            for file in files:
                file.close()
        return True

    def _place(self, name: str) -> tuple[tuple[Path, int], int, str, tuple[int, ...]]:
        """Returns where a tensor begins (file, byte), its bytes, type and shape."""
        path = self.path / self.weight_map[name]
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(header))[self.stored[name]]
        start, end = entry["data_offsets"]
        return (path, 8 + header + start), end - start, entry["dtype"], tuple(entry["shape"])

    @property
    def changes(self) -> dict[str, Any]:
        """Settings that differ from the directory's own config.json."""
        return {}

    def count(self) -> int:
        """Returns the weights in all tensors, from the headers of the shards."""
        return sum(math.prod(shape) for shape in Checkpoint.shapes(self).values())

    def head(self) -> torch.Tensor:
        """Returns the weight of the output head, which may be the embedding."""
        return self.tensor(EMBEDDING_WEIGHT if self.facts.tied else HEAD_WEIGHT)

    def write_others(self, out: Path, config: dict[str, Any]) -> None:
        """Writes everything except the weights into a directory: a config, and the other files unchanged."""
        for file in without_pickles(self.path):
            weights = file.suffix == ".safetensors" or file.name.endswith(".index.json")
            if not weights and file.name not in (MANIFEST, "config.json"):
                shutil.copyfile(file, out / file.name)
        tokenizer_files.copy_templates(self.path, out)
        copy_pooling(self.path, out)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def _open(self, name: str, framework: str = "pt") -> Any:
        """Maps a shard. numpy is enough for the types in its header, and imports no torch."""
        try:
            return safe_open(self.path / name, framework=framework)
        except (SafetensorError, OSError) as error:
            refuse_pointer(self.path / name)
            raise Failure(
                f"{self.path / name} cannot be read ({error}): cut short or damaged; fetch it again"
            ) from error

    def tensor(self, name: str) -> torch.Tensor:
        """Returns one tensor, on the CPU, in its stored type."""
        with self._open(self.weight_map[name]) as shard:
            tensor: torch.Tensor = shard.get_tensor(self.stored[name]).clone()
        return tensor

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Returns every tensor whose name starts with `prefix`, by the rest of its name."""
        names = [name for name in self.weight_map if name.startswith(prefix)]
        return {name.removeprefix(prefix): tensor for name, tensor in self.some(names).items()}

    def some(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Returns tensors by their names. Each shard is opened once."""
        found: dict[str, torch.Tensor] = {}
        for file in dict.fromkeys(self.weight_map[name] for name in names):
            with self._open(file) as shard:
                here = [name for name in names if self.weight_map[name] == file]
                found |= {name: shard.get_tensor(self.stored[name]).clone() for name in here}
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor, from the headers of the shards."""
        found: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self.weight_map.values())):
            with self._open(file, "numpy") as shard:
                here = [name for name, place in self.weight_map.items() if place == file]
                found |= {name: tuple(shard.get_slice(self.stored[name]).get_shape()) for name in here}
        return found

    def types(self) -> set[str]:
        """Returns the types that tensors are stored in, as safetensors calls them: "BF16", "F32", …"""
        found: set[str] = set()
        for file in sorted(set(self.weight_map.values())):
            with self._open(file, "numpy") as shard:
                here = [name for name, place in self.weight_map.items() if place == file]
                found |= {str(shard.get_slice(self.stored[name]).get_dtype()) for name in here}
        return found

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The checkpoint's `quantization_config`, or None."""
        return self.config.get("quantization_config")

    @cached_property
    def facts(self) -> ModelFacts:
        """Sizes of the model."""
        return facts_of(self.config, str(self.path))


_SIZES: dict[str, tuple[str, ...]] = {
    "num_attention_heads": ("num_attention_heads", "num_heads", "encoder_attention_heads", "n_heads", "n_head"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "hidden_size": ("hidden_size", "d_model", "dim", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "num_layers", "encoder_layers", "n_layers", "n_layer"),
    "intermediate_size": (
        *("intermediate_size", "d_ff", "encoder_ffn_dim", "hidden_dim", "ffn_dim", "n_inner", "ffn_hidden_size"),
        "moe_intermediate_size",
    ),
    "vocab_size": ("vocab_size",),
}
"""Names of the sizes in the configs of one family or another; the usual name is the first."""


def _usual(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config whose sizes have the usual names.

    A width that differs from layer to layer becomes the largest. A list of the types of the layers gives their number.
    A model without attention has one head. Without a word on it, the inner width is four times the outer.
    """
    found = dict(config)
    for name, names in _SIZES.items():
        value = next((config[each] for each in names if config.get(each) is not None), None)
        if value is not None:
            found[name] = max(value) if isinstance(value, list) and value and _are_sizes(value) else value
    for name in ("layer_types", "layers_block_type"):
        if "num_hidden_layers" not in found and isinstance(config.get(name), list):
            found["num_hidden_layers"] = len(config[name])
    if isinstance(found.get("hidden_size"), int):
        if "state_size" in found or config.get("model_type") in _WITHOUT_ATTENTION:
            found.setdefault("num_attention_heads", 1)
        if found.get("num_attention_heads") is not None:
            found.setdefault("intermediate_size", 4 * found["hidden_size"])
    return found


_TEXT = ("text_config", "llm_config", "language_config")


def _of_text(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of the language model in the config of a model that also sees or hears."""
    inner = next((config[name] for name in _TEXT if isinstance(config.get(name), dict)), None)
    if inner is None:
        return config
    own = {name: config[name] for name in ("architectures", "model_type") if name in config}
    return {**{name: config[name] for name in ("tie_word_embeddings",) if name in config}, **inner, **own}


_WITHOUT_ATTENTION = ("rwkv", "xlstm", "recurrent_gemma")


def _are_sizes(values: list[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def facts_of(config: dict[str, Any], where: str) -> ModelFacts:
    """Returns the sizes in a config.json.

    Raises:
        RequestError: a size is missing, so it is no language model that lighten knows.
    """
    task = task_of(config)
    config = _usual(_of_text(config))
    try:
        heads = size(config, "num_attention_heads", where)
        hidden = size(config, "hidden_size", where)
        return ModelFacts(
            architecture=(config.get("architectures") or [config["model_type"]])[0],
            layers=size(config, "num_hidden_layers", where),
            hidden=hidden,
            intermediate=size(config, "intermediate_size", where),
            heads=heads,
            kv_heads=size(config, "num_key_value_heads", where) if config.get("num_key_value_heads") else heads,
            head_dim=size(config, "head_dim", where) if config.get("head_dim") else hidden // heads,
            vocab=size(config, "vocab_size", where),
            tied=bool(config.get("tie_word_embeddings", False)),
            task=task,
            context=config.get("max_position_embeddings") or config.get("n_positions"),
        )
    except KeyError as error:
        raise RequestError(f"{where}: config.json has no {error}: not a language model that lighten reads") from error
