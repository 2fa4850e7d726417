"""The contract of every step: its settings, its inputs, and its predicted cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ConfigDict

from lighten.facts import ModelFacts, Task
from lighten.plugins import found_at
from lighten.settings import AnyCase
from lighten.store.artifact import Artifact

Report = Callable[[int, int, str], None]
"""Function `report(done, total, note)`: progress in the step's own unit. `note` is a short text such as "812 tok/s"."""


def silent(done: int, total: int, note: str) -> None:
    """A `Report` that does nothing."""


@dataclass
class Context:
    """The inputs of a step besides its source and its output directory."""

    report: Report = silent
    grams: Path | None = None
    """Directory of the sweep over the source, for steps whose `needs_sweep` is true."""
    sensitivity: Path | None = None
    """Directory of the sensitivities of the source, for steps whose `needs_sensitivity` is true."""
    teacher: Path | None = None
    """Model directory of the teacher, for steps with `lessons`."""
    lessons: Path | None = None
    """Directory of the teacher's outputs, for steps with `lessons`."""
    scratch: Path | None = None
    """Directory that survives a kill, for steps with `lessons`. The next run continues from its contents."""
    key: str | None = None
    """Key of the stage, for files that name their origin."""
    device: str = "cpu"
    trust_remote_code: bool = False
    """Whether the person allowed the code of the model's repository."""
    warnings: list[str] = field(default_factory=list)
    """Warnings for the person. The pipeline prints them and keeps them in the manifest."""


@dataclass(frozen=True)
class Estimate:
    """The predicted cost of a stage. `flops` is split by arithmetic: `[bf16 or best available, float32]`."""

    fast_flops: float = 0.0
    float32_flops: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0
    disk_bytes: int = 0


def beside_the_source(alone: Estimate, facts: ModelFacts, calibration_tokens: int) -> Estimate:
    """Returns the cost of a step that runs the quantized model beside the source, from that of rounding alone."""
    per_token = 4 * facts.layer_linear_params + 2 * facts.gram_elements
    states = 2 * calibration_tokens * (facts.intermediate + 4 * facts.hidden) * 2
    return Estimate(
        fast_flops=float(calibration_tokens * facts.layers * per_token),
        float32_flops=alone.float32_flops + float(calibration_tokens * facts.layers * facts.gram_elements),
        seconds=alone.seconds,
        peak_bytes=alone.peak_bytes + facts.embedding_params * 2 + states + 8 * facts.gram_elements,
        disk_bytes=alone.disk_bytes,
    )


class Step(AnyCase):
    """Settings of one step: strict and immutable. Their defaults stand nowhere else.

    A subclass sets `kind`, `version` and `work`, and implements `predict`. Raise `version` whenever the step's output
    changes for the same settings, because it is part of the stage's key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: ClassVar[str]
    version: ClassVar[int]
    work: ClassVar[str] = ""
    """Name of the function that does the work, "module:function". Its first argument is the step."""
    calibrated: ClassVar[bool] = True
    """Whether the calibration set is of any use to the step."""
    computes: ClassVar[bool] = True
    """Whether it computes on the chosen device. Then its output and its key depend on the device."""
    runtime: ClassVar[str] = "torch"
    """Name of the runtime that serves what it writes."""
    tasks: ClassVar[tuple[Task, ...]] = ("causal",)
    """Tasks of the models that it reads."""
    keeps_form: ClassVar[bool] = False
    """Whether its output has the format of its source. Then `writes` is of no account."""
    whole: ClassVar[bool] = False
    """Whether it holds a whole model in memory, so that it is refused where there is too little."""

    def dump(self) -> dict[str, Any]:
        """Returns every setting that has a value, as JSON."""
        return self.model_dump(mode="json", exclude_none=True)

    def key_config(self) -> dict[str, Any]:
        """Returns the settings as part of the stage's key: content instead of places."""
        return self.model_dump(mode="json")

    def needs_sweep(self) -> bool:
        """True if `run` reads Gram matrices of its source."""
        return False

    def needs_sums(self) -> bool:
        """False if `run` makes the Gram matrices itself, and reads of a sweep only its tokens and which linears share.

        The matrices of experts are there all the same. Only if `needs_sweep` is true.
        """
        return True

    @property
    def any_family(self) -> bool:
        """Whether a step that reads Grams takes every family; else those with Llama's layers."""
        return True

    def needs_sensitivity(self) -> bool:
        """True if `run` reads how much the loss depends on each linear; only if `needs_sweep` is true too."""
        return False

    def remarks(self, facts: ModelFacts) -> list[str]:
        """Returns what the person should know of this step on a model of these sizes, before any work."""
        return []

    def promises(self) -> dict[str, Any] | None:
        """Returns the limits within which its output must equal its source; None if it may differ.

        `lighten.evaluate.parity` measures the difference.
        """
        return None

    def exact(self, facts: ModelFacts) -> bool:
        """Whether it shows more of a source's weights than bfloat16 holds."""
        return False

    def lessons(self) -> Step | None:
        """Step that runs the teacher, if `run` learns from one. Such a step has `teacher` and maybe `student`.

        The teacher "unquantized" is the model that was quantized, and its lessons are the calibration set.
        """
        return None

    def requires(self) -> list[tuple[str, str]]:
        """Packages that the step imports besides the core, as (module name, extra that brings it)."""
        return []

    def after(self, previous: Step | None) -> Self:
        """Returns the step with the settings that it takes over from the step before it; None before the first."""
        return self

    def check(self, facts: ModelFacts) -> None:
        """Raises RequestError if these settings cannot be used on such a model."""

    @property
    def writes(self) -> str:
        """Format of its output, as in its manifest."""
        return "hf"

    def check_source(self, form: str, facts: ModelFacts) -> None:
        """Raises RequestError if it cannot read a model of such a format (the format that the step before `writes`)."""

    def check_files(self, folder: Path, facts: ModelFacts) -> None:
        """Raises RequestError for files that the step cannot read in the directory of the model.

        It is called before anything is copied.
        """

    def result(self, facts: ModelFacts) -> ModelFacts:
        """Returns the sizes of the model that the step makes of such a model, as far as they are known in advance."""
        return facts

    def predict(self, facts: ModelFacts, calibration_tokens: int) -> Estimate:
        """Returns the expected cost of the step on such a model."""
        return Estimate()

    @property
    def run(self) -> Callable[[Artifact, Path, Context], dict[str, Any]]:
        """Function that does the work: it reads an artifact and writes files into an existing empty directory.

        It returns the facts of what it wrote: at least `format` ("hf", "gptq", "gguf", ...). They become the manifest's
        `format` and `facts`.
        """
        if not self.work:
            raise TypeError(f"step {self.kind} names no function that does its work")
        return partial(found_at(self.work), self)
