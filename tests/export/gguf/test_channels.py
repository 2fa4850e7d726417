"""What is measured on the inputs of a model's linears reaches the right channels of the right tensors of a file."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lighten.compress.calibrate.sensitivity import Sensitivities
from lighten.compress.calibrate.sweep import Sweep
from lighten.export.gguf import allocate, ggml
from lighten.export.gguf import quantize as gguf_quantize
from lighten.export.gguf.linears import in_order
from lighten.export.gguf.settings import Gguf
from lighten.export.gguf.write import Draft
from lighten.model import stream
from lighten.model.gguf.family import place_of, places
from lighten.model.gguf.towers import model_of
from lighten.model.grams import read_diagonals, read_layer
from lighten.model.sensitivity import Sensitivity
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.conftest import byte_level, write_tokenizer
from tests.export.gguf.test_every_family import made
from tests.export.gguf.test_write import logits_of
from tests.families.models import config_of

__all__ = ["made"]
Make = Callable[[str], Path]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(stream, "fast_dtype", lambda device: torch.float32)
    yield


def swept(source: Path, folder: Path) -> Path:
    (grams := folder / "grams").mkdir()
    Sweep(samples=2, length=32).run(Artifact(source, {"key": "x", "format": "hf"}), grams, Context())
    return grams


@pytest.mark.parametrize("case", ["gpt-oss", "deepseek-v3", "qwen3.5-moe"])
def test_every_channel_of_every_expert_has_an_importance(made: Make, tmp_path: Path, case: str) -> None:
    source = made(case)
    grams = swept(source, tmp_path)
    model, draft = model_of(source), Draft(source)
    found = gguf_quantize.importance(grams, model)
    shapes = {piece.name: piece.shape for piece in draft.pieces.values()}
    assert {name: len(values) for name, values in found.items()} == {
        name: shapes[name][-1] * (shapes[name][0] if len(shapes[name]) == 3 else 1) for name in found
    }
    known = {place.stored: place for place in places(draft.family, model)}
    experts = 0
    for linear, diagonal, tokens in read_diagonals(grams):
        place, expert = place_of(known, linear) or (None, None)
        assert place
        values = found.get(place.names[0])
        if expert is not None and values is not None:
            width = len(diagonal)
            assert np.allclose(
                values[expert * width : (expert + 1) * width], gguf_quantize.channel_importance(diagonal, tokens)
            )
            experts += 1
    assert experts == 3 * 4 * sum("ffn_up_exps" in name for name in shapes if name.endswith("weight"))
    # llama.cpp takes them
    (plain := tmp_path / "p.gguf").unlink(missing_ok=True)
    draft.save(plain, draft.types("F32"), file_type=0)
    gguf_quantize.quantize(plain, tmp_path / "q.gguf", "Q4_0", found)
    assert logits_of(tmp_path / "q.gguf", [5, 6, 7]).std() > 0


@pytest.mark.parametrize(("case", "linear"), [("qwen3.5-moe", "linear_attn.out_proj"), ("deepseek-v3", "kv_b_proj")])
def test_channels_move_with_the_columns(made: Make, case: str, linear: str) -> None:
    """A matrix of a file times inputs in the file's order gives what the stored matrix gives of the stored inputs."""
    draft = Draft(made(case))
    pieces: list[Any] = [piece for piece in draft.pieces.values() if linear in piece.stored[0]]
    assert pieces
    for piece in pieces:
        weight = draft.checkpoint.tensor(piece.stored[0])
        inputs = torch.randn(weight.shape[1])
        moved = piece.place.rule.turn.channels(inputs, draft.model)[piece.index]
        if moved is None:
            continue
        matrix = piece.tensor(draft.checkpoint.tensor, draft.model)
        parts = moved.reshape(-1, matrix.shape[-1])
        outputs = torch.einsum("...oi,...i->...o", matrix, parts if matrix.dim() == 3 else parts[0])
        wanted = (weight @ inputs).tolist()
        assert all(min(abs(each - other) for other in wanted) < 1e-5 for each in outputs.flatten().tolist())
        if matrix.dim() == 2:
            assert torch.allclose(outputs, weight @ inputs, atol=1e-5)


@pytest.mark.parametrize("case", ["qwen3.5", "granite-hybrid-dense"])
def test_a_budget_for_a_hybrid(made: Make, tmp_path: Path, case: str) -> None:
    source = made(case)
    grams = swept(source, tmp_path)
    (folder := tmp_path / "s").mkdir()
    Sensitivities(samples=2, length=32).run(Artifact(source, {"key": "x", "format": "hf"}), folder, Context())
    prices = allocate.Prices(grams, Sensitivity.read(folder))
    draft, weights = Draft(source), gguf_quantize.importance(grams, model_of(source))
    found = allocate.fit(draft, tmp_path / "m.gguf", None, 7.0, prices, weights)
    assert (tmp_path / "m.gguf").stat().st_size <= found["budget_bytes"]
    assert {each["type"] for each in found["allocation"].values()} > {"Q8_0"}
    draft.save(tmp_path / "p.gguf", draft.types("F32"), file_type=0)
    exact, rounded = (
        torch.from_numpy(logits_of(tmp_path / name, list(range(5, 60)))).log_softmax(-1)
        for name in ("p.gguf", "m.gguf")
    )
    divergence = float((exact.exp() * (exact - rounded)).sum(-1).mean())
    assert found["predicted_error"] / 4 < divergence < found["predicted_error"] * 4
    # M moves with the columns: an error costs the same in the order of the file
    label = next(label for label in draft.pieces if label.endswith(("out_proj.weight", "o_proj.weight")))
    metric = torch.randn(draft.shapes[label][1], draft.shapes[label][1])
    stored, moved = draft.checkpoint.tensor(draft.pieces[label].stored[0]), draft.weight(label)
    there = torch.trace(moved @ in_order(draft, label, metric) @ moved.T)
    assert torch.allclose(there, torch.trace(stored @ metric @ stored.T), rtol=1e-4)


