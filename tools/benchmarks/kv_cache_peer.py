"""cveff's cache policies beside kvpress's: the same tokens kept, and perplexity at equal shares of the prompt.

The Llama of kv_cache.py (trained there the first time) and its two texts. kvpress compresses when the prompt ends and
keeps what is generated, as SnapKV, PyramidKV, AdaKV and Random do here; StreamingLLM evicts while it generates too.
Ours that kvpress has not (FastGen, H2O) are in the table at the shares they leave, and presses that we have not.

kvpress needs another transformers than cveff's newest: an environment of its own is made in .venv-kvpress, unless
`--python` names one.

python tools/benchmarks/kv_cache_peer.py            # goes on where it stopped
python tools/benchmarks/kv_cache_peer.py --quick
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import common
import kv_cache_models as models
import torch
from torch import Tensor

from cveff.errors import MissingDependencyError
from cveff.kv import FastGen, Full, compress
from cveff.kv.budgeted import policy_of
from cveff.kv.harness import perplexity

PACKAGES = ("kvpress==0.5.5", "torch")
ENVIRONMENT = common.ROOT / ".venv-kvpress"
CHILD = Path(__file__).parent / "kvpress_child.py"
SHARES = (0.5, 0.25)
BOTH = ("snapkv", "pyramidkv", "adakv", "streaming-llm", "random")
THEIRS = ("expected-attention", "tova", "keydiff")
RECOVERIES = (0.9, 0.95, 0.98)


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    settings = {"windows": arguments.windows, "prompt": arguments.prompt, "scored": arguments.scored}
    results = common.Results(arguments.out, __file__, settings, fresh=arguments.fresh)
    python = interpreter(arguments.python)
    model, texts = models.trained_llama(arguments.models, arguments.steps)
    for name, text in texts.items():
        rows = results.values.setdefault("rows", {}).setdefault(name, {})
        windows = models.windows_of(text, arguments.prompt + arguments.scored, arguments.windows)
        for key, measure in _rows(model, windows, python, arguments).items():
            if key not in rows:
                rows[key] = measure()
                common.console.print(f"{name}, {key}: {rows[key]}", highlight=False)
                results.save()
    results.values["summary"] = summary(results.values["rows"])
    results.save()
    show(results.values)


def _rows(model: Any, windows: list[Tensor], python: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Row's name -> what measures it."""
    prompt, folder = arguments.prompt, arguments.models

    def alone(policy: Any) -> dict[str, Any]:
        found = perplexity(model, windows, policy, prompt=prompt, marks=models.BYTE_MARKS)
        return {"cveff": {key: dataclasses.asdict(found)[key] for key in ("perplexity", "kept", "removed")}}

    def both(name: str, share: float) -> dict[str, Any]:
        row = alone(policy_of(name, share))
        theirs = kvpress(python, folder, windows, prompt, share, name)
        positions = theirs.pop("positions")
        same = (
            []
            if name in ("streaming-llm", "random")
            else same_tokens(model, windows, prompt, policy_of(name, share), positions)
        )
        return row | {"kvpress": theirs, "same_tokens": sum(same) / len(same) if same else None}

    def theirs(name: str, share: float) -> dict[str, Any]:
        found = kvpress(python, folder, windows, prompt, share, name)
        found.pop("positions")
        return {"kvpress": found}

    rows: dict[str, Any] = {"full": lambda: alone(Full())}
    for share in SHARES[: 1 if arguments.quick else None]:
        rows |= {f"{name} {share}": lambda name=name, share=share: both(name, share) for name in BOTH}
        rows |= {f"{name} {share}": lambda name=name, share=share: theirs(name, share) for name in THEIRS}
        rows[f"h2o {share}"] = lambda share=share: alone(policy_of("h2o", share))
    if not arguments.quick:
        rows |= {
            f"fastgen {value}": lambda value=value: alone(FastGen(recovery=value)) for value in RECOVERIES
        }
    return rows


