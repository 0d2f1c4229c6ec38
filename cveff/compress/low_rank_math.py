"""Low-rank factors of linear and convolution weights, and the output error that each rank leaves.

Linear layers: Eckart–Young on W C^½ rather than on W (Chen et al., "DRONE", NeurIPS 2021; Wang et al., "SVD-LLM",
ICLR 2025), where C is the covariance of the layer's inputs. Convolutions: one kernel of fewer channels and a 1×1
(Zhang et al., TPAMI 2016), a column and a row (Jaderberg et al., BMVC 2014), and Tucker-2 (Kim et al., ICLR 2016).

Every weight here is a kernel (out, in, height, width); that of a linear layer is (out, in, 1, 1). `covariance` is
(n, n) with n = in · height · width, of the centred patches that a kernel sees, flattened in the kernel's own order;
None stands for the identity, which makes every method the plain, data-free one. Work is done in float64, but for
products with a float32 covariance.
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 0.3
"""Share of the mean variance added to every input's own: directions that no calibration image shows still count.

On images that the fit has not seen, up to 0.3 costs nothing where the fit saw many (Fashion-MNIST) and helps where it
saw few (crops of nine photographs, EfficientNet-Lite0); 1 costs a little everywhere.
"""

_RIDGE = 1e-6
"""Relative ridge of the last factor's least squares, above the rounding of a float32 covariance."""


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
        weighted = _times(matrix, covariance) @ matrix.T
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
    first, last = _balanced(basis[:, :rank].T @ weight.flatten(1).double(), basis[:, :rank])
    return first.reshape(rank, *weight.shape[1:]), last[:, :, None, None]


class SpatialSplit:
    """A kernel as a column and a row, at any rank: "vertical" applies (height × 1) first, "horizontal" (1 × width).

    The first factor comes from the SVD of the (out · width) × (in · height) unfolding, whitened by the covariance of
    one column; the last is then the least-squares answer to it under the whole covariance. What all ranks share is
    computed once.

    Args:
        largest: the highest rank that will be asked for.
    """

    def __init__(
        self,
        weight: Tensor,
        order: str,
        largest: int,
        covariance: Tensor | None = None,
        damping: float = DAMPING,
    ) -> None:
        self._is_turned = order == "horizontal"
        if self._is_turned:
            covariance = None if covariance is None else _turn(covariance, weight)
            weight = weight.transpose(2, 3)
        self._shape = out, channels, height, width = weight.shape
        side = channels * height
        unfolded = weight.double().permute(0, 3, 1, 2).reshape(out * width, side)
        column, blocks = None, None
        if covariance is not None:
            blocks = covariance.reshape(channels, height, width, channels, height, width)
            blocks = blocks.permute(2, 5, 0, 1, 3, 4).reshape(width, width, side, side)
            column = blocks.diagonal(dim1=0, dim2=1).mean(2)
        basis = output_basis(unfolded, column, damping)[:, :largest]
        self._first = basis.T @ unfolded  # (largest, side)
        self._last = basis.reshape(out, width, -1)
        self._total = float(_energy(weight.flatten(1).double(), covariance).sum())
        self._gram = self._wanted = None
        if blocks is not None:
            kernel = weight.double().permute(3, 0, 1, 2).reshape(width, out, side)
            known = (self._first.to(blocks.dtype) @ blocks).double()  # (width, width, largest, side)
            self._gram = torch.einsum("xwka,la->xkwl", known, self._first)
            self._wanted = torch.einsum("xoa,wxka->owk", kernel, known)

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Kernels (rank, in, height, 1) and (out, rank, 1, width), or with the sides exchanged."""
        _, channels, height, _ = self._shape
        first, last = _balanced(self._first[:rank], self._fitted(rank).permute(0, 2, 1))
        column, row = first.reshape(rank, channels, height, 1), last[:, :, None, :]
        return (column.transpose(2, 3), row.transpose(2, 3)) if self._is_turned else (column, row)

    def error(self, rank: int) -> float:
        """Relative output error, as `relative_error` of the composed factors."""
        if self._total <= 0:
            return 0.0
        last = self._fitted(rank).flatten(1)
        if self._gram is None or self._wanted is None:
            # Without a covariance the factors are a projection.
            return max(1 - float(self._first[:rank].square().sum()) / self._total, 0.0)
        gram, wanted = self._parts(rank)
        return max(1 - float(((2 * wanted - last @ gram) * last).sum()) / self._total, 0.0)

    def _parts(self, rank: int) -> tuple[Tensor, Tensor]:
        assert self._gram is not None and self._wanted is not None
        out, _, _, width = self._shape
        gram = self._gram[:, :rank, :, :rank].reshape(width * rank, width * rank)
        return (gram + gram.T) / 2, self._wanted[:, :, :rank].reshape(out, width * rank)

    def _fitted(self, rank: int) -> Tensor:
        """(out, width, rank): the row that best explains the output given the column, never worse than the SVD's."""
        start = self._last[:, :, :rank]
        if self._gram is None:
            return start
        gram, wanted = self._parts(rank)
        # A ridge around the SVD's factor: it only ever moves towards less error.
        ridge = _RIDGE * gram.norm() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        root, failed = torch.linalg.cholesky_ex(gram + ridge)
        if int(failed) or float(gram.norm()) <= 0:
            return start
        flat = start.flatten(1)
        step = torch.cholesky_solve((wanted - flat @ gram).T, root).T
        return (flat + step).reshape(start.shape)


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
        blocks = covariance.reshape(channels, area, channels, area)
        mean = blocks.diagonal(dim1=1, dim2=3).mean(2).double()
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
    return (_times(rows, covariance) * rows).sum(1)


def _times(rows: Tensor, covariance: Tensor | None) -> Tensor:
    """`rows @ covariance` in the covariance's own type: wide layers bring float32, which is several times faster."""
    return rows if covariance is None else (rows.to(covariance.dtype) @ covariance).double()


def _balanced(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors of each component with the same norm: neither overflows a narrow type.

    first: (rank, …); last: (out, rank, …).
    """
    before = first.flatten(1).norm(dim=1)
    after = last.transpose(0, 1).flatten(1).norm(dim=1)
    scale = torch.where((before > 0) & (after > 0), (after / before).sqrt(), 1.0)
    return (
        first * scale.reshape(-1, *[1] * (first.ndim - 1)),
        last / scale.reshape(-1, *[1] * (last.ndim - 2)),
    )


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
