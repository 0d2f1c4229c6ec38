"""Validation between epochs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cveff.data.dataset import Split
from cveff.errors import EngineError, TrainingError
from cveff.measure.accuracy import predict, top1
from cveff.measure.predictor import module_predictor
from cveff.runtime.input_spec import InputSpec

_BATCH = 512


def evaluate(
    module: nn.Module,
    split: Split,
    spec: InputSpec,
    autocast: AbstractContextManager[Any] | None = None,
    gather: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, float]:
    """Top-1 accuracy (0 to 1) and mean cross-entropy of `module` on a split, without augmentation.

    Args:
        gather: makes the whole's logits and targets of those of `split`, where that is a part.

    Raises:
        TrainingError: the logits of an image are not finite.
    """
    was_training = module.training
    predictor = module_predictor(module, spec, threads=torch.get_num_threads())
    try:
        with autocast or nullcontext():
            logits, targets = predict(predictor, split.evaluation_batches(spec, _BATCH))
    except EngineError as error:
        raise TrainingError(
            f"validation: {error}; lower train.learning_rate, or set train.clip_norm"
        ) from error
    finally:
        module.train(was_training)
    assert (
        targets is not None
    )  # evaluation_batches gives them, -1 where there are no labels; top1 refuses those
    if gather is not None:
        logits, targets = gather(logits), gather(targets)
    accuracy = top1(logits, targets)
    loss = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets))
    return {"accuracy": accuracy, "loss": float(loss)}
