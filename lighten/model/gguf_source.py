"""A .gguf file as a source: what its header says, and the Hugging Face directory that it becomes.

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is parsed here. Every read
is checked against the size of the file, so that a truncated download gets a clear message. Tensors are dequantized one
at a time with the `gguf` package and never held together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.errors import Failure, RequestError, reading
from lighten.facts import ModelFacts, Task
from lighten.model import anatomy, tokenizer_table
from lighten.model.gguf.config import ROPE_TENSORS, config_of
from lighten.model.gguf.family import Family, Place, missing, places
from lighten.model.gguf.table import ARCHITECTURES, family_in
from lighten.model.gguf.turns import Model
from lighten.model.gguf_header import Header, Tensor, open_any, read_header
from lighten.model.tokenizer_files import DEFAULT
from lighten.step import Report, silent

if TYPE_CHECKING:
    import torch


SHARD_BYTES = 2_000_000_000


def check(path: Path) -> ModelFacts:
    """Returns the sizes of the model in a file that can be a source.

    Raises:
        RequestError, Failure: as `convert`, for everything but weights.
    """
    header, family = open_model(path)
    facts = _facts(header, family)
    tokenizer_table.tokenizer_json(header.fields)
    places_in(header, family, Model(_config(header, family, facts), facts))
    return facts


def inspect(path: Path) -> ModelFacts:
    """Returns the sizes of the model in a GGUF file that can be a source, from its header alone."""
    return _facts(*open_model(path))


def measurable(path: Path) -> ModelFacts:
    """Returns the sizes of the model in a GGUF file of any architecture, as far as its header has them.

    Raises:
        RequestError: the file does not exist, is not GGUF, or is no model.
        Failure: the file is cut short or damaged.
    """
    header = open_any(path)
    if not header.tensors:
        raise RequestError(f"{path} has no weights, only a vocabulary: give a model")
    heads = max(1, header.largest("attention.head_count"))
    hidden = header.largest("embedding_length")
    embedding = header.tensors.get("token_embd.weight")
    return ModelFacts(
        architecture=known.architecture if (known := family_in(header)) else header.arch,
        layers=header.largest("block_count"),
        hidden=hidden,
        intermediate=header.largest("feed_forward_length"),
        heads=heads,
        kv_heads=header.largest("attention.head_count_kv") or heads,
        head_dim=header.largest("attention.key_length") or hidden // heads,
        vocab=embedding.shape[0] if embedding else len(header.fields.get("tokenizer.ggml.tokens") or []),
        tied="output.weight" not in header.tensors,
        task=_task(header),
        counted=_count(header),
        context=header.largest("context_length") or None,
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


def _task(header: Header) -> Task:
    if header.arch == "t5":
        return "seq2seq"
    return "other" if header.fields.get(f"{header.arch}.attention.causal") is False else "causal"


def open_model(path: Path) -> tuple[Header, Family]:
    """Returns the header of a file whose architecture can be read and compressed, and its row.

    Raises:
        RequestError: lighten does not read such a file.
        Failure: the file is cut short or damaged.
    """
    header = open_any(path)
    family = family_in(header)
    if family is None:
        raise RequestError(
            f"{path} has architecture {header.arch!r}, which can be measured but not changed: lighten turns only "
            f"{', '.join(ARCHITECTURES)} files back into a model (Mistral models are called llama there); give the "
            "model that it was made from"
        )
    if header.largest("expert_count") and not family.experts:
        raise RequestError(f"{path} is a mixture of experts, which lighten does not read of the kind {header.arch}")
    if (layers := header.size("block_count")) > len(header.tensors):
        raise Failure(f"{path} tells of {layers:,} layers, but has {len(header.tensors)} tensors: fetch it again")
    if not family.partial:
        head_dim = header.size("attention.key_length", header.size("embedding_length") // _heads(header, family))
        if header.integer("rope.dimension_count", head_dim) != head_dim:
            raise RequestError(f"{path} rotates only a part of each head, which lighten does not read")
    return header, family


def _heads(header: Header, family: Family) -> int:
    return header.largest("attention.head_count") if family.varied else header.size("attention.head_count")


def _facts(header: Header, family: Family) -> ModelFacts:
    if "token_embd.weight" not in header.tensors:
        raise Failure(f"{header.path} has no tensor token_embd.weight: a damaged file; fetch it again")
    heads = _heads(header, family)
    hidden = header.size("embedding_length")
    inner = header.largest("feed_forward_length") or header.largest("expert_feed_forward_length")
    usual = family.arch in ("llama", "qwen2")
    return ModelFacts(
        architecture=family.architecture,
        layers=header.size("block_count"),
        hidden=hidden,
        intermediate=inner if family.varied else header.size("feed_forward_length", inner or None),
        heads=heads,
        kv_heads=header.largest("attention.head_count_kv") or heads
        if family.varied
        else header.size("attention.head_count_kv", heads),
        head_dim=header.size("attention.key_length", hidden // heads),
        vocab=header.tensors["token_embd.weight"].shape[0],
        tied="output.weight" not in header.tensors,
        counted=None if usual else _count(header),
        context=header.integer("context_length", 0) or None,
    )


def _count(header: Header) -> int:
    """Returns the number of weights."""
    return sum(math.prod(tensor.shape) for name, tensor in header.tensors.items() if name not in ROPE_TENSORS)


def _shape(name: str, facts: ModelFacts) -> tuple[int, ...] | None:
    """Returns the shape of a tensor by its Hugging Face name, where its sizes give it."""
    module, _, kind = name.rpartition(".")
    if module.endswith((anatomy.ATTENTION_NORM, anatomy.MLP_NORM, anatomy.NORM)):
        return (facts.hidden,)
    found = anatomy.shape(module, facts)
    return found and (found if kind == "weight" else found[:1])


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
    header, family = open_model(path)
    facts = _facts(header, family)
    with reading(path, "fetch it again"):
        tokenizer = tokenizer_table.tokenizer_json(header.fields)
        config = _config(header, family, facts)
        settings = _tokenizer_config(header, facts)
    _write_weights(header, family, facts, config, out, report)
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


def _config(header: Header, family: Family, facts: ModelFacts) -> dict[str, Any]:
    return config_of(header, family, facts, lambda name: read_tensor(header, header.tensors[name]))


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


def read_tensor(header: Header, tensor: Tensor) -> torch.Tensor:
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


def places_in(header: Header, family: Family, model: Model) -> list[Place]:
    """Returns the places whose tensors a file has.

    Raises:
        RequestError: the file has a tensor without a place.
        Failure: a tensor is missing.
    """
    known = list(places(family, model))
    found: list[Place] = []
    taken: set[str] = set()
    for place in known:
        if not taken.intersection(place.names) and header.tensors.keys() >= set(place.names):
            found.append(place)
            taken.update(place.names)
    if unknown := sorted(set(header.tensors) - taken - {*ROPE_TENSORS}):
        raise RequestError(f"{header.path}: a {header.arch} model that lighten reads has no tensor {unknown[0]}")
    if lacking := missing(known, found):
        raise Failure(f"{header.path} has no tensor {lacking.names[0]}: a damaged file; fetch it again")
    return found


def read_stored(header: Header, place: Place, model: Model, expert: int | None = None) -> torch.Tensor:
    """Returns the tensor of a checkpoint that a place in a file stands for, or that of one expert, float32."""
    tensors = [header.tensors[name] for name in place.names]
    parts = tensors if expert is None else [_slice(tensor, expert) for tensor in tensors]
    return place.rule.turn.back([read_tensor(header, part) for part in parts], model)


def _stored(header: Header, place: Place, model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of a checkpoint that come from one place in a file, float32."""
    if not place.of_experts:
        yield place.stored, read_stored(header, place, model)
        return
    for number, name in enumerate(place.parts(header.tensors[place.names[0]].shape[0])):
        yield name, read_stored(header, place, model, number)


