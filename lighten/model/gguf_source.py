"""A .gguf file as a source: what its header says, and the Hugging Face directory it becomes.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here, with
every read checked against the size of the file, so that a truncated download is named as such; tensors are
dequantized one at a time with the `gguf` package and never held together.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import runpy
import struct
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lighten.errors import Failure, RequestError, missing_extra, reading
from lighten.model import tokenizer_table
from lighten.model.tokenizer_files import DEFAULT
from lighten.step import ModelFacts, Report, silent

if TYPE_CHECKING:
    import torch

READS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""The GGUF architectures that can be read (Mistral models are stored as "llama"), and what they become."""

SHARD_BYTES = 2_000_000_000
MOST_VALUES, MOST_TEXT, MOST_AXES = 1 << 24, 1 << 26, 4
"""Values in all arrays of a header together, bytes of a text, and axes of a tensor (ggml's own limit): no model has
more, and what a header asks for is made in memory."""
ROPE_FREQS = "rope_freqs.weight"

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FIELD_BYTES, _TENSOR_BYTES = 13, 32
"""The least that a field and the entry of a tensor take."""
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: `shape` is `[out, in]` as in Hugging Face, `start` counts from the file's first byte."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    size: int
    file: Path | None = None
    """The part it lies in, for a file in parts."""


@dataclass(frozen=True)
class Header:
    """Metadata and tensor list of a GGUF file."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    fields_end: int = 0
    """Byte that follows the metadata, which begins at byte 24."""

    @property
    def arch(self) -> str:
        """The architecture's name, which is also the prefix of its keys."""
        return str(self.fields.get("general.architecture"))

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a number of the architecture, such as `attention.head_count`."""
        value = self.fields.get(f"{self.arch}.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if value is None:
            raise Failure(f"{self.path} has no {self.arch}.{key}: a damaged file; fetch it again")
        if isinstance(value, list) and value:
            raise RequestError(f"{self.path}: {key} differs from layer to layer, which lighten does not read")
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise Failure(f"{self.path}: {self.arch}.{key} is {str(value)[:40]!r}, no number: damaged; fetch it again")
        return float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        """Returns a whole number of the architecture."""
        return int(self.number(key, default))

    def size(self, key: str, default: int | None = None) -> int:
        """Returns a whole number of the architecture that counts something there must be."""
        found = self.integer(key, default)
        if not 0 < found < 1 << 31:
            raise Failure(f"{self.path}: {self.arch}.{key} is {found}: damaged; fetch it again")
        return found

    def count(self, key: str, default: int) -> int:
        """Returns a whole number that stands for the whole file, whatever its architecture."""
        found = self.fields.get(key, default)
        if not isinstance(found, int):
            raise Failure(f"{self.path}: {key} is {str(found)[:40]!r}, no number: damaged; fetch it again")
        return found


class _Cursor:
    """Reads the header; running past the end of the file is a Failure."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.values = path, data, 0, 0

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise Failure(
                f"{self.path} is cut short: its header needs bytes up to {end}, the file has {len(self.data)}; "
                "fetch it again"
            )
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def holds(self, count: int, size: int) -> None:
        """Refuses what many things, of at least `size` bytes each, could not be in the rest of the file."""
        if self.at + count * size > len(self.data):
            raise Failure(
                f"{self.path} is cut short: its header tells of {count:,} entries at byte {self.at:,}, "
                f"the file has {len(self.data)}; fetch it again"
            )

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        size = self.scalar("Q")
        if size > MOST_TEXT and self.at + size <= len(self.data):
            raise Failure(f"{self.path}: a text of {size:,} bytes in its header: damaged; fetch it again")
        return self.take(size).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise Failure(f"{self.path}: metadata of unknown type {kind} at byte {self.at}: damaged; fetch it again")
        item, count = self.scalar("I"), self.scalar("Q")
        if item not in _SCALARS and item != _STRING:
            raise Failure(f"{self.path}: an array of type {item} at byte {self.at}: damaged; fetch it again")
        size = struct.calcsize("<" + _SCALARS.get(item, "Q"))
        self.holds(count, size)
        self.values += count
        if self.values > MOST_VALUES:
            raise Failure(f"{self.path}: its header has arrays of {self.values:,} values: damaged; fetch it again")
        if item in _SCALARS:
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", self.take(count * size)))
        return [self.string() for _ in range(count)]


