"""Detection and segmentation architectures by name, built by torchvision, for images of one size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from cveff.errors import CheckpointError, CveffError
from cveff.runtime.errors import first_line
from cveff.runtime.input_spec import InputSpec
from cveff.tasks.detector import AnchorDetector
from cveff.tasks.segmenter import Segmenter

Task = Literal["classification", "detection", "segmentation"]

MAX_SEGMENTED = 255
"""Classes of a segmentation: a mask has one byte a pixel, and 255 is what the model did not see."""


@dataclass(frozen=True)
class TaskArchitecture:
    """One architecture.

    Attributes:
        task: "detection" or "segmentation".
        input: the images its published weights were made for, at one size.
        build: keyword arguments -> torchvision's network, weights random.
        arguments: what the builder takes; torchvision itself passes over what it does not know.
        published: arguments that its published weights need.
        multiple: what both sides of an image must be a multiple of.
        is_fixed: whether no other size than the default works.
    """

    task: Task
    input: InputSpec
    build: Callable[..., nn.Module]
    arguments: tuple[str, ...]
    published: Mapping[str, Any] = field(default_factory=dict)
    multiple: int = 1
    is_fixed: bool = False


def _torchvision(name: str) -> Callable[..., nn.Module]:
    def build(**arguments: Any) -> nn.Module:
        return get_model(name, weights=None, weights_backbone=None, **arguments)

    return build


def _retinanet(num_classes: int = 91, **arguments: Any) -> nn.Module:
    """With frozen batch norms of epsilon 0, which is what its published weights are for."""
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50",
        weights=None,
        norm_layer=FrozenBatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    network = RetinaNet(backbone, num_classes, **arguments)
    for module in network.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
    return network


_SSD_INPUT = InputSpec(
    (320, 320), 3, (0.5,) * 3, (0.5,) * 3, interpolation="bilinear", enlarge=True, crop_mode="squash"
)
_RETINANET_INPUT = InputSpec((800, 800), interpolation="bilinear", enlarge=True, crop_mode="border")
_SEGMENTATION_INPUT = InputSpec((520, 520), interpolation="bilinear", enlarge=True, crop_mode="squash")

_DETECTION = ("num_classes", "score_thresh", "nms_thresh", "topk_candidates", "detections_per_img")


def _detector(build: Callable[..., nn.Module]) -> TaskArchitecture:
    # torchvision pads to a multiple of 32 and clips boxes to what was there before.
    return TaskArchitecture("detection", _RETINANET_INPUT, build, _DETECTION, multiple=32)


def _deeplab(name: str) -> TaskArchitecture:
    arguments = ("num_classes", "aux_loss")
    return TaskArchitecture(
        "segmentation", _SEGMENTATION_INPUT, _torchvision(name), arguments, {"aux_loss": True}
    )


ARCHITECTURES: Mapping[str, TaskArchitecture] = {
    "ssdlite320_mobilenet_v3_large": TaskArchitecture(
        "detection",
        _SSD_INPUT,
        _torchvision("ssdlite320_mobilenet_v3_large"),
        (*_DETECTION, "width_mult"),
        is_fixed=True,
    ),
    "retinanet_resnet50_fpn": _detector(_retinanet),
    "retinanet_resnet50_fpn_v2": _detector(_torchvision("retinanet_resnet50_fpn_v2")),
    "lraspp_mobilenet_v3_large": TaskArchitecture(
        "segmentation", _SEGMENTATION_INPUT, _torchvision("lraspp_mobilenet_v3_large"), ("num_classes",)
    ),
    "deeplabv3_mobilenet_v3_large": _deeplab("deeplabv3_mobilenet_v3_large"),
    "deeplabv3_resnet50": _deeplab("deeplabv3_resnet50"),
}


def build(name: str, arguments: Mapping[str, Any], size: tuple[int, int]) -> nn.Module:
    """The network, weights random, in evaluation mode.

    Args:
        name: one of `ARCHITECTURES`.
        arguments: of torchvision's builder: `num_classes`, and `score_thresh`, `nms_thresh`, `topk_candidates`,
            `detections_per_img` of a detector, `width_mult` of SSDLite, `aux_loss` of a DeepLab.
        size: (height, width) of the images.

    Returns:
        an `AnchorDetector` or a `Segmenter`.

    Raises:
        CveffError: a size or an argument that the architecture does not take.
    """
    found = ARCHITECTURES[name]
    if found.is_fixed and size != found.input.size:
        raise CveffError(f"{name} takes images of {found.input.size}, not {size}; leave image_size out")
    if any(side % found.multiple for side in size):
        raise CveffError(
            f"{name} takes images whose sides are multiples of {found.multiple}, not {size}; give another image_size"
        )
    unknown = sorted(set(arguments) - set(found.arguments))
    if unknown:
        raise CveffError(
            f"{name} does not take the arguments {unknown}; it takes {', '.join(found.arguments)}"
        )
    num_classes = arguments.get("num_classes", 2)
    if num_classes < 2:
        raise CveffError(f"{name} was asked for {num_classes} classes; give 2 or more, the background is one")
    if found.task == "segmentation" and num_classes > MAX_SEGMENTED:
        raise CveffError(f"{name} was asked for {num_classes} classes; a mask holds {MAX_SEGMENTED} at most")
    try:
        network = found.build(**arguments)
    except (TypeError, ValueError) as error:
        raise CveffError(f"{name} cannot be built with these arguments: {first_line(error)}") from error
    if found.task == "detection":
        return AnchorDetector(network, size).eval()
    return Segmenter(network).eval()


def published_labels(name: str) -> tuple[str, ...]:
    """Names of the classes that torchvision's published weights know, background first."""
    return tuple(get_model_weights(name).DEFAULT.meta["categories"])


def load_published(module: nn.Module, name: str) -> None:
    """Let torchvision download its weights (needs a network) and load them.

    Raises:
        CheckpointError: they cannot be had, or `module` was built with other arguments.
    """
    try:
        state = get_model_weights(name).DEFAULT.get_state_dict(progress=False, check_hash=True)
        module.load_state_dict(state)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"pretrained weights of {name} cannot be had ({first_line(error)}); check the network, leave num_classes "
            "and labels out, or give a file with weights=…"
        ) from error
