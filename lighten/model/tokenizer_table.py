"""The table between llama.cpp's `tokenizer.ggml.pre` names and the `pre_tokenizer` of a tokenizer.json.

A GGUF file names the rule that cuts text into words before byte-level BPE. A tokenizer.json spells the rule out. The
names are those of `src/llama-vocab.cpp` in llama.cpp. If that file only approximates a rule, the table has the original
rule, and `differs` says what llama.cpp does instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lighten.errors import RequestError

Json = dict[str, Any]

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CONTRACTIONS_SPELLED = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
)


def _split(regex: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _byte_level(use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_DIGITS: Json = {"type": "Digits", "individual_digits": True}


@dataclass(frozen=True)
class Pre:
    """One pre-tokenizer: the steps of its JSON, and llama.cpp's settings for its name."""

    steps: tuple[Json, ...]
    ignore_merges: bool = False
    """Whether a word that is in the vocabulary is taken whole, whatever the merges say."""
    add_bos: bool = False
    """Whether llama.cpp puts BOS first if the file does not say."""
    nfc: bool = False
    """Whether the original tokenizers normalize to NFC. llama.cpp does not."""
    aliases: tuple[str, ...] = ()
    """Other names of the same rule."""
    differs: str = ""
    """Texts that llama.cpp cuts differently from the rule."""

    def json(self) -> Json:
        """Returns the `pre_tokenizer` entry of a tokenizer.json."""
        return dict(self.steps[0]) if len(self.steps) == 1 else {"type": "Sequence", "pretokenizers": list(self.steps)}


_MARKS = "words with combining marks, as in Hindi, Thai and Arabic"

TABLE: dict[str, Pre] = {
    "gpt-2": Pre((_byte_level(True),), aliases=("phi-2", "mpt", "olmo", "exaone4", "a.x-4.0", "mellum")),
    "smollm": Pre(
        (_DIGITS, _byte_level(True)),
        aliases=("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    ),
    "llama-bpe": Pre(
        (_split(_WORDS % "{1,3}"), _byte_level(False)),
        ignore_merges=True,
        add_bos=True,
        aliases=("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ),
    "smaug-bpe": Pre((_split(_WORDS % "{1,3}"), _byte_level(False)), aliases=("dbrx", "chatglm-bpe", "glm4")),
    "qwen2": Pre(
        (_split(_WORDS % ""), _byte_level(False)),
        nfc=True,
        aliases=("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open"),
    ),
    "qwen35": Pre(
        (
            _split(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _TAIL),
            _byte_level(False),
        ),
        nfc=True,
    ),
    "deepseek-v3": Pre(
        (
            _split(r"\p{N}{1,3}"),
            _split("[一-龥぀-ゟ゠-ヿ]+"),
            _split(
                r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
                + r"| ?[\p{P}\p{S}]+[\r\n]*"
                + _TAIL
            ),
            _byte_level(False),
        ),
        aliases=("hunyuan-dense", "joyai-llm"),
    ),
    "tekken": Pre(
        (_split(_CASED % ("", "", "")), _byte_level(False)), ignore_merges=True, add_bos=True, differs=_MARKS
    ),
    "gpt-4o": Pre(
        (_split(_CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?", "{1,3}")), _byte_level(False)),
        aliases=("llama4", "kanana2", "minimax-m2"),
        differs=_MARKS,
    ),
    "deepseek-coder": Pre(
        (
            _split("[\r\n]"),
            _split(r"\s?\p{L}+"),
            _split(r"\s?\p{P}+"),
            _split("[一-龥ࠀ-一가-퟿]+"),
            _DIGITS,
            _byte_level(False),
        ),
        differs="runs of spaces that are not ASCII",
    ),
}


def known() -> str:
    """Returns the names of the table, for a message."""
    return ", ".join(TABLE)


def by_name(name: str) -> Pre:
    """Returns the pre-tokenizer that a GGUF file names.

    Raises:
        RequestError: the name is not in the table.
    """
    for canonical, pre in TABLE.items():
        if name == canonical or name in pre.aliases:
            return pre
    if not name:
        raise RequestError(
            "the GGUF file does not name its pre-tokenizer (tokenizer.ggml.pre), so nobody can tell how it splits "
            "text: export the model again, or give the model that it was made from"
        )
    raise RequestError(f"the GGUF file has the pre-tokenizer {name!r}, which lighten does not know; known: {known()}")


def name_of(tokenizer: Json) -> str:
    """Returns llama.cpp's name for the pre-tokenizer of a byte-level BPE tokenizer.json.

    Raises:
        RequestError: llama.cpp has no name for it, or the table does not.
    """
    found = _shape(_steps(tokenizer.get("pre_tokenizer")))
    names = [name for name, pre in TABLE.items() if _shape(pre.steps) == found]
    if not names:
        raise RequestError(
            f"tokenizer.json has a pre-tokenizer without a known llama.cpp name: {' then '.join(map(str, found))}; "
            f"known: {known()}"
        )
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    return next((name for name in names if TABLE[name].ignore_merges == ignore_merges), names[0])


def _steps(pre_tokenizer: Json | None) -> tuple[Json, ...]:
    if pre_tokenizer is None:
        return ()
    if pre_tokenizer["type"] == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in _steps(part))
    return (pre_tokenizer,)


def _shape(steps: tuple[Json, ...]) -> tuple[Any, ...]:
    """Reduces steps to the parts that determine how text is cut, in one spelling."""
    return tuple(_step_shape(step) for step in steps)


def _step_shape(step: Json) -> tuple[Any, ...]:
    match step["type"]:
        case "Split":
            regex = next(iter(step["pattern"].values())).replace(_CONTRACTIONS_SPELLED, _CONTRACTIONS)
            regex = regex.replace("\r", r"\r").replace("\n", r"\n")  # some files have the characters themselves
            # Every regex of the table matches all of a text, so dropping what lies between matches drops nothing.
            isolated = (step["behavior"], step["invert"]) in (("Isolated", False), ("Removed", True))
            return ("Split", regex, "Isolated" if isolated else (step["behavior"], step["invert"]))
        case "ByteLevel":
            return ("ByteLevel", step.get("add_prefix_space", True), step.get("use_regex", True))
        case "Digits":
            return ("Digits", step["individual_digits"])
        case name:
            return (name, *sorted((key, str(value)) for key, value in step.items() if key != "type"))


# GGUF token types
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_SPACE = "▁"
_Parts = tuple[Json | None, Json | None, Json, Json]
"""Normalizer, pre-tokenizer, decoder, and the parts of the model beside its vocabulary."""


def tokenizer_json(fields: Json) -> Json:
    """Builds the tokenizer.json that a GGUF file's metadata describes.

    Args:
        fields: the file's metadata, by key.

    Returns:
        The object to write as tokenizer.json. Trailing tokens that only pad the vocabulary are left out.

    Raises:
        RequestError: no tokenizer in the file, or another model than byte-level BPE ("gpt2") and
            SentencePiece BPE ("llama"; with merges instead of scores it is "gemma4").
    """
    model = fields.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama", "gemma4"):
        raise RequestError(f"the GGUF file has a tokenizer model {model!r}; lighten reads gpt2, llama and gemma4")
    needed = ("tokens", "scores" if model == "llama" else "merges")
    if missing := [name for name in needed if f"tokenizer.ggml.{name}" not in fields]:
        raise RequestError(f"the GGUF file has a {model} tokenizer without tokenizer.ggml.{missing[0]}")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = list(fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens))
    count = len(tokens)
    while count and types[count - 1] == UNUSED and tokens[count - 1] == f"[PAD{count - 1}]":
        count -= 1
    vocab = {token: index for index, token in enumerate(tokens[:count])}
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[index] != USER_DEFINED,
        }
        for token, index in vocab.items()
        if types[index] in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    build = _byte_level_parts if model == "gpt2" else _sentencepiece_parts
    normalizer, pre_tokenizer, decoder, model = build(fields, vocab, types)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _template(fields, tokens),
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "vocab": vocab,
            **model,
        },
    }


def _byte_level_parts(fields: Json, vocab: dict[str, int], types: list[int]) -> _Parts:
    pre = by_name(fields.get("tokenizer.ggml.pre") or "")
    model = {
        "unk_token": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": pre.ignore_merges,
        "merges": [merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]],
    }
    return {"type": "NFC"} if pre.nfc else None, pre.json(), _byte_level(True), model


