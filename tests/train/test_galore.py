"""GaLore against its reference package, AdamW, SGD and its own formulas."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cveff.errors import CheckpointError, MissingDependencyError, TrainingError
from cveff.train import GaLoreAdamW, GaLoreSGD, state8bit
from cveff.train.state import load_state, save_state

TALL, WIDE, KERNEL = (24, 16), (16, 24), (16, 3, 3, 3)


def problem(shape: tuple[int, ...], seed: int = 0) -> Any:
    """A noisy least-squares loss with a spectrum, of weights seen as a matrix; step -> loss."""
    random = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    target = torch.randn(rows, columns, generator=random)
    inputs = torch.randn(columns, 32, generator=random) * torch.logspace(0, -2, 32)

    def loss(weight: Tensor, step: int) -> Tensor:
        matrix = weight.reshape(rows, -1)
        noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(step))
        return ((matrix - target) @ inputs).square().mean() + 0.01 * (noise * matrix).sum()

    return loss


def run(optimizer: Any, weight: Tensor, loss: Any, steps: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Weights after every step (steps, m, n) and losses (steps,)."""
    weights, losses = [], []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        value = loss(weight, step)
        value.backward()
        optimizer.step()
        weights.append(weight.detach().reshape(weight.shape[0], -1).clone())
        losses.append(value.detach())
    return torch.stack(weights), torch.stack(losses)


def group(weight: nn.Parameter, rank: int | None = 4, **keys: Any) -> list[dict[str, Any]]:
    return [{"params": [weight], "rank": rank, **keys}]


def zeros(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def relative(value: Tensor, expected: Tensor) -> float:
    """The largest relative difference of a step's weights."""
    return float(((value - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max())


@pytest.fixture(scope="module")
def peer() -> Any:
    """galore-torch 1.0."""
    return pytest.importorskip("galore_torch")


@pytest.mark.parametrize(
    "shape, proj_type",
    [
        *(
            (shape, kind)
            for shape in (TALL, WIDE, KERNEL)
            for kind in ("std", "reverse_std", "left", "right")
        ),
        (TALL, "full"),
    ],
    ids=str,
)
def test_trajectory_is_that_of_galore_torch(peer: Any, shape: tuple[int, ...], proj_type: str) -> None:
    keys = {"update_proj_gap": 250, "scale": 0.25, "proj_type": proj_type}
    loss, ours = problem(shape), zeros(shape)
    theirs = zeros((shape[0], ours[0].numel()))  # it takes matrices only
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = peer.GaLoreAdamW(group(theirs, **keys), lr=0.01, weight_decay=0.1)
    optimizer = GaLoreAdamW(group(ours, **keys), lr=0.01, weight_decay=0.1, convention="galore")
    expected, expected_losses = run(reference, theirs, loss, 500)
    weights, losses = run(optimizer, ours, loss, 500)
    assert relative(weights[:250], expected[:250]) <= 1e-5
    assert (losses / expected_losses - 1).abs().max() <= 0.01
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=str)
def test_reverse_std_at_the_short_dimension_is_right_where_the_peer_is_not(
    shape: tuple[int, ...],
) -> None:
    """galore-torch tells the side by the shape of R and errs when R is square; "left" and "right" say it outright."""
    side = "left" if shape[0] >= shape[1] else "right"
    runs = []
    for proj_type in ("reverse_std", side):
        weight = zeros(shape)
        optimizer = GaLoreAdamW(group(weight, 16, proj_type=proj_type), lr=0.01, convention="galore")
        runs.append(run(optimizer, weight, problem(shape), 20)[0])
    assert torch.equal(*runs)


@pytest.mark.parametrize("rank", [None, 16], ids=["no rank", "full rank"])
@pytest.mark.parametrize("shape", [TALL, WIDE, KERNEL], ids=str)
def test_without_projection_it_is_adamw_to_the_bit(shape: tuple[int, ...], rank: int | None) -> None:
    loss, ours, theirs = problem(shape), zeros(shape), zeros(shape)
    weights = run(GaLoreAdamW(group(ours, rank, scale=1.0), lr=0.01), ours, loss, 50)[0]
    assert torch.equal(weights, run(torch.optim.AdamW([theirs], lr=0.01), theirs, loss, 50)[0])


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_at_full_rank_is_torchs(nesterov: bool) -> None:
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov}
    loss, ours, theirs = problem(TALL), zeros(TALL), zeros(TALL)
    weights = run(GaLoreSGD(group(ours, 16), **settings), ours, loss, 30)[0]
    assert torch.equal(weights, run(torch.optim.SGD([theirs], **settings), theirs, loss, 30)[0])
    low = zeros(TALL)
    losses = run(GaLoreSGD(group(low, 4), **settings), low, loss, 30)[1]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [TALL, WIDE, KERNEL], ids=str)
