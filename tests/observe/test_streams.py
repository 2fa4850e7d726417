"""GPTQ in two streams: the correction against the formula, and the quantized stream against the opened model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.compress.calibrate.reads import Reads
from lighten.compress.calibrate.sweep import Sweep
from lighten.compress.quantize.quantized_layers import Work
from lighten.model import whole
from lighten.model.grams import Gram
from lighten.model.tokens import calibration_ids
from lighten.observe import correction
from lighten.observe.correction import RIDGE, Sums, corrected
from lighten.observe.streams import Inputs, Streams
from lighten.pipeline.steps import open_step
from lighten.step import Context
from lighten.store.artifact import Artifact
from tests.families.models import make
from tests.families.trial import loaded

SAMPLES, LENGTH = 8, 64


def sums(held: int, *part: torch.Tensor) -> Sums:
    """Returns sums over tokens of which the last are held out."""
    found = Sums.empty(part[0].shape[1], "cpu")
    found._pairs.append(tuple(each[:-held] for each in part))
    found.held.append(tuple(each[-held:] for each in part))
    return found


def test_the_correction_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(24, 24, generator=generator) / 5
    plain = torch.randn(600, 24, generator=generator) @ mix
    quantized = plain + 0.2 * plain.roll(1, 1) + 0.05 * torch.randn(600, 24, generator=generator)
    weight = torch.randn(16, 24, generator=generator)
    found, (alpha,) = corrected(weight, sums(100, plain, quantized))
    x, y = plain[:500].double(), quantized[:500].double()
    gram = y.t() @ y
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    whole_step = weight.double() @ ((x - y).t() @ y) @ torch.linalg.inv(gram + ridge)
    assert torch.allclose(found.double() - weight, alpha * whole_step, atol=1e-4)

    def lost(share: float) -> float:
        change = (
            quantized[500:].double() @ (weight.double() + share * whole_step).t()
            - plain[500:].double() @ weight.t().double()
        )
        return float(change.square().sum())

    assert 0.5 < alpha <= 1
    assert lost(alpha) <= min(lost(alpha - 0.02), lost(min(1.0, alpha + 0.02))) * (1 + 1e-6)
    assert lost(alpha) < lost(0) / 2


def test_what_the_states_lack_is_made_good_too() -> None:
    """Where outputs are added to states that differ, the weight is the one after which the states differ least."""
    generator = torch.Generator().manual_seed(6)
    plain, noise = torch.randn(2, 2000, 12, generator=generator)
    quantized = plain + 0.1 * plain.roll(1, 1) + 0.02 * noise
    weight, slip = torch.randn(2, 8, 12, generator=generator)
    states = torch.randn(2000, 8, generator=generator)
    worse = states - 0.1 * quantized @ slip.t()
    found, (alpha, beta) = corrected(weight, sums(400, plain, quantized, states, worse))
    assert alpha > 0.9
    assert beta > 0.9

    def off(own: torch.Tensor) -> float:
        """Returns how far the states of other tokens are from those of the source."""
        return float((quantized @ own.t() + worse - plain @ weight.t() - states)[1600:].norm())

    alone, _ = corrected(weight, sums(400, plain, quantized))
    best = torch.linalg.lstsq(quantized[:1600], (plain @ weight.t() + states - worse)[:1600]).solution.t()
    assert off(found) < off(alone) / 4 < off(weight) / 4
    assert off(found) < 1.2 * off(best)


def test_without_tokens_in_both_models_nothing_is_changed() -> None:
    found = Sums.empty(4, "cpu")
    found.add(None, torch.randn(16, 4))
    weight = torch.randn(3, 4)
    changed, shares = corrected(weight, found)
    assert torch.equal(changed, weight) and shares == [0.0] and not found.held


def test_noise_alone_is_not_followed() -> None:
    generator = torch.Generator().manual_seed(4)
    plain = torch.randn(80, 24, generator=generator)
    quantized = plain + 0.1 * torch.randn(80, 24, generator=generator)
    _, (alpha,) = corrected(torch.randn(8, 24, generator=generator), sums(40, plain, quantized))
    assert alpha < 0.3


def test_a_gram_that_cannot_be_inverted_is_said() -> None:
    found = sums(8, torch.randn(16, 4), torch.randn(16, 4))
    found.close()
    found.known.blocks.neg_()
    with pytest.raises(ArithmeticError, match="not positive definite"):
        corrected(torch.randn(2, 4), found)


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=6), st.integers(1, 64))
@settings(deadline=None, max_examples=30)
def test_every_token_is_in_the_sum_once(batches: list[tuple[int, bool]], at_once: int) -> None:
    """Tokens of batches that the source does not run, and those that are held out, count in Ĥ too."""
    generator = torch.Generator().manual_seed(5)
    found, read, pairs = Sums.empty(6, "cpu"), [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(correction, "AT_ONCE", at_once)
        for tokens, paired in batches:
            plain, quantized = torch.randn(2, tokens, 6, generator=generator)
            found.add(plain if paired else None, quantized)
            read.append(quantized)
            if paired:
                kept = tokens - tokens // correction.HELD_OUT
                pairs.append((plain[:kept] - quantized[:kept]).t() @ quantized[:kept])
        together = found.together()
    everything = torch.cat(read)
    assert together.tokens == len(everything)
    assert torch.allclose(together.matrix(), everything.t() @ everything, atol=1e-4)
    assert torch.allclose(found.moved, sum(pairs, torch.zeros(6, 6)), atol=1e-4)
    assert torch.allclose(together.absmax, everything.abs().amax(0))


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3_text", "qwen3_moe"])
def swept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "model").mkdir()
    make(request.param, folder / "model")
    (folder / "grams").mkdir()
    Sweep(samples=SAMPLES, length=LENGTH).run(source_of(folder), folder / "grams", Context())
    return request.param, folder


def source_of(folder: Path) -> Artifact:
    return Artifact(folder / "model", {"key": "x", "format": "hf"})


def quantized(folder: Path, name: str, **settings: Any) -> tuple[Path, dict[str, Any]]:
    (out := folder / name).mkdir()
    step = open_step("quantize", {"method": "gptq", "bits": 3, "group_size": 32, **settings})
    return out, step.run(source_of(folder), out, Context(grams=folder / "grams"))


def test_the_quantized_stream_is_the_model_that_is_written(
    swept: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the last layer reads in the walk is what it reads in the model that loaders open."""
    family, folder = swept
    named = {"gpt2": "mlp.c_proj", "qwen3_moe": "self_attn.o_proj"}.get(family, "mlp.down_proj")
    seen: list[torch.Tensor] = []
    own = Streams.round

    def round_(self: Streams, work: Work, group: Inputs, sums: Sums, drawn: Gram | None = None) -> Any:
        if group.first == named:
            sums.close()
            seen.append(sums.known.matrix() + sums.rest.matrix())
        return own(self, work, group, sums, drawn)

    monkeypatch.setattr(Streams, "round", round_)
    out, facts = quantized(folder, "checked", propagate="auto")
    assert facts["propagation"]["inputs"] > 4
    assert "experts" in facts if family == "qwen3_moe" else facts["propagation"]["linears_without"] == 0
    own_gram, source_gram = (gram_of(folder, made, named) for made in (out, folder / "model"))
    off, moved = float((seen[-1] - own_gram).norm()), float((source_gram - own_gram).norm())
    assert off < 0.03 * float(own_gram.norm())
    assert off < moved / 4


