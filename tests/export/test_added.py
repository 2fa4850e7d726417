"""An export format of an installed package: a model directory in 16 bits."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from tests.command import lighten

CODE = """
import shutil
from typing import ClassVar, Literal

from lighten.export.step import Export


class Copied(Export):
    work: ClassVar[str] = "lighten_copied:run"
    version: ClassVar[int] = 1
    calibrated: ClassVar[bool] = False
    library: ClassVar[str] = "safetensors"

    format: Literal["copied"]


def run(step, source, out, context):
    for file in source.path.iterdir():
        if file.is_file() and file.name != "artifact.json":
            shutil.copyfile(file, out / file.name)
    return {"format": "copied"}
"""


def test_a_format_that_was_added_is_exported_and_measured(tiny: Callable[..., Path], tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    declared = packages / "lighten_copied-1.0.dist-info"
    declared.mkdir(parents=True)
    (packages / "lighten_copied.py").write_text(CODE)
    (declared / "METADATA").write_text("Metadata-Version: 2.1\nName: lighten-copied\nVersion: 1.0\n")
    (declared / "entry_points.txt").write_text("[lighten.formats]\ncopied = lighten_copied:Copied\n")
    installed = {"PYTHONPATH": os.pathsep.join([str(packages), os.environ["PYTHONPATH"]])}
    made = lighten("export", tiny(), "--format", "copied", "-o", "out", "--json", cwd=tmp_path, env=installed)
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    assert (told["format"], told["kind"]) == ("copied", "export")
    asked = ("evaluate", "out", "--skip", "accuracy", "--skip", "speed", "--length", "64", "--samples", "2", "--json")
    measured = lighten(*asked, cwd=tmp_path, env=installed)
    assert measured.returncode == 0, measured.stderr
    (row,) = json.loads(measured.stdout)["variants"]
    assert (row["status"], row["format"], row["runtime"]) == ("ok", "copied", "torch")
    assert lighten("export", tiny(), "--format", "copied", "-o", "other", cwd=tmp_path).returncode == 2
