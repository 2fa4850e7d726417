"""lm-eval's tasks from local files, as a recipe or a person at the command line asks for them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lighten.data.choices import load_choices
from lighten.errors import RequestError
from lighten.evaluate.accuracy import harness
from lighten.evaluate.accuracy.change import change as change_of_accuracy
from lighten.evaluate.accuracy.settings import Accuracy
from lighten.evaluate.run import measure
from lighten.step import silent
from tests.cli.test_main import refused
from tests.command import lighten
from tests.evaluate.conftest import Tiny, payload

pytest.importorskip("lm_eval")
from lighten.evaluate.accuracy.harness import tasks

HELLASWAG = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{activity_label}}}}: {{{{ctx}}}}"
doc_to_target: label
doc_to_choice: endings
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
RECORDS = [
    {"activity_label": f"Scene {n}", "ctx": f"The {who} went to the", "endings": list(ends), "label": n % len(ends)}
    for n, (who, ends) in enumerate(
        [
            ("dog", ("park and ran.", "bank.", "moon of cheese.")),
            ("cat", ("roof.", "sea to swim far away.", "fridge.")),
            ("man", ("office by train.", "apple.")),
            ("girl", ("school.", "stone.", "cloud that sang.")),
            ("band", ("stage and played.", "spoon.", "number.")),
        ]
    )
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task file with its data beside it; nothing may ask the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "tasks.jsonl").write_text("\n".join(json.dumps(each) for each in RECORDS))
    (tmp_path / "scenes.yaml").write_text(HELLASWAG.format(name="scenes", file="tasks.jsonl"))
    return tmp_path


def run(out: Path, model: Path, tokenizer: Path, **config: Any) -> dict[str, Any]:
    out.mkdir()
    return measure(payload("accuracy", config, model, out, tokenizer), silent)


def test_lm_eval_answers_as_the_own_scorer_does(tiny: Tiny, tiny_gguf: Path, folder: Path) -> None:
    ours = run(folder / "a", tiny(), tiny(), task="own", local=str(folder / "tasks.jsonl"))["accuracy"]
    for name, model in {"torch": tiny(), "gguf": tiny_gguf}.items():
        theirs = run(folder / name, model, tiny(), task=str(folder / "scenes.yaml"))["accuracy"]
        assert (ours["scorer"], theirs["scorer"], theirs["task"]) == ("lighten", "lm-eval", "scenes")
        assert [theirs[key] for key in ("acc", "acc_norm", "n")] == [ours[key] for key in ("acc", "acc_norm", "n")]
        assert theirs["ci95"] == ours["ci95"]
        values, own = load_file(folder / name / "values.safetensors"), load_file(folder / "a" / "values.safetensors")
        assert values["score"].tolist() == (own["choice"] == own["label"]).astype(float).tolist()
        assert values["score_norm"].tolist() == (own["choice_norm"] == own["label"]).astype(float).tolist()
        reported = {(row["metric"], row["filter"]): row["value"] for row in theirs["metrics"]}
        assert reported == {("acc", "none"): theirs["acc"], ("acc_norm", "none"): theirs["acc_norm"]}
    change = change_of_accuracy(folder / "gguf", folder / "torch")
    assert (change["task"], change["acc"], change["gained"]) == ("scenes", 0, 0)
    with pytest.raises(RequestError, match=r"scored by lm-eval and .* by lighten"):
        change_of_accuracy(folder / "gguf", folder / "a")


def test_written_answers_are_counted(tiny: Tiny, folder: Path) -> None:
    settings = {"until": ["\n"], "max_gen_toks": 4}
    text = HELLASWAG.format(name="written", file="tasks.jsonl").replace("multiple_choice", "generate_until")
    text = text[: text.index("doc_to_choice")] + f"generation_kwargs: {json.dumps(settings)}\n"
    text += "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    (folder / "written.yaml").write_text(text)
    found = run(folder / "out", tiny(), tiny(), task=str(folder / "written.yaml"))["accuracy"]
    assert (found["metric"], found["acc"], found["n"], found["acc_norm"]) == ("exact_match", 0.0, 5, None)


def test_a_rolling_task_has_numbers_and_no_share_of_right_answers(tiny: Tiny, folder: Path) -> None:
    text = HELLASWAG.format(name="rolling", file="tasks.jsonl").replace("multiple_choice", "loglikelihood_rolling")
    text = text[: text.index("doc_to_text")] + 'doc_to_text: ""\ndoc_to_target: "{{ctx}}"\n'
    text += "metric_list:\n  - {metric: word_perplexity}\n  - {metric: bits_per_byte}\n"
    (folder / "rolling.yaml").write_text(text)
    found = run(folder / "out", tiny(), tiny(), task=str(folder / "rolling.yaml"))["accuracy"]
    documents = folder / "documents.jsonl"
    documents.write_text("\n".join(json.dumps({"text": each["ctx"]}) for each in RECORDS))
    (folder / "protocol").mkdir()
    asked = payload("perplexity", {"protocol": "lm-eval", "data": str(documents)}, tiny(), folder / "protocol")
    levels = measure(asked, silent)["perplexity"]["levels"]
    assert found["acc"] is None
    assert {row["metric"]: row["value"] for row in found["metrics"]} == pytest.approx(
        {"word_perplexity": levels["word"], "bits_per_byte": levels["bits_per_byte"]}
    )


def test_a_known_task_takes_its_documents_from_a_local_file(tiny: Tiny, folder: Path) -> None:
    rows = [
        {"question": f"What is {n}?", "choices": {"text": ["a", "b b"], "label": ["A", "B"]}, "answerKey": "AB"[n % 2]}
        for n in range(4)
    ]
    (folder / "arc.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {"task": "arc_easy", "local": str(folder / "arc.jsonl"), "scorer": "lm-eval"}
    found = run(folder / "out", tiny(), tiny(), **config)["accuracy"]
    assert (found["task"], found["n"], found["metric"]) == ("arc_easy", 4, "acc")
    few = tasks.texts(Accuracy(**config, shots=2, limit=1))
    assert few[0].count("Question:") == 3
    with pytest.raises(RequestError, match=r"must have the fields of the task's own data set|do not fit it"):
        tasks.texts(Accuracy(**{**config, "local": str(folder / "tasks.jsonl")}))


def test_the_digest_is_that_of_what_is_asked(folder: Path) -> None:
    first = harness.build(Accuracy(task=str(folder / "scenes.yaml")))
    assert (first.task, first.documents) == ("scenes", 5)
    moved = folder / "elsewhere"
    moved.mkdir()
    for name in ("scenes.yaml", "tasks.jsonl"):
        (moved / name).write_text((folder / name).read_text())
    assert harness.build(Accuracy(task=str(folder / "scenes.yaml"), limit=3)).digest != first.digest
    assert harness.build(Accuracy(task=str(moved / "scenes.yaml"))).digest == first.digest
    harness.build.cache_clear()
    changed = [{**RECORDS[0], "label": 1}, *RECORDS[1:]]
    (moved / "tasks.jsonl").write_text("\n".join(json.dumps(each) for each in changed))
    assert harness.build(Accuracy(task=str(moved / "scenes.yaml"))).digest != first.digest


HOSTILE = """task: scenes
dataset_path: json
dataset_kwargs: {data_files: {test: tasks.jsonl}}
test_split: test
doc_to_text: !function evil.run
include: more.yaml
"""


def test_a_plan_reads_a_task_file_and_runs_nothing_of_it(folder: Path) -> None:
    (folder / "scenes.yaml").write_text(HOSTILE)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    (folder / "more.yaml").write_text("output_type: multiple_choice\n")
    settings = Accuracy(task=str(folder / "scenes.yaml"))
    first = harness.facts_of(settings)
    assert not (folder / "ran").exists()
    assert (first.documents, harness.facts_of(settings)) == (4, first)  # by its ends of lines
    for part in ("evil.py", "more.yaml", "tasks.jsonl"):
        before = harness.facts_of(settings).digest
        (folder / part).write_text((folder / part).read_text() + "\n# more\n")
        assert harness.facts_of(settings).digest != before, part
    assert "lm_eval" not in str(Accuracy(task="arc_easy").task_file)


@pytest.mark.parametrize("command", [("evaluate", "."), ("plan", "r.yaml"), ("run", "r.yaml")])
def test_task_files_need_the_persons_word(folder: Path, command: tuple[str, ...]) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    (folder / "scenes.yaml").write_text(HOSTILE)
    (folder / "r.yaml").write_text(
        "{name: r, model: nowhere/at-all, variants: {baseline: []}, evaluate: {accuracy: {task: scenes.yaml}}}"
    )
    flags = ("--task", "scenes.yaml") if command[0] == "evaluate" else ()
    refused(lighten(*command, *flags, cwd=folder), 2, "scenes.yaml is code to lm-eval", "--trust-tasks")
    assert not (folder / "ran").exists()


def test_task_files_that_came_with_lm_eval_are_its_own() -> None:
    import lm_eval.tasks

    own = next(Path(lm_eval.tasks.__file__).parent.rglob("arc_easy.yaml"))
    assert Accuracy(task=str(own)).task_file is None


def test_who_scores_what() -> None:
    assert not Accuracy(task="hellaswag").harness
    assert not Accuracy(task="mine", local="mine.jsonl").harness
    assert Accuracy(task="arc_easy").harness
    assert Accuracy(task="hellaswag", scorer="lm-eval").harness
    assert Accuracy(task="x", limit=3).key_config() == {"task": "x", "local": None, "limit": 3}
    for wrong in ({"scorer": "lm-eval"}, {"task": "arc_easy", "scorer": "lighten"}, {"shots": 2}):
        with pytest.raises(ValueError, match=r"lm-eval|own scorer knows"):
            Accuracy.model_validate(wrong)


def test_a_person_measures_a_task_file(tiny: Tiny, tiny_gguf: Path, folder: Path) -> None:
    flags = (
        "--trust-tasks",
        "--task",
        str(folder / "scenes.yaml"),
        "--skip",
        "speed",
        "--protocol",
        "gptq",
        "--protocol",
        "llama.cpp",
    )
    lengths = ("--length", "64", "--samples", "2", "--json", "-o", str(folder / "out"))
    done = lighten("evaluate", tiny(), tiny_gguf, "--trust-tasks", *flags, *lengths, cwd=folder)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    for row in value["variants"]:
        assert row["accuracy"][0]["task"] == "scenes" and row["accuracy"][0]["scorer"] == "lm-eval"
        assert row["perplexity"]["protocol"]["name"] == "gptq"
        assert [each["protocol"]["name"] for each in row["other_perplexity"]] == ["llama.cpp"]
    delta = value["variants"][1]["delta"]
    assert abs(delta["perplexity"]["relative"]) < 1e-2 > abs(delta["other_perplexity"][0]["relative"])
    for name in ("report.md", "report.html"):
        report = (folder / "out" / name).read_text()
        assert "Perplexity (gptq)" in report and "Perplexity (llama.cpp)" in report
        assert "scored by lm-eval" in report


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--task", "helaswag"), "there is no task 'helaswag': did you mean 'hellaswag'"),
        (("--task", "arc_easy"), "takes its data from the hub, which cannot be reached"),
        (("--trust-tasks", "--task", "nowhere.yaml"), "there is no task file nowhere.yaml"),
        (("--protocol", "gguf"), "--protocol gguf: there is lighten, gptq, llama.cpp, lm-eval"),
        (("--protocol", "gptq"), "takes chunks of 2048 tokens, but"),
        (("--shots", "2"), "add `scorer: lm-eval`"),
    ],
)
def test_a_wrong_request_is_one_message(tiny: Tiny, folder: Path, flags: tuple[str, ...], told: str) -> None:
    refused(lighten("evaluate", tiny(), "--skip", "speed", *flags, cwd=folder), 2, told)


def test_builtin_choices_are_asked_alike(tiny: Tiny, folder: Path) -> None:
    lines = [
        {"activity_label": each.context.partition(": ")[0], "ctx": each.context.partition(": ")[2]}
        | {"endings": list(each.endings), "label": each.label}
        for each in load_choices("builtin", 12)
    ]
    (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ours = run(folder / "a", tiny(), tiny(), task="own", local=str(folder / "tasks.jsonl"))["accuracy"]
    theirs = run(folder / "b", tiny(), tiny(), task=str(folder / "scenes.yaml"))["accuracy"]
    assert np.array([ours["acc"], ours["acc_norm"]]) == pytest.approx([theirs["acc"], theirs["acc_norm"]])


def test_a_recipe_measures_by_several_protocols_and_keeps_what_it_measured(tiny: Tiny, folder: Path) -> None:
    (folder / "two.yaml").write_text(
        f"""name: two
