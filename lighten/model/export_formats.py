"""The export formats: where the settings of each are, and what they say of its files without writing any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from lighten.errors import Failure
from lighten.plugins import Table

EXPORTS = Table(
    "export format",
    "lighten.formats",
    {
        "gguf": "lighten.export.gguf.settings:Gguf",
        "onnx": "lighten.export.onnx.settings:Onnx",
        "bundle": "lighten.export.bundle.settings:Bundle",
    },
)


PROMPT = "The capital of France is"
"""What the code of a model card has a model go on with."""


class Usage(NamedTuple):
    """How a person opens what was exported."""

    packages: str
    """What pip installs, with spaces between."""
    code: str
    """Python: imports, an empty line, and code that opens the directory `folder` and says something."""


class ExportFormat(Protocol):
    """What the settings class of a format says of all its files."""

    library: str
    """The library that the Hugging Face hub is to name for it."""
    for_devices: bool
    """Whether a small device takes it."""

    @classmethod
    def needs(cls) -> list[tuple[str, str]]:
        """Returns what the format alone imports beyond the core, as (module, extra that brings it)."""

    @classmethod
    def usage(cls, files: Sequence[str]) -> Usage | str | None:
        """Returns how such files are opened, in code or in words; None if these are none of its files."""


def extras_of_formats() -> dict[str, tuple[str, ...]]:
    """Returns the modules that each extra brings for the export formats."""
    found: dict[str, tuple[str, ...]] = {}
    for known in map(export_format, EXPORTS.names):
        for module, extra in known.needs() if known else []:
            found[extra] = (*found.get(extra, ()), module)
    return found


def export_format(name: str | None) -> ExportFormat | None:
    """Returns what is known of an export format; None for another one, or where its package cannot be imported."""
    if name not in EXPORTS.places:
        return None
    try:
        found: ExportFormat = EXPORTS.load(name)
    except Failure:
        return None
    return found
