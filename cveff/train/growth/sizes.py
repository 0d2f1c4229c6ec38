"""From sizes to specs: which arguments of an architecture a growth event changes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from cveff.errors import StepError
from cveff.model import Model, ModelSpec
from cveff.train.growth.event import Growth
from cveff.train.growth.heads import AttentionHeads, is_attention

_ARGUMENTS = {
    "depth": ("depth", "depths", "layers"),
    "width": ("embed_dim", "dims", "channels", "widths", "embed_dims"),
    "heads": ("num_heads",),
    "mlp_ratio": ("mlp_ratio",),
}
"""What architectures call a size, as arguments of their class."""


def specs_of(model: Model, events: Sequence[Growth]) -> list[ModelSpec]:
    """The spec of the network after each event.

    Raises:
        StepError: the model has edits, or an argument that an event changes is none of its architecture's.
    """
    others = [edit.kind for edit in model.spec.edits if not isinstance(edit, AttentionHeads)]
    if others:
        raise StepError(
            f"{model.spec.architecture} has edits ({', '.join(others)}), which belong to its present sizes; grow first"
        )
    # An event at 0 may shrink anything; what the later ones do not bring back is the model's own.
    spec = replace(model.spec, edits=())
    specs = []
    for event in events:
        spec = _with_sizes(spec, model.module, event)
        specs.append(spec)
    return [_with_heads(item, specs[-1], model) for item in specs]


def _with_sizes(spec: ModelSpec, module: nn.Module, event: Growth) -> ModelSpec:
    taken = inspect.signature(type(module).__init__).parameters
    arguments: dict[str, Any] = dict(spec.arguments)
    for name, value in event.sizes.items():
        if name == "image_size":
            size = value if isinstance(value, tuple) else (int(value), int(value))
            spec = replace(spec, input=replace(spec.input, size=(int(size[0]), int(size[1]))))
            if "img_size" in taken:
                arguments["img_size"] = list(size)
            continue
        found = [argument for argument in _ARGUMENTS[name] if argument in taken]
        if not found:
            raise StepError(
                f"{spec.architecture} has no argument for growth.{name} (looked for "
                f"{', '.join(_ARGUMENTS[name])}); leave it out"
            )
        arguments[found[0]] = list(value) if isinstance(value, tuple) else value
    return replace(spec, arguments=arguments)


def _with_heads(spec: ModelSpec, last: ModelSpec, model: Model) -> ModelSpec:
    """`spec`, with heads of the size they have in the end where its own width would make larger ones, or none."""
    if all(not is_attention(part) for part in model.module.modules()):
        return spec
    width, heads = _shape(spec.arguments, model)
    final_width, final_heads = _shape(last.arguments, model)
    if final_width % final_heads:
        raise StepError(f"width {final_width} is no multiple of {final_heads} heads; give one that is")
    final = final_width // final_heads
    if width % heads == 0 and width // heads <= final:
        return spec
    # timm's own constructor insists that heads divide the width, before the edit gives them their size.
    arguments = spec.arguments if width % heads == 0 else {**spec.arguments, "num_heads": 1}
    return replace(spec, arguments=arguments, edits=(AttentionHeads(heads, final),))


def _shape(arguments: Mapping[str, Any], model: Model) -> tuple[int, int]:
    """Width and number of heads, of the arguments where they say it, else of the module."""
    attention: Any = next(part for part in model.module.modules() if is_attention(part))
    width = arguments.get("embed_dim", attention.qkv.in_features)
    heads = arguments.get("num_heads", attention.num_heads)
    if not isinstance(width, int) or not isinstance(heads, int):
        raise StepError(
            f"{model.spec.architecture} has widths {width!r} and heads {heads!r}, one a stage; grow its depth alone"
        )
    return width, heads
