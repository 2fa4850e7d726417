"""`transformers serve` and mlx-lm's server as lighten starts them, where they are installed."""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lighten.errors import Failure
from lighten.evaluate.run import measure
from lighten.evaluate.serving.host import Host, Wanted, lists, program_of
from lighten.evaluate.serving.mlx import Mlx
from lighten.evaluate.serving.settings import Serve
from lighten.export.mlx import settings as mlx
from lighten.step import Context, silent
from lighten.store.artifact import Artifact
from tests.command import lighten
from tests.evaluate.conftest import Tiny, payload

LOAD = {"rate": [20], "concurrency": [2], "requests": 3, "prompt": 8, "generate": 4}


@pytest.fixture(params=["transformers", "mlx"])
def server(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    program = program_of(Serve.model_validate(name))
    if any(find_spec(each) is None for each in program.modules):
        pytest.skip(f"the server {name} needs {program.install}")
    return name


@pytest.fixture(scope="module")
def mlx_model(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mlx.core")
    out = tmp_path_factory.mktemp("mlx")
    mlx.Mlx(format="mlx", dtype="float32").run(Artifact(tiny(), {"format": "hf"}), out, Context())
    return out


def started(place: Path, server: str) -> Wanted:
    return Wanted(place, "tiny", Serve.model_validate(server), 512, "cpu")


def result(name: str, settings: dict[str, Any], address: Any, out: Path) -> dict[str, Any]:
    out.mkdir()
    return measure(payload(name, settings, str(address), out), silent)  # type: ignore[arg-type]


def test_load_is_measured_and_the_rest_is_told(server: str, tiny: Tiny, tmp_path: Path) -> None:
    place = tmp_path / "model"
    place.symlink_to(tiny())
    asked = started(place, server)
    with Host(tmp_path / "logs", lambda line: None) as host, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path / "none"))  # a machine that has fetched nothing from the hub
        address = host.serving(asked).address
        for row in result("load", LOAD, address, tmp_path / "load")["load"]:
            assert row["completed"] == 3 and row["throughput_tok_s"] > 0 and not row["errors"]
        told = result("perplexity", {"length": 48, "samples": 2}, address, tmp_path / "perplexity")["unavailable"]
        assert "does not give the log-probabilities of a prompt (it takes no token ids as a prompt)" in told
        told = result("speed", {"prompt": 8, "generate": 4, "repeats": 2}, address, tmp_path / "speed")["unavailable"]
        assert "so its speed is known under load only" in told
        host.check(asked, "after it was asked")
        patch.setattr(type(program_of(asked.serve)), "lost", lambda self, log: "its thread has ended")
        with pytest.raises(Failure, match=r"serves nothing after it was asked: its thread has ended; its log is"):
            host.check(asked, "after it was asked")
        port = int(address.host.rpartition(":")[2])
        assert address.model and lists(port, address.model)
    assert not lists(port, address.model)


def test_a_model_that_it_cannot_load_is_one_message(server: str, tiny: Tiny, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(tiny(), place, ignore=shutil.ignore_patterns("*.safetensors"))
    asked = started(place, server)
    with Host(tmp_path / "logs", lambda line: None) as host:
        for _ in range(2):
            with pytest.raises(Failure, match=r"(?i)no .*safetensors.*; its log is .*tiny\.log"):
                host.serving(asked)


def test_mlx_directories_are_served(mlx_model: Path, tmp_path: Path) -> None:
    flags = ("--length", 48, "--samples", 2, "--skip", "speed", "--skip", "accuracy")
    done = lighten("evaluate", mlx_model, "--serve", "mlx", *flags, "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, theirs = json.loads((tmp_path / "out/results.json").read_text())["variants"]
    assert (ours["runtime"], theirs["runtime"]) == ("mlx", "mlx server") and ours["perplexity"]["value"] > 1
    assert theirs["status"] == "ok" and "log-probabilities" in json.dumps(theirs["unavailable"])


def test_what_mlx_says_of_its_end_is_read_in_its_log() -> None:
    now = "- ERROR - mlx_lm.server generation thread died: No safetensors found in model\nTraceback:\nOSError: none\n"
    before = "Exception in thread Thread-1 (_generate):\nTraceback:\n  File\nOSError: none\n127.0.0.1 - GET\n"
    assert Mlx().lost(now) == "No safetensors found in model" and Mlx().lost(before) == "OSError: none"
    assert Mlx().lost("Exception in thread Thread-7 (process_request_thread):\nBrokenPipeError: x") is None
    assert Mlx().lost("INFO - Starting httpd\n" + os.linesep) is None
