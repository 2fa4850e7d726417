"""Settings of the `prune` step: a smaller dense model, or the same model with zeros."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lighten.compress.prune.amounts import Target, parse_pattern
from lighten.errors import RequestError
from lighten.facts import TASKS, ModelFacts, Task
from lighten.model.architectures import ARCHITECTURES
from lighten.step import Estimate, Step

STRUCTURED: dict[str, dict[str, Any]] = {
    "mlp": {"score": "cost", "repair": True, "multiple": None},
    "heads": {"score": "cost", "repair": True},
    "layers": {"contiguous": True},
    "experts": {},
}
SPARSE: dict[str, dict[str, Any]] = {
    "magnitude": {"scope": "layer"},
    "wanda": {},
    "sparsegpt": {},
}
DAMPING = {"mlp": 0.01, "heads": 0.01, "sparsegpt": 0.01}
MULTIPLES = (64, 32, 16, 8, 4, 2, 1)


class Prune(Step):
    """Fewer channels, heads or layers, chosen and repaired by the sweep; or weights that become zero."""

    kind: ClassVar[str] = "prune"
    work: ClassVar[str] = "lighten.compress.prune.step:run"
    version: ClassVar[int] = 2
    tasks: ClassVar[tuple[Task, ...]] = TASKS

    what: Literal["mlp", "heads", "layers", "experts"] | None = Field(
        None,
        description="make the model smaller: MLP channels, key/value heads with their query heads, layers, or experts",
    )
    ratio: float | None = Field(
        None, gt=0, lt=1, description="share of the channels, heads, layers or experts that goes"
    )
    count: int | None = Field(None, ge=1, description="instead of a ratio: how many go from every layer, or layers")
    target: Target | None = Field(
        None, description="ratio=0.2 or params=100M: choose among channels, heads and layers by what each costs"
    )
    score: Literal["cost", "energy", "taylor"] | None = Field(
        None, description="mlp, heads: what losing it costs after the repair, what it gives, or gradients (heads only)"
    )
    repair: bool | None = Field(None, description="mlp, heads: refit what stays to the old output (default: yes)")
    multiple: int | None = Field(
        None, ge=1, description="mlp: channels that stay are a multiple of this (default: 64 or what divides the width)"
    )
    contiguous: bool | None = Field(None, description="layers: one run of layers, or any of them (default: one run)")
    method: Literal["magnitude", "wanda", "sparsegpt"] | None = Field(None, description="put zeros in place instead")
    sparsity: float | None = Field(None, gt=0, lt=1, description="share of the weights that become zero")
    pattern: str | None = Field(None, description="instead of a sparsity: N of every M weights are kept, such as 2:4")
    scope: Literal["layer", "global"] | None = Field(
        None, description="magnitude: compare the weights of one matrix, or of the whole model (default: layer)"
    )
    damp_percent: float | None = Field(
        None, gt=0, lt=1, description="share of the mean of diag(H) that is added to it (default: 0.01)"
    )
    ignore: tuple[str, ...] = Field((), description="zeros: modules to leave alone: *.0.mlp.* or re:REGEX")

    @model_validator(mode="before")
    @classmethod
    def _of_the_way(cls, given: Any) -> Any:
        """Fills in the defaults of the chosen way, and refuses settings of another way."""
        if not isinstance(given, dict):
            return given
        given = {name: value for name, value in given.items() if value not in (None, [], ())}
        ways = [name for name in ("what", "target", "method") if name in given]
        if len(ways) != 1:
            raise ValueError(
                "say one of the three: what (mlp, heads, layers, experts), target (ratio or params), "
                "method (magnitude, wanda, sparsegpt)"
            )
        name = ways[0] if ways[0] == "target" else str(given[ways[0]])
        defaults: dict[str, Any]
        amounts: list[str] = []
        if ways[0] == "target":
            defaults = {"repair": True, "contiguous": True, "multiple": None}
        elif ways[0] == "what":
            defaults, amounts = STRUCTURED.get(name, {}), ["ratio", "count"]
        else:
            defaults, amounts = {**SPARSE.get(name, {}), "ignore": ()}, ["sparsity", "pattern"]
        if name in DAMPING or name == "target":
            defaults = {**defaults, "damp_percent": DAMPING.get(name, 0.01)}
        able = [ways[0], *amounts, *defaults]
        for key in given:
            if key in cls.model_fields and key not in able:
                raise ValueError(f"{name} has no setting {key}; it has {', '.join(able[1:])}")
        if amounts and sum(key in given for key in amounts) != 1:
            raise ValueError(f"{name} needs one of the two: {' or '.join(amounts)}")
        return {**{key: value for key, value in defaults.items() if value is not None}, **given}

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        if self.score == "taylor" and self.what != "heads":
            raise ValueError("the score taylor is for heads: for channels there is cost and energy")
        if self.pattern:
            parse_pattern(self.pattern)
        if self.scope == "global" and self.pattern:
            raise ValueError("a pattern is a choice among neighbours: scope: global is for a sparsity")
        return self

    def key_config(self) -> dict[str, Any]:
        """Returns the settings that are given or have a default here."""
        return {name: value for name, value in self.model_dump(mode="json").items() if value not in (None, [])}

    def needs_sweep(self) -> bool:
        """Whether it reads Grams, or the angles between layers."""
        return self.method != "magnitude"

    def needs_sensitivity(self) -> bool:
        """Whether it reads gradients."""
        return self.score == "taylor"

    def check(self, facts: ModelFacts) -> None:
        """Raises RequestError if nothing would be left, or a pattern does not divide a width."""
        if self.what == "layers" and facts.task == "seq2seq":
            raise RequestError(
                f"no run of layers can go from {facts.architecture}, whose encoder and decoder count theirs apart: "
                "distil it into a student of fewer layers instead (distill: {student: {layers: N}})"
            )
        if self.pattern:
            of = parse_pattern(self.pattern)[1]
            attention = facts.heads * facts.head_dim
            for name, width in (("hidden_size", facts.hidden), ("attention", attention), ("MLP", facts.intermediate)):
                if width % of:
                    raise RequestError(
                        f"the pattern {self.pattern} does not divide the {name} width {width} of this model: "
                        f"use one whose second number does, or a sparsity"
                    )
        if self.what and self.what != "experts":  # whose number only the model's modules tell
            total, names = self._total(facts)
            gone = self.amount(facts)
            if gone >= total:
                asked = f"ratio {self.ratio:g}" if self.ratio else f"count {self.count}"
                raise RequestError(
                    f"{asked} would leave no {names}: this model has {total} {names}"
                    + (" (a key/value head goes with the query heads that read it)" if self.what == "heads" else "")
                    + f"; at most {total - 1} can go"
                )
            if gone == 0:
                raise RequestError(f"ratio {self.ratio:g} of {total} {names} is none: ask for more, or give a count")
        if self.target and facts.architecture in ARCHITECTURES:  # the weights of others are counted later
            self.target.check(facts)

    def _total(self, facts: ModelFacts) -> tuple[int, str]:
        return {
            "mlp": (facts.intermediate, "MLP channels"),
            "heads": (facts.kv_heads, "key/value heads"),
            "layers": (facts.layers, "layers"),
        }[str(self.what)]

    def multiple_of(self, width: int) -> int:
        """Returns the number that divides the count of the remaining channels of an MLP."""
        return self.multiple or next(each for each in MULTIPLES if width % each == 0)

    def amount(self, facts: ModelFacts) -> int:
        """Returns the number of channels, heads or layers that go."""
        return self.gone(self._total(facts)[0])

    def gone(self, total: int) -> int:
        """Returns how many of that many channels, heads or layers go."""
        if self.count:
            return self.count
        assert self.ratio
        if self.what == "mlp":
            multiple = self.multiple_of(total)
            return total - round(total * (1 - self.ratio) / multiple) * multiple
        return round(self.ratio * total)

    def result(self, facts: ModelFacts) -> ModelFacts:
        """Returns the sizes of the pruned model. Those of a target are known only after it is built."""
        if self.what == "mlp":
            return replace(facts, intermediate=facts.intermediate - self.amount(facts))
        if self.what == "heads":
            left = facts.kv_heads - self.amount(facts)
            return replace(facts, kv_heads=left, heads=left * (facts.heads // facts.kv_heads))
        if self.what == "layers":
            return replace(facts, layers=facts.layers - self.amount(facts))
        return facts

    def check_source(self, form: str, facts: ModelFacts) -> None:
        """Refuses everything except plain weights."""
        if form != "hf":
            raise RequestError(f"this model is {form}: prune the one that it was made from")

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the factorisations of every layer, and the evaluations that a target needs."""
        linears = facts.layers * facts.layer_linear_params
        width = facts.intermediate
        flops = 0.0
        if self.method == "sparsegpt":
            flops = 1.5 * (facts.layer_linear_params * facts.hidden * 2 + 3 * facts.hidden**3 + width**3)
        elif self.what == "mlp" or self.target:
            flops = 12.0 * (width**3 + 2 * width**2 * facts.hidden)
        evaluations = 12 if self.target else 0
        forward = 2.0 * (linears + facts.embedding_params) * 8 * 512
        return Estimate(
            fast_flops=evaluations * forward,
            float32_flops=flops * facts.layers,
            seconds=2e-8 * linears,
            peak_bytes=500_000_000 + self.bytes_of_a_layer(facts),
            disk_bytes=2 * facts.params,
        )

    def bytes_of_a_layer(self, facts: ModelFacts) -> int:
        """Returns about how much memory one layer takes."""
        grams = 2 * facts.gram_elements if self.needs_sweep() else 0
        return 4 * (3 * grams + 3 * facts.layer_linear_params)
