"""Files whose matrices were rounded so that their errors make good for each other."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from pydantic import ValidationError

from lighten.compress.calibrate.sensitivity import Sensitivities
from lighten.compress.calibrate.sweep import Sweep
from lighten.errors import RequestError
from lighten.export.gguf import allocate
from lighten.export.gguf.linears import Matrices, in_order
from lighten.export.gguf.settings import Gguf
from lighten.export.gguf.write import Draft
from lighten.model import stream
from lighten.model.grams import read_index, read_layer
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.export.gguf.test_every_family import made
from tests.export.gguf.test_write import logits_of

__all__ = ["made"]
Tiny = Callable[..., Path]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(stream, "fast_dtype", lambda device: torch.float32)
    yield


def source_of(path: Path) -> Artifact:
    return Artifact(path, {"key": "x", "format": "hf"})


def swept(source: Path, folder: Path) -> Context:
    for name, step in (("grams", Sweep(samples=2, length=64)), ("sensitivity", Sensitivities(samples=2, length=64))):
        (folder / name).mkdir()
        step.run(source_of(source), folder / name, Context())
    return Context(grams=folder / "grams", sensitivity=folder / "sensitivity")


def exported(source: Path, out: Path, context: Context, **settings: Any) -> tuple[Path, dict[str, Any]]:
    out.mkdir()
    facts = Gguf(format="gguf", **settings).run(source_of(source), out, context)
    return next(out.glob("*.gguf")), facts


def losses(source: Path, grams: Path, file: Path) -> dict[str, float]:
    """Returns tr(E H Eᵀ) of every matrix that has a Gram, by its name in the file; of an expert by itself."""
    draft, index = Draft(source), read_index(grams)
    of, tensors = Matrices(draft).of, {each.name: each for each in gguf.GGUFReader(file).tensors}
    found = {}
    for layer, entry in enumerate(index["layers"]):
        known, inputs = read_layer(grams, layer)
        for linear, name in inputs.items():
            for label, expert in of(f"{entry['prefix']}{linear}.weight"):
                tensor = tensors[draft.names[label]]
                data = tensor.data if expert is None else tensor.data[expert]
                weight = draft.weight(label) if expert is None else draft.weight(label)[expert]
                error = torch.from_numpy(dequantize(data, tensor.tensor_type)) - weight.float()
                gram = in_order(draft, label, known[name].matrix())
                found[f"{tensor.name} {expert}"] = float(((error @ gram) * error).sum())
    return found


def test_settings() -> None:
    plain, step = Gguf(format="gguf"), Gguf(format="gguf", rounding="gptq")
    assert "rounding" not in plain.key_config()
    assert step.key_config() == {"format": "gguf", "type": "Q4_K_M", "imatrix": True, "rounding": "gptq"}
    assert step.needs_sweep() and not step.needs_sensitivity()
    assert Gguf(format="gguf", rounding="gptq", budget={"bits": 5}).needs_sensitivity()
    with pytest.raises(ValidationError, match="leave out `imatrix`"):
        Gguf(format="gguf", rounding="gptq", imatrix=False)
    for type in ("F16", "IQ2_XS", "TQ1_0"):
        with pytest.raises(ValidationError, match=f"rounding gptq knows Q2_K, .*, and not {type}"):
            Gguf(format="gguf", type=type, rounding="gptq")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        Gguf(format="gguf", rounding="nearest")  # type: ignore[arg-type]


def test_needs_a_calibration_set(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="rounding: gptq needs a calibration set"):
        exported(tiny(), tmp_path / "out", Context(), rounding="gptq")


@pytest.mark.parametrize("type", ["Q2_K", "Q4_K_M"])
def test_a_file_of_the_same_size_with_smaller_errors(tiny: Tiny, tmp_path: Path, type: Any) -> None:
    source = tiny("qwen2")
    context = swept(source, tmp_path)
    assert context.grams
    plain, _ = exported(source, tmp_path / "plain", context, type=type, imatrix=True)
    file, facts = exported(source, tmp_path / "ours", context, type=type, rounding="gptq")
    before, after = (gguf.GGUFReader(each).tensors for each in (plain, file))
    layout = [[(each.name, each.tensor_type, each.n_bytes) for each in tensors] for tensors in (before, after)]
    assert layout[0] == layout[1]
    theirs, ours = losses(source, context.grams, plain), losses(source, context.grams, file)
    assert len(ours) == facts["rounding"]["matrices"] == 14
    assert all(ours[name] < 0.9 * theirs[name] for name in ours)
    assert facts["rounding"]["kept"] == [
        {"why": "no Gram of its inputs", "count": 2, "tensors": {"token_embd": 1, "output": 1}}
    ]
    assert facts["rounding"]["loss"] < 0.8
    assert logits_of(file, [5, 6, 7]).std() > 0
    again, _ = exported(source, tmp_path / "again", context, type=type, rounding="gptq")
    assert again.read_bytes() == file.read_bytes()


def test_rows_that_no_k_quant_fits(tiny: Tiny, tmp_path: Path) -> None:
    """They have the type that llama.cpp falls back to, and are rounded on its grid."""
    source = tiny("llama", hidden_size=288, intermediate_size=512, num_attention_heads=9, num_key_value_heads=3)
    context = swept(source, tmp_path)
    file, facts = exported(source, tmp_path / "ours", context, type="Q3_K_M", rounding="gptq")
    assert facts["rounding"]["matrices"] == 14
    assert {"IQ4_NL", "Q5_0"} & {*facts["tensor_types"]}
    assert facts["fallbacks"]["count"] > 0
    assert np.isfinite(logits_of(file, [5, 6, 7])).all()


def test_a_budget_chooses_the_types_first(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocate, "WIDE", ("Q2_K", "Q4_K", "Q6_K", "F16"))  # the others take seconds to try
    source = tiny()
    context = swept(source, tmp_path)
    assert context.grams
    plain, chosen = exported(source, tmp_path / "plain", context, budget={"bits": 5})
    file, facts = exported(source, tmp_path / "ours", context, budget={"bits": 5}, rounding="gptq")
    assert facts["allocation"] == chosen["allocation"]
    rounded = facts["rounding"]
    others = sum(each["count"] for each in rounded["kept"])
    assert rounded["matrices"] + others == len(facts["allocation"])
    theirs, ours = losses(source, context.grams, plain), losses(source, context.grams, file)
    assert sum(ours[name] < theirs[name] for name in ours) == rounded["matrices"]
    assert sum(ours[name] == theirs[name] for name in ours) == 14 - rounded["matrices"]


@pytest.mark.parametrize("case", ["qwen3.5-moe", "gpt-oss", "deepseek-v3"])
def test_experts_and_moved_channels(made: Callable[[str], Path], tmp_path: Path, case: str) -> None:
    source = made(case)
    (grams := tmp_path / "grams").mkdir()
    Sweep(samples=2, length=64).run(source_of(source), grams, Context())
    context = Context(grams=grams)
    plain, _ = exported(source, tmp_path / "plain", context, type="Q4_0", imatrix=True)
    file, facts = exported(source, tmp_path / "ours", context, type="Q4_0", rounding="gptq")
    theirs, ours = losses(source, grams, plain), losses(source, grams, file)
    better = [name for name in ours if ours[name] < theirs[name]]
    assert len(better) == facts["rounding"]["matrices"]
    assert {name for name in ours if ours[name] > theirs[name]} == set()
    assert sum("_exps" in name for name in better) >= 12
    if case == "deepseek-v3":
        assert any("attn_k_b" in each["tensors"] for each in facts["rounding"]["kept"])
    assert logits_of(file, [5, 6, 7]).std() > 0
