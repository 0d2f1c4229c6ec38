"""Laws of sparsity: the pattern holds after training, averaging, saving, loading, more training, and in the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from timm.layers import ScaledStdConv2d
from torch import nn
from torch.nn import functional as F

import cveff
from cveff.backbones import FoldBatchNorm
from cveff.compress import Distill, Sparsify
from cveff.compress.sparse_masks import cubic_sparsity, is_two_of_four, zero_share
from cveff.compress.sparsity import Masks, SparseObjective, Sparsity
from cveff.compress.weight_calls import weight_calls
from cveff.data import Data
from cveff.data import load as load_data
from cveff.errors import CheckpointError, StepError
from cveff.log import FileLog
from cveff.model import Model
from cveff.recipe import RecipeError, parse_recipe
from cveff.runtime.input_spec import InputSpec
from cveff.train import Train
from cveff.train.objective import CrossEntropy

INPUT = InputSpec(size=(8, 8), channels=1, mean=(0.3,), std=(0.35,))
TRAIN = Train(epochs=2, batch_size=64, learning_rate=0.05, precision="fp32", warmup_epochs=0)
PLAIN = Distill(alpha=0.0, train=TRAIN)
SPARSE = "stages.0.0.conv1.conv.weight"


@pytest.fixture(scope="module")
def digits() -> Data:
    data = load_data("digits", seed=0)
    assert data.train is not None
    return replace(data, train=data.train.subset(np.arange(256)), val=data.val.subset(np.arange(100)))


def tiny(data: Data, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return cveff.create("small_resnet_s", labels=data.labels, input=INPUT, widths=[8, 12], depths=[1, 1])


@pytest.fixture(scope="module")
def dense(digits: Data) -> Model:
    return cveff.apply(tiny(digits), replace(TRAIN, epochs=4, learning_rate=0.1), data=digits)


def equal(a: Model, b: Model) -> bool:
    first, second = a.module.state_dict(), b.module.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def edit_of(model: Model) -> Sparsity:
    (edit,) = (edit for edit in model.spec.edits if isinstance(edit, Sparsity))
    return edit


def kernels(path: Path) -> list[np.ndarray]:
    """Weights of the file's convolutions and linear layers, in order, (out, in, …)."""
    graph = onnx.load(path).graph
    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type == "Conv":
            found.append(values[node.input[1]])
        if node.op_type in ("Gemm", "MatMul") and node.input[1] in values:
            transposed = any(item.name == "transB" and item.i for item in node.attribute)
            found.append(values[node.input[1]] if transposed else values[node.input[1]].T)
    return found


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_two_of_four_survives_training_and_reaches_the_file(
    digits: Data, dense: Model, tmp_path: Path, optimizer: str, ema: float
) -> None:
    train = replace(TRAIN, ema=ema, optimizer=optimizer, learning_rate=None)
    step = Sparsify(recover=Distill(train=train))
    model = cveff.apply(dense, step, data=digits)
    edit = edit_of(model)
    assert len(edit.layers) == 5 and edit.broken(model.module) == ()
    assert not equal(model, cveff.apply(dense, Sparsify()))  # the weights around the zeros were trained
    for path in edit.layers:
        assert zero_share(model.module.get_parameter(path)) == 0.5
    assert zero_share(model.module.fc.weight) == 0

    weights = kernels(cveff.export(model, tmp_path / "model.onnx"))
    pattern = [is_two_of_four(torch.from_numpy(weight.copy())) for weight in weights]
    assert pattern == [False, True, True, True, True, True, False]
    assert [float(np.mean(weight == 0)) for weight in weights[1:-1]] == [0.5] * 5


@pytest.mark.parametrize("importance", ["magnitude", "activation"])
def test_unstructured_sparsity_grows_to_its_end_and_reaches_the_file(
    digits: Data, dense: Model, tmp_path: Path, importance: str
) -> None:
    train = replace(TRAIN, epochs=3, ema=0.9, keep="best")
    step = Sparsify(pattern="unstructured", sparsity=0.8, importance=importance, recover=Distill(train=train))
    model = cveff.apply(dense, step, data=digits)
    zeros = [zero_share(model.module.get_parameter(path)) for path in edit_of(model).layers]
    assert zeros == pytest.approx([0.8] * 5, abs=0.01)
    weights = kernels(cveff.export(model, tmp_path / "model.onnx"))
    assert [float(np.mean(weight == 0)) for weight in weights[1:-1]] == pytest.approx(zeros)


def test_masks_follow_the_cubic_schedule_and_only_ever_shrink(digits: Data) -> None:
    module, total = tiny(digits).module, 40
    masks = Masks({SPARSE: torch.ones_like(module.get_parameter(SPARSE), dtype=torch.bool)}, {})
    objective = SparseObjective(CrossEntropy(), masks, sparsity=0.9, ramp=0.5)
    previous = masks.keep(SPARSE).clone()
    for step in range(1, total + 1):
        with torch.no_grad():
            module.get_parameter(SPARSE).add_(0.01)  # an update that revives every zero
        objective.after_step(module, step, total)
        kept, weight = masks.keep(SPARSE), module.get_parameter(SPARSE)
        assert zero_share(kept) == pytest.approx(cubic_sparsity(step / 20, 0.9), abs=1 / kept.numel())
        assert not (kept & ~previous).any()
        assert not weight[~kept].any() and weight[kept].all()
        previous = kept.clone()


