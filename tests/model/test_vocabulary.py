"""Whether an id means the same to two models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lighten.export.gguf import write as export
from lighten.model import vocabulary

Tiny = Callable[..., Path]
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}


@pytest.mark.parametrize("pre", ["gpt-2", "spm"])
def test_an_export_has_the_vocabulary_of_its_source(tiny: Tiny, tmp_path: Path, pre: str) -> None:
    source = tiny(pre=pre, **SMALL)
    export.write(source, tmp_path / "m")  # the content tells what it is, not the name
    assert vocabulary.differing(source, tmp_path / "m") is None
    assert vocabulary.differing(tmp_path / "m", source) is None


def test_other_ids_and_other_words_are_told(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(**SMALL)
    assert vocabulary.differing(source, tiny(pre="spm", **SMALL))
    moved = Path(shutil.copytree(source, tmp_path / "moved"))
    value = json.loads((moved / "tokenizer.json").read_text())
    words = value["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (moved / "tokenizer.json").write_text(json.dumps(value))
    first = min(words["a"], words["b"])
    assert (
        vocabulary.differing(source, moved) == f"997 and 997 tokens, the first that differs is id {first}: 'a' and 'b'"
    )


def test_padding_and_added_tokens_are_no_difference(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(**SMALL)
    more = Path(shutil.copytree(source, tmp_path / "more"))
    (more / "added_tokens.json").write_text(json.dumps({"<valve>": vocabulary.read(source).size}))
    assert vocabulary.differing(source, more) is None
    assert vocabulary.read(more).size == vocabulary.read(source).size + 1


def test_a_vocabulary_that_goes_on_is_another(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(**SMALL)
    longer = Path(shutil.copytree(source, tmp_path / "longer"))
    value = json.loads((longer / "tokenizer.json").read_text())
    after = vocabulary.read(source).size
    value["model"]["vocab"]["zzzz"] = after
    (longer / "tokenizer.json").write_text(json.dumps(value))
    assert f"id {after}: none and 'zzzz'" in str(vocabulary.differing(source, longer))
