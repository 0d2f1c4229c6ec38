"""Which architectures can be pruned, and whether the result holds: half of every group, chosen at random.

Every architecture is analysed, cut to 50% (rounded to 8 where a group is larger than 16), compared with the dense
network whose removed channels are zeroed (the oracle), trained for one step, exported and compared with the file.
torch-pruning does the same work with its authors' settings for timm models
(github.com/VainF/Torch-Pruning/blob/master/examples/timm_models/prune_timm_models.py): heads of attention layers
told to it by hand before, their sizes written back by hand after. It has no oracle: "ok" there means that the
network runs, trains and exports.

One process a row, with a time limit; rows that are in the file are not measured again. The peer may live in an
environment of its own, which needs timm, onnxscript and onnxruntime besides:

python -m venv --system-site-packages peer && peer/bin/pip install torch-pruning==1.6.1
python tools/benchmarks/prune_coverage.py --peer-python peer/bin/python    # two hours on two cores
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import common

LISTED = (
    "resnet50",
    "resnext50_32x4d",
    "regnety_008",
    "densenet121",
    "vgg11_bn",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small",
    "efficientnet_b0",
    "efficientnet_lite0",
    "ghostnetv2_100",
    "mnasnet_100",
    "hardcorenas_a",
    "lcnet_100",
    "repvgg_a0",
    "mobileone_s0",
    "fastvit_t8",
    "repvit_m1",
    "hgnetv2_b0",
    "convnext_tiny",
    "convnextv2_nano",
    "inception_next_tiny",
    "edgenext_small",
    "poolformerv2_s12",
    "vit_small_patch16_224",
    "deit3_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "levit_128s",
    "mobilevitv2_050",
    "efficientformerv2_s0",
    "tiny_vit_5m_224",
    "starnet_s1",
)
"""The families the bar counts."""
MORE = (
    "beit_base_patch16_224",
    "caformer_s18",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "coatnet_nano_rw_224",
    "convit_tiny",
    "crossvit_9_240",
    "cs3darknet_s",
    "davit_tiny",
    "dla60_res2next",
    "dpn68",
    "eca_botnext26ts_256",
    "efficientvit_b0",
    "efficientvit_m0",
    "ese_vovnet19b_dw",
    "eva02_tiny_patch14_224",
    "fasternet_t0",
    "focalnet_tiny_srf",
    "gcresnet33ts",
    "gcvit_xxtiny",
    "gernet_s",
    "ghostnetv3_100",
    "halonet26t",
    "hiera_tiny_224",
    "hrnet_w18_small",
    "inception_v3",
    "mambaout_femto",
    "maxvit_rmlp_pico_rw_256",
    "mixer_s32_224",
    "mvitv2_tiny",
    "nest_tiny",
    "nextvit_small",
    "pit_ti_224",
    "pvt_v2_b0",
    "rdnet_tiny",
    "repghostnet_050",
    "res2net50_14w_8s",
    "resnest14d",
    "resnetv2_50",
    "rexnet_100",
    "selecsls42b",
    "shvit_s1",
    "skresnet18",
    "tf_efficientnetv2_b0",
    "tnt_s_legacy_patch16_224",
    "twins_svt_small",
    "visformer_tiny",
    "vit_relpos_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "volo_d1_224",
    "xception41",
    "xcit_nano_12_p16_224",
)
QUICK = ("mobilenetv4_conv_small", "levit_128s")
TOLERANCE = 1e-4
COLUMNS = (
    "architecture",
    "analysis s",
    "groups",
    "frozen",
    "oracle",
    "GMAC",
    "",
    "Mparam",
    "",
    "trained",
    "agrees",
    "peer",
)


def main() -> None:
    arguments = _arguments()
    if arguments.row:
        one_row(arguments)
        return
    names = QUICK if arguments.quick else (*LISTED, *MORE)
    out = arguments.out or common.output("prune_coverage.json", arguments.quick)
    results = common.Results(
        out,
        __file__,
        {"ratio": 0.5, "round_to": 8, "seed": 0, "threads": arguments.threads, "jobs": arguments.jobs},
        fresh=arguments.fresh,
    )
    rows = results.values.setdefault("rows", {})
    missing = [
        (who, name) for who in ("cveff", "torch-pruning") for name in names if who not in rows.get(name, {})
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        pending = {pool.submit(in_process, name, who, arguments): (who, name) for who, name in missing}
        for done in as_completed(pending):
            who, name = pending[done]
            rows.setdefault(name, {})[who] = done.result()
            results.values["summary"] = summary(rows)
            results.save()
    results.values["rows"] = rows = {name: rows[name] for name in (*names, *rows) if name in rows}
    results.values["summary"] = summary(rows)
    results.save()
    common.table("Half of every group", COLUMNS, [shown(name, rows[name]) for name in names])
    common.console.print_json(json.dumps(results.values["summary"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has torch-pruning")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time; above 1 they share the cores")
    parser.add_argument("--limit", type=int, default=900, help="seconds a row may take")
    parser.add_argument("--quick", action="store_true", help="two architectures")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument(
        "--out", type=Path, help="JSON file; by default model_zoo/results/prune_coverage.json"
    )
    parser.add_argument("--row", nargs=2, metavar=("WHO", "NAME"), help=argparse.SUPPRESS)
    parser.add_argument("--row-out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def in_process(name: str, who: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row, in a process of its own."""
    python = sys.executable if who == "cveff" else arguments.peer_python
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        command = [python, __file__, "--row", who, name, "--row-out", str(file)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(arguments.threads),
            "TIMM_FUSED_ATTN": "1" if who == "cveff" else "0",
        }
        try:
            done = subprocess.run(
                command, timeout=arguments.limit, capture_output=True, text=True, env=environment, check=False
            )
        except subprocess.TimeoutExpired:
            return {"ok": False, "error": f"no result in {arguments.limit} s", "load_average": load}
        if not file.is_file():
            line = (done.stderr.strip() or "no message").splitlines()[-1]
            return {"ok": False, "error": f"exit code {done.returncode}: {line[:200]}", "load_average": load}
        return {**json.loads(file.read_text(encoding="utf-8")), "load_average": load}


