"""Sizes of the model behind a version. Keys and values, training and unmeasured formats depend on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lighten.compare.operand import Version
from lighten.errors import LightenError, RequestError
from lighten.facts import ModelFacts


@dataclass(frozen=True)
class Sizes:
    """The sizes, and the assumption behind them, if there is one."""

    facts: ModelFacts
    assumed: str | None = None


def sizes_of(version: Version) -> Sizes:
    """Returns the sizes from the config of the baseline or of the source; else bounds from the results.

    Raises:
        RequestError: the results say too little.
    """
    from lighten.model.checkpoint import facts_of, read_config
    from lighten.model.source import find

    source, baseline = version.results.source, version.results.baseline
    made = version.store.find(baseline.key) if version.store and baseline and baseline.key else None
    try:
        if made:
            return Sizes(facts_of(read_config(made.path), str(made.path)))
        if source.model.startswith("demo:") or Path(source.model).expanduser().exists():
            return Sizes(find(source.model).facts)
    except LightenError:
        pass  # what the results say is enough for bounds
    return _bounds(version)


def _bounds(version: Version) -> Sizes:
    source = version.results.source
    extra = source.model_extra or {}
    try:
        layers, hidden, vocab = (int(extra[name]) for name in ("layers", "hidden", "vocab"))
        params = int(source.params or 0)
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"{version.text} does not say how large its model is, and {source.model} is not on this machine: "
            "name a version whose baseline is still in its store"
        ) from error
    if min(layers, hidden, vocab) < 1 or params < 0:
        raise RequestError(
            f"{version.text} says that its model has {layers} layers of width {hidden}, {vocab} tokens and {params} "
            "weights, which no model has: restore its results.json, or run the recipe again"
        )
    heads = max(1, hidden // 64)
    rest = (params - vocab * hidden) // layers - 4 * hidden * hidden
    facts = ModelFacts(
        architecture=str(extra.get("architecture", "")),
        layers=layers,
        hidden=hidden,
        intermediate=max(hidden, rest // (3 * hidden)),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocab=vocab,
        tied=True,
        counted=params,
    )
    note = "the model's config is not here: every head is taken to have keys and values of its own, the most it can be"
    return Sizes(facts, note)
