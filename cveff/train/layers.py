"""What the layers of a network are to it: its embedding, its classifier, its hidden matrices, its repeated blocks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def matrix_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Linear layers, attention and ungrouped convolutions by path, the first and the last included."""
    return {path: layer for path, layer in module.named_modules() if _is_matrix(layer)}


def hidden_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`matrix_layers` without the embedding and the classifier."""
    layers = matrix_layers(module)
    ends = _named(module, "first_conv", list(layers), 0) | classifier_paths(module)
    return ((path, layer) for path, layer in layers.items() if path not in ends)


def classifier_paths(module: nn.Module) -> set[str]:
    """Paths of the classifier's layers: those timm names, else the last one; empty without layers."""
    return _named(module, "classifier", list(matrix_layers(module)), -1)


def repeated_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The blocks a network is made of, by path and in order: layered members of its lists of two or more, outermost."""
    found: dict[str, nn.Module] = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, (nn.Sequential, nn.ModuleList)) or _is_within(path, found):
            continue
        members = [
            (name, child)
            for name, child in layer.named_children()
            if not isinstance(child, (nn.Sequential, nn.ModuleList))
            and next(child.children(), None) is not None
        ]
        if len(members) > 1:
            prefix = f"{path}." if path else ""
            found |= {
                f"{prefix}{name}": child
                for name, child in members
                if next(child.parameters(), None) is not None
            }
    return found


def _is_matrix(layer: nn.Module) -> bool:
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return layer.groups == 1
    return isinstance(layer, (nn.Linear, nn.MultiheadAttention))


def _named(module: nn.Module, key: str, paths: list[str], default: int) -> set[str]:
    """The layers timm's configuration names under `key`, else the one at index `default`."""
    config = getattr(module, "pretrained_cfg", None) or {}
    names = config.get(key) or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    found = {path for path in paths if any(path == name or path.startswith(f"{name}.") for name in names)}
    return found or set(paths[default:][:1])


def _is_within(path: str, blocks: dict[str, nn.Module]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in blocks)