def one_row(arguments: argparse.Namespace) -> None:
    """Measure one architecture and write what was found, also where it fails on the way."""
    import torch

    torch.manual_seed(0)
    who, name = arguments.row
    row: dict[str, Any] = {"stage": "create"}
    try:
        (ours if who == "cveff" else theirs)(name, row)
        row["ok"] = row["oracle"] <= TOLERANCE if who == "cveff" else True
        row["ok"] = bool(row["ok"] and row["trained"] and row["agrees"])
        row.pop("stage")
    except Exception as error:  # noqa: BLE001 - a row that fails is a result
        message = " ".join(str(error).split())[:300]
        row |= {"ok": False, "error": f"{type(error).__name__} ({row['stage']}): {message}"}
        traceback.print_exc()
    arguments.row_out.write_text(json.dumps(row), encoding="utf-8")


def ours(name: str, row: dict[str, Any]) -> None:
    """Analyse, cut, and put the result to every test."""
    import numpy as np
    import torch

    import cveff
    from cveff.compress.analysis import analyze, check
    from cveff.compress.proof import awakened
    from cveff.errors import CveffError

    model = cveff.create(name)
    spec = model.spec.input
    row["stage"] = "analysis"
    start = time.perf_counter()
    analysis = analyze(model.module, spec)
    row["analysis_s"] = time.perf_counter() - start
    row["groups"] = len(analysis.groups)
    row["frozen"] = {
        group.name: group.reason for group in analysis.frozen if "network's output" not in group.reason
    }
    row["stage"] = "oracle"
    random = np.random.default_rng(0)
    keep = {group.name: half(group.size, random) for group in analysis.groups}
    images = torch.randn(2, spec.channels, *spec.size)
    # With weights of which none is multiplied by zero; training and export start from those of the architecture.
    row["oracle"] = check(awakened(model.module, 0), analysis, keep, images)
    edit = analysis.edit(keep, model.module)
    without = no_gradient(model.module, images)
    row["macs"], row["parameters"] = [macs(model.module, images[:1])], [count(model.module)]
    small = edit.apply(model.module)
    row["macs"].append(macs(small, images[:1]))
    row["parameters"].append(count(small))
    row["stage"] = "training"
    row["trained"] = trains(small, images, without)
    row["stage"] = "export"
    with tempfile.TemporaryDirectory() as folder:
        pruned = replace(model, module=small.eval(), spec=replace(model.spec, edits=(edit,)))
        try:
            cveff.export(pruned, Path(folder) / "model.onnx")  # compares the file with the network
            row["agrees"] = True
        except CveffError as error:
            row["agrees"], row["error"] = False, str(error)[:300]


