"""Settings of the export to a bundle: a GGUF file with everything that a device needs to run, serve and measure it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from lighten.errors import RequestError
from lighten.export.bundle.targets import find_target
from lighten.export.gguf.settings import Gguf
from lighten.export.step import Export
from lighten.facts import ModelFacts
from lighten.model.export_formats import Usage
from lighten.step import Estimate, Step

if TYPE_CHECKING:
    from lighten.export.bundle.bundle import Need

DEFAULT_TYPE = "Q4_K_M"
TYPES = tuple(name for name in get_args(Gguf.model_fields["type"].annotation) if name != "budget")


class Bundle(Export):
    """Writes a GGUF file with scripts, pinned requirements and checksums for a device, and all of it as an archive."""

    work: ClassVar[str] = "lighten.export.bundle.step:run"
    version: ClassVar[int] = 3
    runtime: ClassVar[str] = Gguf.runtime
    for_devices: ClassVar[bool] = True

    format: Literal["bundle"] = Field(description="what to write")
    target: str = Field(
        description="the device: rpi4, rpi5, rpi5-4gb, jetson-orin-nano, laptop-cpu, desktop-8gb-gpu, …"
    )
    type: str | None = Field(None, description="llama.cpp's type of the weights; a GGUF source is taken as it is")
    imatrix: bool = Field(False, description="weigh rounding errors by the mean square of the inputs")
    context: int = Field(2048, ge=64, description="tokens of context on the device")
    measure: bool = Field(True, description="run the bundle here for some ten seconds, for the figures in its README")

    @field_validator("target")
    @classmethod
    def _known_target(cls, value: str) -> str:
        try:
            return find_target(value).name
        except RequestError as error:
            raise ValueError(str(error)) from error

    @field_validator("type")
    @classmethod
    def _known_type(cls, value: str | None) -> str | None:
        if value is not None and value not in TYPES:
            raise ValueError(f"type must be one of {', '.join(TYPES)}")
        return value

    def check_files(self, folder: Path, facts: ModelFacts) -> None:
        """Refuses tokenizers that llama.cpp cannot follow."""
        Gguf.model_validate({"format": "gguf"}).check_files(folder, facts)

    @model_validator(mode="after")
    def _gguf_can(self) -> Self:
        try:
            _gguf(self.type or DEFAULT_TYPE, self.imatrix)
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
        return self

    @property
    def gguf(self) -> Gguf:
        """Step that makes the file."""
        return _gguf(self.type or DEFAULT_TYPE, self.imatrix)

    @property
    def rounded(self) -> bool:
        """Whether llama.cpp quantizes the weights."""
        return self.gguf.rounded

    def needs_sweep(self) -> bool:
        """True with an importance matrix."""
        return self.gguf.needs_sweep()

    @classmethod
    def usage(cls, files: Sequence[str]) -> Usage | str | None:
        """See `Export`."""
        return "Unpack the archive on the device; its README says how to chat, to serve and to measure."

    @classmethod
    def needs(cls) -> list[tuple[str, str]]:
        """Package that packs the archive."""
        return [("zstandard", "bundle")]

    def requires(self) -> list[tuple[str, str]]:
        """Packages that write and run the file, and the package that packs it."""
        return [(module, "bundle") for module, _ in (*self.gguf.requires(), *self.needs())]

    def after(self, previous: Step | None) -> Self:
        """Sets the type if the step makes the file itself. A GGUF file keeps its type."""
        if isinstance(previous, Gguf) and self.type not in (None, previous.type):
            raise RequestError(f"the source is a GGUF file of type {previous.type} already: leave out `type`")
        there = isinstance(previous, Gguf) or (previous is not None and previous.keeps_form)
        makes = self.type is None and not there
        return self.model_copy(update={"type": DEFAULT_TYPE}) if makes else self

    def check(self, facts: ModelFacts) -> None:
        """Refuses what the GGUF step refuses, and a type that does not fit the target."""
        if self.type is None:  # a GGUF file: its size is known once it is there
            return
        self.gguf.check(facts)
        self.check_size(facts)

    def check_source(self, form: str, facts: ModelFacts | None = None) -> None:
        """Refuses everything except plain weights and GGUF files."""
        if form not in ("hf", "gguf"):
            raise RequestError(
                f"a bundle is made of an unquantized model or a GGUF artifact, this one is {form}: "
                "export before quantizing, and let `type` choose the bits"
            )

    def check_size(self, facts: ModelFacts) -> str:
        """Returns a sentence on how it fits the target; raises RequestError if it does not."""
        from lighten.export.bundle.bundle import check_fit, need_of

        chosen = self.type or DEFAULT_TYPE
        need = need_of(facts, self.gguf.predict(facts, 0).disk_bytes, self.context)
        return check_fit(need, find_target(self.target), self.context, chosen, others_of(facts, self.context))

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the cost of the file, of its archive and of a short measurement."""
        one = self.gguf.predict(facts, calibration_tokens)
        seconds = one.seconds + 5 + one.disk_bytes / 2e8 + (12 if self.measure else 0)
        return Estimate(one.fast_flops, one.float32_flops, seconds, one.peak_bytes, 2 * one.disk_bytes)


def _gguf(type: str, imatrix: bool) -> Gguf:
    return Gguf.model_validate({"format": "gguf", "type": type, "imatrix": imatrix})


def others_of(facts: ModelFacts, tokens: int) -> Iterator[tuple[str, Need]]:
    """Returns the memory that every possible type of the model would take."""
    from lighten.export.bundle.bundle import need_of

    for name in TYPES:
        try:
            step = _gguf(name, False)
            step.check(facts)
        except (RequestError, ValidationError):
            continue  # its rows do not fit, or it needs an importance matrix
        yield name, need_of(facts, step.predict(facts, 0).disk_bytes, tokens)
