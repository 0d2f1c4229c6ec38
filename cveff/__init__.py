"""cveff: small, fast vision models with measured proof.

Every public name loads on first use, so `import cveff` costs milliseconds and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cveff import runtime
    from cveff.apply import apply
    from cveff.edits import Edit
    from cveff.errors import CveffError
    from cveff.export.bench import bench
    from cveff.export.cascade import cascade
    from cveff.export.deploy import deploy
    from cveff.export.onnx import export
    from cveff.export.verify import verify
    from cveff.model import Model, ModelSpec, create, load, save
    from cveff.runtime.input_spec import InputSpec
    from cveff.steps import ModelTimer, Run, Step
    from cveff.target import Target

_HOME = {
    "CveffError": "cveff.errors",
    "Edit": "cveff.edits",
    "InputSpec": "cveff.runtime.input_spec",
    "Model": "cveff.model",
    "ModelSpec": "cveff.model",
    "ModelTimer": "cveff.steps",
    "Run": "cveff.steps",
    "Step": "cveff.steps",
    "Target": "cveff.target",
    "apply": "cveff.apply",
    "bench": "cveff.export.bench",
    "cascade": "cveff.export.cascade",
    "create": "cveff.model",
    "deploy": "cveff.export.deploy",
    "export": "cveff.export.onnx",
    "load": "cveff.model",
    "save": "cveff.model",
    "verify": "cveff.export.verify",
}

__all__ = [
    "CveffError",
    "Edit",
    "InputSpec",
    "Model",
    "ModelSpec",
    "ModelTimer",
    "Run",
    "Step",
    "Target",
    "apply",
    "bench",
    "cascade",
    "create",
    "deploy",
    "export",
    "load",
    "runtime",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "runtime":
        return importlib.import_module("cveff.runtime")
    if name not in _HOME:
        raise AttributeError(f"module 'cveff' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
