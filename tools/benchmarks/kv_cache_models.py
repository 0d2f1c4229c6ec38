"""Models and texts of kv_cache.py: Gemma-3 270M, and a Llama over bytes that is trained on Python's own library."""

from __future__ import annotations

import ast
import math
import string
import sysconfig
import time
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn
from weight_only import read, texts

from cveff.errors import DataError
from cveff.kv import Marks
from cveff.kv.marks import marks_of

CONTEXT = 1024
BEGIN = 256
BYTE_MARKS = Marks(
    special=frozenset({BEGIN}), punctuation=frozenset(map(ord, string.punctuation)) | {ord("\n")}
)
_BATCH = 8


def library() -> dict[str, list[bytes]]:
    """Docstrings and code of the standard library's modules, a document a module, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {
        "site-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "encodings",
        "__pycache__",
    }
    paths = [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]
    documents: dict[str, list[bytes]] = {"documentation": [], "code": []}
    for path in paths:
        source = path.read_text(encoding="utf-8", errors="replace")
        nodes = [
            node
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        docs = "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes)))
        documents["documentation"].append(docs.encode())
        documents["code"].append(source.encode())
    return documents


def trained_llama(folder: Path, steps: int) -> tuple[Any, dict[str, Tensor]]:
    """The Llama, trained the first time, and its held-out texts (1-d tokens)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    documents = library()
    held = {name: _tokens(parts[::10]) for name, parts in documents.items()}
    if (folder / "model.safetensors").is_file():
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), held
    kept = [part for parts in documents.values() for index, part in enumerate(parts) if index % 10]
    data = _tokens(kept)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=BEGIN + 1,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=BEGIN,
            eos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for step in range(steps):
        rate = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate
        # Short sequences first teach the letters; only long ones teach to look far back.
        length = CONTEXT // 4 if step < steps // 2 else CONTEXT
        count = _BATCH * CONTEXT // length // 2
        starts = torch.randint(0, len(data) - length, (count,), generator=generator).tolist()
        ids = torch.stack([data[at : at + length] for at in starts])
        ids[:, 0] = BEGIN
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.perf_counter() - start
            common.console.print(f"step {step}: {float(loss) / math.log(2):.3f} bits a byte, {seconds:.0f} s")
    model.eval().save_pretrained(folder)
    return model, held


def gemma(folder: Path) -> tuple[Any, Marks, dict[str, Tensor], tuple[Any, str]]:
    """The model, its marks, two texts (1-d tokens), and the tokenizer with a filler for needles."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = read(folder)
    _, news = texts(folder, None)
    prose = b"\n\n".join(library()["documentation"][::10]).decode()
    tokens = tokenizer(prose, add_special_tokens=False, return_tensors="pt").input_ids[0]
    found = {"news": torch.cat([window[1:] for window in news]), "documentation": tokens}
    begin = torch.tensor([tokenizer.bos_token_id])
    marked = marks_of(model, tokenizer)
    return model, marked, {name: torch.cat([begin, text]) for name, text in found.items()}, (tokenizer, prose)


def windows_of(text: Tensor, length: int, count: int) -> list[Tensor]:
    """Windows spread evenly over a text, each with the token that the text begins with."""
    if len(text) < length + count:
        raise DataError(f"the text has {len(text)} tokens; {count} windows of {length} need more")
    stride = (len(text) - length) // count
    return [torch.cat([text[:1], text[1 + at * stride : at * stride + length]]) for at in range(count)]


def _tokens(documents: list[bytes]) -> Tensor:
    """Documents as bytes, each after the begin token."""
    return torch.cat([torch.tensor([BEGIN, *document]) for document in documents])
