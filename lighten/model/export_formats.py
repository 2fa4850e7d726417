"""The export formats: the place of each one's settings, and what they say of its files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from lighten.plugins import Table

EXPORTS = Table(
    "export format",
    "lighten.formats",
    {
        "gguf": "lighten.export.gguf.settings:Gguf",
        "onnx": "lighten.export.onnx.settings:Onnx",
        "openvino": "lighten.export.openvino.settings:OpenVino",
        "mlx": "lighten.export.mlx.settings:Mlx",
        "ctranslate2": "lighten.export.ctranslate2.settings:CTranslate2",
        "executorch": "lighten.export.executorch.settings:ExecuTorch",
        "bundle": "lighten.export.bundle.settings:Bundle",
    },
    base="lighten.export.step:Export",
    key="format",
)


PROMPT = "The capital of France is"
"""Text that the model continues in the code of a model card."""


class Usage(NamedTuple):
    """How a person opens exported files."""

    packages: str
    """Packages that pip installs, with spaces between them."""
    code: str
    """Python: imports, an empty line, and code that opens the directory `folder` and generates text."""
    also: str = ""
    """Markdown: how other programs open them."""


class ExportFormat(Protocol):
    """The properties of all files of a format, declared by its settings class."""

    library: str
    """Library that the Hugging Face hub should name for it."""
    for_devices: bool
    """Whether a small device can run it."""

    @classmethod
    def needs(cls) -> list[tuple[str, str]]:
        """Returns the packages that only this format imports, as (module, extra that brings it)."""

    @classmethod
    def usage(cls, files: Sequence[str]) -> Usage | str | None:
        """Returns how such files are opened, in code or in words; None if these are not its files."""


def extras_of_formats() -> dict[str, tuple[str, ...]]:
    """Returns the modules that each extra brings for the export formats."""
    found: dict[str, tuple[str, ...]] = {}
    for known in EXPORTS.usable().values():
        for module, extra in known.needs():
            found[extra] = (*found.get(extra, ()), module)
    return found


def export_format(name: str | None) -> ExportFormat | None:
    """Returns the settings class of an export format; None if it does not exist or cannot be imported."""
    if name not in EXPORTS.names or name in EXPORTS.broken:
        return None
    found: ExportFormat = EXPORTS.load(name)
    return found
