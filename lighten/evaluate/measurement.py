"""What every measurement is made of: its settings, its key, what it costs, and what a row says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from lighten.evaluate.machine import measuring_packages
from lighten.facts import ModelFacts
from lighten.plugins import Table
from lighten.settings import AnyCase
from lighten.step import Estimate

FIXED_BYTES = 550_000_000
"""Memory of a process that has imported what it needs, for predictions."""
BYTES_PER_TOKEN = 4.0
"""Rough length of a token of English text, for predictions."""
READ_PER_SECOND = 10e9
"""Bytes of weights that decoding reads in a second, for predictions."""


class Measurement(AnyCase, BaseModel):
    """Settings of one measurement: strict, immutable, and the only place where their defaults stand.

    A subclass sets `name` and `work`, and implements `predict` and `add`. Its module imports nothing heavy: the
    function that `work` names does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    """What it is called: its row in the table, and its key under `evaluate` in a recipe."""
    work: ClassVar[str]
    """The function that measures, "module:function": called with a `Request` and a `Report`, it returns a
    `Result`, or what else `result.json` shall hold as a dict."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Capabilities of a runtime: it has to have one of them."""
    younger: ClassVar[dict[str, Any]] = {}
    """Settings that came after results were kept under the others, and the values that mean what was done before."""
    timed: ClassVar[bool] = False
    """Whether it depends on the machine and on what else that does: it runs alone, and the key names the machine."""
    isolated: ClassVar[bool] = True
    """Whether it runs in a process of its own. One that starts several returns an `Outcome` instead."""
    causal_only: ClassVar[bool] = True
    """Whether it measures decoder-only language models and no others."""
    of_quality: ClassVar[bool] = False
    """Whether it shows what compression cost: on the baseline's tokens, in one arithmetic for all that are compared."""
    refers: ClassVar[bool] = False
    """Whether others are measured against what the baseline's own measurement left."""

    @property
    def needed(self) -> frozenset[str]:
        """Capabilities of which a runtime has to have one, for these settings."""
        return self.needs

    @property
    def title(self) -> str:
        """What is measured, in a word or two."""
        return self.name

    @property
    def pair(self) -> tuple[str, str] | None:
        """The two variants that it measures together, target and draft; None where it measures every variant alone."""
        return None

    def key_config(self) -> dict[str, Any]:
        """Returns the settings as they enter a stage's key; without the younger ones where nothing is asked of them."""
        found = self.model_dump(mode="json")
        return {name: value for name, value in found.items() if name not in self.younger or value != self.younger[name]}

    def data_digest(self) -> str | None:
        """Returns the SHA-256 of the text or tasks that it measures on, for the key; None where there is no such data.

        Raises:
            RequestError: the data cannot be had.
        """
        return None

    def packages(self, of_runtime: tuple[str, ...] = ()) -> dict[str, str]:
        """Returns the versions of packages for the key; `of_runtime` are those of a runtime that a package added."""
        return measuring_packages(of_runtime)

    def key_facts(self) -> dict[str, Any]:
        """Returns what else the result depends on, for the key."""
        return {}

    def check(self, facts: ModelFacts, model: str) -> None:
        """Raises RequestError if these settings cannot be measured on a model, called `model` in messages."""

    def check_text(self, model: Path) -> None:
        """Raises RequestError or Failure if the model at a path cannot be given the text to measure on."""

    def prepare(self) -> None:
        """Runs what the key only read, before any other work; raises RequestError for data that is wrong."""

    def predict(self, facts: ModelFacts) -> Estimate:
        """Returns what it is expected to cost on such a model."""
        return Estimate(seconds=6, peak_bytes=FIXED_BYTES + 4 * facts.params, disk_bytes=10_000)

    def device_bytes(self, facts: ModelFacts, width: int) -> int:
        """Returns about what it takes of a GPU's memory, with `width` bytes for a weight."""
        return int(width * facts.params + 4 * 2048 * facts.vocab)

    def add(self, row: dict[str, Any], result: dict[str, Any]) -> None:
        """Puts what was measured into a row of results.json."""
        raise NotImplementedError

    def add_change(self, row: dict[str, Any], measured: Path, baseline: Path) -> None:
        """Puts the change from the baseline's measurement into `row["delta"]`; nothing where there is no such change.

        Raises:
            RequestError: the two were not measured alike.
            Failure: a measurement cannot be read.
        """


def linear_flops(facts: ModelFacts) -> float:
    """Returns the operations that a token takes: the product with every weight of the layers and the head."""
    return 2.0 * (facts.layers * facts.layer_linear_params + facts.vocab * facts.hidden)


MEASUREMENTS = Table(
    "measurement",
    "lighten.measurements",
    {
        "perplexity": "lighten.evaluate.perplexity.settings:Perplexity",
        "accuracy": "lighten.evaluate.accuracy.settings:Accuracy",
        "speed": "lighten.evaluate.speed.settings:Speed",
        "load": "lighten.evaluate.load.settings:Load",
        "speculative": "lighten.evaluate.speculative.settings:Speculative",
        "loaders": "lighten.evaluate.loaders.settings:Loaders",
    },
)
