"""Pages of mapped files that are given back, and those that must not be."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lighten.model.mapped import Mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")


def resident(place: int) -> int:
    """Returns the bytes in memory of the mapping that an address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            start, end = (int(each, 16) for each in name.split("-"))
            inside = start <= place < end
        elif inside and name == "Rss:":
            return 1024 * int(rest[0])
    raise AssertionError("not mapped")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    weights = {name: torch.arange(1 << 20, dtype=torch.float32) for name in "ab"}
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_what_was_given_back_is_no_memory_and_reads_the_same(file: Path) -> None:
    weights = load_file(file)
    mapped = Mapped(weights.values())
    total = sum(float(each.double().sum()) for each in weights.values())
    place = weights["a"].data_ptr()
    assert resident(place) >= 8 << 20
    for each in weights.values():
        mapped.give_back(each)
    assert resident(place) < 1 << 20
    assert sum(float(each.double().sum()) for each in weights.values()) == total


def test_what_somebody_wrote_to_or_what_lies_in_no_file_is_kept(file: Path) -> None:
    weights = load_file(file)
    weights["a"][1 << 19] = -1
    plain = torch.full((1 << 20,), 3.0)
    mapped = Mapped([*weights.values(), plain])
    for each in (*weights.values(), plain):
        mapped.give_back(each)
    assert weights["a"][1 << 19] == -1
    assert bool((plain == 3).all())


def test_others_beside_a_tensor_keep_their_pages(file: Path) -> None:
    weights = load_file(file)
    mapped = Mapped(weights.values())
    for each in weights.values():
        each.double().sum()
    before = resident(weights["a"].data_ptr())
    mapped.give_back(weights["a"][1000:1010])  # less than a page
    mapped.give_back(weights["a"][::2])  # with gaps
    assert resident(weights["a"].data_ptr()) == before
