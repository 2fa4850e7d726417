"""The weights that a model must have by its architecture, and those that a directory has.

The model is built without storage, and transformers' own loader gets the names and shapes of the checkpoint. It
renames, merges, splits and ties them as it does when it loads, and says what it would leave random.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lighten.errors import Failure, RequestError
from lighten.model.checkpoint import Checkpoint
from lighten.model.empty import Filler, config_of, quiet, without_storage
from lighten.model.experts import ONE
from lighten.model.files import read_json
from lighten.model.unpacked import open_checkpoint
from lighten.step import Report

SHOWN = 3
"""Maximum number of names in a message."""
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel",
    "base_model.model.": "peft",
    "_fsdp_wrapped_module.": "FSDP",
    "_forward_module.": "Lightning",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
"""Wrappers that leave a prefix in the names of weights."""
RENAME = (
    "python -c \"from safetensors.torch import load_file as r, save_file as w; f='{file}'; "
    "w({{k.removeprefix('{prefix}'): v for k, v in r(f).items()}}, f, {{'format': 'pt'}})\""
)


def check(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Checks the weights of a model directory; the target of `run_isolated`.

    Args:
        payload: `path`, and `name`: the name that the person gave.
        report: not used.

    Returns:
        `surplus`: names that its architecture does not use. `known`: names among them that older versions of it saved,
        which transformers passes over without a word. `unchecked`: why nothing was compared, or None.

    Raises:
        RequestError: weights are missing, have another shape than its config.json asks for, or transformers does not
            know the type of the model.
    """
    path = Path(payload["path"])
    try:
        checkpoint = open_checkpoint(path)
    except RequestError:
        checkpoint = Checkpoint(path)
        if not checkpoint.quantization:
            raise
        return {
            "surplus": [],
            "known": [],
            "unchecked": f"the format {checkpoint.quantization.get('quant_method')} is not known",
        }
    try:
        model = _empty(checkpoint)
    except _Unknown as error:
        return {"surplus": [], "known": [], "unchecked": str(error)}
    missing, wrong, surplus, known = compare(model, checkpoint.shapes())
    refuse(payload["name"], checkpoint, missing, wrong, surplus, set(model.state_dict()))
    return {"surplus": surplus, "known": known, "unchecked": None}


class _Unknown(Exception):
    """The error that transformers cannot build a model, or not without code that comes with the model."""


def _empty(checkpoint: Checkpoint) -> Any:
    """Returns the model of the class that a directory names, which `empty_model` leaves for that of its task."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL

    if checkpoint.config.get("auto_map"):
        raise _Unknown("its code comes with it")
    try:
        config = config_of(checkpoint)
    except (ValueError, OSError, KeyError, ImportError) as error:
        if (kind := checkpoint.config.get("model_type")) and kind not in CONFIG_MAPPING:
            raise RequestError(
                f"{checkpoint.path / 'config.json'}: transformers {transformers.__version__} knows no model type "
                f"{kind!r}: install a newer one, or the package that brings the type"
            ) from error
        raise _Unknown(f"transformers cannot read its config.json ({error})") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    named = checkpoint.facts.architecture
    seeing = class_named(named, config) if named.endswith("ForConditionalGeneration") else None
    causal = CAUSAL.get(type(config), None) if checkpoint.facts.family == "causal" else None
    model_class = seeing or causal or class_named(named, config)
    if model_class is None:
        raise _Unknown(f"transformers has no {checkpoint.facts.architecture} of the kind {config.model_type}")
    try:
        return without_storage(model_class._from_config, config, torch.float32)
    except (ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError, RuntimeError) as error:
        raise RequestError(
            f"{checkpoint.path / 'config.json'}: transformers cannot build {model_class.__name__} of these sizes "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


def class_named(name: str, config: Any) -> Any | None:
    """Returns the class of transformers that a config.json names; None if it is no model of such a config."""
    import transformers

    found: Any = getattr(transformers, name, None)
    model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    # the name is the file's: nothing else is called
    return found if model and isinstance(config, found.config_class or ()) else None


def compare(
    model: Any, shapes: dict[str, tuple[int, ...]]
) -> tuple[list[str], list[tuple[str, tuple[int, ...], tuple[int, ...]]], list[str], list[str]]:
    """Passes shapes to transformers' loader in place of weights.

    Args:
        model: built without storage.
        shapes: of every stored tensor, by its name.

    Returns:
        Names that would stay random; names with their stored and their expected shape; names that are not used; names
        among these that transformers knows from older versions.
    """
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    order = {name: at for at, name in enumerate(model.state_dict())}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = with_joined_experts(model, shapes)
    given = {name: torch.empty(shape, dtype=model.dtype, device="meta") for name, shape in shapes.items()}
    how = LoadStateDictConfig(
        device_map={"": "meta"}, dtype=model.dtype, weight_mapping=get_model_conversion_mapping(model)
    )
    with quiet():
        info, _ = convert_and_load_state_dict_in_model(model, given, how)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        surplus = set(info.unexpected_keys)
        model._adjust_missing_and_unexpected_keys(info)
    wrong = [(name, tuple(stored), tuple(expected)) for name, stored, expected in info.mismatched_keys]
    wrong += [(name, (), wanted.get(name, ())) for name in info.conversion_errors]
    missing = set(info.missing_keys) - {name for name, *_ in wrong}
    return (
        sorted(missing, key=lambda name: order.get(name, 0)),
        sorted(wrong),
        sorted(surplus),
        sorted(surplus - set(info.unexpected_keys)),
    )


def with_joined_experts(model: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns shapes of stored tensors in which matrices of experts that only lighten stores one by one are joined.

    Where all parts of a parameter are there, in their shapes, they are one tensor. Others stay by themselves.
    """
    if not any(ONE.fullmatch(name) for name in shapes):
        return shapes
    filler = Filler(model, shapes)
    wanted = model.state_dict()
    parts: dict[str, list[str]] = {}
    for name in filler.parts:
        parts.setdefault(filler.places[name], []).append(name)
    found = dict(shapes)
    for place, names in parts.items():
        whole = tuple(wanted[place].shape)
        sizes = [filler.parts[name].shape(whole) for name in names]
        same = all(tuple(shapes[name]) == size for name, size in zip(names, sizes, strict=True))
        if same and sum(map(math.prod, sizes)) == math.prod(whole):
            found = {name: shape for name, shape in found.items() if name not in names} | {place: whole}
    return found


