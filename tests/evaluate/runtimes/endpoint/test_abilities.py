"""What a server can do is found by asking: each form beside torch, and what it lacks is said."""

from pathlib import Path

import pytest

from lighten.evaluate.runtimes.choose import open_runtime, open_tokenizer
from lighten.evaluate.runtimes.endpoint.runtime import EndpointRuntime
from lighten.evaluate.runtimes.runtime import Question, Runtime
from lighten.step import silent
from tests.evaluate.conftest import Tiny
from tests.evaluate.runtimes.api_server import Manners, serving
from tests.evaluate.runtimes.endpoint.measured import SMALL, SPEED, ran


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
