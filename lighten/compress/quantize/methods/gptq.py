"""`gptq`: rounding column by column; later columns make good for every error."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lighten.compress.quantize.methods.coded import Coded
from lighten.compress.quantize.settings import GroupSize, Head, Ignore
from lighten.facts import ModelFacts
from lighten.settings import Budget


class Gptq(Coded):
    """Settings of `gptq`."""

    rounds: ClassVar[str] = "lighten.compress.quantize.gptq:codes"
    allocates: ClassVar[str] = "lighten.compress.quantize.bits:allocate"
    swept: ClassVar[bool] = True

    method: Literal["gptq"] = Field("gptq", description="how to choose the codes")
    bits: Literal[2, 3, 4, 8] | None = Field(4, description="bits of a weight (gptq, rtn; default: 4)")
    group_size: GroupSize = 128
    sym: bool = Field(True, description="symmetric grid, its zero point in the middle (gptq, rtn; default: yes)")
    positive_scales: bool = Field(
        False, description="no scale below zero, for runtimes that have none (gptq, rtn; default: no)"
    )
    desc_act: bool = Field(False, description="gptq: round the inputs in order of falling activation (default: no)")
    static_groups: bool = Field(
        False, description="gptq: with desc_act, groups of neighbours; desc_act: static is both (default: no)"
    )
    damp_percent: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="gptq: share of the mean of diag(H) that is added to it (default: 0.05)"
    )
    propagate: Literal["auto", "off"] = Field(
        "off", description="gptq: auto rounds each layer against what the quantized layers before it give"
    )
    refine: Annotated[int, Field(ge=0, le=10)] = Field(
        0, description="gptq: rounds in which scales and codes are improved in turn afterwards (default: 0)"
    )
    smooth: float | None = Field(
        None,
        ge=0,
        le=1,
        description="gptq: how far loud inputs move into the weights before, for runtimes that round inputs to 8 bits",
    )
    budget: Budget | None = Field(
        None, description="gptq: bits=4.25 on average, or size=90MB of the artifact, spent where they matter"
    )
    ignore: Ignore = ()
    head: Head = "keep"

    @classmethod
    def completed(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Returns the settings; without bits if a budget chooses them, and both that `desc_act: static` stands for."""
        if given.get("desc_act") == "static":
            given = {**given, "desc_act": True, "static_groups": True}
        if not given.get("budget"):
            return given
        if "bits" in given:
            raise ValueError("a budget chooses the bits: give one of the two")
        return {**given, "bits": None}

    @model_validator(mode="after")
    def _groups_are_of_neighbours(self) -> Self:
        if self.static_groups and not self.desc_act:
            raise ValueError("static_groups says where groups lie if desc_act changes the order: give desc_act: static")
        if self.linears_differ and self.order is True and self.group_size != -1:
            raise ValueError(
                "a budget, ignore and head need the compressed-tensors format, whose groups are of neighbouring "
                "inputs: leave out desc_act, or set it to static, or group_size to -1"
            )
        if self.smooth is not None and (self.propagates or self.budget):
            raise ValueError("smooth scales inputs before all layers are rounded alike: leave out propagate and budget")
        return self

    @property
    def order(self) -> bool | Literal["static"]:
        """Whether inputs are rounded in order of activation, and "static" if groups are of neighbours all the same."""
        return "static" if self.static_groups else self.desc_act

    @property
    def scales_inputs(self) -> str:
        """The function that scales inputs, if outliers are to move."""
        return "" if self.smooth is None else "lighten.compress.quantize.smooth:even"

    @property
    def propagates(self) -> bool:
        """Whether each layer is rounded against what the quantized layers before it give."""
        return self.propagate != "off"

    def needs_sums(self) -> bool:
        """Whether the Grams of the sweep are read: by a budget, and if layers are not rounded one after the other."""
        return not self.propagates or self.budget is not None

    def key_config(self) -> dict[str, Any]:
        """Returns the settings that are given; those that came later only if they change something."""
        later = {"static_groups": False, "propagate": "off", "refine": 0, "smooth": None, "positive_scales": False}
        given = super().key_config()
        return {name: value for name, value in given.items() if name not in later or value != later[name]}

    @property
    def linears_differ(self) -> bool:
        """Whether some linears are stored differently from the rest, because a budget gives them other bits."""
        return self.budget is not None or super().linears_differ

    def needs_sensitivity(self) -> bool:
        """Whether bits are spent where the loss depends on them."""
        return self.budget is not None

    def cost(self, facts: ModelFacts) -> tuple[float, float]:
        """Returns the float32 operations, and the seconds of passes over the weights, on such a model."""
        product = facts.layer_linear_params * facts.hidden * (1 + facts.intermediate / facts.hidden / 3)
        cubes = 3 * facts.hidden**3 + facts.intermediate**3
        seconds = facts.layers * 0.0001 * (3 * facts.hidden + facts.intermediate)
        prices = 1e-7 * facts.layers * facts.layer_linear_params if self.budget else 0
        return float(facts.layers * (product + 0.7 * cubes)) * (2 if self.budget else 1), seconds + prices

    @property
    def order_and_damping(self) -> dict[str, Any]:
        """Settings of the search in the `gptq` format, besides bits and groups. Static groups need no order there."""
        return {"desc_act": self.order is True, "damp_percent": self.damp_percent}