def _slice(tensor: Tensor, number: int) -> Tensor:
    """Returns the place of one part of a tensor along its first axis."""
    size = tensor.size // tensor.shape[0]
    return replace(tensor, shape=tensor.shape[1:], start=tensor.start + number * size, size=size)


def _write_weights(
    header: Header, family: Family, facts: ModelFacts, config: dict[str, Any], out: Path, report: Report
) -> None:
    import torch

    from lighten.model.shards import ShardWriter

    model = Model(config, facts)
    found = places_in(header, family, model)
    count = sum(header.tensors[place.names[0]].shape[0] if place.of_experts else 1 for place in found)
    done = 0
    with ShardWriter(out, count, SHARD_BYTES) as writer:
        for place in found:
            name = place.names[0]
            right = _shape(place.stored, facts) if family.plain else None
            if right and (shape := header.tensors[name].shape) != right:
                raise Failure(f"{header.path}: tensor {name} is {list(shape)}, its sizes say {list(right)}: damaged")
            try:
                for stored, weight in _stored(header, place, model):
                    if not weight.abs().amax() <= torch.finfo(torch.bfloat16).max:  # false for NaN too
                        raise Failure(f"{header.path}: tensor {name} holds NaN or infinity: damaged; fetch it again")
                    writer.add(stored, weight.to(torch.bfloat16).contiguous())
                    done += 1
                    report(done, count, stored)
            except (RuntimeError, IndexError) as error:
                raise Failure(
                    f"{header.path}: tensor {name} has a shape that does not fit the sizes ({error}): damaged"
                ) from error
