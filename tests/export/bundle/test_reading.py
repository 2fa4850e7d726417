"""Bundles, archives and devices that belong to somebody else."""

import io
import json
import os
import shutil
import stat
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lighten.errors import Failure, LightenError
from lighten.export.bundle import archive
from lighten.export.bundle import bundle as making
from lighten.export.bundle import reading as received
from lighten.export.bundle.settings import Bundle
from lighten.pipeline import device
from lighten.results.results import Results
from lighten.step import Context, silent
from lighten.store.artifact import Artifact
from tests.report.sample import results as sample

zstandard = pytest.importorskip("zstandard")


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "made"
    out.mkdir()
    settings = {"format": "bundle", "target": "rpi5", "type": "Q8_0", "context": 256, "measure": False}
    step = Bundle.model_validate(settings)
    step.run(Artifact(tiny("llama"), {"format": "hf", "source": {}}), out, Context())
    return out


@pytest.fixture
def hostile(made: Path, tmp_path: Path) -> Path:
    """A whole bundle whose scripts leave a mark, with the checksums of those."""
    folder = shutil.copytree(made, tmp_path / "hostile")
    mark = tmp_path / "ran"
    for name in ("bench.sh", "python.sh"):
        (folder / name).write_text(f"touch {mark}\n")
    for name in ("bench.py", "chat.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w')\n")
    (folder / "requirements.txt").write_text("evil==1\n")
    making.write_sums(folder)
    return folder


