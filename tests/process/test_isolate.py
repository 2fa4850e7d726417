import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lighten.errors import Failure, RequestError
from lighten.process.isolate import Nursery, environment, run_isolated

HERE = "tests.process.test_isolate"


def double(payload, report):
    print("noise on standard output does not disturb the answer")
    report(1, 2, "half")
    return {"twice": 2 * payload["n"]}


def allocate(payload, report):
    return len(bytearray(payload["n"]))


def refuse(payload, report):
    raise RequestError("no such thing")


def fail(payload, report):
    raise ZeroDivisionError("by zero")


def full(payload, report):
    with open("/dev/full", "w") as file:
        file.write("x" * 100_000)


def crash(payload, report):
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def wait(payload, report):
    report(os.getpid(), 0, "")
    time.sleep(60)


def test_answers_and_reports() -> None:
    seen = []
    outcome = run_isolated(f"{HERE}:double", {"n": 21}, lambda *event: seen.append(event))
    assert outcome.value == {"twice": 42}
    assert seen == [(1, 2, "half")]
    assert outcome.seconds > 0


def test_memory_is_its_own() -> None:
    ballast = bytearray(300_000_000)
    small = run_isolated(f"{HERE}:allocate", {"n": 1}, fresh=True).peak_rss_bytes
    large = run_isolated(f"{HERE}:allocate", {"n": 200_000_000}, fresh=True).peak_rss_bytes
    assert small < len(ballast)
    assert 150_000_000 < large - small < 250_000_000


def where(payload, report):
    import sys

    return {"parent": os.getppid(), "cwd": os.getcwd(), "told": os.environ.get("TOLD"), "torch": "torch" in sys.modules}


def test_children_of_one_interpreter_are_as_if_started_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (run_isolated(f"{HERE}:where", {}).value for _ in range(2))
    assert first == second | {"cwd": os.getcwd()}
    assert first["torch"]
    assert first["parent"] != os.getpid()
    monkeypatch.setenv("TOLD", "yes")
    changed = run_isolated(f"{HERE}:where", {}).value
    assert changed["told"] == "yes"
    assert changed["parent"] != first["parent"]
    monkeypatch.chdir(tmp_path)
    assert run_isolated(f"{HERE}:where", {}).value["cwd"] == str(tmp_path)
    alone = run_isolated(f"{HERE}:where", {}, fresh=True).value
    assert not alone["torch"]
    assert alone["parent"] == os.getpid()


def test_the_next_one_runs_after_a_crash() -> None:
    with pytest.raises(Failure):
        run_isolated(f"{HERE}:crash", {})
    assert run_isolated(f"{HERE}:double", {"n": 2}).value == {"twice": 4}
    Nursery.ready().close()
    assert run_isolated(f"{HERE}:double", {"n": 3}).value == {"twice": 6}


def test_errors_keep_their_kind() -> None:
    with pytest.raises(RequestError, match="no such thing"):
        run_isolated(f"{HERE}:refuse", {})
    with pytest.raises(Failure, match="ZeroDivisionError: by zero"):
        run_isolated(f"{HERE}:fail", {})


def test_a_full_disk_is_one_clear_message() -> None:
    with pytest.raises(Failure, match=r"no space left on the device: free some space.*lighten gc"):
        run_isolated(f"{HERE}:full", {})


def test_a_crash_is_one_message_with_its_last_words() -> None:
    with pytest.raises(Failure, match="SIGSEGV") as caught:
        run_isolated(f"{HERE}:crash", {})
    assert "last words" in str(caught.value)


def test_dies_with_its_parent() -> None:
    script = f"""
from lighten.process.isolate import run_isolated
run_isolated('{HERE}:wait', {{}}, lambda pid, *_: print(pid, flush=True))
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(50):
        if not os.path.exists(f"/proc/{child}"):
            return
        with open(f"/proc/{child}/stat") as status:
            if status.read().split()[2] == "Z":
                return
        time.sleep(0.1)
    pytest.fail("the child outlived its parent")


def trap(folder: Path) -> Path:
    """Puts modules of well-known names into a directory; returns the file that appears when one is imported."""
    mark = folder / "imported"
    for name in ("torch", "typer", "yaml", "transformers", "numpy", "llama_cpp"):
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()")
    return mark


@pytest.mark.parametrize("empty", ["", os.pathsep])
def test_nothing_is_imported_from_the_working_directory(
    empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = trap(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{empty}{os.environ['PYTHONPATH']}")
    for fresh in (False, True):
        assert run_isolated(f"{HERE}:own_child", {}, fresh=fresh).value == 0
    monkeypatch.undo()  # the next nursery is one of an ordinary environment
    assert not mark.exists()


def own_child(payload, report):
    import numpy  # noqa: F401

    return subprocess.run([sys.executable, "-c", "import yaml, torch"]).returncode


@pytest.mark.parametrize(
    ("command", "colon"),
    [
        (["-m", "lighten"], ""),
        (["-m", "lighten"], ":"),
        (["-P", "-c", "from lighten.__main__ import main; main()"], ":"),
    ],
)
def test_neither_does_the_command(command: list[str], colon: str, tmp_path: Path) -> None:
    mark = trap(tmp_path)
    environment = {**os.environ, "PYTHONPATH": f"{colon}{os.environ['PYTHONPATH']}"}
    done = subprocess.run(
        [sys.executable, *command, "ls", "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, mark.exists()) == (0, False), done.stderr


def test_a_directory_that_the_person_names_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"mine::{os.environ['PYTHONPATH']}")
    assert environment()["PYTHONPATH"] == f"{tmp_path / 'mine'}{os.pathsep}{os.environ['PYTHONPATH'].split('::')[1]}"
