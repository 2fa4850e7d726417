import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lighten.evaluate.machine import fingerprint
from lighten.evaluate.request_model import for_speed
from lighten.evaluate.run import measure
from lighten.evaluate.runtimes.runtime import Ids, Runtime, Timings
from lighten.evaluate.speed import shapes, work
from lighten.evaluate.speed.energy import Counters, GpuCounters
from lighten.evaluate.speed.energy import counters as counters_of
from lighten.evaluate.speed.settings import Speed
from lighten.step import silent
from tests.evaluate.conftest import Tiny, payload


class Scripted:
    """A runtime that takes 10 ms for a prompt, and for a token the given milliseconds, run after run."""

    vocab, dtype, device, elsewhere = 50, "float32", "cpu", False
    options: ClassVar[dict[str, str]] = {}

    def __init__(self, *milliseconds: float) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self._left = iter(milliseconds)

    def generate(self, prompt: Ids, steps: int) -> Timings:
        self.shapes.append((*prompt.shape, steps))
        return Timings(0.010, [0.001 * next(self._left, 1)] * (steps - 1))

    def peak_vram_bytes(self) -> int | None:
        return None


def measured(runtime: Scripted, **settings: Any) -> dict[str, Any]:
    return shapes.measure(runtime, Speed(**settings), silent).contents()  # type: ignore[arg-type]


def test_a_row_per_shape_from_medians_after_a_warm_up() -> None:
    runtime, seen = Scripted(5, 5, 2, 3, 4, 3, 3, 3), []
    settings = Speed(prompt=20, generate=11, batch=[2], repeats=3)
    found = shapes.measure(runtime, settings, lambda done, total, note: seen.append((done, total))).contents()  # type: ignore[arg-type]
    assert runtime.shapes == [(2, 20, 8), (2, 20, 8), *[(2, 20, 11)] * 6]
    (row,) = found["speed"]
    assert row["prefill_tok_s"] == pytest.approx(2 * 20 / 0.010)
    assert row["decode_tok_s"] == pytest.approx(2 / 0.003) and row["repeats"] == 6
    assert row["spread"] == pytest.approx((1 / 2 - 1 / 4) * 3)
    assert row["ttft_ms"] == pytest.approx({"p50": 10, "p95": 10, "p99": 10})
    assert row["token_ms"]["p50"] == pytest.approx(3)
    assert found["memory"]["peak_rss_bytes"] > 1e6
    assert "differ by 75%" in found["warnings"][0]
    assert (seen[0], seen[-1]) == ((0, 6), (6, 6))
    rows = [(row["prompt"], row["batch"]) for row in measured(Scripted(), prompt=[4, 8], batch=[1, 2])["speed"]]
    assert rows == [(4, 1), (4, 2), (8, 1), (8, 2)]


def test_it_warms_up_until_the_speed_stays_and_repeats_until_the_error_is_small() -> None:
    runtime = Scripted(9, 6, 4, 4)  # the fourth run is as fast as the third
    row = measured(runtime, prompt=2, generate=11, repeats=6)["speed"][0]
    assert [steps for *_, steps in runtime.shapes] == [8] * 4 + [11] * 6
    assert (row["repeats"], row["spread"], row["error"], row["drift"]) == (6, 0, 0, 0)
    restless = Scripted(1, 1, *[1, 2] * 9)
    assert measured(restless, prompt=2, generate=11, repeats=6)["speed"][0]["repeats"] == 12
    never_warm = Scripted(*range(1, 40))
    measured(never_warm, prompt=2, generate=11, repeats=2)
    assert [steps for *_, steps in never_warm.shapes][:6] == [8] * 5 + [11]


def test_a_machine_that_slows_down_is_reported() -> None:
    found = measured(Scripted(1, 1, *(1 + 0.05 * n for n in range(12))), prompt=2, generate=11, repeats=6)
    assert found["speed"][0]["drift"] < -0.2
    assert any("fell by" in text and "drifts" in text for text in found["warnings"])


