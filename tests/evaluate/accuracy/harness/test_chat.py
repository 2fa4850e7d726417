"""Tasks that are asked in the model's own chat template."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lighten.errors import Failure, RequestError
from lighten.evaluate.accuracy import harness
from lighten.evaluate.accuracy.change import change
from lighten.evaluate.accuracy.harness.chat import Chat
from lighten.evaluate.accuracy.settings import Accuracy
from lighten.evaluate.run import measure
from lighten.evaluate.runtimes.choose import open_runtime, open_tokenizer, words_of
from lighten.export.gguf import write as export
from lighten.report import alike
from lighten.report.accuracy import in_chat
from lighten.results import measured
from lighten.step import silent
from tests.cli.test_main import refused
from tests.command import lighten
from tests.evaluate.accuracy.harness.test_adapter import asked, peer
from tests.evaluate.conftest import Tiny, payload

pytest.importorskip("lm_eval")
from lighten.evaluate.accuracy.harness import measure as harness_measure
from lighten.evaluate.accuracy.harness import tasks
from lighten.evaluate.accuracy.harness.adapter import RuntimeLM

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
ROWS = [
    {"question": f"What is {n}?", "choices": {"text": ["a", "b b"], "label": ["A", "B"]}, "answerKey": "AB"[n % 2]}
    for n in range(6)
]
IFEVAL = [
    {
        "key": 1,
        "prompt": "Write without a comma, in at least 3 words.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"relation": "at least", "num_words": 3}],
    },
    {
        "key": 2,
        "prompt": "Answer in small letters.",
        "instruction_id_list": ["change_case:english_lowercase"],
        "kwargs": [{}],
    },
    {
        "key": 3,
        "prompt": "Say the word lighthouse.",
        "instruction_id_list": ["keywords:existence"],
        "kwargs": [{"keywords": ["lighthouse"]}],
    },
]


def with_template(source: Path, folder: Path, template: str | None) -> Path:
    shutil.copytree(source, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, **({"chat_template": template} if template else {})})
    )
    return folder


@pytest.fixture
def chatty(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that chats; nothing may ask the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "arc.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "ifeval.jsonl").write_text("\n".join(map(json.dumps, IFEVAL)))
    return with_template(tiny(), tmp_path / "chatty", CHATML)


def arc(folder: Path, **more: Any) -> dict[str, Any]:
    return {"task": "arc_easy", "local": str(folder / "arc.jsonl"), "scorer": "lm-eval", **more}


def run(out: Path, model: Path, **config: Any) -> dict[str, Any]:
    out.mkdir()
    return measure(payload("accuracy", config, model, out), silent)


def adapter(folder: Path, system: str | None = None) -> RuntimeLM:
    return RuntimeLM(open_runtime(folder), open_tokenizer(folder), silent, Chat(words_of(folder), system))


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]


def test_chats_are_those_of_lm_eval(chatty: Path) -> None:
    other, adapted = peer(chatty), adapter(chatty)
    text = adapted.apply_chat_template(TURNS)
    assert text == other.apply_chat_template(TURNS)
    assert text.endswith("<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n")
    begun = [*TURNS, {"role": "assistant", "content": "The answer is"}]
    assert adapted.apply_chat_template(begun, False) == other.apply_chat_template(begun, add_generation_prompt=False)
    assert adapted.tok_encode(text) == other.tok_encode(text)
    pairs = [asked(text, " four"), asked(text, "Four")]
    found, expected = adapted.loglikelihood(pairs, True), other.loglikelihood(pairs, True)
    assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], abs=1e-4)


def test_the_beginning_of_text_comes_once(tiny_bos: Path, tmp_path: Path) -> None:
    folder = with_template(tiny_bos, tmp_path / "bos", PLAIN)
    other, adapted = peer(folder), adapter(folder)
    text = adapted.apply_chat_template(TURNS)
    assert text.startswith("<s>[system]")
    assert adapted.tok_encode(text).count(1) == 1
    assert adapted.tok_encode(text) == other.tok_encode(text)
    assert adapted.tok_encode("no template")[0] == 1
    export.write(folder, tmp_path / "bos.gguf", "F32")
    words = words_of(tmp_path / "bos.gguf")
    assert Chat(words, None).render(TURNS) == text
    in_gguf = RuntimeLM(open_runtime(tmp_path / "bos.gguf"), open_tokenizer(tmp_path / "bos.gguf"), silent)
    assert in_gguf.tok_encode(text) == adapted.tok_encode(text)


def test_examples_are_turns_after_the_system_text(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    told = RuntimeLM.apply_chat_template

    def telling(*given: Any, **more: Any) -> str:
        seen.append(told(*given, **more))
        return seen[-1]

    monkeypatch.setattr(RuntimeLM, "apply_chat_template", telling)
    found = run(chatty.parent / "out", chatty, **arc(chatty.parent, shots=2, limit=3, chat=True, system="Be brief."))
    assert (found["accuracy"]["chat"], found["accuracy"]["system"], found["accuracy"]["n"]) == (True, "Be brief.", 3)
    for text in seen:
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQuestion:")
        assert text.count("<|im_start|>assistant\n") == 3 and text.count("Question:") == 3
    assert len(seen) >= 3


def test_every_runtime_is_asked_alike(chatty: Path) -> None:
    folder = chatty.parent
    export.write(chatty, folder / "chatty.gguf", "F32")
    found = {
        name: run(folder / name, model, **arc(folder, chat=True))["accuracy"]
        for name, model in {"torch": chatty, "gguf": folder / "chatty.gguf"}.items()
    }
    assert found["torch"]["acc"] == found["gguf"]["acc"]
    assert (found["torch"]["chat"], found["torch"]["system"], found["torch"]["scorer"]) == (True, None, "lm-eval")
    assert change(folder / "gguf", folder / "torch")["acc"] == 0
    run(folder / "plain", chatty, **arc(folder))
    run(folder / "system", chatty, **arc(folder, chat=True, system="Be brief."))
    for other in ("plain", "system"):
        with pytest.raises(RequestError, match="asked in different ways"):
            change(folder / other, folder / "torch")


def test_results_of_chats_are_no_results_of_plain_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "facts_of", lambda settings: harness.Facts("t", 3, 9, "0" * 64, "1"))
    plain, chat = (measured.Accuracy(task="t", n=3, chat=each) for each in (False, True))
    assert alike.other_task(plain, chat) == "another way of asking (one is a chat)"
    assert (in_chat(plain), in_chat(chat)) == ("", ", asked in chats")
    assert alike.other_task(chat, chat.model_copy(update={"system": "a"})) == "another system text"
    digests = {
        Accuracy(**arc(Path("nowhere"), **more)).data_digest()
        for more in ({}, {"chat": True}, {"chat": True, "system": "a"}, {"chat": True, "system": "b"})
    }
    assert len(digests) == 4


def test_plain_tasks_keep_their_keys(chatty: Path) -> None:
    settings = Accuracy(**arc(chatty.parent))
    assert settings.key_config() == {"task": "arc_easy", "local": settings.local, "limit": None, "scorer": "lm-eval"}
    assert settings.data_digest() == harness.facts_of(settings).digest
    assert Accuracy(task="x", scorer="lm-eval", chat=True).key_config()["chat"] is True


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"chat": True}, "add `scorer: lm-eval`"),
        ({"task": "mine", "local": "mine.jsonl", "chat": True}, "add `scorer: lm-eval`"),
        ({"task": "arc_easy", "system": "Be brief."}, "add `chat: true`"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Accuracy.model_validate(settings)


def test_a_model_without_a_template_is_refused_before_any_work(chatty: Path, tiny: Tiny) -> None:
    folder = chatty.parent
    silent_one = with_template(tiny(), folder / "silent", None)
    flags = ("--chat", "--system", "Be brief.", "--task", "ifeval", "--skip", "speed", "--skip", "perplexity")
    refused(lighten("evaluate", silent_one, *flags, cwd=folder), 2, "silent has no chat template", "leave out `chat`")
    with pytest.raises(Failure, match="the model has no chat template"):
        run(folder / "out", silent_one, **arc(folder, chat=True))


def test_a_template_that_takes_no_system_text(chatty: Path, tiny: Tiny) -> None:
    folder = with_template(tiny(), chatty.parent / "strict", STRICT)
    words = words_of(folder)
    with pytest.raises(Failure, match=r"no system here.*leave out `system`"):
        Chat(words, "Be brief.").render(TURNS)
    chat = Chat(words, None)  # the description of a task
    assert (chat.render(TURNS[1:]), chat.dropped) == (Chat(words, None).render(TURNS), False)
    assert chat.render(TURNS) == chat.render(TURNS[1:]) and chat.dropped
    assert "the description of the task" in harness_measure.DROPPED


def test_an_end_of_turn_ends_an_answer(chatty: Path) -> None:
    adapted = adapter(chatty)
    free = adapted.generate_until([asked("The dog", {"until": [], "max_gen_toks": 8})], True)[0]
    decoding = adapted.runtime.decode(adapted.tok_encode("The dog"), 2)
    tokens = [int(next(decoding).argmax())]
    tokens.append(int(decoding.send(tokens[0]).argmax()))
    assert adapted._chat is not None and 2 in adapted._chat.ends
    adapted._chat.ends = (tokens[1],)
    assert adapted.generate_until([asked("The dog", {"until": [], "max_gen_toks": 8})], True)[0] != free


def test_a_task_that_asks_nothing_is_not_asked_in_chats(chatty: Path) -> None:
    file = chatty.parent / "rolling.yaml"
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {chatty.parent / 'arc.jsonl'}}}}}\n"
    how = 'test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{question}}"\n'
    file.write_text(f"task: rolling\n{data}{how}metric_list:\n  - {{metric: word_perplexity}}\n")
    with pytest.raises(RequestError, match="reads whole texts and asks nothing"):
        tasks.load(Accuracy(task=str(file), chat=True))


def test_drawn_answers_have_a_digest_of_their_way(chatty: Path) -> None:
    found = {}
    for name, settings in {"greedy": "do_sample: false", "drawn": "do_sample: true, temperature: 0.7"}.items():
        file = chatty.parent / f"{name}.yaml"
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {chatty.parent / 'arc.jsonl'}}}}}\n"
        how = 'test_split: test\noutput_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "a"\n'
        file.write_text(f"task: written\n{data}{how}generation_kwargs: {{max_gen_toks: 3, {settings}}}\n")
        loaded = tasks.load(Accuracy(task=str(file)))
        found[name] = [tasks._drawn(each) for each in tasks.requests(loaded, 1)]
        found[name].append(harness.files._draws(file.read_bytes()))
    assert found == {"greedy": [False, False], "drawn": [True, True]}


def test_instructions_are_followed_or_not_on_every_runtime(chatty: Path, tiny: Tiny) -> None:
    for package in ("langdetect", "immutabledict", "nltk"):
        pytest.importorskip(package)
    folder = chatty.parent
    model = with_template(tiny(max_position_embeddings=2048), folder / "long", CHATML)
    export.write(model, folder / "long.gguf", "F32")
    config = {"task": "ifeval", "local": str(folder / "ifeval.jsonl"), "scorer": "lm-eval", "chat": True}
    assert harness.build(Accuracy(**config)).documents == 3
    for name, path in {"torch": model, "llama.cpp": folder / "long.gguf"}.items():
        found = run(folder / name, path, **config)
        assert found["runtime"] == name
        score = found["accuracy"]
        assert (score["task"], score["n"], score["metric"]) == ("ifeval", 3, "prompt_level_strict_acc")
        assert {row["metric"] for row in score["metrics"]} == {
            f"{level}_level_{way}_acc" for level in ("prompt", "inst") for way in ("strict", "loose")
        }


def test_missing_data_of_nltk_is_named_before_any_work(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("langdetect", "immutabledict", "nltk"):
        pytest.importorskip(package)
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    row = {**IFEVAL[2], "instruction_id_list": ["length_constraints:number_sentences"]}
    row["kwargs"] = [{"relation": "at least", "num_sentences": 2}]
    (chatty.parent / "sentences.jsonl").write_text(json.dumps(row))
    settings = Accuracy(task="ifeval", local=str(chatty.parent / "sentences.jsonl"), scorer="lm-eval")
    with pytest.raises(RequestError, match=r"python -m nltk.downloader punkt\w*` once"):
        tasks.describe(settings.model_dump(mode="json"), silent)
