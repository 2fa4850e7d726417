import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from lighten.data.text import load_text
from lighten.errors import Failure, RequestError
from lighten.evaluate.perplexity import chunks, protocols
from lighten.evaluate.request import Reference
from lighten.evaluate.run import measure
from lighten.evaluate.runtimes.choose import open_runtime, open_tokenizer
from lighten.evaluate.runtimes.head import Head
from lighten.step import silent
from tests.evaluate.conftest import Tiny, log_softmax, payload

SETTINGS: dict[str, Any] = {"data": "builtin", "length": 64, "samples": 4}


def run(out: Path, model: Path, tokenizer: Path, settings: dict[str, Any] = SETTINGS, **more: Any) -> dict[str, Any]:
    out.mkdir()
    return measure(payload("perplexity", settings, model, out, tokenizer, **more), silent)


def against(baseline: Path, model: Path) -> dict[str, Any]:
    return {"reference": Reference(baseline, model)}


def test_standard_error_is_that_of_chunk_means() -> None:
    nll = np.array([[1.0, 3.0], [2.0, 4.0], [3.0, 5.0]])
    value, stderr = chunks.summarize(nll)
    assert value == pytest.approx(math.exp(3))
    assert stderr == pytest.approx(math.exp(3) * 1 / math.sqrt(3))
    assert chunks.summarize(nll[:1])[1] is None


