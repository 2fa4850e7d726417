"""The `quantize` step: settings, and the loop over layers that hands (W, Gram) to a method."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lighten.errors import RequestError
from lighten.stage import Context, Estimate, ModelFacts, Step
from lighten.store import MANIFEST, Artifact

if TYPE_CHECKING:
    import torch

    from lighten.compress.gptq import Quantized
    from lighten.model.grams import Gram

LINEARS_PER_LAYER = 7
TENSORS_PER_LINEAR = 5


class Quantize(Step):
    """Coarser weights: GPTQ on the Grams of the sweep, written in the `gptq` checkpoint format."""

    kind: ClassVar[str] = "quantize"
    version: ClassVar[int] = 1

    method: Literal["gptq"] = Field("gptq", description="how to choose the codes")
    bits: Literal[2, 3, 4, 8] = Field(4, description="bits of a weight")
    group_size: Literal[-1, 32, 64, 128] = Field(128, description="inputs that share a scale; -1 for all of them")
    sym: bool = Field(True, description="symmetric grid, its zero point in the middle")
    desc_act: bool = Field(False, description="round the inputs in order of falling activation")
    damp_percent: float = Field(0.05, gt=0, lt=1, description="share of the mean of diag(H) that is added to it")

    def needs_sweep(self) -> bool:
        """GPTQ reads the Grams."""
        return True

    def check(self, facts: ModelFacts) -> None:
        """Raises RequestError where a group or a packed word does not divide a width of the model."""
        attention = facts.heads * facts.head_dim
        widths = {"hidden_size": facts.hidden, "attention width": attention, "intermediate_size": facts.intermediate}
        for name, width in widths.items():
            if self.group_size != -1 and width % self.group_size:
                fits = [size for size in (128, 64, 32) if not any(w % size for w in widths.values())]
                raise RequestError(
                    f"group_size {self.group_size} does not divide the {name} {width} of this model; "
                    f"use {' or '.join(map(str, [*fits, -1]))}"
                )
        for name, width in {**widths, "key/value width": facts.kv_heads * facts.head_dim}.items():
            if width * self.bits % 32:
                raise RequestError(f"{self.bits}-bit codes of the {name} {width} do not fill 32-bit words; use 8 bits")

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the factorisations and the rank updates, in float32, and one layer of memory."""
        grams = facts.gram_elements * 2
        shape = facts.intermediate / facts.hidden
        updates = facts.layer_linear_params * facts.hidden * (1 + shape / 3)
        cubes = 3 * facts.hidden**3 + facts.intermediate**3
        stored = facts.layers * facts.layer_linear_params * (self.bits + 20 / max(self.group_size, 32)) / 8
        return Estimate(
            float32_flops=float(facts.layers * (updates + 0.7 * cubes)),
            seconds=facts.layers * 0.0001 * (3 * facts.hidden + facts.intermediate),
            peak_bytes=int(500_000_000 + 4 * (3 * grams + 3 * facts.layer_linear_params)),
            disk_bytes=int(stored) + 2 * facts.embedding_params,
        )

    def run(self, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
        """Writes the quantized model directory, one layer at a time."""
        import torch

        from lighten.model.checkpoint import Checkpoint
        from lighten.model.grams import read_index, read_layer
        from lighten.model.packing import pack_linear
        from lighten.model.shards import ShardWriter
        from lighten.model.stream import LAYERS

        assert context.grams is not None
        checkpoint = Checkpoint(source.path)
        layers = len(read_index(context.grams)["layers"])
        errors: dict[str, float] = {}
        count = len(checkpoint.weight_map) + layers * LINEARS_PER_LAYER * TENSORS_PER_LINEAR
        with ShardWriter(out, count) as writer, torch.inference_mode():
            for name in checkpoint.weight_map:
                if not name.startswith(LAYERS):
                    writer.add(name, checkpoint.tensor(name))
            for layer in range(layers):
                prefix = f"{LAYERS}{layer}."
                tensors = checkpoint.tensors(prefix)
                grams, read_by = read_layer(context.grams, layer)
                for first, gram in grams.items():
                    linears = [name for name, read in read_by.items() if read == first]
                    weights = [tensors.pop(f"{name}.weight") for name in linears]
                    result = self._quantize(weights, gram, prefix + first, context)
                    start = 0
                    for name, weight in zip(linears, weights, strict=True):
                        stop = start + weight.shape[0]
                        packed = pack_linear(
                            result.codes[:, start:stop],
                            result.scales[:, start:stop],
                            result.zeros[:, start:stop],
                            result.g_idx,
                            self.bits,
                        )
                        for key, tensor in packed.items():
                            writer.add(f"{prefix}{name}.{key}", tensor)
                        start = stop
                    errors[prefix + first] = relative_error(torch.cat(weights), result.weight(), gram.matrix())
                for name, tensor in tensors.items():
                    writer.add(prefix + name, tensor)
                context.report(layer + 1, layers, f"layer {layer + 1}/{layers}")
        self._write_config(checkpoint.config, source.path, out)
        worst = max(errors, key=errors.__getitem__) if errors else None
        return {
            "format": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.desc_act,
            "quantized_linears": layers * len(read_by),
            "kept": ["embedding", "norms", "head"],
            "output_error": {"mean": sum(errors.values()) / max(1, len(errors)), "worst": worst},
        }

    def _quantize(self, weights: list[torch.Tensor], gram: Gram, name: str, context: Context) -> Quantized:
        """Quantizes linears that read the same input as one matrix."""
        import torch

        from lighten.compress.gptq import gptq
        from lighten.errors import Failure

        try:
            result = gptq(
                torch.cat(weights).to(context.device),
                gram.matrix().to(context.device),
                bits=self.bits,
                group_size=self.group_size,
                sym=self.sym,
                desc_act=self.desc_act,
                damp_percent=self.damp_percent,
            )
        except ArithmeticError as error:
            raise Failure(
                f"the Gram of {name} is {error}: use more calibration text, or a larger damp_percent"
            ) from error
        if result.damping != self.damp_percent:
            context.warnings.append(f"{name}: damping raised from {self.damp_percent:g} to {result.damping:g}")
        return result

    def _write_config(self, config: dict[str, Any], source: Path, out: Path) -> None:
        from lighten import __version__

        quantization: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.desc_act,
            "sym": self.sym,
            "damp_percent": self.damp_percent,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"lighten:{__version__}"]},
        }
        for file in source.iterdir():
            weights = file.suffix == ".safetensors" or file.name.endswith(".index.json")
            if file.is_file() and not weights and file.name not in (MANIFEST, "config.json"):
                shutil.copyfile(file, out / file.name)
        config = {**config, "quantization_config": quantization}
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (out / "quantize_config.json").write_text(json.dumps(quantization, indent=2) + "\n")


def relative_error(before: torch.Tensor, after: torch.Tensor, gram: torch.Tensor) -> float:
    """Returns the share of the output's energy that is lost: tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)."""
    change = before.float() - after.to(before.device)
    lost = float(((change @ gram) * change).sum())
    wide = before.float()
    energy = float(((wide @ gram) * wide).sum())
    return lost / energy if energy else 0.0
