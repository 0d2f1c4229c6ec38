"""Glance and focus: crops lie where the class is, views are the image's pixels, and stages are the network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import cveff
import cveff.runtime
from cveff.compress import Prune
from cveff.data import Data
from cveff.data import load as load_data
from cveff.dynamic import EarlyExit, GlanceFocus, Goal, ReduceTokens, Views
from cveff.dynamic.class_activation import class_activation, grid_of
from cveff.dynamic.focus_network import FocusNetwork, area_weights, cropped
from cveff.edits import edit_from_json, edit_to_json
from cveff.errors import CveffError, RecipeError, StepError
from cveff.export.exits import export_stages
from cveff.export.onnx import example_images
from cveff.export.verify import verify
from cveff.model import Model
from cveff.recipe import parse_recipe
from cveff.runtime.engines import available_engines, open_file
from cveff.target import Target
from cveff.train import Train
from cveff.train.objective import CrossEntropy

TARGET = Target(
    name="one", description="one thread", candidates=(("onnxruntime", "fp32"),), threads=1, batch_sizes=(1, 4)
)
VIT = {"depth": 2, "embed_dim": 24, "num_heads": 2}


class Colours(nn.Module):
    """Says which channel a view has most of: four classes that sit wherever their colour does."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4, affine=False)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 4)

    def forward_head(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.mean((2, 3), keepdim=True))[:, :, 0, 0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def patches(corners: list[tuple[int, int]], size: tuple[int, int] = (32, 48)) -> torch.Tensor:
    """Dark images with one small patch each, of the colour of its number."""
    images = torch.zeros(len(corners), 4, *size)
    for index, (top, left) in enumerate(corners):
        images[index, index % 4, top : top + 6, left : left + 6] = 1
    return images


def glance_focus(
    architecture: str, size: int | tuple[int, int], arguments: dict[str, Any] | None = None, **settings: Any
) -> Model:
    torch.manual_seed(0)
    model = cveff.create(architecture, num_classes=5, image_size=size, timm_arguments=arguments)
    return cveff.apply(model, GlanceFocus(train=None, **settings))


def pixels(batch: np.ndarray, model: Model) -> torch.Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.spec.input.mean, model.spec.input.std))
    return (torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255 - mean) / std


def test_the_first_crop_holds_the_patch_wherever_it_is() -> None:
    corners = [(0, 0), (0, 42), (26, 0), (26, 42), (13, 21), (5, 30), (20, 8)]
    images = patches(corners)
    network = FocusNetwork(Colours(), (32, 48), (16, 24), num_crops=2).eval()
    glance, (first, second) = network.views(images)
    for index, ((top, left), (crop_top, crop_left)) in enumerate(
        zip(corners, first.corner.tolist(), strict=True)
    ):
        assert crop_top <= top and top + 6 <= crop_top + 16
        assert crop_left <= left and left + 6 <= crop_left + 24
        assert glance[index].argmax() == first.logits[index].argmax() == index % 4
        assert (
            first.logits[index].max() > glance[index].max()
        )  # a patch fills more of the crop than of the image
    assert (first.corner != second.corner).any(1).all()  # the next crop looks elsewhere
    top, left = first.corner[1].tolist()
    assert torch.equal(
        cropped(images, first.corner, (16, 24))[1], images[1, :, top : top + 16, left : left + 24]
    )
    answers = network.answers(images)
    assert torch.equal(answers[0], glance)
    torch.testing.assert_close(answers[1], (glance + first.logits) / 2)
    torch.testing.assert_close(answers[2], (glance + first.logits + second.logits) / 3)


def test_crops_stay_in_the_image_and_a_view_may_be_all_of_it() -> None:
    images = torch.rand(3, 4, 20, 28)
    for view in ((20, 28), (19, 27), (20, 8)):
        network = FocusNetwork(Colours(), (20, 28), view, num_crops=4).eval()
        for look in network.views(images)[1]:
            assert torch.isfinite(look.logits).all() and (look.corner >= 0).all()
            assert (look.corner <= torch.tensor([20 - view[0], 28 - view[1]])).all()
    whole = FocusNetwork(Colours(), (20, 28), (20, 28), num_crops=2).eval()
    for logits in whole.answers(images):
        torch.testing.assert_close(logits, Colours().eval()(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "small"), [(32, 16), (9, 4), (7, 7), (5, 2)])
