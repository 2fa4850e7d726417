"""A plan refuses what a run would refuse, before anything is copied."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lighten import screen
from lighten.cli.progress import Bars
from lighten.compare.side import of_model
from lighten.compress.distill.teacher import Teacher
from lighten.errors import RequestError
from lighten.evaluate.perplexity.settings import Perplexity
from lighten.evaluate.settings import Evaluate
from lighten.export.gguf import write as gguf
from lighten.model.checkpoint import Checkpoint
from lighten.model.gguf import table
from lighten.pipeline.plan import make_plan
from lighten.pipeline.recipe import parse
from lighten.pipeline.rows import add_measurements
from lighten.pipeline.stage import Plan
from lighten.pipeline.verbs import measure
from lighten.pipeline.watcher import Silent
from lighten.step import Step
from lighten.store.store import Store
from tests.conftest import SIZES, byte_level, write_tokenizer

Tiny = Callable[..., Path]
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
PT = {"format": "pt"}
GGUF = {"export": {"format": "gguf", "type": "F16"}}
GPTQ = {"quantize": {"method": "gptq", "bits": 4, "group_size": 32}}


def plan(model: Path, *steps: dict[str, Any]) -> Plan:
    value = {"name": "r", "model": str(model), "calibration": {"samples": 4, "length": 32}, "variants": {"v": [*steps]}}
    return make_plan(parse(value))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    vocab = write_tokenizer(folder, byte_level("qwen2"))
    config = Qwen3Config(**{**SIZES, **SMALL}, vocab_size=vocab, head_dim=16, eos_token_id=2, bos_token_id=None)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blob(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file under a name without a suffix."""
    file = tmp_path_factory.mktemp("blob") / "sha256-abab"
    gguf.write(qwen3, file, "F16")
    return file


