"""Export, quantize, measure, verify and bundle. Calling the package itself exports: `cveff.export(model, path)`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cveff.export.task_outputs import Nms, Output
    from cveff.model import Model


class _CallablePackage(ModuleType):
    """`cveff.export` is a verb and a room; importing the room must not take the verb away."""

    def __call__(
        self,
        model: Model,
        path: str | Path,
        *,
        opset: int | None = None,
        check: bool = True,
        nms: Nms | None = None,
        output: Output | None = None,
    ) -> Path:
        """Write `model` as an ONNX file, or by the name of `path` as AOTInductor's package (`.pt2`).

        See `cveff.export.onnx.export` and `cveff.export.aot_inductor.compile_package`.
        """
        if Path(path).suffix == ".pt2":
            from cveff.errors import ExportError
            from cveff.export.aot_inductor import compile_package

            for name, value in (("opset", opset), ("nms", nms), ("output", output)):
                if value is not None:
                    raise ExportError(
                        f"{name} is of ONNX files, and {path} is a package of AOTInductor; leave it out"
                    )
            return compile_package(model, path, check=check)
        from cveff.export.onnx import export

        return export(model, path, opset=opset, check=check, nms=nms, output=output)


sys.modules[__name__].__class__ = _CallablePackage
