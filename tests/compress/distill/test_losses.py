"""The distillation loss against formulas written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lighten.compress.distill import losses

VOCAB, POSITIONS, HIDDEN = 50, 70, 12


def written_out(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, alpha: float, temperature: float
) -> tuple[float, float, float]:
    """Returns loss, KL and CE as sums over positions, in double precision and one position at a time."""
    kl = ce = 0.0
    for s, t, label in zip(student.double(), teacher.double(), labels.tolist(), strict=True):
        p = [math.exp(v / temperature) for v in t.tolist()]
        q = [math.exp(v / temperature) for v in s.tolist()]
        kl += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
        ce -= math.log(math.exp(s[label]) / sum(math.exp(v) for v in s.tolist()))
    return alpha * temperature**2 * kl + (1 - alpha) * ce, kl, ce


class Whole:
    def __init__(self, logits: torch.Tensor, temperature: float) -> None:
        self.log_probs = torch.log_softmax(logits / temperature, -1)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self.log_probs[rows]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("rows", [16, 512])
def test_the_loss_is_the_formula_and_its_gradient_is_that_of_autograd(
    monkeypatch: pytest.MonkeyPatch, temperature: float, alpha: float, rows: int
) -> None:
    monkeypatch.setattr(losses, "ROWS", rows)  # so that one chunk and several give the same
    torch.manual_seed(0)
    hidden, head = torch.randn(POSITIONS, HIDDEN), torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    teacher, labels = torch.randn(POSITIONS, VOCAB) * 2, torch.randint(0, VOCAB, (POSITIONS,))
    gradient, sums = losses.head_loss(
        hidden, head, labels, Whole(teacher, temperature), alpha=alpha, temperature=temperature, scale=0.5
    )
    loss, kl, ce = written_out(head(hidden).detach(), teacher, labels, alpha, temperature)
    assert (sums.kl, sums.ce, sums.positions) == (pytest.approx(kl, rel=1e-4), pytest.approx(ce, rel=1e-4), POSITIONS)
    own_head = head.weight.grad
    head.weight.grad = None
    leaf = hidden.clone().requires_grad_()
    logits = head(leaf)
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    soft = torch.nn.functional.kl_div(
        torch.log_softmax(logits / temperature, -1), torch.softmax(teacher / temperature, -1), reduction="sum"
    )
    whole = alpha * temperature**2 * soft + (1 - alpha) * plain
    assert float(whole.detach()) == pytest.approx(loss, rel=1e-4)
    (0.5 * whole).backward()
    assert torch.allclose(gradient, leaf.grad, rtol=1e-3, atol=1e-5)
    assert torch.allclose(own_head, head.weight.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("count", [1, 8, VOCAB - 1])
def test_a_teacher_known_in_part_gives_the_gradient_of_its_divergence(count: int, temperature: float) -> None:
    torch.manual_seed(3)
    hidden, head = torch.randn(POSITIONS, HIDDEN), torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    labels = torch.randint(0, VOCAB, (POSITIONS,))
    known = losses.top(torch.randn(POSITIONS, VOCAB) * 2, count, temperature)
    gradient, sums = losses.head_loss(
        hidden, head, labels, known, alpha=0.7, temperature=temperature, scale=1.0, dtype=torch.float32
    )
    own_head = head.weight.grad
    head.weight.grad = None
    leaf = hidden.clone().requires_grad_()
    logits = head(leaf)
    kl = losses.top_divergence(torch.log_softmax(logits / temperature, -1), known).sum()
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (0.7 * temperature**2 * kl + 0.3 * ce).backward()
    assert (sums.kl, sums.ce) == (
        pytest.approx(float(kl.detach()), rel=1e-4),
        pytest.approx(float(ce.detach()), rel=1e-4),
    )
    assert torch.allclose(gradient, leaf.grad, rtol=1e-3, atol=1e-4)
    assert torch.allclose(own_head, head.weight.grad, rtol=1e-3, atol=1e-3)


def test_without_a_teacher_it_is_the_next_token_alone() -> None:
    torch.manual_seed(1)
    hidden, head = torch.randn(POSITIONS, HIDDEN), torch.nn.Linear(HIDDEN, VOCAB, bias=False)
    labels = torch.randint(0, VOCAB, (POSITIONS,))
    gradient, sums = losses.head_loss(hidden, head, labels, None, alpha=0.9, temperature=2.0, scale=1.0)
    leaf = hidden.clone().requires_grad_()
    whole = torch.nn.functional.cross_entropy(head(leaf), labels, reduction="sum")
    whole.backward()
    assert sums.kl == 0 and sums.ce == pytest.approx(float(whole.detach()), rel=1e-5)
    assert torch.allclose(gradient, leaf.grad, rtol=1e-4, atol=1e-6)


@given(st.integers(1, VOCAB - 1), st.floats(0.5, 4.0), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_what_is_known_in_part_never_says_more_than_the_whole(count: int, temperature: float, seed: int) -> None:
    """Lumping outcomes together cannot raise a divergence, and the mass adds up to one."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (torch.randn(8, VOCAB, generator=generator) * 2 for _ in range(2))
    known = losses.top(teacher, count, temperature)
    assert torch.allclose(known.log_probs.exp().sum(-1) + known.rest.exp(), torch.ones(8), atol=1e-5)
    q = torch.log_softmax(student / temperature, -1)
    part = losses.top_divergence(q, known)
    whole = losses.divergence(q, torch.log_softmax(teacher / temperature, -1))
    assert (part <= whole + 1e-4).all() and (part >= -1e-5).all()


def test_all_tokens_but_one_known_is_the_whole() -> None:
    torch.manual_seed(2)
    teacher, student = torch.randn(8, VOCAB), torch.randn(8, VOCAB)
    q = torch.log_softmax(student, -1)
    part = losses.top_divergence(q, losses.top(teacher, VOCAB - 1, 1.0))
    assert torch.allclose(part, losses.divergence(q, torch.log_softmax(teacher, -1)), atol=1e-4)


def test_a_student_equal_to_its_teacher_has_no_divergence() -> None:
    logits = torch.randn(8, VOCAB)
    part = losses.top_divergence(torch.log_softmax(logits, -1), losses.top(logits, 5, 1.0))
    assert torch.allclose(part, torch.zeros(8), atol=1e-5)


def test_a_teacher_that_is_certain_leaves_everything_finite() -> None:
    logits = torch.full((4, VOCAB), -200.0)
    logits[:, 3] = 200.0
    student = torch.randn(4, VOCAB, requires_grad=True)
    found = losses.top_divergence(torch.log_softmax(student, -1), losses.top(logits, 4, 1.0))
    found.sum().backward()
    assert found.isfinite().all() and student.grad is not None and student.grad.isfinite().all()


def test_hidden_distance_is_in_units_of_the_teachers_variance() -> None:
    teacher = torch.randn(3, 20, 16) * 7
    identity = torch.nn.Identity()
    assert float(losses.hidden_distance(teacher, teacher, identity)) == 0
    assert float(losses.hidden_distance(torch.zeros_like(teacher), teacher, identity)) == pytest.approx(1.0, rel=0.05)
