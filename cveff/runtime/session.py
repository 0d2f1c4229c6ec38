"""`Session`: a model file opened by an engine. It takes uint8 NHWC batches and returns float32 logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from .errors import EngineError, InputSizeError

Dimension = int | None
"""One dimension of a tensor; None where the file leaves it open."""

CARRIED = "carried."
"""How the names of tensors begin that one stage of a network gives to a later one."""

Choices = tuple[Any, ...] | range | type[str]
"""What an option may be: one of these values, an integer of this range, or any text."""


class Session(ABC):
    """A predictor: `session(images) -> logits`.

    Attributes:
        engine: the engine's name.
        path: the file that was opened.
        threads: threads the engine was given.
        size: (height, width) the file takes; None where it leaves either open.
        channels: channels the file takes; None where it leaves them open.
        batch: the only batch size the file takes; None where any will do.
        num_classes: width of the logits; None where the file leaves it open.
        notes: what a user should know of how the engine runs this file, such as work that it left to the CPU.
        carried: inputs of a file that goes on from what an earlier stage of the same network gave, in the file's order;
            empty for files that take images.
        output_names: of the file's outputs.
    """

    engine: str

    def __init__(self, path: Path, threads: int) -> None:
        self.path = path
        self.threads = threads
        self.size: tuple[int, int] | None = None
        self.channels: Dimension = None
        self.batch: Dimension = None
        self.num_classes: Dimension = None
        self.notes: tuple[str, ...] = ()
        self.carried: tuple[str, ...] = ()
        self.output_names: tuple[str, ...] = ("logits",)
        self._input_shape: tuple[Dimension, ...] = (None, None, None, None)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Logits of a batch.

        Args:
            images: (N, H, W, C) uint8; N may be 0.

        Returns:
            (N, classes) float32, an array of its own.

        Raises:
            InputSizeError: another shape or dtype.
            EngineError: the engine failed, or the session was closed.
        """
        self._check(images)
        if len(images) == 0:
            one = np.zeros((self.batch or 1, *images.shape[1:]), np.uint8)
            return np.zeros((0, self.num_classes or self._run(one).shape[-1]), np.float32)
        return self._run(np.ascontiguousarray(images))

    def outputs(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Every output of the file by name, in its own type; arguments and errors as `__call__`."""
        self._check(images)
        if len(images) == 0:
            one = np.zeros((self.batch or 1, *images.shape[1:]), np.uint8)
            return {name: value[:0] for name, value in self._run_all(one).items()}
        return self._run_all(np.ascontiguousarray(images))

    def go_on(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output of a stage by name, from what earlier stages carried to it.

        Args:
            values: by name, those in `carried` at least; each (N, …) of the type the earlier stage gave, N 1 or more.

        Raises:
            EngineError: the engine failed, or does not run such files.
        """
        return self._run_carried([np.ascontiguousarray(values[name]) for name in self.carried])

    def metadata(self) -> dict[str, str]:
        """What the file says about itself, as written; empty where the engine does not tell."""
        return {}

    def close(self) -> None:
        """Free the engine's memory. The session cannot be used afterwards; closing twice is harmless."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _run(self, images: np.ndarray) -> np.ndarray: ...

    def _run_all(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Engines that run files with other outputs than logits return those, too."""
        return {"logits": self._run(images)}

    def _run_carried(self, values: list[np.ndarray]) -> dict[str, np.ndarray]:
        raise EngineError(
            f"{self.engine} does not run {self.path.name}, which goes on from another stage; use "
            f"onnxruntime or openvino"
        )

    @abstractmethod
    def _release(self) -> None: ...

    def _describe(
        self, inputs: Sequence[tuple[str, Sequence[Dimension]]], dtype: str, output: Sequence[Dimension]
    ) -> None:
        """Check that the file has the one input cveff's files have, and remember its dimensions.

        Args:
            inputs: name and shape of every input of the file.
            dtype: element type of the first input, "uint8" where it is right.
            output: shape of the output that holds the logits.
        """
        self.num_classes = output[-1] if len(output) == 2 else None
        if inputs and all(name.startswith(CARRIED) for name, _ in inputs):
            self.carried = tuple(name for name, _ in inputs)
            return
        if len(inputs) != 1 or dtype != "uint8" or len(inputs[0][1]) != 4:
            described = ", ".join(f"{name} {_shape(shape)}" for name, shape in inputs) or "nothing"
            raise EngineError(
                f"{self.path} takes {described} of type {dtype or 'none'}; cveff runs files with one uint8 "
                "input of shape (N, H, W, C), such as cveff.export writes"
            )
        shape = tuple(inputs[0][1])
        self._input_shape = shape
        self.batch, height, width, self.channels = shape
        self.size = (height, width) if height is not None and width is not None else None

    def _check(self, images: np.ndarray) -> None:
        if self.carried:
            raise InputSizeError(
                f"{self.path.name} goes on from another stage and takes no images; open the bundle it belongs to"
            )
        expected = _shape(self._input_shape)
        if not isinstance(images, np.ndarray):
            raise InputSizeError(
                f"a {type(images).__name__} was given; the model takes a numpy uint8 array {expected}"
            )
        if images.ndim == 3:
            raise InputSizeError(
                f"the batch has shape {images.shape}, the model takes {expected}; "
                "one image is a batch of one: images[None]"
            )
        if images.ndim != 4:
            raise InputSizeError(f"the batch has shape {images.shape}, the model takes {expected}")
        if images.dtype != np.uint8:
            raise InputSizeError(
                f"the batch is {images.dtype}, the model takes uint8 from 0 to 255; scaling and "
                "normalisation happen inside the model, so give the pixels as they are"
            )
        if any(
            want not in (None, got) for want, got in zip(self._input_shape[1:], images.shape[1:], strict=True)
        ):
            advice = self._advice(images.shape)
            raise InputSizeError(f"the batch has shape {images.shape}, the model takes {expected}; {advice}")
        if self.batch is not None and len(images) not in (0, self.batch):
            raise InputSizeError(
                f"the batch holds {len(images)} images, but {self.path.name} was built for batches of "
                f"exactly {self.batch}; export it with a dynamic batch"
            )

    def _advice(self, shape: tuple[int, ...]) -> str:
        height, width, channels = self._input_shape[1:]
        if (channels, height, width) == shape[1:]:
            return "channels come last: images.transpose(0, 2, 3, 1)"
        return "engine.preprocess(images) decodes, resizes and crops to that shape"


def check_options(
    engine: str, options: Mapping[str, Any] | None, known: Mapping[str, Choices]
) -> dict[str, Any]:
    """`options` as a dict, after checking its keys and values against those the engine knows.

    Raises:
        EngineError: an unknown option or value.
    """
    options = dict(options or {})
    for key, value in options.items():
        if key not in known:
            raise EngineError(f"{engine} has no option {key!r}; known: {', '.join(sorted(known))}")
        if not _fits(value, known[key]):
            raise EngineError(f"option {key} of {engine} is {value!r}; {_advised(known[key])}")
    return options


def _fits(value: Any, choices: Choices) -> bool:
    if isinstance(choices, range):
        return isinstance(value, int) and not isinstance(value, bool) and value in choices
    if isinstance(choices, tuple):
        # By type as well: True is not the option 1.
        return any(type(value) is type(choice) and value == choice for choice in choices)
    return isinstance(value, choices)


def _advised(choices: Choices) -> str:
    if isinstance(choices, range):
        return f"give an integer from {choices.start} to {choices.stop - 1}"
    return f"use one of {list(choices)}" if isinstance(choices, tuple) else "give text"


def engine_message(error: BaseException) -> str:
    """An engine's message without the stack it prints."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:400] if lines else type(error).__name__


def _shape(shape: Sequence[Dimension]) -> str:
    names = ("N", "H", "W", "C")
    words = [str(size) if size is not None else names[axis] for axis, size in enumerate(shape[:4])]
    return f"({', '.join(words)})"
