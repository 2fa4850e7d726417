"""The programs that open artifacts, and one forward pass with each."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lighten.errors import Failure
from lighten.evaluate.runtimes.choose import added
from lighten.evaluate.runtimes.opener import Conditions, Opener
from lighten.model import llama_library
from lighten.model.formats import FORMATS
from lighten.model.gguf_header import check_header, is_gguf
from lighten.model.onnx_source import GENAI, genai, read_graph

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


IDS = 8
"""Number of tokens that every loader gets."""


@dataclass(frozen=True)
class Opening:
    """What a loader opens: a model directory or a .gguf file, and the expected vocabulary of its logits."""

    path: Path
    device: str = "cpu"
    vocab: int | None = None
    trust_remote_code: bool = False

    def ids(self) -> NDArray[np.int64]:
        """Returns a few ids `[n]` from all over the vocabulary."""
        import numpy as np

        return np.arange(1, IDS + 1) * ((self.vocab or 10 * IDS) // (IDS + 2))


class Answer(NamedTuple):
    """The result of a model: logits `[…, vocab]` for a language model."""

    values: NDArray[Any]
    language: bool = True


@dataclass(frozen=True)
class Loader:
    """A program that opens models, and the formats that it opens."""

    name: str
    packages: tuple[str, ...]
    """Names that pip may know it by."""
    formats: dict[str, tuple[str, ...]]
    """Formats that it reads, and for each the modules that must be installed."""
    ask: Callable[[Opening], Answer]
    """Function that opens a model and computes."""
    file: str | None = None
    """Name of a file that an artifact must have for this loader."""
    package_and_version: Callable[[], str | None] | None = None
    """Function that returns what replaces the version, if more than one package may bring it."""

    @property
    def version(self) -> str | None:
        """Installed version; None if it is not installed."""
        if self.package_and_version:
            return self.package_and_version()
        return next((found for package in self.packages if (found := installed(package))), None)

    def opens(self, form: str, path: Path) -> bool:
        """Returns whether a loader reads a format, or the artifact with it."""
        return form in self.formats and (self.file is None or (path / self.file).is_file())

    def missing(self, form: str) -> str | None:
        """Returns the first module that it needs for a format and that is not installed."""
        return next((module for module in self.formats[form] if find_spec(module) is None), None)


def installed(package: str) -> str | None:
    """Returns the version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
    """Returns the logits by transformers; `own` recognises the layers that a package must have brought."""
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
    """Opens an encoder, or an encoder with a decoder, by the class that its config names."""
    import torch
    import transformers

    from lighten.model.checkpoint import read_config
    from lighten.model.loading import from_pretrained
    from lighten.model.weight_checks import class_named

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
    """Returns the value of one input of a graph: the ids, the tensors that go with them, or an empty cache.

    `head_size` is for graphs that do not give the last dimension of their cache `[batch, heads, tokens, head size]`.
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


def _stored(form: str) -> dict[str, tuple[str, ...]]:
    return {form: FORMATS[form].loaded_with}


LOADERS = (
    Loader(
        "transformers",
        ("transformers",),
        {
            "hf": (),
            "gguf": ("gguf",),
            **{name: each.loaded_with for name, each in FORMATS.items()},
        },
        _transformers,
    ),
    Loader("GPTQModel", ("gptqmodel",), {"gptq": ("gptqmodel",), "awq": ("gptqmodel",)}, _gptqmodel),
    Loader(
        "llama.cpp",
        llama_library.PACKAGES,
        {"gguf": (llama_library.module(),)},
        _llama_cpp,
        package_and_version=lambda: str(llama_library.installed() or "") or None,
    ),
    Loader("onnxruntime", ("onnxruntime", "onnxruntime-gpu"), {"onnx": ("onnxruntime",)}, _onnxruntime),
    Loader(
        "onnxruntime-genai",
        ("onnxruntime-genai", "onnxruntime-genai-cuda"),
        {"onnx": ("onnxruntime_genai",)},
        _onnxruntime_genai,
        file=GENAI,
    ),
    Loader("bitsandbytes", ("bitsandbytes",), _stored("bitsandbytes"), _bitsandbytes),
    Loader(
        "compressed-tensors",
        ("compressed-tensors",),
        _stored("compressed-tensors"),
        _compressed_tensors,
    ),
)


def loaders() -> list[Loader]:
    """Returns ours, and every runtime that was added: each is the loader of its own files."""
    return [*LOADERS, *map(_of_runtime, added())]


def _of_runtime(runtime: Opener[Any]) -> Loader:
    def ask(opening: Opening) -> Answer:
        opened = runtime.open(opening.path, Conditions(opening.device, trust_remote_code=opening.trust_remote_code))
        return Answer(opened.logits(opening.ids()))

    return Loader(runtime.name, runtime.packages, {runtime.name: runtime.modules}, ask)
