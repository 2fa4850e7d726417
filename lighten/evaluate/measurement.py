"""The contract of every measurement: its settings, its key, its predicted cost, and its columns of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from lighten.evaluate.machine import measuring_packages
from lighten.facts import ModelFacts, Task
from lighten.plugins import Table
from lighten.settings import AnyCase
from lighten.step import Estimate

FIXED_BYTES = 550_000_000
"""Bytes of a process that has imported what it needs, for predictions."""
BYTES_PER_TOKEN = 4.0
"""Bytes of a token of English text, roughly, for predictions."""
READ_PER_SECOND = 10e9
"""Bytes of weights that decoding reads in a second, for predictions."""


class Measurement(AnyCase, BaseModel):
    """Settings of one measurement: strict and immutable. Their defaults stand nowhere else.

    A subclass sets `name` and `work`, and implements `predict` and `add`. Its module imports nothing heavy. The
    function that `work` names may.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    """Name in the table, which is its key under `evaluate` in a recipe."""
    work: ClassVar[str]
    """Name of the function that measures, "module:function". It takes a `Request` and a `Report`, and returns a
    `Result`, or further contents of `result.json` as a dict."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Capabilities of a runtime: it must have at least one of them."""
    younger: ClassVar[dict[str, Any]] = {}
    """Settings that were added after results had been kept, and their values for the old behaviour."""
    timed: ClassVar[bool] = False
    """Whether it depends on the machine and its other work. Then it runs alone, and the key names the machine."""
    isolated: ClassVar[bool] = True
    """Whether it runs in a process of its own. A measurement that starts several returns an `Outcome` instead."""
    tasks: ClassVar[tuple[Task, ...]] = ("causal",)
    """Tasks of the models that it measures."""
    of_quality: ClassVar[bool] = False
    """Whether it shows what compression cost: on the baseline's tokens, in one arithmetic for all models."""
    refers: ClassVar[bool] = False
    """Whether variants are measured against the files of the baseline's own measurement."""
    over_http: ClassVar[bool] = False
    """Whether a model on a server can be measured so. Else the files of the model are measured."""

    @property
    def needed(self) -> frozenset[str]:
        """Capabilities for these settings: a runtime must have at least one of them."""
        return self.needs

    @property
    def title(self) -> str:
        """Name of what is measured, in a word or two."""
        return self.name

    @property
    def pair(self) -> tuple[str, str] | None:
        """The two variants that it measures together, target and draft; None if it measures each alone."""
        return None

    def key_config(self) -> dict[str, Any]:
        """Returns the settings as part of a stage's key, without `younger` settings that are not used."""
        found = self.model_dump(mode="json")
        return {name: value for name, value in found.items() if name not in self.younger or value != self.younger[name]}

    def data_digest(self) -> str | None:
        """Returns the SHA-256 of the text or tasks that it measures on, for the key; None if there is no such data.

        Raises:
            RequestError: the data cannot be fetched.
        """
        return None

    def packages(self, of_runtime: tuple[str, ...] = ()) -> dict[str, str]:
        """Returns the versions of packages for the key; `of_runtime` are those of an added runtime."""
        return measuring_packages(of_runtime)

    def key_facts(self) -> dict[str, Any]:
        """Returns the further facts that the result depends on, for the key."""
        return {}

    def longest(self, context: int | None) -> int:
        """Returns the length of the longest text that a model gets, if the settings tell it; else 0.

        Args:
            context: positions that the model takes; None if it does not say.
        """
        return 0

    def check(self, facts: ModelFacts, model: str) -> None:
        """Raises RequestError if these settings cannot be measured on a model, called `model` in messages."""

    def check_text(self, model: Path) -> None:
        """Raises RequestError or Failure if the model at a path cannot be measured on the text."""

    def prepare(self) -> None:
        """Runs what the key only read, before any other work. Raises RequestError for wrong data."""

    def predict(self, facts: ModelFacts) -> Estimate:
        """Returns the expected cost on such a model."""
        return Estimate(seconds=6, peak_bytes=FIXED_BYTES + 4 * facts.params, disk_bytes=10_000)

    def device_bytes(self, facts: ModelFacts, width: int) -> int:
        """Returns about how much of a GPU's memory it takes, with `width` bytes for a weight."""
        return int(width * facts.params + 4 * 2048 * facts.vocab)

    def add(self, row: dict[str, Any], result: dict[str, Any]) -> None:
        """Puts the result into a row of results.json."""
        raise NotImplementedError

    def add_change(self, row: dict[str, Any], measured: Path, baseline: Path) -> None:
        """Puts the change from the baseline's measurement into `row["delta"]`; nothing if there is no such change.

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
        "translation": "lighten.evaluate.translation.settings:Translation",
        "similarity": "lighten.evaluate.similarity.settings:Similarity",
        "masked": "lighten.evaluate.masked.settings:Masked",
        "sentences": "lighten.evaluate.sentences.settings:Sentences",
        "loaders": "lighten.evaluate.loaders.settings:Loaders",
    },
    base=f"{__name__}:Measurement",
    key="name",
)
