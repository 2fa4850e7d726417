"""Reading and writing results.json. Everything in a file that is read is checked."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from lighten.data.reading import Refused, parse_json
from lighten.errors import Failure, RequestError
from lighten.results.results import Results
from lighten.store.store import write_json

SCHEMA = 1


FILE = "results.json"


def load(path: Path) -> Results:
    """Returns the results in a results.json, or in the version directory that holds one.

    Raises:
        RequestError: the file does not exist, or has a schema that this version does not read.
        Failure: the file is damaged or is not results.json.
    """
    file = path / FILE if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Failure(f"{file} is not text ({error.reason}): give a results.json that lighten wrote") from error
    except OSError as error:
        raise RequestError(
            f"cannot read {file}: {error.strerror}; give a version directory or its {FILE} ('lighten ls' lists them)"
        ) from error
    try:
        raw = parse_json(text)
    except Refused as error:
        raise Failure(f"{file} is not JSON ({error}): restore it, or run the recipe again") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema is None:
        raise Failure(f'{file} has no "schema": it is not lighten\'s {FILE}')
    if schema != SCHEMA:
        raise RequestError(
            f"{file} has schema {schema!r}, this lighten reads schema {SCHEMA}: use the version that wrote it"
        )
    try:
        return Results.model_validate(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        lines = [f"  {'.'.join(map(str, problem['loc'])) or 'file'}: {problem['msg']}" for problem in problems[:5]]
        more = [f"  … and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise Failure("\n".join([f"{file} does not follow schema {SCHEMA}:", *lines, *more])) from error


def save(results: Results, path: Path) -> None:
    """Writes results.json, which `load` reads back unchanged."""
    write_json(path, results.model_dump(mode="json", by_alias=True))
