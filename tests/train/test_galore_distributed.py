"""Two gloo processes train as one does: under DDP and under FSDP2, with projectors that are rank 0's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cveff.errors import TrainingError
from cveff.train import GaLoreAdamW, galore_groups
from cveff.train.state import load_state, save_state

STEPS, GAP, BATCH = 12, 5, 8


def network() -> nn.Module:
    """Tall, wide and convolutional matrices, an embedding, a head, norms and biases; 9 rows do not halve evenly."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 9, 3, padding=1),
        nn.Conv2d(9, 9, 3, padding=1),
        nn.Flatten(),
        nn.Linear(9 * 16, 24),
        nn.LayerNorm(24),
        nn.Linear(24, 40),
        nn.GELU(),
        nn.Linear(40, 5),
    )


def optimizer_of(module: nn.Module) -> GaLoreAdamW:
    return GaLoreAdamW(galore_groups(module, 2, update_proj_gap=GAP, refresh="lazy"), lr=0.01)


def batch(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 1, 4, 4, generator=random), torch.randint(0, 5, (BATCH,), generator=random)


def train(module: nn.Module, optimizer: GaLoreAdamW, rank: int, world: int, start: int = 0) -> None:
    for step in range(start, start + STEPS):
        images, targets = (part.chunk(world)[rank] for part in batch(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images), targets).backward()
        optimizer.step()


def whole(values: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in values.items()
    }


def child(rank: int, folder: str) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    ddp = DistributedDataParallel(network())
    optimizer = optimizer_of(ddp)
    train(ddp, optimizer, rank, 2)
    sharded = network()
    fully_shard(sharded)
    sharded_optimizer = optimizer_of(sharded)
    train(sharded, sharded_optimizer, rank, 2)
    gathered = get_optimizer_state_dict(
        sharded, sharded_optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    weights = whole(sharded.state_dict())
    # Devices whose SVDs differ in sign, order and rank 1's own opinion: rank 0's basis holds.
    disagreeing = nn.Parameter(torch.zeros(6, 4))
    other = GaLoreAdamW([{"params": [disagreeing], "rank": 2}])
    disagreeing.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(rank))
    other.step()
    try:
        GaLoreAdamW([disagreeing], layerwise=True)
        refused = False
    except TrainingError:
        refused = True
    state = {
        "ddp": whole(ddp.state_dict()),
        "ddp_optimizer": optimizer.state_dict(),
        "fsdp": weights,
        "fsdp_optimizer": gathered["state"] if rank == 0 else {},
        "basis": other.state[disagreeing]["right"],
        "refused": refused,
    }
    save_state(Path(folder) / f"{rank}.safetensors", state)
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    single = network()
    optimizer = optimizer_of(single)
    train(single, optimizer, 0, 1)
    torch.multiprocessing.spawn(child, (str(tmp_path),), nprocs=2)
    first, second = (load_state(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, expected in single.state_dict().items():
        for kind in ("ddp", "fsdp"):
            assert torch.equal(first[kind][name], second[kind][name]), (kind, name)
            # Gradients are summed in another order, and where one is nearly nothing Adam divides by its size:
            # a hundredth of the 12 steps' length of 0.01 each.
            torch.testing.assert_close(first[kind][name], expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(first["basis"], second["basis"])
    assert first["refused"] and second["refused"]
    # What two ranks saved is continued by one, as the one would have gone on.
    resumed = network()
    resumed.load_state_dict(first["ddp"])
    resumed_optimizer = optimizer_of(resumed)
    resumed_optimizer.load_state_dict(first["ddp_optimizer"])
    train(resumed, resumed_optimizer, 0, 1, start=STEPS)
    train(single, optimizer, 0, 1, start=STEPS)
    for ours, theirs in zip(resumed.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-3)
    names = {name for name, state in first["fsdp_optimizer"].items() if "right" in state or "left" in state}
    assert names == {"1.weight", "3.weight", "5.weight"}
    for name in names:
        state = optimizer.state[dict(single.named_parameters())[name]]
        assert first["fsdp_optimizer"][name]["exp_avg"].shape == state["exp_avg"].shape