def through(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Lets a script stand for ssh; the last of its arguments is what would run there."""
    program = folder / "ssh"
    program.write_text(f"#!{sys.executable}\nimport os, subprocess, sys\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("LIGHTEN_SSH", str(program))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


HERE = "os.execvp('sh', ['sh', '-c', sys.argv[-1]])"


def test_a_device_gets_the_scripts_of_this_lighten(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp", reason="a device runs llama-cpp-python, which is compiled")
    through(monkeypatch, tmp_path, HERE)
    found = device.measure_there([str(hostile)], "ssh://box", silent, python=sys.executable)
    (row,) = Results.model_validate(found).variants
    assert row.speed[0].decode_tok_s and row.perplexity
    assert not (tmp_path / "ran").exists()
    assert len(row.notes) == 4
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_nothing_that_a_bundle_brings_to_run_is_sent(hostile: Path) -> None:
    copy = received.read_bundle(hostile)
    assert str(hostile.parent / "ran").encode() not in copy.small and b"evil" not in copy.small
    assert [note.split()[3] for note in copy.notes] == ["python.sh", "bench.sh", "bench.py", "requirements.txt"]


def test_a_bundle_of_this_lighten_is_measured_as_it_is(made: Path) -> None:
    copy = received.read_bundle(made)
    assert copy.notes == () and list(copy.models) == ["model-Q8_0.gguf"]
    with tarfile.open(fileobj=io.BytesIO(copy.small)) as tar:
        sent = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert sent["bench.py"] == (made / "bench.py").read_bytes()
    assert set(sent) == {"bundle.json", "perplexity.txt", "requirements.txt", "python.sh", "bench.sh", "bench.py"}


def test_the_copy_is_the_persons_alone(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    through(monkeypatch, tmp_path, HERE)
    copy = received.read_bundle(made)
    there = device.Device(device.parse_target("ssh://box"), copy.key, sys.executable)
    device.send(there, copy, silent)
    files = list((tmp_path / "cache").rglob("*"))
    assert len(files) >= 4 and all(not stat.S_IMODE(path.stat().st_mode) & 0o077 for path in files)
    there.drop()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"file": "../x.gguf"}, "files: not a model"),
        ({"files": ["bench.py"], "file": "bench.py"}, "files: not a model"),
        ({"target": "$(id)"}, "target: String should match"),
        ({"gpu": "no"}, "gpu: Input should be"),
        ({"files": []}, "files: List should have"),
        ({"params": float("nan")}, "NaN is no number"),
    ],
)
def test_facts_of_a_bundle_are_checked(made: Path, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    folder = shutil.copytree(made, tmp_path / "copy")
    facts = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(facts | change))
    making.write_sums(folder)
    with pytest.raises(Failure, match=told):
        received.read_bundle(folder)


def test_links_in_a_bundle_are_refused(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "copy")
    secret = tmp_path / "secret"
    secret.write_text("x")
    (folder / "perplexity.txt").unlink()
    (folder / "perplexity.txt").symlink_to(secret)
    making.write_sums(folder)
    with pytest.raises(Failure, match=r"perplexity\.txt' is missing or no plain file"):
        received.read_bundle(folder)


def packed(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    path.write_bytes(zstandard.ZstdCompressor().compress(plain.getvalue()))
    return path


def file(name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, **more: Any) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type = kind
    for key, value in more.items():
        setattr(member, key, value)
    return member, content


SPARSE = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9" * 15}
HOSTILE = {
    "a symbolic link": ([file("b/x", b"", tarfile.SYMTYPE, linkname="/etc/passwd")], "no plain file"),
    "a hard link": ([file("b/y"), file("b/x", b"", tarfile.LNKTYPE, linkname="b/y")], "no plain file"),
    "a device": ([file("b/x", b"", tarfile.CHRTYPE, devmajor=1, devminor=5)], "no plain file"),
    "a pipe": ([file("b/x", b"", tarfile.FIFOTYPE)], "no plain file"),
    "a sparse file": ([file("b/x", b"0" * 512, pax_headers=SPARSE)], "no plain file"),
    "a parent": ([file("../x")], "DIRECTORY/FILE"),
    "a parent inside": ([file("b/../../x")], "DIRECTORY/FILE"),
    "an absolute path": ([file("/tmp/x")], "DIRECTORY/FILE"),
    "a directory inside": ([file("b/c/x")], "DIRECTORY/FILE"),
    "a name that hides": ([file("b/.x")], "DIRECTORY/FILE"),
    "a name of controls": ([file("b/\x1b[31m")], "DIRECTORY/FILE"),
    "a name twice": ([file("b/x"), file("b/x")], "twice"),
    "two directories": ([file("a/x"), file("b/x")], "two directories"),
    "many files": ([file(f"b/{n}", b"") for n in range(2100)], "more than 2,000 files"),
    "much of nothing": ([file("b/x", bytes(3_000_000))], "more than an archive of its size can hold"),
    "long headers": ([file("b/x", pax_headers={"comment": "y" * 3_000_000})], "headers are larger"),
    "nothing": ([], "there is nothing in it"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_archives_that_are_none_of_ours_are_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "SLACK", 2_000_000)
    members, told = HOSTILE[kind]
    path = packed(tmp_path / "x.tar.zst", members)
    (into := tmp_path / "into").mkdir()
    with pytest.raises(Failure, match=told) as found:
        archive.unpack(path, into)
    assert str(found.value).startswith(str(path)) and "\n" not in str(found.value) and "\x1b" not in str(found.value)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["into", "x.tar.zst"]


def test_what_the_disk_cannot_hold_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed(tmp_path / "x.tar.zst", [file("b/x", os.urandom(10_000))])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))  # type: ignore[attr-defined]
    with pytest.raises(Failure, match=r"x in it has 0 MB, and 0 MB are free here"):
        archive.unpack(path, tmp_path)
    assert not (tmp_path / "b").exists()


ROW = sample().variants[1].model_copy(update={"name": "x"})
SENT = sample().model_copy(update={"variants": [ROW]}).model_dump(mode="json", by_alias=True)
FIRST = SENT["variants"][0]
TALKS = {
    "without end": ("while True: os.write(1, b'x' * (1 << 16))", "says more than"),
    "errors without end": ("for _ in range(100): os.write(2, b'\\x1b[31m' * (1 << 14))\nsys.exit(3)", "copying failed"),
    "sizes of other files": (
        "print('lighten have ../../../etc/passwd 5\\nlighten have model-Q8_0.gguf \u00b2\\nlighten free \u00b2\\n"
        "lighten have')",
        "the copy is damaged",
    ),
    "nothing": ("", "the copy is damaged"),
}


@pytest.mark.parametrize("kind", TALKS)
def test_a_device_that_talks(kind: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, told = TALKS[kind]
    through(monkeypatch, tmp_path, script)
    with pytest.raises(Failure, match=told) as found:
        device.measure_there([str(made)], "ssh://box", silent)
    assert "\x1b" not in str(found.value) and len(str(found.value)) < 1000


EVENTS: dict[str, tuple[Any, str]] = {
    "NaN": ({"results": SENT | {"machine": {"x": float("nan")}}}, "exit code 0"),
    "no results": ({"results": [1]}, "cannot be read"),
    "none": ({"results": SENT | {"variants": []}}, "of 0 models"),
    "two": (
        {"results": SENT | {"variants": [SENT["variants"][0], SENT["variants"][0] | {"name": "y"}]}},
        "of 2 models",
    ),
    "a wrong name": ({"results": SENT | {"variants": [FIRST | {"name": "../x"}]}}, "cannot be read"),
    "a long line": ({"progress": [0, 1, "x" * (5 << 20)]}, "says more than"),
}


@pytest.mark.parametrize("kind", EVENTS)
def test_results_of_a_device_are_checked(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value, told = EVENTS[kind]
    (tmp_path / "said").write_text(json.dumps(value) + "\n")
    through(monkeypatch, tmp_path, f"sys.stdout.write(open({str(tmp_path / 'said')!r}).read())")
    there = device.Device(device.parse_target("ssh://box"), "0" * 64)
    with pytest.raises(LightenError, match=told):
        device.bench(there, [], silent, "mine")


def test_what_a_device_says_is_shown_and_not_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"name": "box \x1b]0;owned\x07", "cpu": "\u202e"}
    said = [
        "Welcome!",
        json.dumps([1]),
        "[" * 100_000,
        json.dumps({"progress": [1, 2, "\x1b[2J"]}),
        json.dumps({"progress": [1e999, 2, "x"]}),
        json.dumps({"progress": [2, 1, "x"]}),
        json.dumps({"results": SENT | {"machine": machine}}),
    ]
    (tmp_path / "said").write_text("\n".join(said) + "\n")
    through(monkeypatch, tmp_path, f"sys.stdout.write(open({str(tmp_path / 'said')!r}).read())")
    notes: list[tuple[int, int, str]] = []
    there = device.Device(device.parse_target("ssh://box"), "0" * 64)
    found = device.bench(there, [], lambda *each: notes.append(each), "mine")
    assert notes == [(1, 2, "␛[2J")]
    assert found["machine"] == {"name": "box ␛]0;owned␇", "cpu": "�"}
    assert found["variants"][0]["name"] == "mine"
