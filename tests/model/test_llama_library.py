import ctypes
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lighten.errors import Failure, RequestError
from lighten.export.gguf import write as export
from lighten.model import llama_library
from lighten.model.llama_library import CHOICE, DECLARED, PACKAGES, SOURCE, WHEEL, Installed, installed, load

Tiny = Callable[..., Path]
BOTH = all(llama_library._find(package) for package in PACKAGES)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Pretends that these packages are installed."""

    def install(*packages: str, flags: str = "sse2 avx2 fma bmi2 f16c", library: str = "", number: str = "") -> None:
        monkeypatch.delenv(CHOICE, raising=False)
        monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
        monkeypatch.setattr(llama_library, "processor_flags", lambda: frozenset(flags.split()))
        found = {package: Installed(package, number or DECLARED, tmp_path / package) for package in packages}
        monkeypatch.setattr(llama_library, "_find", found.get)
        for package in packages:
            (tmp_path / package / "lib").mkdir(parents=True)
        if library:
            (tmp_path / SOURCE / "lib" / library).touch()

    return install


def chosen() -> str | None:
    found = installed()
    return found.package if found else None


def test_the_wheel_comes_first(there: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    there(WHEEL, SOURCE)
    assert chosen() == WHEEL
    monkeypatch.setenv(CHOICE, SOURCE)
    assert chosen() == SOURCE


def test_what_was_compiled_for_a_gpu_comes_before_it(there: Callable[..., None]) -> None:
    there(WHEEL, SOURCE, library="libggml-cuda.so")
    assert chosen() == SOURCE


def test_what_another_package_loaded_into_this_process_comes_before_it(
    there: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    there(WHEEL, SOURCE)
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    assert chosen() == WHEEL, "a stand-in loads nothing"
    loaded = ModuleType("llama_cpp")
    loaded.__file__ = "llama_cpp/__init__.py"
    monkeypatch.setitem(sys.modules, "llama_cpp", loaded)
    assert chosen() == SOURCE


def test_a_processor_without_avx2_takes_what_was_compiled_for_it(there: Callable[..., None]) -> None:
    there(WHEEL, SOURCE, flags="sse2 avx")
    assert chosen() == SOURCE


def test_a_processor_that_is_no_x86_runs_the_wheel(there: Callable[..., None]) -> None:
    there(WHEEL, SOURCE, flags="asimd")
    assert chosen() == WHEEL


@pytest.mark.parametrize(
    ("packages", "flags", "message"),
    [
        ((), "sse2 avx2 fma bmi2 f16c", r"pip install 'lighten\[gguf\]'"),
        ((WHEEL,), "sse2 avx bmi2 f16c", "processor with avx2, fma: .* pip install llama-cpp-python"),
    ],
)
def test_nothing_that_runs_here(there: Callable[..., None], packages: Any, flags: str, message: str) -> None:
    there(*packages, flags=flags)
    with pytest.raises(RequestError, match=f"^reading it needs .*{message}"):
        load("reading it")


def test_a_version_with_other_structures_is_refused(there: Callable[..., None]) -> None:
    there(WHEEL, number="0.3.0")
    with pytest.raises(RequestError, match=f"{WHEEL} 0.3.0 is not known: pip install '{WHEEL}=={DECLARED}'"):
        load("reading it")


def test_a_part_that_is_missing_is_named(there: Callable[..., None]) -> None:
    there(WHEEL)
    with pytest.raises(Failure, match=r"has no libggml-base in .*: install it again"):
        load("reading it")


@pytest.mark.parametrize("named", [SOURCE, "llama"])
def test_a_choice_that_is_not_there(there: Callable[..., None], monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    there(WHEEL)
    monkeypatch.setenv(CHOICE, named)
    with pytest.raises(RequestError, match=f"{CHOICE} is {named}, "):
        installed()


def test_no_weights_are_repacked_for_amx_by_what_was_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_library, "processor_flags", lambda: frozenset({"avx2", "amx_int8"}))
    found = {package: Installed(package, DECLARED, Path()) for package in PACKAGES}
    told = {name: llama_library.Library(each, None, ctypes.CDLL(None), None).repacks for name, each in found.items()}
    assert told == {WHEEL: True, SOURCE: False}


def test_structures_are_those_of_llama_h() -> None:
    """Defaults that llama.h gives, read through every part of the structures that is used."""
    api = load("a test").api
    model, context, quantize = (
        getattr(api, f"llama_{name}_default_params")() for name in ("model", "context", "model_quantize")
    )
    assert model.n_gpu_layers == -1
    assert not model.vocab_only and not model.check_tensors and model.use_extra_bufts
    assert (context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max) == (512, 2048, 512, 1)
    assert (context.type_k, context.type_v, bool(context.cb_eval)) == (1, 1, False)
    assert context.offload_kqv and context.op_offload and not context.embeddings and not context.kv_unified
    assert (context.n_samplers, quantize.nthread, bool(quantize.imatrix)) == (0, 0, False)
    assert quantize.quantize_output_tensor and not quantize.only_copy


SCRIPT = """
import hashlib, json, sys
from pathlib import Path
import numpy as np
from lighten.evaluate.runtimes.llama_cpp import GgufTokenizer, LlamaCppRuntime
from lighten.export import ggml, gguf_quantize

file, folder, types = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
runtime = LlamaCppRuntime(file, "cpu", float32_cache=True)
np.save(folder / "logits.npy", runtime.logits(np.arange(40)))
told = {"detail": runtime.detail, "ids": GgufTokenizer(file).encode("the cat sat")}
random = np.random.default_rng(0)
weights, one = random.standard_normal((8, 256), dtype=np.float32), np.ones(256, np.float32)
told["rows"] = hashlib.sha256(ggml.quantize(weights, "Q4_K", one).tobytes()).hexdigest()
imatrix = {f"blk.0.{name}.weight": np.arange(1.0, 257.0, dtype=np.float32) for name in ("attn_q", "ffn_up")}
for type in types:
    out = folder / f"{type}.gguf"
    gguf_quantize.quantize(file, out, type, imatrix)
    told[type] = hashlib.sha256(out.read_bytes()).hexdigest()
print(json.dumps(told))
"""


@pytest.mark.skipif(not BOTH, reason="both packages that bring llama.cpp are needed")
def test_both_packages_give_the_same(tiny: Tiny, tmp_path: Path) -> None:
    export.write(tiny("llama"), tmp_path / "m.gguf", "F32")
    told, logits = {}, {}
    for package in PACKAGES:
        folder = tmp_path / package
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "m.gguf"), str(folder), "Q8_0", "Q4_K_M", "IQ3_S"],
            capture_output=True,
            text=True,
            env={**os.environ, CHOICE: package},
        )
        assert done.returncode == 0, done.stderr
        told[package], logits[package] = json.loads(done.stdout), np.load(folder / "logits.npy")
        assert told[package].pop("detail").startswith(f"{package} ")
    assert told[WHEEL] == told[SOURCE]
    np.testing.assert_allclose(logits[WHEEL], logits[SOURCE], atol=5e-3)


def test_gptqmodel_does_not_load_a_second_llama_cpp_beside_the_wheel(
    there: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    there(SOURCE)
    llama_library.keep_apart()
    assert "llama_cpp" not in sys.modules
    there(WHEEL)
    llama_library.keep_apart()
    with pytest.raises(ImportError):
        importlib.import_module("llama_cpp")
    monkeypatch.delitem(sys.modules, "llama_cpp")
