"""Polishing of GGUF files: what changes in the bytes, what llama.cpp computes then, and what is left."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from lighten.compress.distill.teacher import Lessons
from lighten.errors import Failure
from lighten.export.gguf.settings import Gguf
from lighten.model import whole
from lighten.model.gguf.blocks import HALVES, KINDS, unpack, with_halves
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.compress.polish.test_polish import polish
from tests.export.gguf.test_every_family import CASES, made
from tests.export.gguf.test_write import logits_of
from tests.families.models import make

__all__ = ["made"]
Tiny = Callable[..., Path]
SHAPE = {"num_hidden_layers": 2, "intermediate_size": 512, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def source(tiny: Tiny) -> Path:
    return tiny("llama", dtype=torch.bfloat16, **SHAPE)


def spoil(file: Path) -> None:
    """Makes d and dmin of every block worse, because those of a random model are hard to better."""
    for tensor in gguf.GGUFReader(file, "r+").tensors:
        kind = KINDS.get(tensor.tensor_type.name)
        if kind is None or not tensor.name.startswith("blk."):
            continue
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        grid = unpack(torch.from_numpy(rows.copy()), kind)
        halves = [grid.d, grid.dmin] if kind.has_mins else [grid.d]
        random = torch.Generator().manual_seed(zlib.crc32(tensor.name.encode()))
        worse = [(half.float() * (0.1 * torch.randn(half.shape, generator=random)).exp()).half() for half in halves]
        rows[:] = with_halves(torch.from_numpy(rows.copy()), kind, worse).numpy()


def exported(source: Path, out: Path, **settings: Any) -> Artifact:
    out.mkdir(parents=True)
    facts = Gguf(format="gguf", **settings).run(Artifact(source, {"key": "x", "format": "hf"}), out, Context())
    for file in out.glob("*.gguf"):
        spoil(file)
    return Artifact(out, {"format": "gguf", "facts": facts})


def halves_of(tensor: Any) -> np.ndarray[Any, Any]:
    """Returns the float16 fields of a tensor, by block; the other bytes are set to zero in its data."""
    kind = KINDS[tensor.tensor_type.name]
    blocks = tensor.data.reshape(-1, kind.size)
    found, start = [], 0
    for name, size in kind.fields:
        if name in HALVES:
            found.append(blocks[:, start : start + size].copy())
            blocks[:, start : start + size] = 0
        start += size
    return np.stack(found)


def changed_halves(before: Path, after: Path) -> dict[str, int]:
    """Returns the number of float16 that differ, by tensor. Fails if anything else does."""
    assert before.stat().st_size == after.stat().st_size
    one, other = (gguf.GGUFReader(file, "c") for file in (before, after))
    start = int(one.data_offset)
    assert before.read_bytes()[:start] == after.read_bytes()[:start]
    found = {}
    for first, second in zip(one.tensors, other.tensors, strict=True):
        assert (first.name, first.tensor_type, first.data_offset) == (
            *(second.name, second.tensor_type),
            second.data_offset,
        )
        if first.tensor_type.name in KINDS:
            mine, theirs = halves_of(first), halves_of(second)
            if count := int((mine != theirs).any(-1).sum()):
                found[first.name] = count
        assert np.array_equal(first.data, second.data), first.name
    return found


def divergence(file: Path, source: Path, ids: torch.Tensor) -> float:
    """Returns KL(source ‖ file) as llama.cpp computes the file."""
    with torch.inference_mode():
        theirs = torch.log_softmax(whole.load(source, torch.float32)(ids).logits, -1)
    ours = torch.stack([torch.from_numpy(logits_of(file, row.tolist())) for row in ids]).log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@pytest.mark.parametrize("type", ["Q2_K", "Q5_1"])
def test_halves_change_and_nothing_else(source: Path, tmp_path: Path, type: str) -> None:
    given = exported(source, tmp_path / "q", type=type)
    facts, out = polish(given, source, tmp_path)
    (file,) = given.path.glob("*.gguf")
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", file.name]
    changed, told = changed_halves(file, out / file.name), facts["polish"]
    assert facts["format"] == "gguf" and facts["type"] == type and facts["tensor_types"] == given.facts["tensor_types"]
    assert told["scales_changed"]["count"] == sum(changed.values()) <= told["scales_changed"]["of"]
    assert told["linears"] == len(changed) == 14
    assert [each["what"] for each in told["left"]] == ["token_embd.weight"]
    assert "embedding" in told["left"][0]["why"]
    assert told["kl_after"] < told["kl_before"] and told["steps"] == 8


def test_llama_cpp_computes_what_is_told(source: Path, tmp_path: Path) -> None:
    given = exported(source, tmp_path / "q", type="Q2_K")
    facts, out = polish(given, source, tmp_path)
    lessons = Lessons(tmp_path / "lessons")
    ids = lessons.ids[-int(lessons.facts["held_out"]) :]
    (file,) = given.path.glob("*.gguf")
    found = [divergence(each, source, ids[:, :-1]) for each in (file, out / file.name)]
    told = facts["polish"]
    assert found == pytest.approx([told["kl_before"], told["kl_after"]], rel=0.1)
    assert found[1] < found[0]


def test_an_interrupted_training_ends_in_the_same_bytes(source: Path, tmp_path: Path) -> None:
    given = exported(source, tmp_path / "q", type="Q3_K_M")
    facts, out = polish(given, source, tmp_path / "whole", save_every=2)
    with pytest.raises(KeyboardInterrupt):
        polish(given, source, tmp_path / "broken", 5, save_every=2)
    assert [path.name for path in (tmp_path / "broken/scratch").glob("checkpoint-*")] == ["checkpoint-00000004"]
    again, resumed = polish(given, source, tmp_path / "broken", save_every=2)
    (file,) = given.path.glob("*.gguf")
    assert (out / file.name).read_bytes() == (resumed / file.name).read_bytes() != file.read_bytes()
    assert facts == again


def test_files_in_parts(source: Path, tmp_path: Path) -> None:
    plain, parted = (exported(source, tmp_path / str(size), type="Q4_0", split=size) for size in (10**9, 400_000))
    one, first = polish(plain, source, tmp_path / "one")
    other, second = polish(parted, source, tmp_path / "other")
    assert one["polish"] == other["polish"] and len(other["files"]) > 2
    assert sorted(path.name for path in second.iterdir()) == sorted(other["files"])
    (file,) = first.glob("*.gguf")
    mine = {each.name: each.data for each in gguf.GGUFReader(file).tensors}
    theirs = {each.name: each.data for part in second.glob("*.gguf") for each in gguf.GGUFReader(part).tensors}
    assert mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("family", ["phi3", "gemma2", "qwen3-moe"])
def test_other_families(made: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """phi3 has fused linears, gemma2 norms that are stored less one, qwen3-moe experts."""
    if family in CASES:
        source = made(family)
    else:
        (source := tmp_path / "plain").mkdir()
        make(family, source)
    given = exported(source, tmp_path / "q", type="Q4_0")
    facts, out = polish(given, source, tmp_path)
    (file,) = given.path.glob("*.gguf")
    changed, told = changed_halves(file, out / file.name), facts["polish"]
    assert told["kl_after"] < told["kl_before"]
    left = {each["what"] for each in told["left"]}
    assert not left.intersection(changed)
    assert any("exps" in name for name in left) == (family == "qwen3-moe")
    assert len(changed) == told["linears"] >= 8
    assert not {each["why"] for each in told["left"] if "exps" not in each["what"]} - {
        "the embedding, whose rows are looked up",
        "the output head, which makes the distributions that are compared",
    }


def test_the_file_of_another_model(source: Path, tmp_path: Path, tiny: Tiny) -> None:
    other = Path(shutil.copytree(source, tmp_path / "other"))
    given = exported(source, tmp_path / "q", type="Q4_0")
    strange = whole.load(source, torch.float32)
    with torch.no_grad():
        for parameter in strange.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    strange.save_pretrained(other)
    with pytest.raises(Failure, match=r"no matrix whose scales can be trained \(it lies in the file in another way"):
        polish(given, other, tmp_path)


def test_types_without_such_scales_stay(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lighten.compress.polish import gguf_file

    given = exported(source, tmp_path / "q", type="Q4_K_M")
    monkeypatch.setattr(gguf_file, "KINDS", {name: kind for name, kind in KINDS.items() if name != "Q6_K"})
    facts, out = polish(given, source, tmp_path)
    (file,) = given.path.glob("*.gguf")
    changed, left = changed_halves(file, out / file.name), facts["polish"]["left"]
    assert {each["why"] for each in left} >= {"its type Q6_K is none whose scales polish trains"}
    assert len(changed) + len(left) == 15