def test_steps_take_every_family_unless_they_say_otherwise(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(qwen3, GGUF)
    plan(qwen3, GPTQ)
    plan(qwen3, {"prune": {"method": "wanda", "pattern": "2:4"}})
    plan(qwen3, {"quantize": {"method": "gptq", "budget": "bits=4.5", "group_size": 32}})
    plan(qwen3, {"prune": {"what": "mlp", "ratio": 0.5, "multiple": 16}})
    plan(qwen3, {"prune": {"target": "ratio=0.05"}})
    monkeypatch.setattr(Step, "any_family", False)
    with pytest.raises(RequestError, match="and not those of Qwen3ForCausalLM"):
        plan(qwen3, {"prune": {"target": "ratio=0.05"}})


def test_a_gguf_file_that_cannot_be_changed_is_refused_but_measured(
    blob: Path, qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family without a row, also beside a baseline that fails, which has a reason of its own."""
    monkeypatch.setattr(table, "ROWS", tuple(row for row in table.ROWS if row.arch != "qwen3"))
    with pytest.raises(RequestError, match="'qwen3', which can be measured but not changed"):
        plan(blob, GGUF)
    broken = Path(shutil.copytree(qwen3, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    save_file({**tensors, "model.norm.weight": torch.full((32,), torch.nan)}, broken / "model.safetensors", PT)
    asked = Perplexity(length=32, samples=2)
    failed, found = measure([str(broken), str(blob)], perplexity=asked, device="cpu")["variants"]
    assert "not finite" in failed["error"]
    assert (found["status"], found["runtime"], found["format"]) == ("ok", "llama.cpp", "gguf")
    assert found["bits_per_weight"] > 16
    assert found["perplexity"]["value"] > 1


def test_a_tokenizer_that_the_export_cannot_write_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny(**SMALL), tmp_path / "model"))
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))
    with pytest.raises(RequestError, match="of kind WordPiece"):
        plan(model, GGUF)
    (model / "tokenizer.json").unlink()
    for step in (GGUF, GPTQ, {"distill": {}}):
        with pytest.raises(RequestError, match=r"has no tokenizer.json; write one once"):
            plan(model, step)


def test_a_teacher_whose_rows_are_padded_is_taken_and_cut(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(**SMALL)
    teacher = Path(shutil.copytree(model, tmp_path / "teacher"))
    config = json.loads((teacher / "config.json").read_text())
    rows = Checkpoint(model).facts.vocab
    (teacher / "config.json").write_text(json.dumps({**config, "vocab_size": rows + 64}))
    tensors = load_file(teacher / "model.safetensors")
    padding = torch.zeros(64, SMALL["hidden_size"])
    padded = {name: torch.cat([tensors[name], padding]) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file({**tensors, **padded}, teacher / "model.safetensors", PT)
    found = plan(model, {"distill": {"teacher": str(teacher)}})
    asked = next(stage.step for stage in found.stages if isinstance(stage.step, Teacher))
    assert asked.rows == rows
    plain = Teacher.model_validate({})
    assert "rows" not in plain.key_config() and asked.key_config()["rows"] == rows
    with pytest.raises(RequestError, match=r"different vocabularies .*same vocabulary"):
        plan(model, {"distill": {"teacher": str(tiny(pre="spm", **SMALL))}})


def test_a_row_of_another_vocabulary_has_no_change(tmp_path: Path) -> None:
    protocol = {"name": "lighten", "ids_sha256": "its own", "tokenizer": "own"}
    result = {
        "vocabulary": "9 and 7 tokens",
        "perplexity": {"value": 9.0, "bits_per_byte": 1.0, "protocol": protocol},
        "divergence": None,
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    row: dict[str, Any] = {"name": "b"}
    add_measurements(row, [(Perplexity(), tmp_path, tmp_path)], False)
    assert row["vocabulary"] == "9 and 7 tokens"
    assert "delta" not in row
    assert "compare bits per byte, not perplexity" in row["notes"][0]


def test_a_comparison_of_other_tokens_is_refused_before_it_is_measured(tiny: Tiny, tmp_path: Path) -> None:
    base, other = tiny(**SMALL), tiny(pre="spm", **SMALL)
    store = Store(tmp_path)
    with pytest.raises(RequestError, match=r"different vocabularies .*id 3.*cannot be paired. `lighten evaluate`"):
        of_model(str(other), Evaluate(), base, store=store, device="cpu", watcher=Silent(), kept=ExitStack())


def test_rows_that_blocks_do_not_fit_are_named_before_the_work(tiny: Tiny) -> None:
    odd = tiny(hidden_size=288, intermediate_size=512, num_attention_heads=9, num_key_value_heads=3)
    exports: dict[str, dict[str, Any]] = {
        "Q4_K_M": {"type": "Q4_K_M"},
        "Q8_0": {"type": "Q8_0"},
        "budget": {"budget": {"bits": 8}},
    }
    said = {}
    for name, settings in exports.items():
        (stage,) = (
            each for each in plan(odd, {"export": {"format": "gguf", **settings}}).stages if each.kind == "export"
        )
        said[name] = stage.remarks
    assert "this model has rows of 288:" in said["Q4_K_M"][0]
    assert said["Q8_0"] == said["budget"] == []
    lines: list[str] = []
    bars = Bars(screen.console(quiet=True))
    bars.say = lines.append  # type: ignore[method-assign]
    bars.started(next(each for each in plan(odd, {"export": {"format": "gguf"}}).stages if each.kind == "export"))
    assert lines[0].startswith("! export Q4_K_M: blocks of Q4_K_M hold 256 weights")


def test_kernels_that_are_not_installed_are_named_before_the_work(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lighten.pipeline.checks.find_spec", lambda module: None if module == "gptqmodel" else True)
    recipe = {"name": "a", "model": str(tiny()), "variants": {"q": [GPTQ]}}
    quality, speed = {"perplexity": {}}, {"speed": {"generate": 4}}
    assert make_plan(parse({**recipe, "evaluate": quality})).measurements["q"]  # weights are unpacked for that
    with pytest.raises(
        RequestError, match=r"evaluate\.speed of quantized weights needs the package gptqmodel.*\[gptq\]"
    ):
        make_plan(parse({**recipe, "evaluate": speed}))
    folder = shutil.copytree(tiny(), tmp_path / "experts")
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    sizes = {**SIZES, **SMALL, "vocab_size": vocab, "num_local_experts": 2}
    MixtralForCausalLM(MixtralConfig(**sizes)).save_pretrained(folder)
    experts = {**recipe, "model": str(folder)}  # lighten unpacks these for speed, too
    assert make_plan(parse({**experts, "evaluate": speed})).measurements["q"]
