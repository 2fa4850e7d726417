"""A GGUF file with everything that a device needs to run, serve and measure it, as a directory and an archive."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from lighten.data.text import SEPARATOR, builtin_text
from lighten.errors import Failure, RequestError, missing_extra
from lighten.export.bundle.targets import Target
from lighten.facts import ModelFacts
from lighten.process.isolate import environment, interpreter
from lighten.store.files import hash_file
from lighten.store.store import write_file

ARCHIVE = ".tar.zst"
SUMS = "SHA256SUMS"
MEASURED = ("README.md", "measured.json")
"""Files with what was measured where the bundle was made. They differ each time that it is made."""

SCRIPTS = ("python.sh", "run.sh", "serve.sh", "bench.sh", "bench.py", "chat.py", "model.service")
BATCH = 512
"""Number of tokens that llama.cpp computes together."""
DEPTH = 160
"""Number of tokens before the predicted one: those of bench.py's prompt, and half of those that it writes."""
PROCESS_BYTES = 100_000_000
"""Bytes of Python with llama-cpp-python and numpy, and of llama.cpp's own tables."""
TEXT_BYTES = 12_000

TRIED = {
    "diskcache": "5.6.3",
    "jinja2": "3.1.6",
    "llama-cpp-python": "0.3.36",
    "markupsafe": "3.0.4",
    "numpy": "2.2.6",
    "typing-extensions": "4.16.0",
}
"""Packages that the scripts need, in versions that were tried."""

SERVER = {
    "annotated-doc": "0.0.7",
    "annotated-types": "0.8.0",
    "anyio": "4.16.0",
    "click": "8.5.1",
    "fastapi": "0.165.0",
    "h11": "0.16.0",
    "idna": "3.20",
    "opentelemetry-api": "1.45.2",
    "pydantic": "2.14.3",
    "pydantic-core": "2.50.4",
    "pydantic-settings": "2.16.3",
    "python-dotenv": "1.2.4",
    "pyyaml": "6.0.3",
    "sse-starlette": "3.7.0",
    "starlette": "1.10.0",
    "starlette-context": "0.3.6",
    "typing-inspection": "0.4.5",
    "uvicorn": "0.54.0",
}
"""Further packages that llama-cpp-python's server needs, in versions that were tried."""


@dataclass(frozen=True)
class Need:
    """Bytes of memory that a model takes while it runs."""

    weights: int
    cache: int
    runtime: int

    @property
    def total(self) -> int:
        """Bytes of everything together."""
        return self.weights + self.cache + self.runtime


@dataclass(frozen=True)
class Model:
    """The facts in the headers of a GGUF model's files."""

    files: tuple[Path, ...]
    size_bytes: int
    params: int
    bits_per_weight: float
    trained_context: int
    cache_per_token: int
    """Bytes of keys and values (16 bits each) of one token."""
    read_per_token: int
    """Bytes of weights that decoding a token reads; one row of an embedding that is not the head."""
    runtime_bytes: int


def need_of(facts: ModelFacts, weights: int, context: int) -> Need:
    """Returns the memory that a model of these sizes takes, before its file exists."""
    return Need(weights, facts.cache_bytes(context), _runtime(facts.vocab, facts.hidden, facts.intermediate))


def _runtime(vocab: int, hidden: int, intermediate: int) -> int:
    return PROCESS_BYTES + 4 * BATCH * (vocab + 4 * hidden + 2 * intermediate)


