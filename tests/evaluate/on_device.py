"""The torch runtime on a device that refuses to meet tensors of the processor: the same figures as without it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lighten.evaluate.perplexity import chunks
from lighten.evaluate.perplexity.settings import Perplexity
from lighten.evaluate.runtimes import device_rows, rows, torch_loading
from lighten.evaluate.runtimes.choose import open_tokenizer
from lighten.evaluate.runtimes.runtime import Question
from lighten.evaluate.runtimes.torch import TorchRuntime
from lighten.model import accelerator
from lighten.pipeline.steps import open_step
from lighten.step import Context, silent
from lighten.store.artifact import Artifact
from tests import pretend

APART = {"nll": 5e-5, "kl": 2e-6, "top1": 0, "hidden": 5e-5}
"""What float32 rounds otherwise in oneDNN's products, which the processor takes here; four times what was seen."""


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setitem(torch_loading.BATCH_TOKENS, pretend.NAME, 512)
    with pretend.device() as name:
        yield name


def test_rows_on_a_device_are_those_of_numpy(there: str) -> None:
    random = np.random.default_rng(0)
    ours, theirs = (random.normal(size=(40, 300)).astype(np.float32) * 3 for _ in range(2))
    targets, at = random.integers(0, 300, 60), random.integers(0, 40, 60)
    logprobs, top = device_rows.token_logprobs(torch.from_numpy(ours).to(there), targets, at)
    expected, expected_top = rows.token_logprobs(ours, targets, at)
    assert np.allclose(logprobs, expected, rtol=1e-6) and (top == expected_top).all()
    kl, same = device_rows.divergence(torch.from_numpy(ours).to(there), torch.from_numpy(theirs[:, :290]).to(there))
    expected_kl, expected_same = rows.divergence(ours, theirs[:, :290])
    assert np.allclose(kl, expected_kl, rtol=1e-6) and (same == expected_same).all()


