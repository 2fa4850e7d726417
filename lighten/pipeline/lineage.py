"""The model that a quantized directory was made from, as its manifest tells it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lighten.compress.quantize.methods import METHODS
from lighten.errors import Failure, RequestError
from lighten.model.checkpoint import read_config
from lighten.store.artifact import find_damage, read_artifact
from lighten.store.files import MANIFEST, stage_key


@dataclass(frozen=True)
class Made:
    """A directory that lighten quantized, and its source."""

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
    """Returns what the manifest of a quantized directory tells of its source.

    Raises:
        RequestError: lighten did not quantize it, or it was changed since.
    """
    method = (read_config(path).get("quantization_config") or {}).get("quant_method")
    if not (path / MANIFEST).is_file():
        raise RequestError(
            f"{path} has no {MANIFEST}: its {method} codes are not lighten's, and nothing says which model they were "
            "made from; quantize that model, then polish"
        )
    try:
        artifact = read_artifact(path)
        kind = dict(artifact.manifest.get("step") or {})
        config, parents = artifact.manifest["config"], list(artifact.manifest["parents"])
        source = dict(artifact.manifest["source"])
        ours = stage_key(str(kind.get("kind")), int(kind.get("version", 0)), config, parents) == artifact.key
    except (Failure, LookupError, TypeError, ValueError) as error:
        raise RequestError(f"{path} is no artifact that can be polished: {error}") from error
    name = str(config.get("method"))
    if kind.get("kind") != "quantize" or not parents or not source.get("id"):
        raise RequestError(f"{path} is not what quantize wrote (it is of {kind.get('kind')}): nothing to polish")
    if name not in METHODS.names or not METHODS.load(name).scales_train:
        raise RequestError(f"{path} was quantized with {name}, which has no scales of integer codes in groups")
    damage = [] if not ours else find_damage(artifact)
    if not ours or damage:
        what = damage[0] if damage else f"its {MANIFEST} was edited"
        raise RequestError(f"{path} is not as lighten wrote it ({what}): quantize anew, then polish")
    return Made(path, str(source["id"]), source.get("revision"), str(parents[0]))
