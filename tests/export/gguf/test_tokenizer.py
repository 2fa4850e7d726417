import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lighten.errors import Failure, RequestError
from lighten.evaluate.runtimes.gguf_tokenizer import GgufTokenizer
from lighten.export.gguf import write as export
from lighten.export.gguf.tokenizer import read_vocabulary
from lighten.model.tokenizer_table import TABLE
from tests.conftest import byte_level, sentencepiece, write_tokenizer

Tiny = Callable[..., Path]

HARD = [
    "",
    " ",
    "   ",
    "a",
    " a  b   c ",
    "\n\n\t\tx \r\n  y\n",
    "I've we'LL they'd DON'T 's 's",
    "12345 6 7.89 100,000.00%",
    "٣٤٥ ½ Ⅷ 一二三 1²⁵",
    "<|im_start|>user\nHi<think><|im_end|>\n<s> hey </s><unk>",
    "<|im_start",
    "naïve café résumé",
    "日本語テスト。भाषा ไทย عربى",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈",
    "a\u00a0b\u2003c\u3000d\u200b\u200d",
    "def f(x):\n    return x**2  # ok\n\n\n",
    "---====>>>$$\\\\//",
    "\x00\x01\x7f",
    "▁▁ _ ▁a",
    "𝔘𝔫𝔦 ﬀ ß İ ǅ",
]
PLAIN = " \n\tabcXYZ019.,'!-_éßñÉБвΣς½Ⅷ日本語한🙂▁€—"
MARKS = "हिन्दीไทยก่عربىَّ\u0301\u0308"
SPACES = "\u00a0\u2003\u3000\u200b\x85"
LEFT_OUT = {"tekken": MARKS, "gpt-4o": MARKS, "deepseek-coder": SPACES}
"""What the table says llama.cpp splits otherwise."""


@cache
def both(tiny: Tiny, pre: str, folder: Path) -> tuple[Tokenizer, Any]:
    source = tiny(pre=pre, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    file = folder / f"{pre}.gguf"
    export.write(source, file)
    return (
        Tokenizer.from_file(str(source / "tokenizer.json")),
        GgufTokenizer(file),
    )


@pytest.fixture(scope="session")
def vocab_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vocab")


@pytest.mark.parametrize("pre", [*TABLE, "spm"])
def test_llama_cpp_splits_hard_strings_alike(tiny: Tiny, vocab_folder: Path, pre: str) -> None:
    ours, theirs = both(tiny, pre, vocab_folder)
    for text in HARD:
        if not set(text) & set(LEFT_OUT.get(pre, "")):
            found = theirs.encode(text)
            assert found == ours.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("pre", [*TABLE, "spm"])
def test_llama_cpp_splits_any_text_alike(tiny: Tiny, vocab_folder: Path, pre: str) -> None:
    ours, theirs = both(tiny, pre, vocab_folder)
    alphabet = sorted(set(PLAIN + MARKS + SPACES) - set(LEFT_OUT.get(pre, "")))

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.text(alphabet=alphabet, max_size=40))
    def agree(text: str) -> None:
        found = theirs.encode(text)
        assert found == ours.encode(text, add_special_tokens=False).ids

    agree()


@pytest.mark.parametrize("pre", ["tekken", "gpt-4o", "deepseek-coder"])
def test_says_where_llama_cpp_approximates(tiny: Tiny, pre: str) -> None:
    source = tiny(pre=pre, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    warnings = read_vocabulary(source, 1010, {}).warnings
    assert len(warnings) == 1
    assert TABLE[pre].differs in warnings[0]


def changed(folder: Path, tokenizer: dict[str, Any], **parts: Any) -> Path:
    write_tokenizer(folder, {**tokenizer, **parts})
    return folder


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "'Whitespace'.*known: gpt-2, smollm, llama-bpe"),
        ({"pre_tokenizer": {**byte_level("gpt-2")["pre_tokenizer"], "add_prefix_space": True}}, "known: gpt-2"),
        ({"pre_tokenizer": None}, "known: gpt-2"),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
    ],
)
def test_refuses_what_llama_cpp_has_no_name_for(tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_vocabulary(changed(tmp_path, byte_level("gpt-2"), **parts), 1010, {})


def test_other_spellings_of_a_pre_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_level("llama-bpe")
    split = dict(tokenizer["pre_tokenizer"]["pretokenizers"][0])
    spelled = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    split["pattern"] = {"Regex": split["pattern"]["Regex"].replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", spelled)}
    split |= {"behavior": "Removed", "invert": True}
    pre = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]["pretokenizers"][1]]}
    assert read_vocabulary(changed(tmp_path, tokenizer, pre_tokenizer=pre), 1010, {}).pre == "llama-bpe"