def _block_sizes() -> dict[int, tuple[int, int]]:
    """Returns weights and bytes of a block of every tensor type, by its number, as the package gguf lists them.

    Its file of constants is run alone: the package itself imports much that a measured process should not hold.
    """
    try:
        found = find_spec("gguf")
    except ValueError:  # what stands under its name is no package
        found = None
    if found is None or not found.submodule_search_locations:
        raise missing_extra("gguf", "gguf", "reading a .gguf file")
    return _sizes_in(Path(found.submodule_search_locations[0]) / "constants.py")


@cache
def _sizes_in(file: Path) -> dict[int, tuple[int, int]]:
    constants = runpy.run_path(str(file), run_name="gguf_constants")
    return {int(kind): sizes for kind, sizes in constants["GGML_QUANT_SIZES"].items()}


def read_header(path: Path) -> Header:
    """Reads the header of a GGUF file and checks that all its tensors lie within the file.

    Raises:
        RequestError: no such file, not GGUF, of a version, byte order or tensor type that cannot be read.
        Failure: the file is cut short or damaged.
    """
    sizes = _block_sizes()
    if not path.is_file():
        raise RequestError(f"{path}: no such file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise RequestError(f"{path} is not a GGUF file (it does not begin with GGUF)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(path, data, sizes)
            except (ValueError, TypeError, OverflowError, struct.error) as error:
                raise Failure(f"{path} has a damaged header ({error}); fetch it again") from error


def _parse(path: Path, data: mmap.mmap, sizes: dict[int, tuple[int, int]]) -> Header:
    cursor = _Cursor(path, data)
    cursor.take(4)
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise RequestError(f"{path} is GGUF version {version} or big-endian; lighten reads versions 2 and 3")
    tensor_count, field_count = cursor.scalar("Q"), cursor.scalar("Q")
    cursor.holds(field_count, _FIELD_BYTES)
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.string()
        if key in fields:
            raise Failure(f"{path} has {key[:80]!r} twice in its header: damaged; fetch it again")
        fields[key] = cursor.value(cursor.scalar("I"))
    fields_end = cursor.at
    cursor.holds(tensor_count, _TENSOR_BYTES)
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensor_count):
        name, rank = cursor.string(), cursor.scalar("I")
        if not 1 <= rank <= MOST_AXES or name in entries:
            what = "is there twice" if name in entries else f"has {rank} axes"
            raise Failure(f"{path}: tensor {name[:80]} {what}: damaged; fetch it again")
        shape = struct.unpack(f"<{rank}Q", cursor.take(8 * rank))
        entries[name] = (shape[::-1], cursor.scalar("I"), cursor.scalar("Q"))
    alignment = int(fields.get("general.alignment", 32))
    if alignment < 1 or alignment & (alignment - 1):
        raise Failure(f"{path} aligns its tensors by {alignment} bytes: damaged; fetch it again")
    return Header(
        path, fields, _lay_out(path, entries, cursor.at + -cursor.at % alignment, len(data), sizes), fields_end
    )


