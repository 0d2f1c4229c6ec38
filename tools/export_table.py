"""Which architectures export, and how closely the ONNX file agrees with PyTorch: a table and its JSON.

Weights are random but not degenerate: batch norms hold the statistics of a few batches, layer scales, biases
and zero-initialised heads are drawn, so that logits depend on the image ("sensitivity": how far the logits of
two images are apart, relative to the largest). Rows already measured are kept, so an interrupted run continues.

python tools/export_table.py                                # all, 10 to 30 minutes on two cores
python tools/export_table.py --only resnet18 fastvit_t8 --force
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import cveff
from cveff.backbones.reparameterize import Reparameterize, has_branches
from cveff.errors import CveffError
from cveff.export.normalize import NormalizedModel, deployable
from cveff.export.onnx import OPSET, TOLERANCE, difference, example_images
from cveff.files import write_json
from cveff.measure.parity import relative_difference
from cveff.runtime.engines import open_file
from cveff.runtime.machine import describe

RESULT = Path(__file__).resolve().parents[1] / "model_zoo" / "results" / "export_table.json"
FAMILIES = {
    "residual": "resnet18 resnet26d resnext50_32x4d seresnet18 skresnet18 res2net50_14w_8s resnest14d resnetv2_50 "
    "legacy_seresnet18 gcresnet33ts ecaresnet26t cspresnet50 tresnet_m rdnet_tiny",
    "plain and dense": "vgg11_bn densenet121 inception_v3 xception41 dpn48b dla46_c hrnet_w18_small vovnet39a "
    "selecsls42 darknet53 cs3darknet_s hgnetv2_b0",
    "regular": "regnetx_002 regnety_002 regnetz_005 nf_regnet_b0 nfnet_f0 dm_nfnet_f0",
    "mobile": "mobilenetv2_050 mobilenetv3_small_100 mobilenetv4_conv_small mobilenetv4_hybrid_medium "
    "efficientnet_b0 tf_efficientnet_lite0 efficientnetv2_rw_t mnasnet_small fbnetc_100 mixnet_s hardcorenas_a "
    "tinynet_e lcnet_035 lcnetv2_small ghostnet_050 ghostnetv2_100 ghostnetv3_050 rexnet_100 fasternet_t0 "
    "starnet_s050 mobilenet_edgetpu_v2_xs",
    "re-parameterisable": "repvgg_a0 mobileone_s0 fastvit_t8 repvit_m0_9 repghostnet_050 mambaout_femto",
    "hybrid": "efficientformer_l1 efficientformerv2_s0 efficientvit_b0 efficientvit_m0 edgenext_xx_small "
    "mobilevit_xxs mobilevitv2_050 poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18 levit_128s "
    "coatnet_nano_rw_224 maxvit_nano_rw_256 maxvit_tiny_tf_224 nextvit_small shvit_s1 swiftformer_xs "
    "tiny_vit_5m_224 coat_lite_tiny visformer_tiny botnet26t_256 halonet26t lambda_resnet26t",
    "transformer": "vit_tiny_patch16_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 "
    "deit3_small_patch16_224 beit_base_patch16_224 cait_xxs24_224 xcit_nano_12_p16_224 crossvit_tiny_240 "
    "eva02_tiny_patch14_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 twins_svt_small pvt_v2_b0 "
    "pit_ti_224 tnt_s_legacy_patch16_224 nest_tiny convit_tiny davit_tiny hiera_tiny_224 mvitv2_tiny volo_d1_224 "
    "focalnet_tiny_srf gcvit_xxtiny",
    "mixer and convnext": "convnext_atto convnextv2_atto inception_next_atto convmixer_768_32 mixer_s32_224 "
    "resmlp_12_224 gmlp_ti16_224 sequencer2d_s",
    "cveff": "small_resnet_s small_resnet_m",
}
MERGED = " (merged)"


def main() -> None:
    """Measure the rows that are missing and print all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="ARCHITECTURE", help="these rows alone")
    parser.add_argument("--force", action="store_true", help="measure rows again that are there already")
    parser.add_argument(
        "--out", type=Path, default=RESULT, help="the JSON file to continue (default: %(default)s)"
    )
    arguments = parser.parse_args()
    rows = _read(arguments.out)
    for family, names in FAMILIES.items():
        for name in names.split():
            if arguments.only and name not in arguments.only:
                continue
            for merged in (False, True) if family == "re-parameterisable" else (False,):
                row = name + (MERGED if merged else "")
                if row in rows and not arguments.force:
                    continue
                figures = measure(name, merged)
                if figures is None:
                    continue
                rows[row] = {"family": family, **figures}
                print(f"{row:40s} {rows[row]['status']}", flush=True)
                _write(arguments.out, rows)
                gc.collect()
    _show(rows)


