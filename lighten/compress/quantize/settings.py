"""Settings of the `quantize` step: the methods, what each may be told, and what it needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from lighten.errors import RequestError
from lighten.facts import ModelFacts
from lighten.settings import Budget
from lighten.step import Estimate, Step


@dataclass(frozen=True)
class Method:
    """What a method may be told, and what it needs."""

    settings: Mapping[str, Any]
    """Its settings and their defaults."""
    bits: tuple[int, ...]
    groups: tuple[int | str, ...] = ()
    sweep: bool = False
    needs: tuple[tuple[str, str], ...] = ()
    """Packages beyond the core: module and the extra that brings it."""
    seconds: float = 0.0
    """Per weight, for predictions."""


_GROUPS = (-1, 32, 64, 128)
_BNB = (("bitsandbytes", "bnb"), ("accelerate", "bnb"))
_COMPRESSED = (("compressed_tensors", "compressed"),)
_FOUR = {"bits": 4, "block_size": 64, "double_quant": True, "ignore": ()}
_EIGHT = {"bits": 8, "ignore": ()}
METHODS = {
    "gptq": Method(
        {
            "bits": 4,
            "group_size": 128,
            "sym": True,
            "desc_act": False,
            "damp_percent": 0.05,
            "budget": None,
            "ignore": (),
            "head": "keep",
        },
        (2, 3, 4, 8),
        _GROUPS,
        sweep=True,
    ),
    "rtn": Method(
        {"bits": 4, "group_size": 128, "sym": True, "ignore": (), "head": "keep"}, (2, 3, 4, 8), (*_GROUPS, "tensor")
    ),
    "awq": Method({"bits": 4, "group_size": 128, "sym": False, "ignore": ()}, (4,), _GROUPS, sweep=True),
    "nf4": Method(_FOUR, (4,), needs=_BNB),
    "fp4": Method(_FOUR, (4,), needs=_BNB),
    "int8": Method(_EIGHT, (8,), needs=_BNB),
    "int8-dynamic": Method({**_EIGHT, "head": "keep"}, (8,), needs=_COMPRESSED),
    "w8a8": Method({**_EIGHT, "head": "keep", "alpha": 0.5}, (8,), sweep=True, needs=_COMPRESSED),
    "fp8": Method(_EIGHT, (8,), needs=_COMPRESSED),
}


class Quantize(Step):
    """Coarser weights, in a format that the ecosystem's loaders open."""

    kind: ClassVar[str] = "quantize"
    work: ClassVar[str] = "lighten.compress.quantize.step:run"
    version: ClassVar[int] = 2

    method: Literal["gptq", "rtn", "awq", "nf4", "fp4", "int8", "int8-dynamic", "w8a8", "fp8"] = Field(
        "gptq", description="how to choose the codes"
    )
    bits: Literal[2, 3, 4, 8] | None = Field(None, description="bits of a weight (gptq, rtn; default: 4)")
    group_size: Literal[-1, 32, 64, 128, "tensor"] | None = Field(
        None, description="inputs that share a scale; -1 for all of them, tensor for the whole matrix (default: 128)"
    )
    sym: bool | None = Field(None, description="symmetric grid, its zero point in the middle (gptq, rtn; default: yes)")
    desc_act: bool | None = Field(None, description="gptq: round the inputs in order of falling activation")
    damp_percent: float | None = Field(
        None, gt=0, lt=1, description="gptq: share of the mean of diag(H) that is added to it (default: 0.05)"
    )
    budget: Budget | None = Field(
        None, description="gptq: bits=4.25 on average, or size=90MB of the artifact, spent where they matter"
    )
    ignore: tuple[str, ...] = Field((), description="modules to leave alone: patterns such as *.0.mlp.* or re:REGEX")
    head: Literal["keep", 8] | None = Field(
        None, description="the output head: keep it, or 8 bits where it is not tied to the embedding (default: keep)"
    )
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] | None = Field(
        None, description="nf4, fp4: weights that share a scale (default: 64)"
    )
    double_quant: bool | None = Field(None, description="nf4, fp4: quantize the scales too (default: yes)")
    alpha: float | None = Field(
        None, ge=0, le=1, description="w8a8: how far outliers move from activations into weights (default: 0.5)"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_the_method(cls, given: Any) -> Any:
        """Fills in the method's defaults, and refuses settings that are another method's."""
        if not isinstance(given, dict) or (method := METHODS.get(given.get("method", "gptq"))) is None:
            return given
        given = {name: value for name, value in given.items() if value is not None}
        name = given.get("method", "gptq")
        for key in given:
            if key in cls.model_fields and key != "method" and key not in method.settings:
                raise ValueError(f"{name} has no setting {key}; it has {', '.join(method.settings)}")
        if given.get("budget") and "bits" in given:
            raise ValueError("a budget chooses the bits: give one of the two")
        value = {**method.settings, **given}
        if re.fullmatch(r"-?\d+", size := str(value.get("group_size"))):
            value["group_size"] = int(size)  # the command line knows text only
        if str(value.get("head")) == "8":
            value["head"] = 8
        for key, allowed in (("bits", method.bits), ("group_size", method.groups)):
            if key in value and value[key] not in allowed:
                able = [
                    other for other, each in METHODS.items() if value[key] in getattr(each, key.replace("_size", "s"))
                ]
                if able:  # what no method takes is refused by the field itself
                    hint = f"{value[key]} is for {', '.join(able)}"
                    raise ValueError(f"{name} takes {key} {_or(allowed)}, not {value[key]!r}; {hint}")
        if name == "awq" and value["sym"]:
            raise ValueError("the awq format has a zero point per group: sym is for gptq and rtn")
        if given.get("budget"):
            del value["bits"]
        return value

    @model_validator(mode="after")
    def _can_be_opened(self) -> Quantize:
        """Refuses what loaders do not open: transformers expects the zero points of compressed-tensors unpacked."""
        if self.format == "compressed-tensors" and self.sym is False:
            raise ValueError(
                "a budget, ignore and head need the compressed-tensors format, in which transformers opens symmetric "
                "grids only: leave out sym: false"
            )
        if self.format == "compressed-tensors" and self.desc_act and self.group_size != -1:
            raise ValueError(
                "a budget, ignore and head need the compressed-tensors format, whose groups are of neighbouring "
                "inputs: leave out desc_act, or set group_size: -1"
            )
        return self

    @property
    def _how(self) -> Method:
        return METHODS[self.method]

    @property
    def format(self) -> str:
        """The format it is stored in: where `gptq` cannot say what differs between modules, compressed-tensors."""
        if self.method in ("gptq", "rtn"):
            return "compressed-tensors" if self.budget or self.ignore or self.head == 8 else "gptq"
        if self.method == "awq":
            return "awq"
        return "bitsandbytes" if self.method in ("nf4", "fp4", "int8") else "compressed-tensors"

    def key_config(self) -> dict[str, Any]:
        """Returns the settings that this method has and that are given."""
        return {name: value for name, value in self.model_dump(mode="json").items() if value not in (None, [], "keep")}

    def needs_sweep(self) -> bool:
        """Whether the method reads Grams."""
        return self._how.sweep

    def needs_sensitivity(self) -> bool:
        """Whether bits are to be spent where the loss depends on them."""
        return self.budget is not None

    def requires(self) -> list[tuple[str, str]]:
        """What writes the format, and what reads it back."""
        return list(self._how.needs) + (list(_COMPRESSED) if self.format == "compressed-tensors" else [])

    def check(self, facts: ModelFacts) -> None:
        """Raises RequestError where a group or a packed word does not divide a width of the model."""
        if self.head == 8 and facts.tied:
            raise RequestError(
                "the head of this model is tied to its embedding, which no loader expects quantized: leave out head, "
                "or export it (export: {format: gguf, budget: …} chooses a type for the two)"
            )
        attention = facts.heads * facts.head_dim
        widths = {"hidden_size": facts.hidden, "attention width": attention, "intermediate_size": facts.intermediate}
        outputs = {**widths, "key/value width": facts.kv_heads * facts.head_dim}
        size = self.group_size
        for name, width in widths.items():
            if isinstance(size, int) and size != -1 and width % size:
                fits = [each for each in (128, 64, 32) if not any(w % each for w in widths.values())]
                raise RequestError(
                    f"group_size {size} does not divide the {name} {width} of this model; use {_or((*fits, -1))}"
                )
        for name, width in outputs.items():
            if self.format == "gptq" and width * (self.bits or 0) % 32:
                raise RequestError(f"{self.bits}-bit codes of the {name} {width} do not fill 32-bit words; use 8 bits")
            if self.format == "awq" and width % 8:
                raise RequestError(f"the awq format packs 8 outputs to a word; the {name} {width} is no multiple of 8")

    @property
    def writes(self) -> str:
        """The format it is stored in."""
        return self.format

    def check_source(self, form: str, facts: ModelFacts) -> None:
        """Refuses what is not plain weights."""
        if form != "hf":
            raise RequestError(f"this model is {form} already: quantize the one that it was made from")

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the products and rank updates in float32, the passes over the weights, and one layer of memory."""
        linears = facts.layers * facts.layer_linear_params
        bits = (self.bits or 4) + 20 / (self.group_size if isinstance(self.group_size, int) else 64)
        shape = facts.intermediate / facts.hidden
        product = facts.layer_linear_params * facts.hidden * (1 + shape / 3)
        cubes = 3 * facts.hidden**3 + facts.intermediate**3
        flops, seconds = {
            "gptq": (product + 0.7 * cubes, facts.layers * 0.0001 * (3 * facts.hidden + facts.intermediate)),
            "awq": (14 * 2 * product, 4e-8 * linears),
        }.get(self.method, (0.0, 2e-8 * linears))
        return Estimate(
            float32_flops=float(facts.layers * flops) * (2 if self.budget else 1),
            seconds=seconds + (1e-7 * linears if self.budget else 0),
            peak_bytes=500_000_000 + self.bytes_of_a_layer(facts),
            disk_bytes=int(linears * bits / 8) + 2 * facts.embedding_params,
        )

    def bytes_of_a_layer(self, facts: ModelFacts) -> int:
        """Returns about what working on one layer takes."""
        grams = facts.gram_elements * 2 if self.needs_sweep() else 0
        return 4 * (3 * grams + 3 * facts.layer_linear_params)


def _or(values: tuple[Any, ...]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
