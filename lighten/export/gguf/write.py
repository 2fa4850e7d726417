"""A Hugging Face model directory as a GGUF file, one tensor at a time. The same input gives the same bytes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lighten.errors import Failure, RequestError, missing_extra, reading
from lighten.export.gguf.pieces import Piece, left_out, pieces_of
from lighten.export.gguf.rope import Rotation, rotation
from lighten.export.gguf.types import PLAIN, TYPES
from lighten.facts import ModelFacts
from lighten.model.gguf.family import FLOATS, Family
from lighten.model.gguf.table import family_of
from lighten.model.gguf.towers import Tower
from lighten.model.gguf.turns import Model
from lighten.model.tokenizer_files import DEFAULT
from lighten.step import Report, silent

if TYPE_CHECKING:
    import numpy as np
    import torch

    from lighten.export.gguf.tokenizer import Vocabulary


Encode = Callable[[str, "torch.Tensor", str], "np.ndarray[Any, Any]"]


def write(
    source: Path,
    out_file: Path,
    type: str | None = None,
    report: Report = silent,
    about: Mapping[str, str] | None = None,
) -> list[str]:
    """Writes a model directory as a GGUF file, one tensor at a time.

    Args:
        source: directory with config.json, safetensors (bf16, f16 or f32, or a quantized format that can be unpacked)
            and tokenizer.json.
        out_file: the file to write.
        type: of the matrices, one of PLAIN; None keeps the type they are stored in. Vectors are always F32.
        report: called for every written tensor.
        about: "name", "license" and "source" (a hub id or any other name) of the model, where known, and what else
            the file shall say under keys of ours ("lighten.…").

    Returns:
        What the person should know of where llama.cpp will differ from transformers.

    Raises:
        RequestError: a model that llama.cpp's architecture cannot express.
        Failure: missing or damaged tensors, or weights that are NaN or too large for the type.
    """
    draft = Draft(source, about)
    draft.save_plain(out_file, type, report)
    return draft.warnings


class Draft:
    """A model directory that becomes a GGUF file: names, shapes and metadata, and one weight at a time."""

    def __init__(self, source: Path, about: Mapping[str, str] | None = None) -> None:
        """Reads everything except the weights. `about` and the errors are those of `write`."""
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise missing_extra("gguf", "gguf", "GGUF export") from error
        from lighten.export.gguf.tokenizer import read_vocabulary
        from lighten.model.checkpoint import facts_of
        from lighten.model.unpacked import Unpacked, open_checkpoint

        self.source = source
        self.about = about or {}
        self.checkpoint = Tower(open_checkpoint(source))
        self.family = family_of(self.checkpoint.facts, self.checkpoint.config)
        self.config = {**(self.family.defaults or {}), **self.checkpoint.config}
        self.facts = facts_of(self.config, str(source))
        _check(self.family, self.config, self.facts)
        with reading(source / "config.json", "fetch the model again"):
            self.rotation = rotation(self.config, self.facts, self.family)
        self.model = Model(self.config, self.facts)
        shapes = self.checkpoint.shapes()
        self.left_out = left_out(self.family, self.model, shapes)
        """Stored tensors that a file has no use for."""
        self.pieces: dict[str, Piece] = pieces_of(self.family, self.model, shapes, source)
        """Tensors to write, by name, in the order of the file. The name is the stored one, where there is one."""
        with reading(source / "tokenizer.json", "fetch the model again"):
            self.vocabulary = read_vocabulary(source, self.facts.vocab, self.config)
        packed = isinstance(self.checkpoint.checkpoint, Unpacked)  # to float32
        embedding = self.checkpoint.tensor(self.family.embedding)
        self.stored_type = "F32" if packed else _plain_type(embedding.dtype)
        """Smallest plain type that holds the matrices without rounding."""

    @property
    def names(self) -> dict[str, str]:
        """Names in the file of the tensors to write, by name, in the order of the file."""
        return {label: piece.name for label, piece in self.pieces.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors to write, by name."""
        return {label: piece.shape for label, piece in self.pieces.items()}

    @property
    def warnings(self) -> list[str]:
        """Remarks for the person on where llama.cpp will differ from transformers."""
        window = [] if self.family.windows else _window_warning(self.config)
        further = []
        if others := self.checkpoint.others:
            parts = ", ".join(dict.fromkeys(name.split(".")[name.startswith("model.")] for name in others))
            further = [f"only the language model goes into the file: {len(others)} tensors of {parts} are left out"]
        if self.left_out:
            named = ", ".join(self.left_out[:3])
            further += [f"{len(self.left_out)} tensors that llama.cpp has no use for here are left out: {named}"]
        return [*self.vocabulary.warnings, *window, *self.rotation.warnings, *further]

    def types(self, matrices: str) -> dict[str, str]:
        """Returns the type of every tensor, by name, if all matrices have the same type."""
        return {label: matrices if piece.is_matrix else "F32" for label, piece in self.pieces.items()}

    def weight(self, label: str, expert: int | None = None) -> torch.Tensor:
        """Returns one tensor as llama.cpp wants it, in its stored type unless it had to be computed.

        With the number of an expert it is the matrix of that one, of a tensor whose experts are stored one by one.
        """
        return self.pieces[label].tensor(self.checkpoint.tensor, self.model, expert)

    def keys(self) -> dict[str, Any]:
        """Returns the metadata of the architecture, by key without its name."""
        found = {**_sizes(self.config, self.facts, self.rotation), **self.rotation.keys}
        for key, name in (self.family.pairs or {}).items():
            if (value := self.config.get(name)) is not None:
                found[key] = float(value) if key in FLOATS else value
        found |= self.family.keys(self.config, self.facts)
        return {key: value for key, value in found.items() if value is not None}

    def begin(self, file: Path, types: Mapping[str, str], file_type: int | None) -> Any:
        """Writes everything except the weights into a file, and returns gguf's open writer."""
        import gguf

        writer = gguf.GGUFWriter(file, self.family.arch)
        _add_about(writer, self.about, _name(self.about, self.facts, self.vocabulary))
        _add_keys(writer, self.family.arch, self.keys())
        _add_vocabulary(writer, self.vocabulary)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if file_type is not None:
            writer.add_file_type(file_type)
        for name, divisors in self.rotation.tensors.items():
            writer.add_tensor_info(name, divisors.shape, divisors.numpy().dtype, divisors.numel() * 4)
        for hf, name in self.names.items():
            _announce(writer, name, self.shapes[hf], types[hf])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for divisors in self.rotation.tensors.values():
            writer.write_tensor_data(divisors.numpy())
        return writer

    def save_plain(self, out_file: Path, type: str | None = None, report: Report = silent) -> None:
        """Writes the file with matrices of one of PLAIN; None is the type they are stored in."""
        kind = type or self.stored_type
        self.save(out_file, self.types(kind), report, file_type=TYPES[kind].ftype)

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
            types: type of every tensor, by name.
            report: called for every written tensor.
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


