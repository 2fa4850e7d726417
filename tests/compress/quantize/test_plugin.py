"""The example of a package that adds a method: installed as anyone would, and used by the command."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lighten.model.checkpoint import Checkpoint
from lighten.model.unpacked import open_checkpoint
from tests.cli.test_main import refused
from tests.command import lighten, process

EXAMPLE = Path(__file__).parents[3] / "examples/plugin"
LINEAR = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python that has the example installed."""
    source, site = tmp_path_factory.mktemp("plugin") / "source", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, source)  # what a build leaves lies beside the sources
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(site), str(source)], check=True, capture_output=True, timeout=120)
    return {"PYTHONPATH": os.pathsep.join([str(site), os.environ["PYTHONPATH"]])}


def error(folder: Path, source: Path) -> float:
    weight = Checkpoint(source).tensor(f"{LINEAR}.weight").float()
    return float((open_checkpoint(folder).tensor(f"{LINEAR}.weight") - weight).square().mean())


def test_the_example_is_short() -> None:
    files = [file for file in EXAMPLE.rglob("*") if file.suffix in (".py", ".toml")]
    assert sorted(file.name for file in files) == ["lighten_mse.py", "pyproject.toml"]
    assert sum(len(file.read_text().splitlines()) for file in files) < 100


def test_it_is_used_by_the_command(tiny: Callable[..., Path], environment: dict[str, str], tmp_path: Path) -> None:
    model = tiny(dtype=torch.bfloat16)
    text = lighten("quantize", "--help", cwd=tmp_path, env=environment).stdout
    assert "|mse]" in "".join(text.split())
    assert "--ranges" in text
    small = ("--bits", 3, "--group-size", 64)
    done = process("quantize", model, "--method", "mse", *small, "--json", "-o", "m", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert (manifest["format"], manifest["config"]["ranges"]) == ("gptq", 16)
    assert manifest["facts"]["quantized_linears"] == 14
    plain = lighten("quantize", model, "--method", "rtn", *small, "-o", "r", cwd=tmp_path, env=environment)
    assert plain.returncode == 0, plain.stderr
    assert 0 < error(tmp_path / "m", model) < 0.95 * error(tmp_path / "r", model)
    wrong = lighten("quantize", model, "--method", "rtn", "--ranges", 3, "-o", "x", cwd=tmp_path, env=environment)
    refused(wrong, 2, "rtn has no setting ranges; it has bits, group_size, sym, positive_scales, ignore, head")


def test_without_it_there_is_no_such_method(tiny: Callable[..., Path], tmp_path: Path) -> None:
    refused(lighten("quantize", tiny(), "--method", "mse", "-o", "x", cwd=tmp_path), 2, "method: must be 'gptq', ")


def test_transformers_opens_what_it_wrote(
    tiny: Callable[..., Path], environment: dict[str, str], tmp_path: Path
) -> None:
    model = tiny(dtype=torch.bfloat16)
    made = lighten("quantize", model, "--method", "mse", "-o", "m", "--group-size", 64, cwd=tmp_path, env=environment)
    assert made.returncode == 0, made.stderr
    short = ("--length", 32, "--samples", 2, "--skip", "accuracy", "--skip", "speed", "--json")
    done = lighten("evaluate", model, tmp_path / "m", *short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["variants"]
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert 0 < rows[1]["divergence"]["kl_mean"] < 1
