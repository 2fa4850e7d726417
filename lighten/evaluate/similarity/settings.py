"""Likeness of embeddings to those of the source: settings, prediction and columns of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from lighten.errors import Failure
from lighten.evaluate import paired
from lighten.evaluate.measurement import BYTES_PER_TOKEN, FIXED_BYTES, linear_flops
from lighten.evaluate.sentences.settings import OfSentences
from lighten.facts import ModelFacts, Task
from lighten.step import Estimate

EMBEDDINGS = "embeddings"
"""Name of the vectors among the values of a measurement, `[sentences, width]`."""


class Similarity(OfSentences):
    """Cosine between the embeddings of `samples` sentences by a variant and by the baseline.

    An embedding is the mean of the last hidden states over the tokens of a sentence, or its first state if the model
    says so (`1_Pooling/config.json` of sentence-transformers).
    """

    name = "similarity"
    work = "lighten.evaluate.similarity.work:measure"
    needs = frozenset({"encodes"})
    tasks: ClassVar[tuple[Task, ...]] = ("embedding", "masked", "other")
    of_quality = True

    samples: int = Field(200, ge=2)
    batch: int = Field(32, ge=1)

    def predict(self, facts: ModelFacts) -> Estimate:
        """Returns the cost of a pass over every sentence."""
        found = self.sentences()
        return Estimate(
            float32_flops=sum(map(len, found)) / BYTES_PER_TOKEN * linear_flops(facts),
            seconds=6,
            peak_bytes=FIXED_BYTES + 4 * facts.params + 200_000_000,
            disk_bytes=4 * facts.hidden * len(found),
        )

    def add(self, row: dict[str, Any], result: dict[str, Any]) -> None:
        """Adds nothing: the likeness is to another model's embeddings."""

    def add_change(self, row: dict[str, Any], measured: Path, baseline: Path) -> None:
        """Puts the cosines into a row.

        Raises:
            Failure: the two have vectors of different widths.
        """
        ours, theirs = (np.asarray(paired.values(each)[EMBEDDINGS], np.float64) for each in (measured, baseline))
        if ours.shape != theirs.shape:
            raise Failure(f"embeddings of the shape {ours.shape} cannot be compared with those of {theirs.shape}")
        found = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
        row["similarity"] = {
            "mean": float(found.mean()),
            "p05": float(np.percentile(found, 5)),
            "least": float(found.min()),
            "n": len(found),
        }
