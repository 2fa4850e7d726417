"""What every stage of a recipe is made of: a step's settings, what it is handed, and what it may cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ConfigDict

from lighten.facts import ModelFacts
from lighten.plugins import found_at
from lighten.settings import AnyCase
from lighten.store.artifact import Artifact

Report = Callable[[int, int, str], None]
"""`report(done, total, note)`: progress in the unit of the step; `note` is a short text such as "812 tok/s"."""


def silent(done: int, total: int, note: str) -> None:
    """A `Report` that tells nobody."""


@dataclass
class Context:
    """What a step is handed besides its source and its output directory."""

    report: Report = silent
    grams: Path | None = None
    """Directory of the sweep over the source, for steps whose `needs_sweep` is true."""
    sensitivity: Path | None = None
    """Directory of the sensitivities of the source, for steps whose `needs_sensitivity` is true."""
    teacher: Path | None = None
    """Model directory of the teacher, for steps that have `lessons`."""
    lessons: Path | None = None
    """Directory of what the teacher said, likewise."""
    scratch: Path | None = None
    """Directory that outlives a kill, for steps that have `lessons`: the next run goes on from what lies there."""
    key: str | None = None
    """Key of the stage, for files that say where they come from."""
    device: str = "cpu"
    trust_remote_code: bool = False
    """Whether the person asked for the code that the model's repository brings."""
    warnings: list[str] = field(default_factory=list)
    """Things the person should know; the pipeline prints them and keeps them in the manifest."""


@dataclass(frozen=True)
class Estimate:
    """What a stage is predicted to cost. `flops` is split by arithmetic: `[bf16 or best available, float32]`."""

    fast_flops: float = 0.0
    float32_flops: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0
    disk_bytes: int = 0


class Step(AnyCase):
    """Settings of one step: strict, immutable, and the only place where their defaults stand.

    A subclass sets `kind`, `version` and `work`, and implements `predict`. Raise `version` whenever the step's output
    changes for the same settings: it is part of the stage's key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: ClassVar[str]
    version: ClassVar[int]
    work: ClassVar[str] = ""
    """The function that does the work, "module:function": called with the step and the arguments of `run`."""
    calibrated: ClassVar[bool] = True
    """Whether the calibration set is of any use to it."""
    computes: ClassVar[bool] = True
    """Whether it computes on the device that was chosen: what it writes, and so its key, depends on that then."""
    runtime: ClassVar[str] = "torch"
    """Name of the runtime that serves what it writes."""
    causal_only: ClassVar[bool] = True
    """Whether it reads decoder-only language models and no others."""

    def dump(self) -> dict[str, Any]:
        """Returns every setting that has a value, as JSON has it."""
        return self.model_dump(mode="json", exclude_none=True)

    def key_config(self) -> dict[str, Any]:
        """Returns the settings as they enter the stage's key: content instead of where it lies."""
        return self.model_dump(mode="json")

    def needs_sweep(self) -> bool:
        """True if `run` reads Gram matrices of its source."""
        return False

    def needs_sensitivity(self) -> bool:
        """True if `run` reads how much the loss depends on each linear; only where `needs_sweep` is true too."""
        return False

    def promises(self) -> dict[str, Any] | None:
        """Returns the limits within which its output must equal its source; None if it may differ.

        `lighten.evaluate.parity` measures how far they are apart.
        """
        return None

    def exact(self, facts: ModelFacts) -> bool:
        """Whether it shows more of a source's weights than bfloat16 holds of them."""
        return False

    def lessons(self) -> Step | None:
        """The step that asks a teacher, if `run` learns from one; it has `teacher` and maybe `student` then."""
        return None

    def requires(self) -> list[tuple[str, str]]:
        """Packages the step imports beyond the core, as (module name, extra that brings it)."""
        return []

    def after(self, previous: Step | None) -> Self:
        """Returns the step with what it takes over from the one before it; None before the first."""
        return self

    def check(self, facts: ModelFacts) -> None:
        """Raises RequestError if these settings cannot be used on such a model."""

    @property
    def writes(self) -> str:
        """The format of what it writes, as its manifest has it."""
        return "hf"

    def check_source(self, form: str, facts: ModelFacts) -> None:
        """Raises RequestError if it cannot read a model of such a format (what the step before `writes`)."""

    def check_files(self, folder: Path, facts: ModelFacts) -> None:
        """Raises RequestError for what the step cannot read in the directory that the model comes from.

        It is called before anything is copied.
        """

    def result(self, facts: ModelFacts) -> ModelFacts:
        """Returns the sizes of what the step makes of such a model, as far as they are known before."""
        return facts

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns what the step is expected to cost on such a model."""
        return Estimate()

    @property
    def run(self) -> Callable[[Artifact, Path, Context], dict[str, Any]]:
        """The function that does the work: it reads an artifact and writes files into an existing empty directory.

        It returns the facts of what it wrote: at least `format` ("hf", "gptq", "gguf", ...); they become
        the manifest's `format` and `facts`.
        """
        if not self.work:
            raise TypeError(f"step {self.kind} names no function that does its work")
        return partial(found_at(self.work), self)