def measure(name: str, merged: bool = False) -> dict[str, Any] | None:
    """Export one architecture and compare; None where there are no branches to merge."""
    torch.manual_seed(0)
    model = cveff.create(name)
    if merged and not has_branches(model.module):
        return None
    randomize(model.module, model)
    if merged:
        model = cveff.apply(model, Reparameterize())
    network = deployable(model.module, model.spec.input)
    figures: dict[str, Any] = {
        "parameters": model.num_parameters,
        "input": list(model.spec.input.size),
        "opset": OPSET,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        start = time.perf_counter()
        try:
            cveff.export(model, path, check=False)
            figures["seconds"] = round(time.perf_counter() - start, 1)
            proto = onnx.load(path)
            figures["nodes"] = len(proto.graph.node)
            figures["batch_norms_after_convolutions"] = unfolded_batch_norms(proto)
            figures["relative_difference"] = difference(path.read_bytes(), network, model)
        except CveffError as error:
            return {**figures, "status": "failed", "reason": str(error)}
        if figures["relative_difference"] > TOLERANCE:
            figures["from_float64"] = from_float64(path, network, model)
    with torch.inference_mode():
        first, second = network(torch.from_numpy(example_images(2, model))).numpy()
    figures["sensitivity"] = relative_difference(first, second)
    agrees = figures["relative_difference"] <= TOLERANCE
    return {**figures, "status": "agrees" if agrees else "differs"}


def from_float64(path: Path, network: NormalizedModel, model: cveff.Model) -> dict[str, float]:
    """How far PyTorch and the file each are from the network in double precision: alike, it is rounding alone."""
    images = example_images(3, model)
    exact = copy.deepcopy(network).double()
    x = torch.from_numpy(images)
    with torch.inference_mode():
        pixels = ((x.double() - exact.offset) * exact.scale).permute(0, 3, 1, 2).contiguous()
        expected = exact.network(pixels).numpy()
        found = network(x).numpy()
    with open_file("onnxruntime", path, threads=0) as session:
        return {
            "torch": relative_difference(found, expected),
            "onnxruntime": relative_difference(session(images), expected),
        }


def randomize(network: nn.Module, model: cveff.Model) -> None:
    """Give `network` weights under which every part of it matters to the logits, in place."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        values = parameter.data
        if values.numel() < 2 or values.min() != values.max():
            if values.numel() == 1 and values.abs() < 0.01:
                values.fill_(0.5)
            continue
        if values.ndim == 1 and not name.endswith("bias"):
            # Scales: of layers (1e-6 or 0 at the start) and of normalisation (1).
            level = float(values.flatten()[0])
            level = 0.5 if abs(level) < 0.01 else level
            values.copy_(level * (0.8 + 0.4 * torch.rand(values.shape, generator=generator)))
        else:
            values.add_(0.02 * torch.randn(values.shape, generator=generator))
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [module.momentum for module in norms]
    network.eval()
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # the average over all batches
        module.train()
    if norms:
        spec = model.spec.input
        with torch.no_grad():
            for seed in range(2):
                images = torch.from_numpy(example_images(4, model, seed)).permute(0, 3, 1, 2).float()
                mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (spec.mean, spec.std))
                network((images / 255 - mean) / std)
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
    network.eval()


def unfolded_batch_norms(proto: onnx.ModelProto) -> int:
    """Batch norms that read a convolution nothing else reads: they could have been folded into it."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    readers: dict[str, int] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    return sum(
        node.op_type == "BatchNormalization"
        and node.input[0] in makers
        and makers[node.input[0]].op_type == "Conv"
        and readers[node.input[0]] == 1
        for node in proto.graph.node
    )


def _read(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else {}


def _write(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    agreeing = sum(row["status"] == "agrees" for row in rows.values())
    write_json(
        path,
        {
            "command": "python tools/export_table.py",
            "tolerance": TOLERANCE,
            "agreeing": agreeing,
            "measured": len(rows),
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("cveff", "torch", "timm", "onnx", "onnxscript", "onnxslim", "onnxruntime")
            },
            "machine": {"cpu": describe()["cpu"], "cores": len(os.sched_getaffinity(0))},
            "rows": rows,
        },
    )


def _show(rows: dict[str, dict[str, Any]]) -> None:
    table = Table(
        title=f"{sum(row['status'] == 'agrees' for row in rows.values())} of {len(rows)} agree to {TOLERANCE:g}"
    )
    columns = ("architecture", "parameters", "seconds", "opset", "relative difference", "nodes", "status")
    for column in columns:
        table.add_column(column, justify="left" if column in ("architecture", "status") else "right")
    for name, row in rows.items():
        relative = row.get("relative_difference")
        table.add_row(
            name,
            f"{row['parameters']:,}",
            str(row.get("seconds", "")),
            str(row["opset"]),
            "" if relative is None else f"{relative:.1e}",
            str(row.get("nodes", "")),
            row["status"] + (f": {row['reason']}" if "reason" in row else ""),
        )
    Console(width=None if os.isatty(1) else 180).print(table)


if __name__ == "__main__":
    main()
