"""What a GPU makes of the zoo's backbones: eager, torch.compile, AOTInductor and CUDA graphs in fp32, bf16 and fp16.

Needs torch (2.11 or newer), timm and the repository, nothing else; TensorRT is measured where it can be imported. All
ways of one network take uint8 images that lie on the device and return float32 logits. Those of a batch size are timed
in turns with CUDA events; the share of the matrix rate is the network's products a second over what this card reaches
on one large product of the same type, measured first. Weights are random, with settled batch norms: times do not
depend on them, and logits still depend on the image.

PYTHONPATH=. python tools/gpu_check.py --out gpu.json        # all networks; goes on where an earlier run stopped
PYTHONPATH=. python tools/gpu_check.py --networks resnet50 vit_small_patch16_224 --batches 64 --out bar.json
PYTHONPATH=. python tools/gpu_check.py --device cpu --quick --ways eager
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu_kernels
import torch
from gpu_ways import AOT, COMPILED, EAGER, FORMATS, GRAPH, TENSORRT, WAYS, Call, Deployed, Graphed, built
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cveff
from cveff.files import write_json
from cveff.runtime.machine import describe

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "triton",
    "transformers",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "numpy",
)
FAILURES = (RuntimeError, ImportError, AttributeError, AssertionError, OSError, TypeError, ValueError)
"""What a compiler, an exporter or a full card may raise: it is recorded, and stops no other way."""
BATCHES = (1, 8, 32, 64, 128, 256)
BAR = ("resnet50", "vit_small_patch16_224")
BAR_BATCH, BAR_RATIO = 64, 2.0


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    device = torch.device(options.device)
    networks = backbones(options)
    settings = {
        "device": options.device,
        "batches": options.batches,
        "ways": options.ways,
        "formats": options.formats,
        "seconds": options.seconds,
    }
    results: dict[str, Any] = {}
    if options.out and options.out.is_file():
        results = json.loads(options.out.read_text(encoding="utf-8"))
        if results.get("settings") != settings:
            results = {}
    results = {**results, "command": _command(), "settings": settings, **environment(device)}
    results.setdefault("networks", {})
    if "matrix_rate" not in results:
        results["matrix_rate"] = matrix_rates(device, options.quick)
    if "kernels" not in results:
        results["kernels"] = gpu_kernels.measure(device, options.quick, options.seconds, in_turns)
    for name, create in networks.items():
        if name not in results["networks"]:
            print(f"{name}:", flush=True)
            results["networks"][name] = measure(create, device, results["matrix_rate"], options)
        results["bar"] = bar(results["networks"])
        if options.out:
            write_json(options.out, results)
    show(results)
    gpu_kernels.show(results["kernels"])


def measure(
    create: Callable[[], cveff.Model],
    device: torch.device,
    rates: Mapping[str, float],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Every way of one network, by batch size."""
    torch.manual_seed(0)
    model = settled(create())
    sample = images_of(model, 2, device)
    reference = Deployed(model, *FORMATS["fp32"]).eval().to(device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference(sample[:1])
    flops = counter.get_total_flops()
    calls: dict[str, Call] = {}
    errors: dict[str, str] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for way, kind in planned(options, device):
            start = time.perf_counter()
            try:
                module = Deployed(model, *FORMATS[kind]).eval().to(device)
                calls[f"{way} {kind}"] = built(way, module, sample, Path(folder), max(options.batches))
            except FAILURES as error:
                errors[f"{way} {kind}"] = f"{type(error).__name__}: {error}"[:300]
            seconds[f"{way} {kind}"] = time.perf_counter() - start
        found = {}
        for batch in options.batches:
            images = images_of(model, batch, device)
            found[str(batch)] = one_batch(calls, reference, images, flops, rates, options)
            line = max(found[str(batch)].items(), key=lambda item: item[1].get("images_per_second", 0))
            print(
                f"  batch {batch}: {line[0]} {line[1].get('images_per_second', 0):.0f} images/s", flush=True
            )
    return {
        "input": list(model.spec.input.size),
        "products": flops // 2,
        "build_seconds": seconds,
        "errors": errors,
        "batches": found,
    }


def one_batch(
    calls: Mapping[str, Call],
    reference: Call,
    images: torch.Tensor,
    flops: int,
    rates: Mapping[str, float],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Check every way against eager float32, then time them in turns."""
    expected = reference(images)
    found: dict[str, Any] = {}
    ready: dict[str, Call] = {}
    for name, call in calls.items():
        graph = name.removeprefix(EAGER).removeprefix(AOT)
        variants = {name: call}
        if "graph" in options.ways and images.is_cuda and graph != name:
            variants[name.removesuffix(graph) + GRAPH + graph] = call
        for variant, plain in variants.items():
            try:
                before = _reset_memory(images.device)
                prepared = Graphed(plain, images) if GRAPH in variant else plain
                logits = prepared(images)
                found[variant] = {
                    "relative_difference": float((logits - expected).abs().max() / expected.abs().max()),
                    "memory_mib": _peak_memory(images.device, before),
                }
                ready[variant] = prepared
            except FAILURES as error:
                found[variant] = {"error": f"{type(error).__name__}: {error}"[:300]}
    for variant, times in in_turns(ready, images, options.seconds).items():
        median = statistics.median(times)
        low, _, high = statistics.quantiles(times, n=4)
        per_second = 1000 * len(images) / median
        kind = next(kind for kind in FORMATS if variant.endswith(f" {kind}"))
        found[variant] |= {
            "ms": median,
            "spread": (high - low) / median,
            "rounds": len(times),
            "images_per_second": per_second,
            "of_matrix_rate": flops * per_second / (1e12 * rates[_rate(kind, rates)]),
        }
    return found


def in_turns(calls: Mapping[str, Call], images: torch.Tensor, seconds: float) -> dict[str, list[float]]:
    """Milliseconds a call of every way, a value a round; each round goes through all of them in another order."""
    lengths = {}
    for name, call in calls.items():
        block(call, images, 2)
        lengths[name] = max(1, min(100, round(5 / block(call, images, 3))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, chance, start = list(calls), random.Random(0), time.perf_counter()
    while calls and (len(times[order[0]]) < 7 or time.perf_counter() - start < seconds):
        chance.shuffle(order)
        for name in order:
            times[name].append(block(calls[name], images, lengths[name]))
    return times


def block(call: Call, images: torch.Tensor, length: int) -> float:
    """Milliseconds a call, over `length` calls without a pause."""
    if not images.is_cuda:
        start = time.perf_counter()
        for _ in range(length):
            call(images)
        return 1000 * (time.perf_counter() - start) / length
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(length):
        call(images)
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / length


def planned(options: argparse.Namespace, device: torch.device) -> list[tuple[str, str]]:
    """(way, format) of all that is built; CUDA graphs are made of eager and AOTInductor, a batch size at a time."""
    ways = [WAYS[way] for way in options.ways if way != "graph"]
    if device.type != "cuda" or importlib.util.find_spec("tensorrt") is None:
        ways = [way for way in ways if way != TENSORRT]
    return [
        (way, kind)
        for way in ways
        for kind in (FORMATS if way == EAGER else COMPILED)
        if kind in options.formats
    ]


def matrix_rates(device: torch.device, quick: bool) -> dict[str, float]:
    """Teraflops a second of one large matrix product, the best of some sizes, for each type of numbers."""
    sizes = (256,) if quick else (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if device.type == "cuda":
        kinds["tf32"] = torch.float32
    rates = {}
    allowed = torch.backends.cuda.matmul.allow_tf32
    for kind, dtype in kinds.items():
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        for size in sizes:
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            times = in_turns({kind: lambda _, a=a, b=b: a @ b}, a, 0.0)[kind]
            rates[kind] = max(rates.get(kind, 0.0), 2 * size**3 / (1e9 * statistics.median(times)))
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return rates


def _rate(kind: str, rates: Mapping[str, float]) -> str:
    """Of which product a network is a share: PyTorch lets cuDNN use TF32 for float32 convolutions."""
    name = kind.split()[0]
    return "tf32" if name == "fp32" and "tf32" in rates else name


def backbones(options: argparse.Namespace) -> dict[str, Callable[[], cveff.Model]]:
    """The zoo's, read from its cards, and the two of the bar."""
    found: dict[str, Callable[[], cveff.Model]] = {name: lambda name=name: cveff.create(name) for name in BAR}
    for path in sorted((ROOT / "model_zoo" / "cards").glob("*.toml")):
        card = tomllib.loads(path.read_text(encoding="utf-8"))
        size, channels = card["input"]["size"], card["input"]["channels"]
        found[f"{card['architecture']}/{size[0]}"] = lambda card=card, size=size, channels=channels: (
            cveff.create(card["architecture"], card["num_classes"], image_size=tuple(size), channels=channels)
        )
    if options.networks is None:
        return {"small_resnet_s/8": found["small_resnet_s/8"]} if options.quick else found
    unknown = sorted(set(options.networks) - set(found))
    if unknown:
        raise SystemExit(f"network {unknown[0]!r} is unknown; known: {', '.join(found)}")
    return {name: found[name] for name in options.networks}


def settled(model: cveff.Model) -> cveff.Model:
    """Batch norms that have seen images: with those of a fresh network, logits do not depend on the image."""
    norms = [m for m in model.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
    if norms:
        pixels = images_of(model, 16, torch.device("cpu")).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            model.module.train()(pixels)
    model.module.eval()
    return model


def images_of(model: cveff.Model, batch: int, device: torch.device) -> torch.Tensor:
    """Random images, (batch, H, W, C) uint8."""
    spec, generator = model.spec.input, torch.Generator().manual_seed(0)
    shape = (batch, *spec.size, spec.channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)


def bar(networks: Mapping[str, Any]) -> dict[str, Any]:
    """bf16 on AOTInductor in a CUDA graph against eager float32, images a second at batch 64."""
    found = {}
    for name in BAR:
        cells = networks.get(name, {}).get("batches", {}).get(str(BAR_BATCH), {})
        ours, eager = cells.get(f"{AOT}{GRAPH} bf16 channels_last", {}), cells.get(f"{EAGER} fp32", {})
        if "ms" in ours and "ms" in eager:
            ratio = eager["ms"] / ours["ms"]
            found[name] = {"ratio": ratio, "at_least": BAR_RATIO, "passes": ratio >= BAR_RATIO}
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine, card and time."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = describe()
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        machine |= {
            "gpu": card.name,
            "compute_capability": f"{card.major}.{card.minor}",
            "gpu_memory_bytes": card.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return {
        "versions": versions,
        "machine": machine,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def show(results: Mapping[str, Any]) -> None:
    """Print the rates, a line for each way, and the bar."""
    machine = results["machine"]
    print(f"\n{machine.get('gpu', machine['cpu'])}, torch {results['versions']['torch']}")
    print(
        "one large product, TFLOP/s:", {kind: round(rate, 2) for kind, rate in results["matrix_rate"].items()}
    )
    for name, network in results["networks"].items():
        batches = network["batches"]
        print(f"\n{name}, images/s at batch {', '.join(batches)}")
        ways = list(dict.fromkeys(way for cells in batches.values() for way in cells))
        for way in ways:
            cells = [cells.get(way, {}) for cells in batches.values()]
            speeds = "".join(
                f"{cell['images_per_second']:>10.0f}" if "ms" in cell else f"{'–':>10}" for cell in cells
            )
            shares = [cell["of_matrix_rate"] for cell in cells if "ms" in cell]
            print(f"  {way:<44}{speeds}   {100 * max(shares, default=0):5.1f}% of the matrix rate")
        for way, error in network["errors"].items():
            print(f"  {way}: {error}")
    for name, found in results["bar"].items():
        verdict = "passes" if found["passes"] else "does not pass"
        print(
            f"\n{name}: bf16 AOTInductor + CUDA graph is {found['ratio']:.2f}× eager fp32 at batch 64, {verdict}"
        )


def _reset_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak_memory(device: torch.device, before: int) -> float | None:
    """MiB of the device that the first call at this size took beyond what was there; weights are not in it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _command() -> str:
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return shlex.join(["python", "tools/gpu_check.py", *words])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu")
    )
    parser.add_argument(
        "--networks", nargs="+", metavar="NAME", help="by default the zoo's and those of the bar"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--seconds", type=float, default=4.0, help="time of one comparison")
    parser.add_argument(
        "--quick", action="store_true", help="one small network, batches 1 and 4, short comparisons"
    )
    parser.add_argument("--out", type=Path, help="JSON; a file of the same settings is added to")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here; --device cpu runs everything but CUDA graphs and TensorRT")
    if min(options.batches) < 1:
        parser.error(f"batches are {options.batches}; give positive integers")
    if options.quick:
        options.batches, options.seconds = [1, 4], 0.1
    return options


if __name__ == "__main__":
    main()
