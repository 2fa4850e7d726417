"""Names, keys, TLS, and servers that are busy, slow, down or fail."""

import http.server
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import pytest

from lighten.errors import Failure, RequestError
from lighten.evaluate.runtimes.choose import open_runtime
from lighten.evaluate.runtimes.endpoint import connection
from lighten.evaluate.runtimes.endpoint.address import Address
from lighten.evaluate.runtimes.endpoint.connection import BUSY, Http
from lighten.evaluate.runtimes.endpoint.runtime import EndpointRuntime
from lighten.evaluate.runtimes.measurable import find_all
from lighten.evaluate.runtimes.runtime import Question, Runtime
from lighten.step import silent
from tests.command import lighten
from tests.evaluate.conftest import Tiny
from tests.evaluate.runtimes.api_server import Manners, serving
from tests.evaluate.runtimes.endpoint.measured import KEY, ran


def test_the_name_of_the_model_is_checked(tmp_path: Path) -> None:
    with serving(Manners(names=["alpha", "beta"])) as url:
        with pytest.raises(RequestError, match=r"serves several models: name one with --model; there is alpha, beta"):
            find_all([url], lambda _: None)
        done = lighten("evaluate", url, "--model", "alpah", cwd=tmp_path)
        assert done.returncode == 2 and "did you mean alpha? --model is one of alpha, beta" in done.stderr
    with serving(Manners(names=["only"])) as url:
        (found,) = find_all([url], lambda _: None)
        assert found.name == f"{url}#model=only"
        assert find_all([url.removesuffix("/v1")], lambda _: None)[0].name == f"{url}#model=only"
        wrong = url.replace("/v1", "/api")
        with pytest.raises(RequestError, match=f"is it {re.escape(wrong)}/v1"):
            find_all([wrong], lambda _: None)


