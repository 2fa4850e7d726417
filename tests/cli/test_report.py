"""`lighten report` in its forms, over versions of a recipe."""

from __future__ import annotations

import copy
import csv
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lighten.results.file import load
from tests.command import lighten

from ..report.sample import raw


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with three versions of a recipe: the second on another text, the third on another machine."""
    value = raw()
    for number in (1, 2, 3):
        value = copy.deepcopy(value)
        value["version"] = f"v{number}"
        if number == 2:
            for variant in value["variants"]:
                variant["perplexity"]["protocol"] = {**variant["perplexity"]["protocol"], "data_sha256": "other"}
        if number == 3:
            value["machine"]["cpu"] = "another"
        place = tmp_path / "artifacts" / "quickstart" / f"v{number}"
        place.mkdir(parents=True)
        (place / "results.json").write_text(json.dumps(value))
    return tmp_path


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("name", ["quickstart", "quickstart@v3", "quickstart/v3", "artifacts/quickstart/v3"])
def test_the_names_of_a_version(folder: Path, name: str) -> None:
    done = lighten("report", name, "--format", "json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == "v3"
    older = lighten("report", "quickstart@v1", "--format", "json", cwd=folder)
    assert json.loads(older.stdout)["version"] == "v1"


def test_the_forms(folder: Path) -> None:
    read = load(folder / "artifacts/quickstart/v3")
    rows = list(csv.DictReader(io.StringIO(lighten("report", "quickstart", "--format", "csv", cwd=folder).stdout)))
    assert [row["variant"] for row in rows] == [variant.name for variant in read.variants]
    assert [float(row["kl_mean"] or 0) for row in rows][1:] == [0.15232, 0.0000093, 0.00118, 0.03912]
    text = lighten("report", "quickstart", "--format", "markdown", cwd=folder).stdout
    assert text.startswith("## quickstart v3") and "### History" in text
    assert lighten("report", "quickstart", "--format", "html", cwd=folder).stdout.startswith("<!doctype html>")
    assert not (folder / "artifacts/quickstart/v3/report.html").exists(), "printing writes nothing"
    done = lighten("report", "quickstart", "--format", "csv", "-o", "there/table.csv", cwd=folder)
    assert (done.returncode, done.stdout) == (0, "")
    assert (folder / "there/table.csv").read_bytes().startswith(b"variant,status,error,format")


def test_the_history(folder: Path) -> None:
    done = lighten("report", "quickstart", "--history", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Perplexity in v2: another text." in done.stdout
    assert "Decode in v3: another machine." in done.stdout
    assert "‖ 25.62" in done.stdout and "‖ 145" not in done.stdout
    told: dict[str, Any] = json.loads(lighten("report", "quickstart", "--history", "--json", cwd=folder).stdout)
    line = told["history"]["Perplexity"]["gguf-q8_0"]
    assert [(point["version"], point["apart"]) for point in line] == [
        ("v1", None),
        ("v2", "another text"),
        ("v3", None),
    ]
    assert [point["value"] for point in line] == [25.6161] * 3
    first = lighten("report", "quickstart@v1", "--history", cwd=folder)
    refused(first, 2, "is the first version")


def test_the_report_of_a_version_has_the_history_up_to_it(folder: Path) -> None:
    for name, expected in (("v1", False), ("v2", True)):
        done = lighten("report", "quickstart", "--version", name, cwd=folder)
        assert done.returncode == 0, done.stderr
        page = (folder / "artifacts/quickstart" / name / "report.html").read_text()
        assert ("<h2>History</h2>" in page) == expected
        assert "another machine" not in page, "that was later"


def test_a_version_of_another_schema_is_refused_and_left_out_of_the_history(folder: Path) -> None:
    file = folder / "artifacts/quickstart/v1/results.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema": 9}))
    refused(lighten("report", "quickstart@v1", cwd=folder), 2, "has schema 9, this lighten reads schema 1")
    done = lighten("report", "quickstart", "--history", cwd=folder)
    assert done.returncode == 0 and "v1 is left out of the history" in done.stderr
    assert "v1" not in done.stdout and "v2" in done.stdout


def test_wrong_requests(folder: Path) -> None:
    refused(lighten("report", "nothing", cwd=folder), 2, "no results of 'nothing'", "quickstart")
    refused(lighten("report", "quickstart@v9", cwd=folder), 2, "has no version 'v9': v1, v2, v3")
    refused(lighten("report", "quickstart", "--format", "pdf", cwd=folder), 2, "pdf")
    refused(lighten("report", "quickstart", "-o", "x", cwd=folder), 2, "-o needs --format")
    refused(lighten("report", "quickstart", "--history", "--format", "csv", cwd=folder), 2, "--history has no csv")
    refused(lighten("report", "quickstart", "--dry-run", cwd=folder), 2, "--dry-run belongs to --push-to-hub")