def read_model(paths: Sequence[Path]) -> Model:
    """Returns the facts of a model; `paths` are its files, the first one with the metadata.

    Raises:
        Failure: a file is cut short or damaged.
    """
    from lighten.model.gguf_header import read_header
    from lighten.model.traffic import gguf_reads

    headers = [read_header(path) for path in paths]
    head = headers[0]
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    layers = head.integer("block_count")

    def each(key: str, default: int) -> list[int]:
        value = head.fields.get(f"{head.arch}.{key}", default)
        return [int(item) for item in value] if isinstance(value, list) else [int(value)] * layers

    heads = each("attention.head_count", 1)
    width = head.integer("embedding_length")
    size = width // max(heads)
    kv = zip(
        each("attention.head_count_kv", heads[0]),
        each("attention.key_length", size),
        each("attention.value_length", size),
        strict=False,
    )
    vocab = len(head.fields.get("tokenizer.ggml.tokens", ()))
    weights = 0
    for tensor in tensors.values():
        count = 1
        for extent in tensor.shape:
            count *= extent
        weights += count
    return Model(
        files=tuple(paths),
        size_bytes=sum(path.stat().st_size for path in paths),
        params=weights,
        bits_per_weight=round(8 * sum(tensor.size for tensor in tensors.values()) / weights, 4),
        trained_context=head.integer("context_length", 0),
        cache_per_token=sum(2 * count * (key + value) for count, key, value in kv),
        read_per_token=gguf_reads(paths),
        runtime_bytes=_runtime(vocab, width, max(each("feed_forward_length", 0))),
    )


def check_fit(need: Need, target: Target, context: int, chosen: str, others: Iterable[tuple[str, Need]] = ()) -> str:
    """Returns a sentence that says how the model fits.

    Args:
        need: memory that it takes.
        target: the device.
        context: tokens of context.
        chosen: the type of the weights.
        others: other types, and the memory that they would take.

    Raises:
        RequestError: it does not fit; the message names the largest type that would.
    """
    sentence = (
        f"{chosen} at a context of {context:,} tokens takes {_gb(need.total)} (weights {_gb(need.weights)}, cache of "
        f"keys and values {_gb(need.cache)}, runtime {_gb(need.runtime)}) of {_gb(target.free_bytes)} that the "
        f"{target.title} has beside its system"
    )
    if need.total <= target.free_bytes:
        return f"it fits: {sentence}"
    smaller = sorted(others, key=lambda other: -other[1].weights)
    fitting = next(((name, each) for name, each in smaller if each.total <= target.free_bytes), None)
    if fitting:
        advice = f"the largest type that would fit is {fitting[0]} ({_gb(fitting[1].total)})"
    else:
        least = f", not even {smaller[-1][0]} ({_gb(smaller[-1][1].total)})" if smaller else ""
        advice = f"no type would fit{least}: take a smaller context, model or a larger target"
    raise RequestError(f"it does not fit: {sentence}; {advice}")


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def pins() -> dict[str, str]:
    """Returns the installed versions of llama-cpp-python and of the packages that it needs.

    If it is not installed, they are the versions that bundles were tried with.
    """
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    waiting = ["llama-cpp-python"]
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            return dict(TRIED)
        for line in requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(needed.name)
    return dict(sorted(found.items()))


def write_bundle(
    out: Path, model: Model, target: Target, *, name: str, type: str, context: int, about: Mapping[str, str]
) -> dict[str, Any]:
    """Writes everything but the model, its checksums and what is measured into `out`; returns bundle.json."""
    facts = {
        "schema": 1,
        "name": name,
        "model": about.get("source") or about.get("name") or name,
        "licence": about.get("license"),
        "target": target.name,
        "architecture": target.architecture,
        "gpu": target.gpu,
        "file": model.files[0].name,
        "files": [file.name for file in model.files],
        "type": type,
        "context": context,
        "params": model.params,
        "size_bytes": model.size_bytes,
        "bits_per_weight": model.bits_per_weight,
        "read_bytes_per_token": read_bytes(model),
    }
    write_file(out / "bundle.json", (json.dumps(facts, indent=1) + "\n").encode())
    folder = f"bundle-{target.name}"
    layers = -1 if target.gpu else 0
    values = {"FILE": model.files[0].name, "NAME": name, "CONTEXT": context, "GPU_LAYERS": layers, "FOLDER": folder}
    for name_ in SCRIPTS:
        write_file(out / name_, script(name_, values))
        os.chmod(out / name_, 0o755 if name_.endswith(("run.sh", "serve.sh", "bench.sh")) else 0o644)
    text = builtin_text("perplexity").encode()[:TEXT_BYTES].decode(errors="ignore").replace(SEPARATOR, "\n\n")
    write_file(out / "perplexity.txt", text.encode())
    base = pins()
    built = "# llama-cpp-python is compiled where no wheel fits: that takes a C++ compiler"
    gpu = "\n# for the GPU, install with CMAKE_ARGS=-DGGML_CUDA=on in the environment" if target.gpu else ""
    write_file(out / "requirements.txt", requirements(f"# for {target.architecture}; {built[2:]}{gpu}", base))
    server = {**base, **{key: value for key, value in SERVER.items() if key not in base}}
    write_file(out / "requirements-server.txt", requirements("# the same with what the server needs", server))
    return facts


