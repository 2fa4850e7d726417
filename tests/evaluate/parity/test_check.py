"""Exports compared with their source: faithful ones pass, deliberately broken ones are caught and say where."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lighten.errors import Failure
from lighten.evaluate.parity.check import check
from lighten.evaluate.runtimes.choose import words_of
from lighten.export.gguf import quantize as gguf_quantize
from lighten.export.gguf import write as gguf
from lighten.model import gguf_header, gguf_source, vocabulary
from lighten.model.tokenizer_files import chat_templates, ends
from lighten.pipeline import run as pipeline
from lighten.pipeline.recipe import parse
from lighten.step import silent

Tiny = Callable[..., Path]
LIMITS = {"perplexity": 0.0005, "top1": 0.99, "tokenizer": 1.0}


def compare(source: Path, made: Path, **limits: float | None) -> dict[str, Any]:
    found = check({"source": str(source), "made": str(made), "limits": {**LIMITS, **limits}, "tokens": 256}, silent)
    facts: dict[str, Any] = found.value["parity"]
    return facts


@pytest.fixture
def source(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "source"))


def exported(source: Path, change: Callable[[Path], None], tmp_path: Path, type: str = "F32") -> Path:
    """Exports what a model has become after a change."""
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    change(broken)
    file = tmp_path / "made.gguf"
    gguf.write(broken, file, type)
    return file


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.mark.parametrize(("kind", "pre"), [("llama", "llama-bpe"), ("llama-tied", "smollm"), ("mistral", "gpt-2")])
def test_a_faithful_export_passes(tiny: Tiny, tmp_path: Path, kind: str, pre: str) -> None:
    file = tmp_path / "made.gguf"
    gguf.write(tiny(kind, pre), file, "F16")
    found = compare(tiny(kind, pre), file)
    assert abs(found["perplexity_change"]) < LIMITS["perplexity"]
    assert found["top1_agreement"] >= LIMITS["top1"]
    assert found["kl_mean"] < 1e-4
    assert (found["strings"], found["strings_differ"]) == (500, 0)


def test_strings_that_differ_only_in_composition_are_a_warning(tiny: Tiny, tmp_path: Path) -> None:
    source, file = tiny("qwen2", "qwen2"), tmp_path / "made.gguf"  # its normalizer composes accents
    gguf.write(source, file, "F16")
    found = check({"source": str(source), "made": str(file), "limits": LIMITS, "tokens": 0}, silent).value
    assert 0 < found["parity"]["strings_differ"] < 100
    assert "does not compose accents" in found["warnings"][0]


def test_swapped_weights_are_caught_in_their_layer(source: Path, tmp_path: Path) -> None:
    def swap(broken: Path) -> None:
        weights = load_file(broken / "model.safetensors")
        names = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qk"]
        q, k = (weights[name] for name in names)
        weights[names[0]] = torch.cat([k, q[len(k) :]])
        weights[names[1]] = q[: len(k)].clone()
        save_file(weights, broken / "model.safetensors", {"format": "pt"})

    with pytest.raises(Failure, match=r"its perplexity is .*; it first differs in layer 1, attention \(off by"):
        compare(source, exported(source, swap, tmp_path))


def test_a_wrong_rope_base_is_caught_in_the_first_layer(source: Path, tmp_path: Path) -> None:
    def turn(broken: Path) -> None:
        edit_json(broken / "config.json", lambda config: config["rope_parameters"].update(rope_theta=500.0))

    with pytest.raises(Failure, match=r"it first differs in layer 0, attention"):
        compare(source, exported(source, turn, tmp_path))


def test_a_wrong_head_is_told_from_wrong_layers(source: Path, tmp_path: Path) -> None:
    def roll(broken: Path) -> None:
        weights = load_file(broken / "model.safetensors")
        weights["lm_head.weight"] = weights["lm_head.weight"].roll(1, 0)
        save_file(weights, broken / "model.safetensors", {"format": "pt"})

    with pytest.raises(Failure, match="its layers agree: the final norm or the head differs"):
        compare(source, exported(source, roll, tmp_path))


def test_a_missing_special_token_is_caught(source: Path, tmp_path: Path) -> None:
    def forget(broken: Path) -> None:
        def drop(tokenizer: dict[str, Any]) -> None:
            tokenizer["added_tokens"] = [
                each for each in tokenizer["added_tokens"] if each["content"] != "<|im_start|>"
            ]

        edit_json(broken / "tokenizer.json", drop)

    with pytest.raises(Failure, match=r"of 500 strings get other ids, the first of them '<\|im_start\|>'"):
        compare(source, exported(source, forget, tmp_path))


def test_another_chat_template_and_another_end_are_caught(source: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"

    def add(folder: Path, text: str, eos: str) -> None:
        edit_json(folder / "tokenizer_config.json", lambda config: config.update(chat_template=text, eos_token=eos))

    add(source, template, "<|im_end|>")
    file = exported(source, lambda broken: add(broken, template + "!", "<|endoftext|>"), tmp_path)
    with pytest.raises(Failure, match=r"its end of text .* its chat template writes 'user: What is 2"):
        compare(source, file)


def test_a_rounded_export_is_only_held_to_what_was_asked(source: Path, tmp_path: Path) -> None:
    plain, file = tmp_path / "plain.gguf", tmp_path / "made.gguf"
    gguf.write(source, plain, "F32")
    gguf_quantize.quantize(plain, file, "Q2_K")
    found = compare(source, file, perplexity=None, top1=None)
    assert 0 < found["top1_agreement"] < 0.99
    with pytest.raises(Failure, match=r"the most likely token is the same at .* at least 99.00% was asked for"):
        compare(source, file, perplexity=None)


def test_a_stage_fails_with_its_export(source: Path, tmp_path: Path) -> None:
    """A recipe's limit fails the variant, says why, and leaves nothing in the store; a looser one passes."""
    step = {"format": "gguf", "type": "Q2_K"}
    variants = {
        "strict": [{"export": {**step, "parity": {"top1": 0.999}}}],
        "loose": [{"export": {**step, "parity": {"top1": 0.01}}}],
        "plain": [{"export": {"format": "gguf", "type": "F16"}}],
    }
    recipe = parse({"name": "parity", "model": str(source), "variants": variants, "evaluate": {}})
    folder = pipeline.run(recipe, artifacts=tmp_path / "artifacts")
    rows = {row["name"]: row for row in json.loads((folder / "results.json").read_text())["variants"]}
    assert rows["strict"]["status"] == "failed"
    assert "at least 99.90% was asked for; it first differs in layer 0" in rows["strict"]["error"]
    assert not (tmp_path / "artifacts/objects" / rows["strict"]["key"]).exists()
    assert rows["loose"]["status"] == rows["plain"]["status"] == "ok"
    assert rows["plain"]["facts"]["parity"]["top1_agreement"] >= 0.99


