"""What to measure: the `evaluate` section of a recipe."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from lighten.evaluate.accuracy.settings import Accuracy
from lighten.evaluate.load.settings import Load
from lighten.evaluate.loaders.settings import Loaders
from lighten.evaluate.masked.settings import Masked
from lighten.evaluate.measurement import MEASUREMENTS, Measurement
from lighten.evaluate.perplexity.settings import Perplexity
from lighten.evaluate.sentences.settings import Sentences
from lighten.evaluate.serving.settings import Serve
from lighten.evaluate.similarity.settings import Similarity
from lighten.evaluate.speculative.settings import Speculative
from lighten.evaluate.speed.settings import Speed
from lighten.evaluate.translation.settings import Translation
from lighten.facts import Task
from lighten.settings import AnyCase


class Evaluate(AnyCase, BaseModel):
    """What to measure. By default nothing; then only the size is known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    perplexity: list[Perplexity] = []
    accuracy: list[Accuracy] = []
    speed: Speed | None = None
    load: Load | None = None
    speculative: Speculative | None = None
    translation: Translation | None = None
    similarity: Similarity | None = None
    masked: Masked | None = None
    sentences: Sentences | None = None
    loaders: bool = False
    serve: dict[str, Serve | None] = {}
    """Servers that are started for variants, by name or pattern; a later entry wins, and None is the own runtime."""
    roofline: bool = False
    price_per_hour: float | None = Field(default=None, gt=0)
    currency: str = Field(default="USD", min_length=1, max_length=8)

    _added: dict[str, Measurement] = PrivateAttr(default_factory=dict)
    """Measurements of installed packages, each under its own key."""

    @model_validator(mode="wrap")
    @classmethod
    def _with_added(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(value, dict):
            return handler(value)
        strange = [name for name in value if name not in cls.model_fields and name in MEASUREMENTS.names]
        added = {name: _checked(name, value[name]) for name in strange if value[name] is not None}
        made = handler({name: each for name, each in value.items() if name not in strange})
        made._added.update(added)
        return made

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = handler(self)
        if not self.serve:  # it came later
            found.pop("serve", None)
        return {**found, **{name: each.model_dump(mode="json") for name, each in self._added.items()}}

    @model_validator(mode="after")
    def _speed_is_measured(self) -> Evaluate:
        asked = "roofline" if self.roofline else "price_per_hour" if self.price_per_hour is not None else None
        if asked and self.speed is None:
            raise ValueError(f"{asked} is reckoned from measured speeds: add `speed: {{}}`")
        return self

    @field_validator("perplexity", "accuracy", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, dict | BaseModel) else value

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        asked: dict[str, list[str]] = {
            "task": [each.task for each in self.accuracy],
            "protocol": [each.protocol for each in self.perplexity],
        }
        for what, names in asked.items():
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"the {what} {twice[0]} is asked for twice: results are kept under its name")
        return self

    def serve_of(self, variant: str) -> Serve | None:
        """Returns the server that is started for a variant; None if it is measured in its own runtime."""
        found = [serve for pattern, serve in self.serve.items() if fnmatchcase(variant, pattern)]
        return found[-1] if found else None

    @property
    def asked(self) -> list[Measurement]:
        """Every measurement that is asked for, those of quality first."""
        found = [*self.perplexity, *self.accuracy, self.translation, self.similarity, self.masked]
        timed = [self.speed, self.load, self.sentences, Loaders() if self.loaders else None, self.speculative]
        return [each for each in (*found, *timed, *self._added.values()) if each is not None]


def usual(task: Task, given: dict[str, Any]) -> Evaluate:
    """Returns what is measured on models of a task that is not causal, if nothing was asked for by name.

    Args:
        task: what the models are for.
        given: settings that the measurements share, such as `data`.

    Raises:
        ValidationError: a setting is wrong.
    """
    names = {"seq2seq": ("translation", "sentences"), "masked": ("masked", "similarity", "sentences")}
    return Evaluate.model_validate(dict.fromkeys(names.get(task, ("similarity", "sentences")), given))


def _checked(name: str, value: Any) -> Measurement:
    """Returns the settings of an added measurement.

    Raises:
        ValidationError: they are wrong; says where under the measurement's key.
    """
    try:
        made: Measurement = MEASUREMENTS.load(name).model_validate(value)
    except ValidationError as error:
        lines = [
            InitErrorDetails(
                type=PydanticCustomError(each["type"], "{message}", {"message": each["msg"]}),
                loc=(name, *each["loc"]),
                input=each["input"],
            )
            for each in error.errors()
        ]
        raise ValidationError.from_exception_data("Evaluate", lines) from error
    return made
