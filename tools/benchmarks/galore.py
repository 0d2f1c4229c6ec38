"""GaLore beside AdamW, galore-torch, Fira and Muon: bytes of state and time of a step of ViT-S, accuracy of ViT-tiny.

Stopped at any moment it goes on where it was. Training takes hours on a CPU: --parts memory time leaves it out.

python tools/benchmarks/galore.py                        # all parts, three seeds
python tools/benchmarks/galore.py --parts memory time    # minutes
python tools/benchmarks/galore.py --quick                # that it works, not what it reaches
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import timm
import torch
from torch import nn

import cveff
from cveff.data import Augmentation
from cveff.data import load as load_data
from cveff.pipeline import create_for, evaluate
from cveff.recipe import ModelSettings
from cveff.train import GaLore, GaLoreAdamW, Train, galore_groups

RANK, GAP = 0.25, 200
BARS = {"memory": 0.40, "memory_8bit": 0.15, "time": 1.15, "points": 0.3}
OURS, OURS_8BIT, PEER = "GaLore", "GaLore, 8 bits", "galore-torch"
VIT_TINY = {"patch_size": 7}
AUGMENTATION = Augmentation(flip="random", crop_padding=2)
# Rates are each optimizer's own: GaLore's projected matrices take a larger one.
TRAINED: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw", "learning_rate": 1e-3},
    OURS: {"optimizer": "galore", "learning_rate": 1e-3, "galore": GaLore(rank=RANK, update_proj_gap=GAP)},
    "Fira": {
        "optimizer": "galore",
        "learning_rate": 1e-3,
        "galore": GaLore(rank=RANK, update_proj_gap=GAP, residual=True),
    },
    "Muon": {"optimizer": "muon", "learning_rate": 0.01},
}


def optimizers() -> dict[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    """What is compared in bytes and time, by name; peers that are not installed are left out."""
    found: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        "AdamW": lambda module: torch.optim.AdamW(module.parameters(), lr=1e-4),
        OURS: lambda module: GaLoreAdamW(_groups(module), lr=1e-4),
    }
    if importlib.util.find_spec("bitsandbytes"):
        found[OURS_8BIT] = lambda module: GaLoreAdamW(_groups(module), lr=1e-4, state_bits=8)
    if importlib.util.find_spec("galore_torch"):
        found[PEER] = _peer
    return found


def _groups(module: nn.Module) -> list[dict[str, Any]]:
    return galore_groups(module, RANK, update_proj_gap=GAP)


def _peer(module: nn.Module) -> torch.optim.Optimizer:
    import galore_torch

    groups = []
    for group in _groups(module):
        keys = {"scale": 0.25, "proj_type": "std"} if "rank" in group else {}
        groups.append({key: value for key, value in group.items() if key != "param_names"} | keys)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return galore_torch.GaLoreAdamW(groups, lr=1e-4)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Memory that the optimizer's tensors hold: whole storages, as a view keeps all it looks into."""
    storages: dict[int, int] = {}
    for state in optimizer.state.values():
        for value in state.values():
            # galore-torch keeps its basis in an object of its own.
            for tensor in [value, *vars(value).values()] if hasattr(value, "__dict__") else [value]:
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def network(quick: bool) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_small_patch16_224", depth=1 if quick else 12)


def gradients(module: nn.Module, batch: int) -> float:
    """A forward and a backward pass on random images; its seconds."""
    images, targets = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
    module.zero_grad()
    begin = time.perf_counter()
    nn.functional.cross_entropy(module(images), targets).backward()
    return time.perf_counter() - begin


def memory(quick: bool) -> dict[str, Any]:
    """Bytes of state by name, after a step."""
    module = network(quick)
    gradients(module, 2)
    values = {}
    for name, build in optimizers().items():
        optimizer = build(module)
        optimizer.step()
        values[name] = state_bytes(optimizer)
    return {"parameters": sum(item.numel() for item in module.parameters()), "bytes": values}


def times(quick: bool, batch: int) -> dict[str, Any]:
    """Seconds of the passes, and of every optimizer step of one refresh period, the optimizers in turns."""
    module = network(quick)
    steps = 3 if quick else GAP
    copies = {name: copy.deepcopy(module) for name in optimizers()}
    built = {name: build(copies[name]) for name, build in optimizers().items()}
    found: dict[str, list[float]] = {name: [] for name in built}
    passes = []
    for index in range(steps):
        # Fresh gradients now and then, and for the refresh; between them the update's time does not depend on them.
        if index % 20 == 0:
            passes.append(gradients(module, batch))
            for item in copies.values():
                for own, live in zip(item.parameters(), module.parameters(), strict=True):
                    own.grad = live.grad
        order = list(built) if index % 2 else list(reversed(built))
        for name in order:
            begin = time.perf_counter()
            built[name].step()
            found[name].append(time.perf_counter() - begin)
    forward_backward = statistics.median(passes)
    step = {name: forward_backward + statistics.mean(values) for name, values in found.items()}
    return {
        "batch": batch,
        "forward_backward_seconds": forward_backward,
        "refresh_seconds": {name: values[0] for name, values in found.items()},
        "update_seconds": {name: statistics.median(values[1:]) for name, values in found.items()},
        "step_seconds": step,
        "step_over_adamw": {name: value / step["AdamW"] for name, value in step.items()},
    }