BUDGET_SIZES = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 1, "num_experts": 4}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_budget_for_experts(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts of a layer are one tensor: their errors add up. The more bytes, the closer to the source."""
    monkeypatch.setattr(allocate, "WIDE", ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0"))  # the others take seconds to try
    (source := tmp_path / "model").mkdir()
    vocab = write_tokenizer(source, byte_level("gpt-2")) + 3
    torch.manual_seed(1)
    sizes = {**BUDGET_SIZES, "intermediate_size": 256, "num_local_experts": 4, "norm_topk_prob": True}
    model = AutoModelForCausalLM.from_config(config_of(family, vocab, {**sizes, "layer_types": None}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.7 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(source)
    grams = swept(source, tmp_path)
    (folder := tmp_path / "s").mkdir()
    Sensitivities(samples=4, length=64).run(Artifact(source, {"key": "x", "format": "hf"}), folder, Context())
    prices = allocate.Prices(grams, Sensitivity.read(folder))
    draft, weights = Draft(source), gguf_quantize.importance(grams, model_of(source))
    Gguf(format="gguf", budget={"bits": 5}).check(model_of(source).facts)

    costs = allocate.try_types(draft, prices, weights)
    name = next(label for label in draft.pieces if draft.names[label] == "blk.0.ffn_down_exps.weight")
    assert costs[name]["Q4_K"] == pytest.approx(summed(draft, name, prices, weights["blk.0.ffn_down_exps.weight"]))

    draft.save(tmp_path / "p.gguf", draft.types("F32"), file_type=0)
    ids = list(range(5, 60))
    exact = torch.from_numpy(logits_of(tmp_path / "p.gguf", ids)).log_softmax(-1)
    found, divergences = [], []
    fixed = allocate.fixed_bytes(draft, tmp_path / "x") + sum(
        allocate.padded_bytes(draft.shapes[label], "F32")
        for label, piece in draft.pieces.items()
        if not piece.is_matrix
    )
    for bits in (3.6, 5.0, 8.0) if family == "qwen3_moe" else (4.0,):
        file = tmp_path / f"{bits}.gguf"
        found.append(allocate.fit(draft, file, None, bits, prices, weights))
        types = {
            f"{label}.weight" if f"{label}.weight" in draft.pieces else label: each["type"]
            for label, each in found[-1]["allocation"].items()
        }
        assert any("_exps" in draft.names[label] and type != "Q8_0" for label, type in types.items())
        predicted = fixed + sum(allocate.padded_bytes(draft.shapes[label], type) for label, type in types.items())
        assert file.stat().st_size == pytest.approx(predicted, abs=64)
        assert file.stat().st_size <= found[-1]["budget_bytes"]
        if types[name] != "F16":
            written = next(each for each in gguf.GGUFReader(file).tensors if each.name == "blk.0.ffn_down_exps.weight")
            own = weights[written.name][3 * 256 :]
            assert np.array_equal(written.data[3], ggml.quantize(draft.weight(name)[3].numpy(), types[name], own))
        rounded = torch.from_numpy(logits_of(file, ids)).log_softmax(-1)
        divergences.append(float((exact.exp() * (exact - rounded)).sum(-1).mean()))
    assert divergences == sorted(divergences, reverse=True)
    predictions = [each["predicted_error"] for each in found]
    assert predictions == sorted(predictions, reverse=True)
    assert predictions[0] / 5 < divergences[0] < predictions[0] * 5


def summed(draft: Draft, label: str, prices: allocate.Prices, channels: Any) -> float:
    """Returns what rounding the last matrices of all experts of layer 0 to Q4_K costs, one expert after the other."""
    grams, inputs = read_layer(prices.grams, 0)
    text, total = max(gram.tokens for gram in grams.values()), 0.0
    for expert, weight in enumerate(draft.weight(label).float()):
        own = channels[expert * 256 : (expert + 1) * 256]
        rounded = ggml.dequantize(ggml.quantize(weight.numpy(), "Q4_K", own), "Q4_K", 256)
        delta = (torch.from_numpy(rounded) - weight).double()
        linear = next(each for each in inputs if each.endswith(f".{expert}.down_proj"))
        gram = allocate.without_leading(grams[inputs[linear]].matrix() / text).double()
        total += prices.sensitivity.outputs[f"model.layers.0.{linear}"] * float(torch.trace(delta @ gram @ delta.T))
    return total