def _sentencepiece_parts(fields: Json, vocab: dict[str, int], types: list[int]) -> _Parts:
    prefix = fields.get("tokenizer.ggml.add_space_prefix", fields["tokenizer.ggml.model"] == "llama")
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    unescape = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = next((token for token, index in vocab.items() if types[index] == UNKNOWN), None)
    model = {
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "merges": _merges_of_scores(vocab, types, fields["tokenizer.ggml.scores"])
        if fields["tokenizer.ggml.model"] == "llama"
        else [_pair(merge) for merge in fields["tokenizer.ggml.merges"]],
    }
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, escape]}
    decoder = {"type": "Sequence", "decoders": [unescape, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}
    return prepend if prefix else escape, None, decoder, model


def _pair(merge: str) -> list[str]:
    """Returns the two tokens of a merge. The space between them is the first after a character."""
    cut = merge.index(" ", 1)
    return [merge[:cut], merge[cut + 1 :]]


def _merges_of_scores(vocab: dict[str, int], types: list[int], scores: list[float]) -> list[list[str]]:
    """Returns the merges, best first, that are equal to joining the neighbours with the best scores."""
    merges = [
        (-scores[index], index, vocab[token[:cut]], vocab[token[cut:]], token[:cut], token[cut:])
        for token, index in vocab.items()
        if types[index] == NORMAL
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    return [[left, right] for *_, left, right in sorted(merges)]


def adds(fields: Json) -> tuple[bool, bool]:
    """Returns whether the tokenizer of a GGUF file puts BOS first and EOS last, by llama.cpp's defaults."""
    bos = fields["tokenizer.ggml.model"] != "gpt2" or by_name(fields.get("tokenizer.ggml.pre") or "").add_bos
    return (
        bool(fields.get("tokenizer.ggml.add_bos_token", bos)),
        bool(fields.get("tokenizer.ggml.add_eos_token", False)),
    )


def _template(fields: Json, tokens: list[str]) -> Json | None:
    wanted = [
        fields.get(f"tokenizer.ggml.{name}_token_id") if add else None
        for name, add in zip(("bos", "eos"), adds(fields), strict=True)
    ]
    if wanted == [None, None]:
        return {**_byte_level(True), "trim_offsets": False} if fields["tokenizer.ggml.model"] == "gpt2" else None
    halves: list[list[Json]] = []
    for sequence, type_id in (("A", 0), ("B", 1)):
        ends = [[{"SpecialToken": {"id": tokens[i], "type_id": type_id}}] if i is not None else [] for i in wanted]
        halves.append([*ends[0], {"Sequence": {"id": sequence, "type_id": type_id}}, *ends[1]])
    special = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in wanted if i is not None}
    return {"type": "TemplateProcessing", "single": halves[0], "pair": halves[0] + halves[1], "special_tokens": special}
