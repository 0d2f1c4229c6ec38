"""µP: what activations change by in a few steps does not depend on the width, and without µP it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cveff
from cveff.data import Data
from cveff.data import load as load_data
from cveff.data.augment import normalize
from cveff.errors import StepError, TrainingError
from cveff.model import Model
from cveff.runtime.input_spec import InputSpec
from cveff.train import Growth, Train
from cveff.train.mup import initialize, parametrization, with_rates
from cveff.train.optimizers import build_optimizer

SPEC = InputSpec(size=(8, 8), channels=1, mean=(0.3,), std=(0.35,))
WIDTHS = (32, 64, 128, 256)


@pytest.fixture(scope="module")
def digits() -> Data:
    data = load_data("digits", seed=0)
    assert data.train is not None
    return replace(data, train=data.train.subset(np.arange(128)), val=data.val.subset(np.arange(60)))


def vit(width: int, **arguments: Any) -> Model:
    own = {"patch_size": 4, "embed_dim": width, "num_heads": width // 16, "depth": 2, "mlp_ratio": 2.0}
    return cveff.create(
        "vit_tiny_patch16_224", num_classes=10, input=SPEC, timm_arguments={**own, **arguments}
    )


def resnet(width: int) -> Model:
    return cveff.create("small_resnet_s", num_classes=10, input=SPEC, widths=[width, width], depths=[1, 1])


def movement(
    build: Callable[[int], Model],
    base: Any,
    width: int,
    optimizer: str,
    rate: float,
    use_mup: bool,
    data: Data,
) -> dict[str, float]:
    """Root mean square change of activations, by layer, over four steps on one batch."""
    torch.manual_seed(0)
    model = build(width)
    assert data.train is not None
    pixels = data.train.pixels(SPEC)
    assert pixels is not None
    images = normalize(pixels[:64], SPEC)
    targets = torch.from_numpy(data.train.class_indices()[:64])
    layers = {
        name: part
        for name, part in model.module.named_modules()
        if name in ("blocks.1", "stages.1", "head", "fc")
    }
    seen: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda part, args, made, name=name: seen.__setitem__(name, made.detach()))
    optimizers = build_optimizer(model.module, optimizer, rate, 0.0, 0.0)
    if use_mup:
        rule = parametrization(model, base, optimizer)  # type: ignore[arg-type]
        initialize(model.module, rule)
        optimizers = with_rates(optimizers, model.module, rule)
    model.module(images)
    before = dict(seen)
    for _ in range(4):
        optimizers.zero_grad()
        nn.functional.cross_entropy(model.module(images), targets).backward()
        optimizers.step()
    model.module(images)
    return {name: float((seen[name] - before[name]).square().mean().sqrt()) for name in seen}


def slopes(
    build: Callable[[int], Model], base: Any, optimizer: str, rate: float, use_mup: bool, data: Data
) -> dict[str, float]:
    """Exponent of the width by which each layer's movement grows."""
    found = [movement(build, base, width, optimizer, rate, use_mup, data) for width in WIDTHS]
    logs = np.log(WIDTHS)
    return {name: float(np.polyfit(logs, np.log([item[name] for item in found]), 1)[0]) for name in found[0]}


@pytest.mark.parametrize(
    ("build", "base", "optimizer", "rate"),
    [(vit, 32, "adamw", 3e-3), (resnet, (32, 32), "adamw", 3e-3)],
)
def test_the_coordinate_check(
    build: Callable[[int], Model], base: Any, optimizer: str, rate: float, digits: Data
) -> None:
    with_mup, without = (slopes(build, base, optimizer, rate, use, digits) for use in (True, False))
    # 0 is level; a layer whose updates add up without µP grows by the width's root or faster.
    assert all(abs(slope) < 0.25 for slope in with_mup.values()), with_mup
    assert max(without.values()) > 0.4, without


