"""A figure for each of many architectures, each measured in a process of its own: a row that fails stops no other."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import common
import torch

import cveff
from cveff.model import Model

SIZES = {
    "resnet50": 64,
    "regnety_002": 64,
    "densenet121": 64,
    "vgg11_bn": 64,
    "mobilenetv2_100": 64,
    "mobilenetv3_large_100": 64,
    "mobilenetv4_conv_small": 64,
    "efficientnet_b0": 64,
    "efficientnet_lite0": 64,
    "ghostnetv2_100": 64,
    "lcnet_100": 64,
    "repvgg_a0": 64,
    "hgnetv2_b0": 64,
    "res2net50_14w_8s": 64,
    "fastvit_t8": 64,
    "convnext_atto": 64,
    "convnextv2_atto": 64,
    "inception_next_tiny": 64,
    "edgenext_xx_small": 64,
    "poolformerv2_s12": 64,
    "vit_tiny_patch16_224": 64,
    "deit3_small_patch16_224": 64,
    "swin_tiny_patch4_window7_224": 64,
    "swinv2_tiny_window8_256": 64,
    "levit_128s": 224,
    "mobilevitv2_050": 64,
    "efficientformerv2_s0": 224,
    "tiny_vit_5m_224": 64,
    "coatnet_nano_rw_224": 224,
    "efficientvit_b0": 64,
    "mixer_s32_224": 64,
    "caformer_s18": 64,
    "davit_tiny": 64,
    "pvt_v2_b0": 64,
    "resnext50_32x4d": 64,
    "hardcorenas_a": 64,
    "mnasnet_100": 64,
    "mobileone_s0": 64,
    "repvit_m0_9": 64,
    "starnet_s1": 64,
}
"""Architecture -> side of its images."""
QUICK = ("mobilenetv4_conv_small", "vit_tiny_patch16_224")


def measure(
    about: str | None,
    script: str,
    results: str,
    row: Callable[[str], dict[str, Any]],
    summary: Callable[[dict[str, Any]], dict[str, Any]],
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Parse the command line and measure what is missing; with `--row` print one row and leave.

    Args:
        about: the script's documentation; `script`: its file.
        results: name of the JSON file that grows.
        row: figures of one architecture.
        summary: what is said of all rows.

    Returns:
        the architectures, and what is in the file.
    """
    parser = argparse.ArgumentParser(description=(about or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="two architectures, results are not committed")
    parser.add_argument("--fresh", action="store_true", help="measure every row again")
    parser.add_argument("--out", type=Path, help="results as JSON")
    parser.add_argument("--row", help="measure one architecture and print it")
    parser.add_argument("--jobs", type=int, default=1, help="rows measured at a time")
    parser.add_argument("--seconds", type=int, default=600, help="limit for a row")
    arguments = parser.parse_args()
    if arguments.row:
        torch.set_num_threads(1)
        print(json.dumps(row(arguments.row)))
        raise SystemExit(0)
    names = QUICK if arguments.quick else tuple(SIZES)
    out = arguments.out or common.output(results, arguments.quick)
    found = common.Results(out, script, {"seed": 0, "images": 16}, fresh=arguments.fresh)
    rows = found.values.setdefault("rows", {})
    missing = [name for name in names if "error" in rows.get(name, {"error": ""})]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        pending = {pool.submit(in_process, script, name, arguments.seconds): name for name in missing}
        for done in as_completed(pending):
            rows[pending[done]] = done.result()
            found.values["summary"] = summary(rows)
            found.save()
    found.values["rows"] = {name: rows[name] for name in names}
    found.values["summary"] = summary(found.values["rows"])
    found.save()
    return names, found.values


def in_process(script: str, name: str, seconds: int) -> dict[str, Any]:
    """A script's `--row` in a process of its own; what went wrong under "error"."""
    call = [sys.executable, script, "--row", name]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {seconds} s"}
    if done.returncode:
        return {
            "error": done.stderr.strip().splitlines()[-1][:300] if done.stderr else f"exit {done.returncode}"
        }
    return json.loads(done.stdout.strip().splitlines()[-1])


def random_model(name: str) -> Model:
    """Random weights, and biases that are not zero."""
    torch.manual_seed(0)
    model = cveff.create(name, 10, image_size=SIZES[name])
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.module.eval()
    return model
