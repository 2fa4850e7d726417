"""Rows of ours and of installed packages."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lighten.errors import Failure, RequestError
from lighten.plugins import Table
from tests.command import lighten, process


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as pip leaves it: a module, and what it declares."""
    (tmp_path / "their_things.py").write_text("class Theirs:\n    pass\n")
    declared = tmp_path / "theirs-1.0.dist-info"
    declared.mkdir()
    (declared / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (declared / "entry_points.txt").write_text(
        "[lighten.things]\ntheirs = their_things:Theirs\npath = their_things:Theirs\ngone = their_things:Gone\n"
        "broken = no_such_module:Theirs\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_things", raising=False)
    return tmp_path


def table() -> Table:
    return Table("thing", "lighten.things", {"path": "pathlib:Path"})


def test_an_installed_package_adds_rows(installed: Path) -> None:
    found = table()
    assert found.names == ["path", "theirs", "gone", "broken"]
    assert "their_things" not in sys.modules, "nothing is imported before it is asked for"
    assert found.load("theirs").__name__ == "Theirs"


def test_a_name_of_ours_stays_ours(installed: Path) -> None:
    assert table().load("path") is Path


@pytest.mark.parametrize(("name", "why"), [("gone", "AttributeError"), ("broken", "ModuleNotFoundError")])
def test_a_package_that_cannot_be_imported_is_named(installed: Path, name: str, why: str) -> None:
    with pytest.raises(Failure, match=f"thing {name} comes from the package theirs 1.0, .*{why}"):
        table().load(name)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match="there is no thing 'other'; there is path"):
        table().load("other")


def declare(folder: Path, package: str, text: str) -> None:
    declared = folder / f"{package}-1.0.dist-info"
    declared.mkdir(parents=True)
    (declared / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (declared / "entry_points.txt").write_text(text)


BROKEN = """
[lighten.steps]
prune = no_such_module:Theirs
source = no_such_module:Theirs
gone = no_such_module:Theirs
[lighten.methods]
gone = no_such_module:Theirs
GPTQ = no_such_module:Theirs
leaving = broken_leaving:Theirs
wrong = pathlib:Path
other = lighten.compress.quantize.methods.rtn:Rtn
[lighten.formats]
gone = no_such_module:Theirs
wrong = pathlib:Path
[lighten.runtimes]
gone = no_such_module:Theirs
wrong = pathlib:Path
[lighten.measurements]
gone = no_such_module:Theirs
wrong = lighten.step:silent
speed = no_such_module:Theirs
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a command beside which a package of broken entry points is installed."""
    packages = tmp_path_factory.mktemp("packages")
    declare(packages, "broken", BROKEN)
    (packages / "broken_leaving.py").write_text("raise SystemExit(7)\n")
    return {"PYTHONPATH": os.pathsep.join([str(packages), os.environ["PYTHONPATH"]])}


def recipe(model: Path, folder: Path, step: str, evaluate: str = "{}") -> Path:
    file = folder / "r.yaml"
    file.write_text(f"name: r\nmodel: {model}\nvariants: {{v: [{step}]}}\nevaluate: {evaluate}\n")
    return file


def test_broken_packages_stop_nobody_who_does_not_ask_for_them(
    tiny: Callable[..., Path], tmp_path: Path, broken: dict[str, str]
) -> None:
    file = recipe(
        tiny(), tmp_path, "{quantize: {method: GPTQ, group_size: 32}}", "{perplexity: {length: 64, samples: 2}}"
    )
    calls: list[list[object]] = [["--help"], ["quantize", "--help"], ["export", "--help"], ["ls"], ["plan", file]]
    for call in [*calls, ["run", file, "--json"], ["report", "r", "--format", "markdown"]]:
        how = process if call in (["--help"], ["plan", file]) else lighten
        done = how(*call, cwd=tmp_path, env=broken)
        assert done.returncode == 0, (call, done.stderr)
        assert "broken" not in done.stderr, call


@pytest.mark.parametrize(
    ("step", "evaluate", "words"),
    [
        ("{gone: {}}", "{}", "step gone"),
        ("{quantize: {method: gone}}", "{}", "quantization method gone"),
        ("{quantize: {method: leaving}}", "{}", "quantization method leaving"),
        ("{quantize: {method: wrong}}", "{}", "quantization method wrong"),
        ("{quantize: {method: other}}", "{}", "quantization method other"),
        ("{export: {format: wrong}}", "{}", "export format wrong"),
        ("{export: {format: gguf}}", "{wrong: {}}", "measurement wrong"),
        ("{export: {format: gguf}}", "{gone: {}}", "measurement gone"),
    ],
)
def test_who_asks_for_a_broken_row_hears_whose_it_is(
    tiny: Callable[..., Path], tmp_path: Path, broken: dict[str, str], step: str, evaluate: str, words: str
) -> None:
    done = lighten("plan", recipe(tiny(), tmp_path, step, evaluate), cwd=tmp_path, env=broken)
    assert done.returncode == 1, done.stderr
    assert f"lighten: {words} comes from the package broken 1.0, whose " in done.stderr
    assert "mend or remove that package" in done.stderr


def test_a_file_that_nothing_opens_may_be_that_of_a_broken_runtime(tmp_path: Path, broken: dict[str, str]) -> None:
    (tmp_path / "model.pairs").write_bytes(b"?")
    done = lighten("evaluate", "model.pairs", cwd=tmp_path, env=broken)
    assert done.returncode == 2
    assert (
        "runtime gone comes from the package broken 1.0, whose no_such_module:Theirs cannot be imported" in done.stderr
    )


def test_a_class_must_be_what_the_table_holds_and_have_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(
        tmp_path,
        "theirs",
        "[lighten.things]\na = their_a:Theirs\nb = their_a:Theirs\nc = their_a:Other\nPATH = no:No\n",
    )
    (tmp_path / "their_a.py").write_text(
        "from pathlib import PurePath\n\n\nclass Theirs(PurePath):\n    name = 'a'\n\n\nclass Other:\n    name = 'c'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = {"path": "pathlib:Path"}
    found = Table("thing", "lighten.things", rows, base="pathlib:PurePath", key="name")
    assert found.names == ["path", "a", "b", "c"], "no name of ours in another case"
    assert list(found.usable()) == ["path", "a"]
    with pytest.raises(Failure, match=r"thing b .* whose their_a:Theirs has the name 'a', and not 'b': mend"):
        found.load("b")
    with pytest.raises(Failure, match=r"whose their_a:Other does not derive from pathlib\.PurePath: mend"):
        found.load("c")
    assert found.faults()[2:] == ["thing PATH of the package theirs 1.0 is not used: lighten has it"]


def test_two_packages_with_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("first", "second"):
        declare(tmp_path, package, "[lighten.things]\nboth = pathlib:PurePath\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = table()
    with pytest.raises(Failure, match=r"from several packages, first 1\.0 and second 1\.0"):
        found.load("both")
    assert list(found.usable()) == ["path"]


def test_doctor_names_them_all(tmp_path: Path, broken: dict[str, str]) -> None:
    code = "import json; from lighten.doctor.packages import faults; print(json.dumps(faults()))"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | broken, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    declared = [line for line in BROKEN.splitlines() if "=" in line]
    assert len(found) == len(declared)
    assert all("the package broken 1.0" in each for each in found)
