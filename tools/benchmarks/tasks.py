"""Do exported detectors and segmentation networks answer as torchvision's own, and how fast are they?

Weights are random, since none are bundled; the last layers are scaled so that scores differ between places and enough
of them pass the threshold. Photographs (scikit-image) are brought to the model's size once; torchvision and the files
get the same pixels, and torchvision resizes nothing.

"matched": detections with a counterpart of the same class, intersection over union 0.99 and score within 0.001, or
equal pixels of a mask, of all. Times: ONNX Runtime against PyTorch eager, both with suppression, in turns.

python tools/benchmarks/tasks.py            # all networks
python tools/benchmarks/tasks.py --quick    # SSDLite and LR-ASPP
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np
import skimage.data
import torch
from torch import nn
from torchvision.models import get_model

import cveff
from cveff.measure.detections import agreement
from cveff.model import Model
from cveff.runtime.preprocess import preprocess
from cveff.tasks.architectures import ARCHITECTURES

SIZES = {
    "ssdlite320_mobilenet_v3_large": (320, 320),
    "retinanet_resnet50_fpn_v2": (320, 320),
    "lraspp_mobilenet_v3_large": (320, 320),
    "deeplabv3_mobilenet_v3_large": (320, 320),
}
QUICK = ("ssdlite320_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
COLUMNS = ("network", "file", "answers", "matched", "PyTorch ms", "ONNX Runtime ms", "speed-up")


def main() -> None:
    """Every network, each as its two files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    names = QUICK if arguments.quick else tuple(SIZES)
    settings = {"sizes": SIZES, "rounds": arguments.rounds, "weights": "random, last layers scaled"}
    results = common.Results(common.output("tasks.json", arguments.quick), __file__, settings)
    rows = results.values.setdefault("rows", {})
    for name in names:
        if name not in rows:
            rows[name] = measure(name, arguments.rounds)
            results.save()
    shown = [
        [
            name,
            kind,
            values["answers"],
            values["matched"],
            *(values["latency"][key] for key in ("torch_ms", "file_ms", "speedup")),
        ]
        for name in names
        for kind, values in rows[name].items()
    ]
    common.table("Detection and segmentation", COLUMNS, shown)


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Agreement on photographs and times at batch 1, one thread, by kind of file."""
    torch.manual_seed(0)
    model = cveff.create(name, image_size=SIZES[name])
    images = photographs(model)
    spread(model, images)
    expected = torchvisions(name, model, images)
    is_detector = model.spec.task == "detection"
    option, kinds = ("nms", ("onnx", "none")) if is_detector else ("output", ("logits", "labels"))
    found = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            path = cveff.export(model, Path(folder) / f"{kind}.onnx", **{option: kind})
            with cveff.runtime.open(path) as engine:
                if is_detector:
                    result = agreement(engine.detect(images), expected)
                    answers, share = result.expected, result.share
                    more = {"min_iou": result.min_iou, "max_score_difference": result.max_score_difference}
                else:
                    masks = engine.segment(images)
                    truth = np.stack(expected)
                    answers, share = truth.size, float((masks == truth).mean())
                    more = {"classes": len(np.unique(truth))}
            eager, file = cveff.bench({"torch": model, "file": path}, threads=1, rounds=rounds, memory=False)
        latency = {
            "torch_ms": eager.median_ms,
            "file_ms": file.median_ms,
            "speedup": file.speedup,
            "speedup_interval": list(file.speedup_interval),
            "rounds": file.rounds,
        }
        found[f"{option}={kind}"] = {"answers": answers, "matched": share, **more, "latency": latency}
        common.console.print(name, kind, found[f"{option}={kind}"])
    return found


def photographs(model: Model) -> np.ndarray:
    """Six pictures at the model's size, (6, H, W, 3) uint8."""
    names = ("astronaut", "chelsea", "coffee", "rocket", "immunohistochemistry", "colorwheel")
    return preprocess([getattr(skimage.data, name)()[..., :3] for name in names], model.spec.input)


def spread(model: Model, images: np.ndarray) -> None:
    """Scale the last layers, in place, so that logits differ between places and classes.

    Batch statistics are of the photographs, or random weights would let signals die out on the way."""
    spec = model.spec.input
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
    norms = [module for module in model.module.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        if norms:
            model.module(pixels)
        model.module.eval()
        module: Any = model.module
        if model.spec.task == "segmentation":
            logits = module(pixels)
            last = [layer for layer in module.classifier.modules() if isinstance(layer, nn.Conv2d)]
            scale(last[-2:] if module.takes_all_features else last[-1:], 2 / float(logits.std()))
            return
        outputs = module.head(list(module.backbone(pixels).values()))
        # RetinaNet's scores begin at 0.01 each, SSD's are shares of one: more must differ for some to stand out.
        logit_spread = 2.0 if module.has_background else 0.5
        for part, key, size in (
            (module.head.classification_head, "cls_logits", logit_spread),
            (module.head.regression_head, "bbox_regression", logit_spread / 2),
        ):
            lists = getattr(part, "module_list", None)
            last = (
                [part.cls_logits if key == "cls_logits" else part.bbox_reg]
                if lists is None
                else [block[-1] for block in lists]
            )
            scale(last, size / float(outputs[key].std()))


def scale(layers: list[nn.Conv2d], factor: float) -> None:
    """Multiply weights in place."""
    for layer in layers:
        layer.weight.mul_(factor)


def torchvisions(name: str, model: Model, images: np.ndarray) -> list[Any]:
    """What torchvision's own network answers: detections, or a mask, of each image."""
    spec = model.spec.input
    is_detector = model.spec.task == "detection"
    sizes = {} if ARCHITECTURES[name].is_fixed else {"min_size": min(spec.size), "max_size": max(spec.size)}
    network = get_model(
        name,
        weights=None,
        weights_backbone=None,
        num_classes=len(model.spec.labels),
        **(sizes if is_detector else {}),
    )
    network.load_state_dict(model.module.state_dict())
    network.eval()
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        if is_detector:
            return [{key: value.numpy() for key, value in image.items()} for image in network(list(pixels))]
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
        return list(network((pixels - mean) / std)["out"].argmax(1).numpy().astype(np.uint8))


if __name__ == "__main__":
    main()
