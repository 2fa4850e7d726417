import numpy as np
import pytest

from lighten.evaluate.runtimes import rows
from tests.evaluate.conftest import log_softmax


@pytest.mark.parametrize(("count", "vocab"), [(1, 2), (37, 1001)])
def test_token_logprobs_are_the_textbook_ones(count: int, vocab: int) -> None:
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(count, vocab)) * 5 + 30).astype(np.float32)
    targets = rng.integers(0, vocab, count)
    logprobs, greedy = rows.token_logprobs(logits, targets)
    assert logprobs == pytest.approx(log_softmax(logits)[np.arange(count), targets], abs=2e-5)
    assert (greedy == (logits.argmax(-1) == targets)).all()


def test_targets_may_share_a_row() -> None:
    logits = np.random.default_rng(1).normal(size=(3, 11)).astype(np.float32)
    at, targets = np.array([2, 0, 2]), np.array([4, 5, 6])
    logprobs, _ = rows.token_logprobs(logits, targets, at)
    assert logprobs == pytest.approx(log_softmax(logits)[at, targets], abs=1e-5)


def test_divergence_is_the_sum_over_the_vocabulary() -> None:
    rng = np.random.default_rng(2)
    reference = (rng.normal(size=(29, 501)) * 4).astype(np.float32)
    variant = (reference + rng.normal(size=reference.shape) * 0.3 + 7).astype(np.float32)
    kl, same = rows.divergence(reference, variant)
    ours, theirs = log_softmax(reference), log_softmax(variant)
    assert kl == pytest.approx((np.exp(ours) * (ours - theirs)).sum(-1), abs=2e-6)
    assert (same == (reference.argmax(-1) == variant.argmax(-1))).all()


def test_divergence_from_itself_is_zero_whatever_the_padding() -> None:
    logits = np.random.default_rng(3).normal(size=(5, 40)).astype(np.float32)
    padded = np.pad(logits, ((0, 0), (0, 8)), constant_values=3)
    kl, same = rows.divergence(logits, padded)
    assert kl == pytest.approx(0, abs=1e-7)
    assert same.all()
