"""The `quantize` step: settings, and the loop over layers that hands (W, Gram) to a method."""

from __future__ import annotations

import fnmatch
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from lighten.budget import Budget
from lighten.errors import RequestError
from lighten.stage import Context, Estimate, ModelFacts, Step
from lighten.store import MANIFEST, Artifact

if TYPE_CHECKING:
    import torch

    from lighten.compress.formats import Stored
    from lighten.compress.grid import GroupSize, Quantized
    from lighten.model.checkpoint import Checkpoint
    from lighten.model.grams import Gram

TENSORS_PER_LINEAR = 6
UNTOUCHED = 16
"""The "bits" of a weight that is left alone."""


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
        },
        (2, 3, 4, 8),
        _GROUPS,
        sweep=True,
    ),
    "rtn": Method({"bits": 4, "group_size": 128, "sym": True, "ignore": ()}, (2, 3, 4, 8), (*_GROUPS, "tensor")),
    "awq": Method({"bits": 4, "group_size": 128, "sym": False, "ignore": ()}, (4,), _GROUPS, sweep=True),
    "nf4": Method(_FOUR, (4,), needs=_BNB),
    "fp4": Method(_FOUR, (4,), needs=_BNB),
    "int8": Method(_EIGHT, (8,), needs=_BNB),
    "int8-dynamic": Method(_EIGHT, (8,), needs=_COMPRESSED),
    "w8a8": Method({**_EIGHT, "alpha": 0.5}, (8,), sweep=True, needs=_COMPRESSED),
    "fp8": Method(_EIGHT, (8,), needs=_COMPRESSED),
}


class Quantize(Step):
    """Coarser weights, in a format that the ecosystem's loaders open."""

    kind: ClassVar[str] = "quantize"
    version: ClassVar[int] = 1

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
        """Refuses what only some loaders open: transformers expects the zero points of compressed-tensors unpacked."""
        if self.format == "compressed-tensors" and self.sym is False:
            raise ValueError(
                "a budget and ignore need the compressed-tensors format, in which transformers opens symmetric grids "
                "only: leave out sym: false"
            )
        return self

    @property
    def _how(self) -> Method:
        return METHODS[self.method]

    @property
    def format(self) -> str:
        """The format it is stored in: where `gptq` cannot say what differs between modules, compressed-tensors."""
        if self.method in ("gptq", "rtn"):
            return "compressed-tensors" if self.budget or self.ignore else "gptq"
        if self.method == "awq":
            return "awq"
        return "bitsandbytes" if self.method in ("nf4", "fp4", "int8") else "compressed-tensors"

    def key_config(self) -> dict[str, Any]:
        """Returns the settings that this method has and that are given."""
        return {name: value for name, value in self.model_dump(mode="json").items() if value not in (None, [])}

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

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the products and rank updates in float32, the passes over the weights, and one layer of memory."""
        linears = facts.layers * facts.layer_linear_params
        bits = (self.bits or 4) + 20 / (self.group_size if isinstance(self.group_size, int) else 64)
        grams = facts.gram_elements * 2 if self.needs_sweep() else 0
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
            peak_bytes=int(500_000_000 + 4 * (3 * grams + 3 * facts.layer_linear_params)),
            disk_bytes=int(linears * bits / 8) + 2 * facts.embedding_params,
        )

    def run(self, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
        """Writes the quantized model directory, one layer at a time.

        Raises:
            RequestError: the source is quantized already, or a budget cannot be met.
        """
        import torch

        from lighten.model.checkpoint import Checkpoint

        checkpoint = Checkpoint(source.path)
        if checkpoint.quantization:
            raise RequestError(f"this model is {source.format} already: quantize the one that it was made from")
        with torch.inference_mode():
            return _Run(self, checkpoint, out, context).run()


def _or(values: tuple[Any, ...]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


def ignored(name: str, patterns: tuple[str, ...]) -> str | None:
    """Returns the first pattern that a module's full name matches, or None."""
    for pattern in patterns:
        found = re.search(pattern[3:], name) if pattern.startswith("re:") else fnmatch.fnmatchcase(name, pattern)
        if found:
            return pattern
    return None


