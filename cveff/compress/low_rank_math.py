"""Low-rank factors of linear and convolution weights, and the output error that each rank leaves.

Linear layers: Eckart–Young on W C^½ rather than on W (Chen et al., "DRONE", NeurIPS 2021; Wang et al., "SVD-LLM",
ICLR 2025), where C is the covariance of the layer's inputs. Convolutions: one kernel of fewer channels and a 1×1
(Zhang et al., TPAMI 2016), a column and a row (Jaderberg et al., BMVC 2014), and Tucker-2 (Kim et al., ICLR 2016).

Every weight here is a kernel (out, in, height, width); that of a linear layer is (out, in, 1, 1). `covariance` is
(n, n) with n = in · height · width, of the centred patches that a kernel sees, flattened in the kernel's own order;
None stands for the identity, which makes every method the plain, data-free one. Work is done in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 1e-3
"""Share of the mean variance added to every input's own: directions that no calibration image shows still count."""

_RIDGE = 1e-9
"""Relative ridge of the last factor's least squares, for columns that carry nothing."""


def output_basis(matrix: Tensor, covariance: Tensor | None = None, damping: float = DAMPING) -> Tensor:
    """Orthonormal directions of `matrix @ x`, by falling variance.

    Keeping the first k of them, `U_k U_kᵀ W`, minimises E‖Wx − W'x‖² over all W' of rank k: it is the truncated SVD
    of W C^½ without that root, so a singular C does no harm.

    Args:
        matrix: (m, n).
        covariance: (n, n) of x; None: the identity.
        damping: see `DAMPING`.

    Returns:
        (m, min(m, n)) float64.
    """
    matrix = matrix.double()
    rows, columns = matrix.shape
    lift = None
    if rows > columns:
        lift, matrix = torch.linalg.qr(matrix)
    gram = matrix @ matrix.T
    if covariance is not None:
        weighted = matrix @ covariance.double() @ matrix.T
        gram = weighted + damping * _mean_variance(covariance) * gram
    vectors: Tensor = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors.flip(1)
    return vectors if lift is None else lift @ vectors


def dropped_energy(matrix: Tensor, basis: Tensor, covariance: Tensor | None = None) -> Tensor:
    """Relative output error of every rank at once: E‖Wx − U_k U_kᵀ W x‖² / E‖Wx‖² for centred x.

    The factors are a projection of the outputs, so the error is the variance of the directions left out, whatever
    the basis was made from.

    Returns:
        (columns of `basis` + 1,) float64; entry k is the error of rank k, entry 0 is 1.
    """
    matrix = matrix.double()
    projected = basis.T @ matrix
    total = _energy(matrix, covariance).sum()
    kept = _energy(projected, covariance).cumsum(0)
    if total <= 0:
        return torch.zeros(len(kept) + 1, dtype=torch.float64, device=matrix.device)
    return torch.cat([total.new_ones(1), (1 - kept / total).clamp_min(0)])


def relative_error(weight: Tensor, approximation: Tensor, covariance: Tensor | None = None) -> float:
    """E‖(W − W') x‖² / E‖W x‖² for centred patches x; both weights (out, in, height, width)."""
    total = float(_energy(weight.flatten(1).double(), covariance).sum())
    error = float(_energy((weight.double() - approximation.double()).flatten(1), covariance).sum())
    return max(error, 0.0) / total if total > 0 else 0.0


