"""Each kind of tokenizer on 500 hard strings: llama.cpp's ids against those of the `tokenizers` library."""

import base64
import itertools
import json
import random
import struct
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from lighten.errors import RequestError
from lighten.evaluate.runtimes.gguf_tokenizer import GgufTokenizer
from lighten.export.gguf import write as export
from lighten.export.gguf.tokenizer import read_vocabulary
from lighten.model.tokenizer_table import TABLE
from tests.conftest import TEXT, byte_level, sentencepiece
from tests.export.gguf.test_tokenizer import HARD, LEFT_OUT

Json = dict[str, Any]
Tiny = Callable[..., Path]

PIECES = [
    *(
        "the",
        "Then",
        "WE'LL",
        "don't",
        "_x1",
        "café",
        "naïve",
        "İstanbul",
        "Straße",
        "ﬁ",
        "e\u0301",
        "ก่อน",
        "हिन्दी",
        "عربى",
    ),
    *(
        "日本語",
        "한국어",
        "Здравствуй",
        "Σίσυφος",
        "👩‍👩‍👧",
        "🏳️‍🌈",
        "🇩🇪",
        "½",
        "Ⅷ",
        "٣٤٥",
        "1",
        "2026",
        "3.14159",
        "1e-5",
    ),
    *(
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u3000",
        "\u200b",
        "\u200d",
        "\ufeff",
        "\x00",
        "\x1b[0m",
        "\x7f",
    ),
    *(
        "def f(x):\n    return",
        "{}[]()",
        "!=",
        "<=>",
        "//",
        "/* */",
        "#!/bin/sh",
        "\\n",
        "$",
        "^_^",
        "—",
        "…",
        "“”",
        "▁",
    ),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "<s>", "</s>", "<unk>", "<|im", "<0x0A>", "𝔘𝔫𝔦", "￿"),
]


def hard_strings() -> list[str]:
    """Returns 500 strings: the known hard ones, and seeded mixtures of what is hard."""
    draw = random.Random(7)
    mixed = ["".join(draw.choices(PIECES, k=draw.randint(1, 12))) for _ in range(400)]
    points = [(32, 127), (0xA0, 0x250), (0x370, 0x530), (0x900, 0x980), (0x4E00, 0x4F00), (0x1F300, 0x1F600)]
    chance = [
        "".join(chr(draw.randrange(*draw.choice(points))) for _ in range(draw.randint(1, 30))) for _ in range(100)
    ]
    return [*HARD, *mixed, *chance][:500]


def gemma() -> Json:
    """Returns a tokenizer.json as Gemma has it: no space before the text, and a split that finds nothing."""
    made = sentencepiece()
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {**made, "normalizer": replace, "pre_tokenizer": split}


def charsmap(table: dict[bytes, bytes]) -> str:
    """Returns SentencePiece's precompiled table: a double array of prefixes, then what they become."""
    replacements, places = b"", {}
    for key, value in table.items():
        places[key] = len(replacements)
        replacements += value + b"\0"
    prefixes = sorted({key[:length] for key in table for length in range(len(key))})
    blocks = {prefix: 256 * number for number, prefix in enumerate(prefixes)}
    leaves = {key: 256 * (len(prefixes) + number) for number, key in enumerate(table)}
    units = [0] * (256 * (len(prefixes) + len(table)))
    units[0] = blocks[b""] << 10
    for prefix in [*prefixes[1:], *table]:
        at = blocks[prefix[:-1]] ^ prefix[-1]
        below = leaves[prefix] if prefix in table else blocks[prefix]
        units[at] = ((at ^ below) << 10) | (256 if prefix in table else 0) | prefix[-1]
    for key, place in leaves.items():
        units[place] = places[key] | 1 << 31
    return base64.b64encode(struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + replacements).decode()


TO_SPACE = dict.fromkeys((b"\t", b"\n", b"\r", "\u00a0".encode(), "\u3000".encode(), "\u2003".encode()), b" ")