def theirs(name: str, row: dict[str, Any]) -> None:
    """The same with torch-pruning."""
    import timm
    import torch
    import torch_pruning
    from torch import nn

    row["version"] = importlib.metadata.version("torch-pruning")
    module = timm.create_model(name).eval()
    size = module.default_cfg.get("test_input_size", module.default_cfg["input_size"])
    size = module.default_cfg["input_size"] or size
    images = torch.randn(2, *size)
    without = no_gradient(module, images)
    row["macs"], row["parameters"] = [macs(module, images[:1])], [count(module)]
    row["stage"] = "pruning"
    heads, ignored = {}, []
    for inner in module.modules():
        if isinstance(inner, nn.Linear) and inner.out_features == module.num_classes:
            ignored.append(inner)
        if hasattr(inner, "num_heads") and hasattr(inner, "qkv"):
            heads[inner.qkv] = inner.num_heads
    start = time.perf_counter()
    pruner = torch_pruning.pruner.BasePruner(
        module,
        images[:1],
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        round_to=8,
        num_heads=heads,
        prune_num_heads=bool(heads),
        head_pruning_ratio=0.5,
        ignored_layers=ignored,
    )
    pruner.step()
    row["analysis_s"] = time.perf_counter() - start
    for inner in module.modules():
        if hasattr(inner, "num_heads") and hasattr(inner, "qkv") and inner.qkv in heads:
            inner.num_heads = heads[inner.qkv]
            inner.head_dim = inner.qkv.out_features // (3 * inner.num_heads)
            inner.attn_dim = inner.num_heads * inner.head_dim
    row["stage"] = "running"
    row["macs"].append(macs(module, images[:1]))
    row["parameters"].append(count(module))
    row["stage"] = "training"
    row["trained"] = trains(module, images, without)
    row["stage"] = "export"
    row["difference"] = exported_difference(module.eval(), images)
    row["agrees"] = row["difference"] <= TOLERANCE


def half(size: int, random: Any) -> Any:
    """A random half of a group, a multiple of 8 where it has more than 16 units; (size,) bool."""
    import numpy as np

    count = size // 2 if size <= 16 else 8 * max(1, round(size / 16))
    mask = np.zeros(size, bool)
    mask[random.permutation(size)[: max(1, count)]] = True
    return mask


def count(module: Any) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def macs(module: Any, images: Any) -> int:
    """Multiply-accumulates on `images`, products inside attention included."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learned:  # the counter fails at views that are made of them without gradients
        parameter.requires_grad_(False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(images)
    for parameter in learned:
        parameter.requires_grad_(True)
    return counter.get_total_flops() // 2


def trains(module: Any, images: Any, without: set[str]) -> bool:
    """Whether one step has a finite loss and reaches every parameter that it reached before pruning."""
    import torch

    missing = no_gradient(module, images) - without
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    logits = module.train()(images)
    logits = logits[0] if isinstance(logits, tuple) else logits
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return bool(loss.isfinite()) and not missing


def no_gradient(module: Any, images: Any) -> set[str]:
    """Names of parameters that the output does not depend on, or not finitely."""
    module.zero_grad()
    module.eval()
    logits = module(images)
    logits.square().sum().backward()
    found = {
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all()
    }
    module.zero_grad()
    return found


def exported_difference(module: Any, images: Any) -> float:
    """Relative difference between the network and its ONNX file."""
    import onnxruntime
    import torch

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        torch.onnx.export(module, (images,), str(file), dynamo=True, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        logits = module(images).numpy()
    return float(abs(found - logits).max() / abs(logits).max())


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    """How many of the listed families, and of all, hold; the slowest analyses."""
    found: dict[str, Any] = {}
    for who in ("cveff", "torch-pruning"):
        for label, names in (("listed", LISTED), ("all", tuple(rows))):
            mine = [rows[name][who] for name in names if who in rows.get(name, {})]
            found[f"{who} {label}"] = {"ok": sum(row["ok"] for row in mine), "of": len(mine)}
    seconds = {
        name: row["cveff"]["analysis_s"] for name, row in rows.items() if "analysis_s" in row.get("cveff", {})
    }
    found["slowest_analysis_s"] = dict(sorted(seconds.items(), key=lambda item: -item[1])[:3])
    return found


def shown(name: str, row: dict[str, Any]) -> tuple[object, ...]:
    """A line of the table."""
    mine, peer = row["cveff"], row["torch-pruning"]
    whose = "ok" if peer["ok"] else peer.get("error", "differs")[:60]
    if "parameters" not in mine or len(mine["parameters"]) < 2:
        return (name, *[None] * 9, mine.get("error", "")[:60], whose)
    work = [value / 1e9 for value in mine["macs"]]
    size = [value / 1e6 for value in mine["parameters"]]
    return (
        name,
        mine["analysis_s"],
        mine["groups"],
        len(mine["frozen"]),
        mine["oracle"],
        *work,
        *size,
        mine.get("trained"),
        mine.get("agrees", mine.get("error", "")[:60]),
        whose,
    )


if __name__ == "__main__":
    main()