def test_the_moving_average_gets_the_masks_of_the_network(digits: Data) -> None:
    module, average = tiny(digits).module, tiny(digits, seed=1).module
    masks = Masks({SPARSE: torch.ones_like(module.get_parameter(SPARSE), dtype=torch.bool)}, {})
    objective = SparseObjective(CrossEntropy(), masks, sparsity=0.5, ramp=1.0)
    objective.after_step(module, 10, 10)
    objective.after_step(average, 10, 10)
    assert torch.equal(module.get_parameter(SPARSE) == 0, average.get_parameter(SPARSE) == 0)


def test_wanda_scores_are_weight_times_input_norm_by_row() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(4, 6, 3, groups=2), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(F.relu(self.conv(x)).mean((2, 3)))

    torch.manual_seed(0)
    module, images = Two(), torch.randn(8, 4, 5, 5) * torch.tensor([1.0, 10, 0.1, 1]).view(1, 4, 1, 1)
    calls = weight_calls(module, images.split(3))
    assert list(calls) == ["conv.weight", "fc.weight"]
    norms = calls["conv.weight"].input_norms(module.conv.weight)
    expected = images.permute(1, 0, 2, 3).flatten(1).norm(dim=1)  # of each of the 4 channels
    torch.testing.assert_close(norms.flatten(1), expected.view(2, 2).repeat_interleave(3, 0))
    hidden = F.relu(module.conv(images)).mean((2, 3))
    torch.testing.assert_close(calls["fc.weight"].input_norms(module.fc.weight)[2], hidden.norm(dim=0))

    masks = Masks({"conv.weight": torch.ones(6, 2, 3, 3, dtype=torch.bool)}, {"conv.weight": norms})
    masks.choose(module, "unstructured", 0.5)
    scores = (module.conv.weight.abs() * norms).flatten(1)
    kept = masks.keep("conv.weight").flatten(1)
    assert (kept.sum(1) == 9).all()
    assert all(scores[row][kept[row]].min() >= scores[row][~kept[row]].max() for row in range(6))


def test_importances_differ_and_activation_needs_images(digits: Data, dense: Model) -> None:
    by_weight = cveff.apply(dense, Sparsify())
    by_image = cveff.apply(dense, Sparsify(importance="activation"), data=digits)
    assert not equal(by_weight, by_image)
    assert edit_of(by_image).broken(by_image.module) == ()
    with pytest.raises(StepError, match="looks at images"):
        cveff.apply(dense, Sparsify(importance="activation"))


def test_a_loaded_model_keeps_its_zeros_when_trained_on(digits: Data, dense: Model, tmp_path: Path) -> None:
    sparse = cveff.apply(dense, Sparsify())
    cveff.save(sparse, tmp_path / "sparse")
    loaded = cveff.load(tmp_path / "sparse")
    assert loaded.spec == sparse.spec and equal(loaded, sparse)
    assert (
        json.loads((tmp_path / "sparse" / "model.json").read_text())["edits"][0]["effect"]
        == "size, not speed"
    )
    for step in (replace(TRAIN, ema=0.9), Distill(train=TRAIN)):
        tuned = cveff.apply(loaded, step, data=digits, teacher=dense)
        assert not equal(tuned, loaded)
        for path in edit_of(tuned).layers:
            assert torch.equal(tuned.module.get_parameter(path) == 0, loaded.module.get_parameter(path) == 0)


def test_folding_batch_norms_keeps_the_zeros(digits: Data, dense: Model) -> None:
    folded = cveff.apply(dense, [Sparsify(), FoldBatchNorm()])
    assert edit_of(folded).broken(folded.module) == ()


def test_without_recovery_only_the_masked_weights_change(dense: Model) -> None:
    sparse = cveff.apply(dense, Sparsify(pattern="unstructured", sparsity=0.3))
    for name, value in sparse.module.state_dict().items():
        before = dense.module.state_dict()[name]
        assert torch.equal(value, torch.where(value == 0, value, before))
    assert not any(zero_share(p) for p in dense.module.parameters() if p.ndim > 1)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_resuming_is_bit_identical(digits: Data, dense: Model, tmp_path: Path, pattern: str) -> None:
    sparsity = {"2:4": 0.5, "unstructured": 0.75}[pattern]
    train = replace(TRAIN, epochs=3, ema=0.9)
    step = Sparsify(
        pattern=pattern, sparsity=sparsity, recover=Distill(method="features", train=train), ramp=0.8
    )
    whole = cveff.apply(dense, step, data=digits)

    class KilledError(Exception):
        pass

    class KillingLog(FileLog):
        def write(self, step: int, figures: object) -> None:
            if step > 4:
                raise KilledError
            super().write(step, figures)

    with pytest.raises(KilledError):
        cveff.apply(dense, step, data=digits, folder=tmp_path, log=KillingLog(tmp_path))
    assert equal(whole, cveff.apply(dense, step, data=digits, folder=tmp_path, resume=True))
    with pytest.raises(CheckpointError, match=r"objective\.importance"):
        other = replace(step, importance="activation")
        cveff.apply(dense, other, data=digits, folder=tmp_path, resume=True)