def test_both_runtimes_give_the_perplexity_of_a_plain_loop(tiny: Tiny, tiny_gguf: Path, tmp_path: Path) -> None:
    ids = open_tokenizer(tiny()).encode(load_text("builtin", "perplexity"))[: 4 * 64]
    model = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float64)
    losses = []
    with torch.no_grad():
        for chunk in torch.tensor(ids).reshape(4, 1, 64):
            losses.append(float(model(chunk, labels=chunk).loss))
    expected = math.exp(sum(losses) / 4)
    found = run(tmp_path / "hf", tiny(), tiny())
    assert found["perplexity"]["value"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"]["tokens"] == 4 * 63
    assert found["perplexity"]["protocol"]["chunks"] == 4
    served = run(tmp_path / "gguf", tiny_gguf, tiny())
    assert served["perplexity"]["value"] == pytest.approx(expected, rel=1e-3)
    assert served["tokenizer_match"] is True


def test_divergence_is_the_textbook_one(tiny: Tiny, tmp_path: Path) -> None:
    base, other = tiny(), tiny("llama-bias")
    run(tmp_path / "base", base, base, save_hidden=True)
    found = run(tmp_path / "other", other, base, **against(tmp_path / "base", base))
    ids = protocols.cut(open_tokenizer(base).encode(load_text("builtin", "perplexity")), 64, 4, None)
    kl, same = [], []
    for chunk in ids:
        ours, theirs = (log_softmax(open_runtime(model).logits(chunk)[:-1]) for model in (base, other))
        kl.append((np.exp(ours) * (ours - theirs)).sum(-1))
        same.append(ours.argmax(-1) == theirs.argmax(-1))
    values = load_file(tmp_path / "other" / "values.safetensors")
    assert values["kl"] == pytest.approx(np.stack(kl), abs=1e-4)
    assert (values["top1"] == np.stack(same)).all()
    expected = {"kl_mean": np.mean(kl), "kl_p99": np.percentile(kl, 99), "top1_agreement": np.mean(same)}
    assert found["divergence"] == pytest.approx(expected, abs=1e-4)


def test_a_model_does_not_diverge_from_itself(tiny: Tiny, tmp_path: Path) -> None:
    run(tmp_path / "base", tiny(), tiny(), save_hidden=True)
    found = run(tmp_path / "same", tiny(), tiny(), **against(tmp_path / "base", tiny()))
    assert found["divergence"]["kl_mean"] < 1e-6
    assert found["divergence"]["top1_agreement"] == 1


def test_values_are_the_same_bytes_every_time(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(tmp_path / name, tiny(), tiny(), save_hidden=True)
    for file in ("values.safetensors", "hidden.safetensors", "result.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_reference_on_other_tokens_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    run(tmp_path / "base", tiny(), tiny(), save_hidden=True)
    with pytest.raises(Failure, match="other tokens"):
        run(tmp_path / "x", tiny(), tiny(), SETTINGS | {"length": 32}, **against(tmp_path / "base", tiny()))


def test_a_gguf_as_reference_is_measured_but_keeps_nothing(tiny: Tiny, tiny_gguf: Path, tmp_path: Path) -> None:
    found = run(tmp_path / "base", tiny_gguf, tiny(), save_hidden=True)
    assert "llama.cpp does not show" in found["warnings"][0]
    assert not (tmp_path / "base" / "hidden.safetensors").exists()
    later = run(tmp_path / "later", tiny(), tiny(), **against(tmp_path / "base", tiny_gguf))
    assert later["divergence"] is None


@pytest.mark.parametrize(
    ("config", "model", "settings"),
    [
        (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 2.0, "head_dim": 16}),
        (CohereConfig, CohereForCausalLM, {"logit_scale": 0.25}),
        (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 4.0}),
    ],
)
def test_heads_that_scale_or_cap_their_logits(
    config: Any, model: Any, settings: Any, tiny: Tiny, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    made = model(config(**sizes, num_key_value_heads=2, vocab_size=300, initializer_range=0.5, **settings))
    made.save_pretrained(tmp_path / "model")
    runtime = open_runtime(tmp_path / "model")
    logits = runtime.logits(np.arange(20))
    assert chunks.unfit(tmp_path / "model", runtime, logits) is None
    weights = json.loads((tmp_path / "model" / "config.json").read_text())
    plain = {name: value for name, value in weights.items() if name not in settings}
    (tmp_path / "model" / "config.json").write_text(json.dumps(plain | dict.fromkeys(settings)))
    assert "not a product of its head" in str(chunks.unfit(tmp_path / "model", runtime, logits))


def test_a_checkpoint_without_a_head_says_so(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"something": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(RequestError, match="no single tensor"):
        Head(tmp_path)


def test_a_broken_model_is_a_failure_not_a_number(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny(), tmp_path / "broken")
    tensors = load_tensors(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Failure, match="not finite"):
        run(tmp_path / "out", folder, folder)


def test_a_tokenizer_with_more_ids_than_the_model_is_a_failure(tiny: Tiny, tmp_path: Path) -> None:
    cut = shutil.copytree(tiny("llama-tied"), tmp_path / "cut")
    tensors = load_tensors(cut / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:400].clone()
    save_file(tensors, cut / "model.safetensors", {"format": "pt"})
    config = json.loads((cut / "config.json").read_text())
    (cut / "config.json").write_text(json.dumps({**config, "vocab_size": 400}))
    with pytest.raises(Failure, match="vocabulary of 400"):
        run(tmp_path / "out", cut, tiny())


def test_a_model_of_another_vocabulary_is_measured_on_its_own_tokens(tiny: Tiny, tmp_path: Path) -> None:
    base, other = tiny(), tiny("llama", "spm")
    reference = run(tmp_path / "base", base, base, save_hidden=True)
    found = run(tmp_path / "other", other, base, **against(tmp_path / "base", base))
    alone = run(tmp_path / "alone", other, other)
    assert "the first that differs is id 3" in found["vocabulary"]
    assert found["divergence"] is None
    assert found["perplexity"]["protocol"]["tokenizer"] == "own"
    assert found["perplexity"]["value"] == alone["perplexity"]["value"]
    assert "vocabulary" not in reference


def test_bits_per_byte_are_those_of_the_scored_text(tiny: Tiny, tmp_path: Path) -> None:
    found = run(tmp_path / "out", tiny(), tiny())["perplexity"]
    ids = open_tokenizer(tiny()).encode(load_text("builtin", "perplexity"))
    text = open_tokenizer(tiny()).decode(ids[: found["protocol"]["chunks"] * found["protocol"]["length"]])
    bits = found["tokens"] * math.log2(found["value"])
    assert found["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=0.03)  # first tokens are not scored
