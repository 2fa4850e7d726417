"""The `export` step for CTranslate2: its own converter, on weights that are read here, and made ready for 8 bits."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lighten.errors import Failure, RequestError, missing_extra
from lighten.export.ctranslate2.rounding import LENGTH, SAMPLES, round_linears
from lighten.export.ctranslate2.settings import CTranslate2
from lighten.export.ctranslate2.stream import changed
from lighten.export.text import built_in
from lighten.facts import ModelFacts
from lighten.model.checkpoint import Checkpoint
from lighten.model.ctranslate2_source import COMPUTE_TYPE, read_vocabulary
from lighten.model.files import read_json
from lighten.model.tokenizer_files import copy_words
from lighten.step import Context
from lighten.store.artifact import Artifact
from lighten.store.files import write_json

_WITHOUT = "weights were rounded to the nearest codes"
_NOT_COPIED = ("config.json", "quantize_config.json")


def run(step: CTranslate2, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
    """Writes the directory and returns its facts.

    Raises:
        RequestError: the package is missing, or the converter has no loader for the model.
        Failure: the converter cannot convert it, or its vocabulary names two ids alike.
    """
    checkpoint = Checkpoint(source.path)
    facts, method = checkpoint.facts, (checkpoint.quantization or {}).get("quant_method")
    step.check(facts)
    step.check_source(source.format, facts)
    ids = (
        built_in(source.path, facts, (SAMPLES, LENGTH), context, _WITHOUT)
        if step.feeds_back and facts.task == "causal"
        else None
    )
    told: dict[str, Any] = {"rounding": "gptq" if ids is not None else "nearest"} if step.codes else {}
    context.report(0, 2, "converting")
    with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as folder:
        made = Path(folder) / "model"
        names = _convert(source.path, made, step, facts, method, ids, told, context)
        for file in made.iterdir():
            shutil.move(file, out / file.name)
    copy_words(source.path, out, leave=[*_NOT_COPIED, *(file.name for file in out.iterdir())])
    context.report(2, 2, "")
    if method:
        context.warnings.append(f"the weights of a {method} checkpoint were unpacked: its rounding is in the model")
    return {
        "format": "ctranslate2",
        **({"unpacked": method} if method else {}),
        "quantization": step.quantization,
        **({"compute_type": step.compute_type} if step.compute_type else {}),
        **told,
        "context": facts.context,
        "vocabularies": names,
    }


def ready(load: Callable[[], Any], ids: torch.Tensor, context: Context) -> tuple[Any, dict[str, Any]]:
    """Returns a model whose weights are on the grid of the converter, and facts.

    Args:
        load: opens the model in float32. It is called again if the model has another structure than was thought.
        ids: tokens, `[samples, length]`.
        context: hears of the progress.
    """
    for turned in (True, False):
        model = load()
        if changed(model, ids, turned=turned):
            break
    else:
        model, turned = load(), None
    inputs = "as they are" if turned is None else "evened and turned" if turned else "evened"
    return model, {"inputs": inputs, **round_linears(model, ids, context.report)}


def _convert(
    source: Path,
    made: Path,
    step: CTranslate2,
    facts: ModelFacts,
    method: str | None,
    ids: torch.Tensor | None,
    told: dict[str, Any],
    context: Context,
) -> dict[str, int]:
    """Writes the model into a new directory. Returns the number of tokens of each vocabulary, by its file."""
    try:
        from ctranslate2.converters import TransformersConverter
    except ImportError as error:
        raise missing_extra("ctranslate2", "ctranslate2", "export to CTranslate2") from error
    from lighten.model import whole
    from lighten.model.loading import from_pretrained

    class Converter(TransformersConverter):  # type: ignore[misc]
        """The library's converter. Weights are read as everywhere here: never pickled, all of them, float32."""

        def load_model(self, model_class: Any, model_name_or_path: str, **options: Any) -> Any:
            def opened() -> Any:
                if method:
                    model = whole.load(source, torch.float32)
                    model.config.quantization_config = None
                    return model
                return from_pretrained(model_class, source, **{**options, "dtype": torch.float32})

            if ids is None:
                return opened()
            model, facts = ready(opened, ids, context)
            told.update(facts)
            return model

        def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **options: Any) -> Any:
            found = tokenizer_class.from_pretrained(source, local_files_only=True, trust_remote_code=False)
            _name_ends(found, Checkpoint(source).config)
            return found

    try:
        Converter(str(source)).convert(str(made), quantization=step.quantization)
    except (Failure, RequestError):
        raise
    except Exception as error:  # its loaders say in their own ways what they do not hold
        reason = " ".join(str(error).split())[:400]
        raise Failure(
            f"CTranslate2's converter does not convert this {facts.architecture} ({type(error).__name__}: {reason}): "
            "gguf and onnx take more"
        ) from error
    _name_unknown(made / "config.json")
    if step.compute_type:
        write_json(made / "config.json", {**read_json(made / "config.json"), COMPUTE_TYPE: step.compute_type})
    names: dict[str, int] = {}
    for file in sorted(made.glob("*vocabulary.json")):
        tokens = read_vocabulary(file)
        names[file.name] = len(tokens)
        if len(set(tokens)) < len(tokens):
            twice = next(token for place, token in enumerate(tokens) if token in tokens[:place])
            raise Failure(f"two ids of the tokenizer spell {twice!r}, and CTranslate2 finds tokens by what they spell")
    return names


def _name_ends(tokenizer: Any, config: Mapping[str, Any]) -> None:
    """Names the tokens that begin and end a text, which the library must know, where only the config has their ids."""
    for name, other in (("eos", "bos"), ("bos", "eos")):
        if getattr(tokenizer, f"{name}_token") is None:
            told = config.get(f"{name}_token_id")
            id = told[0] if isinstance(told, list) and told else told
            known = isinstance(id, int) and 0 <= id < len(tokenizer)
            named = tokenizer.convert_ids_to_tokens(id) if known else getattr(tokenizer, f"{other}_token")
            if named is None:
                raise Failure("neither the tokenizer nor the config names a token that ends a text: name eos_token")
            setattr(tokenizer, f"{name}_token", named)


def _name_unknown(file: Path) -> None:
    """Names no token for unknown ones where the tokenizer has none. Some loaders leave null, which cannot be loaded."""
    settings = read_json(file)
    if settings.get("unk_token", "") is None:
        write_json(file, {**settings, "unk_token": ""})
