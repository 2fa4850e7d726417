"""Variants that are measured in servers that a recipe starts, and variants that are models on servers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lighten
from lighten.doctor.diagnose import diagnose
from lighten.errors import Failure, RequestError
from lighten.evaluate.runtimes.choose import open_runtime, open_tokenizer
from lighten.evaluate.serving import SERVERS
from lighten.pipeline import run as pipeline
from lighten.pipeline.plan import make_plan
from lighten.pipeline.recipe import load, parse
from lighten.results.results import Results
from tests.cli.test_main import refused
from tests.command import lighten as command
from tests.evaluate.runtimes.api_server import Manners, serving

SMALL = {"length": 48, "samples": 3}
Q8 = [{"export": {"format": "gguf", "type": "Q8_0"}}]


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny(dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    """A server of the model, which somebody else started."""
    opened = open_runtime(model)
    with serving(Manners(forms={"prompt_logprobs"}), opened, open_tokenizer(model)) as address:
        yield address
    opened.close()


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SERVERS.rows, "scripted", "tests.evaluate.serving.scripted:Scripted")


def recipe(model: Path, variants: dict[str, Any], **evaluate: Any) -> dict[str, Any]:
    return {"name": "r", "model": str(model), "variants": variants, "evaluate": {"perplexity": SMALL, **evaluate}}


def run(value: dict[str, Any], folder: Path, **more: Any) -> dict[str, dict[str, Any]]:
    version = lighten.run(parse(value), artifacts=folder, device="cpu", **more)
    results = json.loads((version / "results.json").read_text())
    Results.model_validate(results)
    assert (version / "report.html").is_file()
    return {row["name"]: row for row in results["variants"]}


def test_one_artifact_is_measured_in_its_runtime_and_in_a_server(model: Path, tmp_path: Path) -> None:
    serve = {
        "*-served": "scripted",
        "q8-served": "llama.cpp",
        "dead": {"with": "scripted", "args": ["--requests", 5]},
    }
    variants = {"src-served": [], "dead": [], "q8": Q8, "q8-served": Q8}
    value = recipe(model, variants, serve=serve)
    with pytest.raises(RequestError, match=r"starts scripted --requests 5 \(evaluate.serve.dead\).*--trust-servers"):
        lighten.run(parse(value), artifacts=tmp_path)
    rows = run(value, tmp_path, trust_servers=True)
    assert {name: row["status"] for name, row in rows.items()} == {
        "baseline": "ok",
        "src-served": "ok",
        "dead": "failed",
        "q8": "ok",
        "q8-served": "ok",
    }
    assert "killed by SIGKILL" in rows["dead"]["error"] and "/r/servers/dead.log" in rows["dead"]["error"]
    for plain, served, runtime in (("baseline", "src-served", "scripted"), ("q8", "q8-served", "llama.cpp")):
        assert rows[plain]["key"] == rows[served]["key"] and rows[plain]["size_bytes"] == rows[served]["size_bytes"]
        assert rows[served]["perplexity"]["value"] == pytest.approx(rows[plain]["perplexity"]["value"], rel=2e-3)
        assert rows[served]["runtime"] == f"{runtime} server" and rows[served]["device"] == "cpu"
        assert rows[served]["facts"]["server"]["with"] == runtime
        assert rows[served]["delta"]["perplexity"]["relative"] == pytest.approx(
            rows[plain].get("delta", {}).get("perplexity", {}).get("relative", 0), abs=2e-3
        )
    assert any("measured over HTTP in lighten" in note and "plain" in note for note in rows["src-served"]["notes"])
    assert {path.name for path in (tmp_path / "r/servers").iterdir()} == {
        "src-served.log",
        "dead.log",
        "q8-served.log",
    }
    text = json.dumps(rows["q8-served"])
    assert str(tmp_path) not in text.replace(rows["q8-served"]["facts"].get("path", "\0"), "")
    again = pipeline.plan(parse(value), trust_servers=True)
    assert {stage.key for stage in again.stages} == {stage.key for stage in make_plan(parse(value)).stages}


def test_a_variant_that_is_a_model_on_a_server(model: Path, url: str, tmp_path: Path) -> None:
    value = recipe(model, {"remote": {"runtime": {"endpoint": url}}, "q8": Q8}, loaders=True)
    rows = run(value, tmp_path)
    remote = rows["remote"]
    assert (remote["status"], remote["runtime"], remote["device"], remote["format"]) == (
        "ok",
        "endpoint",
        "server",
        "endpoint",
    )
    assert remote["perplexity"]["value"] == pytest.approx(rows["baseline"]["perplexity"]["value"], rel=2e-3)
    assert remote["size_bytes"] is None and remote["facts"]["address"] == url and remote["facts"]["model"] == "tiny"
    assert remote["unavailable"] == [
        {"measurement": "loaders", "reason": "loaders needs the files of a model, and this one is on a server"}
    ]
    assert rows["q8"]["divergence"]["kl_mean"] >= 0
    keys = [{stage.key for stage in make_plan(parse(value)).stages} for _ in range(2)]
    assert len(keys[0] - keys[1]) == 3  # it may be another model by now
    assert "remote" not in {name for stage in make_plan(pipeline_without(value)).stages for name in stage.variants}


def pipeline_without(value: dict[str, Any]) -> Any:
    from lighten.pipeline.served import without_servers

    return without_servers(parse(value))


def test_a_reference_may_be_a_server(model: Path, url: str, tmp_path: Path) -> None:
    rows = run(recipe(model, {"baseline": {"runtime": {"endpoint": url, "model": "tiny"}}, "q8": Q8}), tmp_path)
    assert rows["baseline"]["runtime"] == "endpoint" and rows["baseline"]["size_bytes"] > 0
    assert rows["q8"]["runtime"] == "llama.cpp" and abs(rows["q8"]["delta"]["perplexity"]["relative"]) < 0.05
    assert rows["q8"].get("divergence") is None


def test_wrong_servers_are_refused_before_any_work(model: Path, url: str, tmp_path: Path) -> None:
    for variants, serve, words in (
        ({"q8": Q8}, {"q9": "llama.cpp"}, "evaluate.serve.q9: there is no such variant; did you mean 'q8'"),
        ({"q8": Q8}, {"q8": "lama.cpp"}, "there is no such server: did you mean llama.cpp?"),
        ({"q8": Q8}, {"q8": {"with": "llama.cpp", "arg": []}}, "unknown key; did you mean 'args'"),
        (
            {"q8": Q8},
            {"q8": "scripted"},
            "evaluate.serve: q8: scripted serves model directories, and this is for llama.cpp",
        ),
        ({"q8": Q8}, {"q8": {"with": "llama.cpp", "python": "/nowhere"}}, "there is no Python /nowhere"),
        ({"s": {"runtime": {"endpoint": url}}}, {"*": "scripted"}, "s is on a server already: give it `s: null`"),
        ({"s": {"runtime": {"endpoint": url, "model": "tinny"}}}, {}, "did you mean tiny?"),
        ({"s": {"runtime": {"endpoint": "ftp://h"}}}, {}, "looks like http://HOST"),
        ({"s": {"runtime": {"endpoint": f"{url}#model=x"}}}, {}, "give the URL alone"),
        ({"s": [{"runtime": {"endpoint": url}}, *Q8]}, {}, "which no other step can change"),
    ):
        with pytest.raises(RequestError) as caught:
            make_plan(parse(recipe(model, variants, serve=serve)))
        assert words in str(caught.value)
    with serving(Manners()) as down:
        pass
    with pytest.raises(Failure, match="is the server running"):
        make_plan(parse(recipe(model, {"s": {"runtime": {"endpoint": down}}})))
    drafted = recipe(model, {"s": {"runtime": {"endpoint": url}}}, speculative={"draft": "s"})
    with pytest.raises(RequestError, match="speculative needs the files of both models, and s is on a server"):
        make_plan(parse(drafted))


def test_a_recipe_names_programs_and_strangers_only_with_trust(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        f"name: r\nmodel: {model}\nvariants: {{q8: [{{export: {{format: gguf, type: Q8_0}}}}]}}\n"
        f"evaluate: {{serve: {{q8: {{with: llama.cpp, python: {tmp_path / 'python'}}}}}}}\n"
    )
    ran = tmp_path / "ran"
    (tmp_path / "python").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (tmp_path / "python").chmod(0o755)
    refused(command("run", file, cwd=tmp_path), 2, "starts", "evaluate.serve.q8", "--trust-servers")
    with pytest.raises(RequestError):
        diagnose(load(str(file)))
    assert not ran.exists()
    with pytest.raises(RequestError, match="is no Python that works"):
        pipeline.plan(str(file), trust_servers=True)
    assert ran.exists()
    far = parse(recipe(model, {"s": {"runtime": {"endpoint": "https://far.example/v1"}}}))
    monkeypatch.setenv("LIGHTEN_API_KEY", "sk-1")
    with pytest.raises(
        RequestError, match=r"sends the key in the environment to https://far.example/v1.*--trust-servers"
    ):
        pipeline.plan(far)
    monkeypatch.delenv("LIGHTEN_API_KEY")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(Failure, match="there is no host"):
        pipeline.plan(far)
