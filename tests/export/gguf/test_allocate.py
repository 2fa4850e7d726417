from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lighten.errors import RequestError
from lighten.export.gguf import allocate as budget
from lighten.export.gguf import ggml
from lighten.export.gguf.quantize import importance
from lighten.export.gguf.settings import Gguf
from lighten.export.gguf.write import Draft
from lighten.model.grams import Gram, GramWriter, read_layer
from lighten.model.sensitivity import Sensitivity
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.export.gguf.test_step import FACTS
from tests.export.gguf.test_write import logits_of

Tiny = Callable[..., Path]


def swept(source: Path, folder: Path) -> Path:
    """Returns a sweep over a tiny model whose linears of the same width read the same input."""
    folder.mkdir()
    writer, shapes = GramWriter(folder, [f"model.layers.{n}." for n in range(8)], {}), Draft(source).shapes
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        linears = [name for name, shape in shapes.items() if name.startswith(prefix) and len(shape) == 2]
        inputs = {name.removeprefix(prefix).removesuffix(".weight"): str(shapes[name][1]) for name in linears}
        grams = {}
        for width in set(inputs.values()):
            x = torch.randn(1000, int(width), generator=generator) * torch.rand(int(width), generator=generator)
            gram = grams[width] = Gram.empty(int(width), "cpu")
            for start, block in gram.rows():
                block.copy_(x[:, start : start + len(block)].T @ x[:, start:])
            gram.tokens = len(x)
        writer.add(grams, inputs)
    writer.close(torch.zeros(1, 8), [])
    return folder


def sensed(source: Path) -> Sensitivity:
    """Returns sensitivities of a tiny model: of every linear another one."""
    draft = Draft(source)
    modules = [name.removesuffix(".weight") for name, shape in draft.shapes.items() if len(shape) == 2]
    outputs = {name: 1e-3 * (1 + number % 3) for number, name in enumerate(sorted({*modules, "lm_head"}))}
    hidden = draft.facts.hidden
    x = torch.randn(1000, hidden, generator=torch.Generator().manual_seed(1))
    counts = torch.ones(draft.facts.vocab, dtype=torch.int32)
    return Sensitivity(outputs, x.T @ x, counts, 1000)


def prices(source: Path, folder: Path) -> budget.Prices:
    return budget.Prices(swept(source, folder), sensed(source))


def fitted(source: Path, folder: Path, value: Any, reports: list[tuple[int, int, str]] | None = None) -> dict[str, Any]:
    """Returns the facts of an export of a tiny model into the existing directory, on a sweep beside it."""
    grams = folder.parent / "grams"
    context = Context(grams=grams if grams.exists() else swept(source, grams), sensitivity=folder.parent)
    sensed(source).write(folder.parent)
    if reports is not None:
        context.report = lambda *report: reports.append(report)
    return Gguf(format="gguf", budget=value).run(Artifact(source, {"format": "hf"}), folder, context)


