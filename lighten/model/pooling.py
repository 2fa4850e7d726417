"""How an embedding model makes one vector of a text: the mean of its states, or the first one."""

from __future__ import annotations

import shutil
from pathlib import Path

from lighten.model.files import inside, read_json

FILE = "1_Pooling/config.json"
"""Where sentence-transformers says it."""


def takes_first(model: Path) -> bool:
    """Returns whether the embeddings of a model are the states of the first token."""
    file = (model if model.is_dir() else model.parent) / FILE
    return file.is_file() and bool(read_json(file).get("pooling_mode_cls_token"))


def copy_pooling(source: Path, out: Path) -> None:
    """Copies what a directory says of it, if it does."""
    file = source / FILE
    if file.is_file():
        (out / FILE).parent.mkdir(exist_ok=True)
        shutil.copyfile(inside(file, source), out / FILE)