@dataclass
class Inputs:
    """Linears of a layer that read the same input, and its second moments where there was a sweep."""

    first: str
    linears: list[str]
    gram: Gram | None = None


@dataclass
class _Run:
    """One quantization under way."""

    step: Quantize
    checkpoint: Checkpoint
    out: Path
    context: Context
    bits: dict[str, int] = field(default_factory=dict)
    """Bits of every linear that was quantized, by full name."""
    kept: list[dict[str, str]] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    """Linears that fell back to rounding to nearest."""
    allocation: dict[str, int] | None = None
    allocated: dict[str, Any] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Writes everything and returns the facts."""
        from lighten.model.shards import ShardWriter
        from lighten.model.stream import LAYERS

        layers = self.checkpoint.facts.layers
        if self.step.budget:
            from lighten.compress.budget import allocate

            self.allocation, self.allocated = allocate(self.step, self.checkpoint, self.layers(), self.context)
        with ShardWriter(self.out, TENSORS_PER_LINEAR * len(self.checkpoint.weight_map)) as writer:
            for name in self.checkpoint.weight_map:
                if not name.startswith(LAYERS):
                    writer.add(name, self.checkpoint.tensor(name))
            for number, (prefix, tensors, inputs) in enumerate(self.layers()):
                for name, tensor in self._layer(prefix, tensors, inputs):
                    writer.add(prefix + name, tensor)
                self.context.report(number + 1, layers, f"layer {number + 1}/{layers}")
        self._write_config()
        return self._facts()

    def layers(self) -> Iterator[tuple[str, dict[str, torch.Tensor], list[Inputs]]]:
        """Yields the prefix, the tensors and the inputs of the linears of every layer."""
        from lighten.model.grams import read_layer
        from lighten.model.stream import LAYERS

        for layer in range(self.checkpoint.facts.layers):
            prefix = f"{LAYERS}{layer}."
            tensors = self.checkpoint.tensors(prefix)
            if self.context.grams:
                grams, read_by = read_layer(self.context.grams, layer)
                inputs = [Inputs(first, [k for k, v in read_by.items() if v == first], g) for first, g in grams.items()]
            else:
                matrices = [name for name, tensor in tensors.items() if tensor.dim() == 2]
                inputs = [Inputs(name, [name]) for name in (name.removesuffix(".weight") for name in matrices)]
            yield prefix, tensors, inputs

    def _chosen(self, prefix: str, linear: str) -> int:
        """Returns the bits of a linear, UNTOUCHED where it is left alone."""
        if ignored(prefix + linear, self.step.ignore):
            return UNTOUCHED
        if self.allocation is not None:
            return self.allocation[prefix + linear]
        assert self.step.bits
        return self.step.bits

    def _layer(
        self, prefix: str, tensors: dict[str, torch.Tensor], inputs: list[Inputs]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the tensors to write for one layer."""
        scales = self._scale(prefix, tensors, inputs)
        for group in inputs:
            gram = group.gram.matrix().to(self.context.device) if group.gram else None
            scale = scales.get(group.first)
            if gram is not None and scale is not None:
                gram.div_(scale).div_(scale[:, None])
            by_bits: dict[int, list[str]] = {}
            for linear in group.linears:
                by_bits.setdefault(self._chosen(prefix, linear), []).append(linear)
            for bits, linears in by_bits.items():
                if bits == UNTOUCHED:
                    for linear in linears:
                        why = "ignore" if ignored(prefix + linear, self.step.ignore) else "budget"
                        self.kept.append({"what": prefix + linear, "why": f"left alone ({why})"})
                    continue
                weights = [tensors.pop(f"{linear}.weight") for linear in linears]
                stored = list(self._store(weights, gram, bits, prefix + group.first))
                for linear, each in zip(linears, stored, strict=True):
                    self.bits[prefix + linear] = bits
                    for name, tensor in each.tensors.items():
                        yield f"{linear}.{name}", tensor
                if gram is not None:
                    import torch

                    after = torch.cat([each.weight for each in stored])
                    error = relative_error(torch.cat(weights), after, gram)
                    if math.isfinite(error):  # else the Gram was of no use, and there is a warning already
                        self.errors[prefix + linears[0]] = error
        yield from tensors.items()

    def _scale(self, prefix: str, tensors: dict[str, torch.Tensor], inputs: list[Inputs]) -> dict[str, torch.Tensor]:
        """Scales the inputs of the layer's linears for the methods that do so; returns the scales that were folded."""
        if self.step.method not in ("awq", "w8a8"):
            return {}
        import torch

        from lighten.compress import awq, fold, smooth

        head_dim = self.checkpoint.facts.head_dim
        scales: dict[str, torch.Tensor] = {}
        for group in inputs:
            repeats = fold.copies(tensors, group.first)
            touched = [*group.linears, fold.BEFORE.get(group.first, "")]
            if not repeats or any(self._chosen(prefix, name) == UNTOUCHED for name in touched):
                continue  # a scale that one of them cannot take would change the model
            assert group.gram
            weight = torch.cat([tensors[f"{linear}.weight"] for linear in group.linears])
            if self.step.method == "awq":
                scale = awq.search_scale(
                    weight.to(self.context.device),
                    group.gram.matrix().to(self.context.device),
                    bits=4,
                    group_size=_integer(self.step.group_size),
                    sym=False,
                    repeats=repeats,
                    head_dim=head_dim,
                ).cpu()
            else:
                assert self.step.alpha is not None
                scale = smooth.smooth(weight, group.gram.absmax, self.step.alpha, repeats, head_dim)
            scales[group.first] = fold.exact(scale, tensors, group.first)
        for group in inputs:
            if group.first in scales:
                fold.fold(tensors, group.first, group.linears, scales[group.first], head_dim)
        return scales

    def _store(self, weights: list[torch.Tensor], gram: torch.Tensor | None, bits: int, name: str) -> Iterator[Stored]:
        """Quantizes linears that read the same input, and yields each as its format stores it."""
        import torch

        from lighten.compress import formats

        step, kind = self.step, self._scale_type()
        if step.method in ("nf4", "fp4", "int8", "fp8"):
            for weight in weights:
                if step.method == "int8":
                    yield formats.bnb_8bit(weight)
                elif step.method == "fp8":
                    yield formats.float_quantized(weight, kind)
                else:
                    assert step.block_size and step.double_quant is not None
                    yield formats.bnb_4bit(weight, step.method, step.block_size, step.double_quant)
            return
        found = self._codes(torch.cat(weights).to(self.context.device), gram, bits, name)
        start = 0
        for weight in weights:
            part = found.outputs(start, start := start + len(weight))
            if step.format == "gptq":
                yield formats.gptq(part, bits)
            elif step.method == "awq":
                yield formats.awq(part)
            elif step.method in ("w8a8", "int8-dynamic"):
                yield formats.int_quantized(part, kind)
            else:
                yield formats.pack_quantized(part, bits, bool(step.sym), kind)

    def _codes(self, weight: torch.Tensor, gram: torch.Tensor | None, bits: int, name: str) -> Quantized:
        """Returns the codes that the method chooses."""
        from lighten.compress import awq, gptq, grid

        step, kind = self.step, self._scale_type()
        if step.method in ("w8a8", "int8-dynamic"):
            return grid.rtn(weight, 8, -1, True, kind)
        size: GroupSize = "tensor" if step.group_size == "tensor" else _integer(step.group_size)
        sym = bool(step.sym)
        if step.method == "rtn":
            return grid.rtn(weight, bits, size, sym, kind)
        assert gram is not None
        if step.method == "awq":
            return awq.clip(weight, gram, bits=bits, group_size=_integer(size), sym=sym)
        assert step.damp_percent is not None
        try:
            found = gptq.gptq(
                weight,
                gram,
                bits=bits,
                group_size=_integer(size),
                sym=sym,
                desc_act=bool(step.desc_act),
                damp_percent=step.damp_percent,
                kind=kind,
            )
        except ArithmeticError as error:
            self.context.warnings.append(f"{name}: rounded to nearest, for its Gram is {error}; give it more text")
            self.fallbacks.append(name)
            return grid.rtn(weight, bits, size, sym, kind)
        if found.damping != step.damp_percent:
            self.context.warnings.append(f"{name}: damping raised from {step.damp_percent:g} to {found.damping:g}")
        return found

    def _scale_type(self) -> torch.dtype:
        """Returns the type that scales are stored in: float16, but the model's own in compressed-tensors."""
        import torch

        if self.step.format != "compressed-tensors":
            return torch.float16
        return self.checkpoint.tensor("model.norm.weight").dtype

    def _facts(self) -> dict[str, Any]:
        facts = self.checkpoint.facts
        tied = "tied to the embedding" if facts.tied else "formats of linears keep the head, where errors cost most"
        kept = [
            {"what": "embedding", "why": "a lookup, not a product; no loader expects it quantized"},
            {"what": "lm_head", "why": tied},
            {"what": "norms", "why": "too small to matter"},
            *self.kept,
        ]
        settings = {name: value for name, value in self.step.key_config().items() if name not in ("budget", "ignore")}
        worst = max(self.errors, key=self.errors.__getitem__) if self.errors else None
        mean = sum(self.errors.values()) / max(1, len(self.errors))
        return {
            "format": self.step.format,
            **settings,
            "quantized_linears": len(self.bits),
            "kept": kept,
            **({"rounded_to_nearest": self.fallbacks} if self.fallbacks else {}),
            **({"output_error": {"mean": mean, "worst": worst}} if self.errors else {}),
            **self.allocated,
        }

    def _write_config(self) -> None:
        """Copies everything but the weights, and tells the loaders what they will find."""
        quantization = self._quantization()
        for file in self.checkpoint.path.iterdir():
            weights = file.suffix == ".safetensors" or file.name.endswith(".index.json")
            if file.is_file() and not weights and file.name not in (MANIFEST, "config.json"):
                shutil.copyfile(file, self.out / file.name)
        config = {**self.checkpoint.config, "quantization_config": quantization}
        (self.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if self.step.format == "gptq":
            (self.out / "quantize_config.json").write_text(json.dumps(quantization, indent=2) + "\n")

    def _quantization(self) -> dict[str, Any]:
        from lighten.compress import formats

        step = self.step
        left = ["lm_head", *(entry["what"] for entry in self.kept)]
        if step.format == "bitsandbytes":
            return formats.bnb_config(step.method, bool(step.double_quant), left)
        if step.method == "fp8":
            groups = [(formats.floats(), ["Linear"])]
            return formats.compressed_config(groups, formats.per_token("float"), "float-quantized", left)
        size = -1 if step.group_size in (None, "tensor") else _integer(step.group_size)
        if step.method in ("w8a8", "int8-dynamic"):
            groups = [(formats.integers(8, -1, True), ["Linear"])]
            return formats.compressed_config(groups, formats.per_token("int"), "int-quantized", left)
        if step.format == "awq":
            return formats.awq_config(4, size, left)
        if step.format == "gptq":
            assert step.bits
            return formats.gptq_config(step.bits, size, bool(step.sym), bool(step.desc_act), step.damp_percent)
        widths = sorted(set(self.bits.values()))
        groups = [
            (formats.integers(bits, size, bool(step.sym)), [name for name, b in self.bits.items() if b == bits])
            for bits in widths
        ]
        if len(groups) == 1:
            groups = [(groups[0][0], ["Linear"])]
        return formats.compressed_config(groups, None, "pack-quantized", left)


def _integer(size: Any) -> int:
    assert isinstance(size, int)
    return size


def relative_error(before: torch.Tensor, after: torch.Tensor, gram: torch.Tensor) -> float:
    """Returns the share of the output's energy that is lost: tr(ΔW H ΔWᵀ) / tr(W H Wᵀ), to three digits."""
    import torch

    from lighten.compress.gram import exact_products

    wide = before.float()
    change = wide - after.to(before.device)
    with exact_products(torch.bfloat16):  # quick, and close enough to tell one layer from another
        lost = float(((change @ gram) * change).sum())
        energy = float(((wide @ gram) * wide).sum())
    return lost / energy if energy else 0.0
