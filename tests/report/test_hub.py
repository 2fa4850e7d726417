"""Pushing to a hub over HTTP: what arrives there, and what is said where it cannot."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from lighten.errors import Failure, RequestError
from lighten.pipeline.run import run
from lighten.report.hub import check, uploads
from lighten.results.file import load
from lighten.store.files import MANIFEST
from lighten.store.gc import check as check_store
from lighten.store.manifest import fault
from lighten.store.store import Store

from .hub_server import TOKEN, hub

RECIPE = """name: tiny
model: {model}
calibration: {{data: builtin, samples: 4, length: 32}}
variants:
  int4: [{{quantize: {{bits: 4, group_size: 32}}}}]
  slim: [{{prune: {{what: mlp, ratio: 0.25}}}}]
evaluate: {{}}
"""


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a recipe that has been run."""
    made = tmp_path_factory.mktemp("push")
    (made / "tiny.yaml").write_text(RECIPE.format(model=tiny(dtype=torch.bfloat16)))
    run(str(made / "tiny.yaml"), artifacts=made / "artifacts")
    return made


def lighten(*arguments: object, cwd: Path, endpoint: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lighten", *map(str, arguments)]
    # without Xet: its protocol is another service's, and the hub takes the same files by LFS
    settings = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cwd / "hf")}
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment = {**outside, **settings, "COLUMNS": "200", "NO_PROXY": "127.0.0.1", **env}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.count("lighten: ") == 1 and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def closed() -> str:
    """Returns an address that nothing listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


def test_an_artifact_and_its_card_arrive_in_one_commit(folder: Path) -> None:
    with hub() as server:
        asked = ("report", "tiny", "--push-to-hub", "me/small", "--variant", "int4")
        done = lighten(*asked, cwd=folder, endpoint=server.address)
        assert done.returncode == 0, done.stderr
        (files,) = server.repos["me/small"]
        assert server.private == {"me/small": True}
        assert server.messages == ["int4 of tiny v1, made and measured by lighten"]
        assert f"{server.address}/me/small (private, one commit, {len(files)} files" in done.stdout
        artifact = (folder / "artifacts/tiny/v1/variants/int4").resolve()
        manifest = json.loads((artifact / MANIFEST).read_text())
        assert set(files) == {entry["path"] for entry in manifest["files"]} | {MANIFEST, "README.md"}
        for path, content in files.items():
            assert path in ("README.md", MANIFEST) or content == (artifact / path).read_bytes(), path
        pushed = json.loads(files[MANIFEST])
        assert fault(pushed) is None and pushed["files"] == manifest["files"] and pushed["key"] == manifest["key"]
        for path in ("README.md", MANIFEST):  # names and hashes, and no path of this machine
            text = files[path].decode()
            assert str(folder) not in text and str(manifest["source"]["id"]) not in text
        assert manifest["source"]["identity"] in files["README.md"].decode()
        assert server.large, "the weights went by LFS"
        card = ModelCard(files["README.md"].decode())
        assert 'snapshot_download("me/small")' in card.text and "gptq" in (card.data.tags or [])

        again = lighten(*asked, cwd=folder, endpoint=server.address)
        assert again.returncode == 0 and len(server.repos["me/small"]) == 2, "the repository may be there"
    assert not any(each.damage for each in check_store(Store(folder / "artifacts")))


def test_a_file_that_tells_a_directory_of_this_machine_is_not_pushed(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = shutil.copytree(tiny(dtype=torch.bfloat16), tmp_path / "model")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(f"name: tiny\nmodel: {model}\nvariants: {{baseline: []}}\nevaluate: {{}}\n")
    for place in (Path.home(), Path("/nowhere")):
        (model / "notes.json").write_text(json.dumps({"trained_on": f"{place}/texts/mine.jsonl"}))
        version = run(str(recipe), artifacts=tmp_path / "artifacts")
        asked = (load(version / "results.json"), version, "me/small", ["baseline"])
        if place == Path.home():
            with pytest.raises(Failure, match=rf"notes\.json names a directory of this machine \({place}\)"):
                uploads(*asked)
    assert "notes.json" in dict(uploads(*asked)[0].files)


def test_every_variant_goes_to_its_own_public_repository(folder: Path) -> None:
    with hub() as server:
        asked = ("report", "tiny@v1", "--push-to-hub", "me/small-{variant}", "--public", "--json")
        done = lighten(*asked, cwd=folder, endpoint=server.address)
        assert done.returncode == 0, done.stderr
        assert server.private == {"me/small-int4": False, "me/small-slim": False}
        told = json.loads(done.stdout)
        assert [each["repo"] for each in told] == ["me/small-int4", "me/small-slim"]
        for each in told:
            sizes = {path: len(content) for path, content in server.repos[each["repo"]][0].items()}
            assert {file["path"]: file["size_bytes"] for file in each["files"]} == sizes


def test_a_run_pushes_what_it_made(folder: Path) -> None:
    with hub() as server:
        asked = ("run", "tiny.yaml", "--only", "slim", "--push-to-hub", "me/slim")
        done = lighten(*asked, cwd=folder, endpoint=server.address)
        assert done.returncode == 0, done.stderr
        assert "config.json" in server.repos["me/slim"][0]


def test_a_dry_run_names_the_files_and_asks_nobody(folder: Path) -> None:
    asked = ("report", "tiny", "--version", "v1", "--push-to-hub", "me/small", "--variant", "slim", "--dry-run")
    done = lighten(*asked, cwd=folder, endpoint=closed(), HF_TOKEN="")
    assert done.returncode == 0, done.stderr
    assert "slim would go to me/small (private, one commit" in done.stdout
    for name in ("model.safetensors", "README.md", "artifact.json", "tokenizer.json"):
        assert name in done.stdout


@pytest.mark.parametrize("verb", [("report", "tiny"), ("run", "tiny.yaml", "--only", "slim")])
def test_what_is_said_where_it_cannot_be(folder: Path, verb: tuple[str, ...]) -> None:
    variant = ("--variant", "slim") if verb[0] == "report" else ()
    asked = (*verb, "--push-to-hub", "me/small", *variant)
    refused(lighten(*asked, cwd=folder, endpoint=closed(), HF_TOKEN=""), 2, "needs a token", "hf auth login")
    refused(lighten(*asked, cwd=folder, endpoint=closed(), HF_HUB_OFFLINE="1"), 2, "HF_HUB_OFFLINE")
    there = closed()
    refused(lighten(*asked, cwd=folder, endpoint=there), 1, f"cannot reach {there}", "check the connection")
    with hub() as server:
        wrong = lighten(*asked, cwd=folder, endpoint=server.address, HF_TOKEN="hf_wrong")
        refused(wrong, 1, "refused me/small (401)", "token")
        assert server.repos == {}


def test_wrong_requests(folder: Path) -> None:
    there = closed()
    several = lighten("report", "tiny@v1", "--push-to-hub", "me/small", cwd=folder, endpoint=there)
    refused(several, 2, "2 variants (int4, slim)", "--variant", "me/small-{variant}")
    asked = ("report", "tiny@v1", "--push-to-hub", "me/small", "--variant", "nf4")
    refused(lighten(*asked, cwd=folder, endpoint=there), 2, "'nf4' is not in it", "int4")
    early = lighten("run", "tiny.yaml", "--push-to-hub", "me/small", cwd=folder, endpoint=there)
    refused(early, 2, "is one repository")
    refused(lighten("report", "tiny", "--public", cwd=folder, endpoint=there), 2, "--public belongs to --push-to-hub")
    refused(lighten("run", "tiny.yaml", "--public", cwd=folder, endpoint=there), 2, "--public belongs")


@pytest.mark.parametrize("name", ["small", "me/", "me/a/b", "me/a b", "me/-a", "me/a..b", "me/" + "a" * 100, "../x"])
def test_names_that_the_hub_does_not_have(name: str) -> None:
    with pytest.raises(RequestError, match="OWNER/NAME"):
        check(name, ["slim"])
    check("me/small-{variant}", ["int4", "q4_k_m"])


def test_a_damaged_artifact_is_not_pushed(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, symlinks=True)
    file = (copy / "artifacts/tiny/v1/variants/slim").resolve() / "config.json"
    file.chmod(0o644)
    file.write_text("{}")
    asked = ("report", "tiny@v1", "--push-to-hub", "me/small", "--variant", "slim")
    with hub() as server:
        refused(lighten(*asked, cwd=copy, endpoint=server.address), 1, "slim is damaged (config.json")
        assert server.repos == {}
