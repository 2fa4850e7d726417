"""Questions about the committed results of the quickstart, each with the artifact that is the right answer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lighten.compare.operand import Version, find_version
from lighten.errors import RequestError
from lighten.export.bundle.targets import TARGETS
from lighten.pipeline.plan import make_plan
from lighten.pipeline.recipe import parse
from lighten.recommend.question import ask
from lighten.recommend.recommend import Recommendation, recommend
from lighten.recommend.text import lines
from lighten.results.results import Results
from tests.cli.test_main import refused
from tests.command import lighten, process

QUICKSTART = Path(__file__).with_name("quickstart.json")


@pytest.fixture(scope="module")
def version() -> Version:
    return find_version(str(QUICKSTART), Path("artifacts"))


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    return {row["name"]: row for row in json.loads(QUICKSTART.read_text())["variants"]}


def explained(answer: Recommendation, *words: str) -> None:
    said = " ".join((*answer.choice.reasons, *(f"{f.condition} {' '.join(f.removed)}" for f in answer.choice.filters)))
    for word in words:
        assert word in said


def test_a_raspberry_pi_that_may_lose_a_point_and_should_be_fast(version: Version, rows: dict[str, Any]) -> None:
    """Its memory bandwidth decides: of the files that it takes, the one with the fewest bytes."""
    answer = recommend(version, ask(target="rpi5", max_drop="1pp", prefer="speed", memory="8GB"))
    assert answer.pick == "gguf-q4_k_m"
    assert answer.question.purpose == "edge"
    explained(answer, "gptq-int4: it is gptq", "bandwidth of the Raspberry Pi 5", "a ceiling", "at most 1 pp")
    pick = answer.choice.pick
    assert pick and pick.speed == pytest.approx(TARGETS["rpi5-8gb"].bandwidth / rows["gguf-q4_k_m"]["size_bytes"])
    assert [each.name for each in answer.choice.runners_up] == ["gguf-q8_0", "gguf-f16"]


def test_the_smallest_that_nobody_can_tell_from_the_source(version: Version) -> None:
    answer = recommend(version, ask(max_ppl="+1%", prefer="size"))
    assert answer.pick == "gguf-q8_0"
    explained(
        answer, "gptq-int4: +21.3 %", "gguf-q4_k_m: +3.1 %", "smallest of the 3 that pass", "the next is gguf-f16"
    )


def test_the_best_quality_and_among_equals_the_fastest(version: Version) -> None:
    """The interval of the F16 file's change holds zero, so it ties with the source and is faster.

    Its repeats differ by 12 %, so as it is the smaller file decides.
    """
    answer = recommend(version, ask(prefer="quality"))
    assert answer.pick == "gguf-f16"
    explained(answer, "gguf-f16 and baseline are equally the best", "intervals", "best in size")
    value = version.results.model_dump(mode="json")
    for row in value["variants"]:
        row["speed"][0]["spread"] = 0.05
    steady = recommend(replace(version, results=Results.model_validate(value)), ask(prefer="quality"))
    assert steady.pick == "gguf-f16"
    explained(steady, "best in decode speed")
    value["variants"][0]["speed"][0] |= {"decode_tok_s": 500.0, "spread": 1.29}
    busy = recommend(replace(version, results=Results.model_validate(value)), ask(prefer="quality"))
    assert busy.pick == "gguf-f16", "a noisy speed does not decide"


def test_training_in_8_gb_starts_from_the_source(version: Version) -> None:
    answer = recommend(version, ask(purpose="training", memory="8GB"))
    assert answer.pick == "baseline"
    assert answer.way and answer.way.name == "full"
    explained(answer, "full training is the most capable of the 3 of 3 ways that fit", "it starts from baseline")
    tight = recommend(version, ask(purpose="training", memory="600MB"))
    assert tight.way and tight.way.name == "lora"
    assert "full: takes 2.38 GB" in tight.choice.filters[0].removed


def test_a_transformers_server_that_should_be_small(version: Version) -> None:
    answer = recommend(version, ask(runtime="torch", prefer="size"))
    assert answer.pick == "gptq-int4"
    explained(answer, "gguf-q4_k_m: llama.cpp", "smallest of the 2 that pass")


def test_speeds_within_their_spread_are_no_difference(version: Version) -> None:
    """Q4_K_M decodes 3 % faster than Q8_0, whose repeats differ by 9 %, so perplexity decides; by 1 %, it does not."""
    for spread, pick in ((0.09, "gguf-q8_0"), (0.01, "gguf-q4_k_m")):
        value = version.results.model_dump(mode="json")
        for row in value["variants"]:
            rate = {"gguf-q8_0": 1000.0, "gguf-q4_k_m": 1030.0}.get(row["name"], 10.0)
            row["speed"][0] |= {"decode_tok_s": rate, "spread": spread}
        answer = recommend(replace(version, results=Results.model_validate(value)), ask(prefer="speed"))
        assert answer.pick == pick
        if spread > 0.05:
            explained(answer, "equally the fastest", "less than their intervals reach", "best in perplexity")


def test_a_limit_between_two_removes_the_larger(version: Version, rows: dict[str, Any]) -> None:
    between = (rows["gguf-q8_0"]["memory"]["peak_rss_bytes"] + rows["gguf-q4_k_m"]["memory"]["peak_rss_bytes"]) // 2
    answer = recommend(version, ask(memory=str(between), prefer="quality"))
    assert answer.pick == "gguf-q4_k_m"
    (fits,) = [each for each in answer.choice.filters if each.condition.startswith("fits")]
    assert len(fits.removed) == 4


def test_a_longer_context_takes_more_memory(version: Version, rows: dict[str, Any]) -> None:
    """SmolLM2-135M: 30 layers, 3 heads of 64 for keys and as many for values, 2 bytes each."""
    answer = recommend(version, ask(context=8192, prefer="size"))
    pick = answer.choice.pick
    assert pick
    cache = (8192 - 192) * 30 * 2 * 3 * 64 * 2
    assert pick.need == rows[pick.name]["memory"]["peak_rss_bytes"] + cache


def test_the_interval_that_reaches_over_the_limit_is_said(version: Version) -> None:
    answer = recommend(version, ask(runtime="torch", max_drop="1pp", prefer="size"))
    assert answer.pick == "gptq-int4"
    assert any("accuracy reaches −2.5 pp" in line for line in answer.choice.cautions)


def test_nothing_that_passes_is_an_answer_too(version: Version) -> None:
    answer = recommend(version, ask(memory="150MB", max_ppl="+1%"))
    assert answer.pick is None
    assert answer.choice.reasons == ("nothing that was measured passes",)
    assert len(answer.choice.filters[0].removed) == 5


def test_what_was_only_published_is_marked_and_its_recipe_can_be_planned(version: Version) -> None:
    answer = recommend(version, ask(max_ppl="+1%", prefer="size"))
    assert [each.name for each in answer.published] == ["q5_k_m", "q6_k"]
    assert all("Llama-3-8B" in each.of and each.source.startswith("llama.cpp") for each in answer.published)
    assert answer.recipe
    todo = make_plan(parse(yaml.safe_load(answer.recipe)))
    assert set(todo.artifacts) == {"baseline", "gguf-q8_0", "q5_k_m", "q6_k"}
    assert todo.recipe.evaluate.perplexity and todo.recipe.evaluate.perplexity[0].length == 512


@pytest.mark.parametrize("name", ["layers", "hidden", "vocab"])
def test_sizes_that_no_model_has(version: Version, name: str) -> None:
    value = version.results.model_dump(mode="json")
    value["source"] |= {"model": "nobody/nothing", name: 0}
    strange = replace(version, results=Results.model_validate(value))
    with pytest.raises(RequestError, match=r"which no model has: restore its results\.json"):
        recommend(strange, ask(context=512))
    assert recommend(strange, ask(prefer="size")).pick, "without sizes that are needed it answers"


def changed(version: Version, row: str, **speed: Any) -> Version:
    """The quickstart, the speeds steady but for a row's."""
    value = version.results.model_dump(mode="json")
    for each in value["variants"]:
        each["speed"][0] |= {"spread": 0.02, **(speed if each["name"] == row else {})}
    return replace(version, results=Results.model_validate(value))


