"""Depth: residual blocks that can be taken out whole, and how much a network needs each of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from cveff.compress.drop_blocks import Skip
from cveff.compress.samples import Batches, evaluation, labels_of, require_batches
from cveff.compress.trace import Trace
from cveff.compress.units import device_of
from cveff.errors import StepError

BlockCriterion = Literal["loss", "similarity"]

# Operators that hand a tensor's numbers on (dropout: in evaluation mode), in the same order or another.
_UNCHANGED = {
    "reshape",
    "view",
    "flatten",
    "unflatten",
    "contiguous",
    "clone",
    "dropout",
    "dropout_",
    "detach",
}
_UNCHANGED |= {"squeeze", "unsqueeze", "alias", "_unsafe_view", "lift_fresh_copy", "to", "feature_dropout"}
_MOVED = {"permute", "transpose", "movedim", "roll", "flip"}
_RELU = {"relu", "relu_"}
_NOT_NEGATIVE = {*_RELU, "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"} | _UNCHANGED | _MOVED
_ADD = {"add", "add_"}


def removable_blocks(module: nn.Module, trace: Trace) -> tuple[str, ...]:
    """Paths of the modules that compute x + f(x), which is x when f contributes nothing, in the order they run.

    Looked at are the children of `nn.Sequential` and `nn.ModuleList` and siblings of one class, by what the trace says
    of them: one tensor in, one out of the same shape, and between the two a path of additions and moves alone that
    brings every number back to its place. A ReLU behind the last
    addition is fine where the input comes out of a ReLU itself, as between the blocks of a ResNet. Of
    blocks inside blocks the innermost is named.

    Args:
        module: the network that `trace` is of.
    """
    found = [
        path
        for path in _candidates(module)
        if (ends := block_ends(trace, path)) is not None and _is_residual(trace, *ends)
    ]
    inner = [path for path in found if not any(other.startswith(path + ".") for other in found)]
    order = {
        trace.modules[node.name]: index
        for index, node in reversed(list(enumerate(trace.program.graph.nodes)))
    }

    def first(path: str) -> int:
        return min(index for name, index in order.items() if name == path or name.startswith(path + "."))

    return tuple(sorted(inner, key=first))


def block_importance(
    module: nn.Module,
    blocks: Sequence[str],
    batches: Batches,
    criterion: BlockCriterion = "loss",
) -> dict[str, float]:
    """How much the network needs each block, larger meaning more. `module` is left as it was.

    Args:
        blocks: paths, as `removable_blocks` gives them.
        criterion: "loss": increase of the cross-entropy when the block alone is skipped; against the whole network's
            soft predictions where images have no classes, one forward pass a block. "similarity": 1 − mean cosine
            of an image's input and output of the block (Men et al., "ShortGPT", 2024, section 3.2), one pass for all.

    Raises:
        StepError: no images, an unknown criterion or block, or a block whose effect is not finite.
    """
    if criterion not in get_args(BlockCriterion):
        raise StepError(
            f"block importance {criterion!r} is unknown; known: {', '.join(get_args(BlockCriterion))}"
        )
    given = require_batches(batches, "block importance")
    names = dict(module.named_modules())
    for path in blocks:
        if path not in names:
            raise StepError(f"the network has no block {path!r}; find blocks in it again")
    with evaluation(module), torch.no_grad():
        scores = (_losses if criterion == "loss" else _similarities)(module, blocks, given)
    for path, value in scores.items():
        if not abs(value) < float("inf"):
            raise StepError(f"importance of block {path} is {value}; check the weights in and before it")
    return scores


@contextmanager
def skipped(module: nn.Module, blocks: Sequence[str]) -> Iterator[nn.Module]:
    """`module` as it computes without `blocks`; whole again afterwards."""
    replaced = []
    try:
        for path in blocks:
            parent_path, _, name = path.rpartition(".")
            parent = module.get_submodule(parent_path)
            replaced.append((parent, name, parent._modules[name]))
            parent._modules[name] = Skip()
        yield module
    finally:
        for parent, name, block in replaced:
            parent._modules[name] = block


def _losses(module: nn.Module, blocks: Sequence[str], batches: Batches) -> dict[str, float]:
    dense = [module(images.to(device_of(module))).float() for images, _ in batches]
    whole = sum(_loss(logits, logits, targets) for logits, (_, targets) in zip(dense, batches, strict=True))
    count = sum(len(images) for images, _ in batches)
    scores = {}
    for path in blocks:
        with skipped(module, [path]):
            total = sum(
                _loss(module(images.to(device_of(module))).float(), logits, targets)
                for logits, (images, targets) in zip(dense, batches, strict=True)
            )
        scores[path] = (total - whole) / count
    return scores


def _loss(logits: Tensor, dense: Tensor, targets: Tensor | None) -> float:
    labels = labels_of(targets)
    answers = dense.softmax(dim=1) if labels is None else labels.to(logits.device)
    return float(F.cross_entropy(logits, answers, reduction="sum"))


def _similarities(module: nn.Module, blocks: Sequence[str], batches: Batches) -> dict[str, float]:
    cosines: dict[str, list[Tensor]] = {path: [] for path in blocks}
    before: dict[str, Tensor] = {}

    def enter(path: str) -> Any:
        # A copy, because the block may add to its input in place.
        return lambda block, args: before.__setitem__(path, args[0].clone())

    def leave(path: str) -> Any:
        return lambda block, args, made: cosines[path].append(
            F.cosine_similarity(before.pop(path).flatten(1).double(), made.flatten(1).double()).cpu()
        )

    hooks = []
    for path in blocks:
        block = module.get_submodule(path)
        hooks.append(block.register_forward_pre_hook(enter(path)))
        hooks.append(block.register_forward_hook(leave(path)))
    try:
        for images, _ in batches:
            module(images.to(device_of(module)))
    finally:
        for hook in hooks:
            hook.remove()
    return {path: 1 - float(torch.cat(values).mean()) for path, values in cosines.items()}


def _candidates(module: nn.Module) -> list[str]:
    """Children of sequences and lists, and siblings of one class (RegNet's `s1.b1`, `s1.b2`, …)."""
    found = []
    for path, parent in module.named_modules():
        classes = Counter(type(child) for child in parent.children())
        is_sequence = isinstance(parent, (nn.Sequential, nn.ModuleList))
        for name, child in parent.named_children():
            if is_sequence or classes[type(child)] > 1:
                found.append(f"{path}.{name}" if path else name)
    return found


def block_ends(trace: Trace, path: str) -> tuple[fx.Node, fx.Node] | None:
    """The one tensor that enters the module and the one that leaves it, if they are one each, of the same shape."""
    inside = {
        node
        for node in trace.program.graph.nodes
        if node.op == "call_function" and (trace.modules[node.name] + ".").startswith(path + ".")
    }
    images = set(trace.program.graph_signature.user_inputs)
    entering = {
        argument
        for node in inside
        for argument in node.all_input_nodes
        if argument not in inside and (argument.op == "call_function" or argument.name in images)
    }
    leaving = {node for node in inside if any(user not in inside for user in node.users)}
    if len(entering) != 1 or len(leaving) != 1:
        return None
    (first,), (last,) = entering, leaving
    shape = trace.shapes.get(first.name)
    return (first, last) if shape is not None and shape == trace.shapes.get(last.name) else None


def _is_residual(trace: Trace, first: fx.Node, last: fx.Node) -> bool:
    """Whether `last` is `first` plus something, or the ReLU of that where `first` is not negative."""
    node = last
    if _operator(node) in _RELU:
        node = node.all_input_nodes[0]
        if not _is_not_negative(first):
            return False
    path = _path(trace, node, first)
    return any(_operator(step) in _ADD for step in path or ()) and _keeps_order(trace, first, path or [])


def _path(trace: Trace, node: fx.Node, first: fx.Node) -> list[fx.Node] | None:
    """The nodes of a path of additions and moves from `first` to `node`, in the order they run; None without one."""
    if node is first:
        return []
    operator = _operator(node)
    terms = node.all_input_nodes
    if operator in _ADD and node.kwargs.get("alpha", 1) == 1:
        # A term of another shape is broadcast: not the block's input, number for number.
        terms = [term for term in terms if trace.shapes.get(term.name) == trace.shapes[node.name]]
    elif operator not in _UNCHANGED | _MOVED:
        return None
    for term in terms:
        if (path := _path(trace, term, first)) is not None:
            return [*path, node]
    return None


def _keeps_order(trace: Trace, first: fx.Node, path: list[fx.Node]) -> bool:
    """Whether numbers end where they began: the path's moves, replayed on numbered positions."""
    shape = trace.shapes[first.name]
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    moved = numbers
    for node in path:
        if _operator(node) not in _ADD:
            moved = node.target(moved, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return moved.shape == numbers.shape and torch.equal(moved, numbers)


def _is_not_negative(node: fx.Node) -> bool:
    while _operator(node) in _NOT_NEGATIVE:
        if _operator(node) in _RELU:
            return True
        node = node.all_input_nodes[0]
    return False


def _operator(node: fx.Node) -> str:
    """`relu` of `aten.relu.default`; "" for what is no operator."""
    name = str(node.target) if node.op == "call_function" else ""
    return name.split(".")[1] if name.startswith("aten.") else ""
