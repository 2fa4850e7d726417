"""How transformers runs a model: every option acts, and what is written stays the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch._dynamo.utils import counters

from lighten.errors import Failure
from lighten.evaluate.run import measure
from lighten.evaluate.runtimes.choose import open_runtime
from lighten.evaluate.runtimes.runtime import Ids
from lighten.evaluate.speed import options
from lighten.evaluate.speed.options import lacking
from lighten.evaluate.speed.settings import Options, Speed
from lighten.step import silent
from tests.evaluate.conftest import Tiny, payload

PROMPT = np.random.default_rng(0).integers(0, 900, (2, 12))
STEPS = 8


def written(model: Path, **asked: Any) -> Ids:
    runtime = open_runtime(model, dtype="float32", options=Options(**asked))
    assert runtime.options == {"attention": "sdpa", "compile": "off", "cache": "dynamic"} | asked
    first, again = (runtime.generate(PROMPT, STEPS).ids for _ in range(2))
    assert first is not None and again is not None and (first == again).all()
    return first


@pytest.fixture(scope="module")
def plain(tiny: Tiny) -> Ids:
    """What greedy decoding writes, without a cache and without options."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32, attn_implementation="eager")
    ids = torch.from_numpy(PROMPT)
    with torch.no_grad():
        for _ in range(STEPS):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    found: Ids = ids[:, PROMPT.shape[1] :].numpy()
    return found


@pytest.mark.parametrize(
    "asked",
    [{"attention": "eager"}, {"attention": "sdpa"}, {"cache": "static"}, {"compile": "default", "cache": "static"}],
    ids=str,
)
def test_the_same_tokens_with_every_option(tiny: Tiny, plain: Ids, asked: dict[str, Any]) -> None:
    assert (written(tiny(), **asked) == plain).all()


def test_the_compiled_step_is_what_runs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counters.clear()
    written(tiny())
    assert not counters["stats"]
    written(tiny(), compile="default", cache="static")
    assert counters["stats"]["unique_graphs"] >= 1
    modes = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode: modes.append(mode) or compile_(model, mode=mode))
    open_runtime(tiny(), dtype="float32", options=Options(compile="max-autotune"))
    assert modes == ["max-autotune"]


def test_a_static_cache_is_one_for_all_shorter_texts(tiny: Tiny) -> None:
    runtime = open_runtime(tiny(), dtype="float32", options=Options(cache="static"))
    caches = runtime._caches  # type: ignore[attr-defined]
    first = caches.empty(2, 20)
    runtime.generate(PROMPT, STEPS)
    with torch.inference_mode():
        assert caches.empty(2, 12) is first and first.get_max_length() == 20
    assert caches.empty(2, 21) is not first and caches.empty(1, 20) is not first


def test_a_quantized_cache_holds_four_bits(tiny: Tiny) -> None:
    pytest.importorskip("optimum.quanto")
    runtime = open_runtime(tiny(), dtype="float32", options=Options(cache="quantized"))
    cache = runtime._caches.empty(1, 20)  # type: ignore[attr-defined]
    runtime.model(torch.from_numpy(PROMPT[:1]), past_key_values=cache)  # type: ignore[attr-defined]
    assert cache.layers[0].nbits == 4 and cache.layers[0]._quantized_keys.qtype.bits == 4


def test_what_a_machine_lacks_is_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is the CPU: choose attention sdpa" in (lacking(Options(attention="flash"), "cpu") or "")
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    assert "pip install flash-attn" in (lacking(Options(attention="flash"), "cuda") or "")
    assert "needs triton" in (lacking(Options(compile="default"), "cuda") or "")
    monkeypatch.setattr(options, "BACKENDS", {"no-such-package": "quanto"})
    assert "lighten[quanto]" in (lacking(Options(cache="quantized"), "cpu") or "")
    monkeypatch.setenv("PATH", "")
    assert "install g++" in (lacking(Options(compile="default"), "cpu") or "")
    assert lacking(Options(attention="eager", cache="static"), "cpu") is None
    with pytest.raises(Failure, match="flash attention runs on an NVIDIA GPU"):
        open_runtime(tiny(), options=Options(attention="flash"))


def test_options_of_a_variant_go_before_everyones() -> None:
    speed = Speed.model_validate(
        {
            "attention": "sdpa",
            "generate": 9,
            "options": {"*-c": {"compile": "default", "cache": "static"}, "b-c": {"compile": False}},
        }
    )
    assert speed.of("a") == Speed(attention="sdpa", generate=9)
    assert speed.of("a-c") == Speed(attention="sdpa", generate=9, compile="default", cache="static")
    assert speed.of("b-c") == Speed(attention="sdpa", generate=9, cache="static")
    assert speed.plain == Speed(generate=9)
    assert Speed.model_validate(speed.model_dump(mode="json")) == speed
    # what was measured before there were options keeps its key
    before = {"prompt": [128], "generate": 64, "batch": [1], "repeats": 6, "error": 0.025}
    assert Speed().key_config() == before
    with pytest.raises(ValidationError, match="a quantized cache cannot be compiled"):
        Speed(compile="default", cache="quantized")


def test_rows_of_speed_tell_the_options(tiny: Tiny, tiny_gguf: Path, tmp_path: Path) -> None:
    rows = []
    for number, model in enumerate((tiny(), tiny_gguf)):
        config = {"prompt": 5, "generate": 3, "repeats": 2, "attention": "eager", "cache": "static"}
        (tmp_path / str(number)).mkdir()
        rows += measure(payload("speed", config, model, tmp_path / str(number)), silent)["speed"]
    assert [row.get("attention") for row in rows] == ["eager", None]
    assert (rows[0]["compile"], rows[0]["cache"]) == ("off", "static") and "cache" not in rows[1]
