"""The forms of model directories: which files hold the weights, and what config.json leaves out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lighten.errors import Failure, RequestError
from lighten.model import anatomy
from lighten.model.auto_classes import is_encoder
from lighten.model.config_checks import check_config
from lighten.model.files import PICKLES, check_links, plain, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"


def weight_files(path: Path) -> tuple[list[str], dict[str, str] | None, list[str]]:
    """Returns the files of the weights, the index's file of every tensor if there is one, and notes.

    Raises:
        RequestError: there are no weights, only pickled ones, or two sets of them.
        Failure: a shard that the index names is missing.
    """
    single = (path / SINGLE).is_file()
    if (path / INDEX).is_file():
        index = read_json(path / INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise Failure(f"{path / INDEX} has no weight_map: damaged; fetch it again")
        shards = sorted({plain(name, path, INDEX).name for name in index.values()})
        missing = [name for name in shards if not (path / name).is_file()]
        if not missing and (not single or SINGLE in shards):
            return shards, index, []
        if not single:
            raise Failure(f"{path}: {INDEX} names shards that are missing: {', '.join(missing)}; fetch them")
        if not missing:
            raise RequestError(
                f"{path} holds two models: {SINGLE}, and the shards that {INDEX} names ({shards[0]}, …). Loaders "
                "differ in which one they take: move away the one that is not meant"
            )
        return [SINGLE], None, [f"{INDEX} is not used: it names shards that are not there, and {SINGLE} is"]
    if single:
        return [SINGLE], None, []
    return _other_name(path)


def _other_name(path: Path) -> tuple[list[str], None, list[str]]:
    others = sorted(file.name for file in path.glob("*.safetensors") if not file.name.startswith("adapter_"))
    if len(others) == 1 and "-of-" not in others[0]:
        return others, None, [f"the weights are read from {others[0]}: most loaders want the name {SINGLE}"]
    if others:
        advice = (
            f"fetch {INDEX} too, which says what is where"
            if any("-of-" in name for name in others)
            else f"call the one that is the model {SINGLE}"
        )
        raise RequestError(f"{path} holds {', '.join(others[:3])}, but no {SINGLE} and no {INDEX}: {advice}")
    refuse_pickle(path)
    raise RequestError(f"{path} holds no {SINGLE} and no {INDEX}: not a complete model")


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


def refuse_adapter(path: Path) -> None:
    """Raises RequestError if a directory holds a LoRA adapter and no model. The message names its base."""
    if not (path / ADAPTER_CONFIG).is_file():
        return
    settings = read_json(path / ADAPTER_CONFIG)
    base = settings.get("base_model_name_or_path") or "a model that its settings do not name"
    raise RequestError(
        f"{path} is no model but a {settings.get('peft_type') or 'LORA'} adapter of {base}: add --merge-adapter to "
        "merge the two first, or give a directory in which they are merged already (`merge_and_unload` of peft)"
    )


def read_config(path: Path) -> dict[str, Any]:
    """Returns `config.json` of a model directory, completed from other files and from the model type.

    Raises:
        RequestError: there is none, or the directory is an adapter's.
    """
    if not path.is_dir():
        raise RequestError(f"{path}: no such model directory")
    check_links(path)
    if not (path / "config.json").is_file():
        refuse_adapter(path)
        raise RequestError(f"{path} has no config.json: not a Hugging Face model directory")
    config = read_json(path / "config.json")
    check_config(config, path / "config.json")
    if not config.get("quantization_config") and (found := _old_settings(path)):
        config["quantization_config"] = found
    _check_rope(config, path)
    if (named := _architecture(config)) is not None:
        config["architectures"] = [named]
    return config


def _old_settings(path: Path) -> dict[str, Any] | None:
    """Returns the settings that older tools of GPTQ and AWQ wrote into their own file, in the form of config.json."""
    if (path / "quantize_config.json").is_file():
        settings = read_json(path / "quantize_config.json")
        if "bits" in settings:
            return {"quant_method": "gptq", **settings}
    if (path / "quant_config.json").is_file():
        settings = read_json(path / "quant_config.json")
        if "w_bit" in settings:
            return {
                "quant_method": "awq",
                "bits": settings["w_bit"],
                "group_size": settings.get("q_group_size", 128),
                "zero_point": settings.get("zero_point", True),
                "version": str(settings.get("version", "gemm")).lower(),
            }
    return None


def _check_rope(config: dict[str, Any], path: Path) -> None:
    """Raises RequestError for two descriptions of the positions that differ. Loaders take one or the other."""
    said = [config.get("rope_scaling"), config.get("rope_parameters")]
    if not all(isinstance(each, dict) and each and "full_attention" not in each for each in said):
        return
    whole = [{"rope_theta": config.get("rope_theta"), "rope_type": each.get("type"), **each} for each in said if each]
    names = sorted(set(whole[0]) | set(whole[1]))
    odd = [name for name in names if name != "type" and whole[0].get(name) != whole[1].get(name)]
    if odd:
        raise RequestError(
            f"{path / 'config.json'} says {odd[0]} twice: {whole[0].get(odd[0])} under rope_scaling and "
            f"{whole[1].get(odd[0])} under rope_parameters. Loaders take one or the other: leave one of the two"
        )


def _architecture(config: dict[str, Any]) -> str | None:
    """Returns the class of a language model whose config names none, or its body without a head; else None."""
    named = (config.get("architectures") or [None])[0]
    model_type = str(config.get("model_type"))
    if config.get("is_encoder_decoder") or is_encoder(model_type) or (named and not str(named).endswith("Model")):
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    if named and named != MODEL_MAPPING_NAMES.get(model_type):
        return None
    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return found if found and found.endswith(("ForCausalLM", "LMHeadModel")) else None


def canonical(names: Iterable[str], config: dict[str, Any]) -> dict[str, str]:
    """Returns the stored name of every weight, by its name in a language model that was saved whole.

    A body that was saved without its head lacks the prefix `model.`. A tied embedding may be stored under the head's
    name. Loaders accept both.
    """
    found = {name: name for name in names}
    body, head, embedding = anatomy.BODY, anatomy.HEAD_WEIGHT, anatomy.EMBEDDING_WEIGHT
    if embedding.removeprefix(body) in found and not any(name.startswith(body) for name in found):
        outside = f"{anatomy.HEAD}."
        found = {name if name.startswith(outside) else f"{body}{name}": stored for name, stored in found.items()}
    layered = any(name.startswith(anatomy.LAYERS) for name in found)
    if layered and config.get("tie_word_embeddings") and head in found and embedding not in found:
        found = {embedding if name == head else name: stored for name, stored in found.items()}
    return found
