"""Which arithmetic is quick is measured, and what does without units for bfloat16 multiplies nothing in it."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lighten.compress.calibrate.sensitivity import Sensitivities
from lighten.compress.calibrate.sweep import Sweep
from lighten.compress.distill.settings import Distill
from lighten.evaluate.runtimes.choose import open_runtime
from lighten.model import products, stream
from lighten.pipeline.steps import open_step
from lighten.step import Context
from lighten.store.artifact import Artifact

SHORT = {"samples": 4, "length": 32}


class Products(TorchDispatchMode):
    """Counts the products of matrices by the type that they multiply in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        matrices = [each for each in args if isinstance(each, torch.Tensor) and each.dim() >= 2]
        if len(matrices) >= 2 and any(name in str(func) for name in ("mm", "linear", "attention", "convolution")):
            self.seen[matrices[-1].dtype] = self.seen.get(matrices[-1].dtype, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor whose products in bfloat16 are slow."""
    products.fast_bfloat16.cache_clear()
    monkeypatch.setattr(products, "_seconds", lambda dtypes: {torch.bfloat16: 1.0, torch.float32: 0.2})
    yield
    products.fast_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("units", "bfloat16", "expected"), [(True, 0.1, True), (True, 0.3, False), (False, 0.1, False)]
)
def test_units_alone_do_not_make_it_fast(
    monkeypatch: pytest.MonkeyPatch, units: bool, bfloat16: float, expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": units})
    monkeypatch.setattr(products, "_seconds", lambda dtypes: {torch.bfloat16: bfloat16, torch.float32: 0.2})
    products.fast_bfloat16.cache_clear()
    assert products.fast_bfloat16() == expected
    assert stream.fast_dtype("cpu") == (torch.bfloat16 if expected else torch.float32)
    assert stream.fast_dtype("cuda") == torch.bfloat16
    products.fast_bfloat16.cache_clear()


def test_a_library_that_is_told_to_do_without_the_units_is_found_out() -> None:
    """oneDNN takes its own view of the processor: what the processor says would choose the slow arithmetic."""
    script = "from lighten.model.stream import fast_dtype; print(fast_dtype('cpu'))"
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.float32"


@pytest.mark.usefixtures("slow")
def test_nothing_multiplies_bfloat16_where_that_is_slow(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Sweep, sensitivity, GPTQ, AWQ, a teacher and its student, and the measuring of quality."""
    model = tiny("llama", dtype=torch.bfloat16)
    source = Artifact(model, {"format": "hf"})

    def folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    with Products() as seen:
        facts = Sweep(**SHORT).run(source, folder("grams"), Context())
        Sensitivities(**SHORT).run(source, folder("sensitivity"), Context())
        for method in ("gptq", "awq"):
            step = open_step("quantize", {"method": method, "group_size": 64})
            step.run(source, folder(method), Context(grams=tmp_path / "grams"))
        step = Distill.model_validate({"length": 32, "samples": 12, "batch": 2, "steps": 2, "top_k": 10})
        lessons = step.lessons()
        assert lessons
        lessons.run(source, folder("lessons"), Context())
        more = {"teacher": model, "lessons": tmp_path / "lessons", "scratch": folder("scratch")}
        taught = step.run(source, folder("taught"), Context(**more))
        open_runtime(model).logits(np.arange(1, 9))
    assert facts["arithmetic"] == "float32"
    assert taught["precision"] == "float32"
    assert set(seen.seen) == {torch.float32} and seen.seen[torch.float32] > 100


def test_the_switch_is_thrown_back_when_the_last_thread_leaves() -> None:
    """One thread enters, another enters and leaves: the first still computes as it began, and nothing stays behind."""
    switch = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = switch.fp32_precision
    entered, leave, seen = threading.Event(), threading.Event(), []

    def first() -> None:
        with products.exact_products(torch.bfloat16):
            entered.set()
            leave.wait()
            seen.append(switch.fp32_precision)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait()
    with products.exact_products(torch.bfloat16):
        leave.set()
        thread.join()
        assert switch.fp32_precision == seen[0] == "bf16"
    assert switch.fp32_precision == before
