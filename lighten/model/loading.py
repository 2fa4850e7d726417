"""Loading with transformers. It takes every form of a directory, and leaves no weight random."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lighten.model.checkpoint import Checkpoint
from lighten.model.files import read_json
from lighten.model.forms import INDEX, SINGLE


def from_pretrained(auto_class: Any, path: Path, **options: Any) -> Any:
    """Returns the model of a directory.

    Args:
        auto_class: a class of transformers, such as AutoModelForCausalLM.
        path: the model directory.
        options: for `from_pretrained` of that class.

    Raises:
        Failure: weights are missing or have other shapes, so that they would be random.
    """
    from lighten.model.weight_checks import loaded

    with readable(path) as folder:
        model, info = auto_class.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    loaded(path, info)
    return model


@contextlib.contextmanager
def readable(path: Path) -> Iterator[Path]:
    """Yields a directory that any loader reads: the given one, or links to its files with corrections.

    The corrections are what no loader guesses: settings of a quantized model outside config.json, and weights under
    another name.
    """
    checkpoint = Checkpoint(path)
    files = sorted(set(checkpoint.weight_map.values()))
    named = SINGLE in files or (path / INDEX).is_file()
    if named and (read_json(path / "config.json").get("quantization_config") or None) == checkpoint.quantization:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="lighten-") as scratch:
        folder = Path(scratch)
        for file in path.iterdir():
            name = SINGLE if not named and file.name == files[0] else file.name
            if file.is_file() and name != "config.json":
                (folder / name).symlink_to(file.resolve())
        (folder / "config.json").write_text(json.dumps(checkpoint.config))
        yield folder
