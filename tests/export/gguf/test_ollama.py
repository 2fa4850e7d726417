"""The Modelfile beside a GGUF file: its template writes what the model's own does, or is left out."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lighten.export.gguf.ollama import find_turns, modelfile
from lighten.export.gguf.usage import usage
from lighten.model.template import prompter
from lighten.report.loading import loading

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|head|>' + message['role'] + '<|end_head|>\n\n' + message['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|end_head|>\n\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% for message in messages %}{{ '<turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n'"
    " + message['content'] + '</turn>\n' }}{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
INSIDE = (
    "{% set ns = namespace(system='') %}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{% set ns.system = '<<SYS>>' + message['content'] + '<</SYS>>' %}{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' + ns.system + message['content'] + ' [/INST]' }}{% set ns.system = '' %}"
    "{% else %}{{ ' ' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
)
LAST = CHATML.replace("+ '<|im_end|>' + '\n' }}", "}}{% if not loop.last %}{{ '<|im_end|>\n' }}{% endif %}")
DATED = CHATML.replace("You are helpful.", "Today is ' + strftime_now('%d %b') + '.")
TOOLS = CHATML + "{% if tools %}{{ tools | tojson }}{% endif %}"
TALK = [
    {"role": "user", "content": "Hi {you}\nthere"},
    {"role": "assistant", "content": "Yes, “you”."},
    {"role": "user", "content": "Why?"},
]


def folder(place: Path, template: str | None, **generation: Any) -> Path:
    place.mkdir(exist_ok=True)
    settings = {"bos_token": "<s>", **({"chat_template": template} if template else {})}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], **generation}))
    return place


def go(template: str, system: str, messages: list[dict[str, str]]) -> str:
    """Runs the part of Go's template language that is used: a loop over messages, and a choice by their role."""
    opening, _, rest = template.partition("{{ range .Messages }}")
    body, _, answer = rest.rpartition("{{ end }}{{ end }}")
    branches = re.findall(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else |\Z)', body, re.DOTALL)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    turns = [dict(branches).get(each["role"], "").replace("{{ .Content }}", each["content"]) for each in messages]
    return opening + "".join(turns) + answer


def parts(text: str) -> tuple[str, str]:
    """Returns the template and the system text of a Modelfile."""
    found = [re.search(rf'^{name} """(.*?)"""$', text, re.DOTALL | re.MULTILINE) for name in ("TEMPLATE", "SYSTEM")]
    return found[0][1] if found[0] else "", found[1][1] if found[1] else ""


@pytest.mark.parametrize(
    ("template", "bos", "system"),
    [(CHATML, None, True), (HEADERS, "<s>", True), (HEADERS, None, True), (NO_SYSTEM, "<s>", False)],
)
def test_the_template_writes_what_the_models_own_writes(
    tmp_path: Path, template: str, bos: str | None, system: bool
) -> None:
    source = folder(tmp_path / "m", template)
    text = modelfile("m.gguf", source, bos, ["a", "<s>", "</s>", "<|eot|>"])
    assert text.startswith("FROM ./m.gguf\nTEMPLATE ") and 'PARAMETER stop "</s>"\nPARAMETER stop "<|eot|>"\n' in text
    write = prompter(source)
    assert write
    talks = [TALK, TALK[:1]] + ([[{"role": "system", "content": "Be brief."}, *TALK]] if system else [])
    for talk in talks:
        assert go(*parts(text), talk) == write(talk, True).removeprefix(bos or "")
    assert ('SYSTEM """You are helpful."""' in text) == (template == CHATML)


@pytest.mark.parametrize(
    "template", [INSIDE, LAST, DATED, CHATML.replace("helpful", 'helpful """ {{ x }}'.replace("{{ x }}", ""))]
)
def test_a_template_that_go_cannot_express_is_left_out_and_said(tmp_path: Path, template: str) -> None:
    source = folder(tmp_path / "m", template)
    text = modelfile("m.gguf", source, None, ["a", "b", "c", 'x"y'])
    assert find_turns(source) is None and "TEMPLATE" not in text and "SYSTEM" not in text
    assert "chat template cannot be written" in text and 'stop "c"' in text and "x" not in text.partition("stop")[2]


def test_parameters_are_those_of_the_model(tmp_path: Path) -> None:
    source = folder(tmp_path / "m", None, do_sample=True, temperature=0.2, top_p=0.9, top_k=20, repetition_penalty=1.1)
    text = modelfile("m.gguf", source, None, [])
    assert text.splitlines() == [
        "FROM ./m.gguf",
        "PARAMETER temperature 0.2",
        "PARAMETER top_p 0.9",
        "PARAMETER top_k 20",
        "PARAMETER repeat_penalty 1.1",
    ]
    folder(tmp_path / "m", TOOLS, do_sample=False, temperature=0.7, max_new_tokens=64)
    text = modelfile("m.gguf", source, None, [])
    assert (
        text.endswith("PARAMETER temperature 0\nPARAMETER num_predict 64\n") and "# The template below is for" in text
    )


def test_a_card_names_the_commands() -> None:
    found = usage(["model-Q4_K_M.gguf", "Modelfile"])
    assert found and "ollama create NAME -f Modelfile" in found.also and "lms import model-Q4_K_M.gguf" in found.also
    assert "ollama" in loading("gguf", ["model-Q4_K_M.gguf", "Modelfile"], "'.'")
    assert "ollama" not in loading("gguf", ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"], "'.'")