def script(name: str, values: Mapping[str, Any] | None = None) -> bytes:
    """Returns one of the scripts of a bundle, with `values` in place of its @NAMES@."""
    text = (files("lighten.export.bundle") / "edge" / name).read_text(encoding="utf-8")
    if not name.endswith(".py"):
        text = re.sub(r"@([A-Z_]+)@", lambda found: str((values or {})[found[1]]), text)
    return text.encode()


def requirements(note: str, pinned: Mapping[str, str]) -> bytes:
    """Returns a requirements.txt."""
    return ("\n".join([note, *(f"{name}=={number}" for name, number in sorted(pinned.items()))]) + "\n").encode()


def write_sums(out: Path) -> None:
    """Writes the checksums of all files except those that differ each time that a bundle is made."""
    names = [name for name in contents(out) if name not in (*MEASURED, SUMS)]
    write_file(out / SUMS, "".join(f"{hash_file(out / name)}  {name}\n" for name in names).encode())


def contents(out: Path) -> list[str]:
    """Returns the names of a bundle's files, sorted."""
    return sorted(
        path.name
        for path in out.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(ARCHIVE)
        and path.name != "artifact.json"
    )


def read_bytes(model: Model) -> int:
    """Returns the bytes that decoding one token reads: weights, and the keys and values of the tokens before it."""
    return model.read_per_token + DEPTH * model.cache_per_token


def measure(out: Path, target: Target, model: Model) -> dict[str, Any]:
    """Runs the bundle's own bench.py here for some ten seconds. Returns its results and the prediction.

    The prediction assumes that the target reaches the same share of its memory's bandwidth as this machine. The share
    is that of the median token, because a busy machine has outliers.

    Raises:
        Failure: it does not run here.
    """
    run = "import sys; from lighten.model.llama_library import run_script; from pathlib import Path; "
    run += "run_script(Path(sys.argv[1]), sys.argv[2:])"
    command = [*interpreter(), "-c", run, str(out / "bench.py"), "--events", "--seconds", "6", "--chunks", "2"]
    variables = {**environment(), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    last = done.stdout.strip().splitlines()[-1:]
    if done.returncode or not last:
        reason = done.stderr.strip().splitlines()[-1:] or ["it gave no reason"]
        raise Failure(f"the bundle does not run here: {reason[0]}")
    results: dict[str, Any] = json.loads(last[0])["results"]
    row = results["variants"][0]
    each = read_bytes(model)
    share = each / (row["speed"][0]["token_ms"]["p50"] / 1000) / row["facts"]["read_bandwidth"]
    return {
        "results": results,
        "prediction": {
            "target": target.name,
            "read_bytes_per_token": each,
            "ceiling_tok_s": target.bandwidth / each,
            "share_of_bandwidth_here": share,
            "decode_tok_s": target.bandwidth / each * min(share, 1.0),
        },
    }


def pack(out: Path, archive: Path, folder: str) -> None:
    """Writes the files of a bundle as a .tar.zst below `folder`: the same bytes for the same files.

    Raises:
        RequestError: zstandard is not installed.
    """
    try:
        import zstandard
    except ImportError as error:
        raise missing_extra("bundle", "zstandard", "the archive of a bundle") from error
    partial = archive.with_name(f".{archive.name}.partial")
    try:
        with (
            partial.open("wb") as file,
            zstandard.ZstdCompressor(level=3).stream_writer(file) as packed,
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
            for name in contents(out):
                member = tarfile.TarInfo(f"{folder}/{name}")
                member.size = (out / name).stat().st_size
                member.mode = 0o755 if name in ("run.sh", "serve.sh", "bench.sh") else 0o644
                with (out / name).open("rb") as content:
                    tar.addfile(member, content)
        os.replace(partial, archive)
    finally:
        partial.unlink(missing_ok=True)
