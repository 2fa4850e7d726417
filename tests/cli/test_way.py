"""The way of a setting from the command to the arithmetic: which of lighten's own functions call each other."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.command import process

WATCH = """
import os, sys

def watch(frame, event, argument):
    if event != "call":
        return
    code = frame.f_code
    name = (code.co_filename.rpartition("/lighten/")[2], code.co_name)
    if name == ("compress/quantize/settings.py", "_of_the_method"):
        with open(os.environ["WAY"] + "/checked", "a") as file:
            file.write(f"{os.getpid()}\\n")
    if name not in (("process/isolate.py", "run_isolated"), ("compress/quantize/gptq.py", "gptq")):
        return
    calls = []
    while frame:
        place, found, called = frame.f_code.co_filename.rpartition("/lighten/")
        if found and frame.f_code.co_name != "<module>":
            calls.append(f"{called} {frame.f_code.co_name}\\n")
        frame = frame.f_back
    with open(os.environ["WAY"] + "/" + name[1], "w") as file:
        file.writelines(reversed(calls))

sys.setprofile(watch)
"""
"""What a Python imports as it starts: notes the calls that led to the process wall, and to GPTQ on its other side."""
MAIN = [
    "__main__.py main",
    "cli/main.py main",
    "cli/step.py verb",
    "pipeline/verbs.py one_step",
    "pipeline/build.py build",
    "process/isolate.py run_isolated",
]
CHILD = [
    "pipeline/steps.py run_step",
    "compress/quantize/step.py run",
    "process/workers.py ordered",
    "compress/quantize/quantized_layers.py write",
    "compress/quantize/gptq.py codes",
    "compress/quantize/gptq.py gptq",
]
WALLS = ["process/isolate.py run_isolated", "process/workers.py ordered"]
"""Calls that go into another process. What serves them there, in `process/`, is no part of anybody's way."""


@pytest.fixture(scope="module")
def way(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was noted while `lighten quantize` ran."""
    watching, noted, work = (tmp_path_factory.mktemp(name) for name in ("watching", "noted", "work"))
    (watching / "sitecustomize.py").write_text(WATCH)
    path = os.pathsep.join([str(watching), os.environ["PYTHONPATH"]])
    small = ("--group-size", 64, "--samples", 4, "--length", 32)
    # two threads, so that layers are shared out among processes
    env = {"PYTHONPATH": path, "WAY": str(noted), "OMP_NUM_THREADS": "2"}
    done = process("quantize", tiny(dtype=torch.bfloat16), *small, "-o", "q", cwd=work, env=env)
    assert done.returncode == 0, done.stderr
    return noted


def own(noted: Path) -> list[str]:
    calls = noted.read_text().splitlines()
    return [call for call in calls if not call.startswith("process/") or call in WALLS]


def test_a_setting_reaches_the_arithmetic_in_twelve_calls(way: Path) -> None:
    found = own(way / "run_isolated") + own(way / "gptq")
    assert found == MAIN + CHILD
    assert len(found) <= 12


def test_settings_are_checked_once(way: Path) -> None:
    assert len((way / "checked").read_text().split()) == 1