def _lay_out(
    path: Path,
    entries: dict[str, tuple[tuple[int, ...], int, int]],
    start: int,
    length: int,
    sizes: dict[int, tuple[int, int]],
) -> dict[str, Tensor]:
    """Returns tensors by name from shape, type and place after `start`; each lies in a file of `length` bytes."""
    tensors = {}
    for name, (shape, kind, offset) in entries.items():
        if kind not in sizes:
            raise RequestError(f"{path}: tensor {name} has type {kind}, which the installed gguf package does not know")
        block, block_bytes = sizes[kind]
        if 0 in shape or shape[-1] % block:
            raise Failure(f"{path}: tensor {name} has the impossible shape {list(shape)}: damaged; fetch it again")
        tensors[name] = Tensor(name, shape, kind, start + offset, math.prod(shape) // block * block_bytes)
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        if tensor.start + tensor.size > length:
            raise Failure(
                f"{path} is cut short: tensor {tensor.name} needs bytes up to {tensor.start + tensor.size}, "
                f"the file has {length}; fetch it again"
            )
    if sum(tensor.size for tensor in tensors.values()) > length:
        raise Failure(f"{path}: its tensors lie over each other: damaged; fetch it again")
    return tensors


def is_gguf(path: Path) -> bool:
    """Returns whether a path is a GGUF file, by its first bytes; one that is called so, and is another, is told later.

    Other tools keep such files under names without a suffix.
    """
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def check_header(path: Path) -> None:
    """Makes sure that llama.cpp, which trusts a file, is given one of any architecture that holds what it tells of.

    Raises:
        RequestError, Failure: as `read_header`, for any of its parts; or sizes that no such model can have.
    """
    headers = [read_header(part) for part in parts(path)]
    first, tensors = headers[0], sum(len(header.tensors) for header in headers)
    for key, least in (("block_count", 0), ("embedding_length", 1), ("attention.head_count", 0)):
        told = first.fields.get(f"{first.arch}.{key}", 1)
        numbers = told if isinstance(told, list) else [told]
        if not all(isinstance(each, int) and least <= each < 1 << 31 for each in numbers):
            raise Failure(f"{path}: {first.arch}.{key} is {str(told)[:40]}: damaged; fetch it again")
        if key == "block_count" and tensors and max(numbers, default=0) > tensors:
            raise Failure(f"{path} tells of {max(numbers):,} layers, but has {tensors} tensors: fetch it again")


def within(folder: Path) -> Path | None:
    """Returns the .gguf file that a directory without other weights holds, the first one of a model in parts.

    Raises:
        RequestError: it holds several models.
    """
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return None
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1 and len(parts(found[0])) != len(found):
        names = ", ".join(file.name for file in found)
        raise RequestError(f"{folder} holds {len(found)} .gguf files ({names}): name the one to take")
    return found[0] if found else None  # llama.cpp opens the other parts itself


def parts(path: Path) -> list[Path]:
    """Returns the files of a model in parts, by the first one's name, or just the file.

    Raises:
        RequestError: a part other than the first.
        Failure: a part is missing.
    """
    found = _PART.fullmatch(path.name)
    if not found:
        return [path]
    stem, number, count = found[1], int(found[2]), int(found[3])
    names = [path.with_name(f"{stem}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
    if number != 1:
        raise RequestError(f"{path} is part {number} of {count}: give the first one, {names[0].name}")
    if missing := [name.name for name in names if not name.is_file()]:
        raise Failure(f"{path} is one of {count} parts, and {missing[0]} is missing; fetch it")
    return names


def _joined(header: Header) -> Header:
    """Returns a header with the tensors of all parts."""
    count = header.count("split.count", 1)
    if count <= 1:
        return header
    files = parts(header.path)
    if len(files) != count:
        raise RequestError(
            f"{header.path} is one of {count} parts, and is not named like one (NAME-00001-of-{count:05d}.gguf)"
        )
    tensors = {name: replace(tensor, file=file) for file in files for name, tensor in read_header(file).tensors.items()}
    if len(tensors) != header.count("split.tensors.count", len(tensors)):
        raise Failure(f"{header.path}: the parts hold {len(tensors)} tensors, which is not what the first one says")
    return replace(header, tensors=tensors)


_NO_MODELS = {
    "adapter": "an adapter of {base}: merge it into that model, and give the model",
    "imatrix": "an importance matrix, and no model: lighten measures its own (imatrix: true)",
    "mmproj": "the projector of a model that sees: give the file of the language model",
}
"""What a file of such a type is."""


def _open_any(path: Path) -> Header:
    """Returns the header of a file that is a model, of whatever architecture.

    Raises:
        RequestError: no such file, not GGUF, or something else than a model.
        Failure: the file is cut short or damaged.
    """
    header = read_header(path)
    if header.count("split.no", 0):
        parts(path)
    kind = str(header.fields.get("general.type", "model"))
    kind = {"imatrix": "imatrix", "clip": "mmproj"}.get(header.arch, kind)
    if kind in _NO_MODELS:
        base = next(
            (header.fields[key] for key in _BASES if header.fields.get(key)), f"a model of the kind {header.arch}"
        )
        raise RequestError(f"{path} is {_NO_MODELS[kind].format(base=base)}")
    return _joined(header)


_BASES = ("general.base_model.0.repo_url", "general.base_model.0.name", "general.basename")
"""Where a file says what it was made for."""


def _open(path: Path) -> Header:
    header = _open_any(path)
    if header.arch not in READS:
        raise RequestError(
            f"{path} has architecture {header.arch!r}, which can be measured but not changed: lighten turns only "
            f"{' and '.join(READS)} files back into a model (Mistral models are called llama there); give the "
            "model that it was made from"
        )
    if header.integer("expert_count", 0):
        raise RequestError(f"{path} is a mixture of experts, which lighten does not read")
    if (layers := header.size("block_count")) > len(header.tensors):
        raise Failure(f"{path} tells of {layers:,} layers, but has {len(header.tensors)} tensors: fetch it again")
    if header.integer("rope.dimension_count", _head_dim(header)) != _head_dim(header):
        raise RequestError(f"{path} rotates only a part of each head, which lighten does not read")
    return header


def check(path: Path) -> ModelFacts:
    """Returns the sizes of the model in a file that can be a source; raises all that `convert` does before weights.

    Raises:
        RequestError: no such file, not GGUF, or an architecture, a tokenizer or tensors that cannot be expressed.
        Failure: the file is cut short or damaged.
    """
    header = _open(path)
    facts = _facts(header)
    tokenizer_table.tokenizer_json(header.fields)
    _config(header, facts)
    _names(header, facts)
    return facts


def inspect(path: Path) -> ModelFacts:
    """Returns the sizes of the model in a GGUF file that can be a source, from its header alone."""
    return _facts(_open(path))


def measurable(path: Path) -> ModelFacts:
    """Returns the sizes of the model in a GGUF file of any architecture, as far as its header tells them.

    Raises:
        RequestError: no such file, not GGUF, or something else than a model.
        Failure: the file is cut short or damaged.
    """
    header = _open_any(path)
    counted = sum(math.prod(tensor.shape) for tensor in header.tensors.values())
    if not counted:
        raise RequestError(f"{path} has no weights, only a vocabulary: give a model")
    heads = max(1, _largest(header, "attention.head_count"))
    hidden = _largest(header, "embedding_length")
    embedding = header.tensors.get("token_embd.weight")
    return ModelFacts(
        architecture=READS.get(header.arch, header.arch),
        layers=_largest(header, "block_count"),
        hidden=hidden,
        intermediate=_largest(header, "feed_forward_length"),
        heads=heads,
        kv_heads=_largest(header, "attention.head_count_kv") or heads,
        head_dim=_largest(header, "attention.key_length") or hidden // heads,
        vocab=embedding.shape[0] if embedding else len(header.fields.get("tokenizer.ggml.tokens") or []),
        tied="output.weight" not in header.tensors,
        family=_family(header),
        counted=counted - (math.prod(header.tensors[ROPE_FREQS].shape) if ROPE_FREQS in header.tensors else 0),
        context=_largest(header, "context_length") or None,
    )


def doubts(path: Path) -> list[str]:
    """Returns what the person should know of a file before believing in what llama.cpp computes with it."""
    fields = read_header(path).fields
    if fields.get("tokenizer.ggml.model") == "gpt2" and not fields.get("tokenizer.ggml.pre"):
        return [
            "the file does not name its pre-tokenizer (tokenizer.ggml.pre), so llama.cpp takes a default that may "
            "split text otherwise than the model learned it: export the model again"
        ]
    return []


def _largest(header: Header, key: str) -> int:
    """Returns a whole number of the architecture, the largest where it differs by layer; 0 if the file has none."""
    value = header.fields.get(f"{header.arch}.{key}", 0)
    numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, (int, float))]
    return int(max(numbers, default=0))


def _family(header: Header) -> Literal["causal", "encoder", "seq2seq"]:
    if header.arch == "t5":
        return "seq2seq"
    return "encoder" if header.fields.get(f"{header.arch}.attention.causal") is False else "causal"


def _head_dim(header: Header) -> int:
    return header.size("attention.key_length", header.size("embedding_length") // header.size("attention.head_count"))


def _facts(header: Header) -> ModelFacts:
    if "token_embd.weight" not in header.tensors:
        raise Failure(f"{header.path} has no tensor token_embd.weight: a damaged file; fetch it again")
    heads = header.size("attention.head_count")
    return ModelFacts(
        architecture=READS[header.arch],
        layers=header.size("block_count"),
        hidden=header.size("embedding_length"),
        intermediate=header.size("feed_forward_length"),
        heads=heads,
        kv_heads=header.size("attention.head_count_kv", heads),
        head_dim=_head_dim(header),
        vocab=header.tensors["token_embd.weight"].shape[0],
        tied="output.weight" not in header.tensors,
        context=header.integer("context_length", 0) or None,
    )


def tensor_names(arch: str, layers: int) -> dict[str, str]:
    """Returns the GGUF name of every tensor a model of this kind may have, by its Hugging Face name, in file order."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    table = get_tensor_name_map(next(key for key, name in MODEL_ARCH_NAMES.items() if name == arch), layers)
    modules = ["model.embed_tokens"]
    for layer in range(layers):
        parts = ["input_layernorm", *(f"self_attn.{name}" for name in _LINEARS), "post_attention_layernorm"]
        modules += [f"model.layers.{layer}.{part}" for part in [*parts, *(f"mlp.{name}" for name in _MLP)]]
    modules += ["model.norm", "lm_head"]
    kinds = ("weight", "bias")
    return {f"{module}.{kind}": f"{table.get_name(module)}.{kind}" for module in modules for kind in kinds}


def _shape(name: str, facts: ModelFacts) -> tuple[int, ...]:
    """Returns the shape of a tensor by its Hugging Face name: `[out, in]`, or `[out]` of a bias or norm."""
    wide, narrow = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    hidden, inner = facts.hidden, facts.intermediate
    sizes = {
        "q_proj": (wide, hidden),
        "k_proj": (narrow, hidden),
        "v_proj": (narrow, hidden),
        "o_proj": (hidden, wide),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "embed_tokens": (facts.vocab, hidden),
        "lm_head": (facts.vocab, hidden),
    }
    *_, module, kind = name.split(".")
    out, columns = sizes.get(module, (hidden, 0))
    return (out, columns) if columns and kind == "weight" else (out,)


def rope_heads(name: str, arch: str, facts: ModelFacts) -> int | None:
    """Returns the number of heads whose rows llama.cpp stores interleaved, or None for a tensor stored as it is.

    llama.cpp rotates neighbouring rows of a head in "llama" models, Hugging Face rotates rows half a head apart.
    """
    if arch != "llama":
        return None
    return {"q_proj": facts.heads, "k_proj": facts.kv_heads}.get(name.split(".")[-2])


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns q or k rows `[heads * head_dim, ...]` in llama.cpp's order, from Hugging Face's."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def deinterleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns q or k rows in Hugging Face's order, from llama.cpp's: the inverse of `interleave`."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def convert(path: Path, out: Path, report: Report = silent) -> dict[str, Any]:
    """Writes a GGUF file as a Hugging Face model directory in bfloat16; the same file gives the same bytes.

    Args:
        path: the .gguf file.
        out: an existing empty directory.
        report: told of every tensor written.

    Returns:
        `{"licence": …, "name": …}` as the file states them, or None.

    Raises:
        RequestError: not a file that can be read (see `check`), or one with a tokenizer, rope scaling or tensors
            that cannot be expressed in the directory.
        Failure: cut short, damaged, or weights that are NaN or infinite.
    """
    header = _open(path)
    facts = _facts(header)
    with reading(path, "fetch it again"):
        tokenizer = tokenizer_table.tokenizer_json(header.fields)
        config = _config(header, facts)
        settings = _tokenizer_config(header, facts)
    _write_weights(header, facts, config, out, report)
    _write_json(out / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    if (several := _ends(header)) and len(several) > 1:
        ids["eos_token_id"] = several
    _write_json(out / "generation_config.json", ids)
    _write_json(out / "tokenizer.json", tokenizer)
    _write_json(out / "tokenizer_config.json", settings)
    texts = {"licence": header.fields.get("general.license"), "name": header.fields.get("general.name")}
    return {key: text if isinstance(text, str) else None for key, text in texts.items()}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(header: Header, facts: ModelFacts) -> dict[str, Any]:
    attention_bias = "blk.0.attn_q.bias" in header.tensors
    ids = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (value := header.fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            ids[f"{name}_token_id"] = value
    config = {
        "architectures": [facts.architecture],
        "model_type": header.arch,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": facts.hidden,
        "intermediate_size": facts.intermediate,
        "num_hidden_layers": facts.layers,
        "num_attention_heads": facts.heads,
        "num_key_value_heads": facts.kv_heads,
        "head_dim": facts.head_dim,
        "vocab_size": facts.vocab,
        "max_position_embeddings": header.integer("context_length"),
        "rms_norm_eps": _decimal(header.number("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(header, facts),
        "tie_word_embeddings": facts.tied,
        **ids,
    }
    if header.arch == "llama":
        config |= {"attention_bias": attention_bias, "mlp_bias": "blk.0.ffn_up.bias" in header.tensors}
    return config


def _decimal(value: float) -> float:
    """Returns the shortest decimal that rounds to the same float32: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _rope(header: Header, facts: ModelFacts) -> dict[str, Any]:
    theta = _decimal(header.number("rope.freq_base", 10000.0))
    kind = header.fields.get(f"{header.arch}.rope.scaling.type", "none")
    factor = _decimal(header.number("rope.scaling.factor", 0.0))
    if ROPE_FREQS in header.tensors:
        return {"rope_theta": theta, **_llama3(header, facts, theta)}
    if kind == "none" or not factor:
        return {"rope_theta": theta, "rope_type": "default"}
    if kind == "linear":
        return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = header.integer("rope.scaling.original_context_length", header.integer("context_length"))
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        return {"rope_theta": theta, **yarn}
    raise RequestError(f"{header.path} scales its positions by {kind!r}; lighten reads none, linear, yarn and llama3")


def _llama3(header: Header, facts: ModelFacts, theta: float) -> dict[str, Any]:
    """Finds the llama3 settings whose frequency divisors are the ones the file holds."""
    import torch

    divisors = _read(header, header.tensors[ROPE_FREQS])
    settings = {"rope_type": "llama3", "factor": _decimal(float(divisors.max())), **_LLAMA3_ROPE}
    if not torch.allclose(divisors, llama3_divisors(theta, facts.head_dim, settings), rtol=1e-3):
        raise RequestError(f"{header.path}: {ROPE_FREQS} is not the llama3 scaling, the only such table lighten reads")
    return settings


def llama3_divisors(theta: float, head_dim: int, settings: dict[str, Any]) -> torch.Tensor:
    """Returns what each rotation frequency is divided by under "llama3" scaling, float32 `[head_dim / 2]`.

    Follows `_compute_llama3_parameters` of transformers, which follows Meta's reference code.
    """
    import torch

    wavelengths = 2 * math.pi * theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    factor, low, high = (float(settings[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = float(settings["original_max_position_embeddings"]) / wavelengths
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _tokenizer_config(header: Header, facts: ModelFacts) -> dict[str, Any]:
    tokens = header.fields["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (index := header.fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token"] = tokens[index]
    config["add_bos_token"], config["add_eos_token"] = tokenizer_table.adds(header.fields)
    config["model_max_length"] = header.integer("context_length")
    if templates := chat_templates(header):
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        config["chat_template"] = templates[DEFAULT] if templates.keys() == {DEFAULT} else listed
    return config


def chat_templates(header: Header) -> dict[str, str]:
    """Returns the chat templates of a file by name, the default first if there is one."""
    names = header.fields.get("tokenizer.chat_templates") or []
    found = {DEFAULT: header.fields.get("tokenizer.chat_template")}
    found |= {str(name): header.fields.get(f"tokenizer.chat_template.{name}") for name in names}
    return {name: str(text) for name, text in found.items() if text}


def _ends(header: Header) -> list[int]:
    """Returns the ids that a file says a text, a turn or a message ends with."""
    found = [header.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(each for each in found if each is not None))


def says_more(path: Path) -> bool:
    """Returns whether a file has further chat templates or ends; see `tokenizer_files.says_more`."""
    header = read_header(path)
    return bool(header.fields.get("tokenizer.chat_templates")) or len(_ends(header)) > 1


def _read(header: Header, tensor: Tensor) -> torch.Tensor:
    """Returns one tensor, dequantized, float32 `[out, in]`."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(tensor.type)
    raw = np.memmap(tensor.file or header.path, dtype=np.uint8, mode="r", offset=tensor.start, shape=(tensor.size,))
    plain = {"F32": np.float32, "F16": np.float16}.get(kind.name)
    row_bytes = tensor.size // math.prod(tensor.shape[:-1])
    try:
        values = raw.view(plain) if plain else dequantize(raw.reshape(-1, row_bytes), kind)
    except NotImplementedError as error:
        raise RequestError(f"{header.path}: tensor {tensor.name} has the unreadable type {kind.name}") from error
    return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(tensor.shape)


def _names(header: Header, facts: ModelFacts) -> dict[str, str]:
    """Returns the GGUF names of a file's tensors, by Hugging Face name."""
    names = {hf: gguf for hf, gguf in tensor_names(header.arch, facts.layers).items() if gguf in header.tensors}
    if unknown := sorted(set(header.tensors) - set(names.values()) - {ROPE_FREQS}):
        raise RequestError(f"{header.path}: a {header.arch} model that lighten reads has no tensor {unknown[0]}")
    return names


def _write_weights(header: Header, facts: ModelFacts, config: dict[str, Any], out: Path, report: Report) -> None:
    import torch

    from lighten.model.shards import ShardWriter

    names = _names(header, facts)
    with ShardWriter(out, len(names), SHARD_BYTES) as writer:
        for done, (hf, name) in enumerate(names.items(), 1):
            if (found := header.tensors[name].shape) != (right := _shape(hf, facts)):
                raise Failure(f"{header.path}: tensor {name} is {list(found)}, its sizes say {list(right)}: damaged")
            weight = _read(header, header.tensors[name])
            if heads := rope_heads(hf, header.arch, facts):
                weight = deinterleave(weight, heads)
            if not weight.abs().amax() <= torch.finfo(torch.bfloat16).max:  # false for NaN too
                raise Failure(f"{header.path}: tensor {name} holds NaN or infinity: damaged; fetch it again")
            writer.add(hf, weight.to(torch.bfloat16))
            report(done, len(names), hf)