def _check(family: Family, config: dict[str, Any], facts: ModelFacts) -> None:
    """Raises RequestError for a model that llama.cpp's architecture cannot express."""
    activation = config.get("hidden_activation") or config.get("hidden_act") or family.activation
    if activation != family.activation and {activation, family.activation} != {"silu", "swish"}:
        raise RequestError(
            f"config.json has hidden_act {activation}; llama.cpp computes {family.activation} for this architecture"
        )
    if family.head == "tied" and not facts.tied:
        raise RequestError(f"the head is not the embedding, and llama.cpp's {family.arch} has no place for another")
    if objection := family.objection(config, facts):
        raise RequestError(objection)


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
    """Returns the numbers of a tensor as numpy holds them: float32, or 16 bits unchanged."""
    import torch

    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    if not weight.float().abs().amax() <= torch.finfo(dtype).max:  # false for NaN too
        raise Failure(f"{where} holds NaN, infinity or a value too large for {kind}; mend it, or use another type")
    cast = weight.to(dtype).contiguous()
    return cast.numpy() if kind == "F32" else cast.view(torch.int16).numpy()


def _name(about: Mapping[str, str], facts: ModelFacts, vocabulary: Vocabulary) -> str:
    """Returns the model's name. llama.cpp reads it: if the name has "phi-3", it strips what follows special tokens.

    If the tokenizer does not strip (or lacks a token that llama.cpp then needs), the name is spelled differently. If
    the tokenizer strips, the name says so.
    """
    name = about.get("name") or about.get("source") or facts.architecture
    if vocabulary.strips:
        return name if re.search("phi-?3", name, re.IGNORECASE) else f"{name} (Phi-3)"
    return re.sub(r"(phi)-?3", r"\1_3", name, flags=re.IGNORECASE)


def _add_about(writer: Any, about: Mapping[str, str], name: str) -> None:
    writer.add_type("model")
    source = about.get("source", "")
    writer.add_name(name)
    if about.get("license"):
        writer.add_license(about["license"])
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        writer.add_source_repo_url(f"https://huggingface.co/{source}")
    elif source:
        writer.add_source_url(source)
    for key, value in about.items():
        if key.startswith("lighten."):
            writer.add_string(key, value)


def _sizes(config: dict[str, Any], facts: ModelFacts, rotation: Rotation) -> dict[str, Any]:
    """Returns the metadata that files of every architecture have."""
    return {
        "block_count": facts.layers,
        "context_length": int(config["max_position_embeddings"]),
        "embedding_length": facts.hidden,
        "feed_forward_length": facts.intermediate,
        "attention.head_count": facts.heads,
        "attention.head_count_kv": facts.kv_heads,
        "attention.key_length": facts.head_dim,
        "attention.value_length": facts.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "vocab_size": facts.vocab,
        "rope.dimension_count": rotation.dimensions,
    }


def _add_keys(writer: Any, arch: str, keys: Mapping[str, Any]) -> None:
    """Writes keys of the architecture, each with the type of its value."""
    adders: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in keys.items():
        adders[type(value)](f"{arch}.{key}", value)


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
    if vocabulary.model == "t5":
        writer.add_remove_extra_whitespaces(vocabulary.merge_spaces)
    if vocabulary.charsmap:
        writer.add_precompiled_charsmap(vocabulary.charsmap)
    _add_templates(writer, vocabulary.templates)


def _add_templates(writer: Any, templates: Mapping[str, str]) -> None:
    """Writes the default chat template and the named ones, in llama.cpp's keys and in one order always."""
    names = sorted(name for name in templates if name != DEFAULT)
    for name in names:
        writer.add_string(f"tokenizer.chat_template.{name}", templates[name])
    if names:
        writer.add_array("tokenizer.chat_templates", names)
    if DEFAULT in templates:
        writer.add_chat_template(templates[DEFAULT])


def _window_warning(config: dict[str, Any]) -> list[str]:
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False or window >= config["max_position_embeddings"]:
        return []
    return [f"this model attends to the last {window} tokens only; llama.cpp will attend to all of a longer text"]
