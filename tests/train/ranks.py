"""What each rank of test_distributed.py does, started by torchrun: `ranks.py FOLDER`. Also what one process does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import cveff
from cveff.data import Augmentation, Data
from cveff.data import load as load_data
from cveff.log import FileLog
from cveff.model import Model
from cveff.runtime.input_spec import InputSpec
from cveff.train import Distributed, Train, joined
from cveff.train.loop import Trainer

MIXING = Augmentation(flip="alternating", crop_padding=1, erasing=0.5, cutmix=1.0)
# 17 pairs of mixed images: ranks get 18 and 16 of a batch.
CONV = Train(
    epochs=3,
    batch_size=34,
    learning_rate=0.05,
    warmup_epochs=1,
    ema=0.8,
    clip_norm=0.5,
    precision="fp32",
    keep="last",
    augmentation=MIXING,
)
VIT = replace(CONV, optimizer="adamw", learning_rate=1e-3, accumulation=2)
FSDP2 = Distributed(strategy="fsdp2")


class StoppedError(Exception):
    """What ends a run after its first epoch."""


def images() -> Data:
    data = load_data("digits", seed=0)
    assert data.train is not None
    return replace(data, train=data.train.subset(np.arange(120)), val=data.val.subset(np.arange(51)))


def network(name: str, data: Data, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    spec = InputSpec(size=(8, 8), channels=1, mean=(0.3,), std=(0.35,))
    if name == "conv":
        tiny = {"widths": [4, 8], "depths": [1, 1]}
        return cveff.create("small_resnet_s", labels=data.labels, input=spec, **tiny)
    tiny = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return cveff.create("vit_tiny_patch16_224", labels=data.labels, input=spec, timm_arguments=tiny)


@contextmanager
def stopping() -> Iterator[None]:
    """Within the block a run stops after its first epoch, whose state it has kept."""
    validate = Trainer._validate

    def stop(self: Trainer, epoch: int) -> bool:
        validate(self, epoch)
        raise StoppedError

    Trainer._validate = stop  # type: ignore[method-assign]
    try:
        yield
    except StoppedError:
        pass
    finally:
        Trainer._validate = validate  # type: ignore[method-assign]


def train(name: str, settings: Train, data: Data, folder: Path, seed: int = 0) -> Model:
    with FileLog(folder) as log:
        return cveff.apply(
            network(name, data, seed), settings, data=data, folder=folder, log=log, resume=True, device="cpu"
        )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    data = images()
    with joined(torch.device("cpu")) as share:

        def run(name: str, of: str, settings: Train) -> None:
            # Weights that differ by rank: rank 0's count.
            model = train(of, settings, data, folder / name, seed=share.rank)
            cveff.save(model, folder / f"{name}-{share.rank}")

        run("conv-ddp", "conv", CONV)
        run("conv-fsdp2", "conv", replace(CONV, distributed=FSDP2))
        run("conv-checkpointed", "conv", replace(CONV, checkpoint_activations=True))
        run("conv-apart", "conv", replace(CONV, distributed=Distributed(sync_batch_norm=False)))
        run("vit-ddp", "vit", VIT)
        run("vit-fsdp2", "vit", replace(VIT, distributed=FSDP2))
        run("ddp-from-one", "conv", CONV)
        run("fsdp2-from-one", "vit", replace(VIT, distributed=FSDP2))
        with stopping():
            train("vit", replace(VIT, distributed=FSDP2), data, folder / "one-from-fsdp2")
        with stopping():
            train("conv", CONV, data, folder / "one-from-ddp")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