def test_no_tokenizer_and_too_many_tokens(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no tokenizer\.json; write one once"):
        read_vocabulary(tmp_path, 1010, {})
    write_tokenizer(tmp_path, byte_level("gpt-2"))
    with pytest.raises(Failure, match="token 999, but the embedding has only 900 rows"):
        read_vocabulary(tmp_path, 900, {})


def test_sentencepiece_types_and_defaults(tmp_path: Path) -> None:
    size = write_tokenizer(tmp_path, sentencepiece())
    found = read_vocabulary(tmp_path, size + 2, {})
    assert found.model == "llama"
    assert found.types[:4] == [2, 3, 3, 6]
    assert found.types[258:260] == [6, 1]
    assert found.types[-2:] == [5, 5]
    assert found.tokens[-1] == f"[PAD{size + 1}]"
    assert (found.add_bos, found.add_eos, found.add_space_prefix) == (True, False, True)
    assert found.ids == {"bos": 1, "eos": 2, "unk": 0}
    assert found.warnings == []


def test_metaspace_and_missing_merges_are_told(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    model = {**tokenizer["model"], "merges": tokenizer["model"]["merges"][:-3]}
    source = changed(tmp_path, tokenizer, normalizer=None, pre_tokenizer=metaspace, model=model)
    warnings = "; ".join(read_vocabulary(source, 1010, {}).warnings)
    for part in ("3 such pairs", "follows a special token", "span words"):
        assert part in warnings
    with pytest.raises(RequestError, match="Digits"):
        digits = {"type": "Digits", "individual_digits": True}
        read_vocabulary(changed(tmp_path, tokenizer, pre_tokenizer=digits), 1010, {})


def test_bos_by_template_or_by_setting(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    special = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [special, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    changed(tmp_path, tokenizer, post_processor=template)
    settings_file = tmp_path / "tokenizer_config.json"
    plain = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    for setting, expected in (({}, True), ({"add_bos_token": False}, False), ({"add_bos_token": True}, True)):
        settings_file.write_text(json.dumps(plain | setting))
        assert read_vocabulary(tmp_path, 1010, {}).add_bos is expected


def test_chat_template_from_its_own_file(tmp_path: Path, tiny: Tiny) -> None:
    source = shutil.copytree(tiny(), tmp_path / "hf")
    (source / "chat_template.jinja").write_text("its own")
    assert read_vocabulary(source, 1010, {}).templates == {"default": "its own"}
    (source / "chat_template.jinja").unlink()
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_vocabulary(source, 1010, {"eos_token_id": [2, 1]}).templates["default"] == "yes"
    assert read_vocabulary(source, 1010, {"eos_token_id": [2, 1]}).ids == {"eos": 2}


def test_runs_of_spaces_that_were_added_are_decoded_as_spaces(tmp_path: Path, tiny: Tiny) -> None:
    source = shutil.copytree(tiny(pre="spm", hidden_size=32, intermediate_size=32, num_hidden_layers=1), tmp_path / "s")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    one = dict(tokenizer["added_tokens"][-1])
    for text in ("▁▁", "▁▁▁▁"):  # as Gemma has them: tokens of the model that are also added ones
        index = tokenizer["model"]["vocab"][text]
        tokenizer["added_tokens"].append({**one, "id": index, "content": text, "special": False, "normalized": False})
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    export.write(source, tmp_path / "m.gguf")
    theirs = Tokenizer.from_file(str(source / "tokenizer.json"))
    ours = GgufTokenizer(tmp_path / "m.gguf")
    for text in ("a  b", "a    b     c", "▁▁x"):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids).strip() == text.replace("▁", " ").strip(), text


def test_added_tokens_beyond_the_embedding_are_left_out(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    size = max(tokenizer["model"]["vocab"].values()) + 1
    image = {**tokenizer["added_tokens"][0], "id": size, "content": "<image_soft_token>"}
    found = read_vocabulary(changed(tmp_path, tokenizer, added_tokens=[*tokenizer["added_tokens"], image]), size, {})
    assert len(found.tokens) == size and "<image_soft_token>" not in found.tokens
    assert "no rows for 1 tokens, which are left out: <image_soft_token>" in found.warnings[0]


def test_special_ids_that_are_none_are_left_out(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, byte_level("gpt-2"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    for wrong in (-1, [], 10**9, None, "x"):
        assert read_vocabulary(tmp_path, 1010, {"pad_token_id": wrong, "bos_token_id": 1}).ids == {"bos": 1}


def test_padding_is_not_taken_for_an_end_of_text(tmp_path: Path) -> None:
    padding = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "</s>",
    }
    changed(tmp_path, sentencepiece(), padding=padding)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    found = read_vocabulary(tmp_path, 1010, {})
    assert (found.add_bos, found.add_eos) == (False, False)


def test_whole_words_that_are_treated_otherwise_are_told(tmp_path: Path) -> None:
    tokenizer = byte_level("qwen2")
    tokenizer["model"]["ignore_merges"] = not TABLE["qwen2"].ignore_merges
    write_tokenizer(tmp_path, tokenizer)
    assert "(ignore_merges)" in read_vocabulary(tmp_path, 1010, {}).warnings[0]
