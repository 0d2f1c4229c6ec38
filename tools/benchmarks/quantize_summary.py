"""What the results of `quantize_peers.py` say of its bars, and its tables. A bar that was not measured is None."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import common
import numpy as np
from quantize_networks import LITE0, REPVGG, TRAINED, VIT
from quantize_tools import OURS, OURS_NARROW, RIVALS

EPSILON = 1e-9
"""Accuracies are shares of images, whose differences do not come out whole."""
MARGIN_POINTS, MEAN_POINTS = 0.1, 0.3
NETWORK_POINTS = {REPVGG: 1.0, VIT: 0.5}
AWARE_POINTS, AWARE_SAME = 0.3, 0.999
EMULATED_AGREEMENT, EMULATED_COSINE, EMULATED_CROPS = 0.85, 0.985, 1000


def summary(values: dict[str, Any]) -> dict[str, Any]:
    """Every bar: its figures and "passes".

    Args:
        values: the results; "rows" by network and seed.
    """
    by_network: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, row in values.get("rows", {}).items():
        if OURS in row["files"]:
            by_network[name.rsplit("-", 1)[0]].append(row)
    networks = {network: _against_peers(rows) for network, rows in by_network.items()}
    lost = {name: found["points_lost"] for name, found in networks.items() if "points_lost" in found}
    mean = float(np.mean(list(lost.values()))) if lost else None
    return {
        "networks": networks,
        "mean_points_lost": mean,
        "mean_passes": mean is not None and mean <= MEAN_POINTS + EPSILON
        if lost.keys() >= TRAINED.keys()
        else None,
        **{
            f"{name}_passes": lost[name] <= limit + EPSILON if name in lost else None
            for name, limit in NETWORK_POINTS.items()
        },
        "emulated": _emulated([row.get("emulated", {}) for row in by_network[LITE0]]),
        "aware": _aware([row["aware"] for row in by_network[REPVGG] if "aware" in row]),
    }


def pooled(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tools' figures over the rows that have them, weighted by images; one that failed anywhere has its error alone."""
    found: dict[str, dict[str, Any]] = {}
    for tool in dict.fromkeys(tool for row in rows for tool in row):
        parts = [row[tool] for row in rows if tool in row]
        errors = [part["error"] for part in parts if "error" in part]
        if errors:
            found[tool] = {"error": errors[0]}
            continue
        images = [part["images"] for part in parts]
        keys = [
            key
            for key in ("agreement", "cosine", "as_written_cosine", "accuracy", "points_lost", "bytes")
            if key in parts[0]
        ]
        found[tool] = {key: float(np.average([part[key] for part in parts], weights=images)) for key in keys}
        found[tool]["images"] = sum(images)
    return found


def _against_peers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """cveff's score, the best tool's by default, and the best of all: accuracy, or agreement without labels."""
    files = pooled([row["files"] for row in rows])
    score = "accuracy" if "accuracy" in files[OURS] else "agreement"
    if "error" in files[OURS]:
        return {"error": files[OURS]["error"], "passes": False}
    peers = {tool: item[score] for tool, item in files.items() if tool in RIVALS and "error" not in item}
    others = {
        tool: item[score]
        for tool, item in files.items()
        if tool not in (OURS, OURS_NARROW) and "error" not in item
    }
    found: dict[str, Any] = {"score": score, "ours": files[OURS][score], "images": files[OURS]["images"]}
    if "points_lost" in files[OURS]:
        found["points_lost"] = files[OURS]["points_lost"]
    if peers:
        best = max(peers, key=lambda tool: peers[tool])
        any_best = max(others, key=lambda tool: others[tool])
        behind = 100 * (peers[best] - found["ours"])
        found |= {
            "best_rival": best,
            "points_behind": behind,
            "best_of_all": any_best,
            "points_behind_best_of_all": 100 * (others[any_best] - found["ours"]),
        }
    # A run in between has some tools on more images than others.
    is_complete = all(
        tool in files and files[tool].get("images", found["images"]) == found["images"] for tool in RIVALS
    )
    found["passes"] = found["points_behind"] <= MARGIN_POINTS + EPSILON if peers and is_complete else None
    return found


def _emulated(rows: list[dict[str, Any]]) -> dict[str, Any]:
    measured = [row["files"] for row in rows if OURS_NARROW in row.get("files", {})]
    if not measured:
        reasons = [row["not measured"] for row in rows if "not measured" in row]
        return {"passes": None, "not measured": reasons[0] if reasons else "not yet"}
    files = pooled(measured)
    ours = files[OURS_NARROW]
    enough = "error" not in ours and ours["images"] >= EMULATED_CROPS
    holds = enough and ours["agreement"] >= EMULATED_AGREEMENT and ours["cosine"] >= EMULATED_COSINE
    return {"files": files, "passes": holds}


def _aware(rows: list[dict[str, Any]]) -> dict[str, Any]:
    if not rows:
        return {"passes": None, "not measured": "not yet"}
    lost = float(np.mean([row["quantization-aware"]["points_lost"] for row in rows]))
    same = min(row["quantization-aware"]["same_top1"] for row in rows)
    return {
        "points_lost": lost,
        "same_top1": same,
        "passes": lost <= AWARE_POINTS + EPSILON and same >= AWARE_SAME,
    }


def show(values: dict[str, Any]) -> None:
    """Print the tables and the bars."""
    by_network: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, row in values["rows"].items():
        by_network[name.rsplit("-", 1)[0]].append(row)
    for network, rows in by_network.items():
        timed: dict[str, Any] = next((row["times"] for row in rows if "times" in row), {})
        files = pooled([row["files"] for row in rows])
        if not files:
            continue
        base = rows[0]["fp32"]
        first = [
            "fp32",
            base.get("accuracy"),
            None,
            1.0,
            1.0,
            None,
            base["bytes"] / 1e6,
            _ratio(timed, "fp32"),
        ]
        lines = [
            [
                tool,
                item.get("accuracy"),
                item.get("points_lost"),
                item["agreement"],
                item["cosine"],
                item.get("as_written_cosine"),
                item["bytes"] / 1e6,
                _ratio(timed, tool),
            ]
            if "error" not in item
            else [f"{tool}: {item['error'][:80]}", *[None] * 7]
            for tool, item in files.items()
        ]
        images = max((item.get("images", 0) for item in files.values()), default=0)
        common.table(
            f"{network}: {images} images",
            ("file", "accuracy", "points lost", "agreement", "cosine", "as written", "MB", "time over fp32"),
            [first, *lines],
            note="As written: the cosine with graph optimisations off, on the first images.",
        )
    found = values["summary"]
    if "files" in found["emulated"]:
        common.table(
            "EfficientNet-Lite0 on a processor without VNNI, emulated",
            ("file", "agreement", "cosine", "crops"),
            [
                [tool, item["agreement"], item["cosine"], item["images"]]
                if "error" not in item
                else [f"{tool}: {item['error'][:80]}", *[None] * 3]
                for tool, item in found["emulated"]["files"].items()
            ],
        )
    common.console.print(found)


def _ratio(timed: dict[str, Any], name: str) -> float | None:
    found = timed.get(name)
    return None if found is None else found["over_fp32"]
