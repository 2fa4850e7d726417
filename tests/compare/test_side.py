"""One side of a comparison."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from lighten.compare.side import of_model
from lighten.evaluate.settings import Evaluate
from lighten.pipeline.watcher import Silent
from lighten.store.gc import collect
from lighten.store.store import Store


class Collector(Silent):
    """Calls gc before each measurement."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.measured = 0

    def say(self, message: str) -> None:
        self.measured += 1
        assert objects(self.store) == []


def objects(store: Store) -> list[str]:
    """Keys of the objects that gc removes."""
    return [name for name, _ in collect(store) if len(name) == 64]


def test_gc_beside_a_comparison_takes_nothing_from_it(tiny: Callable[..., Path], tmp_path: Path) -> None:
    store = Store(tmp_path / "artifacts")
    watcher = Collector(store)
    evaluate = Evaluate.model_validate(
        {"perplexity": {"length": 32, "samples": 2}, "accuracy": {"task": "builtin", "limit": 2}}
    )
    with contextlib.ExitStack() as kept:
        side = of_model(str(tiny()), evaluate, None, store=store, device="cpu", watcher=watcher, kept=kept)
        assert watcher.measured == 2
        assert objects(store) == []
        assert side.perplexity and side.perplexity.path.is_dir()
    assert len(objects(store)) == 2, "nobody needs them when it has ended"