class Phases(Scripted):
    """A runtime that reads a prompt and writes a token in so many milliseconds."""

    def __init__(self, dtype: str, prefill: float, decode: float) -> None:
        super().__init__()
        self.dtype, self._times = dtype, (prefill / 1000, decode / 1000)
        self.closed, self.name, self.detail = False, "torch", ""

    def generate(self, prompt: Ids, steps: int) -> Timings:
        self.shapes.append((*prompt.shape, steps))
        return Timings(self._times[0], [self._times[1]] * (steps - 1))

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("wide", "decode", "prefill", "memory"),
    [
        ((10, 8), ("bfloat16", 5), ("float32", 10), "bfloat16"),  # as on a processor with AVX2 alone
        ((10, 4), ("float32", 4), ("float32", 10), "float32"),
        ((90, 8), ("bfloat16", 5), ("bfloat16", 50), "bfloat16"),
    ],
)
def test_each_phase_is_told_in_the_better_of_two_arithmetics(
    wide: tuple[float, float], decode: tuple[str, float], prefill: tuple[str, float], memory: str
) -> None:
    opened = {"bfloat16": Phases("bfloat16", 50, 5), "float32": Phases("float32", *wide)}

    def open_in(dtype: str) -> Phases:
        assert all(each.closed for each in opened.values() if each.shapes)  # no peak of both
        return opened[dtype]

    settings = Speed(prompt=[20, 40], generate=11, repeats=3)
    found, used = shapes.measure_better(open_in, ("bfloat16", "float32"), settings, silent)  # type: ignore[arg-type]
    for row, length in zip(found.contents()["speed"], (20, 40), strict=True):
        assert (row["dtype"], row["decode_tok_s"]) == (decode[0], pytest.approx(1000 / decode[1]))
        assert row.get("prefill_dtype", "bfloat16") == prefill[0]
        assert row["prefill_tok_s"] == pytest.approx(1000 * length / prefill[1])
        assert row["ttft_ms"]["p50"] == pytest.approx(prefill[1])
    assert found.memory.dtype == used.dtype == memory
    assert all(each.closed for each in opened.values())


def counters(root: Path, energy: int) -> Counters:
    for name in ("intel-rapl:0", "intel-rapl:0:0"):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "energy_uj").write_text(str(energy))
        (root / name / "max_energy_range_uj").write_text("9999999")
    return Counters(root)


def test_energy_of_the_packages_without_their_parts(tmp_path: Path) -> None:
    found = counters(tmp_path, 5_000_000)
    assert found.read() == [5_000_000]
    assert found.joules([5_000_000], [7_000_000]) == 2
    assert found.joules([9_000_000], [1_000_000]) == 2  # the counter went round


def test_energy_is_null_with_a_reason_where_there_is_nothing_to_read(tmp_path: Path) -> None:
    found = shapes.energy(Scripted(), Speed(), Counters(tmp_path))  # type: ignore[arg-type]
    assert found.joules_per_token is None
    assert "no RAPL" in str(found.note)
    counters(tmp_path, 1)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert "cannot be read" in Counters(tmp_path).note


def test_energy_per_token_is_measured_with_a_prompt_of_one_token(tmp_path: Path) -> None:
    runtime, found = Scripted(), counters(tmp_path, 0)
    readings = iter([[0], [3_000_000]])
    found.read = lambda: next(readings)  # type: ignore[method-assign]
    energy = shapes.energy(runtime, Speed(generate=10, batch=[3]), found)  # type: ignore[arg-type]
    assert energy.joules_per_token == pytest.approx(0.1)
    assert runtime.shapes == [(3, 1, 10)]


def test_speed_of_a_model_directory(tiny: Tiny, tmp_path: Path) -> None:
    config = {"prompt": 5, "generate": 3, "batch": [1, 2], "repeats": 2}
    found = measure(payload("speed", config, tiny(), tmp_path), silent)
    assert [row["batch"] for row in found["speed"]] == [1, 2]
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert not (tmp_path / "values.safetensors").exists()


def test_without_units_for_bfloat16_a_model_directory_is_measured_in_both_arithmetics(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lighten.model.stream.fast_bfloat16", lambda: False)
    opened = []

    def noted(*args: Any, **more: Any) -> Runtime:
        opened.append(more["dtype"])
        return for_speed(*args, **more)

    monkeypatch.setattr(work, "for_speed", noted)
    config = {"prompt": 5, "generate": 3, "repeats": 2}
    found = measure(payload("speed", config, tiny(), tmp_path), silent)
    assert opened == ["bfloat16", "float32"]
    assert found["speed"][0]["dtype"] == found["memory"]["dtype"] == found["dtype"]


def test_speed_of_a_gguf_loads_no_torch(tiny_gguf: Path, tmp_path: Path) -> None:
    config = {"prompt": 5, "generate": 3, "repeats": 2}
    asked = json.dumps(payload("speed", config, tiny_gguf, tmp_path))
    script = (
        "import sys, json; from lighten.evaluate.run import measure\n"
        f"measure(json.loads({asked!r}), lambda *progress: None)\n"
        "print(sorted({'torch', 'transformers', 'gguf', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr.strip() == ""


def test_the_fingerprint_is_json_and_names_what_matters() -> None:
    found = json.loads(json.dumps(fingerprint()))
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 1e8
    assert found["packages"]["torch"].startswith("2.")
    assert isinstance(found["flags"], list)
    assert isinstance(found["gpus"], list)


def test_a_gpu_without_a_driver_or_its_library_has_no_energy_and_says_why() -> None:
    found = counters_of("cuda:7")
    if not found:
        assert "nvidia-ml-py" in found.note or "NVML" in found.note
    assert isinstance(counters_of("cpu"), Counters)
    energy = shapes.energy(Scripted(), Speed(), GpuCounters("cuda:4096"))  # type: ignore[arg-type]
    assert energy.joules_per_token is None and energy.note
