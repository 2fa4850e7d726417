"""What a runtime cannot do is said, and is no error; what it can do in another way is measured that way."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from lighten.evaluate.measurement import MEASUREMENTS
from lighten.evaluate.request import Reference
from lighten.evaluate.run import measure
from lighten.evaluate.runtimes.torch import TorchRuntime
from lighten.pipeline.rows import add_measurements
from lighten.results.results import Variant
from lighten.step import silent
from tests.evaluate.conftest import Tiny, payload

CHUNKS = {"length": 32, "samples": 4}
LACKING: dict[str, tuple[dict[str, Any], set[str], str]] = {
    "perplexity": (CHUNKS, {"decodes"}, "does not give the logits of a text and does not score texts"),
    "accuracy": ({"limit": 2}, {"logits"}, "does not score texts"),
    "speed": ({"prompt": 4, "generate": 3, "repeats": 2}, {"logits"}, "does not write token after token"),
    "load": ({"requests": 2, "prompt": 4, "generate": 3}, {"logits"}, "does not write token after token"),
    "speculative": ({"draft": "other"}, {"decodes"}, "does not take tokens back"),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_a_runtime_lacks_is_not_available(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    settings, able, why = LACKING[name]
    monkeypatch.setattr(TorchRuntime, "capabilities", frozenset(able))
    more = {"draft": tiny()} if name == "speculative" else {}
    found = measure(payload(name, settings, tiny(), tmp_path, **more), silent)
    assert (found["unavailable"], found["runtime"]) == (f"torch {why}", "torch")
    asked = MEASUREMENTS.load(name).model_validate(settings)
    row: dict[str, Any] = {"name": "v", "status": "ok"}
    add_measurements(row, [(asked, tmp_path, tmp_path)], False)
    shown = Variant.model_validate(row)
    assert [(each.measurement, each.reason) for each in shown.unavailable] == [(name, f"torch {why}")]
    assert shown.notes == [f"{name} is not available: torch {why}"]
    assert shown.delta is None


@pytest.mark.parametrize("protocol", ["lighten", "gptq", "llama.cpp"])
def test_perplexity_from_scores_is_that_from_logits(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    for name in ("logits", "scores", "again"):
        (tmp_path / name).mkdir()
    settings = {**CHUNKS, "protocol": protocol}
    first = measure(payload("perplexity", settings, tiny(), tmp_path / "logits", save_hidden=True), silent)
    monkeypatch.setattr(TorchRuntime, "capabilities", frozenset({"scores"}))
    reference = Reference(tmp_path / "logits", tiny())
    second = measure(payload("perplexity", settings, tiny(), tmp_path / "scores", reference=reference), silent)
    assert second["perplexity"]["value"] == pytest.approx(first["perplexity"]["value"], rel=1e-5)
    assert second["perplexity"]["tokens"] == first["perplexity"]["tokens"]
    assert (second["divergence"], second["warnings"]) == (None, [])
    chunks = [load_file(tmp_path / name / "values.safetensors")["nll"].mean(axis=1) for name in ("logits", "scores")]
    assert np.allclose(*chunks, rtol=1e-5) and math.isfinite(chunks[0].sum())
    again = measure(payload("perplexity", settings, tiny(), tmp_path / "again", save_hidden=True), silent)
    assert again["warnings"] == ["divergence from this model cannot be measured: torch does not give its logits"]
