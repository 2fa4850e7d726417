"""A Hugging Face model directory, read one tensor at a time from its safetensors shards."""

from __future__ import annotations

import json
import math
import shutil
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from lighten.errors import Failure, RequestError
from lighten.model.config_checks import check_config, size
from lighten.model.files import PICKLES, check_links, plain, read_json, without_pickles
from lighten.stage import ModelFacts
from lighten.store import MANIFEST

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint:
    """Config and tensors of a model directory; holds no weights.

    Shards are mapped only while they are read, and what is read is copied: pages of a mapping that stays open
    count as memory of the process, up to the whole model.
    """

    def __init__(self, path: Path, config: dict[str, Any] | None = None) -> None:
        """Opens the directory; `config` takes the place of its config.json.

        Raises:
            RequestError: no model there, or only a pickled one.
            Failure: a shard that its index names is missing.
        """
        self.path = path
        self.config = read_config(path) if config is None else config

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """File name of the shard of every tensor."""
        if (self.path / INDEX).is_file():
            weights: Any = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(weights, dict):
                raise Failure(f"{self.path / INDEX} has no weight_map: damaged; fetch it again")
            shards = {str(name): plain(name, self.path, INDEX) for name in weights.values()}
            missing = sorted(name for name, file in shards.items() if not file.is_file())
            if missing:
                raise Failure(f"{self.path}: {INDEX} names shards that are missing: {', '.join(missing)}; fetch them")
            return weights
        if (self.path / SINGLE).is_file():
            with self._open(SINGLE) as shard:
                return dict.fromkeys(shard.keys(), SINGLE)
        refuse_pickle(self.path)
        raise RequestError(f"{self.path} holds a config.json but no {SINGLE} or {INDEX}: not a complete model")

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from the directory's own config.json."""
        return {}

    def count(self) -> int:
        """Returns the weights in all tensors, from the headers of the shards."""
        total = 0
        for shard in sorted(set(self.weight_map.values())):
            with self._open(shard) as file:
                total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        return total

    def head(self) -> torch.Tensor:
        """Returns the weight of the output head, which may be the embedding."""
        return self.tensor("model.embed_tokens.weight" if self.facts.tied else "lm_head.weight")

    def write_others(self, out: Path, config: dict[str, Any]) -> None:
        """Writes everything but the weights into a directory: a config, and the other files as they are."""
        for file in without_pickles(self.path):
            weights = file.suffix == ".safetensors" or file.name.endswith(".index.json")
            if not weights and file.name not in (MANIFEST, "config.json"):
                shutil.copyfile(file, out / file.name)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.path / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise Failure(
                f"{self.path / name} cannot be read ({error}): cut short or damaged; fetch it again"
            ) from error

    def tensor(self, name: str) -> torch.Tensor:
        """Returns one tensor, on the CPU, in the type it is stored in."""
        with self._open(self.weight_map[name]) as shard:
            tensor: torch.Tensor = shard.get_tensor(name).clone()
        return tensor

    def tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """Returns every tensor whose name starts with `prefix`, by the rest of its name."""
        names = [name for name in self.weight_map if name.startswith(prefix)]
        found: dict[str, torch.Tensor] = {}
        for file in dict.fromkeys(self.weight_map[name] for name in names):
            with self._open(file) as shard:
                here = [name for name in names if self.weight_map[name] == file]
                found |= {name.removeprefix(prefix): shard.get_tensor(name).clone() for name in here}
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor, from the headers of the shards."""
        found: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self.weight_map.values())):
            with self._open(file) as shard:
                found |= {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118
        return found

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The checkpoint's `quantization_config`, or None."""
        return self.config.get("quantization_config")

    @cached_property
    def facts(self) -> ModelFacts:
        """Sizes of the model."""
        return facts_of(self.config, str(self.path))


def refuse_pickle(path: Path) -> None:
    """Raises RequestError if the directory holds only pickled weights, with the command that converts them."""
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        command = (
            'python -c "import sys; from transformers import AutoModelForCausalLM as A; '
            f"A.from_pretrained('{path}').save_pretrained('{path}')\""
        )
        raise RequestError(
            f"{path} has only pickled weights ({pickles[0]}), which can run any code when opened, so they are refused. "
            f"If you trust where they come from, convert them to safetensors once: {command}"
        )


def read_config(path: Path) -> dict[str, Any]:
    """Returns `config.json` of a model directory."""
    if not path.is_dir():
        raise RequestError(f"{path}: no such model directory")
    check_links(path)
    if not (path / "config.json").is_file():
        raise RequestError(f"{path} has no config.json: not a Hugging Face model directory")
    config = read_json(path / "config.json")
    check_config(config, path / "config.json")
    return config


_SIZES: dict[str, tuple[str, ...]] = {
    "num_attention_heads": ("num_attention_heads", "num_heads", "encoder_attention_heads", "n_heads"),
    "hidden_size": ("hidden_size", "d_model", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "num_layers", "encoder_layers", "n_layers"),
    "intermediate_size": ("intermediate_size", "d_ff", "encoder_ffn_dim", "hidden_dim"),
    "vocab_size": ("vocab_size",),
}
"""What the sizes of encoders and sequence-to-sequence models are called, besides the usual names."""
ENCODERS = (
    "albert",
    "bert",
    "camembert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "modernbert",
    "mpnet",
    "roberta",
    "xlm-roberta",
)
"""The `model_type` of encoders."""


def _family(config: dict[str, Any]) -> Literal["causal", "encoder", "seq2seq"]:
    """Returns what kind of model a config.json describes."""
    if config.get("is_encoder_decoder"):
        return "seq2seq"
    architecture = str((config.get("architectures") or [""])[0])
    decodes = config.get("is_decoder") or architecture.endswith(("ForCausalLM", "LMHeadModel"))
    return "encoder" if config.get("model_type") in ENCODERS and not decodes else "causal"


def facts_of(config: dict[str, Any], where: str) -> ModelFacts:
    """Returns the sizes that a config.json tells.

    Raises:
        RequestError: it lacks one of them: not a language model of a kind that lighten knows.
    """
    family = _family(config)
    if family != "causal":
        config = {
            **config,
            **{name: config[each] for name, names in _SIZES.items() for each in reversed(names) if each in config},
        }
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
            family=family,
            context=config.get("max_position_embeddings") or config.get("n_positions"),
        )
    except KeyError as error:
        raise RequestError(f"{where}: config.json has no {error}: not a language model that lighten reads") from error
