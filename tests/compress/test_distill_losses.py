"""Formulas against numbers worked out by hand, and the law all share: a student that equals its teacher is done."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from cveff.compress.distill_losses import feature_error, hard_targets, relations, soft_targets

LN3 = math.log(3)


def test_soft_targets_by_hand() -> None:
    # At T = 2 the teacher's probabilities are (3/4, 1/4) and the student's (1/2, 1/2).
    student, teacher = torch.tensor([[5.0, 5.0]]), torch.tensor([[2 * LN3, 0.0]])
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    torch.testing.assert_close(soft_targets(student, teacher, 2.0), torch.tensor(4 * divergence))


def test_soft_targets_have_a_gradient_that_does_not_shrink_with_temperature() -> None:
    # T² · (p_student - p_teacher) / T with p ≈ 1/2 + z / 4T: the difference of logits over four, for any large T.
    for temperature in (50.0, 200.0):
        student = torch.zeros(1, 2, requires_grad=True)
        soft_targets(student, torch.tensor([[1.0, -1.0]]), temperature).backward()
        torch.testing.assert_close(student.grad, torch.tensor([[-0.5, 0.5]]), rtol=1e-3, atol=1e-4)


def test_hard_targets_by_hand() -> None:
    student, teacher = torch.tensor([[LN3, 0.0], [0.0, LN3]]), torch.tensor([[1.0, 0.0], [9.0, 2.0]])
    # -log 3/4 for the image both give to class 0, -log 1/4 for the other.
    expected = -math.log(0.75) - math.log(0.25)
    torch.testing.assert_close(hard_targets(student, teacher), torch.tensor(expected))


def test_relations_by_hand() -> None:
    # Probabilities (3/4, 1/4) and (1/4, 3/4) against the same the other way round: every correlation is -1.
    student, teacher = torch.tensor([[LN3, 0.0], [0.0, LN3]]), torch.tensor([[0.0, LN3], [LN3, 0.0]])
    # N T² (β · 2 + γ · 2)
    torch.testing.assert_close(relations(student, teacher, 1.0, 1.0, 1.0), torch.tensor(2 * 4.0))
    torch.testing.assert_close(relations(student, teacher, 1.0, 3.0, 0.5), torch.tensor(2 * 7.0))


def test_relations_are_pearson_correlations() -> None:
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(6, 4, generator=random), torch.randn(6, 4, generator=random)
    own, other = F.softmax(student / 4, 1), F.softmax(teacher / 4, 1)

    def correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        rows = zip(a, b, strict=True)
        return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in rows]).mean()

    inter, intra = 1 - correlation(own, other), 1 - correlation(own.T, other.T)
    expected = 6 * 16 * (inter + intra)
    torch.testing.assert_close(relations(student, teacher, 4.0, 1.0, 1.0), expected, rtol=1e-4, atol=1e-4)


def test_relations_of_constants_have_a_finite_gradient() -> None:
    student = torch.zeros(3, 4, requires_grad=True)
    relations(student, torch.randn(3, 4), 4.0, 1.0, 1.0).backward()
    assert torch.isfinite(student.grad).all()


def test_feature_error_by_hand() -> None:
    teacher = torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]]])  # squares sum to 25
    student = teacher + torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])  # 5 off
    torch.testing.assert_close(feature_error(student, teacher), torch.tensor(2 * 5 / 25))


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b: soft_targets(a, b, 4.0),
        lambda a, b: relations(a, b, 4.0, 1.0, 1.0),
        lambda a, b: feature_error(a[:, None], b[:, None]),
    ],
    ids=["soft", "relations", "features"],
)
def test_a_student_that_equals_its_teacher_has_no_loss_and_another_has(loss) -> None:
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    assert float(loss(logits, logits)) == pytest.approx(0, abs=1e-4)
    assert float(loss(logits, logits.flip(1))) > 0.1