def test_a_noisy_speed_is_not_taken_for_the_fastest(version: Version) -> None:
    assert recommend(changed(version, "gguf-q8_0"), ask()).pick == "gguf-q8_0"
    answer = recommend(changed(version, "gguf-q8_0", spread=1.29), ask())
    assert answer.pick == "gguf-q4_k_m"
    explained(answer, "has a speed whose repeats differ by at most 10 %", "gguf-q8_0: its repeats differ by more")
    assert "gguf-q8_0" not in [each.name for each in answer.choice.runners_up]
    assert "≈148 tok/s" in next(
        each.line()
        for each in recommend(changed(version, "gguf-q8_0", spread=1.29), ask(prefer="size")).choice.runners_up
        if each.name == "gguf-q8_0"
    )


def test_what_is_better_than_its_source_is_not_taken(version: Version) -> None:
    value = version.results.model_dump(mode="json")
    row = next(each for each in value["variants"] if each["name"] == "gguf-q4_k_m")
    row["delta"]["perplexity"] |= {"relative": -0.18, "ci95": [-0.2, -0.16]}
    answer = recommend(replace(version, results=Results.model_validate(value)), ask(prefer="quality"))
    assert answer.pick == "gguf-f16"
    explained(answer, "something was measured wrongly there", "gguf-q4_k_m: perplexity −18.0 %")


