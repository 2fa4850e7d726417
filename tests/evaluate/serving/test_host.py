"""Servers that lighten starts: a real llama-server, and one that has misfortunes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lighten.errors import Failure, RequestError
from lighten.evaluate.runtimes.choose import open_runtime
from lighten.evaluate.runtimes.runtime import Question
from lighten.evaluate.serving import SERVERS
from lighten.evaluate.serving.host import Host, Wanted, checked, lists, positions, program_of
from lighten.evaluate.serving.program import Program
from lighten.evaluate.serving.settings import Serve
from lighten.evaluate.serving.vllm import Vllm
from lighten.process.background import Background
from lighten.process.isolate import environment
from lighten.step import silent
from tests.evaluate.conftest import Tiny


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SERVERS.rows, "scripted", "tests.evaluate.serving.scripted:Scripted")


def wanted(place: Path, name: str = "tiny", **serve: Any) -> Wanted:
    return Wanted(place, name, Serve.model_validate({"with": "scripted", **serve}), 512, "cpu")


def gone(pid: int) -> bool:
    """Returns whether a process ends within some seconds."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_llama_server_is_started_once_and_ended_with_the_block(tiny_gguf: Path, tmp_path: Path) -> None:
    said: list[str] = []
    asked = wanted(tiny_gguf, **{"with": "llama.cpp", "args": ["--no-warmup"]})
    with Host(tmp_path / "logs", said.append) as host:
        first = host.serving(asked)
        assert host.serving(asked) is first and len(said) == 1 and str(tmp_path / "logs/tiny.log") in said[0]
        port = int(first.address.host.rpartition(":")[2])
        served, direct = open_runtime(str(first.address)), open_runtime(tiny_gguf)
        questions = [Question([40, 41], [[42, 43]])]
        ours, theirs = (each.choose_many(questions, silent)[0][0].logprob for each in (served, direct))
        assert ours == pytest.approx(theirs, rel=1e-3)
        assert first.facts["with"] == "llama.cpp" and first.facts["args"] == ["--no-warmup"] and first.facts["packages"]
        assert lists(port, "tiny") and not lists(port, "other")
        again = host.serving(wanted(tiny_gguf, "other", **{"with": "llama.cpp"}))
        assert again.address.model == "other" and not lists(port, "tiny")
        port = int(again.address.host.rpartition(":")[2])
    assert not lists(port, "other")
    assert (tmp_path / "logs/tiny.log").stat().st_size > 0 and (tmp_path / "logs/other.log").stat().st_size > 0


