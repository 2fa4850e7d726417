"""The model that a quantized directory or GGUF file was made from, as its manifest tells it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighten.compress.quantize.methods import METHODS
from lighten.errors import Failure, RequestError
from lighten.model.checkpoint import read_config
from lighten.pipeline.steps import step_class
from lighten.store.artifact import find_damage, read_artifact
from lighten.store.files import MANIFEST, stage_key

MAKERS = ("quantize", "export")
"""Steps whose output may have scales that train."""


@dataclass(frozen=True)
class Made:
    """A directory or a file that lighten quantized, and its source."""

    path: Path
    model: str
    revision: str | None
    parent: str
    """Key of the stage that was quantized."""

    def check(self, key: str) -> None:
        """Raises RequestError if the source is not the model that was quantized; `key` is of its stage."""
        if key != self.parent:
            raise RequestError(
                f"{self.path} was not quantized from {self.model} as it is now: it has changed since, or other steps "
                "came in between; polish in the recipe that quantizes"
            )


def read(path: Path) -> Made:
    """Returns what the manifest of a quantized directory, or of that of a GGUF file, tells of its source.

    Raises:
        RequestError: lighten did not quantize it, or it was changed since.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / MANIFEST).is_file():
        raise RequestError(_stranger(path))
    try:
        artifact = read_artifact(folder)
        kind = dict(artifact.manifest.get("step") or {})
        config, parents = artifact.manifest["config"], list(artifact.manifest["parents"])
        source = dict(artifact.manifest["source"])
        ours = stage_key(str(kind.get("kind")), int(kind.get("version", 0)), config, parents) == artifact.key
        what = str(kind.get("kind"))
        named, able = _scales(what, config) if what in MAKERS else ("", False)
    except (Failure, LookupError, TypeError, ValueError) as error:
        raise RequestError(f"{path} is no artifact that can be polished: {error}") from error
    if what not in MAKERS or not parents or not source.get("id"):
        raise RequestError(f"{path} is not what quantize or export wrote (it is of {what}): nothing to polish")
    if not able:
        raise RequestError(f"{path} was quantized with {named}, which has no scales of integer codes in groups")
    damage = [] if not ours else find_damage(artifact)
    if not ours or damage:
        found = damage[0] if damage else f"its {MANIFEST} was edited"
        raise RequestError(f"{path} is not as lighten wrote it ({found}): quantize anew, then polish")
    return Made(path, str(source["id"]), source.get("revision"), str(parents[0]))


def _stranger(path: Path) -> str:
    """Returns what to say of something without a manifest."""
    if path.is_file():
        return (
            f"{path} has no {MANIFEST} beside it: nothing says which model it was made from; export that model, then "
            "polish"
        )
    method = (read_config(path).get("quantization_config") or {}).get("quant_method")
    return (
        f"{path} has no {MANIFEST}: its {method} codes are not lighten's, and nothing says which model they were "
        "made from; quantize that model, then polish"
    )


def _scales(kind: str, config: dict[str, Any]) -> tuple[str, bool]:
    """Returns the name of the method or type, and whether what it writes has scales that can train."""
    if kind == "quantize":
        name = str(config.get("method"))
        return name, name in METHODS.names and bool(METHODS.load(name).scales_train)
    step = step_class(kind, config).model_validate(config)
    return str(config.get("type") or step.writes), bool(getattr(step, "scales_train", False))
