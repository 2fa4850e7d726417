"""The export step: a model directory becomes one file for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from lighten.errors import RequestError
from lighten.stage import Context, Estimate, ModelFacts, Step
from lighten.store import Artifact

_BITS = {
    "F32": 32.0,
    "F16": 16.0,
    "BF16": 16.0,
    "Q8_0": 8.5,
    "Q6_K": 6.56,
    "Q5_K_M": 5.7,
    "Q4_K_M": 4.9,
    "Q4_0": 4.6,
    "Q3_K_M": 3.95,
    "Q2_K": 3.2,
}
"""Bits per weight where every row is a multiple of 256, for predictions."""
_FALLBACK_BITS = {"Q6_K": 8.1, "Q5_K_M": 6.6, "Q4_K_M": 6.2, "Q3_K_M": 5.5, "Q2_K": 5.2}
"""The same where the rows of the hidden size are not: what SmolLM2-135M (576) came to."""

_WRITE_SECONDS = 2e-8
"""Per weight, to write the plain file: 2.5 s for SmolLM2-135M on two cores."""
_QUANTIZE_SECONDS = {"Q8_0": 5e-9, "Q4_0": 5e-9}
"""Per weight, for the types faster than the K-quants' 1.5e-8: 0.6 s against 2 s for SmolLM2-135M."""


class Export(Step):
    """Writes one file `model-<type>.gguf`."""

    kind: ClassVar[str] = "export"
    version: ClassVar[int] = 1

    format: Literal["gguf"] = Field(description="what to write")
    type: Literal["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K"] = Field(
        "Q4_K_M", description="llama.cpp's name of the type of the weights"
    )
    imatrix: bool = Field(False, description="weigh rounding errors by the mean square of the inputs")

    @property
    def quantized(self) -> bool:
        """Whether llama.cpp quantizes the weights."""
        return self.type not in ("F32", "F16", "BF16")

    def needs_sweep(self) -> bool:
        """True with an importance matrix: it is the diagonal of the Grams."""
        return self.imatrix and self.quantized

    def requires(self) -> list[tuple[str, str]]:
        """`gguf` to write, `llama_cpp` to quantize."""
        return [("gguf", "gguf"), *([("llama_cpp", "gguf")] if self.quantized else [])]

    def check(self, facts: ModelFacts) -> None:
        """Refuses architectures that cannot be written, and widths that the type's blocks do not fit."""
        from lighten.export.gguf import check_architecture

        check_architecture(facts.architecture)
        widths = (facts.hidden, facts.heads * facts.head_dim, facts.intermediate)
        if self.type in ("Q8_0", "Q4_0") and (odd := [width for width in widths if width % 32]):
            raise RequestError(
                f"type {self.type} needs rows that are multiples of 32, this model has rows of {odd[0]}: use F16"
            )

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the size of the file, the largest tensor in memory, and time by what SmolLM2-135M took.

        While it runs, the step also holds the plain file: 2 bytes a weight.
        """
        bits = _FALLBACK_BITS.get(self.type, _BITS[self.type]) if facts.hidden % 256 else _BITS[self.type]
        largest = max(facts.vocab * facts.hidden, facts.hidden * facts.intermediate)
        quantizing = _QUANTIZE_SECONDS.get(self.type, 1.5e-8) if self.quantized else 0.0
        return Estimate(
            seconds=(_WRITE_SECONDS + quantizing) * facts.params,
            peak_bytes=500_000_000 + 12 * largest,
            disk_bytes=int(facts.params * bits / 8),
        )

    def run(self, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
        """Writes the file and returns its facts.

        Raises:
            RequestError: the source is not a plain Hugging Face directory.
        """
        if source.format != "hf":
            raise RequestError(
                f"GGUF export reads unquantized models, this one is {source.format}: export before quantizing, "
                "and let `type` choose the bits"
            )
        from lighten.export import gguf
        from lighten.model.checkpoint import Checkpoint

        file = out / f"model-{self.type}.gguf"
        about = _about(source)
        if not self.quantized:
            context.warnings += gguf.write(source.path, file, self.type, context.report, about)
            return {**gguf.describe(file, self.type), "imatrix": False}
        weights = None
        if self.needs_sweep():
            if context.grams is None:
                raise RequestError("imatrix: true needs a calibration set: name one under calibration")
            weights = gguf.importance(context.grams, Checkpoint(source.path).facts)
        plain = out / "plain.gguf"
        try:
            context.warnings += gguf.write(source.path, plain, None, about=about)
            gguf.quantize(plain, file, self.type, weights, context.report)
        finally:
            plain.unlink(missing_ok=True)
        return {**gguf.describe(file, self.type), "imatrix": weights is not None}


def _about(source: Artifact) -> dict[str, str]:
    """Returns name, licence and origin of a model; where it lay on this machine does not go into the file."""
    origin = source.manifest.get("source", {})
    model = str(origin.get("id") or "")
    about = {"name": model.rpartition("/")[2].rpartition(":")[2].removesuffix(".gguf")}
    if licence := origin.get("licence"):
        about["license"] = str(licence)
    if model.startswith("demo:") or (model.count("/") == 1 and not model.startswith((".", "~", "/"))):
        about["source"] = model
    return about
