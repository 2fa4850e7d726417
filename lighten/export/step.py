"""The export step: a model becomes what another runtime reads. Each format is a class of its own."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from lighten.stage import Step
from lighten.store import Artifact


class Export(Step):
    """What all exports have in common; `lighten.steps` picks the class by `format`."""

    kind: ClassVar[str] = "export"

    format: Literal["gguf", "onnx", "bundle"] = Field(description="what to write")


def about(source: Artifact) -> dict[str, str]:
    """Returns name, licence and origin of a model; where it lay on this machine does not go into the file."""
    origin = source.manifest.get("source", {})
    model = str(origin.get("id") or "")
    about = {"name": model.rpartition("/")[2].rpartition(":")[2].removesuffix(".gguf")}
    if licence := origin.get("licence"):
        about["license"] = str(licence)
    if model.startswith("demo:") or (model.count("/") == 1 and not model.startswith((".", "~", "/"))):
        about["source"] = model
    return about
