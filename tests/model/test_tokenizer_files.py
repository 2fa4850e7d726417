"""A tokenizer and its chat templates, wherever a model directory keeps them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lighten.errors import Failure, RequestError
from lighten.model import source, tokenizer_files
from lighten.model.checkpoint import Checkpoint
from lighten.model.tokens import load_tokenizer
from lighten.step import Context
from lighten.store.artifact import Artifact

Tiny = Callable[..., Path]
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
NEW = ("<valve>", "<gauge>")


@pytest.fixture
def model(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny(**SMALL), tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    value = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**value, **changes}))


def in_settings(folder: Path, first: int) -> None:
    decoder = {str(first + at): {"content": token, "special": False} for at, token in enumerate(NEW)}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=decoder)


def in_added_tokens(folder: Path, first: int) -> None:
    edit(folder / "added_tokens.json", **{token: first + at for at, token in enumerate(NEW)})


def in_the_special_map(folder: Path, first: int) -> None:
    edit(folder / "special_tokens_map.json", additional_special_tokens=list(NEW))


def as_named_tokens(folder: Path, first: int) -> None:
    edit(folder / "tokenizer_config.json", pad_token=NEW[0], mask_token=NEW[1])


@pytest.mark.parametrize("place", [in_settings, in_added_tokens, in_the_special_map, as_named_tokens])
def test_tokens_beside_tokenizer_json_are_read_as_transformers_reads_them(
    model: Path, place: Callable[[Path, int], None]
) -> None:
    first = load_tokenizer(model).get_vocab_size()
    place(model, first)
    text = "turn the <valve> and read the <gauge>\n<|im_end|>"
    expected = AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"]
    assert load_tokenizer(model).encode(text, add_special_tokens=False).ids == expected
    assert {first, first + 1} <= set(expected)


def test_the_copy_of_a_source_has_one_whole_tokenizer(model: Path, tmp_path: Path) -> None:
    first = load_tokenizer(model).get_vocab_size()
    before = step(model).key_config()
    in_settings(model, first)
    out = tmp_path / "out"
    out.mkdir()
    step(model).run(Artifact(model, {"format": "hf"}), out, Context())
    assert {"id": first, "content": "<valve>"}.items() <= json.loads((out / "tokenizer.json").read_text())[
        "added_tokens"
    ][-2].items()
    assert tokenizer_files.is_whole(out)
    assert step(model).key_config() == {**before, "tokens": 2}  # what was made without them is another


def step(model: Path) -> source.Source:
    return source.Source(model="m", path=str(model), format="directory", identity="i")


@pytest.mark.parametrize(("shift", "why"), [(7, "where it gets"), (-3, "which is")])
def test_an_id_that_a_token_cannot_have_is_refused_with_what_to_do(model: Path, shift: int, why: str) -> None:
    in_settings(model, load_tokenizer(model).get_vocab_size() + shift)
    with pytest.raises(RequestError, match=rf"'<valve>' the id \d+, {why}.*save the tokenizer again: python -c"):
        load_tokenizer(model)


def test_a_directory_with_a_sentencepiece_file_only_is_told_how_to_convert_it(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    with pytest.raises(RequestError, match=r"no tokenizer.json; write one once: python -c"):
        load_tokenizer(model)
    (model / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(RequestError, match=r"only a tokenizer.model.*pip install sentencepiece .*save_pretrained"):
        load_tokenizer(model)


def test_templates_are_found_in_all_four_places(model: Path) -> None:
    read = tokenizer_files.chat_templates
    edit(model / "tokenizer_config.json", chat_template=None)
    assert read(model) == {}
    edit(model / "chat_template.json", chat_template="of a processor")
    assert read(model) == {"default": "of a processor"}
    edit(
        model / "tokenizer_config.json",
        chat_template=[{"name": "tool_use", "template": "tools"}, {"name": "rag", "template": "documents"}],
    )
    assert read(model) == {"default": "of a processor", "rag": "documents", "tool_use": "tools"}
    (model / "chat_template.jinja").write_text("its own")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/rag.jinja").write_text("other documents")
    assert list(read(model).items()) == [("default", "its own"), ("rag", "other documents"), ("tool_use", "tools")]


def test_templates_are_written_where_they_are_read_and_nowhere_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    given = {"default": "first", "rag": "second", "../../up": "third"}
    tokenizer_files.write_templates(given, out)
    assert tokenizer_files.chat_templates(out) == {"default": "first", "______up": "third", "rag": "second"}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out"]


def test_further_templates_are_copied_and_part_of_the_identity(model: Path, tmp_path: Path) -> None:
    plain = source.find(str(model)).identity
    (model / "additional_chat_templates").mkdir()
    file = model / "additional_chat_templates/tool_use.jinja"
    file.write_text("tools")
    first = source.find(str(model)).identity
    file.write_text("other tools")
    assert len({plain, first, source.find(str(model)).identity}) == 3
    out, later = tmp_path / "out", tmp_path / "later"
    for folder in (out, later):
        folder.mkdir()
    step(model).run(Artifact(model, {"format": "hf"}), out, Context())
    Checkpoint(out).write_others(later, {})
    assert (later / "additional_chat_templates/tool_use.jinja").read_text() == "other tools"


def test_ends_are_those_of_the_generation_config(model: Path) -> None:
    assert tokenizer_files.ends(model) == [2]
    edit(model / "generation_config.json", eos_token_id=[2, 0, 2])
    assert tokenizer_files.ends(model) == [2, 0]
    edit(model / "generation_config.json", eos_token_id=None)
    assert tokenizer_files.ends(model) == [2]


def test_damaged_files_are_named(model: Path) -> None:
    (model / "added_tokens.json").write_text("[1")
    with pytest.raises(Failure, match=r"added_tokens.json is damaged \(not readable JSON"):
        load_tokenizer(model)