def svd_factors(weight: Tensor, basis: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors of the rank-`rank` projection onto `basis`.

    Returns:
        kernels (rank, in, height, width) and (out, rank, 1, 1): first the kernel's own size, then a 1×1.
    """
    first, last = _balanced(basis[:, :rank], weight.flatten(1).double())
    return first.reshape(rank, *weight.shape[1:]), last[:, :, None, None]


def spatial_factors(
    weight: Tensor,
    rank: int,
    order: str,
    covariance: Tensor | None = None,
    damping: float = DAMPING,
    basis: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A kernel as a column and a row: "vertical" applies (height × 1) first, "horizontal" (1 × width).

    The first factor comes from the SVD of the (out · width) × (in · height) unfolding, whitened by the covariance of
    one column; the last is then the least-squares answer to it under the whole covariance.

    Args:
        basis: `spatial_basis` of the same arguments, where several ranks are asked.

    Returns:
        kernels (rank, in, height, 1) and (out, rank, 1, width), or with the sides exchanged.
    """
    if order == "horizontal":
        turned = None if covariance is None else _turn(covariance, weight)
        first, last = spatial_factors(weight.transpose(2, 3), rank, "vertical", turned, damping, basis)
        return first.transpose(2, 3), last.transpose(2, 3)
    out, channels, height, width = weight.shape
    if basis is None:
        basis = spatial_basis(weight, "vertical", covariance, damping)
    first, last = _balanced(basis[:, :rank], _unfold(weight))
    last = last.reshape(out, width, rank)
    if covariance is not None:
        last = _refit(weight, first, last, covariance)
    return first.reshape(rank, channels, height, 1), last.permute(0, 2, 1)[:, :, None, :]


def spatial_basis(
    weight: Tensor, order: str, covariance: Tensor | None = None, damping: float = DAMPING
) -> Tensor:
    """What `spatial_factors` of every rank share: (out · width, rank) float64."""
    if order == "horizontal":
        turned = None if covariance is None else _turn(covariance, weight)
        return spatial_basis(weight.transpose(2, 3), "vertical", turned, damping)
    column = None
    if covariance is not None:
        _, channels, height, width = weight.shape
        blocks = covariance.double().reshape(channels, height, width, channels, height, width)
        column = torch.einsum("cyxdzx->cydz", blocks).reshape(channels * height, -1) / width
    return output_basis(_unfold(weight), column, damping)


def tucker_factors(
    weight: Tensor,
    ranks: tuple[int, int],
    covariance: Tensor | None = None,
    damping: float = DAMPING,
    iterations: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tucker-2: 1×1, a kernel between fewer channels, 1×1. HOSVD, then `iterations` rounds of HOOI.

    Input channels are whitened by their covariance, averaged over the kernel's positions.

    Args:
        ranks: (input, output) channels of the core.

    Returns:
        kernels (input rank, in, 1, 1), (output rank, input rank, height, width), (out, output rank, 1, 1).
    """
    weight = weight.double()
    channels, area = weight.shape[1], weight.shape[2] * weight.shape[3]
    root = torch.eye(channels, dtype=torch.float64, device=weight.device)
    variance = 0.0 if covariance is None else _mean_variance(covariance)
    if covariance is not None and variance > 0:
        blocks = covariance.double().reshape(channels, area, channels, area)
        mean = torch.einsum("cpdp->cd", blocks) / area
        # A root is needed here, so the damping also has to make it invertible.
        root = torch.linalg.cholesky(mean + max(damping, _RIDGE) * variance * root)
    whitened = torch.einsum("ocyx,cd->odyx", weight, root)
    left, right = _leading(whitened, ranks[1]), _leading(whitened.transpose(0, 1), ranks[0])
    for _ in range(iterations):
        left = _leading(torch.einsum("ocyx,cr->oryx", whitened, right), ranks[1])
        right = _leading(torch.einsum("ocyx,or->cryx", whitened, left), ranks[0])
    core = torch.einsum("or,ocyx,cs->rsyx", left, whitened, right)
    first = torch.linalg.solve_triangular(root, right.T.contiguous(), upper=False, left=False)
    return first[:, :, None, None], core, left[:, :, None, None]


def compose(factors: tuple[Tensor, ...]) -> Tensor:
    """The one kernel (out, in, height, width) that a chain of `factors` computes, first applied first.

    Each side of the kernel may be longer than 1 in one factor only.
    """
    whole = factors[0].double()
    for factor in factors[1:]:
        product = torch.einsum("orab,rcde->ocadbe", factor.double(), whole)
        out, channels, a, d, b, e = product.shape
        whole = product.reshape(out, channels, a * d, b * e)
    return whole


def corrected_bias(weight: Tensor, approximation: Tensor, bias: Tensor | None, mean: Tensor | None) -> Tensor:
    """The bias (out,) with which the approximation's mean output is the layer's: b + (W − W') μ.

    Args:
        mean: (in · height · width,) of the patches; None leaves the bias as it is.
    """
    known = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    if bias is not None:
        known = known + bias.double()
    if mean is None:
        return known
    return known + (weight.double() - approximation.double()).flatten(1) @ mean.double()


def _mean_variance(covariance: Tensor) -> float:
    return float(covariance.diagonal().double().mean())


def _energy(rows: Tensor, covariance: Tensor | None) -> Tensor:
    """(rows,) variance of each row's output."""
    weighted = rows if covariance is None else rows @ covariance.double()
    return (weighted * rows).sum(1)


def _balanced(left: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`left leftᵀ matrix` as (right, left) of equal norms, √S Vᵀ and U √S: neither overflows a narrow type."""
    inner, values, right = torch.linalg.svd(left.T @ matrix, full_matrices=False)
    root = values.sqrt()
    return root[:, None] * right, (left @ inner) * root


def _unfold(weight: Tensor) -> Tensor:
    """(out, in, height, width) -> (out · width, in · height) float64."""
    out, channels, height, width = weight.shape
    return weight.double().permute(0, 3, 1, 2).reshape(out * width, channels * height)


def _turn(covariance: Tensor, weight: Tensor) -> Tensor:
    """The covariance of patches whose rows and columns are exchanged."""
    _, channels, height, width = weight.shape
    blocks = covariance.reshape(channels, height, width, channels, height, width)
    return blocks.permute(0, 2, 1, 3, 5, 4).reshape(covariance.shape)


def _leading(tensor: Tensor, rank: int) -> Tensor:
    """The first `rank` left singular vectors of the unfolding along the first axis."""
    matrix = tensor.flatten(1)
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T).eigenvectors
    return vectors.flip(1)[:, :rank]


def _refit(weight: Tensor, first: Tensor, last: Tensor, covariance: Tensor) -> Tensor:
    """The row factor that best explains the layer's output given the column factor; never worse than `last`.

    first: (rank, in · height); last: (out, width, rank).
    """
    out, channels, height, width = weight.shape
    rank, side = len(first), channels * height
    blocks = covariance.double().reshape(channels, height, width, channels, height, width)
    blocks = blocks.permute(2, 5, 0, 1, 3, 4).reshape(width, width, side, side)
    kernel = weight.double().permute(3, 0, 1, 2).reshape(width, out, side)
    known = torch.einsum("xwab,kb->xwak", blocks, first)  # (width, width, side, rank)
    gram = torch.einsum("ka,xwal->xkwl", first, known).reshape(width * rank, width * rank)
    wanted = torch.einsum("xoa,xwak->owk", kernel, known).reshape(out, width * rank)
    start = last.reshape(out, width * rank)
    # A ridge around the truncated factor: it only ever moves towards less error.
    scale = gram.diagonal().mean()
    if scale <= 0:
        return last
    ridge = _RIDGE * scale * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    inverse = 1 / (values.clamp_min(0) + ridge[0, 0])
    step = ((wanted - start @ gram) @ vectors * inverse) @ vectors.T
    return (start + step).reshape(out, width, rank)
