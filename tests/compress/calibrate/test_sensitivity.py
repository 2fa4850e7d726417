"""Sensitivities, one layer in memory at a time, against autograd through the whole model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lighten.compress.calibrate.sensitivity import Sensitivities
from lighten.errors import Failure
from lighten.model import stream
from lighten.model.sensitivity import FILE, HEAD, Sensitivity
from lighten.model.tokens import calibration_ids
from lighten.step import Context
from lighten.store.artifact import Artifact

Tiny = Callable[..., Path]
SETTINGS = {"samples": 6, "length": 160, "sequences": 3}  # longer than the rows of logits taken at a time


@pytest.mark.parametrize("family", ["llama", "llama-bias", "llama-tied", "qwen2", "mistral"])
def test_are_those_of_the_whole_model(family: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "fast_dtype", lambda device: torch.float32)
    source = tiny(family)
    reports: list[tuple[int, int]] = []
    context = Context(report=lambda done, total, note: reports.append((done, total)))
    facts = Sensitivities(**SETTINGS).run(Artifact(source, {"key": "x", "format": "hf"}), tmp_path, context)
    found = Sensitivity.read(tmp_path)
    assert (facts["sequences"], facts["tokens"], found.tokens) == (3, 480, 480)
    assert reports == [(done, 4) for done in range(1, 5)]

    ids = torch.from_numpy(calibration_ids(source, "builtin", 6, 160))[::2]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.requires_grad_(False)
    outputs: dict[str, torch.Tensor] = {}
    head_inputs = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            if name == "model.embed_tokens":
                output.requires_grad_()
            output.retain_grad()
            outputs[name] = output
            if name == "lm_head":
                head_inputs.append(inputs[0].detach())

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.register_forward_hook(keep(name))
    logits = model(ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    assert set(found.outputs) == set(outputs)
    assert len(outputs) == 16
    for name, output in outputs.items():
        assert found.outputs[name] == pytest.approx(float(output.grad.double().square().mean()), rel=1e-3), name
    rows = head_inputs[0].flatten(0, 1).double()
    assert torch.allclose(found.head_gram.double(), rows.t() @ rows, rtol=1e-4, atol=1e-2)
    assert torch.equal(found.counts.long(), torch.bincount(ids.flatten(), minlength=model.config.vocab_size))
    assert int(found.counts.sum()) == found.tokens


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = Sensitivity({"lm_head": 0.5, "a.b": 1e-12}, torch.rand(4, 4).t(), torch.arange(9, dtype=torch.int32), 36)
    written.write(tmp_path)
    found = Sensitivity.read(tmp_path)
    assert (found.outputs, found.tokens) == (written.outputs, written.tokens)
    assert torch.equal(found.head_gram, written.head_gram)
    assert torch.equal(found.counts, written.counts)


@pytest.mark.parametrize("file", [FILE, HEAD])
@pytest.mark.parametrize("damage", ["gone", "cut short", "other"])
def test_damage_is_one_clear_failure(tmp_path: Path, file: str, damage: str) -> None:
    Sensitivity({"a": 1.0}, torch.eye(2), torch.ones(3, dtype=torch.int32), 3).write(tmp_path)
    path = tmp_path / file
    if damage == "gone":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        path.write_text("{}")
    with pytest.raises(Failure, match="does not hold the sensitivities of a model") as raised:
        Sensitivity.read(tmp_path)
    assert str(tmp_path) in str(raised.value)
