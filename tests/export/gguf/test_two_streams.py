"""Files whose matrices were rounded against what arrives in the quantized model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from pydantic import ValidationError

from lighten.compress.calibrate.sweep import Sweep
from lighten.export.gguf import two_streams
from lighten.export.gguf.settings import Gguf
from lighten.export.gguf.two_streams import FileWork
from lighten.model import gguf_source, stream
from lighten.model.blockwise import known_anatomy
from lighten.model.checkpoint import Checkpoint
from lighten.model.grams import Gram
from lighten.observe.streams import Inputs
from lighten.step import Context
from tests.export.gguf.test_every_family import made
from tests.export.gguf.test_rounding import exported, source_of
from tests.export.gguf.test_write import logits_of
from tests.families.models import make

__all__ = ["made"]
WAYS = {"rounding": "gptq", "propagate": "auto"}
Found = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(stream, "fast_dtype", lambda device: torch.float32)
    yield


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> Found:
    """The weights of the quantized model in the walk, by full name."""
    found: Found = {}
    own = FileWork.round

    def round_(self: FileWork, group: Inputs, gram: Gram, wanted: Any) -> Found:
        answer = own(self, group, gram, wanted)
        found.update({self.prefix + name: each for name, each in answer.items()})
        return answer

    monkeypatch.setattr(FileWork, "round", round_)
    return found


def swept(source: Path, folder: Path, samples: int = 4) -> Context:
    (folder / "grams").mkdir()
    Sweep(samples=samples, length=64).run(source_of(source), folder / "grams", Context())
    return Context(grams=folder / "grams")


def in_file(file: Path, folder: Path, source: Path, grams: Path) -> Found:
    """Returns the weights of all linears of a file, by full name in the source."""
    folder.mkdir()
    gguf_source.convert(file, folder)
    found, back = {}, Checkpoint(folder)
    for layer in known_anatomy(Checkpoint(source), grams).layers:
        tensors = dict(back.tensors(layer.prefix))
        found |= {layer.prefix + linear.name: linear.matrix(tensors) for linear in layer.linears}
    return found


def plain(family: str, folder: Path) -> Path:
    (source := folder / "model").mkdir()
    make(family, source)
    return source


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_quantized_model_of_the_walk_is_that_of_the_file(family: str, tmp_path: Path, twins: Found) -> None:
    """phi3 has fused linears, and llama.cpp wants llama's queries and keys in another order."""
    source = plain(family, tmp_path)
    context = swept(source, tmp_path)
    file, facts = exported(source, tmp_path / "ours", context, type="Q4_0", **WAYS)
    assert context.grams
    there = in_file(file, tmp_path / "back", source, context.grams)
    assert twins.keys() == there.keys()
    assert all(torch.equal(twins[name].bfloat16(), each.bfloat16()) for name, each in there.items())
    assert facts["rounding"]["propagation"]["inputs"] > 3
    assert facts["rounding"]["loss"] < 1
    assert logits_of(file, [5, 6, 7]).std() > 0
    before = file.read_bytes()
    file.unlink()
    again, _ = exported(source, tmp_path / "again", context, type="Q4_0", **WAYS)
    assert again.read_bytes() == before


@pytest.mark.parametrize("case", ["qwen3-moe", "gpt-oss", "qwen3.5-moe", "deepseek-v3"])
def test_experts_and_moved_channels(made: Callable[[str], Path], tmp_path: Path, case: str, twins: Found) -> None:
    source = made(case)
    context = swept(source, tmp_path)
    file, facts = exported(source, tmp_path / "ours", context, type="Q4_0", **WAYS)
    assert context.grams
    there = in_file(file, tmp_path / "back", source, context.grams)
    odd = [name for name, each in twins.items() if not torch.allclose(each.float(), there[name].float(), 2**-7, 2**-9)]
    assert odd == []
    assert sum("experts" in name for name in twins) >= 12
    kept = {why["why"] for why in facts["rounding"]["kept"]}
    assert two_streams.ELSEWHERE not in kept
    if case == "deepseek-v3":
        assert any("attn_k_b" in each["tensors"] for each in facts["rounding"]["kept"])
    assert logits_of(file, [5, 6, 7]).std() > 0


def test_types_that_rounding_does_not_know_stay_in_the_walk(
    tmp_path: Path, twins: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What llama.cpp rounded is what later layers make good."""
    known = dict(two_streams.KINDS)
    known.pop("Q4_0")
    monkeypatch.setattr(two_streams, "KINDS", known)
    source = plain("llama", tmp_path)
    context = swept(source, tmp_path)
    file, facts = exported(source, tmp_path / "ours", context, type="Q4_0", **WAYS)
    own, _ = exported(source, tmp_path / "own", context, type="Q4_0", imatrix=True)
    assert {each["why"] for each in facts["rounding"]["kept"]} >= {"rounding knows no Q4_0"}
    assert facts["rounding"]["matrices"] == 0
    first, second = (gguf.GGUFReader(each).tensors for each in (file, own))
    assert all((one.data == other.data).all() for one, other in zip(first, second, strict=True))
    assert context.grams
    there = in_file(file, tmp_path / "back", source, context.grams)
    assert all(torch.equal(each.bfloat16(), there[name].bfloat16()) for name, each in twins.items())


def test_what_fits_together() -> None:
    step = Gguf(format="gguf", rounding="gptq", propagate="auto")
    assert step.key_config()["propagate"] == "auto"
    assert "propagate" not in Gguf(format="gguf", rounding="gptq").key_config()
    for settings in ({}, {"rounding": "keep", "type": "Q4_0"}):
        with pytest.raises(ValidationError, match="propagate: auto is for rounding: gptq"):
            Gguf(format="gguf", propagate="auto", **settings)  # type: ignore[arg-type]
