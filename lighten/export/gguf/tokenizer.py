"""The tokenizer of a Hugging Face directory as the metadata of a GGUF file.

llama.cpp has three tokenizer models: byte-level BPE ("gpt2"), BPE over characters with a fallback to bytes, as in
SentencePiece for Llama and Gemma ("llama"), and SentencePiece's unigram model ("t5").
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lighten.errors import Failure, RequestError
from lighten.model.files import read_json
from lighten.model.tokenizer_files import DEFAULT, FILE, chat_templates, ends, read_tokenizer, vocabulary_of
from lighten.model.tokenizer_table import BYTE, CONTROL, NORMAL, TABLE, UNKNOWN, UNUSED, USER_DEFINED, Json, name_of

_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NAMES = ("bos", "eos", "unk", "pad")
_MESSAGE_ENDS = ("<|eom_id|>",)
_TURN_ENDS = re.compile(r"eot|im_end|end_of_turn|end_of_role|<\|end\|>|<\|user\|>|<turn\|>")
"""Usual names of tokens that end a turn. Such a token has priority."""
_KNOWN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>")
"""Some of the names that llama.cpp itself takes for ends."""
_NEVER = -1e6
"""Score of tokens that only pad the vocabulary."""


@dataclass
class Vocabulary:
    """The tokenizer in the form of a GGUF file."""

    model: str
    """ "gpt2", "llama" or "t5"."""
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]
    """Ids of bos, eos, unk and pad, where they exist."""
    add_bos: bool
    add_eos: bool
    pre: str | None = None
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    add_space_prefix: bool = False
    merge_spaces: bool = False
    """Whether runs of spaces become one space, and spaces at the ends none."""
    charsmap: bytes = b""
    """Table of SentencePiece that maps characters."""
    strips: bool = False
    """Whether spaces after special tokens are dropped, as Phi-3 wants it."""
    templates: dict[str, str] = field(default_factory=dict)
    """Chat templates by name. "default" is used if no other is asked for."""
    warnings: list[str] = field(default_factory=list)


def read_vocabulary(source: Path, size: int, config: Json) -> Vocabulary:
    """Reads a model directory's tokenizer, padded to `size` tokens.

    Args:
        source: directory with tokenizer.json, and whatever other files say of its tokenizer.
        size: rows of the embedding.
        config: the model's config.json, for special ids that the tokenizer does not name.

    Raises:
        RequestError: no tokenizer.json, or one that llama.cpp cannot follow.
        Failure: the tokenizer has ids that the embedding has no rows for.
    """
    tokenizer = _read_tokenizer(source)
    settings = read_json(source / "tokenizer_config.json") if (source / "tokenizer_config.json").is_file() else {}
    model = tokenizer["model"]
    added = tokenizer.get("added_tokens") or []
    beyond = [one["content"] for one in added if one["id"] >= size]  # such as the place of an image in a text model
    tokenizer["added_tokens"] = [one for one in added if one["id"] < size]
    if model["type"] == "BPE":
        model["vocab"] = {text: index for text, index in model["vocab"].items() if text not in beyond}
    tokens, types = _tokens(tokenizer, size, source)
    ids = _special_ids(settings, config, tokens)
    add_bos, add_eos = _adds(tokenizer, settings, ids)
    vocabulary = Vocabulary("gpt2", tokens, types, ids, add_bos, add_eos, templates=chat_templates(source))
    vocabulary.strips, vocabulary.warnings = _stripping(tokenizer, tokens)
    vocabulary.warnings += _add_ends(vocabulary, ends(source))
    if vocabulary.templates and DEFAULT not in vocabulary.templates:
        vocabulary.warnings.append(
            f"the model has no chat template called {DEFAULT}, only {', '.join(vocabulary.templates)}: "
            "llama.cpp uses one of its own unless it gets a name"
        )
    if beyond:
        named = ", ".join(beyond[:3])
        vocabulary.warnings.append(f"the model has no rows for {len(beyond)} tokens, which are left out: {named}")
    if model["type"] == "Unigram":
        _add_unigram(vocabulary, tokenizer)
        return vocabulary
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        vocabulary.model = "llama"
        vocabulary.scores, gaps = _scores(tokenizer, merges, size)
        vocabulary.add_space_prefix, warnings = _space_prefix(tokenizer)
        vocabulary.warnings += warnings
        if gaps:
            vocabulary.warnings.append(
                f"llama.cpp joins any two pieces that form a token; {gaps} such pairs are not in this tokenizer's "
                "merges, so some texts may be split otherwise"
            )
    else:
        _check_normalizer(tokenizer)
        vocabulary.pre, vocabulary.merges = name_of(tokenizer), merges
        if TABLE[vocabulary.pre].ignore_merges != bool(model.get("ignore_merges")):
            vocabulary.warnings.append(
                f"llama.cpp's {vocabulary.pre} tokenizer treats whole words that are tokens otherwise (ignore_merges)"
            )
        if differs := TABLE[vocabulary.pre].differs:
            vocabulary.warnings.append(
                f"llama.cpp approximates the {vocabulary.pre} tokenizer: it splits {differs} otherwise"
            )
    return vocabulary


def _read_tokenizer(folder: Path) -> Json:
    tokenizer = read_tokenizer(folder)
    kind = tokenizer["model"]["type"]
    if kind not in ("BPE", "Unigram"):
        raise RequestError(f"{folder / FILE} is of kind {kind}; GGUF export knows BPE and Unigram tokenizers")
    return tokenizer


def _tokens(tokenizer: Json, size: int, source: Path) -> tuple[list[str], list[int]]:
    """Returns the text and the GGUF type of every row of the embedding."""
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    vocab = vocabulary_of(model)
    texts = {index: token for token, index in vocab.items()} | {one["id"]: one["content"] for one in added}
    if max(texts) >= size:
        raise Failure(f"{source}: tokenizer.json has token {max(texts)}, but the embedding has only {size} rows")
    types = [UNUSED] * size
    for index, text in texts.items():
        types[index] = BYTE if model.get("byte_fallback") and _BYTE.fullmatch(text) else NORMAL
    for one in added:
        spaces = bool(model.get("byte_fallback")) and set(one["content"]) == {_SPACE}
        # llama.cpp turns ▁ back into spaces in tokens of the model only, so Gemma's runs of them are such
        types[one["id"]] = CONTROL if one["special"] else NORMAL if spaces else USER_DEFINED
    unknown = model["unk_id"] if model["type"] == "Unigram" else vocab.get(model.get("unk_token"))
    if unknown is not None and (model.get("byte_fallback") or model["type"] == "Unigram"):
        types[unknown] = UNKNOWN
    return [texts.get(index, f"[PAD{index}]") for index in range(size)], types


def _stripping(tokenizer: Json, tokens: list[str]) -> tuple[bool, list[str]]:
    """Returns whether special tokens strip what follows, as llama.cpp does for Phi-3, and which of them do not."""
    added = tokenizer.get("added_tokens", [])
    strip = [one["content"] for one in added if one.get("lstrip") or one.get("rstrip")]
    plain = {"<unk>", "<s>", "<|endoftext|>"}
    left = any(one.get("lstrip") for one in added)
    if not left and {*plain, "</s>"} <= set(tokens) and set(strip) == {one["content"] for one in added} - plain:
        return True, []
    return False, [f"llama.cpp keeps the spaces around {strip[0]}, which this tokenizer drops"] if strip else []


def _special_ids(settings: Json, config: Json, tokens: list[str]) -> dict[str, int]:
    ids = {}
    for name in _NAMES:
        token = settings.get(f"{name}_token")
        text = token["content"] if isinstance(token, dict) else token
        index = config.get(f"{name}_token_id")
        if text in tokens:
            ids[name] = tokens.index(text)
            continue
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(index, int) and 0 <= index < len(tokens):
            ids[name] = index
    return ids


def _adds(tokenizer: Json, settings: Json, ids: dict[str, int]) -> tuple[bool, bool]:
    """Returns whether encoding a text puts BOS first and EOS last, as in transformers 5.

    tokenizer_config.json has priority over the post-processor of tokenizer.json.
    """
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_str(json.dumps({**tokenizer, "padding": None, "truncation": None})).encode("a").ids
    bos, eos = ids.get("bos"), ids.get("eos")
    by_template = (bos is not None and encoded[:1] == [bos], eos is not None and encoded[-1:] == [eos])
    if "add_bos_token" in settings or "add_eos_token" in settings:
        wanted = bool(settings.get("add_bos_token")), bool(settings.get("add_eos_token"))
        return wanted[0] and bos is not None, wanted[1] and eos is not None
    return by_template


def _add_ends(vocabulary: Vocabulary, ends: list[int]) -> list[str]:
    """Puts the ends of a text beyond EOS where llama.cpp looks for them: end of turn, then end of message.

    Returns:
        Notes for the person on ends that have no place.
    """
    size = len(vocabulary.tokens)
    further = [index for index in ends if index != vocabulary.ids.get("eos") and 0 <= index < size]
    message = [index for index in further if vocabulary.tokens[index] in _MESSAGE_ENDS]
    turn = sorted((i for i in further if i not in message), key=lambda i: not _TURN_ENDS.search(vocabulary.tokens[i]))
    placed = dict(zip(("eot", "eom"), [*turn[:1], *message[:1], *turn[1:], *message[1:]], strict=False))
    if message and not turn:
        placed = {"eom": message[0]}
    vocabulary.ids |= placed
    # llama.cpp knows some names of ends by itself, whatever the file says
    left = [vocabulary.tokens[i] for i in further if i not in placed.values()]
    if unknown := [token for token in left if token not in _KNOWN_ENDS]:
        return [f"llama.cpp has no place for {len(unknown)} of the tokens that end a text: {', '.join(unknown[:3])}"]
    return []


def _check_normalizer(tokenizer: Json) -> None:
    """Refuses a normalizer other than NFC, which llama.cpp leaves out for every model that has it."""
    normalizer = tokenizer.get("normalizer") or {"type": "NFC"}
    if normalizer["type"] != "NFC" and normalizer != {"type": "Sequence", "normalizers": []}:
        raise RequestError(f"tokenizer.json has a {normalizer['type']} normalizer; llama.cpp has none here")


def _scores(tokenizer: Json, merges: list[str], size: int) -> tuple[list[float], int]:
    """Returns scores by which joining the best-scored neighbours follows the merges, and the number of wrong pairs.

    The earlier a token's first merge, the better its score. The scores of tokenizer.model give the same order, because
    the merges were made from them.
    """
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    added = {one["content"] for one in tokenizer.get("added_tokens", [])}
    pairs = {tuple(merge.split(" ", 1)) for merge in merges}
    scores = [-float(len(merges))] * size
    for rank in range(len(merges) - 1, -1, -1):
        scores[vocab[merges[rank].replace(" ", "", 1)]] = -float(rank)
    gaps = sum(
        (token[:cut], token[cut:]) not in pairs
        for token in vocab
        if token not in added and not _BYTE.fullmatch(token)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    )
    return scores, gaps


def _space_prefix(tokenizer: Json) -> tuple[bool, list[str]]:
    """Returns whether a space is put before a text, and what llama.cpp does differently."""
    steps = _flat(tokenizer.get("normalizer"), "normalizers") + _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")
    prefix, escaped, warnings = False, False, []
    for step in steps:
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                escaped = True
            case {"type": "Split", "pattern": {"String": " "}} if escaped:
                pass  # no space is left to split at
            case {"type": "Metaspace", "replacement": "▁"}:
                prefix = step.get("prepend_scheme", "always") != "never"
                warnings += _metaspace_warnings(step, list(tokenizer["model"]["vocab"]))
            case _:
                raise RequestError(f"tokenizer.json has the step {step['type']}, which llama.cpp's SPM tokenizer lacks")
    return prefix, warnings


def _add_unigram(vocabulary: Vocabulary, tokenizer: Json) -> None:
    """Fills in what llama.cpp needs for a unigram model, and says where it will differ.

    Raises:
        RequestError: llama.cpp has nothing for a step.
    """
    model = tokenizer["model"]
    if model.get("byte_fallback"):
        raise RequestError(
            "tokenizer.json is a Unigram model with byte_fallback, which llama.cpp's unigram model lacks"
        )
    if model.get("unk_id") is None:
        raise RequestError("tokenizer.json is a Unigram model without unk_id, which llama.cpp's unigram model needs")
    scores = [float(score) for _, score in model["vocab"]]
    vocabulary.model, vocabulary.pre = "t5", "default"
    vocabulary.ids["unk"] = model["unk_id"]
    vocabulary.scores = scores + [_NEVER] * (len(vocabulary.tokens) - len(scores))
    stripped = False
    for step in _flat(tokenizer.get("normalizer"), "normalizers"):
        match step:
            case {"type": "Precompiled", "precompiled_charsmap": table}:
                vocabulary.charsmap = base64.b64decode(table or "")
            case {"type": "Strip", "strip_right": True}:
                stripped = True
            case {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " " | "▁"}:
                vocabulary.merge_spaces = True
            case _:
                raise RequestError(f"tokenizer.json has the step {step['type']}, which llama.cpp's unigram model lacks")
    warnings = vocabulary.warnings
    if stripped and not vocabulary.charsmap:
        warnings.append("llama.cpp drops no other whitespace than the space where a text ends")
    for step in _flat(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        match step:
            case {"type": "WhitespaceSplit"}:
                vocabulary.merge_spaces, stripped = True, True
                if not vocabulary.charsmap:
                    warnings.append("llama.cpp takes no other whitespace than the space for a border of words")
            case {"type": "Metaspace", "replacement": "▁"}:
                vocabulary.add_space_prefix = step.get("prepend_scheme", "always") != "never"
                warnings += _metaspace_warnings(step, vocabulary.tokens)
            case _:
                raise RequestError(f"tokenizer.json has the step {step['type']}, which llama.cpp's unigram model lacks")
    if vocabulary.merge_spaces and not stripped:
        warnings.append("llama.cpp drops the spaces that a text ends with")
    if vocabulary.add_space_prefix and not vocabulary.merge_spaces:
        warnings.append("llama.cpp puts a space also before text that begins with one")


def _metaspace_warnings(step: Json, tokens: list[str]) -> list[str]:
    warnings = []
    if step.get("prepend_scheme", "always") == "first":
        warnings.append("llama.cpp also puts a space before text that follows a special token")
    if step.get("split", True) and any(_SPACE in token[1:] for token in tokens):
        warnings.append("llama.cpp also uses tokens that span words, which this tokenizer does not")
    return warnings


def _flat(step: Json | None, key: str) -> list[Any]:
    if step is None:
        return []
    return [one for part in step[key] for one in _flat(part, key)] if step["type"] == "Sequence" else [step]
