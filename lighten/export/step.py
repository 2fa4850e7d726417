"""The export step: a model becomes files for another runtime. Each format is a class of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from lighten.model.export_formats import Usage
from lighten.settings import Settings
from lighten.step import Step
from lighten.store.artifact import Artifact

PLAIN_LIMITS = {"perplexity": 0.0005, "top1": 0.99}
"""Limits of an export that rounds nothing, unless the recipe has others."""


class Parity(Settings):
    """How close an export must come to its source, on the same token ids."""

    example: ClassVar[str] = "top1=0.9,perplexity=0.05"

    perplexity: float | None = Field(None, gt=0, description="largest relative change of the perplexity")
    top1: float | None = Field(None, ge=0, le=1, description="least share of positions with the same likeliest token")
    tokenizer: float = Field(1.0, ge=0, le=1, description="least share of hard strings that get the same ids")
    tokens: int = Field(1024, ge=0, description="token ids that both compute; 0 compares the tokenizers only")


class Export(Step):
    """The common part of all exports. `EXPORTS` has the class of each `format`."""

    kind: ClassVar[str] = "export"
    computes: ClassVar[bool] = False

    library: ClassVar[str] = "transformers"
    """Library that the Hugging Face hub should name for it."""
    for_devices: ClassVar[bool] = False
    """Whether a small device can run it."""

    format: str = Field(description="what to write")
    parity: Parity | None = Field(
        None, description="how close it must come to its source: top1=0.9,perplexity=0.05 (unrounded: 0.99, 0.0005)"
    )

    @property
    def writes(self) -> str:
        """Format of its output."""
        return self.format

    @property
    def rounded(self) -> bool:
        """Whether weights are rounded. Then another perplexity is no mistake."""
        return False

    @property
    def scales_train(self) -> bool:
        """Whether its files hold codes in blocks whose scales `polish` can train."""
        return False

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out settings that are absent and were added later, so that a step without them keeps its key."""
        settings: dict[str, Any] = dump(self)
        return {name: value for name, value in settings.items() if value is not None or name not in self.optional}

    optional: ClassVar[tuple[str, ...]] = ("parity",)

    @classmethod
    def needs(cls) -> list[tuple[str, str]]:
        """Packages that only this format imports, as (module name, extra that brings it)."""
        return []

    @classmethod
    def usage(cls, files: Sequence[str]) -> Usage | str | None:
        """Returns how a person opens such files, in code or in words; None: as transformers opens a directory."""
        return None

    def requires(self) -> list[tuple[str, str]]:
        """Packages that the format needs."""
        return self.needs()

    def promises(self) -> dict[str, Any]:
        """Returns the limits that its output is checked against."""
        asked = self.parity or Parity.model_validate({})
        given = asked.model_dump(exclude={"tokens"}, exclude_none=True)
        limits = {**({} if self.rounded else PLAIN_LIMITS), **given}
        return {"limits": limits, "tokens": asked.tokens, "device": "cpu"}


def about(source: Artifact) -> dict[str, str]:
    """Returns name, licence and origin of a model. Its place on this machine does not go into the file."""
    origin = source.manifest.get("source", {})
    model = str(origin.get("id") or "")
    about = {"name": model.rpartition("/")[2].rpartition(":")[2].removesuffix(".gguf")}
    if licence := origin.get("licence"):
        about["license"] = str(licence)
    if model.startswith("demo:") or (model.count("/") == 1 and not model.startswith((".", "~", "/"))):
        about["source"] = model
    return about
