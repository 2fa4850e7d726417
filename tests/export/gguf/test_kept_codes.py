"""Codes of a quantized directory in a GGUF file: the values stay what they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.quants import dequantize
from pydantic import ValidationError

from lighten.errors import RequestError
from lighten.export.gguf.settings import Gguf
from lighten.export.gguf.write import Draft
from lighten.pipeline.steps import open_step
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.export.gguf.test_write import logits_of

Tiny = Callable[..., Path]
RTN = {"method": "rtn", "bits": 4, "group_size": 32}


def quantized(tiny: Tiny, folder: Path, settings: dict[str, Any]) -> Artifact:
    folder.mkdir()
    step = open_step("quantize", settings)
    return Artifact(folder, step.run(Artifact(tiny(), {"format": "hf"}), folder, Context()))


@pytest.mark.parametrize(
    ("settings", "type", "fit"),
    [
        (RTN, "Q4_0", 14),
        ({**RTN, "sym": False}, "Q4_1", 14),
        ({**RTN, "sym": False}, "Q4_0", 0),
        ({**RTN, "group_size": 128, "ignore": ["*k_proj"]}, "Q8_0", 12),
        ({**RTN, "bits": 8, "group_size": 64}, "Q8_0", 14),
        ({"method": "mxfp4", "rounding": "nearest"}, "Q8_0", 0),
    ],
)
def test_codes_stay(tiny: Tiny, tmp_path: Path, settings: dict[str, Any], type: Any, fit: int) -> None:
    source = quantized(tiny, tmp_path / "q", settings)
    values: dict[bool, dict[str, torch.Tensor]] = {}
    draft = Draft(source.path)
    for keep in (False, True):
        (out := tmp_path / str(keep)).mkdir()
        step = Gguf(format="gguf", type=type, rounding="keep" if keep else None)
        facts = step.run(source, out, Context())
        tensors = gguf.GGUFReader(file := next(out.glob("*.gguf"))).tensors
        values[keep] = {each.name: torch.from_numpy(dequantize(each.data, each.tensor_type).copy()) for each in tensors}
        assert logits_of(file, [5, 6, 7]).std() > 0
    linears = [label for label in draft.pieces if label.endswith("_proj.weight") and "k_proj" not in label]
    most = len(linears) + (2 if "ignore" not in settings else 0)
    assert facts["codes"] == {"kept": fit, "rounded_twice": most - fit}
    for label in linears:
        exact, name = draft.weight(label), draft.names[label]
        far, near = ((values[keep][name] - exact).abs().max() for keep in (False, True))
        assert near <= far
        if fit and (type == "Q4_1" or "ignore" in settings):  # its minimum, or float32 scales, are rounded to float16
            assert near < 1e-3 * exact.abs().max()
        elif fit:
            assert near == 0


def test_settings() -> None:
    coded, plain = open_step("quantize", RTN), open_step("prune", {"what": "layers", "ratio": 0.5})
    step = Gguf(format="gguf", type="Q4_0")
    assert step.after(coded).rounding == "keep"
    assert step.after(plain) == step.after(None) == step
    assert Gguf(format="gguf", type="Q4_K_M").after(coded).rounding is None
    with pytest.raises(RequestError, match="for quantized models, this one is hf"):
        Gguf(format="gguf", type="Q4_0", rounding="keep").check_source("hf", None)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match=r"rounding keep knows Q4_0.* and not Q4_K_M"):
        Gguf(format="gguf", rounding="keep")