model: {tiny()}
variants: {{f16: [{{export: {{format: gguf, type: F16}}}}]}}
evaluate:
  perplexity:
    - {{length: 64, samples: 2}}
    - {{protocol: llama.cpp, length: 64, samples: 2}}
    - {{protocol: lm-eval, samples: 4}}
  accuracy: [{{task: scenes.yaml, limit: 4}}, {{task: builtin, limit: 4}}]
"""
    )
    done = lighten("run", "two.yaml", "--trust-tasks", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout)["variants"]:
        assert row["perplexity"]["protocol"]["name"] == "lighten"
        assert [each["protocol"]["name"] for each in row["other_perplexity"]] == ["llama.cpp", "lm-eval"]
        assert [(each["task"], each["scorer"]) for each in row["accuracy"]] == [
            ("scenes", "lm-eval"),
            ("builtin", "lighten"),
        ]
        if row["name"] != "baseline":
            assert [each["protocol"] for each in row["delta"]["other_perplexity"]] == ["llama.cpp", "lm-eval"]
    planned = json.loads(lighten("plan", "two.yaml", "--trust-tasks", "--json", cwd=folder).stdout)
    assert all(stage["cached"] for stage in planned["stages"])
    assert {"perplexity by lm-eval of f16", "accuracy in scenes of f16"} <= {each["name"] for each in planned["stages"]}


def test_a_misspelt_key_is_named_with_its_line(tiny: Tiny, folder: Path) -> None:
    (folder / "wrong.yaml").write_text(
        f"name: w\nmodel: {tiny()}\nvariants: {{a: []}}\nevaluate:\n  perplexity:\n    protocl: gptq\n"
    )
    refused(lighten("plan", "wrong.yaml", cwd=folder), 2, "wrong.yaml:6: evaluate.perplexity.protocl", "'protocol'")


def test_a_broken_variant_is_one_failed_row(tiny: Tiny, tiny_gguf: Path, folder: Path) -> None:
    broken = shutil.copytree(tiny(), folder / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = np.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    flags = ("--trust-tasks", "--task", "scenes.yaml", "--skip", "speed", "--length", "64", "--samples", "2", "--json")
    done = lighten("evaluate", tiny(), broken, tiny_gguf, *flags, cwd=folder)
    assert done.returncode == 1
    assert "not finite numbers" in done.stderr
    assert [row["status"] for row in json.loads(done.stdout)["variants"]] == ["ok", "failed", "ok"]