def refuse(
    name: str,
    checkpoint: Checkpoint,
    missing: Iterable[str],
    wrong: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]],
    surplus: Iterable[str],
    known: set[str],
) -> None:
    """Raises RequestError for weights that are missing or misshapen.

    Args:
        name: what the person calls the directory.
        checkpoint: what was read.
        missing: names that nothing was found for.
        wrong: names with their stored and their expected shape.
        surplus: stored names that nothing was found for.
        known: names that the architecture has.
    """
    missing, wrong, surplus = list(missing), list(wrong), list(surplus)
    if missing:
        if found := _prefix(surplus, known):
            prefix, count = found
            left = next((f", which {tool} leaves" for part, tool in WRAPPERS.items() if part in prefix), "")
            files = sorted({checkpoint.weight_map[each] for each in surplus if each in checkpoint.weight_map})
            command = RENAME.format(file=checkpoint.path / (files or ["model.safetensors"])[0], prefix=prefix)
            more = f" (and the same for {len(files) - 1} more files and the index)" if files[1:] else ""
            raise RequestError(
                f"{name}: {count} of {len(known)} weights are there, but their names begin with {prefix!r}{left}, "
                f"so that loaders would leave them random. Rename them once: {command}{more}"
            )
        saved = str((read_json(checkpoint.path / "config.json").get("architectures") or [""])[0])
        if saved.endswith("Model") and all("head" in each or each.startswith("embed_out") for each in missing):
            raise RequestError(
                f"{name} was saved without its head ({saved}): {_listed(missing)} would be random. Save the whole "
                "model again, by AutoModelForCausalLM"
            )
        packed = [each for each in surplus if each.endswith((".qweight", ".weight_packed", ".SCB"))]
        if packed and not checkpoint.quantization:
            raise RequestError(
                f"{name} has packed weights ({packed[0]}, …), and neither a quantization_config in config.json nor a "
                "quantize_config.json says how they are packed: fetch that file too"
            )
        raise RequestError(
            f"{name} lacks {len(missing)} of the {len(known)} weights of {checkpoint.facts.architecture}: "
            f"{_listed(missing)}. Loaders would fill them with random numbers: fetch or save the model again"
        )
    if wrong:
        sizes = [f"{each} is {_size(stored)} where config.json asks for {_size(wish)}" for each, stored, wish in wrong]
        raise RequestError(
            f"{name}: {_listed(sizes, '; ')}. A model whose layers differ in width has no config.json that says so: "
            "give the one that these weights were saved with"
        )


def _size(shape: tuple[int, ...]) -> str:
    return str(list(shape)) if shape else "of other shapes"


def _listed(names: list[str], between: str = ", ") -> str:
    more = f"{between}and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return between.join(names[:SHOWN]) + more


def _prefix(surplus: list[str], known: set[str]) -> tuple[str, int] | None:
    """Returns the prefix without which most of the names would be known, and their number; None if there is none."""
    found: Counter[str] = Counter()
    for name in surplus:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in known:
                found[".".join(parts[:cut]) + "."] += 1
                break
    if not found:
        return None
    prefix, count = found.most_common(1)[0]
    return (prefix, count) if 2 * count > len(surplus) else None


def loaded(path: Path, info: dict[str, Any], name: str | None = None) -> None:
    """Raises Failure if transformers left weights of a model random.

    Args:
        path: the model directory.
        info: the output of `from_pretrained(…, output_loading_info=True)`.
        name: the name that the person gave.
    """
    weights = re.compile(r"(weight|bias|qweight|weight_packed)$")
    missing = sorted(each for each in info["missing_keys"] if weights.search(each))
    wrong = sorted(str(each[0]) for each in info["mismatched_keys"])
    if missing or wrong:
        what = f"lacks {_listed(missing)}" if missing else f"has other shapes than config.json says: {_listed(wrong)}"
        raise Failure(f"{name or path} {what}: transformers would fill this with random numbers; fetch it again")