def test_a_server_that_does_not_start_says_why_and_is_not_tried_again(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    asked = [wanted(tmp_path / "bad.gguf", "bad", **{"with": "llama.cpp"}), wanted(tmp_path, args=["--fail"])]
    with Host(tmp_path / "logs", said.append) as host:
        for each in asked * 2:
            with pytest.raises(Failure, match=r"ended before it answered \(.*\): .*; its log is .*logs/") as raised:
                host.serving(each)
        assert "(exit code 1): RuntimeError: no room for the weights; its log is" in str(raised.value)
        assert len(said) == 2
        with pytest.raises(Failure, match=r"does not answer after 1 s \(start: SECONDS gives it more\): "):
            host.serving(wanted(tmp_path, args=["--hang"], start=1))


def test_a_server_that_is_killed_is_named_and_not_started_again(tiny: Tiny, tmp_path: Path) -> None:
    asked = wanted(tiny(), args=["--requests", 3])
    with Host(tmp_path, lambda line: None) as host:
        running = host.serving(asked)
        assert running.facts["kernels"] == ["plain"]
        with pytest.raises(Failure) as raised:
            open_runtime(str(running.address))
        message = host.why(asked, str(raised.value))
        assert message.startswith("scripted (lighten ") and "ended while it was asked (killed by SIGKILL" in message
        with pytest.raises(Failure, match="killed by SIGKILL"):
            host.serving(asked)
        assert host.why(wanted(tiny(), "other"), "as it was") == "as it was"


CHILD = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']); "
CHILD += "print(p.pid, flush=True); time.sleep(99)"
PARENT = """
import sys, time
from pathlib import Path
from lighten.process.background import Background
from lighten.process.isolate import environment
made = Background("test", [sys.executable, "-c", sys.argv[1]], environment(), Path.cwd(), Path("log"))
while not made.text().strip():
    time.sleep(0.05)
print("ready", flush=True)
time.sleep(99)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_outlives_this_process_whatever_ends_it(tmp_path: Path, number: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=tmp_path
    )
    assert parent.stdout and parent.stdout.readline() == b"ready\n"
    grandchild = int((tmp_path / "log").read_text())
    parent.send_signal(number)
    parent.wait()
    assert gone(grandchild)


def test_a_program_that_ends_leaves_nothing_running(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD.replace('time.sleep(99)"', 'sys.exit(3)"').replace("; time.sleep(99)", "")]
    made = Background("test", command, environment(), tmp_path, tmp_path / "log")
    while made.ended is None:
        time.sleep(0.05)
    assert made.ended == "exit code 0" and gone(int(made.last_line()))
    made.close()
    made = Background("test", [str(tmp_path / "none")], dict(os.environ), tmp_path, tmp_path / "log")
    until = time.monotonic() + 20
    while made.ended is None and time.monotonic() < until:
        time.sleep(0.05)
    with pytest.raises(Failure, match=r"test ended at once \(exit code 127\): .*none cannot be started: No such file"):
        made.check("at once")


def test_settings_are_checked_and_told() -> None:
    assert Serve.model_validate("VLLM").model_dump(mode="json") == {
        "with": "vllm",
        "python": None,
        "args": [],
        "start": 600.0,
    }
    made = Serve.model_validate({"with": "vllm", "args": ["--max-num-seqs", 4]})
    assert made.args == ("--max-num-seqs", "4") and made.runs_what_it_names
    assert Serve.model_validate(made.model_dump(mode="json")) == made
    for wrong, words in (
        ("vlm", "did you mean vllm"),
        ({"with": "vllm", "args": ["--port=1"]}, "lighten gives --port itself"),
        ({"with": "vllm", "args": "--port 1"}, "tuple"),
        ({"with": "vllm", "start": 0}, "greater than 0"),
        ({"with": "vllm", "program": "/bin/sh"}, "Extra inputs"),
    ):
        with pytest.raises(ValidationError, match=words):
            Serve.model_validate(wrong)


def test_an_environment_without_the_server_is_refused(tmp_path: Path) -> None:
    for python, words in (
        (tmp_path / "none", "there is no Python .*none: give the path"),
        (Path("/bin/false"), "/bin/false is no Python that works"),
        (Path("/bin/echo"), "/bin/echo is no Python that works"),
        (sys.executable, r"needs the module no_such_server, which .* does not have: .* -m pip install vllm"),
        (
            None,
            r"needs the module no_such_server, which this environment does not have: pip install vllm.*python: PATH",
        ),
    ):
        serve = Serve.model_validate({"with": "vllm", "python": python})
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RequestError, match=words):
            patch.setattr(Vllm, "modules", ("no_such_server",))
            checked(serve)
    found = checked(Serve.model_validate({"with": "scripted", "python": sys.executable}))
    assert found.python == [sys.executable] and "PYTHONPATH" not in found.env


def test_files_of_another_runtime_are_refused() -> None:
    for name, runtime, words in (
        ("vllm", "llama.cpp", "model directories"),
        ("vllm", "mlx", "model directories"),
        ("llama.cpp", "torch", ".gguf files"),
        ("mlx", "llama.cpp", "MLX directories and model directories"),
    ):
        with pytest.raises(RequestError, match=rf"here: {name} serves {words}, and this is for {runtime}"):
            program_of(Serve.model_validate(name)).refuse(runtime, "here")


def test_a_server_may_name_one_runtime() -> None:
    class One(Program):
        name, serves = "one", "torch"  # type: ignore[assignment]

    One().refuse("torch", "here")
    with pytest.raises(RequestError, match=r"here: one serves model directories, and this is for or:"):
        One().refuse("or", "here")


def test_a_server_is_not_started_for_more_than_the_model_takes() -> None:
    assert [positions(512, 600), positions(None, 9000), positions(131072), positions(131072, 20000)] == [
        512,
        9000,
        8192,
        20000,
    ]


def test_what_vllm_says_of_an_artifact_is_read_in_its_log() -> None:
    log = (
        "(EngineCore pid=1) INFO [core.py:133] Initializing a V1 LLM engine with config: dtype=torch.bfloat16, "
        "quantization=auto_gptq, enforce_eager=True\n"
        "(Worker pid=2) INFO [__init__.py:923] Using CPUWNA16LinearKernel for mixed-precision linear\n"
        "(Worker pid=2) INFO [auto_gptq.py:352] Using CPUWNA16LinearKernel for AutoGPTQLinearMethod\n"
    )
    assert Vllm().loaded(log) == {
        "quantization": "auto_gptq",
        "dtype": "bfloat16",
        "kernels": ["CPUWNA16LinearKernel for mixed-precision linear", "CPUWNA16LinearKernel for AutoGPTQLinearMethod"],
    }
    assert Vllm().loaded("quantization=None, dtype=torch.float32") == {"quantization": None, "dtype": "float32"}
    later = "ValueError: no kernel for 3 bits\nRuntimeError: Engine core initialization failed. See root cause above."
    later = "(APIServer pid=9) WARNING 11-30 11:17:01 [utils.py:2] limits can cause `OSError: too many files`\n" + later
    assert Vllm().cause(later) == "ValueError: no kernel for 3 bits" and Vllm().cause("all is well") is None
