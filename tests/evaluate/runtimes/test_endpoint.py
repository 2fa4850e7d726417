"""Models on servers: a real llama-server beside llama.cpp itself, other forms beside torch, and servers with errors."""

import http.server
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from lighten.errors import Failure, RequestError
from lighten.evaluate import machine
from lighten.evaluate.accuracy.harness.generation import write
from lighten.evaluate.loaders.programs import loaders
from lighten.evaluate.run import measure
from lighten.evaluate.runtimes.choose import added, find_opener, open_runtime, open_tokenizer, openers, words_of
from lighten.evaluate.runtimes.endpoint import connection
from lighten.evaluate.runtimes.endpoint.address import Address, addressed
from lighten.evaluate.runtimes.endpoint.connection import BUSY, Http
from lighten.evaluate.runtimes.endpoint.events import Events
from lighten.evaluate.runtimes.endpoint.runtime import EndpointRuntime, shared
from lighten.evaluate.runtimes.measurable import find_all, find_measurable
from lighten.evaluate.runtimes.runtime import Question, Runtime, Tokenizer
from lighten.evaluate.runtimes.wanted import Sampling, Wanted
from lighten.evaluate.speed.server import LlamaServer
from lighten.step import silent
from tests.command import lighten
from tests.evaluate.conftest import Tiny, payload
from tests.evaluate.runtimes.api_server import Manners, serving

KEY = "sk-very-secret-0123"
SMALL = {"length": 48, "samples": 3}
SPEED = {"prompt": 16, "generate": 4, "repeats": 2}


@pytest.fixture(scope="module", autouse=True)
def key() -> Iterator[None]:
    """Gives all tests a key, because a process with another environment takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(connection.KEY, raising=False)
        patch.setenv(connection.OTHER_KEY, KEY)
        yield


@pytest.fixture(scope="module")
def llama(tiny_gguf: Path) -> Iterator[str]:
    """The URL of the API of a llama-server, which has one thread: the model is tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "cores", lambda: 1)
        server = LlamaServer(tiny_gguf, 512, "cpu")
    with server:
        yield f"http://127.0.0.1:{server.port}/v1"


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[Runtime]:
    """The model behind the test's own server."""
    opened = open_runtime(tiny())
    yield opened
    opened.close()


def ran(name: str, settings: dict[str, Any], place: Path | str, out: Path) -> dict[str, Any]:
    """Returns the result of a measurement, which is written to a new directory."""
    out.mkdir()
    return measure(payload(name, settings, place, out), silent)  # type: ignore[arg-type]


# the stream


@given(st.lists(st.text(st.characters(blacklist_characters="\r", blacklist_categories=("Cs",)), min_size=1)), st.data())
def test_events_are_the_same_wherever_their_bytes_are_cut(texts: list[str], data: st.DataObject) -> None:
    ends = data.draw(st.lists(st.sampled_from(["\n", "\r\n", "\r"]), min_size=1))
    lines = [
        each for text in texts for each in (": ping", *(f"data: {part}" for part in text.split("\n")), "id: 7", "")
    ]
    if texts and data.draw(st.booleans()):
        lines.pop()  # a server that leaves out the last empty line
    end = ends[0] if "\r" in ends else None  # "\r" and "\n" of different lines would be one end
    spelled = "".join(line + (end or ends[at % len(ends)]) for at, line in enumerate(lines))
    bytes_ = data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + spelled.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(bytes_)), max_size=20)))
    events = Events()
    found = [each for a, b in zip([0, *cuts], [*cuts, len(bytes_)], strict=True) for each in events.feed(bytes_[a:b])]
    assert found + events.end() == texts


def test_lines_of_one_event_are_one_text() -> None:
    events = Events()
    assert events.feed(b"data: a\r") + events.feed(b"\ndata: b\r\n\r") + events.feed(b"\n") == ["a\nb"]
    assert events.feed(b'data: {"a":\ndata:1}\n\nevent: x\n\ndata\n\n') == ['{"a":\n1}', ""]


# the address