def unigram(*, merging: bool = True, prefix: bool = True, table: dict[bytes, bytes] | None = None) -> Json:
    """Returns a trained Unigram tokenizer.json, as transformers makes it of T5's (without T5's table)."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never")
    if merging:
        trained.normalizer = normalizers.Sequence(
            [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
        )
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(TEXT.splitlines(), trainer)
    trained.add_tokens([AddedToken("<think>", normalized=False)])
    made: Json = json.loads(trained.to_str())
    if table:
        first = {"type": "Precompiled", "precompiled_charsmap": charsmap(table)}
        made["normalizer"]["normalizers"].insert(0, first)
    return made


KINDS: dict[str, Callable[[], Json]] = {
    **{f"bpe {name}": lambda name=name: byte_level(name) for name in TABLE},  # type: ignore[misc]
    "spm": sentencepiece,
    "spm of gemma": gemma,
    "unigram": lambda: unigram(table={**TO_SPACE, "ﬁ".encode(): b"fi", "½".encode(): b"1/2"}),
    "unigram without prefix": lambda: unigram(merging=False, prefix=False),
}


@pytest.fixture(scope="session")
def blank(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Json], Path]:
    """Returns a function that makes a GGUF file with a tokenizer and hardly any weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(tokenizer: Json) -> Path:
        folder = tmp_path_factory.mktemp("tokenizer")
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        names = {"unk_token": "<unk>", "eos_token": "</s>"} if tokenizer["model"]["type"] == "Unigram" else {}
        (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, **names}))
        size = Tokenizer.from_str(json.dumps(tokenizer)).get_vocab_size()
        config = LlamaConfig(
            vocab_size=size + 3, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        export.write(folder, folder / "m.gguf")
        return folder / "m.gguf"

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_500_hard_strings(blank: Callable[[Json], Path], kind: str) -> None:
    made = KINDS[kind]()
    ours, theirs = (
        Tokenizer.from_str(json.dumps(made)),
        GgufTokenizer(blank(made)),
    )
    texts = hard_strings()
    tried = [text for text in texts if not left_out(text, kind)]
    wrong = [text for text in tried if theirs.encode(text) != ours.encode(text, add_special_tokens=False).ids]
    assert len(texts) == 500
    assert wrong == []
    assert len(tried) > (250 if kind.removeprefix("bpe ") in LEFT_OUT else 450)


def left_out(text: str, kind: str) -> bool:
    """Returns whether a string is one that the two are known to split otherwise."""
    if kind == "unigram":
        # the table of `tokenizers` goes by clusters, and takes what joins a replaced character away with it; and a
        # text that begins with the mark of a space gets no space put before it there
        marks = any(
            one in "ﬁ½\u00a0\u2003\u3000" and unicodedata.category(two) in ("Mn", "Mc", "Cf")
            for one, two in itertools.pairwise(text)
        )
        return marks or "▁" in text
    name = kind.removeprefix("bpe ")
    if name in ("tekken", "gpt-4o") and any(unicodedata.category(one).startswith("M") for one in text):
        return True
    return bool(set(text) & {*LEFT_OUT.get(name, ""), *("\u200d" if name in LEFT_OUT else "")})


def test_says_what_a_unigram_model_lacks(tmp_path: Path) -> None:
    def read(**changes: Any) -> Any:
        made = unigram()
        model = {**made["model"], **{key: changes.pop(key) for key in ("unk_id", "byte_fallback") if key in changes}}
        (tmp_path / "tokenizer.json").write_text(json.dumps({**made, **changes, "model": model}))
        return read_vocabulary(tmp_path, 700, {})

    found = read()
    assert (found.model, found.merge_spaces, found.add_space_prefix) == ("t5", True, True)
    assert found.types[:4] == [3, 3, 2, 1]
    assert found.ids["unk"] == 2
    assert "no other whitespace than the space" in found.warnings[0]
    with pytest.raises(RequestError, match="the step NFKC"):
        read(normalizer={"type": "NFKC"})
    with pytest.raises(RequestError, match="the step Digits"):
        read(pre_tokenizer={"type": "Digits", "individual_digits": True})
    with pytest.raises(RequestError, match="byte_fallback"):
        read(byte_fallback=True)
    with pytest.raises(RequestError, match="unk_id"):
        read(unk_id=None)


def test_other_kinds_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {}}}))
    with pytest.raises(RequestError, match="of kind WordPiece; GGUF export knows BPE and Unigram"):
        read_vocabulary(tmp_path, 10, {})


def test_spaces_that_special_tokens_drop_are_told(tmp_path: Path) -> None:
    made = sentencepiece()
    for one in made["added_tokens"]:
        one["rstrip"] = one["content"] == "</s>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    assert "keeps the spaces around </s>" in read_vocabulary(tmp_path, 1000, {}).warnings[0]
    made = json.loads(json.dumps(made))
    made["added_tokens"].append({**made["added_tokens"][0], "id": 990, "content": "<|endoftext|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    found = read_vocabulary(tmp_path, 1000, {})
    assert found.strips
    assert found.warnings == []


def test_metadata_of_a_unigram_model(blank: Callable[[Json], Path]) -> None:
    fields = gguf.GGUFReader(blank(KINDS["unigram"]())).fields
    assert fields["tokenizer.ggml.model"].contents() == "t5"
    assert fields["tokenizer.ggml.remove_extra_whitespaces"].contents() is True
    assert len(fields["tokenizer.ggml.precompiled_charsmap"].contents()) > 1000