def accuracy(name: str, seed: int, epochs: int, folder: Path, quick: bool, progress: common.Lines) -> float:
    """Accuracy of ViT-tiny on the 10,000 test images, after the last epoch."""
    data = load_data("digits" if quick else "fashion-mnist", seed=seed)
    torch.manual_seed(seed)
    arguments = {"patch_size": 2, "depth": 1} if quick else VIT_TINY
    model = create_for(
        ModelSettings(architecture="vit_tiny_patch16_224", arguments=arguments), data, seed=seed
    )
    train = Train(
        epochs=epochs,
        batch_size=128,
        weight_decay=0.05,
        warmup_epochs=min(1.0, epochs / 4),
        keep="last",
        augmentation=AUGMENTATION,
        **TRAINED[name],
    )
    trained = cveff.apply(model, train, data=data, seed=seed, progress=progress, folder=folder, resume=True)
    return evaluate(trained, data)


def summary(values: dict[str, Any]) -> dict[str, Any]:
    """What is barred, from what has been measured so far, and whether all of it is good enough."""
    found: dict[str, float] = {}
    if "memory" in values:
        size = values["memory"]["bytes"]
        found["memory"] = size[OURS] / size["AdamW"]
        if OURS_8BIT in size:
            found["memory_8bit"] = size[OURS_8BIT] / size["AdamW"]
    if "time" in values:
        found["time"] = values["time"]["step_over_adamw"][OURS]
    cells = values.get("accuracy", {})
    if cells.get("AdamW") and cells.get(OURS) and cells["AdamW"].keys() == cells[OURS].keys():
        means = [statistics.mean(cells[name].values()) for name in ("AdamW", OURS)]
        found["points"] = 100 * (means[0] - means[1])
    missed = [name for name, bar in BARS.items() if name in found and found[name] > bar]
    missing = [name for name in BARS if name not in found]
    return {
        "figures": found,
        "bars": BARS,
        "missed": missed,
        "missing": missing,
        "passes": not missed + missing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--parts", nargs="+", choices=("memory", "time", "accuracy"), default=["memory", "time", "accuracy"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=8, help="of ViT-tiny on Fashion-MNIST")
    parser.add_argument("--batch", type=int, default=32, help="of the timed step of ViT-S")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, help="folder of training states; by default runs/galore")
    parser.add_argument("--quick", action="store_true", help="one block, one epoch of the embedded digits")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/galore.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quick = arguments.quick
    seeds, epochs, batch = ([0], 1, 2) if quick else (arguments.seeds, arguments.epochs, arguments.batch)
    settings = {"rank": RANK, "gap": GAP, "epochs": epochs, "batch": batch, "threads": arguments.threads}
    out = arguments.out or common.output("galore.json", quick)
    results = common.Results(out, __file__, settings, fresh=arguments.fresh)
    values = results.values
    if "memory" in arguments.parts and "memory" not in values:
        values["memory"] = memory(quick)
    if "time" in arguments.parts and "time" not in values:
        values["time"] = times(quick, batch)
        results.save()
    if "accuracy" in arguments.parts:
        runs = (arguments.runs or common.ROOT / "runs" / "galore") / (
            "quick" if quick else f"{epochs}-epochs"
        )
        for seed in seeds:
            for name in TRAINED:
                cells = values.setdefault("accuracy", {}).setdefault(name, {})
                if str(seed) not in cells:
                    label = f"{name}, seed {seed}"
                    folder = runs / f"{name}-{seed}".lower()
                    cells[str(seed)] = accuracy(name, seed, epochs, folder, quick, common.Lines(label))
                    results.save()
    values["summary"] = summary(values)
    results.save()
    show(values)


def show(values: dict[str, Any]) -> None:
    names = dict.fromkeys([*optimizers(), *TRAINED])
    size, seconds = (
        values.get("memory", {}).get("bytes", {}),
        values.get("time", {}).get("step_over_adamw", {}),
    )
    refresh = values.get("time", {}).get("refresh_seconds", {})
    rows = []
    for name in names:
        cells = list(values.get("accuracy", {}).get(name, {}).values())
        rows.append(
            (
                name,
                size[name] / 1e6 if name in size else None,
                size[name] / size["AdamW"] if name in size else None,
                seconds.get(name),
                refresh.get(name),
                100 * statistics.mean(cells) if cells else None,
                100 * (max(cells) - min(cells)) if cells else None,
            )
        )
    found = values["summary"]
    verdict = "PASS" if found["passes"] else f"missed: {found['missed']}; not measured: {found['missing']}"
    common.table(
        "GaLore at rank 1/4",
        ("optimizer", "state, MB", "of AdamW's", "step / AdamW's", "refresh, s", "accuracy %", "range"),
        rows,
        note=f"State and time: ViT-S, a whole period of {GAP} steps. Accuracy: ViT-tiny on Fashion-MNIST. {verdict}",
    )


if __name__ == "__main__":
    main()
