"""A file of every family is read back into the checkpoint that it was made from, by the same row."""

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lighten.export.gguf import write as export
from lighten.model import gguf_source
from lighten.model.checkpoint import Checkpoint
from lighten.model.weight_checks import check
from tests.export.gguf.test_families import folder, made

__all__ = ["folder"]
BACK = (
    *("llama-biases-apart", "qwen2-tied-yarn", "gemma2-pattern", "gemma3-scaled", "phi3-longrope-long-text"),
    *("smollm3", "granite-tied-biases-llama3"),
)
"""Cases that are read back: each has a setting that no other has."""
SCALED = ("gemma2-other-scale", "gemma2-pattern", "gemma3", "gemma3-scaled", "gemma3-pattern")
"""Cases whose weights take over a scale that a file has no key for."""


def contents(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the keys of the architecture in a file, and its tensors, which are F32."""
    reader = gguf.GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith(("GGUF", "general"))}
    return keys, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def nearly(one: Any, other: Any) -> bool:
    if isinstance(one, float):
        return bool(one == pytest.approx(other, rel=1e-5))
    return bool(one == other)


def read_back(file: Path, folder: Path) -> Path:
    folder.mkdir()
    gguf_source.check(file)
    gguf_source.convert(file, folder)
    assert check({"path": folder, "name": "back"}, lambda *_: None)["surplus"] == []
    return folder


def in_bfloat16(source: Path, folder: Path) -> Path:
    """Copies a model; its weights are those that a source is read into."""
    copy = shutil.copytree(source, folder)
    tensors = load_file(copy / "model.safetensors")
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(rounded, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def same_again(source: Path, folder: Path, *, scaled: bool = False) -> None:
    """Writes a model, reads it back, and writes that: nothing is lost in any direction."""
    source = in_bfloat16(source, folder / "source")
    export.write(source, folder / "m.gguf", "F32")
    back = read_back(folder / "m.gguf", folder / "back")
    before, after = Checkpoint(source), Checkpoint(back)
    tied = {"lm_head.weight"} if before.facts.tied else set()
    assert before.weight_map.keys() - tied == after.weight_map.keys() - tied
    odd = [name for name in before.weight_map.keys() - tied if not torch.equal(before.tensor(name), after.tensor(name))]
    assert odd == [] or scaled
    export.write(back, folder / "again.gguf", "F32")
    first, second = contents(folder / "m.gguf"), contents(folder / "again.gguf")
    assert first[0].keys() == second[0].keys()
    assert [key for key, value in first[0].items() if not nearly(value, second[0][key])] == []
    assert first[1].keys() == second[1].keys()
    assert [name for name in first[1] if not np.allclose(first[1][name], second[1][name], 2**-7, 2**-8)] == []


@pytest.mark.parametrize("case", BACK)
def test_a_model_comes_back(folder: Path, tmp_path: Path, case: str) -> None:
    same_again(made(folder, case), tmp_path, scaled=case in SCALED)