@pytest.mark.parametrize("together", [1, 3])
def test_perplexity_and_divergence(
    together: int, tiny: Callable[..., Path], there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = tiny("llama"), tiny("llama", "gpt-2", torch.bfloat16)
    settings = Perplexity(length=64, samples=5)
    monkeypatch.setattr(device_rows, "batch_of", lambda length, vocab: together)
    batches: list[int] = []
    whole = TorchRuntime.device_logits

    def counted(self: TorchRuntime, ids: Any) -> torch.Tensor:
        batches.append(len(ids))
        return whole(self, ids)

    monkeypatch.setattr(TorchRuntime, "device_logits", counted)
    found = {}
    for device in ("cpu", there):
        folder = tmp_path / device
        folder.mkdir()
        runtime = TorchRuntime(base, device, None, arithmetic="float32")
        before = pretend.COUNTS["operations"]
        measured = chunks.measure(runtime, open_tokenizer(base), settings, silent, hidden_of=base)
        assert (pretend.COUNTS["operations"] > before) == (device == there)
        assert measured.hidden is not None
        perplexity_file(folder, measured)
        second = TorchRuntime(other, device, None, arithmetic="float32")
        batches.clear()
        moved = pretend.COUNTS["from"]
        against = chunks.measure(second, open_tokenizer(base), settings, silent, reference=(folder, base))
        assert batches == ([1] * 5 if device == "cpu" or together == 1 else [3, 2])
        # what entered the head travels, a quarter of the logits; those stay
        assert pretend.COUNTS["from"] - moved < 5 * 64 * 4 * second.vocab / 2
        found[device] = measured.values | against.values | {"hidden": measured.hidden}
    for name, values in found["cpu"].items():
        assert np.allclose(values, found[there][name], rtol=0, atol=APART[name]), name
    assert found["cpu"]["kl"].max() > 0


def perplexity_file(folder: Path, measured: chunks.Measured) -> None:
    """Leaves a measurement as `lighten.evaluate.run` does."""
    from safetensors.numpy import save_file

    from lighten.store.store import write_json

    assert measured.hidden is not None
    write_json(folder / chunks.RESULT, measured.result.contents())
    save_file({"hidden": measured.hidden}, folder / chunks.HIDDEN)


def test_questions_and_decoding(tiny: Callable[..., Path], there: str) -> None:
    model = tiny("llama")
    questions = [Question([1, 2, 3, 4], [[5, 6], [7]]), Question([9, 8], [[1, 2, 3], [4]])]
    scores, written = [], []
    for device in ("cpu", there):
        runtime = TorchRuntime(model, device, None, arithmetic="float32")
        moved = pretend.COUNTS["from"]
        scores.append(runtime.choose_many(questions, silent))
        assert pretend.COUNTS["from"] - moved < 4 * runtime.vocab  # less than the logits of one place
        written.append(runtime.generate(np.array([[1, 2, 3]]), 4).ids)
    for ours, theirs in zip(*scores, strict=True):
        assert np.allclose([each.logprob for each in ours], [each.logprob for each in theirs], rtol=0, atol=2e-5)
        assert [each.greedy for each in ours] == [each.greedy for each in theirs]
    assert np.array_equal(written[0], written[1])


def test_as_many_texts_at_once_as_the_logits_leave_room_for() -> None:
    assert device_rows.batch_of(512, 128_256) == 7  # 512 · 7 · 128,256 · 4 bytes are 1.8 GB
    assert device_rows.batch_of(512, 1000) == device_rows.MOST_TOKENS // 512
    assert device_rows.batch_of(100_000, 128_256) == 1


@pytest.mark.parametrize(("free", "expected"), [(10**9, torch.float32), (10**6, torch.bfloat16)])
def test_quality_is_measured_in_float32_where_the_model_fits(
    free: int, expected: torch.dtype, tiny: Callable[..., Path], there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "free_bytes", lambda device: free)
    runtime = TorchRuntime(tiny("llama"), there, None)
    assert {weight.dtype for weight in runtime.model.parameters()} == {expected}
    assert {weight.device.type for weight in runtime.model.parameters()} == {there}
    assert runtime.dtype == str(expected).removeprefix("torch.")


def test_the_peak_is_counted_from_where_the_model_is_loaded(
    tiny: Callable[..., Path], there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading takes more than running; and times are of what was done, not of what was asked for."""
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(accelerator, "reset_peak", lambda device: asked.append((device, pretend.COUNTS["to"])))
    runtime = TorchRuntime(tiny("llama"), there, "float32")
    weights = sum(weight.numel() * 4 for weight in runtime.model.parameters())
    ((device, moved),) = asked
    assert device == there and moved >= weights
    waited: list[str] = []
    monkeypatch.setattr(accelerator, "synchronize", waited.append)
    runtime.generate(np.array([[1, 2, 3]]), 4)
    assert waited == [there] * 5


@pytest.mark.parametrize("dtype", ["float32", None])
def test_a_quantized_model_is_loaded_onto_the_device(
    dtype: str | None, tiny: Callable[..., Path], there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels are chosen where its weights arrive; to measure quality it is unpacked first, and moved after."""
    asked: list[dict[str, Any]] = []
    plain = torch_loading.from_pretrained

    def watched(kind: Any, path: Path, **options: Any) -> Any:
        asked.append(options)
        return plain(kind, path, **options)

    monkeypatch.setattr(torch_loading, "from_pretrained", watched)
    source = Artifact(tiny("llama"), {"key": "x", "format": "hf"})
    open_step("quantize", {"method": "int8-dynamic"}).run(source, tmp_path, Context())
    logits = [
        TorchRuntime(tmp_path, device, dtype, arithmetic="float32").logits(np.arange(1, 9)) for device in ("cpu", there)
    ]
    assert [options.get("device_map") for options in asked] == [None, {"": there} if dtype else None]
    assert np.allclose(logits[0], logits[1], rtol=0, atol=APART["nll"])