def test_state_is_the_formula_to_the_byte(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = GaLoreAdamW(group(weight, 4))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    optimizer.step()
    short, long = sorted((shape[0], weight[0].numel()))
    # Squares of small gradients vanish in float16.
    size = 4 if dtype == torch.float16 else dtype.itemsize
    tensors = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
    assert sum(value.untyped_storage().nbytes() for value in tensors) == size * (4 * short + 2 * 4 * long)
    assert torch.isfinite(weight).all() and weight.abs().sum() > 0


def test_half_precision_follows_float32() -> None:
    """bfloat16 keeps 8 bits of every number, so a hundredth of the way is lost, not its direction."""
    whole, half = zeros(TALL), nn.Parameter(torch.zeros(TALL, dtype=torch.bfloat16))
    loss = problem(TALL)
    expected = run(GaLoreAdamW(group(whole), lr=0.01), whole, loss, 20)[0][-1]
    found = run(GaLoreAdamW(group(half), lr=0.01), half, lambda w, s: loss(w.float(), s), 20)[0][-1].float()
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99


def test_kernels_do_not_depend_on_the_memory_format() -> None:
    runs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(torch.zeros(KERNEL).to(memory_format=memory_format))
        runs.append(run(GaLoreAdamW(group(weight), lr=0.01), weight, problem(KERNEL), 20)[0])
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"refresh": "lazy", "carry": "rotate"},
        {"residual": True, "projector": "subspace"},
        {"proj_type": "full", "convention": "galore"},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_resuming_from_a_file_is_bit_identical(settings: dict[str, Any], tmp_path: Any) -> None:
    shape, loss = (40, 64), problem((40, 64))
    whole = zeros(shape)
    keys = {"update_proj_gap": 3, **settings}
    expected = run(GaLoreAdamW(group(whole, 8, **keys), lr=0.01), whole, loss, 40)[0]
    weight = zeros(shape)
    optimizer = GaLoreAdamW(group(weight, 8, **keys), lr=0.01)
    run(optimizer, weight, loss, 22)
    save_state(tmp_path / "state", optimizer.state_dict())
    weight = nn.Parameter(weight.detach().clone())
    resumed = GaLoreAdamW(group(weight, 8), lr=1.0)  # everything comes from the file
    resumed.load_state_dict(load_state(tmp_path / "state"))
    assert torch.equal(run(resumed, weight, loss, 18, start=22)[0], expected[22:])


