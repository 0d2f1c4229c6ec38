"""`Adapters`: small trainable layers beside frozen ones, by peft; an edit, which a step merges into the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from torch import nn

from cveff.errors import CheckpointError, MissingDependencyError, StepError
from cveff.model import Model
from cveff.runtime.errors import first_line
from cveff.steps import Run

AdapterMethod = Literal["lora", "dora", "loha", "lokr"]


@dataclass(frozen=True)
class Adapters:
    """Layers that peft has put adapters on; as an edit it repeats that on a fresh network.

    Attributes:
        method: "lora" adds B A of rank r (Hu et al., arXiv:2106.09685), "dora" also learns each output's length
            (Liu et al., arXiv:2402.09353), "loha" and "lokr" add Hadamard and Kronecker products (Yeh et al.,
            arXiv:2309.14859).
        rank: r.
        alpha: the added part is scaled by alpha / rank.
        layers: paths of linear layers and convolutions.
    """

    method: AdapterMethod
    rank: int
    alpha: float
    layers: tuple[str, ...]

    kind: ClassVar[str] = "adapters"

    def apply(self, module: nn.Module) -> nn.Module:
        """Put the adapters on; at first they add nothing.

        Raises:
            MissingDependencyError: peft is not installed.
            CheckpointError: `module` lacks a layer, or peft cannot adapt one.
        """
        peft = require_peft()
        present = dict(module.named_modules())
        missing = [path for path in self.layers if path not in present]
        if missing or self.method not in get_args(AdapterMethod):
            raise CheckpointError(
                f"adapters {self.method!r} on {', '.join(missing) or 'no layer'} do not fit {type(module).__name__}; "
                "load them with the architecture they were made for"
            )
        try:
            peft.inject_adapter_in_model(self._configuration(peft), module)
        except (ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"peft cannot put {self.method} adapters of rank {self.rank} on these layers: {first_line(error)}"
            ) from error
        return module

    def _configuration(self, peft: Any) -> Any:
        targets = "|".join(re.escape(path) for path in self.layers)
        if self.method in ("lora", "dora"):
            return peft.LoraConfig(
                r=self.rank, lora_alpha=self.alpha, target_modules=targets, use_dora=self.method == "dora"
            )
        configuration = peft.LoHaConfig if self.method == "loha" else peft.LoKrConfig
        return configuration(r=self.rank, alpha=self.alpha, target_modules=targets)


@dataclass(frozen=True)
class MergeAdapters:
    """Add adapters into the weights they stand beside: W ← W + scale · B A. The network is again what it was.

    Merge before export: unmerged adapters cost time in the exported file and change nothing else.
    """

    kind: ClassVar[str] = "merge_adapters"
    requires: ClassVar[tuple[str, ...]] = ()

    def __call__(self, model: Model, run: Run) -> Model:
        """The model without adapters, and without their edit.

        Raises:
            StepError: there are none, or the network was changed after they were added.
        """
        edits = model.spec.edits
        if not any(isinstance(edit, Adapters) for edit in edits):
            raise StepError(f"{model.spec.architecture} has no adapters to merge; leave merge_adapters out")
        if not isinstance(edits[-1], Adapters):
            raise StepError(
                f"{edits[-1].kind} was done after adapters were added, and may name their layers; merge adapters first"
            )
        return Model(replace(model.spec, edits=edits[:-1]), merged(model.module))


def merged(module: nn.Module) -> nn.Module:
    """`module` with peft's layers replaced by the layers they wrap, adapters added to their weights.

    Raises:
        StepError: an adapter's weights are not finite.
    """
    require_peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in list(module.named_modules()):
        if not isinstance(layer, BaseTunerLayer):
            continue
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise StepError(f"adapters of {path} cannot be merged: {first_line(error)}") from error
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, layer.get_base_layer())
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(module).pop(name, None)
    return module


def adapter_parameters(module: nn.Module) -> Mapping[str, nn.Parameter]:
    """Weights that adapters added, by name."""
    require_peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, nn.Parameter] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer):
            base = {id(parameter) for parameter in layer.get_base_layer().parameters()}
            named = module.get_submodule(path).named_parameters()
            found |= {f"{path}.{name}": item for name, item in named if id(item) not in base}
    return found


def require_peft() -> Any:
    """The package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            "adapters need peft; pip install 'cveff[peft]', or tune with method head, bias, norm or blocks"
        ) from error
    return peft
