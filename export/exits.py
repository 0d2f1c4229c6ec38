"""A network with early exits as files: one a stage, the whole network by itself, or one graph that branches."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx
from torch import Tensor, nn

from cveff.dynamic.exits import NetworkWithExits, with_exits
from cveff.export.branches import branching
from cveff.export.cut import LOGITS, Cut
from cveff.export.onnx import export_answer
from cveff.export.task_outputs import Answer
from cveff.files import atomic_path
from cveff.model import Model
from cveff.runtime.stages import check_thresholds


class _AllExits(nn.Module):
    """Every exit's logits as the answer."""

    def __init__(self, network: NetworkWithExits) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.network.answers(images)


def export_stages(
    model: Model, folder: str | Path, *, whole: str | None = None, opset: int | None = None
) -> list[Path]:
    """Write one ONNX file for each exit of `model`, the network's own last: `stage1.onnx`, `stage2.onnx`, ….

    The first takes `images` (N, H, W, C) uint8; every later one takes the values, named `carried.…`, that earlier files
    give. All give `logits` (N, classes) float32 of their exit.

    Args:
        whole: also write the network without its early exits, from the same graph, under this name.

    Raises:
        CheckpointError: the model has no early exits.
        ExportError: as `cveff.export`, or the graph cannot be cut at an exit.
    """
    folder = Path(folder)
    cut = _cut(model, opset)
    if whole is not None:
        _write(Cut(cut.proto, cut.answers[-1:]).stage(0), folder / whole)
    return [_write(cut.stage(index), folder / f"stage{index + 1}.onnx") for index in range(len(cut.answers))]


def export_branching(
    model: Model,
    path: str | Path,
    thresholds: Sequence[float],
    *,
    gate: str = "confidence",
    opset: int | None = None,
) -> Path:
    """Write one ONNX file that computes an exit's rest of the network in an `If`.

    ONNX Runtime's CPU engine computes only the branch that is taken; others may compute both. The decision is one a
    batch: it ends at an exit only if every image is certain there, so batches of one save most. For batches use the
    staged bundle.

    Args:
        thresholds: one for each exit but the last; see `cveff.runtime.gates.certainty`.
        gate: "confidence", "margin" or "entropy".

    Raises:
        CveffError: not one threshold for each early exit, or an unknown gate.
        CheckpointError, ExportError: as `export_stages`.
    """
    network = with_exits(model.module, model.spec.architecture)
    checked = check_thresholds(thresholds, len(network.names) + 1)
    return _write(branching(_cut(model, opset), checked, gate, len(model.spec.labels)), Path(path))


def _cut(model: Model, opset: int | None) -> Cut:
    network = with_exits(model.module, model.spec.architecture)
    names = (*(f"exit{index + 1}" for index in range(len(network.names))), LOGITS)
    with tempfile.TemporaryDirectory(prefix="cveff-exits-") as folder:
        path = export_answer(model, Answer(_AllExits(network), names), Path(folder) / "all.onnx", opset=opset)
        return Cut(onnx.load(path), names)


def _write(proto: onnx.ModelProto, path: Path) -> Path:
    with atomic_path(path) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
    return path
