"""What a directory of MLX says about itself, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lighten.errors import RequestError
from lighten.model.files import check_links, read_json

MAKER = "mlx"
"""Value of `format` in the metadata of MLX's safetensors files; transformers writes "pt"."""
WEIGHTS = "model*.safetensors"
"""Names of the files that mlx_lm reads weights from."""


def is_mlx(path: Path) -> bool:
    """Returns whether a path is a model directory in MLX's form, whoever made it.

    MLX names itself in the metadata of its files. Some tools leave that out; their quantized directories are known by
    the widths in config.json.

    Raises:
        RequestError: a link leads out of the directory.
        Failure: config.json is damaged.
    """
    if not path.is_dir() or not (path / "config.json").is_file():
        return False
    first = next(iter(sorted(path.glob(WEIGHTS))), None)
    if first is None:
        return False
    check_links(path)
    try:
        with safe_open(first, framework="numpy") as shard:
            maker = (shard.metadata() or {}).get("format")
    except (SafetensorError, OSError):
        maker = None  # whoever opens it says that it is damaged
    return maker == MAKER or quantization(read_json(path / "config.json")) is not None


def quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """Returns MLX's widths and groups in a config.json: those of all modules, and of single modules by their names.

    None if nothing is quantized.
    """
    found = config.get("quantization")
    known = isinstance(found, dict) and all(isinstance(found.get(each), int) for each in ("bits", "group_size"))
    return found if known else None


def refuse_quantized(path: Path) -> None:
    """Raises RequestError for an MLX directory with packed weights, which only MLX reads."""
    if quantization(read_json(path / "config.json")) is not None:
        raise RequestError(
            f"{path} is an MLX directory with quantized weights, which can be measured (lighten evaluate {path}) but "
            "not changed: give the model that it was made from"
        )
