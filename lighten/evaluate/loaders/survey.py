"""Where an artifact loads: each loader opens it in a process of its own and computes the logits of a few ids."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lighten.errors import Failure, LightenError, RequestError
from lighten.model import llama_library
from lighten.model.files import check_links
from lighten.model.gguf_source import check_header, is_gguf, within
from lighten.model.onnx_source import GENAI, genai, read_graph
from lighten.process.isolate import run_isolated
from lighten.step import Report, silent
from lighten.store.store import MANIFEST, read_artifact

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IDS = 8
"""Tokens that every loader is given."""
LONGEST = 400
"""Characters of an error that are kept."""


@dataclass(frozen=True)
class Opening:
    """What a loader is to open: a model directory or a .gguf file, and the vocabulary its logits should have."""

    path: Path
    device: str = "cpu"
    vocab: int | None = None
    trust_remote_code: bool = False

    def ids(self) -> NDArray[np.int64]:
        """Returns a few ids `[n]` from all over the vocabulary."""
        import numpy as np

        return np.arange(1, IDS + 1) * ((self.vocab or 10 * IDS) // (IDS + 2))


class Answer(NamedTuple):
    """What a model computed; if it is a language model, logits `[…, vocab]`."""

    values: NDArray[Any]
    language: bool = True


@dataclass(frozen=True)
class Loader:
    """A program that opens models, and what it opens."""

    name: str
    packages: tuple[str, ...]
    """The names that pip may know it by."""
    formats: dict[str, tuple[str, ...]]
    """Formats it has business with; for each the modules that must be there."""
    ask: Callable[[Opening], Answer]
    """Opens a model and computes."""
    file: str | None = None
    """A file without which it has no business with an artifact."""
    told: Callable[[], str | None] | None = None
    """Returns what takes the place of the version, where more than one package may bring it."""

    @property
    def version(self) -> str | None:
        """The version that is installed, None if it is not."""
        if self.told:
            return self.told()
        return next((found for package in self.packages if (found := _version(package))), None)

    def opens(self, form: str, path: Path) -> bool:
        """Returns whether a loader has any business with a format, or the artifact with it."""
        return form in self.formats and (self.file is None or (path / self.file).is_file())

    def missing(self, form: str) -> str | None:
        """Returns the first module that it would need for a format and that is not installed."""
        return next((module for module in self.formats[form] if find_spec(module) is None), None)


EXTRAS = {
    "gptqmodel": "gptq",
    "optimum": "gptq",
    "gguf": "gguf",
    **dict.fromkeys(llama_library.MODULES.values(), "gguf"),
    "bitsandbytes": "bnb",
    "accelerate": "bnb",
    "compressed_tensors": "compressed",
    "onnxruntime": "onnx",
    "onnxruntime_genai": "onnx",
}
"""The extra that brings each module."""


def _extra(module: str) -> str:
    return f"lighten[{EXTRAS[module]}]" if module in EXTRAS else module


def versions() -> dict[str, str | None]:
    """Returns the installed version of every loader, None where there is none."""
    return {loader.name: loader.version for loader in LOADERS}


def packages() -> dict[str, str]:
    """Returns the versions of all packages that bear on whether something loads."""
    names = [*(name for loader in LOADERS for name in loader.packages), "torch", "optimum", "accelerate", "gguf"]
    return {name: found for name in names if (found := _version(name))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def recognise(path: Path) -> tuple[Path, str, int | None]:
    """Returns what an artifact or a model is to a loader: the path to open, its format, its vocabulary if that is told.

    Raises:
        RequestError: nothing there that any loader would open.
    """
    from lighten.model.checkpoint import Checkpoint, read_config

    if path.is_file():
        if not is_gguf(path):
            raise RequestError(f"{path} is no .gguf file: give one, or the directory of a model")
        return path, "gguf", None
    if not path.is_dir():
        raise RequestError(f"{path}: no such file or directory")
    check_links(path)
    told = read_artifact(path).format if (path / MANIFEST).is_file() else None
    vocab = read_config(path).get("vocab_size") if (path / "config.json").is_file() else None
    if told == "onnx" or (path / "model.onnx").is_file():
        return path, "onnx", vocab or genai(path).get("vocab_size")
    if gguf := within(path):
        return gguf, "gguf", None
    checkpoint = Checkpoint(path)
    checkpoint.weight_map  # noqa: B018  refuses pickles
    return path, told or str((checkpoint.quantization or {}).get("quant_method", "hf")), vocab


@dataclass(frozen=True)
class Survey:
    """What every loader said, as results.json has it, and the largest peak memory of their processes."""

    loads: list[dict[str, Any]]
    peak_rss_bytes: int


def survey(
    path: Path,
    *,
    vocab: int | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    report: Report = silent,
) -> Survey:
    """Opens an artifact with every loader.

    Args:
        path: an artifact, a model directory or a .gguf file.
        vocab: size of the vocabulary that its logits should have; what its config says if left out.
        device: "cpu" or "cuda".
        trust_remote_code: whether code that lies beside the weights may run; only if the person asked for it.
        report: told about every loader.

    Raises:
        RequestError: nothing there that any loader would open.
    """
    there, form, own = recognise(path)
    asked = {
        "path": str(there),
        "device": device,
        "vocab": vocab or own,
        "trust_remote_code": trust_remote_code,
    }
    loads, peak = [], 0
    for number, loader in enumerate(LOADERS):
        report(number, len(LOADERS), loader.name)
        found: dict[str, Any] = {"loader": loader.name, "version": loader.version, "seconds": None, "error": None}
        if not loader.opens(form, there):
            found["status"] = "other"
        elif missing := loader.missing(form):
            found |= {"status": "absent", "error": f"needs {missing}: pip install '{_extra(missing)}'"}
        else:
            try:
                outcome = run_isolated("lighten.evaluate.loaders.survey:load", {**asked, "loader": loader.name})
                found |= outcome.value
                peak = max(peak, outcome.peak_rss_bytes)
            except LightenError as error:
                found |= {"status": "failed", "error": _first_line(error)}
        loads.append(found)
    report(len(LOADERS), len(LOADERS), "")
    return Survey(loads, peak)


def load(payload: dict[str, Any], report: Report) -> dict[str, Any]:
    """Opens a model with one loader; returns `{status, seconds, error}`. The target of `run_isolated`."""
    import numpy as np

    loader = next(each for each in LOADERS if each.name == payload["loader"])
    opening = Opening(Path(payload["path"]), payload["device"], payload["vocab"], payload["trust_remote_code"])
    start = time.monotonic()
    try:
        values, language = loader.ask(opening)
        if not values.size or not np.isfinite(values.astype(np.float32)).all():
            raise Failure("it opens, but what it computes is not finite")
        if language and opening.vocab and values.shape[-1] != opening.vocab:
            raise Failure(f"it opens, but gives logits of {values.shape[-1]:,} tokens instead of {opening.vocab:,}")
    except Exception as error:
        return {"status": "failed", "seconds": time.monotonic() - start, "error": _first_line(error)}
    return {"status": "ok", "seconds": time.monotonic() - start}


def _first_line(error: Exception) -> str:
    """Returns the first line of an error, with its type where it is not one of ours."""
    text = str(error).removeprefix("lighten.evaluate.loaders.survey:load ")
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    line = line.removesuffix(" The end of what it printed:")
    if not isinstance(error, LightenError):
        line = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def _transformers(opening: Opening) -> Answer:
    if not is_gguf(opening.path):
        return _as_served(opening) if _causal(opening.path) else _other_task(opening)
    import torch
    from transformers import AutoModelForCausalLM

    check_header(opening.path)
    model = AutoModelForCausalLM.from_pretrained(
        opening.path.parent, gguf_file=opening.path.name, dtype=torch.bfloat16, local_files_only=True
    )
    return _forward(model.eval().to(opening.device), opening)


def _gptqmodel(opening: Opening) -> Answer:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "3")  # with fewer it fails on a machine of two cores
    llama_library.keep_apart()
    from gptqmodel import GPTQModel

    from lighten.model.loading import readable

    with readable(opening.path) as folder:
        found = GPTQModel.load(str(folder), device=opening.device, trust_remote_code=opening.trust_remote_code)
    return _forward(found.model, opening)


def _bitsandbytes(opening: Opening) -> Answer:
    return _as_served(opening, lambda module: type(module).__module__.partition(".")[0] == "bitsandbytes")


def _compressed_tensors(opening: Opening) -> Answer:
    return _as_served(opening, lambda module: getattr(module, "quantization_scheme", None) is not None)


def _as_served(opening: Opening, own: Callable[[Any], bool] | None = None) -> Answer:
    """Returns the logits by transformers; `own` tells the layers that a package should have brought into the model."""
    from lighten.evaluate.runtimes.torch import TorchRuntime
    from lighten.model.stream import fast_dtype

    dtype = str(fast_dtype(opening.device)).removeprefix("torch.")
    runtime = TorchRuntime(opening.path, opening.device, dtype, opening.trust_remote_code)
    if own and not any(map(own, runtime.model.modules())):
        raise Failure("transformers opens it, but none of its layers are this package's")
    return Answer(runtime.logits(opening.ids()))


def _causal(path: Path) -> bool:
    from lighten.model.checkpoint import read_config

    names = read_config(path).get("architectures") or ["CausalLM"]
    return str(names[0]).endswith(("CausalLM", "LMHeadModel"))


def _other_task(opening: Opening) -> Answer:
    """Asks an encoder, or an encoder with a decoder, by the class that its config names."""
    import torch
    import transformers

    from lighten.model.checkpoint import read_config
    from lighten.model.expected import class_named
    from lighten.model.loading import from_pretrained

    name = read_config(opening.path)["architectures"][0]
    config = transformers.AutoConfig.from_pretrained(opening.path, local_files_only=True)
    if (kind := class_named(name, config)) is None:
        raise Failure(f"transformers has no {name} of the kind {config.model_type}")
    model = from_pretrained(kind, opening.path)
    ids = torch.from_numpy(opening.ids()).to(opening.device)[None]
    asked = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    with torch.inference_mode():
        first = model.eval().to(opening.device)(**asked)[0]
    return Answer(first.float().cpu().numpy(), language=False)


def _forward(model: Any, opening: Opening) -> Answer:
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(opening.ids()).to(opening.device)[None]).logits
    return Answer(logits.float().cpu().numpy())


def _llama_cpp(opening: Opening) -> Answer:
    from lighten.evaluate.runtimes.llama_cpp import LlamaCppRuntime

    return Answer(LlamaCppRuntime(opening.path, opening.device).logits(opening.ids()))


def _onnxruntime(opening: Opening) -> Answer:
    import onnxruntime

    read_graph(opening.path / "model.onnx")
    offered = onnxruntime.get_available_providers()
    wanted = ["CPUExecutionProvider"] if opening.device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        opening.path / "model.onnx", options, providers=[name for name in wanted if name in offered]
    )
    head_size = int(genai(opening.path).get("decoder", {}).get("head_size", 0))
    feed = {each.name: _feed(each, opening.ids(), head_size) for each in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    found = session.run(["logits" if "logits" in names else names[0]], feed)[0]
    # what has no cache may be an encoder, whose logits are of something else than tokens
    return Answer(found, language="logits" in names and any("past" in name for name in feed))


_ONNX_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


def _feed(wanted: Any, ids: NDArray[np.int64], head_size: int) -> NDArray[Any]:
    """Returns what one input of a graph is given: the ids, what goes with them, or a cache that is empty.

    `head_size` is for graphs that do not tell the last dimension of their cache `[batch, heads, tokens, head size]`.
    """
    import numpy as np

    kind = _ONNX_TYPES.get(wanted.type)
    if kind is None:
        raise Failure(f"its input {wanted.name} is a {wanted.type}, which is not handed over from Python")
    if "past" in wanted.name:
        unknown = {0: 1, 3: head_size}
        shape = [size if isinstance(size, int) else unknown.get(at, 0) for at, size in enumerate(wanted.shape)]
        return np.zeros(shape, kind)
    if wanted.name.endswith("attention_mask"):
        return np.ones((1, len(ids)), kind)
    if "position_ids" in wanted.name:
        return np.arange(len(ids), dtype=kind)[None]
    if wanted.name.endswith("input_ids"):
        return ids.astype(kind)[None]
    return np.zeros((1, len(ids)), kind)


def _onnxruntime_genai(opening: Opening) -> Answer:
    import numpy as np
    import onnxruntime_genai

    genai(opening.path)  # nothing that loads code is left for the library to find
    for graph in sorted(opening.path.glob("*.onnx")):
        read_graph(graph)
    model = onnxruntime_genai.Model(str(opening.path))
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(max_length=2 * IDS, do_sample=False)
    generator = onnxruntime_genai.Generator(model, options)
    generator.append_tokens(opening.ids()[None].astype(np.int32))
    logits = np.asarray(generator.get_logits())
    generator.generate_next_token()
    return Answer(logits)


LOADERS = (
    Loader(
        "transformers",
        ("transformers",),
        {
            "hf": (),
            "gguf": ("gguf",),
            "gptq": ("gptqmodel", "optimum"),
            "awq": ("gptqmodel", "optimum"),
            "bitsandbytes": ("bitsandbytes", "accelerate"),
            "compressed-tensors": ("compressed_tensors",),
        },
        _transformers,
    ),
    Loader("GPTQModel", ("gptqmodel",), {"gptq": ("gptqmodel",), "awq": ("gptqmodel",)}, _gptqmodel),
    Loader(
        "llama.cpp",
        llama_library.PACKAGES,
        {"gguf": (llama_library.module(),)},
        _llama_cpp,
        told=lambda: str(llama_library.installed() or "") or None,
    ),
    Loader("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), {"onnx": ("onnxruntime",)}, _onnxruntime),
    Loader(
        "onnxruntime-genai",
        ("onnxruntime-genai", "onnxruntime-genai-cuda"),
        {"onnx": ("onnxruntime_genai",)},
        _onnxruntime_genai,
        file=GENAI,
    ),
    Loader("bitsandbytes", ("bitsandbytes",), {"bitsandbytes": ("bitsandbytes", "accelerate")}, _bitsandbytes),
    Loader(
        "compressed-tensors",
        ("compressed-tensors",),
        {"compressed-tensors": ("compressed_tensors",)},
        _compressed_tensors,
    ),
)