def gram_of(folder: Path, model: Path, linear: str) -> torch.Tensor:
    """Returns the Gram of what the last linear of a name reads in a model that is opened whole."""
    opened = whole.load(model, torch.bfloat16).eval()
    ids = torch.from_numpy(calibration_ids(folder / "model", "builtin", SAMPLES, LENGTH)).long()
    read: list[torch.Tensor] = []
    module = [each for name, each in opened.named_modules() if name.endswith(linear)][-1]
    handle = module.register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(0, -2).float()))
    with torch.no_grad():
        opened(input_ids=ids, use_cache=False)
    handle.remove()
    return read[0].t() @ read[0]


def test_the_tokens_alone_are_enough(swept: tuple[str, Path]) -> None:
    """A pass of one sample tells which linears share an input; the Grams of a sweep are not read."""
    family, folder = swept
    (folder / "reads").mkdir()
    Reads(samples=SAMPLES, length=LENGTH).run(source_of(folder), folder / "reads", Context())
    assert not list((folder / "reads").glob("layer-*"))
    step = open_step("quantize", {"method": "gptq", "bits": 3, "group_size": 32, "propagate": "auto"})
    assert not step.needs_sums()
    files = []
    for grams in ("grams", "reads"):
        (out := folder / f"from-{grams}").mkdir()
        facts = step.run(source_of(folder), out, Context(grams=folder / grams))
        assert ("experts" in facts) == (family == "qwen3_moe")
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_experts_with_few_tokens_are_counted(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    make("qwen3_moe", tmp_path / "model")
    (tmp_path / "grams").mkdir()
    Reads(samples=1, length=16).run(source_of(tmp_path), tmp_path / "grams", Context())
    _, facts = quantized(tmp_path, "few", propagate="auto")
    assert facts["experts"]["starved"] > 0
    assert facts["propagation"]["linears_without"] >= 2 * facts["experts"]["starved"]


def test_outputs_come_nearer_to_those_of_the_source(swept: tuple[str, Path]) -> None:
    _, folder = swept
    ids = torch.from_numpy(calibration_ids(folder / "model", "builtin", SAMPLES, LENGTH)).long()
    with torch.no_grad():
        wanted = loaded(folder / "model").eval()(input_ids=ids, use_cache=False).logits
        lost = {}
        for propagate in ("off", "auto"):
            out, _ = quantized(folder, f"near-{propagate}", propagate=propagate)
            found = whole.load(out, torch.float32).eval()(input_ids=ids, use_cache=False).logits
            lost[propagate] = float((found - wanted).square().mean() / wanted.var())
    assert lost["auto"] < lost["off"]


def test_two_runs_write_the_same_bytes(swept: tuple[str, Path]) -> None:
    _, folder = swept
    files = [quantized(folder, f"run-{number}", propagate="auto")[0] / "model.safetensors" for number in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("method", ["mxfp4", "nvfp4"])
def test_blocks_of_floats_are_rounded_in_the_walk(tmp_path: Path, method: str) -> None:
    """The walk gives them what it gives codes: a target, and the Gram of what really arrives."""
    (tmp_path / "model").mkdir()
    make("llama", tmp_path / "model")
    (tmp_path / "reads").mkdir()
    Reads(samples=SAMPLES, length=LENGTH).run(source_of(tmp_path), tmp_path / "reads", Context())
    (tmp_path / "grams").mkdir()
    Sweep(samples=SAMPLES, length=LENGTH).run(source_of(tmp_path), tmp_path / "grams", Context())
    ids = torch.from_numpy(calibration_ids(tmp_path / "model", "builtin", SAMPLES, LENGTH)).long()
    lost = {}
    with torch.no_grad():
        wanted = loaded(tmp_path / "model").eval()(input_ids=ids, use_cache=False).logits
        for propagate, read in (("off", "grams"), ("auto", "reads")):
            (out := tmp_path / propagate).mkdir()
            step = open_step("quantize", {"method": method, "propagate": propagate})
            facts = step.run(source_of(tmp_path), out, Context(grams=tmp_path / read))
            found = whole.load(out, torch.float32).eval()(input_ids=ids, use_cache=False).logits
            lost[propagate] = float((found - wanted).square().mean() / wanted.var())
    assert facts["propagation"]["alpha"] > 0
    assert lost["auto"] < lost["off"]
