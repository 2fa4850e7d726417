"""`lighten evaluate --serve`: every model in its own runtime, and in a server that lighten starts."""

import json
from pathlib import Path

import pytest

from tests.cli.test_main import refused
from tests.command import lighten
from tests.evaluate.conftest import Tiny


def test_a_model_has_a_row_for_its_runtime_and_one_for_the_server(tiny_gguf: Path, tmp_path: Path) -> None:
    flags = ("--length", 48, "--samples", 2, "--skip", "speed", "--skip", "accuracy")
    done = lighten("evaluate", tiny_gguf, "--serve", "llama.cpp", *flags, "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "llama.cpp (" in done.stderr and "starts for tiny.gguf-llama.cpp: its log is" in done.stderr
    rows = json.loads((tmp_path / "out/results.json").read_text())["variants"]
    assert [row["name"] for row in rows] == ["baseline", "tiny.gguf-llama.cpp"]
    assert [row["runtime"] for row in rows] == ["llama.cpp", "llama.cpp server"]
    assert rows[1]["perplexity"]["value"] == pytest.approx(rows[0]["perplexity"]["value"], rel=1e-4)
    assert rows[1]["path"] == rows[0]["path"] and rows[1]["delta"]["perplexity"]["relative"] == pytest.approx(
        0, abs=1e-4
    )


def test_wrong_servers_are_one_message(tiny_gguf: Path, tiny: Tiny, tmp_path: Path) -> None:
    for given, words in (
        (("--serve", "lama.cpp"), "did you mean llama.cpp?"),
        (("--serve", "llama.cpp", "--serve-python", tmp_path / "none"), "there is no Python"),
        (("--serve-arg", "x"), "--serve-arg is about one server"),
        (("--serve", "llama.cpp", "--serve-arg=--port=1"), "lighten gives --port itself"),
    ):
        refused(lighten("evaluate", tiny_gguf, *given, cwd=tmp_path), 2, words)
    refused(lighten("evaluate", tiny(), "--serve", "llama.cpp", cwd=tmp_path), 2, "llama.cpp serves .gguf files")