def test_the_small_copy_is_the_mean_of_areas(size: int, small: int) -> None:
    weights = area_weights(size, small)
    torch.testing.assert_close(weights.sum(1), torch.ones(small))
    if size % small == 0:
        image = torch.rand(1, 1, size, size)
        expected = F.avg_pool2d(image, size // small)
        torch.testing.assert_close(weights @ image @ weights.T, expected)


@pytest.mark.parametrize(
    ("architecture", "size", "arguments"),
    [
        ("resnet10t", (64, 96), {}),
        ("vit_tiny_patch16_224", (32, 48), {"global_pool": "avg", "class_token": False, **VIT}),
        ("swin_tiny_patch4_window7_224", (64, 96), {"depths": (1, 1, 1, 1), "embed_dim": 12}),
    ],
)
def test_of_a_linear_head_behind_a_mean_it_is_the_papers_map(
    architecture: str, size: tuple[int, int], arguments: dict[str, Any]
) -> None:
    """Maps, tokens and maps with channels last: the map's mean is the logit, where no norm stands between."""
    torch.manual_seed(0)
    model = cveff.create(architecture, num_classes=5, image_size=size, timm_arguments=arguments)
    network = model.module.eval()
    if hasattr(network, "fc_norm"):
        network.fc_norm = nn.Identity()
    with torch.no_grad():
        features = network.forward_features(torch.randn(3, 3, *size))
        logits = network.forward_head(features)
        found = class_activation(network, features, logits, size)
    assert found.shape[1] * 3 == found.shape[2] * 2  # rows and columns as the image's
    torch.testing.assert_close(found.mean((1, 2)), logits.max(1).values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pool", "prefix"), [({"global_pool": "token"}, 5), ({"global_pool": "map", "class_token": False}, 4)]
)
def test_of_other_heads_it_is_what_a_token_alone_is_called(pool: dict[str, Any], prefix: int) -> None:
    torch.manual_seed(0)
    arguments = {**VIT, **pool, "reg_tokens": 4}
    model = cveff.create("vit_tiny_patch16_224", num_classes=5, image_size=(32, 48), timm_arguments=arguments)
    network = model.module.eval()
    with torch.no_grad():
        features = network.forward_features(torch.randn(2, 3, 32, 48))
        logits = network.forward_head(features)
        found = class_activation(network, features, logits, (32, 48))
        for row in range(2):
            for column in range(3):
                token = features[:, prefix + 3 * row + column][:, None].expand(-1, prefix + 1, -1)
                expected = network.forward_head(token).gather(1, logits.argmax(1, keepdim=True))[:, 0]
                torch.testing.assert_close(found[:, row, column], expected, rtol=1e-4, atol=1e-5)


def test_single_positions_leave_batch_norms_as_they_are() -> None:
    network = Colours().train()
    images = patches([(0, 0), (20, 8)])
    features = network.forward_features(images)
    logits = network.forward_head(features)
    before = network.norm.running_mean.clone()
    class_activation(network, features, logits, (32, 48))
    assert torch.equal(network.norm.running_mean, before) and network.training and network.norm.training


def test_tokens_without_a_known_grid_take_the_views_shape() -> None:
    assert grid_of(24, nn.Identity(), (64, 96)) == (4, 6)
    assert grid_of(24, nn.Identity(), (96, 64)) == (6, 4)
    with pytest.raises(
        StepError, match=r"gives 13 tokens, which are no grid shaped like a view of \(32, 32\)"
    ):
        grid_of(13, nn.Identity(), (32, 32))


@pytest.mark.parametrize(
    ("architecture", "size", "settings"),
    [
        ("small_resnet_s", (16, 24), {"crops": 2}),
        ("vit_tiny_patch16_224", (64, 96), {"arguments": VIT, "policy": "learned"}),
    ],
)
def test_stages_are_the_network_on_every_engine_and_batch(
    architecture: str, size: tuple[int, int], settings: dict[str, Any], tmp_path: Path
) -> None:
    model = glance_focus(architecture, size, **settings)
    paths = export_stages(model, tmp_path, whole="model.onnx")
    graphs = [onnx.load(path).graph for path in paths]
    assert not {node.op_type for graph in graphs for node in graph.node} & {"Loop", "If", "NonZero", "Scan"}
    batches = {item.type.tensor_type.shape.dim[0].dim_param for graph in graphs for item in graph.input}
    assert batches == {"batch"}
    for engine in {"onnxruntime", "openvino"} & set(available_engines()):
        options = {"inference_precision": "f32"} if engine == "openvino" else {}
        sessions = [open_file(engine, path, threads=1, options=options) for path in paths]
        for count in (5, 1):
            batch = example_images(count, model)
            with torch.no_grad():
                expected = model.module.eval().answers(pixels(batch, model))  # type: ignore[operator]
            outputs = sessions[0].outputs(batch)
            found, carried = [outputs.pop("logits")], outputs
            for session in sessions[1:]:
                outputs = session.go_on({name: carried[name] for name in session.carried})
                found.append(outputs.pop("logits"))
                carried |= outputs
            assert len(found) == len(expected) == 1 + settings.get("crops", 1)
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-3, atol=1e-4)
        # Survivors alone get what they would have got among the others.
        batch = example_images(5, model)
        outputs = sessions[0].outputs(batch)
        everyone = sessions[1].go_on({name: outputs[name] for name in sessions[1].carried})["logits"]
        alone = sessions[1].go_on({name: outputs[name][1:3] for name in sessions[1].carried})["logits"]
        np.testing.assert_allclose(alone, everyone[1:3], rtol=1e-4, atol=1e-5)


