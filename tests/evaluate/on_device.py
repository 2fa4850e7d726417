"""The torch runtime on a device that refuses to meet tensors of the processor: the same figures as without it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lighten.evaluate import device_rows, perplexity, rows
from lighten.evaluate.runtimes import Question, open_tokenizer
from lighten.evaluate.runtimes import torch as torch_runtime
from lighten.evaluate.runtimes.torch import TorchRuntime
from lighten.evaluate.settings import Perplexity
from lighten.stage import silent
from tests import pretend


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setitem(torch_runtime.BATCH_TOKENS, pretend.NAME, 512)
    with pretend.device() as name:
        yield name


def test_rows_on_a_device_are_those_of_numpy(there: str) -> None:
    random = np.random.default_rng(0)
    ours, theirs = (random.normal(size=(40, 300)).astype(np.float32) * 3 for _ in range(2))
    targets, at = random.integers(0, 300, 60), random.integers(0, 40, 60)
    logprobs, top = device_rows.token_logprobs(torch.from_numpy(ours).to(there), targets, at)
    expected, expected_top = rows.token_logprobs(ours, targets, at)
    assert np.allclose(logprobs, expected, atol=1e-5) and (top == expected_top).all()
    kl, same = device_rows.divergence(torch.from_numpy(ours).to(there), torch.from_numpy(theirs[:, :290]).to(there))
    expected_kl, expected_same = rows.divergence(ours, theirs[:, :290])
    assert np.allclose(kl, expected_kl, rtol=1e-4) and (same == expected_same).all()


@pytest.mark.parametrize("together", [1, 3])
def test_perplexity_and_divergence(
    together: int, tiny: Callable[..., Path], there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = tiny("llama"), tiny("llama", "gpt-2", torch.bfloat16)
    settings = Perplexity(length=64, samples=5)
    monkeypatch.setattr(device_rows, "batch_of", lambda length, vocab: together)
    found = {}
    for device in ("cpu", there):
        folder = tmp_path / device
        folder.mkdir()
        runtime = TorchRuntime(base, device, None, arithmetic="float32")
        before = pretend.COUNTS["operations"]
        measured = perplexity.measure(runtime, open_tokenizer(base), settings, silent, hidden_of=base)
        assert (pretend.COUNTS["operations"] > before) == (device == there)
        assert measured.hidden is not None
        perplexity_file(folder, measured)
        second = TorchRuntime(other, device, None, arithmetic="float32")
        against = perplexity.measure(second, open_tokenizer(base), settings, silent, reference=(folder, base))
        found[device] = measured.values | against.values | {"hidden": measured.hidden}
    for name, values in found["cpu"].items():
        assert np.allclose(values, found[there][name], rtol=1e-3, atol=1e-5), name
    assert found["cpu"]["kl"].max() > 0


def perplexity_file(folder: Path, measured: perplexity.Measured) -> None:
    """Leaves a measurement as `lighten.evaluate.run` does."""
    from safetensors.numpy import save_file

    from lighten.store import write_json

    assert measured.hidden is not None
    write_json(folder / perplexity.RESULT, measured.result)
    save_file({"hidden": measured.hidden}, folder / perplexity.HIDDEN)


def test_questions_and_decoding(tiny: Callable[..., Path], there: str) -> None:
    model = tiny("llama")
    questions = [Question([1, 2, 3, 4], [[5, 6], [7]]), Question([9, 8], [[1, 2, 3], [4]])]
    scores, written = [], []
    for device in ("cpu", there):
        runtime = TorchRuntime(model, device, None, arithmetic="float32")
        scores.append(runtime.choose_many(questions, silent))
        written.append(runtime.generate(np.array([[1, 2, 3]]), 4).ids)
    for ours, theirs in zip(*scores, strict=True):
        assert np.allclose([each.logprob for each in ours], [each.logprob for each in theirs], atol=1e-4)
        assert [each.greedy for each in ours] == [each.greedy for each in theirs]
    assert np.array_equal(written[0], written[1])