def test_an_address_is_one_text_and_back() -> None:
    for address in (
        Address("http://h:8000/v1"),
        Address("https://h/v1", "org/model name&#", Path("/some dir/t"), 12.5),
    ):
        assert Address.parse(str(address)) == address
    assert Address.parse("http://h/v1/").url == Address.parse("http://h").url == "http://h/v1"
    assert Address("http://h:1/v1").root == "http://h:1"
    assert "secret dir" not in Address("http://h/v1", "m", Path("/secret dir")).shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http://me:pass@h/v1", "has a password or a query"),
        ("http://h/v1?key=pass", "has a password or a query"),
        ("http://", "looks like http://HOST"),
        ("http://h:port/v1", "cannot be read"),
        ("http://h/v1#name=x", "there is model, tokenizer, timeout"),
        ("http://h/v1#timeout=soon", "give the seconds"),
    ],
)
def test_what_is_no_address_is_refused_without_its_secrets(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as raised:
        Address.parse(text)
    assert "pass@" not in str(raised.value) and "key=pass" not in str(raised.value)


def test_names_go_to_their_servers() -> None:
    one, two = "http://a/v1", "http://b/v1"
    found = addressed(["dir", one, two], ["m", "n"], [])
    assert [Address.parse(each).model for each in found[1:]] == ["m", "n"] and found[0] == "dir"
    assert [Address.parse(each).model for each in addressed([one, two], ["m"], [])] == ["m", "m"]
    with pytest.raises(RequestError, match="--model is given 2 times for 3 servers"):
        addressed([one, two, one], ["m", "n"], [])
    with pytest.raises(RequestError, match="--tokenizer is about models on servers"):
        addressed(["dir"], [], ["t"])
    with pytest.raises(RequestError, match="needs the files of a model"):
        find_measurable(one)


# llama-server beside llama.cpp


def test_perplexity_through_a_server_is_that_of_llama_cpp(llama: str, tiny_gguf: Path, tmp_path: Path) -> None:
    ours = ran("perplexity", SMALL, llama, tmp_path / "server")
    theirs = ran("perplexity", SMALL, tiny_gguf, tmp_path / "direct")
    assert ours["perplexity"]["value"] == pytest.approx(theirs["perplexity"]["value"], rel=1e-4)
    assert ours["perplexity"]["tokens"] == theirs["perplexity"]["tokens"]
    assert ours["perplexity"]["protocol"]["ids_sha256"] == theirs["perplexity"]["protocol"]["ids_sha256"]
    assert ours["perplexity"]["bits_per_byte"] == pytest.approx(theirs["perplexity"]["bits_per_byte"], rel=1e-4)
    assert (ours["runtime"], ours["device"], ours["dtype"]) == ("endpoint", "server", "all F32")
    assert "one forced token after the other" in ours["detail"] and ours["tokenizer_match"]


def test_accuracy_through_a_server_is_that_of_llama_cpp(llama: str, tiny_gguf: Path, tmp_path: Path) -> None:
    ran("accuracy", {"limit": 3}, llama, tmp_path / "server")
    ran("accuracy", {"limit": 3}, tiny_gguf, tmp_path / "direct")
    ours, theirs = (load_file(tmp_path / name / "values.safetensors") for name in ("server", "direct"))
    assert ours["logprobs"] == pytest.approx(theirs["logprobs"], rel=1e-3, nan_ok=True)
    assert (ours["choice"] == theirs["choice"]).all() and (ours["choice_norm"] == theirs["choice_norm"]).all()


def test_a_server_writes_what_llama_cpp_writes(llama: str, tiny_gguf: Path) -> None:
    server, own = open_runtime(f"{llama}#tokenizer={tiny_gguf}"), open_runtime(tiny_gguf)
    tokenizer = open_tokenizer(tiny_gguf)
    asked = [Wanted(tokenizer.encode(text), 6 + n) for n, text in enumerate(("The dog went", "One two", "A"))]
    seen: list[tuple[int, int]] = []
    found = write(server, tokenizer, (), asked, lambda done, total, note: seen.append((done, total)))
    expected = write(own, tokenizer, (), asked, silent)
    assert (found, seen) == (expected, [(n, 3) for n in range(4)])
    letter = expected[0][3]
    until = [Wanted(asked[0].prompt, 6, ("never here", letter))]
    assert write(server, tokenizer, (), until, silent) == [expected[0][: expected[0].index(letter)]]
    warm = [Wanted(each.prompt, 6, sampling=Sampling(0.8, 10, 0.9)) for each in asked]
    assert len(write(server, tokenizer, (), warm, silent)) == 3
    assert words_of(f"{llama}#tokenizer={tiny_gguf}").render.keys() == {"default"}
    server.close()


def test_parts_of_characters_have_log_probabilities_too(llama: str, tiny_gguf: Path) -> None:
    tokenizer, direct, served = open_tokenizer(tiny_gguf), open_runtime(tiny_gguf), open_runtime(llama)
    parts = [each for each in range(direct.vocab) if "\ufffd" in tokenizer.decode([each])]
    endings = [parts[at : at + 6] for at in range(0, len(parts), 6)] + [[2, 40]]  # and one through the end of text
    assert len(parts) > 128
    greedy = [int(direct.logits(np.array([40, 41, 42]))[-1].argmax())]
    ours, theirs = (each.choose([40, 41, 42], [*endings, greedy]) for each in (served, direct))
    assert [each.logprob for each in ours] == pytest.approx([each.logprob for each in theirs], rel=1e-3)
    assert [each.greedy for each in ours] == [each.greedy for each in theirs] and ours[-1].greedy
    direct.close()


def test_speed_and_load_through_a_server(llama: str, tmp_path: Path) -> None:
    speed = ran("speed", {**SPEED, "batch": [1, 2]}, llama, tmp_path / "speed")
    for each in speed["speed"]:
        assert each["prefill_tok_s"] > 0 and each["decode_tok_s"] > 0 and each["ttft_ms"]["p50"] > 0
    assert "peak_rss_bytes" not in speed["memory"] and "joules_per_token" not in speed["energy"]
    asked = {"rate": 50, "concurrency": [1, 3], "requests": 4, "prompt": 20, "generate": 6}
    load = ran("load", asked, llama, tmp_path / "load")
    assert [(each["rate"], each["concurrency"]) for each in load["load"]] == [(50, None), (None, 1), (None, 3)]
    for each in load["load"]:
        assert (each["completed"], each["errors"]) == (4, {}) and each["ttft_ms"]["p50"] > 0
        assert each["server"].startswith("llama.cpp at 127.0.0.1:") and each["throughput_tok_s"] > 0


def test_a_prompt_is_never_one_that_the_server_has_read(llama: str) -> None:
    opened = open_runtime(llama)
    assert isinstance(opened, EndpointRuntime)
    writer, prompts = opened._abilities.writer, []
    assert writer
    write = writer.write
    writer.write = lambda prompt, *more: (prompts.append(prompt), write(prompt, *more))[1]  # type: ignore[method-assign]
    prompt = np.arange(24).reshape(2, 12)
    for _ in range(3):
        found = opened.generate(prompt, 3)
        assert len(found.token_s) == 2 and found.ttft_s > 0
    assert len({each[0] for each in prompts}) == 6 and {len(each) for each in prompts} == {12}
    assert (prompt == np.arange(24).reshape(2, 12)).all()


def test_tokens_of_one_piece_share_its_time() -> None:
    assert shared([1.0, 2.0, 4.0]) == pytest.approx([1, 2, 4])
    assert shared([1.0, 1.0, 2.0, 4.0, 4.0, 4.0, 4.0]) == pytest.approx([1, 1, 2, 2.5, 3, 3.5, 4])
    with pytest.raises(Failure, match="all 2 tokens in one piece"):
        shared([1.0, 1.0])


# other forms, beside torch


@pytest.mark.parametrize("form", ["echo", "prompt_logprobs"])
def test_other_forms_of_log_probabilities(tiny: Tiny, model: Runtime, form: str) -> None:
    with serving(Manners(forms={form}), model) as url:
        served = open_runtime(f"{url}#tokenizer={tiny()}")
        assert served.capabilities == {"scores", "decodes"} and served.context == 511
        questions = [Question([40, 41], [[42], [43, 44, 45]]), Question([7], [[9, 8]])]
        ours, theirs = (each.choose_many(questions, silent) for each in (served, model))
    for each, other in zip([s for q in ours for s in q], [s for q in theirs for s in q], strict=True):
        assert each.logprob == pytest.approx(other.logprob, rel=1e-4) and each.greedy == other.greedy


def test_perplexity_by_echo_and_the_servers_own_tokenizer(tiny: Tiny, model: Runtime, tmp_path: Path) -> None:
    with serving(Manners(forms={"echo"}, tokenizes=True), model, open_tokenizer(tiny())) as url:
        ours = ran("perplexity", SMALL, url, tmp_path / "server")
    theirs = ran("perplexity", SMALL, tiny(), tmp_path / "direct")
    assert ours["perplexity"]["value"] == pytest.approx(theirs["perplexity"]["value"], rel=1e-4)
    assert ours["perplexity"]["bits_per_byte"] == pytest.approx(theirs["perplexity"]["bits_per_byte"], rel=1e-4)


def test_what_a_server_lacks_is_not_available(tiny: Tiny, tmp_path: Path) -> None:
    manners = Manners(streams=False)
    with serving(manners) as url:
        place = f"{url}#tokenizer={tiny()}"
        found = ran("perplexity", SMALL, place, tmp_path / "a")["unavailable"]
        assert "does not give the log-probabilities of a prompt" in found
        assert "does not stream" in ran("speed", SPEED, place, tmp_path / "b")["unavailable"]
        assert "does not stream" in ran("load", {"requests": 2}, place, tmp_path / "c")["unavailable"]
        manners.streams, manners.takes_ids = True, False
        assert "takes no token ids" in ran("accuracy", {"limit": 2}, place, tmp_path / "d")["unavailable"]
        assert "takes no token ids" in ran("speed", SPEED, place, tmp_path / "e")["unavailable"]
        asked = {"rate": 50, "requests": 3, "prompt": 8, "generate": 4}
        (row,) = ran("load", asked, place, tmp_path / "f")["load"]
        assert row["completed"] == 3  # text is enough for that
        assert "--tokenizer" in ran("load", asked, url, tmp_path / "g")["unavailable"]


@pytest.mark.parametrize("form", ["biased", "moved"])
def test_a_bias_that_changes_what_is_told_is_not_used(tiny: Tiny, tmp_path: Path, form: str) -> None:
    with serving(Manners(forms={form})) as url:
        found = ran("accuracy", {"limit": 2}, f"{url}#tokenizer={tiny()}", tmp_path / "a")["unavailable"]
    assert "/completion: the bias that forces a token changes its log-probability" in found


def test_a_server_of_conversations_is_measured_under_load(tiny: Tiny, tmp_path: Path) -> None:
    with serving(Manners(chats=True)) as url:
        place, asked = f"{url}#tokenizer={tiny()}", {"rate": 50, "requests": 3, "prompt": 8, "generate": 4}
        (row,) = ran("load", asked, place, tmp_path / "a")["load"]
        assert "takes no token ids" in ran("perplexity", SMALL, place, tmp_path / "b")["unavailable"]
    assert row["completed"] == 3 and row["server"].endswith("by /chat/completions")


def test_what_is_forbidden_besides_the_api_is_not_there(model: Runtime) -> None:
    with serving(Manners(guarded=True, forms={"echo"}), model) as url:
        assert open_runtime(url).capabilities == {"scores", "decodes"}


def test_wishes_that_a_server_refuses_are_left_out(model: Runtime) -> None:
    with serving(Manners(unknown={"ignore_eos", "stream_options"}), model) as url:
        opened = open_runtime(url)
        assert isinstance(opened, EndpointRuntime) and opened._abilities.writer
        assert opened._abilities.writer.wishes == {} and "decodes" in opened.capabilities


# tokens that do not agree


def test_another_tokenizer_than_the_servers_is_refused(llama: str, tiny: Tiny, tmp_path: Path) -> None:
    other = tiny("llama", "spm")
    with pytest.raises(RequestError, match=r"is not that of .* it makes \d+ tokens of a text of which"):
        find_all([f"{llama}#tokenizer={other}"], lambda _: None)
    done = lighten("evaluate", llama, "--tokenizer", other, cwd=tmp_path)
    assert done.returncode == 2 and "--tokenizer" in done.stderr and done.stderr.count("lighten:") == 1
    for manners in (Manners(), Manners(streams=False)):
        with (
            serving(manners, tokenizer=open_tokenizer(tiny())) as url,
            pytest.raises(RequestError, match="it shows only their number"),
        ):
            open_runtime(f"{url}#tokenizer={other}")
    with serving(Manners()) as url:
        assert open_runtime(f"{url}#tokenizer={other}").detail.endswith("tokens not compared with the server's")


class Unlike:
    """A tokenizer that makes as many tokens of the whole text as another one, and more or less of its parts."""

    def __init__(self, tokenizer: Tokenizer, more: int, of_parts: int) -> None:
        self.tokenizer, self.more, self.of_parts = tokenizer, more, of_parts

    def encode(self, text: str) -> list[int]:
        more = self.more + (self.of_parts if "\n" not in text else 0)
        return [*self.tokenizer.encode(text), *([1] * more)]


@pytest.mark.parametrize(("more", "of_parts", "same"), [(0, 0, True), (1, 0, True), (0, 1, False), (2, 0, False)])
def test_tokenizers_are_compared_by_numbers_of_every_part(tiny: Tiny, more: int, of_parts: int, *, same: bool) -> None:
    with serving(Manners(), tokenizer=Unlike(open_tokenizer(tiny()), more, of_parts)) as url:  # type: ignore[arg-type]
        if same:  # one more is a BOS
            assert "not compared" not in open_runtime(f"{url}#tokenizer={tiny()}").detail
        else:
            with pytest.raises(RequestError, match="it shows only their number"):
                open_runtime(f"{url}#tokenizer={tiny()}")


@pytest.mark.parametrize("form", ["echo", "prompt_logprobs"])
def test_counts_that_differ_are_never_averaged_over(tiny: Tiny, model: Runtime, tmp_path: Path, form: str) -> None:
    manners = Manners(forms={form})
    with serving(manners, model) as url:
        opened = open_runtime(f"{url}#tokenizer={tiny()}")
        manners.extra = 2
        with pytest.raises(Failure, match=r"the server counts \d+ tokens where 4 were sent.*nothing is averaged"):
            opened.choose_many([Question([5, 6], [[7, 8]])], silent)


# names, keys and errors


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


def test_a_device_and_a_server_are_two_things(tmp_path: Path) -> None:
    done = lighten("evaluate", "http://h/v1", "--target", "ssh://pi", cwd=tmp_path)
    assert done.returncode == 2 and "http://h/v1 is a server: leave out --target" in done.stderr
    done = lighten("evaluate", "some-dir", "--requests", 4, cwd=tmp_path)
    assert done.returncode == 2 and "add --rate or --concurrency" in done.stderr


def test_a_closed_connection_is_opened_again(model: Runtime) -> None:
    manners = Manners()
    with serving(manners, model) as url:
        http_ = Http(Address.parse(url))
        assert http_.get(f"{url}/models")
        http_._own.connection.sock.shutdown(2)
        assert http_.get(f"{url}/models")["data"][0]["id"] == "tiny"


def test_a_server_is_no_loader_of_files() -> None:
    assert "endpoint" in openers() and "endpoint" not in {each.name for each in (*added(), *loaders())}


def test_any_server_of_the_api_is_recognised() -> None:
    for text in ("http://h/v1", "HTTPS://h:1/v1"):
        assert find_opener(text)[0].name == "endpoint"
    with pytest.raises(RequestError):
        find_opener("ftp://h/v1")
