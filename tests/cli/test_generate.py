"""`cveff generate` on a tiny model and tokenizer on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cveff.cli import main

transformers = pytest.importorskip("transformers", minversion="5.23")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("llama")
    words = ["<s>", "</s>", "<unk>", ".", ",", *(f"w{index}" for index in range(60))]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    return path


PROMPT = " ".join(f"w{index % 60}" + (" ." if index % 7 == 6 else "") for index in range(70))


@pytest.mark.parametrize(
    "policy", ["fastgen", "h2o", "streaming-llm", "snapkv", "pyramidkv", "adakv", "random", "full"]
)
def test_json_has_tokens_bytes_and_speed(policy, folder, capsys) -> None:
    words = [
        "generate",
        str(folder),
        PROMPT,
        "--policy",
        policy,
        "--budget",
        "40",
        "--max-new-tokens",
        "6",
        "--json",
    ]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt_tokens"] == 80
    assert found["new_tokens"] == 6
    assert found["full_nbytes"] == 85 * 2 * 2 * 2 * 8 * 4
    assert 0 < found["live_nbytes"] <= found["nbytes"]
    assert found["kept"] == 1 if policy == "full" else found["kept"] <= 1
    assert sum(found["heads"].values()) == 4
    assert found["tokens_per_second"] > 0
    assert found["notes"] == []


def test_text_table_and_picture(folder, tmp_path, capsys) -> None:
    picture = tmp_path / "kept.svg"
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT, encoding="utf-8")
    words = [
        "--prompt-file",
        str(prompt),
        "--recovery",
        "0.5",
        "--bits",
        "4",
        "--heat-map",
        str(picture),
        "--sample",
    ]
    assert main(["generate", str(folder), *words, "--max-new-tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert "80 of prompt, 5 generated" in out
    assert "% of full" in out
    assert picture.read_text(encoding="utf-8").lstrip().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["PROMPT", "--recovery", "0"], "fastgen.recovery"),
        (["PROMPT", "--policy", "snapkv", "--budget", "0"], "snapkv.budget"),
        ([], "either a prompt or --prompt-file"),
        (["PROMPT", "--prompt-file", "x.txt"], "either a prompt or --prompt-file"),
        (["--prompt-file", "/nowhere/x.txt"], "cannot be read"),
        ([""], "no tokens"),
    ],
)
def test_mistakes_are_said_in_a_line(words, message, folder, capsys) -> None:
    words = [PROMPT if word == "PROMPT" else word for word in words]
    assert main(["generate", str(folder), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there(tmp_path, capsys) -> None:
    assert main(["generate", str(tmp_path / "none"), "text"]) == 2
    assert "no causal language model" in capsys.readouterr().err