def test_early_exits_of_a_network_that_chooses_are_exported(tmp_path: Path) -> None:
    """A file with several answers is compared at its own choices, too."""
    torch.manual_seed(0)
    model = cveff.create("vit_tiny_patch16_224", num_classes=5, image_size=48, timm_arguments=VIT)
    model = cveff.apply(model, [ReduceTokens(r=2), EarlyExit(exits=("blocks",), train=None)])
    assert len(export_stages(model, tmp_path)) == 2


@pytest.mark.parametrize(
    ("architecture", "size", "settings"),
    [
        ("small_resnet_s", (24, 40), {"view": (12, 16), "crops": 1}),
        ("vit_tiny_patch16_224", (64, 96), {"arguments": VIT, "policy": "learned"}),
    ],
)
def test_a_loaded_model_is_bit_equal(
    architecture: str, size: tuple[int, int], settings: dict[str, Any], tmp_path: Path
) -> None:
    model = glance_focus(architecture, size, **settings)
    edit = model.spec.edits[-1]
    assert isinstance(edit, Views) and edit.size == size and edit_from_json(edit_to_json(edit)) == edit
    cveff.save(model, tmp_path / "model")
    loaded = cveff.load(tmp_path / "model")
    assert loaded.spec == model.spec
    x = torch.randn(3, 3, *size)
    with torch.no_grad():
        answers = model.module.eval().answers(x)
        assert all(map(torch.equal, loaded.module.eval().answers(x), answers))
        assert torch.equal(model.module(x), answers[-1])


def test_a_policy_is_taught_what_its_crops_were_worth() -> None:
    model = glance_focus("small_resnet_s", (24, 40), policy="learned", crops=1)
    edit, network = model.spec.edits[-1], model.module.train()
    assert isinstance(edit, Views) and isinstance(network, FocusNetwork)
    images, targets = torch.randn(4, 3, 24, 40), torch.tensor([0, 1, 2, 3])
    objective = edit.constrained(CrossEntropy(), network)
    torch.manual_seed(3)
    loss = objective.loss(network, images, targets)
    torch.manual_seed(3)  # the same places are tried
    glance, (look,) = network.views(images)
    right = look.logits.softmax(1)[range(4), targets].detach()
    expected = F.binary_cross_entropy_with_logits(look.interest, right, reduction="sum")
    for logits in (glance, (glance + look.logits) / 2):
        expected = expected + F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert network.policy is not None and network.policy.layers[-1].weight.grad.abs().sum() > 0
    network.zero_grad()
    F.binary_cross_entropy_with_logits(look.interest, right).backward()
    assert network.network.stem.conv.weight.grad is None  # the policy reads the network and does not teach it


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits", seed=0)


