"""Laws of assembling: parents' weights to the bit, an ordinary model, limits kept, and every bad input named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import cveff
from cveff.compress.blocks import macs
from cveff.compress.sparsity import Sparsity
from cveff.compress.trace import trace
from cveff.data import Data
from cveff.errors import CheckpointError, CveffError, RecipeError, StepError
from cveff.measure import torch_predictor
from cveff.model import Model
from cveff.pipeline import evaluate
from cveff.recipe import parse_recipe
from cveff.steps import Run
from cveff.train import Train
from cveff.train.stitching import Assemble, Assembly
from cveff.train.stitching.assembly import Assembled

NONE = Train(epochs=0)
SHORT = Train(epochs=1, batch_size=32, optimizer="adamw", precision="fp32", warmup_epochs=0.0)
Get = Callable[[str], Model]


def step(*models: str, **settings: Any) -> Assemble:
    return Assemble(
        **{"models": models or ("other",), "stages": 3, "adapters": NONE, "tune": NONE, **settings}
    )


def logits(model: Model, count: int = 32) -> torch.Tensor:
    spec = model.spec.input
    images = torch.randn(count, spec.channels, *spec.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.module.eval()(images)


def assembled(models: list[Model], data: Data, **settings: Any) -> Model:
    return step(*["other"] * (len(models) - 1), **settings).join(models, Run(data=data))


def own_part(name: str) -> str:
    """`sections.1.layer2.0.conv1.weight` -> the name in the parent."""
    return name.split(".", 2)[2]


@pytest.mark.parametrize("names", [("small", "resnet"), ("resnet", "vit"), ("vit", "small")])
def test_stages_are_the_parents_to_the_bit_and_the_file_is_an_ordinary_model(
    trained: Get, digits: Data, tmp_path: Path, names: tuple[str, str]
) -> None:
    """CNN with CNN, CNN with ViT, ViT with CNN."""
    parents = [trained(name) for name in names]
    model = assembled([trained(name) for name in names], digits, use=(0, 1, 1))
    state = model.module.state_dict()
    for section, parent in enumerate(parents):
        given = parent.module.state_dict()
        own = [name for name in state if name.startswith(f"sections.{section}.")]
        assert own and all(torch.equal(state[name], given[own_part(name)]) for name in own)
    assert model.spec.architecture == parents[0].spec.architecture
    cveff.save(model, tmp_path / "model")
    loaded = cveff.load(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model)) and loaded.spec == model.spec
    assert cveff.load(tmp_path / "model").module.adapters[0].conv.weight.shape[2:] == (1, 1)


@pytest.mark.parametrize("name", ["small", "resnet", "vit"])
def test_a_network_assembled_from_its_own_stages_answers_as_it_does(
    trained: Get, digits: Data, name: str
) -> None:
    model = assembled([trained(name), trained(name)], digits, use=(0, 1, 0))
    wanted = logits(trained(name))
    assert len(model.module.adapters) == 2
    # Each adapter is the identity but for float32 rounding, and for directions that the features of 512 digits never
    # take: these are digits.
    batch, _ = next(iter(digits.val.evaluation_batches(model.spec.input, 200)))
    ours, theirs = (torch_predictor(item)(batch) for item in (model, trained(name)))
    np.testing.assert_allclose(ours, theirs, atol=0.02 * np.abs(theirs).max())
    assert (ours.argmax(1) == theirs.argmax(1)).mean() >= 0.99
    assert logits(model).shape == wanted.shape


def test_least_squares_beats_random_adapters_before_any_training(trained: Get, digits: Data) -> None:
    accuracy = {
        start: evaluate(
            assembled([trained("small"), trained("resnet")], digits, use=(0, 0, 1), start=start), digits
        )
        for start in ("least-squares", "random")
    }
    assert accuracy["least-squares"] > accuracy["random"] + 0.2


def test_the_choice_keeps_its_limits_and_counts_as_the_trace_does(
    trained: Get, digits: Data, tmp_path: Path
) -> None:
    names = ("small", "resnet", "vit")
    run = Run(data=digits, folder=tmp_path)
    free = step("b", "c").join([trained(name) for name in names], run)
    record = json.loads((tmp_path / "assembly.json").read_text(encoding="utf-8"))
    assert record["choice"]["parameters"] == free.num_parameters
    assert record["choice"]["macs"] == macs(trace(free.module, free.spec.input))
    table = np.array(record["similarity"])
    assert table.shape == (2, 3, 3) and (table >= 0).all() and (table <= 1 + 1e-9).all()
    assert 0 <= record["unexplained"][0] < 1
    limit = record["choice"]["parameters"] - 1
    small = step("b", "c", max_parameters=limit).join([trained(name) for name in names], run)
    assert small.num_parameters <= limit
    second = json.loads((tmp_path / "assembly.json").read_text(encoding="utf-8"))["choice"]
    assert second["similarity"] <= record["choice"]["similarity"]


def test_adapters_are_trained_alone_then_all(trained: Get, digits: Data, tmp_path: Path) -> None:
    models = [trained("small"), trained("resnet")]
    run = Run(data=digits, folder=tmp_path)
    given = step(use=(0, 1, 1)).join([trained("small"), trained("resnet")], run)
    alone = step(use=(0, 1, 1), adapters=replace(SHORT, ema=0.9)).join(models, run).module.state_dict()
    for name, value in given.module.state_dict().items():
        if name.startswith("sections."):
            assert torch.equal(alone[name], value), name  # batch norms' statistics too
    assert not torch.equal(
        alone["adapters.0.conv.weight"], given.module.state_dict()["adapters.0.conv.weight"]
    )
    tuned = step(use=(0, 1, 1), tune=replace(SHORT, epochs=3)).join(
        [trained("small"), trained("resnet")], run
    )
    assert all(item.requires_grad for item in tuned.module.parameters())
    assert evaluate(tuned, digits) > evaluate(given, digits)
    moved = [
        name
        for name, value in tuned.module.state_dict().items()
        if not torch.equal(value, given.module.state_dict()[name])
    ]
    assert any(name.startswith("sections.0.") for name in moved)


@pytest.mark.slow
def test_an_assembled_model_is_exported_and_deployed(trained: Get, digits: Data, tmp_path: Path) -> None:
    model = assembled([trained("vit"), trained("small")], digits, use=(0, 0, 1))
    target = cveff.Target(name="test", description="", candidates=(("onnxruntime", "fp32"),), threads=1)
    few = replace(digits, val=digits.val.subset(np.arange(40)), test=None)
    deployed = cveff.deploy(model, data=few, target=target, out=tmp_path / "my.bundle")
    session = onnxruntime.InferenceSession(deployed.path / "model.onnx", providers=["CPUExecutionProvider"])
    with cveff.runtime.open(deployed.path) as engine:
        for count in (1, 5):  # the batch stays free
            batch, _ = next(iter(few.val.evaluation_batches(model.spec.input, count)))
            exported = session.run(None, {session.get_inputs()[0].name: batch})[0]
            for answer in (exported, engine.logits(batch)):
                # Sums in another order, and the adapter's batch norm folded into its convolution.
                np.testing.assert_allclose(answer, torch_predictor(model)(batch), rtol=1e-3, atol=1e-3)


def test_a_recipe_assembles_and_a_stopped_run_goes_on(trained: Get, digits: Data, tmp_path: Path) -> None:
    cveff.save(trained("resnet"), tmp_path / "resnet")
    values = {
        "data": {"source": "digits"},
        "model": {"checkpoint": str(tmp_path / "small")},
        "steps": [
            {"kind": "assemble", "models": [str(tmp_path / "resnet")], "stages": 3, "max_parameters": 40_000}
        ],
    }
    recipe = parse_recipe(values)
    assert recipe.steps[0] == Assemble(models=(str(tmp_path / "resnet"),), stages=3, max_parameters=40_000)
    assert parse_recipe(recipe.to_json()) == recipe
    with pytest.raises(RecipeError, match="empty"):
        parse_recipe({**values, "steps": [{"kind": "assemble"}]})
    method = step(str(tmp_path / "resnet"), adapters=SHORT, tune=SHORT)
    whole = cveff.apply(trained("small"), method, data=digits, device="cpu", folder=tmp_path / "run")
    again = cveff.apply(
        trained("small"), method, data=digits, device="cpu", folder=tmp_path / "run", resume=True
    )
    assert torch.equal(logits(whole), logits(again))
    with pytest.raises(CheckpointError, match="learning_rate"):
        other = replace(method, tune=replace(SHORT, learning_rate=0.5))
        cveff.apply(trained("small"), other, data=digits, device="cpu", folder=tmp_path / "run", resume=True)


def test_an_assembled_model_is_assembled_again(trained: Get, digits: Data, tmp_path: Path) -> None:
    first = assembled([trained("small"), trained("resnet")], digits, use=(0, 1, 1))
    again = assembled([first, trained("vit")], digits, stages=2)
    cveff.save(again, tmp_path / "model")
    assert torch.equal(logits(cveff.load(tmp_path / "model")), logits(again))


def test_class_tokens_start_as_the_mean_of_those_the_network_knows(trained: Get, digits: Data) -> None:
    model = assembled([trained("small"), trained("vit")], digits, use=(0, 1, 1))
    module = model.module
    assert isinstance(module, Assembled)
    prefix = module.adapters[0].prefix
    assert prefix is not None and prefix.shape == (1, 24)
    # Two of a kind hand the tokens on through the linear layer instead.
    assert (
        assembled([trained("vit"), trained("vit")], digits, use=(0, 1, 1)).module.adapters[0].prefix is None
    )


def test_models_that_do_not_fit_together(trained: Get, fresh: Callable[..., Model], digits: Data) -> None:
    named = tuple(f"digit {label}" for label in digits.labels)

    def refused(other: Model, message: str) -> None:
        first = trained("small")
        with pytest.raises(StepError, match=message):
            assembled([Model(replace(first.spec, labels=named), first.module), other], digits)

    model = fresh("small")
    refused(Model(replace(model.spec, labels=(*"abcdefghij",)), model.module), "trained on other classes")
    refused(Model(replace(model.spec, labels=("a",)), model.module), "1: a")
    wide = replace(model.spec.input, size=(16, 24))
    refused(Model(replace(model.spec, input=wide), model.module), "16×16×1 and small_resnet_s of 16×24×1")
    colour = replace(model.spec.input, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    refused(Model(replace(model.spec, input=colour), model.module), "of 16×16×3")
    sparse = Sparsity("2:4", 0.5, ("stem.conv.weight",))
    refused(Model(replace(model.spec, edits=(sparse,)), model.module), "changed by sparsity")
    refused(Model(replace(model.spec, task="segmentation"), model.module), "only classification models")
    with torch.no_grad():
        model.module.stem.conv.weight.fill_(float("nan"))
    refused(model, "NaN or infinity")
    with pytest.raises(StepError, match="3 models were given"):
        step("b").join([trained("small")] * 3, Run(data=digits))
    with pytest.raises(StepError, match="one model alone"):
        step().join([trained("small")], Run(data=digits))


def test_stages_and_limits_that_cannot_be(trained: Get, digits: Data, tmp_path: Path) -> None:
    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(StepError, match=message):
            assembled([trained("small"), trained("resnet")], digits, **settings)

    refused(r"small_resnet_s has \d stages that can be joined, not 12", stages=12)
    refused("no stage that ends at 'layer9'; it can end at", cuts=(("stages.0.0",), ("layer9",)))
    refused("neither a map of features nor tokens", cuts=(("stages.0.0",), ("global_pool",)))
    refused("not in the order", cuts=(("stages.1.1", "stages.0.0"), ("layer1.0", "layer2.0")))
    refused("no assembly has fewer than .* give at least that", max_parameters=10)
    refused("no assembly has fewer than .* give at least that", max_macs=10)
    cveff.save(trained("resnet"), tmp_path / "resnet")
    with pytest.raises(StepError, match="data"):
        cveff.apply(trained("small"), step(str(tmp_path / "resnet")))
    with pytest.raises(StepError, match="images with labels"):
        step().join([trained("small"), trained("resnet")], Run(data=replace(digits, train=None)))
    with pytest.raises(CveffError, match="nowhere"):
        cveff.apply(trained("small"), step(str(tmp_path / "nowhere")), data=digits)
    two = replace(digits, labels=("0", "1"))
    with pytest.raises(StepError, match="10 classes and the data 2"):
        cveff.apply(trained("small"), step(str(tmp_path / "resnet")), data=two)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"models": ()}, "one model alone"),
        ({"stages": 1}, "stages is 1"),
        ({"start": "guess"}, "start is 'guess'"),
        ({"cuts": (("a",),)}, "1 lists for 2 networks"),
        ({"cuts": (("a",), ("b", "c"))}, "as many modules"),
        ({"cuts": ((), ())}, "as many modules"),
        ({"use": (0, 1)}, "2 stages, and there are 3"),
        ({"use": (0, 1, 2)}, "numbered 0 to 1"),
        ({"use": (1, 1, 1)}, "every stage from network 1"),
        ({"use": (0, 1, 1), "max_macs": 5}, "chooses already"),
        ({"max_parameters": 0}, "max_parameters is 0"),
        ({"images": 1}, "images is 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StepError, match=message):
        step(**settings)


def test_damaged_descriptions_are_refused() -> None:
    with pytest.raises(CheckpointError, match="do not fit together"):
        Assembly((), ((0, "", "a"), (1, "b", "")), ((("planes", 1, 1, 1, 0),) * 2,))