def test_rates_and_deviations_are_those_of_table_3() -> None:
    torch.manual_seed(0)
    model = vit(128)
    rule = parametrization(model, 32, "adamw")
    fc1, head, stem = "blocks.0.mlp.fc1.weight", "head.weight", "patch_embed.proj.weight"
    assert [rule.rates[name] for name in (fc1, head, stem, "norm.weight", "pos_embed")] == [
        0.25,
        0.25,
        1,
        1,
        1,
    ]
    base = parametrization(vit(32), 32, "adamw").deviations
    assert rule.deviations[fc1] == pytest.approx(base[fc1] / 2)
    assert rule.deviations[head] == pytest.approx(base[head] / 4)
    assert rule.deviations[stem] == pytest.approx(base[stem])
    sgd = parametrization(model, 32, "sgd")
    assert [sgd.rates[name] for name in (fc1, head, stem, "norm.weight")] == [1, 0.25, 4, 4]
    initialize(model.module, rule)
    assert float(model.module.get_parameter(fc1).detach().std()) == pytest.approx(rule.deviations[fc1])
    optimizers = with_rates(build_optimizer(model.module, "adamw", 1e-2, 0.1, 0.0), model.module, rule)
    for group in optimizers.optimizers[0].param_groups:  # a step takes the same share off every weight
        assert group["weight_decay"] in (0, pytest.approx(0.1 * 1e-2 / group["lr"]))
    counted = sum(len(group["params"]) for group in optimizers.optimizers[0].param_groups)
    assert counted == len(list(model.module.parameters()))


def test_depthwise_kernels_read_as_much_at_every_width() -> None:
    model = cveff.create("convnext_atto", num_classes=4, depths=[1, 1, 1, 1], dims=[16, 32, 64, 128])
    rule = parametrization(model, (8, 16, 32, 64), "adamw")
    assert rule.rates["stages.1.blocks.0.conv_dw.weight"] == 1
    assert rule.rates["stages.1.blocks.0.mlp.fc1.weight"] == 0.5


def test_at_the_base_width_nothing_changes(digits: Data) -> None:
    train = Train(epochs=1, batch_size=32, optimizer="adamw", precision="fp32")
    torch.manual_seed(0)
    model = vit(32)
    rule = parametrization(model, 32, "adamw")
    assert set(rule.rates.values()) == {1.0}
    # Its weights are another draw of the same law, so that their deviations differ by a draw's error.
    before = model.module.get_parameter("blocks.0.mlp.fc1.weight").detach().std()
    assert rule.deviations["blocks.0.mlp.fc1.weight"] == pytest.approx(float(before), rel=0.1)
    trained = cveff.apply(model, replace(train, mup_base_width=32), data=digits)
    assert trained.spec == model.spec


def test_a_run_under_mup_resumes_to_the_bit(digits: Data, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = vit(64)
    train = Train(
        epochs=2, batch_size=32, optimizer="adamw", precision="fp32", mup_base_width=32, keep="last"
    )

    class KilledError(Exception):
        pass

    class Killing(cveff.progress.Silent):
        def track(self, items: Any, description: str, total: int | None = None) -> Any:
            for index, item in enumerate(items):
                if index == 5:
                    raise KilledError
                yield item

    whole = cveff.apply(model, train, data=digits)
    with pytest.raises(KilledError):
        cveff.apply(model, train, data=digits, folder=tmp_path, progress=Killing())
    resumed = cveff.apply(model, train, data=digits, folder=tmp_path, resume=True)
    assert all(
        torch.equal(value, whole.module.state_dict()[name])
        for name, value in resumed.module.state_dict().items()
    )


def test_what_mup_cannot_do_is_refused() -> None:
    with pytest.raises(StepError, match=r"no multiple of 16"):
        parametrization(vit(64), 24, "adamw")
    with pytest.raises(StepError, match=r"no argument for growth\.width"):
        parametrization(cveff.create("mobilenetv3_small_050", num_classes=4), 8, "adamw")
    with pytest.raises(TrainingError, match="muon"):
        Train(mup_base_width=32, optimizer="muon")
    with pytest.raises(TrainingError, match=r"train\.grow"):
        Train(mup_base_width=32, grow=(Growth(at=0.5, depth=3),))