@pytest.fixture(scope="module")
def bundle(digits: Data, quick_stages: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = cveff.create(
        "small_resnet_s", labels=digits.labels, image_size=8, channels=1, widths=[8, 16], depths=[1, 1]
    )
    train = Train(epochs=2, batch_size=64, optimizer="adamw", learning_rate=3e-3, warmup_epochs=0)
    step = GlanceFocus(view=5, crops=1, policy="learned", train=train)
    model = cveff.apply(model, step, data=digits, device="cpu")
    out = tmp_path_factory.mktemp("focus") / "focus.bundle"
    cveff.deploy(model, data=digits, target=TARGET, out=out, exits=Goal(accuracy_drop=20.0))
    return out


def test_a_deployed_bundle_leaves_after_the_glance_or_never(bundle: Path, digits: Data) -> None:
    with cveff.runtime.open(bundle) as engine:
        images = np.concatenate([part for part, _ in digits.evaluation.evaluation_batches(engine.spec)])
        assert engine.cascade is not None
        glance, focus = engine.cascade.exits(images)
        for threshold, expected in ((-np.inf, glance), (np.inf, focus)):
            logits, left = engine.cascade.answer(images, [threshold])
            assert np.array_equal(logits, expected) and (left == (threshold > 0)).all()
    assert (focus.argmax(1) == digits.evaluation.targets).mean() > 0.5  # it has learned from both views
    verified = verify(bundle, data=digits, threads=1)
    assert verified.ok, verified.problems


def test_a_bundles_own_script_says_where_an_image_left(bundle: Path, digits: Data, tmp_path: Path) -> None:
    with cveff.runtime.open(bundle) as engine:
        images, _ = next(digits.evaluation.evaluation_batches(engine.spec))
    photo = tmp_path / "digit.png"
    Image.fromarray(images[0, :, :, 0]).save(photo)
    command = [sys.executable, str(bundle / "run.py"), str(photo), "--json"]
    (image,) = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["images"]
    assert image["stage"] in ("glance", "the end")
    assert "glance" in (bundle / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"view": 0}, "view is 0"),
        ({"view": (8, 0)}, r"view is \(8, 0\)"),
        ({"crops": 0}, "crops is 0"),
        ({"policy": "dice"}, "policy is 'dice'; give one of activation, learned"),
        ({"method": "luck"}, "method is 'luck'"),
        ({"alpha": 2.0}, "alpha is 2.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(StepError, match=words):
        GlanceFocus(**settings)


def test_what_cannot_look_at_views_is_refused() -> None:
    with pytest.raises(StepError, match=r"view is \(64, 64\), larger than the model's images \(32, 32\)"):
        glance_focus("small_resnet_s", 32, view=64)
    with pytest.raises(StepError, match=r"mixer_s32_224 cannot look at views of \(32, 32\)"):
        glance_focus("mixer_s32_224", 64)
    with pytest.raises(StepError, match=r"vit_tiny_patch16_224 cannot look at views of \(8, 8\)"):
        glance_focus("vit_tiny_patch16_224", 32, VIT, view=8)
    with pytest.raises(StepError, match=r"crossvit_9_240 cannot look at views of \(120, 120\)"):
        glance_focus("crossvit_9_240", 240)
    resnet = cveff.create("small_resnet_s", num_classes=5, image_size=32)
    with pytest.raises(StepError, match="needs data"):
        cveff.apply(resnet, GlanceFocus())
    exits, views = EarlyExit(train=None), GlanceFocus(train=None)
    for first, second in ((exits, views), (views, exits), (views, views)):
        with pytest.raises(StepError, match="exits already"):
            cveff.apply(cveff.apply(resnet, first), second)
    with pytest.raises(StepError, match="prune comes after glance_focus; put glance_focus behind it"):
        cveff.apply(cveff.apply(resnet, views), Prune(ratio=0.5))
    with pytest.raises(CveffError, match="apply EarlyExit or GlanceFocus"):
        export_stages(resnet, Path("nowhere"))


def test_a_recipe_glances() -> None:
    steps: list[dict[str, Any]] = [{"kind": "glance_focus", "view": 4, "crops": 1, "train": {"epochs": 2}}]
    values = {"data": {"source": "digits"}, "train": {}, "steps": steps}
    recipe = parse_recipe(values)
    (step,) = recipe.steps
    assert isinstance(step, GlanceFocus) and (step.view, step.crops) == (4, 1)
    assert parse_recipe(recipe.to_json()) == recipe
    wide = parse_recipe({**values, "steps": [{"kind": "glance_focus", "view": [4, 6]}]}).steps[0]
    assert isinstance(wide, GlanceFocus) and wide.view == (4, 6)
    with pytest.raises(RecipeError, match="comes after glance_focus; put glance_focus behind it"):
        parse_recipe({**values, "steps": [*steps, {"kind": "cond_conv"}]})