@pytest.mark.parametrize(
    ("text", "mapping"),
    [
        ("90MB", {"size": 90_000_000}),
        ("size=1.5 GiB", {"size": 1_610_612_736}),
        ("bits=4.5", {"bits": 4.5}),
        ({"size": "90MB"}, {"size": 90_000_000}),
        ({"size": 7}, {"size": 7}),
    ],
)
def test_a_budget_is_read_from_text(text: Any, mapping: dict[str, Any]) -> None:
    step = Gguf(format="gguf", budget=text)
    assert step.model_dump(exclude_none=True)["budget"] == mapping
    assert step.needs_sweep()
    assert Gguf(**step.model_dump(mode="json")) == step


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"budget": "90MB", "type": "Q4_K_M"}, "leave out either `type` or `budget`"),
        ({"budget": "90MB", "imatrix": False}, "leave out `imatrix`"),
        ({"budget": "4.5"}, "size=90MB, or bits=4.5"),
        ({"budget": "90 megs"}, "is not a size"),
        ({"budget": {"size": 7, "bits": 4}}, "one of the two"),
        ({"budget": {}}, "one of the two"),
        ({"budget": {"bits": 0}}, "greater than 0"),
        ({"type": "budget"}, "needs a `budget`"),
    ],
)
def test_wrong_budgets(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Gguf(format="gguf", **settings)


def test_a_step_without_a_budget_keeps_its_key() -> None:
    assert Gguf(format="gguf").key_config() == {"format": "gguf", "type": "Q4_K_M", "imatrix": False}


def test_prediction() -> None:
    estimate = Gguf(format="gguf", budget="1MB").predict(FACTS, 0)
    assert estimate.disk_bytes == 1_000_000
    assert estimate.float32_flops > 0
    assert Gguf(format="gguf", budget="bits=4").predict(FACTS, 0).disk_bytes == FACTS.params // 2


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-bias", "llama3", "qwen2"])
def test_the_file_has_the_types_that_were_chosen_and_fits(tiny: Tiny, tmp_path: Path, family: str) -> None:
    source, out = tiny(family), tmp_path / "out"
    out.mkdir()
    reports: list[tuple[int, int, str]] = []
    facts = fitted(source, out, "bits=5", reports)
    file = out / "model-budget.gguf"
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", file.name]
    assert 0.9 * facts["budget_bytes"] < file.stat().st_size <= facts["budget_bytes"]
    assert 4 < facts["bits_per_weight"] <= 5
    assert facts["type"] == "budget"
    assert facts["imatrix"] is True
    assert facts["predicted_error"] > 0
    names = Draft(source).names
    chosen = {names[f"{module}.weight"]: one for module, one in facts["allocation"].items()}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert {name for name, tensor in tensors.items() if len(tensor.shape) > 1} == set(chosen)
    assert {name: one["type"] for name, one in chosen.items()} == {
        name: tensors[name].tensor_type.name for name in chosen
    }
    assert all(
        one["bits"] == round(8 * tensors[name].n_bytes / tensors[name].n_elements, 4) for name, one in chosen.items()
    )
    assert np.isfinite(logits_of(file, list(range(3, 40)))).all()
    done = [report[0] for report in reports]
    assert done == sorted(done)
    assert done[-1] == reports[-1][1]


def test_a_larger_budget_is_closer_to_the_source(tiny: Tiny, tmp_path: Path) -> None:
    from lighten.export.gguf import write as export

    export.write(tiny(), tmp_path / "plain.gguf")
    ids = list(range(3, 67))
    expected = logits_of(tmp_path / "plain.gguf", ids)
    errors, predicted = [], []
    for bits in (3.5, 5, 9):
        out = tmp_path / str(bits)
        out.mkdir()
        predicted.append(fitted(tiny(), out, {"bits": bits})["predicted_error"])
        errors.append(float(np.square(logits_of(out / "model-budget.gguf", ids) - expected).mean()))
    assert errors == sorted(errors, reverse=True)
    assert predicted == sorted(predicted, reverse=True)


def test_the_smallest_size_is_named_and_can_be_had(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(RequestError, match=r"smallest file of this model has [\d,]+ bytes") as caught:
        fitted(tiny(), out, "90kB")
    assert list(out.iterdir()) == []
    smallest = int(str(caught.value).split("model has ")[1].split(" ")[0].replace(",", ""))
    with pytest.raises(RequestError):
        fitted(tiny(), out, {"size": smallest - 1})
    fitted(tiny(), out, {"size": smallest})
    assert smallest - 64 <= (out / "model-budget.gguf").stat().st_size <= smallest


def test_same_bytes_twice(tiny: Tiny, tmp_path: Path) -> None:
    files = []
    for name in "ab":
        (tmp_path / name).mkdir()
        fitted(tiny(), tmp_path / name, "bits=4.7")
        files.append((tmp_path / name / "model-budget.gguf").read_bytes())
    assert files[0] == files[1]


def test_needs_a_calibration_set(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="a budget needs a calibration set"):
        Gguf(format="gguf", budget="bits=5").run(Artifact(tiny(), {"format": "hf"}), tmp_path, Context())


@pytest.mark.parametrize("type", sorted({*budget.WIDE, *budget.NARROW}))
def test_rounding_is_that_of_the_gguf_package(type: str) -> None:
    weight = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    packed = ggml.quantize(weight, type, np.ones(512, dtype=np.float32))
    expected = gguf.dequantize(packed, gguf.GGMLQuantizationType[type])
    found = ggml.dequantize(packed, type, 512)
    assert np.allclose(found, expected, atol=1e-5)
    assert np.square(found - weight).mean() < 0.15


def test_costs_are_those_of_the_outputs(tiny: Tiny, tmp_path: Path) -> None:
    draft, asked = Draft(tiny()), prices(tiny(), tmp_path / "grams")
    weights = importance(asked.grams, draft.model)
    hf, type = "model.layers.1.mlp.up_proj.weight", "Q3_K"
    found = budget.try_types(draft, asked, weights)[hf]
    weight = draft.weight(hf).float()
    rounded = ggml.dequantize(ggml.quantize(weight.numpy(), type, weights["blk.1.ffn_up.weight"]), type, 256)
    delta = (torch.from_numpy(rounded) - weight).double()
    gram = read_layer(asked.grams, 1)[0]["256"]
    mean = budget.without_leading(gram.matrix() / gram.tokens).double()
    price = asked.sensitivity.outputs["model.layers.1.mlp.up_proj"]
    assert found[type] == pytest.approx(price * float(torch.trace(delta @ mean @ delta.T)), rel=1e-4)


def test_the_leading_direction_is_left_out() -> None:
    x = torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    x[0] *= 100
    gram = (x.T @ x).double()
    values, vectors = torch.linalg.eigh(gram)
    expected = vectors[:, :-1] @ torch.diag(values[:-1]) @ vectors[:, :-1].T
    assert torch.allclose(budget.without_leading(gram), expected, atol=1e-6 * float(values[-1]))


def test_a_tied_embedding_pays_as_the_head_and_as_itself(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("llama-tied")
    draft, asked = Draft(source), prices(source, tmp_path / "grams")
    found = budget.try_types(draft, asked, {})["model.embed_tokens.weight"]["Q4_K"]
    weight = draft.weight("model.embed_tokens.weight").float()
    rounded = ggml.dequantize(ggml.quantize(weight.numpy(), "Q4_K", np.ones(256, dtype=np.float32)), "Q4_K", 256)
    delta = (torch.from_numpy(rounded) - weight).double()
    known = asked.sensitivity
    head = known.outputs["lm_head"] * float(torch.trace(delta @ (known.head_gram.double() / known.tokens) @ delta.T))
    rows = known.outputs["model.embed_tokens"] * float(delta.square().sum(1).mean())
    assert found == pytest.approx(head + rows, rel=1e-3)


def test_tall_matrices_are_sampled(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft, asked = Draft(tiny()), prices(tiny(), tmp_path / "grams")
    whole = budget.try_types(draft, asked, {})
    monkeypatch.setattr(budget, "MOST_ROWS", 100)
    part = budget.try_types(draft, asked, {})
    for hf in whole:
        assert part[hf]["Q4_K"] == pytest.approx(whole[hf]["Q4_K"], rel=0.3)
