"""What tests of recipes share."""

from typing import Any

import pytest

from lighten.compare import side
from lighten.pipeline import build
from lighten.process.isolate import Outcome, run_isolated


@pytest.fixture
def warm_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times speeds in children of the warm process, for tests that look at what is told and not at the numbers.

    An interpreter of its own, which imports torch and transformers for each speed, is what a user measures. tests/real,
    tests/compare and the first run of tests/pipeline/test_run.py measure that way.
    """

    def warm(target: str, payload: dict[str, Any], *rest: Any, fresh: bool = False) -> Outcome:
        return run_isolated(target, payload, *rest)

    for module in (build, side):
        monkeypatch.setattr(module, "run_isolated", warm)
