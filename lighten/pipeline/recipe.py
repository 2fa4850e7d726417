"""The form of a recipe, and errors that name the file, the line and the key."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from lighten.compress.calibrate.sweep import Sweep
from lighten.errors import RequestError, nearest
from lighten.evaluate.measurement import MEASUREMENTS
from lighten.evaluate.runtimes.endpoint.step import Endpoint
from lighten.evaluate.settings import Evaluate
from lighten.pipeline import recipe_yaml
from lighten.pipeline.recipe_yaml import Where
from lighten.pipeline.steps import kinds, open_step, step_class
from lighten.step import Step
from lighten.store.names import LONGEST, PATTERN, is_name

BASELINE = "baseline"
Checked = TypeVar("Checked", bound=BaseModel)
NOTES = "x-"
"""Beginning of top-level keys that hold only anchors for the rest of the recipe."""


class Recipe(BaseModel):
    """A source, a calibration set, named variants, and what to measure."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=rf"^{PATTERN}$", max_length=LONGEST)
    model: str
    revision: str | None = None
    trust_remote_code: bool | str | list[str] = False
    """Models whose own code the recipe needs; true means `model`. The command line has to agree."""
    merge_adapter: bool = False
    """Whether `model` is a LoRA adapter that is merged into its base."""
    calibration: Sweep = Field(default_factory=lambda: Sweep.model_validate({}))
    variants: dict[str, list[dict[str, dict[str, Any]]]] = Field(min_length=1)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    _checked: dict[str, list[Step]] = PrivateAttr(default_factory=dict)
    """The steps of variants whose settings were checked: once is enough."""

    @field_validator("variants", mode="before")
    @classmethod
    def _one_or_many(cls, variants: Any) -> Any:
        """Takes a single step without its list, as in `{runtime: {endpoint: URL}}`."""
        if not isinstance(variants, dict):
            return variants
        return {name: [steps] if isinstance(steps, dict) else steps for name, steps in variants.items()}

    @field_validator("variants")
    @classmethod
    def _one_kind_each(cls, variants: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
        for name, steps in variants.items():
            if not is_name(name):
                shown = name if len(name) <= 40 else f"{name[:40]}…"
                raise ValueError(
                    f"the variant name {shown!r} may hold up to {LONGEST} letters, digits, '.', '_' and '-' only"
                )
            served = any(Endpoint.kind in step for step in steps)
            if name == BASELINE and steps and not served:
                raise ValueError("the variant named baseline is the source itself and has no steps: []")
            if any(len(step) != 1 for step in steps):
                raise ValueError(f"a step of {name} is one name with its settings, such as {{quantize: {{bits: 4}}}}")
            if served and len(steps) > 1:
                raise ValueError(f"{name} is a model on a server ({Endpoint.kind}), which no other step can change")
        return variants

    @model_validator(mode="after")
    def _trusts_its_own_models(self) -> Self:
        strangers = [name for name in self.trusted if name not in self.models]
        if strangers:
            raise ValueError(
                f"trust_remote_code names {strangers[0]!r}, which is no model of this recipe ({', '.join(self.models)})"
            )
        return self

    @property
    def models(self) -> list[str]:
        """Names of the model, and of the teachers and students of its steps."""
        given = [values for steps in self.variants.values() for step in steps for values in step.values()]
        others = [values.get(role) for values in given for role in ("student", "teacher")]
        return list(
            dict.fromkeys([self.model, *(name for name in others if isinstance(name, str) and name != "source")])
        )

    @property
    def trusted(self) -> list[str]:
        """Names of the models whose own code the recipe needs."""
        if isinstance(self.trust_remote_code, bool):
            return [self.model] if self.trust_remote_code else []
        return [self.trust_remote_code] if isinstance(self.trust_remote_code, str) else self.trust_remote_code

    def steps(self, variant: str) -> list[Step]:
        """Returns the steps of a variant, checked."""
        if variant not in self._checked:
            given = [each for step in self.variants[variant] for each in step.items()]
            self._checked[variant] = [open_step(kind, settings) for kind, settings in given]
        return self._checked[variant]

    @classmethod
    def of_one(
        cls, step: Step, model: str, calibration: Sweep, settings: dict[str, Any], *, merge_adapter: bool
    ) -> Self:
        """Returns the recipe of one variant, `result`, made by one step; `settings` are those that it was made from."""
        variants = {"result": [{step.kind: settings}]}
        recipe = cls(
            name=step.kind, model=model, merge_adapter=merge_adapter, calibration=calibration, variants=variants
        )
        recipe._checked["result"] = [step]
        return recipe

    def dump(self) -> str:
        """Returns the recipe as YAML with every default filled in."""
        resolved = self.model_dump(mode="json", exclude={"variants"})
        resolved["variants"] = {name: [{step.kind: step.dump()} for step in self.steps(name)] for name in self.variants}
        adapter = ("merge_adapter",) if self.merge_adapter else ()
        order = ("name", "model", "revision", "trust_remote_code", *adapter, "calibration", "variants", "evaluate")
        return yaml.safe_dump({key: resolved[key] for key in order}, sort_keys=False, allow_unicode=True)


def parse_settings(model: type[Checked], settings: dict[str, Any], path: str) -> Checked:
    """Returns checked settings that were given outside a recipe. `path` names their origin in messages."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise _explain(error, path, {}, (), model) from error


def find(name: str) -> Path:
    """Returns the file of a recipe: a path, or the name of a ready recipe.

    Raises:
        RequestError: neither exists; the message lists the ready recipes.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    ready = {entry.stem: entry for folder in _ready_folders() for entry in sorted(folder.glob("*.yaml"))}
    if name in ready:
        return ready[name]
    near = nearest(name, ready)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise RequestError(f"there is no recipe {name!r}: {hint}Give a YAML file, or a ready recipe: {', '.join(ready)}")


def _ready_folders() -> list[Path]:
    installed = Path(str(files("lighten"))) / "recipes"
    checkout = Path(str(files("lighten"))).parent / "recipes"
    return [folder for folder in (installed, checkout) if folder.is_dir()]


def load(name: str) -> Recipe:
    """Reads a recipe.

    Raises:
        RequestError: something is wrong; the message has the file, line and key of the first fault.
    """
    path = find(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot read this recipe: {error}") from error
    value, where = recipe_yaml.read(text, path)
    if not isinstance(value, dict):
        raise RequestError(f"{path}:1: a recipe is a mapping with name, model and variants")
    return parse(value, str(path), where)


def parse(value: dict[str, Any], path: str = "recipe", where: Where | None = None) -> Recipe:
    """Checks a recipe that is given as a mapping. `where` has the line of every key, for messages."""
    where = where or {}
    try:
        recipe = Recipe.model_validate({key: each for key, each in value.items() if not str(key).startswith(NOTES)})
    except ValidationError as error:
        raise _explain(error, path, where, (), Recipe) from error
    for variant, steps in recipe.variants.items():
        checked = []
        for index, step in enumerate(steps):
            for kind, settings in step.items():
                at = ("variants", variant, index, kind)
                if kind not in kinds():
                    raise RequestError(
                        f"{_place(path, where, at)}: unknown step {kind!r}{_did_you_mean(kind, kinds())}"
                    )
                try:
                    checked.append(open_step(kind, settings))
                except ValidationError as error:
                    raise _explain(error, path, where, at, step_class(kind, settings)) from error
                except RequestError as error:
                    raise RequestError(f"{_place(path, where, at)}: {error}") from error
        recipe._checked[variant] = checked
    _check_names(recipe, path, where)
    return recipe


def _check_names(recipe: Recipe, path: str, where: Where) -> None:
    """Raises RequestError if `evaluate` names a variant that does not exist, or options that do not go together."""
    names = list(dict.fromkeys([BASELINE, *recipe.variants]))
    for role in ("draft", "target"):
        name = getattr(recipe.evaluate.speculative, role, BASELINE)
        if name not in names:
            place = _place(path, where, ("evaluate", "speculative", role))
            raise RequestError(f"{place}: there is no variant {name!r}{_did_you_mean(name, names)}")
    for pattern in recipe.evaluate.serve:
        if not any(fnmatchcase(name, pattern) for name in names):
            place = _place(path, where, ("evaluate", "serve", pattern))
            raise RequestError(f"{place}: there is no such variant{_did_you_mean(pattern, names)}")
    if not recipe.evaluate.speed:
        return
    at = ("evaluate", "speed", "options")
    for pattern in recipe.evaluate.speed.options:
        if not any(fnmatchcase(name, pattern) for name in names):
            place = _place(path, where, (*at, pattern))
            raise RequestError(f"{place}: there is no such variant{_did_you_mean(pattern, names)}")
    for name in names:
        try:
            recipe.evaluate.speed.of(name)
        except ValidationError as error:
            raise RequestError(f"{_place(path, where, at)}: {name}: {_message(error)}") from error


def _message(error: ValidationError) -> str:
    return error.errors()[0]["msg"].removeprefix("Value error, ")


def _place(path: str, where: Where, at: Sequence[str | int]) -> str:
    # one entry may stand for a list of one
    written = tuple(part for n, part in enumerate(at) if not isinstance(part, int) or tuple(at[: n + 1]) in where)
    if where:
        at = written
    for end in range(len(at), 0, -1):
        if tuple(at[:end]) in where:
            return f"{path}:{where[tuple(at[:end])]}: {'.'.join(map(str, at))}"
    return ": ".join([path, *([".".join(map(str, at))] if at else [])])


def _did_you_mean(key: str, valid: list[str]) -> str:
    near = nearest(key, valid)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(valid)}"


def _explain(
    error: ValidationError, path: str, where: Where, prefix: Sequence[str | int], model: type[BaseModel]
) -> RequestError:
    """Returns one message for the most useful error that pydantic found."""
    found = error.errors()
    # a misspelt key also makes the right one missing: say the misspelling
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    at = (*prefix, *first["loc"])
    place = _place(path, where, at)
    if first["type"] == "extra_forbidden":
        return RequestError(f"{place}: unknown key{_did_you_mean(str(at[-1]), _fields(model, first['loc'][:-1]))}")
    if first["type"] == "missing":
        return RequestError(f"{place}: this key is required")
    given = first.get("input")
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool | datetime.date) else ""
    if first["type"] == "string_type" and shown:
        shown += ": put it in quotes, so that YAML does not take it for something else"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return RequestError(f"{place}: {'must be ' if 'Input should' in first['msg'] else ''}{message}{shown}")


def _fields(model: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """Returns the keys that are valid at `loc` inside a model."""
    for key in loc:
        if isinstance(key, int):
            continue
        field = model.model_fields.get(str(key))
        if field is None and model is Evaluate and key in MEASUREMENTS.names:
            model = MEASUREMENTS.load(key)
            continue
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        inner += [arg for kind in inner for arg in getattr(kind, "__args__", ())]
        model = next((kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return [field.alias or name for name, field in model.model_fields.items()]