def test_an_interval_that_reaches_over_the_usual_limit_is_said_too(version: Version) -> None:
    value = version.results.model_dump(mode="json")
    for row in value["variants"][1:]:
        row["delta"]["perplexity"] |= {"relative": 0.01, "ci95": [-0.4, 0.42]}
    answer = recommend(replace(version, results=Results.model_validate(value)), ask(prefer="size"))
    assert any("perplexity reaches +42 %" in line for line in answer.choice.cautions)
    assert next(iter(lines(answer))).plain.startswith("Perhaps take ")  # type: ignore[union-attr]


@pytest.mark.parametrize(("memory", "way"), [("8GB", "full"), ("600MB", "lora"), ("450MB", "qlora")])
def test_every_way_of_training_has_a_recipe_that_can_be_planned(version: Version, memory: str, way: str) -> None:
    answer = recommend(version, ask(purpose="training", memory=memory))
    assert answer.way and answer.way.name == way
    assert answer.recipe
    assert len(make_plan(parse(yaml.safe_load(answer.recipe))).artifacts) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"memory": "8 apples"}, "--memory '8 apples' is not a size"),
        ({"target": "rpi9"}, "no target 'rpi9'"),
        ({"max_drop": "1%"}, "--max-drop '1%' cannot be read: write it as --max-drop 1pp"),
        ({"max_ppl": "lots"}, r"--max-ppl \+5%"),
        ({"prefer": "beauty"}, "speed, quality, size, memory"),
        ({"purpose": "fun"}, "inference, training, edge"),
        ({"context": 0}, "at least 1"),
        ({"purpose": "training", "max_ppl": "5%"}, "not about training"),
    ],
)
def test_questions_that_cannot_be_read(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        ask(**settings)


def test_the_command(tmp_path: Path) -> None:
    flags = ("--memory", "8GB", "--target", "rpi5", "--max-drop", "1pp", "--prefer", "speed")
    done = process("recommend", QUICKSTART, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("Take gguf-q4_k_m of quickstart v1", "Runners-up", "Not measured here", "name: quickstart-next"):
        assert words in done.stdout
    answer = json.loads(lighten("recommend", QUICKSTART, *flags, "--json", cwd=tmp_path).stdout)
    assert answer["pick"] == answer["answer"]["name"] == "gguf-q4_k_m"
    assert answer["published"][0]["source"]
    assert lighten("recommend", QUICKSTART, "--memory", "1MB", cwd=tmp_path).returncode == 1
    refused(lighten("recommend", "nothing", cwd=tmp_path), 2, "no version and no model 'nothing'")
    refused(lighten("recommend", QUICKSTART, "--max-drop", "much", cwd=tmp_path), 2, "--max-drop 1pp")
    (tmp_path / "old.json").write_text('{"schema": 0}')
    refused(lighten("recommend", "old.json", cwd=tmp_path), 2, "has schema 0", "reads schema 1")
