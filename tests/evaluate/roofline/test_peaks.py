"""The roofs of this machine, measured for real; and what is kept of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lighten.evaluate.roofline import peaks
from lighten.evaluate.roofline.peaks import Peaks

CURVE = [(4_000_000, 100.0), (16_000_000, 80.0), (256_000_000, 20.0)]


def some(**changes: object) -> Peaks:
    values = {
        "device": "cpu",
        "bandwidth": CURVE,
        "matrix": {"float32": 200.0},
        "spread": 0.1,
        "measured": "2026-01-01",
    }
    return Peaks(**{**values, **changes})  # type: ignore[arg-type]


def test_measures_this_machine_with_progress() -> None:
    seen: list[tuple[int, int]] = []
    found = peaks.measure({"device": "cpu"}, lambda done, total, note: seen.append((done, total)))
    sizes = [size for size, _ in found["bandwidth"]]
    assert sizes == sorted(sizes) and sizes[-1] > 1e8
    assert all(1e-3 < rate < 1e6 for _, rate in found["bandwidth"])  # GB/s, however busy the machine is
    assert found["matrix"]["float32"] > 0 and set(found["matrix"]) == {"float32", "bfloat16", "int8"}
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1]


def test_what_was_measured_is_found_again_on_this_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert peaks.load("cpu") is None
    peaks.save(some())
    assert peaks.load("cpu") == some()
    assert peaks.load("cuda") is None
    (file,) = tmp_path.rglob("*.json")
    other = peaks.machine.fingerprint() | {"cores": 99}
    monkeypatch.setattr(peaks.machine, "fingerprint", lambda: other)
    assert peaks.load("cpu") is None
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file.write_text("{")
    assert peaks.load("cpu") is None


def test_a_place_that_cannot_be_written_to_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    peaks.save(some())
    assert peaks.load("cpu") is None


def test_reading_between_the_measured_sizes() -> None:
    assert some().reading(1) == 100 and some().reading(4_000_000) == 100
    assert some().reading(8_000_000) == pytest.approx(90)
    assert some().reading(256_000_000) == some().reading(1e12) == some().memory == 20


def test_a_busy_machine_is_noticed() -> None:
    assert some(spread=0.5).busy and not some(spread=0.05).busy


def test_the_facts_are_json_with_the_agreed_names() -> None:
    facts = json.loads(json.dumps(some(matrix={"float32": 200.04, "int8": None}).facts()))
    assert facts["bandwidth_gb_s"] == 20
    assert facts["matrix_gflop_s"] == {"float32": 200.0, "int8": None}


class Layouts(TorchDispatchMode):
    """Keeps the strides of what is multiplied as 8-bit integers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_int_mm" in str(func):
            self.seen.append(tuple(each.stride() for each in args))
        return func(*args, **(kwargs or {}))


def test_integers_are_laid_out_as_a_gpu_wants_them() -> None:
    """cuBLAS multiplies rows by columns only: it refuses a second matrix that lies row by row."""
    with Layouts() as layouts:
        for product in peaks._products("int8", 32, "cpu"):
            assert product().dtype == torch.int32
    assert layouts.seen == [((32, 1), (1, 32))]
