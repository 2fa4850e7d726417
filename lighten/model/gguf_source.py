"""A .gguf file as a source: what its header says, and the Hugging Face directory that it becomes.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here. Every read
is checked against the size of the file, so that a truncated download gets a clear message. Tensors are dequantized one
at a time with the `gguf` package and never held together.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lighten.errors import Failure, RequestError, reading
from lighten.facts import ModelFacts
from lighten.model import anatomy, tokenizer_table
from lighten.model.gguf_header import READS, Header, Tensor, head_dim_of, open_any, open_model, read_header
from lighten.model.tokenizer_files import DEFAULT
from lighten.step import Report, silent

if TYPE_CHECKING:
    import torch


SHARD_BYTES = 2_000_000_000
ROPE_FREQS = "rope_freqs.weight"

_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def check(path: Path) -> ModelFacts:
    """Returns the sizes of the model in a file that can be a source.

    Raises:
        RequestError, Failure: as `convert`, for everything but weights.
    """
    header = open_model(path)
    facts = _facts(header)
    tokenizer_table.tokenizer_json(header.fields)
    _config(header, facts)
    _names(header, facts)
    return facts


def inspect(path: Path) -> ModelFacts:
    """Returns the sizes of the model in a GGUF file that can be a source, from its header alone."""
    return _facts(open_model(path))


def measurable(path: Path) -> ModelFacts:
    """Returns the sizes of the model in a GGUF file of any architecture, as far as its header has them.

    Raises:
        RequestError: the file does not exist, is not GGUF, or is no model.
        Failure: the file is cut short or damaged.
    """
    header = open_any(path)
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
    """Returns remarks for the person on whether llama.cpp's results for a file can be trusted."""
    fields = read_header(path).fields
    if fields.get("tokenizer.ggml.model") == "gpt2" and not fields.get("tokenizer.ggml.pre"):
        return [
            "the file does not name its pre-tokenizer (tokenizer.ggml.pre), so llama.cpp takes a default that may "
            "split text otherwise than the model learned it: export the model again"
        ]
    return []


def _largest(header: Header, key: str) -> int:
    """Returns a whole number of the architecture: the largest if it differs by layer, 0 if the file has none."""
    value = header.fields.get(f"{header.arch}.{key}", 0)
    numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, (int, float))]
    return int(max(numbers, default=0))


def _family(header: Header) -> Literal["causal", "encoder", "seq2seq"]:
    if header.arch == "t5":
        return "seq2seq"
    return "encoder" if header.fields.get(f"{header.arch}.attention.causal") is False else "causal"


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
        head_dim=head_dim_of(header),
        vocab=header.tensors["token_embd.weight"].shape[0],
        tied="output.weight" not in header.tensors,
        context=header.integer("context_length", 0) or None,
    )


def tensor_names(arch: str, layers: int) -> dict[str, str]:
    """Returns the GGUF name of every tensor a model of this kind may have, by its Hugging Face name, in file order."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    table = get_tensor_name_map(next(key for key, name in MODEL_ARCH_NAMES.items() if name == arch), layers)
    kinds = ("weight", "bias")
    return {
        f"{module}.{kind}": f"{table.get_name(module)}.{kind}" for module in anatomy.modules(layers) for kind in kinds
    }


def _shape(name: str, facts: ModelFacts) -> tuple[int, ...]:
    """Returns the shape of a tensor by its Hugging Face name: `[out, in]`, or `[out]` of a bias or norm."""
    module, _, kind = name.rpartition(".")
    found = anatomy.shape(module, facts)
    if found is None:
        return (facts.hidden,)
    return found if kind == "weight" else found[:1]


def rope_heads(name: str, arch: str, facts: ModelFacts) -> int | None:
    """Returns the number of heads whose rows llama.cpp stores interleaved, or None for a tensor stored as it is.

    llama.cpp rotates neighbouring rows of a head in "llama" models, Hugging Face rotates rows half a head apart.
    """
    if arch != "llama":
        return None
    return anatomy.rotated_heads(name.rpartition(".")[0], facts)


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
        report: called for every written tensor.

    Returns:
        `{"licence": …, "name": …}` as the file states them, or None.

    Raises:
        RequestError: not a file that can be read (see `check`), or one with a tokenizer, rope scaling or tensors
            that cannot be expressed in the directory.
        Failure: cut short, damaged, or weights that are NaN or infinite.
    """
    header = open_model(path)
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
    """Returns the ids that end a text, a turn or a message by the file."""
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
