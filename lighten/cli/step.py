"""The commands of single steps, with a flag for every setting of the step."""

from __future__ import annotations

import inspect
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from lighten import screen
from lighten.cli.flags import Artifacts, Device, Json, MergeAdapter, TrustCode, print_json

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from lighten.step import Step


def add_verb(app: typer.Typer, kind: str, about: str) -> None:
    """Adds the command of one step, with a flag for every one of its settings."""
    from lighten.compress.calibrate.sweep import Sweep
    from lighten.pipeline.steps import step_classes

    classes = step_classes(kind)
    settings = _fields(classes)
    calibration = Sweep.model_fields if any(each.calibrated for each in classes) else {}

    def verb(
        model: str,
        out: Path,
        artifacts: Path,
        device: str,
        merge_adapter: bool,
        trust_remote_code: bool,
        as_json: bool,
        **values: Any,
    ) -> None:
        from lighten.cli.progress import watching
        from lighten.pipeline.verbs import one_step

        given = {name: value for name, value in values.items() if value is not None}
        with watching(quiet=as_json) as watcher:
            artifact = one_step(
                kind,
                model,
                out,
                {name: value for name, value in given.items() if name in settings},
                calibration={name: value for name, value in given.items() if name in calibration},
                artifacts=artifacts,
                device=device,
                merge_adapter=merge_adapter,
                trust_remote_code=trust_remote_code,
                watcher=watcher,
            )
        if as_json:
            print_json({"path": str(artifact.path), **artifact.manifest})
        else:
            screen.console(soft_wrap=True).print(
                f"{artifact.path}: {artifact.format}, {artifact.size_bytes / 1e6:.1f} MB"
            )

    fixed = [
        ("model", Annotated[str, typer.Argument(help="A hub id, a directory, a .gguf file, or demo:NAME.")], None),
        ("out", Annotated[Path, typer.Option("-o", "--out", help="Directory to write; must not exist.")], None),
        ("artifacts", Artifacts, Path("artifacts")),
        ("device", Device, "auto"),
        ("merge_adapter", MergeAdapter, False),
        ("trust_remote_code", TrustCode, False),
        ("as_json", Json, False),
    ]
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is None else default,
            annotation=kind_,
        )
        for name, kind_, default in fixed
    ]
    parameters += [_flag(name, field) for name, field in {**settings, **calibration}.items()]
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(kind, help=about)(verb)


def _fields(classes: list[type[Step]]) -> dict[str, FieldInfo]:
    """Returns the settings of all classes of a step; where two share a name, the first one's, with both's choices.

    What only some of them require the command line does not.
    """
    found: dict[str, FieldInfo] = {}
    for each in classes:
        for name, field in each.model_fields.items():
            known = found.setdefault(name, copy(field))
            if known is not field and _choices(known) and _choices(field):
                choices = dict.fromkeys((*_choices(known), *_choices(field)))
                known.annotation = Literal[tuple(choices)]  # type: ignore[assignment]
    for name, field in found.items():
        if not all(name in each.model_fields and each.model_fields[name].is_required() for each in classes):
            field.default = None if field.is_required() else field.default
    return found


def _choices(field: FieldInfo) -> tuple[Any, ...]:
    """Returns the values that a setting takes, () where they are no list."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    """Returns the command-line option of one field of a step's settings; its default stays with the step."""
    kind: Any = field.annotation
    if type(None) in get_args(kind):  # X | None
        kind = next(each for each in get_args(kind) if each is not type(None))
    arguments = get_args(kind)
    choices = f" [{'|'.join(map(str, arguments))}]" if get_origin(kind) is Literal else ""
    if get_origin(kind) is Literal:
        kind = type(arguments[0]) if len({type(each) for each in arguments}) == 1 else str
    elif get_origin(kind) is tuple:
        kind = list[arguments[0]]  # type: ignore[valid-type]
    elif any(get_origin(each) is tuple for each in arguments):  # one, or several with shares
        kind = list[str]
    elif get_origin(kind) is Annotated or not issubclass(kind, (str, int, float)):
        kind = str  # what reads itself from text: a size, a model of settings
    about = field.description or ""
    said = field.is_required() or field.default in ((), None) or "default:" in about
    default = "" if said else f" (default: {field.default})"
    option = typer.Option(
        f"--{name.replace('_', '-')}" + (f"/--no-{name.replace('_', '-')}" if kind is bool else ""),
        help=f"{about}{choices}{default}".strip(),
        show_default=False,
    )
    annotation: Any = Annotated[kind if field.is_required() else kind | None, option]
    default_value = inspect.Parameter.empty if field.is_required() else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default_value, annotation=annotation)