def test_every_end_and_every_template_go_into_the_file_and_are_compared(source: Path, tmp_path: Path) -> None:
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_text("{{ messages[0]['content'] }} with tools")
    asked = [index for index, text in entries(source) if text in ("<|im_end|>", "a", "b")]
    edit_json(source / "generation_config.json", lambda config: config.update(eos_token_id=asked))
    file = tmp_path / "made.gguf"
    gguf.write(source, file, "F32")
    fields = gguf_header.read_header(file).fields
    assert fields["tokenizer.chat_templates"] == ["tool_use"]
    assert fields["tokenizer.chat_template.tool_use"].endswith("with tools")
    assert sorted(fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")) == sorted(asked)
    words = words_of(file)
    assert set(asked) <= set(words.ends)
    assert sorted(words.render) == ["default", "tool_use"]
    found = compare(source, file)
    assert (found["chat_template"], found["chat_templates"]) == ("same", ["default", "tool_use"])
    assert found["ends"] == 3


def entries(folder: Path) -> list[tuple[int, str]]:
    read = vocabulary.read(folder)
    return [*read.learned.items(), *read.others.items()]


def test_a_lost_end_and_a_lost_template_are_caught(source: Path, tmp_path: Path) -> None:
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_text("tools")
    index = next(index for index, text in entries(source) if text == "a")
    edit_json(source / "generation_config.json", lambda config: config.update(eos_token_id=[2, index]))

    def forget(broken: Path) -> None:
        shutil.rmtree(broken / "additional_chat_templates")
        edit_json(broken / "generation_config.json", lambda config: config.update(eos_token_id=2))

    lost = rf"does not end a text at {index}, the source does; it has no chat template tool_use"
    with pytest.raises(Failure, match=lost):
        compare(source, exported(source, forget, tmp_path))


def test_ends_that_have_no_place_are_said(source: Path, tmp_path: Path) -> None:
    asked = [index for index, text in entries(source) if text in ("<|im_end|>", "a", "b", "c")]
    edit_json(source / "generation_config.json", lambda config: config.update(eos_token_id=asked))
    warnings = gguf.write(source, tmp_path / "made.gguf", "F32")
    assert any("no place for 1 of the tokens that end a text: c" in each for each in warnings)
    compare(source, tmp_path / "made.gguf")  # a warning, as the file has no room for it


def test_what_a_file_says_of_ends_and_templates_comes_back(source: Path, tmp_path: Path) -> None:
    """From a model to a GGUF file to a model."""
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_text("tools")
    edit_json(source / "generation_config.json", lambda config: config.update(eos_token_id=[2, 0]))
    file, back = tmp_path / "made.gguf", tmp_path / "back"
    gguf.write(source, file, "F32")
    back.mkdir()
    gguf_source.convert(file, back)
    assert chat_templates(back) == chat_templates(source)
    assert ends(back) == [2, 0]