def test_schedulers_reach_the_rate() -> None:
    weight = zeros(TALL)
    optimizer = GaLoreAdamW(group(weight), lr=0.1, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    before, after = (None, None)
    for step in range(2):
        problem(TALL)(weight, step).backward()
        optimizer.step()
        scheduler.step()
        before, after = after, weight.detach().clone()
    assert torch.equal(before, after)


def test_lazy_refreshes_seldom_where_the_subspace_stays() -> None:
    """A constant gradient's subspace stays, so gaps double after five refreshes; a random one's does not."""
    fixed = torch.randn(TALL, generator=torch.Generator().manual_seed(0))
    gaps = []
    for is_fixed in (True, False):
        weight = zeros(TALL)
        optimizer = GaLoreAdamW(group(weight, 2, update_proj_gap=1, refresh="lazy"))
        for step in range(40):
            random = torch.Generator().manual_seed(step)
            weight.grad = fixed.clone() if is_fixed else torch.randn(TALL, generator=random)
            optimizer.step()
        gaps.append(optimizer.state[weight]["gap"])
    assert gaps == [8, 1]


def test_rotated_moments_are_the_old_ones_seen_from_the_new_basis() -> None:
    """With the same subspace nothing is lost: U R is unchanged."""
    weight = zeros(WIDE)
    optimizer = GaLoreAdamW(group(weight, 4, update_proj_gap=1, carry="rotate"), betas=(0.5, 0.999))
    random = torch.Generator().manual_seed(0)
    columns, first, second = (torch.randn(size, generator=random) for size in ((16, 4), (4, 24), (4, 24)))
    average = torch.zeros(WIDE)
    for coefficients in (first, second):  # gradients of one column space, in another basis each
        weight.grad = columns @ coefficients
        average = average.lerp(weight.grad, 0.5)
        optimizer.step()
    state = optimizer.state[weight]
    torch.testing.assert_close(state["left"] @ state["exp_avg"], average, rtol=1e-4, atol=1e-5)
    assert state["exp_avg_sq"].min() >= 0


def test_residual_is_what_the_projection_leaves_out_scaled_by_lane() -> None:
    """Fira's formula, written out for the first step of a wide matrix, and its limit on growth for the second."""
    weight = zeros(WIDE)
    optimizer = GaLoreAdamW(group(weight, 4, scale=0.5, residual=True), lr=1.0, weight_decay=0.0, eps=1e-8)
    gradient = torch.randn(WIDE, generator=torch.Generator().manual_seed(0))
    weight.grad = gradient.clone()
    optimizer.step()
    left = optimizer.state[weight]["left"]
    low = left.t() @ gradient
    direction = low / (low.abs() + 1e-8)  # Adam's first step
    ratio = direction.norm(dim=0) / low.norm(dim=0)
    expected = -0.5 * (left @ direction + (gradient - left @ low) * ratio)
    torch.testing.assert_close(weight.detach(), expected)
    norm = optimizer.state[weight]["residual_norm"].clone()
    outside = gradient - left @ low
    weight.grad = left @ low + 1000 * outside
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["residual_norm"], 1.01 * norm)


def test_residual_grows_from_a_gradient_of_zeros() -> None:
    """The gradient of a layer behind one that begins at zero."""
    weight = zeros(WIDE)
    optimizer = GaLoreAdamW(group(weight, 4, residual=True))
    for gradient in (torch.zeros(WIDE), torch.randn(WIDE, generator=torch.Generator().manual_seed(0))):
        weight.grad = gradient
        optimizer.step()
    assert optimizer.state[weight]["residual_norm"] > 0


def test_8_bits_take_a_quarter_and_follow_the_loss() -> None:
    pytest.importorskip("bitsandbytes")
    shape, loss = (96, 192), problem((96, 192))
    sizes, losses = [], []
    for bits in (32, 8):
        weight = zeros(shape)
        optimizer = GaLoreAdamW(group(weight, 24, update_proj_gap=20, state_bits=bits), lr=0.02)
        losses.append(run(optimizer, weight, loss, 60)[1])
        state = optimizer.state[weight]
        sizes.append(sum(state[name].nbytes for name in state if name.startswith("exp_avg")))
        saved = optimizer.state_dict()
        other = GaLoreAdamW(group(nn.Parameter(weight.detach().clone()), 24))
        other.load_state_dict(saved)
        found = next(iter(other.state.values()))
        assert all(torch.equal(found[name], state[name]) for name in state if name.startswith("exp_avg"))
    assert sizes[0] == 2 * 24 * 192 * 4
    assert sizes[1] == 2 * 24 * 192 * (1 + 4 / 256)
    assert sizes[1] / sizes[0] <= 0.30
    assert abs(losses[1][-1] / losses[0][-1] - 1) <= 0.01


