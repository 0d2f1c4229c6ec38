"""Contextual sparsity on Gemma-3 270M: recall and perplexity of every way to choose neurons, and batches' unions.

Weights and text are those of weight_only.py (its docstring says what to install): methods are fitted to every third
news item, and measured on the others. Perplexity makes every token of a window sparse, as if each were decoded alone.
Hot neurons, any neurons and the oracle's choice are the ends to compare with.

python tools/benchmarks/contextual_sparsity.py            # about 40 minutes on a core of its own
python tools/benchmarks/contextual_sparsity.py --quick    # about 6 minutes
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
import weight_only
from torch import Tensor, nn

from cveff.errors import DataError
from cveff.sparsity import CATS, TEAL, HotNeurons, Oracle, Predictor, RandomNeurons, attach, fit, quality

KEPT = (0.5, 0.25)
BATCHES = (1, 2, 4, 8)
BARRED = ("predictor", "hot", "random")
PROMPT, WRITTEN = 64, 16


def methods(keep: float, epochs: int) -> dict[str, Any]:
    """What is compared, by name."""
    learned = {"keep": keep, "rank": 128, "epochs": epochs, "batch_size": 256, "held_out": 0.1}
    return {
        "oracle": Oracle(keep),
        "predictor": Predictor(**learned),
        "predictor, lookahead": Predictor(**learned, lookahead=True),
        "CATS": CATS(keep),
        "TEAL, MLP": TEAL(keep, attention=False),
        "TEAL": TEAL(keep),
        "hot": HotNeurons(keep),
        "random": RandomNeurons(keep),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--windows", type=int, default=12, help="of 512 tokens, to measure on")
    parser.add_argument("--calibration", type=int, default=40, help="windows to fit to")
    parser.add_argument("--epochs", type=int, default=20, help="of a predictor's training, at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, default=common.ROOT / "runs" / "gemma3-270m", help="folder")
    parser.add_argument("--text", type=Path, help="documents, one a line; by default gensim's")
    parser.add_argument("--quick", action="store_true", help="2 windows, fitted to 4, two epochs, half kept")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument(
        "--out", type=Path, help="JSON file; by default model_zoo/results/contextual_sparsity.json"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.windows, arguments.calibration, arguments.epochs = 2, 4, 2
    torch.set_num_threads(arguments.threads)
    names = ("windows", "calibration", "epochs", "threads")
    settings = {name: getattr(arguments, name) for name in names}
    out = arguments.out or common.output("contextual_sparsity.json", arguments.quick)
    results = common.Results(out, __file__, settings, fresh=arguments.fresh)
    folder = weight_only.converted(arguments.model)
    calibration, evaluation = weight_only.texts(folder, arguments.text)
    if len(calibration) < arguments.calibration or len(evaluation) < arguments.windows:
        raise DataError(f"the text has {len(calibration)} + {len(evaluation)} windows; ask for fewer")
    documents = [{"input_ids": window[None], "use_cache": False} for window in calibration]
    network = weight_only.read(folder)
    measure(results, network, documents[: arguments.calibration], evaluation[: arguments.windows], arguments)
    show(results.values)


def measure(
    results: common.Results,
    network: nn.Module,
    documents: Sequence[dict[str, Any]],
    windows: Sequence[Tensor],
    arguments: argparse.Namespace,
) -> None:
    """Every row that the file does not have yet, then the batches."""
    rows = results.values.setdefault("rows", {})
    if "dense" not in rows:
        rows["dense"] = weight_only.perplexity(network, windows)
        results.save()
    for keep in KEPT[: 1 if arguments.quick else None]:
        for name, method in methods(keep, arguments.epochs).items():
            if f"{name} {keep}" in rows:
                continue
            rows[f"{name} {keep}"] = one_row(network, method, documents, windows, rows["dense"])
            common.console.print(f"{name} {keep}: {rows[f'{name} {keep}']}", highlight=False)
            results.values["summary"] = summary(rows)
            results.save()
    batches = results.values.setdefault("batches", {})
    fitted = fit(network, CATS(0.5), documents[:4])
    for batch in BATCHES:
        if str(batch) not in batches and len(windows) >= min(batch, 2):
            batches[str(batch)] = one_batch(network, fitted, windows, batch)
            results.save()


def one_row(
    network: nn.Module,
    method: Any,
    documents: Sequence[dict[str, Any]],
    windows: Sequence[Tensor],
    dense: dict[str, Any],
) -> dict[str, Any]:
    """Fit, then measure what was not fitted to."""
    start = time.perf_counter()
    fitted = fit(network, method, documents)
    seconds = time.perf_counter() - start
    with attach(network, fitted, tokens="all") as sparse:
        found = weight_only.perplexity(network, windows)
    usage = sparse.usage().values()
    row = {
        **found,
        "perplexity_ratio": found["perplexity"] / dense["perplexity"],
        "chosen": math.fsum(use.chosen for use in usage) / len(usage),
        "fit_seconds": seconds,
        "report": fitted.report,
    }
    if not isinstance(method, TEAL):
        held = [{"input_ids": window[None], "use_cache": False} for window in windows]
        compared = quality(network, fitted, held)
        row["recall"] = math.fsum(compared.recall) / len(compared.recall)
        row["energy"] = math.fsum(compared.energy) / len(compared.energy)
    return row


@torch.no_grad()
def one_batch(network: nn.Module, fitted: Any, windows: Sequence[Tensor], batch: int) -> dict[str, float]:
    """Tokens written by several texts at once: what their union is, and seconds a token over the dense network's."""
    texts = torch.stack([windows[i % len(windows)][i // len(windows) :][:PROMPT] for i in range(batch)])
    with attach(network, fitted, dense_above=1.0) as sparse:
        written(network, texts)
    usage = list(sparse.usage().values())
    seconds: dict[str, list[float]] = {"dense": [], "sparse": []}
    for _ in range(3):
        seconds["dense"].append(written(network, texts))
        with attach(network, fitted) as chosen:
            written(network, texts)  # measures from which share on dense is faster
            seconds["sparse"].append(written(network, texts))
    calls = sum(use.calls for use in chosen.usage().values())
    return {
        "chosen": math.fsum(use.chosen for use in usage) / len(usage),
        "union": math.fsum(use.union for use in usage) / len(usage),
        "computed_whole": sum(use.dense for use in chosen.usage().values()) / calls,
        "times_as_fast": min(seconds["dense"]) / min(seconds["sparse"]),
    }


def written(network: nn.Module, texts: Tensor) -> float:
    """Seconds of the tokens after the prompt, written greedily."""
    answer = network(texts, use_cache=True, logits_to_keep=1)
    start = time.perf_counter()
    for _ in range(WRITTEN):
        tokens = answer.logits[:, -1:].argmax(-1)
        answer = network(tokens, past_key_values=answer.past_key_values)
    return time.perf_counter() - start


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    """The bar: the predictor has better recall and perplexity than hot neurons and any neurons."""
    found = {}
    for keep in KEPT:
        if not all(f"{name} {keep}" in rows for name in BARRED):
            continue
        ours, *others = (rows[f"{name} {keep}"] for name in BARRED)
        found[str(keep)] = {
            "recall": [row["recall"] for row in (ours, *others)],
            "perplexity": [row["perplexity"] for row in (ours, *others)],
            "passes": all(
                ours["recall"] > other["recall"] and ours["perplexity"] < other["perplexity"]
                for other in others
            ),
        }
    return found


def show(values: dict[str, Any]) -> None:
    rows = values["rows"]
    common.table(
        f"Gemma-3 270M, {rows['dense']['tokens']} tokens",
        ("", "perplexity", "over dense", "chosen", "recall", "energy"),
        [
            (name, r["perplexity"], *(r.get(k) for k in ("perplexity_ratio", "chosen", "recall", "energy")))
            for name, r in rows.items()
        ],
    )
    common.table(
        "CATS at 0.5, texts written together",
        ("texts", "chosen by one", "by any", "calls computed whole", "times as fast as dense"),
        [
            (n, b["chosen"], b["union"], b["computed_whole"], b["times_as_fast"])
            for n, b in values["batches"].items()
        ],
    )
    for keep, bar in values.get("summary", {}).items():
        verdict = "met" if bar["passes"] else "MISSED"
        common.console.print(f"predictor before hot and random at {keep}: {verdict}")


if __name__ == "__main__":
    main()