def test_the_message_counts_zeros_and_says_what_they_are_good_for(
    digits: Data, dense: Model, tmp_path: Path
) -> None:
    lines: list[str] = []

    class Listening(cveff.progress.Silent):
        def message(self, text: str) -> None:
            lines.append(text)

    log = FileLog(tmp_path)
    cveff.apply(dense, Sparsify(recover=PLAIN), data=digits, progress=Listening(), log=log)
    assert "2:4 sparsity: 50.0% of " in lines[-1] and "(size, not speed)" in lines[-1]
    assert "stem.conv (first)" in lines[-1] and "fc (last)" in lines[-1]
    figures = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert figures["step"] == 8 and figures["sparsity/zeros_in_layers"] == 0.5


def test_layers_that_cannot_have_the_pattern_stay_dense_and_are_named(digits: Data) -> None:
    torch.manual_seed(0)
    model = cveff.create("small_resnet_s", labels=digits.labels, input=INPUT, widths=[6, 12], depths=[1, 1])
    edit = edit_of(cveff.apply(model, Sparsify()))
    assert edit.layers == ("stages.1.1.conv1.conv.weight", "stages.1.1.conv2.conv.weight")
    with pytest.raises(StepError, match=r"no layer can be 2:4.*stem\.conv \(first\).*6 input channels"):
        cveff.apply(model, Sparsify(exclude=("first", "last", "stages.1.1.*")))
    with pytest.raises(StepError, match=r"'head' is no layer; there are stem\.conv"):
        cveff.apply(model, Sparsify(exclude=("head",)))


@pytest.mark.parametrize("architecture", ["test_vit", "test_mambaout", "mobilenetv4_conv_small"])
def test_other_architectures_keep_their_zeros_in_the_file(architecture: str, tmp_path: Path) -> None:
    model = cveff.create(architecture, num_classes=4, image_size=64)
    sparse = cveff.apply(model, Sparsify())
    edit = edit_of(sparse)
    weights = [torch.from_numpy(w.copy()) for w in kernels(cveff.export(sparse, tmp_path / "model.onnx"))]
    assert edit.broken(sparse.module) == ()
    assert sum(is_two_of_four(weight) for weight in weights if weight.ndim > 1) == len(edit.layers) > 5


def test_standardised_weights_are_not_taken_for_weights() -> None:
    model = cveff.create(
        "test_nfnet", num_classes=4
    )  # most of its convolutions standardise their weights on the way
    standardised = {
        f"{path}.weight" for path, part in model.module.named_modules() if isinstance(part, ScaledStdConv2d)
    }
    edit = edit_of(cveff.apply(model, Sparsify()))
    assert standardised and not standardised & set(edit.layers)


def test_branches_are_merged_first() -> None:
    model = cveff.create("mobileone_s0", num_classes=3, image_size=32)
    with pytest.raises(StepError, match="apply Reparameterize first"):
        cveff.apply(model, Sparsify())
    merged = cveff.apply(model, [cveff.backbones.Reparameterize(), Sparsify()])
    assert edit_of(merged).broken(merged.module) == ()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"pattern": "1:2"}, "pattern is '1:2'"),
        ({"importance": "taylor"}, "importance is 'taylor'"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"sparsity": 0.6}, "2:4 is always 0.5"),
        ({"ramp": 0.0}, "ramp is 0.0"),
        ({"num_calibration": 0}, "1 or more images"),
        ({"recover": Distill(alpha=0.0, train=replace(TRAIN, epochs=0))}, "epochs is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_construction(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(StepError, match=words):
        Sparsify(**settings)


def test_recovery_needs_data(dense: Model) -> None:
    with pytest.raises(StepError, match="needs data"):
        cveff.apply(dense, Sparsify(recover=PLAIN))


def test_a_recipe_makes_sparse() -> None:
    step = {
        "kind": "sparsify",
        "pattern": "unstructured",
        "sparsity": 0.7,
        "recover": {"method": "dist", "train": {"epochs": 2}},
    }
    values = {"data": {"source": "digits"}, "train": {}, "steps": [step]}
    recipe = parse_recipe(values)
    train = replace(Distill().train, epochs=2)
    recover = Distill(method="dist", train=train)
    assert recipe.steps == (Sparsify(pattern="unstructured", sparsity=0.7, recover=recover),)
    assert parse_recipe(recipe.to_json()) == recipe
    with pytest.raises(RecipeError, match=r"steps\[1\]: trains after"):
        parse_recipe({**values, "steps": [{"kind": "fold_batch_norm"}, step]})
