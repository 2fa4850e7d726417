"""An export reads the built-in text where it can, and says what it does without."""

from collections.abc import Callable
from pathlib import Path

from lighten.export.text import built_in
from lighten.model.checkpoint import Checkpoint
from lighten.step import Context


def test_a_text_is_read_or_a_warning_says_what_is_done_without(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source, context = tiny("llama"), Context()
    facts = Checkpoint(source).facts
    ids = built_in(source, facts, (2, 16), context, "nothing was done")
    assert ids is not None
    assert ids.shape == (2, 16)
    assert context.warnings == []
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    assert built_in(tmp_path, facts, (2, 16), context, "nothing was done") is None
    (said,) = context.warnings
    assert said.startswith("nothing was done, as no text could be read: ")
