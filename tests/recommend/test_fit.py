"""What fits: the arithmetic against real caches and real files, and the command as a person would use it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lighten.errors import RequestError
from lighten.recommend import fit
from tests.command import lighten, process

Tiny = Callable[..., Path]


@pytest.mark.parametrize("kv", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_the_cache_is_that_of_transformers(tiny: Tiny, kv: int) -> None:
    folder = tiny(num_key_value_heads=kv)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    cache = model(input_ids=torch.ones(3, 40, dtype=torch.int64), use_cache=True).past_key_values
    held = sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))
    found = fit.fits(fit.open_model(str(folder)), 10**9, context=40, batch=3)
    assert {each.cache for each in found if each.runtime == "torch"} == {held}
    halved = fit.fits(fit.open_model(str(folder)), 10**9, context=40, batch=3, cache="q8_0")
    assert {each.cache for each in halved if each.runtime == "llama.cpp"} == {round(held * 8.5 / 16)}


def test_the_longest_context_just_fits(tiny: Tiny) -> None:
    model = fit.open_model(str(tiny()))
    for each in fit.fits(model, 260_000_000, context=1, batch=1000):
        if 0 < each.longest < (model.facts.context or 0):
            one, two = (
                next(f for f in fit.fits(model, 260_000_000, each.longest + more, 1000) if f.name == each.name)
                for more in (0, 1)
            )
            assert one.fits and not two.fits
            break
    else:
        raise AssertionError("no format was bounded by the memory")


@pytest.mark.parametrize(("kv", "word"), [(4, "MHA"), (2, "GQA"), (1, "MQA")])
def test_names_the_kind_of_attention(tiny: Tiny, kv: int, word: str) -> None:
    assert fit.open_model(str(tiny(num_key_value_heads=kv))).attention.startswith(word)


def test_wrong_requests(tiny: Tiny) -> None:
    model = fit.open_model(str(tiny()))
    with pytest.raises(RequestError, match="longer than the 512 that"):
        fit.fits(model, 10**9, context=513)
    with pytest.raises(RequestError, match="at least 1"):
        fit.fits(model, 10**9, context=1, batch=0)
    with pytest.raises(RequestError, match="there is f16, q8_0"):
        fit.fits(model, 10**9, context=1, cache="q4")
    for memory, target in ((None, None), ("8GB", "rpi5")):
        with pytest.raises(RequestError, match="--memory 8GB, or --target rpi5"):
            fit.room(memory, target)
    with pytest.raises(RequestError, match="is not a size"):
        fit.room("much", None)


def test_from_the_command_line(tiny: Tiny) -> None:
    done = process("fit", tiny(), "--memory", "1GB", "--context", 256, "--batch", 2)
    assert done.returncode == 0 and "is the largest that fits into 1.00 GB" in " ".join(done.stdout.split())
    told = json.loads(lighten("fit", tiny(), "--target", "rpi5", "--context", 256, "--json").stdout)
    assert told["trained_context"] == 512 and told["formats"][0]["fits"]
    assert [each["weights_bytes"] for each in told["formats"]] == sorted(
        (each["weights_bytes"] for each in told["formats"]), reverse=True
    )
    done = lighten("fit", tiny(), "--memory", "1MB", "--context", 256)
    assert done.returncode == 0 and "Nothing fits" in done.stdout
    done = lighten("fit", tiny(), "--memory", "1GB", "--context", 100000)
    assert done.returncode == 2 and "longer than the 512" in done.stderr
