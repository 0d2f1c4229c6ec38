"""Replaying what is done gives what computing it again would, whatever the network looks like."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from cveff.compress.quant.replay import MEMORY, Replay
from cveff.errors import StepError


class Branches(nn.Module):
    """Two layers on the same tensor, a layer called twice, in-place work on a block's output, and one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.left, self.right, self.twice, self.idle = (nn.Linear(8, 8) for _ in range(4))
        self.tail = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.GELU()), nn.Linear(8, 4))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.stem(x)
        x += 1
        x = self.left(x) * scale + self.right(x)
        return self.tail(self.twice(self.twice(x)))


def linears(module: nn.Module) -> list[str]:
    return [path for path, part in module.named_modules() if isinstance(part, nn.Linear)]


def walk(module: nn.Module, batches: list, memory: int) -> dict[str, list[Tensor]]:
    """What reaches each layer, while each is changed after it was seen."""
    replay = Replay(module, batches, linears(module), memory=memory)
    seen: dict[str, list[Tensor]] = {}
    for stage in replay.stages:
        replay.inputs(stage, lambda path, x: seen.setdefault(path, []).append(x.clone()))
        for path in stage:
            with torch.no_grad():
                module.get_submodule(path).weight.mul_(1.25)
        replay.done(stage)
    return seen


def test_stages_follow_the_calls() -> None:
    module = Branches()
    replay = Replay(module, [torch.randn(2, 8)], linears(module))
    assert replay.stages == [("stem.0",), ("left", "right"), ("twice",), ("tail.0.0",), ("tail.1",)]
    assert replay.unused == ["idle"]


def networks() -> dict[str, tuple[nn.Module, list]]:
    torch.manual_seed(0)
    arguments = {
        "num_classes": 5,
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 2,
    }
    vit = timm.create_model("vit_tiny_patch16_224", **arguments)
    convnext = timm.create_model("convnext_tiny", depths=(1, 1, 2, 1), dims=(8, 16, 16, 16), num_classes=5)
    images = [torch.randn(2, 3, 32, 32) for _ in range(2)]
    rows = [torch.randn(3, 8), {"x": torch.randn(3, 8), "scale": 0.5}, (torch.randn(2, 8), 2.0)]
    return {"branches": (Branches(), rows), "vit": (vit, images), "convnext": (convnext, images)}


@pytest.mark.parametrize("name", ["branches", "vit", "convnext"])
def test_each_layer_sees_what_the_changed_network_gives_it(name: str) -> None:
    again, kept = (walk(*networks()[name], memory=memory) for memory in (0, MEMORY))
    assert again.keys() == kept.keys() and len(kept) >= 6
    for path, inputs in again.items():
        assert len(inputs) == len(kept[path])
        for left, right in zip(inputs, kept[path], strict=True):
            assert torch.equal(left, right)


def test_the_front_is_computed_once_it_is_done_no_more() -> None:
    module, batches = networks()["vit"]
    calls: dict[str, int] = {}
    for path, part in module.named_modules():
        if path.startswith("blocks.") and path.count(".") == 1:
            part.norm1.register_forward_hook(
                lambda *_, path=path: calls.update({path: calls.get(path, 0) + 1})
            )
    walk(module, batches, MEMORY)
    # The survey; and for each batch one pass a stage of its own, and one that keeps what it returns.
    assert calls["blocks.0"] == 1 + len(batches) * (4 + 1)


def test_hooks_and_modes_are_as_they_were() -> None:
    module, batches = networks()["branches"]
    module.train()
    module.tail.eval()
    walk(module, batches, MEMORY)
    assert module.training and not module.tail.training and not module.tail[0].training
    for part in module.modules():
        assert not part._forward_hooks and not part._forward_pre_hooks and "forward" not in part.__dict__


def test_no_batches_are_refused() -> None:
    with pytest.raises(StepError, match="no calibration batches"):
        Replay(Branches(), [], ["left"])
