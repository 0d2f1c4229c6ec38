"""Settings are compared as they come back from a file."""

from __future__ import annotations

from pathlib import Path

from cveff.train.state import differences, load_state, save_state


def test_settings_that_were_written_and_read_are_the_same(tmp_path: Path) -> None:
    settings = {
        "size": (8, 8),
        "model": {"edits": [{"kind": "sparsity", "layers": ("a", "b"), "shares": [(1, 2.0)]}]},
    }
    save_state(tmp_path / "state.safetensors", {"settings": settings})
    read = load_state(tmp_path / "state.safetensors")["settings"]
    assert differences(read, settings) == ""
    other = {
        **settings,
        "model": {"edits": [{"kind": "sparsity", "layers": ("a", "c"), "shares": [(1, 2.0)]}]},
    }
    assert differences(read, other).startswith("model.edits: [{'kind': 'sparsity', 'layers': ['a', 'b']")
    assert differences(read, {**settings, "size": (8, 9)}) == "size: [8, 8] then, (8, 9) now"