def test_a_key_is_sent_and_never_shown(
    tiny: Tiny, model: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Manners(key=KEY, forms={"echo"}), model) as url:
        monkeypatch.delenv("OPENAI_API_KEY")
        with pytest.raises(RequestError, match=r"asks for a key \(401: .*there is no key in LIGHTEN_API_KEY"):
            find_all([url], lambda _: None)
        monkeypatch.setenv("LIGHTEN_API_KEY", "sk-wrong-key-9")
        with pytest.raises(RequestError, match="is not accepted") as raised:
            find_all([url], lambda _: None)
        assert "sk-wrong" not in str(raised.value) and "(key)" in str(raised.value)
        monkeypatch.delenv("LIGHTEN_API_KEY")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        flags = ("--samples", 2, "--length", 16, "--skip", "speed", "--skip", "accuracy", "--model", "tiny")
        done = lighten("evaluate", tiny(), url, *flags, "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = [file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert not any(KEY.encode() in text for text in (*written, done.stdout.encode(), done.stderr.encode()))
    base, served = json.loads((tmp_path / "out/results.json").read_text())["variants"]
    assert (served["runtime"], served["path"], served["size_bytes"]) == ("endpoint", f"{url}#model=tiny", None)
    assert served["perplexity"]["value"] == pytest.approx(base["perplexity"]["value"], rel=1e-4)
    assert served["delta"]["perplexity"]["relative"] == pytest.approx(0, abs=1e-4)
    assert served["delta"]["size_ratio"] is None


def test_a_key_of_another_service_stays_here_over_plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert connection.api_key("http://example.org/v1") is None
    assert connection.api_key("https://example.org/v1") == connection.api_key("http://localhost:1/v1") == KEY
    monkeypatch.setenv("LIGHTEN_API_KEY", "a\nb")
    with pytest.raises(RequestError, match="characters that no key has") as raised:
        connection.api_key("http://example.org/v1")
    assert "a\nb" not in str(raised.value)


def test_a_busy_server_is_waited_for_and_given_up(model: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LEAST_WAIT", 0.01)
    manners, notes = Manners(forms={"echo"}), []
    with serving(manners, model) as url:
        manners.busy = 3  # while it is asked what it can do
        opened = open_runtime(url)
        assert isinstance(opened, EndpointRuntime) and opened._abilities.writer and manners.busy == 0
        assert "ignore_eos" in opened._abilities.writer.wishes and opened.capabilities == {"scores", "decodes"}
        manners.busy = 2
        opened.choose_many([Question([5], [[6]])], lambda done, total, note: notes.append(note))
        assert len([each for each in notes if each.startswith(BUSY) and "429" in each]) == 2
        manners.busy, manners.retry_after = 100, "90"
        slept: list[float] = []
        monkeypatch.setattr(time, "sleep", lambda seconds: slept.append(seconds))
        with pytest.raises(Failure, match=r"is too busy \(429 too many .*after 90 s of waiting.*120 s at most"):
            opened.choose_many([Question([5], [[6]])], silent)
        assert [each for each in slept if each >= 1] == [90]


def test_a_wait_is_seconds_or_a_date() -> None:
    assert connection.seconds_to_wait("7") == 7 and connection.seconds_to_wait("soon") is None
    assert connection.seconds_to_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert connection.seconds_to_wait("Wed, 21 Oct 2099 07:28:00 GMT") > 1e6  # type: ignore[operator]


def test_a_server_that_is_down_slow_or_no_server(tmp_path: Path) -> None:
    with serving(Manners()) as url:
        pass
    done = lighten("evaluate", url, cwd=tmp_path)
    assert done.returncode == 1 and "is the server running" in done.stderr and "Traceback" not in done.stderr
    with (
        serving(Manners(delay=0.5)) as url,
        pytest.raises(Failure, match=r"/v1/completions in time \(0.2 s\).*--timeout"),
    ):
        find_all([f"{url}#timeout=0.2"], lambda _: None)
    with pytest.raises(Failure, match="there is no host"):
        find_all(["http://no-such-host.invalid/v1"], lambda _: None)
    plain = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=plain.serve_forever, daemon=True).start()
    with plain:
        with pytest.raises(RequestError, match=r"there is no OpenAI API at .*\(/models: 404"):
            find_all([f"http://127.0.0.1:{plain.server_address[1]}"], lambda _: None)
        plain.shutdown()


def test_tls_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        serving(Manners()) as url,
        pytest.raises(Failure, match=r"does not speak TLS as expected.*is its address http://"),
    ):
        find_all([url.replace("http:", "https:")], lambda _: None)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        with pytest.raises(Failure, match="takes the connection, and says nothing by TLS"):
            find_all([f"https://127.0.0.1:{mute.getsockname()[1]}#timeout=0.2"], lambda _: None)
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving(Manners(), tls=context) as url:
        with pytest.raises(Failure, match=r"certificate of 127.0.0.1:\d+ is not trusted.*SSL_CERT_FILE"):
            find_all([url], lambda _: None)
        with pytest.raises(Failure, match="is its address https://"):
            find_all([url.replace("https:", "http:")], lambda _: None)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert find_all([url], lambda _: None)[0].name == f"{url}#model=tiny"


def test_requests_that_fail_under_load_are_counted(tiny: Tiny, tmp_path: Path) -> None:
    manners = Manners()
    with serving(manners) as url:
        asked = {"rate": [], "concurrency": 2, "requests": 6, "prompt": 8, "generate": 4}
        place = f"{url}#tokenizer={tiny()}"
        manners.every, manners.streamed = 3, -3  # the first ones find out what the server can do
        (row,) = ran("load", asked, place, tmp_path / "a")["load"]
    assert row["completed"] < 6 and row["errors"] == {"out of memory": 6 - row["completed"]}
    assert row["throughput_tok_s"] > 0


def test_a_closed_connection_is_opened_again(model: Runtime) -> None:
    manners = Manners()
    with serving(manners, model) as url:
        http_ = Http(Address.parse(url))
        assert http_.get(f"{url}/models")
        http_._own.connection.sock.shutdown(2)
        assert http_.get(f"{url}/models")["data"][0]["id"] == "tiny"
