"""Settings of the export to ONNX: a model directory becomes a graph for onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from lighten.errors import RequestError
from lighten.export.onnx import builder
from lighten.export.onnx.usage import usage
from lighten.export.step import Export
from lighten.facts import TASKS, ModelFacts, Task
from lighten.model.export_formats import Usage
from lighten.model.formats import FORMATS
from lighten.step import Estimate

KEPT = tuple(name for name, each in FORMATS.items() if each.codes_exported)
"""Formats whose weights go into the graph unchanged."""
_BITS = {"fp32": 32.0, "fp16": 16.0, "bf16": 16.0, "int8": 9.0, "int4": 5.0}
"""Bits per weight, with a float32 scale for every 32 weights, for predictions."""
_SECONDS = 1.5e-7
"""Seconds per weight: 20 s for SmolLM2-135M on two cores."""


class Onnx(Export):
    """Writes `model.onnx` with its weights beside it, and the files of the tokenizer."""

    work: ClassVar[str] = "lighten.export.onnx.step:run"
    version: ClassVar[int] = 3
    runtime: ClassVar[str] = "onnxruntime"
    library: ClassVar[str] = "onnx"
    calibrated: ClassVar[bool] = False
    tasks: ClassVar[tuple[Task, ...]] = TASKS

    format: Literal["onnx"] = Field(description="what to write")
    precision: Literal["fp32", "fp16", "bf16", "int8", "int4"] | None = Field(
        None, description="of the weights (int4 where the graph is genai, else fp32)"
    )
    graph: Literal["genai", "plain"] | None = Field(
        None,
        description="genai: the operators of onnxruntime and onnxruntime-genai; plain: standard ONNX operators only "
        "(genai for causal language models that onnxruntime-genai knows, plain for all others)",
    )
    provider: Literal["cpu", "cuda"] = Field("cpu", description="where a genai graph is to run")
    block_size: Literal[16, 32, 64, 128, 256] = Field(32, description="weights that share a scale, for int4 and int8")
    symmetric: bool = Field(True, description="int4 and int8 without zero points")
    algorithm: Literal["default", "rtn", "k_quant"] = Field(
        "default", description="onnxruntime's way of rounding weights to int4 and int8"
    )
    accuracy_level: Literal[0, 1, 2, 3, 4] = Field(
        4, description="arithmetic of int4 and int8 products: 1 float32, 2 float16, 3 bfloat16, 4 int8, 0 onnxruntime's"
    )
    ignore: tuple[str, ...] = Field(
        (), description="linears that are not to be quantized: patterns such as *.down_proj"
    )
    embedding: Literal["int8", "float", "int4"] = Field(
        "int8",
        description="precision of embedding and head where the rest is int4; float keeps it in a plain int8 graph",
    )

    @property
    def rounded(self) -> bool:
        """Whether weights are rounded, or products computed in 16 bits. GPTQ and AWQ sources are already rounded."""
        return (self.precision or ("fp32" if self.graph == "plain" else "int4")) != "fp32"

    def resolved_graph(self, facts: ModelFacts) -> Literal["genai", "plain"]:
        """Returns the type of graph for a model."""
        return self.graph or ("genai" if self._genai_holds(facts) else "plain")

    @staticmethod
    def _genai_holds(facts: ModelFacts) -> bool:
        known = builder.knows(facts.architecture) and facts.architecture not in builder.WRONG
        return facts.family == "causal" and known

    def resolved_precision(self, facts: ModelFacts) -> str:
        """Returns the precision of the weights for a model."""
        return self.precision or ("int4" if self.resolved_graph(facts) == "genai" else "fp32")

    def exact(self, facts: ModelFacts) -> bool:
        """Whether plain numbers of 32 or 16 bits are written unchanged."""
        return self.resolved_precision(facts) in ("fp32", "fp16")

    @classmethod
    def usage(cls, files: Sequence[str]) -> Usage | str | None:
        """See `Export`."""
        return usage(files)

    @classmethod
    def needs(cls) -> list[tuple[str, str]]:
        """Packages that write the graph, and packages that run it."""
        names = ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "onnxscript")
        return [(name, "onnx") for name in names]

    def promises(self) -> dict[str, Any]:
        """The graph runs on its own provider. numpy lacks bf16, so only the tokenizer of such a graph is compared."""
        given = super().promises()
        return {**given, "device": self.provider, **({"tokens": 0} if self.precision == "bf16" else {})}

    def check(self, facts: ModelFacts) -> None:
        """Refuses what the type of graph cannot hold for such a model."""
        precision = self.resolved_precision(facts)
        if self.resolved_graph(facts) == "plain":
            allowed = ("fp32", "fp16", "int8") if facts.family == "causal" else ("fp32", "int8")
            if precision not in allowed:
                raise RequestError(
                    f"a plain graph of {facts.architecture} has no {precision}: use one of {', '.join(allowed)}"
                    + (", or graph: genai" if self._genai_holds(facts) else "")
                )
            if self.provider != "cpu":
                raise RequestError("a plain graph runs on any provider: leave out `provider`")
            return
        if not builder.knows(facts.architecture):
            raise RequestError(
                f"the builder of onnxruntime-genai does not know {facts.architecture}; it knows "
                f"{', '.join(sorted(builder.architectures()))}. graph: plain takes what torch.export can trace"
            )
        if reason := builder.WRONG.get(facts.architecture):
            raise RequestError(
                f"onnxruntime-genai's builder knows {facts.architecture}, but its graph would be another model: "
                f"{reason}. Use graph: plain"
            )
        if precision == "bf16" and self.provider == "cpu":
            raise RequestError("onnxruntime has no bf16 arithmetic on CPUs: use fp32, or provider: cuda")

    def check_source(self, form: str, facts: ModelFacts) -> None:
        """Refuses quantized weights for which the type of graph has no operator."""
        if self.resolved_graph(facts) == "plain" and form in ("hf", *FORMATS):
            return  # weights of 32 bits hold what unpacked ones are
        if form not in ("hf", *KEPT):
            raise RequestError(
                f"genai graphs are made of unquantized, GPTQ and AWQ models, this one is {form}: set graph: plain, "
                "which unpacks it, or export its source, and let `precision` choose the bits"
            )
        if form in KEPT and (self.ignore or self.resolved_precision(facts) not in ("int4", "int8")):
            wrong = "`ignore`" if self.ignore else f"precision {self.precision}"
            raise RequestError(f"the weights of a {form} model are kept as they are: leave out {wrong}")

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the size of the weights, and the time that SmolLM2-135M took."""
        size = int(facts.params * _BITS[self.resolved_precision(facts)] / 8)
        return Estimate(seconds=8 + _SECONDS * facts.params, peak_bytes=900_000_000 + 8 * facts.params, disk_bytes=size)
