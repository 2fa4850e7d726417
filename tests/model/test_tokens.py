"""From text to sequences of token ids: chat templates, and mixtures of several texts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lighten.data.origin import Origin
from lighten.errors import RequestError
from lighten.model.template import renderer
from lighten.model.tokens import calibration_ids, check_text, divided, load_tokenizer
from lighten.pipeline import run as pipeline
from lighten.pipeline.plan import make_plan
from lighten.pipeline.recipe import parse

TALK = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It <b>is</b> 'so'."}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{% generation %}{{ m.content | trim }}{% endgeneration %}<|im_end|>\n{% endfor %}"
    "{{ {'a': '<é>'} | tojson }}{{ strftime_now('%d %b %Y') }}"
)


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny(), tmp_path / "model"))


def give(model: Path, template: Any, **others: Any) -> Path:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template, **others}))
    return model


def test_turns_are_written_as_transformers_does(model: Path) -> None:
    from transformers import AutoTokenizer

    template = TEMPLATE.replace("{{ strftime_now('%d %b %Y') }}", "")
    give(model, template, bos_token={"content": "<|endoftext|>", "__type": "AddedToken"})
    render = renderer(model)
    assert render
    made = render(TALK)
    assert made == AutoTokenizer.from_pretrained(model).apply_chat_template(TALK, tokenize=False)
    assert made.startswith("<|endoftext|>")
    give(model, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}])
    assert renderer(model)(TALK).endswith('{"a": "<é>"}')  # type: ignore[misc]
    (model / "chat_template.jinja").write_text("{{ messages | length }}")
    assert renderer(model)(TALK) == "2"  # type: ignore[misc]


def test_a_template_is_found_wherever_one_lies(model: Path) -> None:
    assert renderer(give(model, None)) is None
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "a processor's"}))
    assert renderer(model)(TALK) == "a processor's"  # type: ignore[misc]
    (model / "chat_template.json").unlink()
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/rag.jinja").write_text("a further one")
    assert renderer(model)(TALK) == "a further one"  # type: ignore[misc]


def test_a_template_is_told_the_same_day_and_nothing_of_this_machine(model: Path) -> None:
    assert renderer(give(model, TEMPLATE))(TALK).endswith("01 Jan 2025")  # type: ignore[misc]
    for wrong in ("{{ ''.__class__.__mro__ }}{{ messages.__class__.__base__.__subclasses__() }}", "{{ 1 / 0 }}"):
        with pytest.raises(RequestError, match="does not take the conversation that begins"):
            renderer(give(model, wrong))(TALK)  # type: ignore[misc]
    with pytest.raises(RequestError, match="no system"):
        renderer(give(model, TEMPLATE))([{"role": "system", "content": "x"}])  # type: ignore[misc]
    with pytest.raises(RequestError, match="cannot be read"):
        renderer(give(model, "{% for %}"))


def test_special_tokens_of_a_template_are_single_ids(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": TALK}) + "\n") * 20)
    give(model, TEMPLATE)
    ids = calibration_ids(model, str(tmp_path / "a.jsonl"), 4, 16)
    assert load_tokenizer(model).token_to_id("<|im_start|>") in ids


def test_a_mixture_takes_turns_by_its_shares(model: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 2000)
    origins = [Origin(path=str(tmp_path / "a.txt"), share=0.25), Origin(path=str(tmp_path / "b.txt"), share=0.75)]
    alone = [calibration_ids(model, str(tmp_path / f"{name}.txt"), 99, 8) for name in "ab"]
    ids = calibration_ids(model, origins, 8, 8)
    which = [int(np.isin(row, alone[1]).all()) for row in ids]
    assert sum(which) == 6
    assert 0 in which[:4]
    assert 0 in which[4:]
    warnings: list[str] = []
    (tmp_path / "a.txt").write_text("a " * 20)
    assert len(calibration_ids(model, origins, 40, 8, warnings)) < 40
    assert "a.txt gives" in warnings[0]
    everything = calibration_ids(model, origins, None, 8)
    assert np.isin(everything, alone[1]).all(axis=1).mean() == pytest.approx(0.75, abs=0.1)


def test_a_tokenizer_that_cuts_and_pads_reads_the_whole_text(model: Path, tmp_path: Path) -> None:
    (text := tmp_path / "text.txt").write_text("one two three four " * 400)
    wanted = calibration_ids(model, str(text), 8, 32)
    told = json.loads((model / "tokenizer.json").read_text())
    told["truncation"] = {"direction": "Right", "max_length": 40, "strategy": "LongestFirst", "stride": 0}
    told["padding"] = {
        "strategy": {"Fixed": 5000},
        "direction": "Right",
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    told["padding"]["pad_to_multiple_of"] = None
    (model / "tokenizer.json").write_text(json.dumps(told))
    assert wanted.shape == (8, 32)
    assert np.array_equal(calibration_ids(model, str(text), 8, 32), wanted)


def test_numbers_by_shares_add_up() -> None:
    assert divided(10, [0.3, 0.7]) == [3, 7]
    assert divided(64, [1 / 3] * 3) == [22, 21, 21]
    assert divided(3, [0.01, 0.99]) == [1, 2]


def test_a_wrong_text_is_refused_when_a_run_is_planned(model: Path, tmp_path: Path) -> None:
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    (tmp_path / "short.txt").write_text("a few words")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    step = [{"quantize": {"bits": 4, "group_size": 32}}]
    for name, words in (("talk.jsonl", "talk.jsonl holds conversations"), ("short.txt", "is shorter than one sample")):
        given = {"data": str(tmp_path / name), "samples": 4, "length": 32}
        recipe = {"name": "n", "model": str(model), "variants": {"v": step}}
        with pytest.raises(RequestError, match=words):
            make_plan(parse({**recipe, "calibration": given}))
        measured = parse({**recipe, "evaluate": {"perplexity": given}})
        with pytest.raises(RequestError, match=words):
            pipeline.plan(measured)
        with pytest.raises(RequestError, match=words):
            pipeline.run(measured, artifacts=tmp_path / "artifacts")
        assert not (tmp_path / "artifacts").exists()
        distill = {"distill": {"data": str(tmp_path / name), "length": 32}}
        with pytest.raises(RequestError, match=words):
            make_plan(parse({**recipe, "variants": {"v": [distill]}}))


def test_the_template_and_the_tokenizer_of_a_gguf_file(tiny: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from lighten.export.gguf import write as gguf

    model = tiny()
    gguf.write(model, tmp_path / "model.gguf", "F32")
    assert renderer(tmp_path / "model.gguf")(TALK) == renderer(model)(TALK)  # type: ignore[misc]
    text = "Hello <|im_start|> naïve"
    ids = [load_tokenizer(path).encode(text, add_special_tokens=False).ids for path in (model, tmp_path / "model.gguf")]
    assert ids[0] == ids[1]
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(RequestError, match="shorter than one sample"):
        check_text(tmp_path / "model.gguf", str(tmp_path / "short.txt"), "perplexity", 64)
