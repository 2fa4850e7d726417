"""Whether mlx_lm opens what was written, and what its class of the family does not do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lighten.errors import Failure
from lighten.export.mlx.config import SLIDING


def opened(out: Path, config: dict[str, Any]) -> list[str]:
    """Opens a directory with mlx_lm, every weight in its place, and returns remarks. No weight is read.

    Args:
        out: the directory.
        config: its config.json.

    Raises:
        Failure: it does not open.
    """
    try:
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model
    except ImportError:
        return ["MLX is not here: whether it knows this family, and opens the directory, was not tried"]
    try:
        model, _ = load_model(out, lazy=True, strict=True)
        caches = make_prompt_cache(model)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise Failure(
            f"mlx_lm's class of {config.get('model_type')} does not open what was written ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:400]})"
        ) from error
    wanted, window = windows(config)
    kept = sum(hasattr(cache, "max_size") for cache in caches)
    if kept >= wanted:
        return []
    return [
        f"{wanted - kept} layers attend to the last {window} tokens, and in mlx_lm's class of "
        f"{config.get('model_type')} to all: longer texts come out differently"
    ]


def windows(config: dict[str, Any]) -> tuple[int, int]:
    """Returns the number of layers whose attention has a window that a text can leave, and the window."""
    found = next((value for value in config.values() if isinstance(value, dict) and "sliding_window" in value), config)
    window, types = found.get("sliding_window"), found.get("layer_types")
    if not isinstance(window, int) or window >= (found.get("max_position_embeddings") or window + 1):
        return 0, 0
    if found.get("use_sliding_window") is False:
        return 0, 0
    return types.count(SLIDING) if isinstance(types, list) else int(found.get("num_hidden_layers", 0)), window
