"""`Tune`: fine-tune a small part of a trained network, and leave the rest to the bit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cveff.errors import StepError
from cveff.model import Model, with_module
from cveff.runtime.input_spec import InputSpec
from cveff.steps import Run
from cveff.train.adapters import AdapterMethod, Adapters, adapter_parameters, merged, require_peft
from cveff.train.layers import classifier_paths, hidden_layers, repeated_blocks
from cveff.train.loop import fit
from cveff.train.objective import CrossEntropy
from cveff.train.train import Train

Method = Literal["head", "bias", "norm", "blocks", "lora", "dora", "loha", "lokr"]
_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


def _default_training() -> Train:
    return Train(epochs=10, optimizer="adamw", learning_rate=1e-3, weight_decay=0.0)


@dataclass(frozen=True)
class Tune:
    """Train the classifier and a small part of the network on the run's data.

    Attributes:
        method: what is trained beside the classifier: "head" nothing, "bias" every bias (BitFit: Ben Zaken et al.,
            arXiv:2106.10199), "norm" scales and shifts of norms, "blocks" the last blocks and what follows them,
            "lora", "dora", "loha" or "lokr" adapters of peft on hidden linear layers and convolutions ("dora" on
            linear layers alone).
        num_blocks: how many, for "blocks".
        rank: of adapters.
        alpha: adapters add their part times alpha / rank.
        layers: patterns of names of the layers that get adapters; by default all hidden linear ones, or all hidden
            convolutions where there are none.
        merge: add the adapters into the weights at the end: the network's structure is then what it was.
        train: how to train; by default 10 epochs of AdamW at 1e-3 without weight decay.

    Raises:
        StepError: at construction, for a value out of range.
    """

    method: Method = "lora"
    num_blocks: int = 1
    rank: int = 8
    alpha: float = 16.0
    layers: tuple[str, ...] = ()
    merge: bool = True
    train: Train = field(default_factory=_default_training)

    kind: ClassVar[str] = "tune"
    requires: ClassVar[tuple[str, ...]] = ("data",)

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise StepError(f"tune.method is {self.method!r}; give one of {', '.join(get_args(Method))}")
        if self.num_blocks < 1:
            raise StepError(f"tune.num_blocks is {self.num_blocks!r}; give 1 or more")
        if self.rank < 1:
            raise StepError(f"tune.rank is {self.rank!r}; give 1 or more")
        if not self.alpha > 0:
            raise StepError(f"tune.alpha is {self.alpha!r}; give a positive number")
        if self.layers and self.method not in get_args(AdapterMethod):
            raise StepError(
                f"tune.layers are for adapters, and tune.method is {self.method!r}; leave them out"
            )

    def __call__(self, model: Model, run: Run) -> Model:
        """Train, with the frozen weights and statistics as they were, and merge the adapters if there are any.

        Raises:
            StepError: nothing of the network fits the method.
            MissingDependencyError: adapters without peft.
            TrainingError, CheckpointError: as `Train`.
        """
        module = model.module
        chosen = self._own_parameters(module)
        if self.method in get_args(AdapterMethod):
            require_peft()
            edit = Adapters(
                cast(AdapterMethod, self.method), self.rank, float(self.alpha), self._layers(model)
            )
            torch.manual_seed(run.seed)
            model = with_module(model, edit.apply(module), edit)
            chosen += list(adapter_parameters(module).values())
        trained = {id(parameter) for parameter in chosen}
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        count = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        run.progress.message(f"{self.method}: {count:,} of {model.num_parameters:,} parameters are trained")
        model = fit(model, self.train, run, Frozen(self))
        if self.method in get_args(AdapterMethod) and self.merge:
            model = Model(replace(model.spec, edits=model.spec.edits[:-1]), merged(model.module))
        model.module.requires_grad_(True)
        return model

    def _own_parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """What is trained of the network's own parameters: the classifier's, and what the method adds."""
        heads = classifier_paths(module)
        chosen = [parameter for path in heads for parameter in module.get_submodule(path).parameters()]
        if self.method == "bias":
            more = [
                item for name, item in module.named_parameters() if name.rpartition(".")[2].endswith("bias")
            ]
        elif self.method == "norm":
            norms = [part for part in module.modules() if isinstance(part, _NORMS) or _is_timm_norm(part)]
            more = [parameter for norm in norms for parameter in norm.parameters(recurse=False)]
        elif self.method == "blocks":
            more = self._last_blocks(module)
        else:
            return chosen
        if not more:
            raise StepError(
                f"{type(module).__name__} has nothing that tune.method {self.method!r} trains; use another"
            )
        return chosen + more

    def _last_blocks(self, module: nn.Module) -> list[nn.Parameter]:
        blocks = repeated_blocks(module)
        if len(blocks) < self.num_blocks:
            raise StepError(
                f"tune.num_blocks is {self.num_blocks} and {type(module).__name__} has {len(blocks)} blocks"
            )
        first = list(blocks)[-self.num_blocks]
        named = list(module.named_parameters())
        start = next(index for index, (name, _) in enumerate(named) if name.startswith(f"{first}."))
        return [parameter for _, parameter in named[start:]]

    def _layers(self, model: Model) -> tuple[str, ...]:
        """Paths of the layers that get adapters."""
        module = model.module
        hidden = _called(module, dict(hidden_layers(module)), model.spec.input)
        linear = [item for item in hidden if isinstance(item[1], nn.Linear)]
        if self.method == "dora":
            hidden = linear  # peft's DoRA takes no kernel in channels_last memory
        found = [path for path, _ in linear or hidden]
        if self.layers:
            for pattern in self.layers:
                if not any(fnmatch(path, pattern) for path, _ in hidden):
                    names = ", ".join(path for path, _ in hidden[:5])
                    raise StepError(f"tune.layers: {pattern!r} is no hidden layer; there are {names}, …")
            found = [path for path, _ in hidden if any(fnmatch(path, pattern) for pattern in self.layers)]
        if not found:
            raise StepError(f"{type(module).__name__} has no hidden linear layer or convolution for adapters")
        return tuple(found)


class Frozen(CrossEntropy):
    """Cross-entropy under which batch norms that are not trained keep their statistics."""

    def __init__(self, settings: Tune) -> None:
        super().__init__(settings.train.label_smoothing)
        self._settings = settings

    def loss(self, module: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, summed over the images."""
        for part in module.modules():
            if isinstance(part, _BatchNorm) and not any(item.requires_grad for item in part.parameters()):
                part.eval()
        return super().loss(module, images, targets)

    def identity(self) -> dict[str, object]:
        """What is trained; the rest is in `Train`'s settings."""
        settings = self._settings
        return {
            "method": settings.method,
            "num_blocks": settings.num_blocks,
            "rank": settings.rank,
            "alpha": settings.alpha,
            "layers": list(settings.layers),
        }


def _called(module: nn.Module, layers: dict[str, nn.Module], spec: InputSpec) -> list[tuple[str, nn.Module]]:
    """The layers that a blank image passes through: an adapter on a layer whose weight is used without calling it,
    as attention may do, would be left out in silence."""
    called: set[str] = set()
    hooks = [
        layer.register_forward_hook(lambda *_, path=path: called.add(path)) for path, layer in layers.items()
    ]
    was_training, device = module.training, next(module.parameters()).device
    try:
        with torch.no_grad():
            module.eval()(torch.zeros(1, spec.channels, *spec.size, device=device))
    finally:
        module.train(was_training)
        for hook in hooks:
            hook.remove()
    return [(path, layer) for path, layer in layers.items() if path in called]


def _is_timm_norm(part: nn.Module) -> bool:
    """timm's own norms (RmsNorm, LayerNorm2d, …) share no base class."""
    return "norm" in type(part).__name__.lower() and next(part.children(), None) is None