def test_8_bits_without_the_library_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'cveff\[bitsandbytes\]'"):
        GaLoreAdamW(group(zeros(TALL), state_bits=8))
    assert state8bit.BLOCK == 256


class Chain(nn.Module):
    """Two layers and a bias, enough for gradients that arrive one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))

    def groups(self) -> list[dict[str, Any]]:
        matrices = [self.first.weight, self.second.weight]
        return [{"params": matrices, "rank": 4}, {"params": [self.first.bias, self.second.bias]}]


def test_layerwise_is_the_same_update_and_leaves_no_gradient() -> None:
    plain = Chain()
    layered = copy.deepcopy(plain)
    optimizers = [
        GaLoreAdamW(plain.groups(), lr=0.01),
        GaLoreAdamW(layered.groups(), lr=0.01, layerwise=True),
    ]
    for step in range(5):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        for module, optimizer in zip((plain, layered), optimizers, strict=True):
            optimizer.zero_grad()
            (module(x) - x).square().mean().backward()
            if module is layered:
                assert all(parameter.grad is None for parameter in module.parameters())
            optimizer.step()
    for ours, theirs in zip(layered.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    layered(x).sum().backward()
    with pytest.raises(TrainingError, match="accumulated gradients exclude each other"):
        layered(x).sum().backward()
    optimizers[1].remove_hooks()
    before = copy.deepcopy(layered.state_dict())
    layered.zero_grad()
    layered(x).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in layered.state_dict().items())
    assert layered.first.weight.grad is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_does_not_enter_the_svd(value: float) -> None:
    weight = zeros(TALL)
    optimizer = GaLoreAdamW([{"params": [weight], "param_names": ["blocks.0.fc"], "rank": 4}])
    weight.grad = torch.full(TALL, value)
    with pytest.raises(TrainingError, match=r"gradient of blocks\.0\.fc is not finite at step 0"):
        optimizer.step()
    assert torch.equal(weight, zeros(TALL))


def test_a_gradient_of_zeros_changes_nothing() -> None:
    for method in ("svd", "subspace"):
        weight = nn.Parameter(torch.ones(TALL))
        optimizer = GaLoreAdamW(group(weight, projector=method), weight_decay=0.0)
        weight.grad = torch.zeros(TALL)
        optimizer.step()
        assert torch.equal(weight, torch.ones(TALL))


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"rank": 17}, "rank 17 is larger than the 24×16 matrix"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"update_proj_gap": 0}, "update_proj_gap is 0"),
        ({"proj_type": "top"}, "proj_type is 'top'; give 'std' or"),
        ({"projector": "qr"}, "projector"),
        ({"refresh": "never"}, "refresh"),
        ({"carry": "drop"}, "carry"),
        ({"state_bits": 4}, "state_bits is 4; give 32 or 8"),
        ({"convention": "jax"}, "convention"),
        ({"scale": 0.0}, "scale"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_groups_that_cannot_be_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        GaLoreAdamW([{"params": [zeros(TALL)], "rank": 4, **keys}])


def test_a_vector_in_a_group_with_a_rank_is_refused() -> None:
    optimizer = GaLoreAdamW(group(zeros(TALL)))
    with pytest.raises(TrainingError, match=r"parameter of shape \(5,\), .* is no matrix"):
        optimizer.add_param_group({"params": [zeros((5,))], "rank": 1})
    assert len(optimizer.param_groups) == 1


def test_a_state_of_another_rank_is_refused() -> None:
    weight = zeros(TALL)
    optimizer = GaLoreAdamW(group(weight, 4))
    run(optimizer, weight, problem(TALL), 1)
    state = optimizer.state_dict()
    state["param_groups"][0]["rank"] = 5
    with pytest.raises(CheckpointError, match=r"'right' .* is \(4, 16\), rank 5 needs \(5, 16\)"):
        GaLoreAdamW(group(weight, 5)).load_state_dict(state)