@torch.no_grad()
def same_tokens(
    model: Any, windows: list[Tensor], prompt: int, policy: Any, theirs: list[list[list[list[int]]]]
) -> list[float]:
    """Of each window, layer and head: the share of tokens that both keep, of those that either does."""
    shares = []
    for window, layers in zip(windows, theirs, strict=True):
        with compress(model, policy, marks=models.BYTE_MARKS) as cache:
            model(input_ids=window[None, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
            for layer, heads in enumerate(layers):
                for head, positions in enumerate(heads):
                    ours = set(cache.contents(layer, 0, head)[2].tolist())
                    shares.append(len(ours & set(positions)) / len(ours | set(positions)))
    return shares


def interpreter(python: Path | None) -> Path:
    """The Python that has kvpress: the one given, or that of an environment made the first time.

    Raises:
        MissingDependencyError: it cannot be installed.
    """
    if python is not None:
        return python
    folder = "Scripts" if sys.platform == "win32" else "bin"
    python = ENVIRONMENT / folder / "python"
    if not (ENVIRONMENT / "complete").is_file():
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        try:
            _run(python, "-m", "pip", "install", "--quiet", *PACKAGES)
        except RuntimeError as error:
            raise MissingDependencyError(
                f"kvpress cannot be installed in {ENVIRONMENT.name}: {error}"
            ) from error
        (ENVIRONMENT / "complete").touch()
    return python


def kvpress(
    python: Path, folder: Path, windows: list[Tensor], prompt: int, share: float, name: str
) -> dict[str, Any]:
    """What kvpress_child.py says of one press.

    Raises:
        RuntimeError: it failed; the last line of what it wrote.
    """
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "windows.pt"
        torch.save(windows, file)
        written = _run(python, str(CHILD), str(folder), str(file), str(prompt), str(share), name)
    return json.loads(written.strip().splitlines()[-1])


def _run(python: Path, *arguments: str) -> str:
    done = subprocess.run([str(python), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise RuntimeError(lines[-1].strip()[:300] if lines else f"exit {done.returncode}")
    return done.stdout


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Whether the same tokens are kept, and in how many rows each is better."""
    pairs = [
        row for of_text in rows.values() for row in of_text.values() if "cveff" in row and "kvpress" in row
    ]
    ratios = {
        f"{text}, {key}": row["cveff"]["perplexity"] / row["kvpress"]["perplexity"]
        for text, of_text in rows.items()
        for key, row in of_text.items()
        if "cveff" in row and "kvpress" in row
    }
    return {
        "pairs": len(pairs),
        "better_or_equal": sum(ratio <= 1.001 for ratio in ratios.values()),
        "perplexity_over_kvpress": ratios,
        "same_tokens": {
            f"{text}, {key}": row["same_tokens"]
            for text, of_text in rows.items()
            for key, row in of_text.items()
            if row.get("same_tokens") is not None
        },
    }


def show(values: dict[str, Any]) -> None:
    for text, rows in values["rows"].items():
        full = rows["full"]["cveff"]["perplexity"]
        common.table(
            f"Llama, {text}: perplexity over {full:.4f} of the whole cache",
            ("policy", "cveff", "kept %", "kvpress", "kept %", "same tokens %"),
            [
                [
                    key,
                    *(
                        value
                        for who in ("cveff", "kvpress")
                        for value in (
                            (row[who]["perplexity"] / full, 100 * row[who]["kept"])
                            if who in row
                            else (None, None)
                        )
                    ),
                    None if row.get("same_tokens") is None else 100 * row["same_tokens"],
                ]
                for key, row in rows.items()
            ],
        )
    common.console.print(values["summary"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, help="of an environment that has kvpress")
    parser.add_argument("--windows", type=int, help="of each text; by default 8")
    parser.add_argument("--prompt", type=int, help="tokens; by default 768")
    parser.add_argument("--scored", type=int, help="tokens after it; by default 256")
    parser.add_argument("--steps", type=int, help="of training the Llama; by default 1500")
    parser.add_argument("--models", type=Path, help="folder of the trained Llama; by default runs/kv-cache")
    parser.add_argument("--quick", action="store_true", help="short prompts, one window, little training")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/kv_cache_peer.json")
    arguments = parser.parse_args()
    for name, quick, default in (
        ("windows", 1, 8),
        ("prompt", 256, 768),
        ("scored", 16, 256),
        ("steps", 30, 1500),
    ):
        if getattr(arguments, name) is None:
            setattr(arguments, name, quick if arguments.quick else default)
    arguments.out = arguments.out or common.output("kv_cache_peer.json", arguments.quick)
    arguments.models = arguments.models or common.ROOT / "runs" / (
        "quick/kv-cache" if arguments.quick else "kv-cache"
    )
    return arguments


if __name__ == "__main__":
    main()
