"""The export step to a bundle: a GGUF file and all that a device needs to run, serve and measure it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from lighten.errors import Failure, RequestError
from lighten.export.bundle.step import _late
from lighten.export.bundle.targets import find_target
from lighten.export.gguf.settings import Gguf
from lighten.export.step import Export, about
from lighten.facts import ModelFacts
from lighten.step import Context, Estimate, Step
from lighten.store.artifact import Artifact
from lighten.store.names import as_name
from lighten.store.store import write_file

if TYPE_CHECKING:
    from lighten.export.bundle.bundle import Need

DEFAULT_TYPE = "Q4_K_M"
TYPES = tuple(name for name in get_args(Gguf.model_fields["type"].annotation) if name != "budget")


class Bundle(Export):
    """Writes a GGUF file with scripts, pinned requirements and checksums for a device, and all of it as an archive."""

    version: ClassVar[int] = 3

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
        """The step that makes the file."""
        return _gguf(self.type or DEFAULT_TYPE, self.imatrix)

    @property
    def rounded(self) -> bool:
        """Whether llama.cpp quantizes the weights."""
        return self.gguf.rounded

    def needs_sweep(self) -> bool:
        """True with an importance matrix."""
        return self.gguf.needs_sweep()

    def requires(self) -> list[tuple[str, str]]:
        """What writes and runs the file, and what packs it."""
        return [(module, "bundle") for module in (*(module for module, _ in self.gguf.requires()), "zstandard")]

    def after(self, previous: Step | None) -> Self:
        """Names the type where it makes the file itself; a GGUF file's own type stays."""
        if isinstance(previous, Gguf) and self.type not in (None, previous.type):
            raise RequestError(f"the source is a GGUF file of type {previous.type} already: leave out `type`")
        makes = self.type is None and not isinstance(previous, Gguf)
        return self.model_copy(update={"type": DEFAULT_TYPE}) if makes else self

    def check(self, facts: ModelFacts) -> None:
        """Refuses what the GGUF step refuses, and a type that will not fit the target."""
        if self.type is None:  # a GGUF file: its size is known once it is there
            return
        self.gguf.check(facts)
        self._check_size(facts)

    def check_source(self, form: str, facts: ModelFacts | None = None) -> None:
        """Refuses what is neither plain weights nor a GGUF file."""
        if form not in ("hf", "gguf"):
            raise RequestError(
                f"a bundle is made of an unquantized model or a GGUF artifact, this one is {form}: "
                "export before quantizing, and let `type` choose the bits"
            )

    def _check_size(self, facts: ModelFacts) -> str:
        from lighten.export.bundle.bundle import check_fit, need_of

        chosen = self.type or DEFAULT_TYPE
        need = need_of(facts, self.gguf.predict(facts, 0).disk_bytes, self.context)
        return check_fit(need, find_target(self.target), self.context, chosen, _others(facts, self.context))

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the cost of the file, of its archive and of a short measurement."""
        one = self.gguf.predict(facts, calibration_tokens)
        seconds = one.seconds + 5 + one.disk_bytes / 2e8 + (12 if self.measure else 0)
        return Estimate(one.fast_flops, one.float32_flops, seconds, one.peak_bytes, 2 * one.disk_bytes)

    def run(self, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
        """Writes the bundle and its archive, and returns its facts.

        Raises:
            RequestError: neither a model nor a GGUF artifact.
            Failure: the file that was made does not fit the target.
        """
        from lighten.export.bundle import bundle
        from lighten.export.bundle.readme import readme

        self.check_source(source.format)
        target, origin = find_target(self.target), about(source)
        made = self._model(source, out, context)
        model = bundle.read_model(sorted(out.glob("*.gguf")))
        tokens = min(self.context, model.trained_context or self.context)
        if tokens < self.context:
            context.warnings.append(f"the model was trained for {tokens:,} tokens: the bundle's context is that")
        need = bundle.Need(model.size_bytes, tokens * model.cache_per_token, model.runtime_bytes)
        chosen = str(made["type"])
        others = _others(facts, tokens) if (facts := _sizes(model.files[0])) else ()
        with _late():
            sentence = bundle.check_fit(need, target, tokens, chosen, others)
        context.report(1, 4, sentence)
        short = as_name(origin.get("name") or "model")[:80]
        written = bundle.write_bundle(
            out, model, target, name=f"{short}-{chosen}", type=chosen, context=tokens, about=origin
        )
        bundle.write_sums(out)
        size = sum((out / name).stat().st_size for name in bundle.contents(out))
        measured, why = None, "the recipe said not to"
        if self.measure:
            context.report(2, 4, "measuring it here")
            try:
                measured = bundle.measure(out, target, model)
            except Failure as error:
                why = str(error)
                context.warnings.append(why)
        write_file(out / "measured.json", (json.dumps(measured, indent=1) + "\n").encode())
        write_file(out / "README.md", readme(written, model, need, target, measured, why).encode())
        context.report(3, 4, "packing")
        folder = f"bundle-{target.name}"
        bundle.pack(out, out / f"{folder}{bundle.ARCHIVE}", folder)
        context.report(4, 4, sentence)
        return {
            **made,
            "format": "bundle",
            "target": target.name,
            "context": tokens,
            "size_bytes": size,
            "need_bytes": {"weights": need.weights, "cache": need.cache, "runtime": need.runtime, "total": need.total},
            "free_bytes": target.free_bytes,
            "read_bytes_per_token": bundle.read_bytes(model),
            "ceiling_tok_s": round(target.bandwidth / bundle.read_bytes(model), 2),
            "fit": sentence,
        }

    def _model(self, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
        """Puts the GGUF file or files into `out`; returns their facts."""
        if source.format == "gguf":
            held = str(source.facts.get("type", "GGUF"))
            if self.type and self.type != held:
                raise RequestError(f"the source is a GGUF file of type {held} already: leave out `type`")
            files = sorted(source.path.glob("*.gguf"))
            if not files:
                raise Failure(f"{source.path} holds no .gguf file")
            for file in files:
                shutil.copyfile(file, out / file.name)
                os.chmod(out / file.name, 0o644)
            return {"type": held, **source.facts}
        from lighten.model.checkpoint import Checkpoint

        with _late():
            context.report(0, 4, self._check_size(Checkpoint(source.path).facts))
        return self.gguf.run(source, out, context)


def _gguf(type: str, imatrix: bool) -> Gguf:
    return Gguf.model_validate({"format": "gguf", "type": type, "imatrix": imatrix})


def _sizes(file: Path) -> ModelFacts | None:
    """Returns the sizes of a model, or None where lighten does not read its architecture."""
    from lighten.model.gguf_source import inspect

    try:
        return inspect(file)
    except (RequestError, Failure):
        return None


def _others(facts: ModelFacts, tokens: int) -> Iterator[tuple[str, Need]]:
    """Returns what every type that the model can have would take."""
    from lighten.export.bundle.bundle import need_of

    for name in TYPES:
        try:
            step = _gguf(name, False)
            step.check(facts)
        except (RequestError, ValidationError):
            continue  # its rows do not fit, or it needs an importance matrix
        yield name, need_of(facts, step.predict(facts, 0).disk_bytes, tokens)
