"""What the layers of a network are to it: its embedding, its classifier, its hidden matrices, its repeated blocks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_LISTS = (nn.Sequential, nn.ModuleList)


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
    """The blocks a network is made of, by path and in order: innermost members of its lists that have layers inside."""
    members: dict[str, nn.Module] = {}
    for path, layers in module.named_modules():
        if isinstance(layers, _LISTS):
            prefix = f"{path}." if path else ""
            members |= {
                f"{prefix}{name}": child for name, child in layers.named_children() if _is_block(child)
            }
    return {
        path: block
        for path, block in members.items()
        if not any(other.startswith(f"{path}.") for other in members)
    }


def _is_block(layer: nn.Module) -> bool:
    has_layers = next(layer.children(), None) is not None and next(layer.parameters(), None) is not None
    return has_layers and not isinstance(layer, _LISTS)


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
