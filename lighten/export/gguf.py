"""A Hugging Face model directory as a GGUF file, and a GGUF file quantized.

`write` follows llama.cpp's convert_hf_to_gguf.py for Llama, Mistral and Qwen2; `quantize` calls llama.cpp's own
`llama_model_quantize`. Both give the same bytes for the same input.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.errors import Failure, RequestError, missing_extra
from lighten.stage import ModelFacts, Report, silent

if TYPE_CHECKING:
    import numpy as np
    import torch

    from lighten.export.tokenizer import Vocabulary

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
"""The architectures that can be written, and llama.cpp's name of each."""

FTYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K_M": 17,
    "Q4_K_M": 15,
    "Q4_0": 2,
    "Q3_K_M": 12,
    "Q2_K": 10,
}
"""llama.cpp's `llama_ftype` of every type."""

PLAIN = ("F32", "F16", "BF16")
K_BLOCK = 256
_PROGRESS = re.compile(r"\[ *(\d+)/ *(\d+)\] +(\S+)")

Importance = Mapping[str, "np.ndarray[Any, np.dtype[np.float32]]"]
Encode = Callable[[str, "torch.Tensor", str], "np.ndarray[Any, Any]"]


def check_architecture(architecture: str) -> str:
    """Returns llama.cpp's name of an architecture.

    Raises:
        RequestError: it cannot be exported.
    """
    if architecture not in ARCHITECTURES:
        raise RequestError(f"GGUF export does not know {architecture}; it knows {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[architecture]


def _arch(facts: ModelFacts) -> str:
    """Returns llama.cpp's architecture for a model.

    Its qwen2 takes the heads together to be as wide as the hidden states. Where heads were pruned they are not, and its
    llama, which has optional biases and only rotates other pairs of rows, computes the same.
    """
    arch = check_architecture(facts.architecture)
    return "llama" if arch == "qwen2" and facts.heads * facts.head_dim != facts.hidden else arch


def write(
    source: Path,
    out_file: Path,
    type: str | None = None,
    report: Report = silent,
    about: Mapping[str, str] | None = None,
) -> list[str]:
    """Writes a model directory as a GGUF file, one tensor at a time.

    Args:
        source: directory with config.json, safetensors (bf16, f16 or f32) and tokenizer.json.
        out_file: the file to write.
        type: of the matrices, one of PLAIN; None keeps the type they are stored in. Vectors are always F32.
        report: told of every tensor written.
        about: "name", "license" and "source" (a hub id or any other name) of the model, where known.

    Returns:
        What the person should know of where llama.cpp will differ from transformers.

    Raises:
        RequestError: a model that llama.cpp's architecture cannot express.
        Failure: missing or damaged tensors, or weights that are NaN or too large for the type.
    """
    draft = Draft(source, about)
    kind = type or draft.stored_type
    draft.save(out_file, draft.types(kind), report, file_type=FTYPES[kind])
    return draft.warnings


class Draft:
    """A model directory on its way into a GGUF file: names, shapes and metadata, and one weight at a time."""

    def __init__(self, source: Path, about: Mapping[str, str] | None = None) -> None:
        """Reads everything but the weights; `about` and what is raised are those of `write`."""
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise missing_extra("gguf", "gguf", "GGUF export") from error
        from lighten.export.tokenizer import read_vocabulary
        from lighten.model.checkpoint import Checkpoint

        self.source = source
        self.about = about or {}
        self.checkpoint = Checkpoint(source)
        self.config, self.facts = self.checkpoint.config, self.checkpoint.facts
        self.arch = _arch(self.facts)
        self.shapes = _shapes(self.checkpoint)
        self.names = _names(self.arch, self.facts, self.shapes, source)
        """GGUF names of the tensors to write, by Hugging Face name, in the order of the file."""
        self.vocabulary = read_vocabulary(source, self.facts.vocab, self.config)
        self.stored_type = _plain_type(self.checkpoint.tensor("model.embed_tokens.weight").dtype)
        self.rope, self.divisors = _rope(self.config, self.facts)

    @property
    def warnings(self) -> list[str]:
        """What the person should know of where llama.cpp will differ from transformers."""
        return [*self.vocabulary.warnings, *_window_warning(self.config)]

    def types(self, matrices: str) -> dict[str, str]:
        """Returns the type of every tensor, by Hugging Face name, where all matrices have the same."""
        return {hf: matrices if len(self.shapes[hf]) > 1 else "F32" for hf in self.names}

    def weight(self, hf: str) -> torch.Tensor:
        """Returns one tensor in the type it is stored in, its rows in llama.cpp's order."""
        from lighten.model.gguf_source import interleave, rope_heads

        weight = self.checkpoint.tensor(hf)
        heads = rope_heads(hf, self.arch, self.facts)
        return interleave(weight, heads) if heads else weight

    def begin(self, file: Path, types: Mapping[str, str], file_type: int | None) -> Any:
        """Writes everything but the weights into a file, and returns gguf's writer, open."""
        import gguf

        writer = gguf.GGUFWriter(file, self.arch)
        _add_about(writer, self.about, self.facts)
        _add_sizes(writer, self.config, self.facts, self.rope)
        _add_vocabulary(writer, self.vocabulary)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if file_type is not None:
            writer.add_file_type(file_type)
        if self.divisors is not None:
            shape, dtype = self.divisors.shape, self.divisors.numpy().dtype
            writer.add_tensor_info("rope_freqs.weight", shape, dtype, self.divisors.numel() * 4)
        for hf, name in self.names.items():
            _announce(writer, name, self.shapes[hf], types[hf])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if self.divisors is not None:
            writer.write_tensor_data(self.divisors.numpy())
        return writer

    def save(
        self,
        out_file: Path,
        types: Mapping[str, str],
        report: Report = silent,
        encode: Encode | None = None,
        file_type: int | None = None,
    ) -> None:
        """Writes the file.

        Args:
            out_file: the file to write.
            types: type of every tensor, by Hugging Face name.
            report: told of every tensor written.
            encode: turns a tensor's Hugging Face name, its weight and its type into the bytes to write; None knows
                the types of PLAIN.
            file_type: llama.cpp's `llama_ftype`; None lets llama.cpp name the commonest type of the tensors.
        """
        partial = out_file.with_name(f".{out_file.name}.partial")
        writer = None
        try:
            writer = self.begin(partial, types, file_type)
            for done, hf in enumerate(self.names, 1):
                kind = types[hf]
                if encode is None or kind in PLAIN:
                    data = _cast(self.weight(hf), kind, f"{self.source}: tensor {hf}")
                else:
                    data = encode(hf, self.weight(hf), kind)
                writer.write_tensor_data(data)
                report(done, len(self.names), hf)
            writer.close()
            os.replace(partial, out_file)
        finally:
            if writer:
                writer.close()
            partial.unlink(missing_ok=True)


def _plain_type(dtype: torch.dtype) -> str:
    import torch

    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    if dtype not in kinds:
        raise RequestError(f"the weights are {dtype}; GGUF export reads float32, float16 and bfloat16")
    return kinds[dtype]


def _shapes(checkpoint: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor, from the headers of the shards."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for shard in sorted(set(checkpoint.weight_map.values())):
        with safe_open(checkpoint.path / shard, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def _names(arch: str, facts: ModelFacts, shapes: dict[str, tuple[int, ...]], source: Path) -> dict[str, str]:
    """Returns the GGUF names of the tensors to write, by Hugging Face name, in the order of the file."""
    from lighten.model.gguf_source import tensor_names

    names = tensor_names(arch, facts.layers)
    unknown = sorted(name for name in shapes if name not in names and not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise RequestError(f"{source}: llama.cpp's {arch} has no place for the tensor {unknown[0]}")
    needed = {name for name in names if name.endswith(".weight")}
    present = set(shapes)
    if facts.tied:
        needed.discard("lm_head.weight")
        present.discard("lm_head.weight")
    if missing := [name for name in names if name in needed - present]:
        raise Failure(f"{source}: tensor {missing[0]} is missing; fetch the model again")
    rows = shapes["model.embed_tokens.weight"][0]
    if rows != facts.vocab:
        raise Failure(f"{source}: config.json says {facts.vocab} tokens, the embedding has {rows} rows")
    return {hf: name for hf, name in names.items() if hf in present}


def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    import gguf
    import numpy as np

    number = gguf.GGMLQuantizationType[kind]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), tensor_bytes(shape, kind), number)


def tensor_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Returns the bytes of a tensor `[..., in]` in one of ggml's types."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(math.prod(shape) // block * size)


def _cast(weight: torch.Tensor, kind: str, where: str) -> Any:
    """Returns the numbers of a tensor as numpy holds them: float32, or 16 bits as they are."""
    import torch

    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    if not weight.float().abs().amax() <= torch.finfo(dtype).max:  # false for NaN too
        raise Failure(f"{where} holds NaN, infinity or a value too large for {kind}; mend it, or use another type")
    cast = weight.to(dtype).contiguous()
    return cast.numpy() if kind == "F32" else cast.view(torch.int16).numpy()


def _add_about(writer: Any, about: Mapping[str, str], facts: ModelFacts) -> None:
    writer.add_type("model")
    source = about.get("source", "")
    writer.add_name(about.get("name") or source or facts.architecture)
    if about.get("license"):
        writer.add_license(about["license"])
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        writer.add_source_repo_url(f"https://huggingface.co/{source}")
    elif source:
        writer.add_source_url(source)


def _add_sizes(writer: Any, config: dict[str, Any], facts: ModelFacts, rope: Callable[[Any], None]) -> None:
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise RequestError(f"config.json has hidden_act {activation}; llama.cpp computes silu for this architecture")
    writer.add_block_count(facts.layers)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(facts.hidden)
    writer.add_feed_forward_length(facts.intermediate)
    writer.add_head_count(facts.heads)
    writer.add_head_count_kv(facts.kv_heads)
    writer.add_key_length(facts.head_dim)
    writer.add_value_length(facts.head_dim)
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_vocab_size(facts.vocab)
    writer.add_rope_dimension_count(facts.head_dim)
    rope(writer)


def _rope(config: dict[str, Any], facts: ModelFacts) -> tuple[Callable[[Any], None], torch.Tensor | None]:
    """Returns what writes the rotation's keys, and the frequency divisors of "llama3" scaling.

    Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before).
    """
    settings = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(settings.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise RequestError(f"config.json scales positions by {kind!r}; known are default, linear, yarn and llama3")
    if float(settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise RequestError(
            "config.json rotates a part of each head (partial_rotary_factor), which llama.cpp lacks here"
        )
    divisors = None
    if kind == "llama3":
        from lighten.model.gguf_source import llama3_divisors

        settings.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
        divisors = llama3_divisors(theta, facts.head_dim, settings)

    def add(writer: Any) -> None:
        import gguf

        writer.add_rope_freq_base(theta)
        if kind in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
            writer.add_rope_scaling_factor(float(settings["factor"]))
        if kind == "yarn":
            _add_yarn(writer, settings, config)

    return add, divisors


def _add_yarn(writer: Any, settings: dict[str, Any], config: dict[str, Any]) -> None:
    """Writes the keys of YaRN; llama.cpp multiplies the attention factor by the paper's 0.1 ln(s) + 1 itself."""
    factor = float(settings["factor"])
    writer.add_rope_scaling_orig_ctx_len(
        int(settings.get("original_max_position_embeddings") or config["max_position_embeddings"])
    )
    unread = {"beta_fast": (None, 32), "beta_slow": (None, 1), "mscale": (None, 0), "mscale_all_dim": (None, 0)}
    odd = [key for key, usual in {**unread, "truncate": (None, True)}.items() if settings.get(key) not in usual]
    if odd:
        raise RequestError(f"config.json sets {odd[0]} for YaRN, which llama.cpp does not read for this architecture")
    if attention := settings.get("attention_factor"):
        writer.add_rope_scaling_attn_factors(float(attention) / (0.1 * math.log(factor) + 1.0))


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.ids.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _window_warning(config: dict[str, Any]) -> list[str]:
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False or window >= config["max_position_embeddings"]:
        return []
    return [f"this model attends to the last {window} tokens only; llama.cpp will attend to all of a longer text"]


def importance(grams: Path, facts: ModelFacts) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Returns llama.cpp's importance matrix, mean x² per input channel `[in]`, by GGUF tensor name.

    A channel the calibration data left at zero gets a millionth of the mean, for llama.cpp divides by sums of these.
    """
    import numpy as np

    from lighten.model.gguf_source import tensor_names
    from lighten.model.grams import read_diagonals

    names = tensor_names(check_architecture(facts.architecture), facts.layers)
    found = {}
    for linear, diagonal, tokens in read_diagonals(grams):
        found[names[linear]] = channel_importance(np.asarray(diagonal), tokens)
    if not found:
        raise Failure(f"{grams} holds no Grams: sweep the model again")
    return found


def channel_importance(diagonal: np.ndarray[Any, Any], tokens: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Returns mean x² per input channel from diag(H) `[in]`, all above zero."""
    import numpy as np

    mean = np.asarray(diagonal, dtype=np.float64) / max(tokens, 1)
    floor = mean.mean() * 1e-6
    return (np.maximum(mean, floor) if floor > 0 else np.ones_like(mean)).astype(np.float32)


def quantize(f: Path, out: Path, type: str, imatrix: Importance | None = None, report: Report = silent) -> None:
    """Quantizes a GGUF file with llama.cpp, on all cores.

    Args:
        f: a GGUF file in F32, F16 or BF16.
        out: the file to write.
        type: one of FTYPES that is not plain.
        imatrix: importance of every input channel by tensor name (see `importance`), or None.
        report: told of every tensor.

    Raises:
        Failure: llama.cpp failed; its own words are in the message.
    """
    try:
        import llama_cpp
    except ImportError as error:
        raise missing_extra("gguf", "llama_cpp", "GGUF quantization") from error

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = os.cpu_count() or 1
    params.ftype = FTYPES[type]
    # The entries point into these arrays, so they must outlive the call.
    kept = _imatrix_entries(llama_cpp, imatrix) if imatrix else None
    if kept:
        params.imatrix = ctypes.cast(kept[0], ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    partial = out.with_name(f".{out.name}.partial")
    try:
        with _log(report) as lines:
            status = llama_cpp.llama_model_quantize(str(f).encode(), str(partial).encode(), ctypes.byref(params))
        if status:
            reason = lines[-1] if lines else "it gave no reason"
            raise Failure(f"llama.cpp could not quantize {f.name} to {type}: {reason}")
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def _imatrix_entries(llama_cpp: Any, imatrix: Importance) -> tuple[Any, list[Any]]:
    entries = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
    kept = []
    for entry, (name, values) in zip(entries, sorted(imatrix.items()), strict=False):
        data = (ctypes.c_float * values.size).from_buffer_copy(values.tobytes())
        kept.append(data)
        entry.name, entry.size = name.encode(), values.size
        entry.data = ctypes.cast(data, ctypes.POINTER(ctypes.c_float))
    return entries, kept


@contextmanager
def _log(report: Report) -> Iterator[list[str]]:
    """Yields llama.cpp's warnings and errors; its lines "[ 12/ 272] name" go to `report`."""
    import llama_cpp
    from llama_cpp._logger import llama_log_callback as standard

    lines: list[str] = []

    def receive(level: int, text: bytes, _data: Any) -> None:
        line = text.decode(errors="replace").strip()
        if found := _PROGRESS.match(line):
            report(int(found[1]), int(found[2]), found[3])
        elif level in (3, 4) and line:  # ggml's warning and error; llama_cpp._logger still has the older numbers
            lines.append(line)

    callback = llama_cpp.llama_log_callback(receive)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(standard, ctypes.c_void_p(0))


def describe(file: Path, type: str) -> dict[str, Any]:
    """Returns what a GGUF file holds, read back from it.

    `tensor_types` counts tensors by type. `bits_per_weight` is the bytes of all tensors over all their elements.
    `fallbacks` counts the matrices of a K-quant file whose rows are not a multiple of 256, so that llama.cpp took
    another type for them than the K-quant it wanted, and names them by kind. The head (the embedding where they are
    tied) is not counted: llama.cpp gives it Q8_0 then and does not call it a fallback.
    """
    from gguf import GGMLQuantizationType

    from lighten.model.gguf_source import read_header

    tensors = list(read_header(file).tensors.values())
    head = "output.weight" if any(tensor.name == "output.weight" for tensor in tensors) else "token_embd.weight"
    types = Counter(GGMLQuantizationType(tensor.type).name for tensor in tensors)
    odd = Counter(
        tensor.name.split(".")[-2]
        for tensor in tensors
        if "_K" in type and len(tensor.shape) > 1 and tensor.shape[-1] % K_BLOCK and tensor.name != head
    )
    bits = 8 * sum(tensor.size for tensor in tensors)
    named = {"tensors": dict(sorted(odd.items()))} if odd else {}
    return {
        "format": "gguf",
        "type": type,
        "tensor_types": dict(sorted(types.items())),
        "fallbacks": {"count": odd.total(), "of": len(tensors), **named},
        "bits_per_weight": round(bits / sum(math.prod(tensor.shape) for tensor in tensors), 4),
    }
