"""What every `Edit` shares: a structural change to a network as data, JSON in and JSON out, no code.

A method that changes structure adds one line to `_HOME`; `load` replays the edits in order.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

from torch import nn

from cveff.errors import CheckpointError

_HOME = {
    "reparameterize": "cveff.backbones.reparameterize:Reparameterize",
    "fold_batch_norm": "cveff.backbones.fold:FoldedBatchNorm",
    "low_rank": "cveff.compress.low_rank_edit:LowRankEdit",
    "attention_heads": "cveff.train.growth.heads:AttentionHeads",
    "drop_blocks": "cveff.compress.drop_blocks:DropBlocks",
    "elastic": "cveff.dynamic.elastic_space:ElasticSpace",
    "shrink_kernels": "cveff.dynamic.shrink_kernels:ShrinkKernels",
    "prune_channels": "cveff.compress.prune_channels:PruneChannels",
    "half": "cveff.compress.quant.half:HalfGraph",
    "half_rest": "cveff.compress.quant.half_rest:HalfRest",
    "quantize": "cveff.compress.quant.network:QuantizedGraph",
    "quantize_weights": "cveff.compress.quant.weight_edit:QuantizeWeights",
    "cond_conv": "cveff.dynamic.cond_conv:ConditionalConvolutions",
    "early_exit": "cveff.dynamic.exits:Exits",
    "glance_focus": "cveff.dynamic.views:Views",
    "sparsity": "cveff.compress.sparsity:Sparsity",
    "adapters": "cveff.train.adapters:Adapters",
    "assembly": "cveff.train.stitching.assembly:Assembly",
    "reduce_tokens": "cveff.dynamic.token_edit:TokenReduction",
}


@runtime_checkable
class Edit(Protocol):
    """A frozen dataclass whose fields are JSON values and which can repeat its change on a fresh network.

    One whose networks only mean something in float32 says `needs_float32 = True`: training's "auto" precision heeds it.
    One whose networks some steps would break has `objection(kind)`: why that kind of step is refused, or None.
    """

    kind: ClassVar[str]

    def apply(self, module: nn.Module) -> nn.Module:
        """Change `module` (it may be modified in place) and return the result."""
        ...


def objection(edits: Sequence[Edit], kind: str) -> str | None:
    """Why a network with these edits cannot be given a step of that kind; None where it can."""
    reasons = (edit.objection(kind) for edit in edits if hasattr(edit, "objection"))
    return next((reason for reason in reasons if reason is not None), None)


def edit_to_json(edit: Edit) -> dict[str, Any]:
    """`{"kind": …, field: value, …}`."""
    return {"kind": edit.kind, **dataclasses.asdict(cast(Any, edit))}


def edit_from_json(values: Mapping[str, Any]) -> Edit:
    """Rebuild an edit from `edit_to_json`'s output.

    Raises:
        CheckpointError: the kind is unknown (a newer cveff wrote it) or its fields do not fit.
    """
    fields = dict(values)
    kind = fields.pop("kind", None)
    if kind not in _HOME:
        raise CheckpointError(
            f"edit kind {kind!r} is unknown; known: {sorted(_HOME)}. Upgrade cveff to read this model"
        )
    module, name = _HOME[kind].split(":")
    try:
        return cast(
            Edit, getattr(importlib.import_module(module), name)(**{k: _frozen(v) for k, v in fields.items()})
        )
    except TypeError as error:
        raise CheckpointError(f"edit {kind!r} has fields that do not fit: {error}") from error


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
