"""What a student's error against its teacher is; each loss is summed over the images, as `Objective.loss` wants.

Everywhere `student` and `teacher` are logits (N, classes) float32, and the teacher's carry no gradient.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T² Σ KL(softmax(teacher / T) ‖ softmax(student / T))` (Hinton et al., arXiv:1503.02531, section 2)."""
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="sum",
        log_target=True,
    )
    return temperature**2 * divergence


def hard_targets(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the teacher's class as the label (DeiT: Touvron et al., arXiv:2012.12877, section 4)."""
    return F.cross_entropy(student, teacher.argmax(dim=1), reduction="sum")


def relations(student: Tensor, teacher: Tensor, temperature: float, beta: float, gamma: float) -> Tensor:
    """DIST: `N T² (β · inter + γ · intra)` (Huang et al., arXiv:2205.10536, equations 6 to 8).

    inter is 1 minus Pearson's correlation of an image's class probabilities, averaged over images; intra of a class's
    probabilities over the images, averaged over classes. A correlation of constants counts as 0.
    """
    own, other = (F.softmax(logits / temperature, dim=1) for logits in (student, teacher))
    inter = 1 - _pearson(own, other, dim=1).mean()
    intra = 1 - _pearson(own, other, dim=0).mean()
    return len(student) * temperature**2 * (beta * inter + gamma * intra)


def feature_error(student: Tensor, teacher: Tensor) -> Tensor:
    """`N ‖student - teacher‖² / ‖teacher‖²` of two features (N, positions, channels).

    FitNets' hint loss (Romero et al., arXiv:1412.6550, equation 3), relative, so that layers weigh alike.
    """
    scale = teacher.square().sum().clamp_min(1e-12)
    return len(student) * (student - teacher).square().sum() / scale


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    # cosine_similarity has a gradient at zero, which a quotient of square roots has not.
    return F.cosine_similarity(
        a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True), dim=dim, eps=1e-8
    )
