"""The chosen stages as an edit, and its adapters' first weights: least squares between features of images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cveff.data.augment import normalize
from cveff.errors import StepError
from cveff.train.stitching.adapter import Adapter
from cveff.train.stitching.assembly import Assembled, Assembly, Section, section_of
from cveff.train.stitching.choose import Choice
from cveff.train.stitching.layout import Layout
from cveff.train.stitching.moments import Moments
from cveff.train.stitching.survey import Staged


def plan(networks: Sequence[Staged], choice: Choice) -> tuple[list[Staged], Assembly]:
    """The networks that give stages, in the order they are first used, and the edit of the first of them."""
    order = list(dict.fromkeys(choice.use))
    bounds = [0, *choice.joints, len(choice.use)]
    sections: list[Section] = []
    joints: list[tuple[Layout, Layout]] = []
    for first, last in pairwise(bounds):
        parent = networks[choice.use[first]].parent
        start = parent.cuts[first - 1] if first else ""
        end = parent.cuts[last - 1] if last < len(choice.use) else ""
        sections.append((order.index(choice.use[first]), start, end))
        if first:
            before = networks[choice.use[first - 1]].parent
            joints.append((before.layouts[first - 1], parent.layouts[first - 1]))
    # Through JSON, so that the edit is the one that is read again from a saved model.
    specs = [json.loads(json.dumps(networks[index].model.spec.to_json())) for index in order[1:]]
    return [networks[index] for index in order], Assembly(tuple(specs), tuple(sections), tuple(joints))


@torch.no_grad()
def fit_adapters(
    module: Assembled,
    edit: Assembly,
    networks: Sequence[Staged],
    batches: Sequence[np.ndarray],
    device: torch.device,
) -> list[float]:
    """Fit adapter after adapter, each to what really comes in through those before it.

    Args:
        module: in evaluation mode; its adapters' weights are replaced.
        networks: in the edit's order.
        batches: uint8 (N, H, W, C).

    Returns:
        For each adapter the share of the expected features' variance that it leaves unexplained.

    Raises:
        StepError: features are not finite.
    """
    errors = []
    for index, item in enumerate(module.adapters):
        assert isinstance(item, Adapter)
        network, start, _ = edit.sections[index + 1]
        target = networks[network].model
        expected = section_of(target.module, "", start)
        moments = Moments((item.source.channels, item.target.channels), device)
        prefix = torch.zeros(item.target.prefix, item.target.channels, dtype=torch.float64, device=device)
        for images in batches:
            x = normalize(images, networks[0].model.spec.input).to(device)
            y: Tensor = expected(normalize(images, target.spec.input).to(device))
            moments.add(item.incoming(module.until(index, x)), item.expected(y))
            if item.prefix is not None:
                prefix += y[:, : item.target.prefix].double().sum(0)
        if not moments.is_finite:
            raise StepError(f"features at joint {index + 1} are NaN or infinite; train the models anew")
        errors.append(item.fit(moments, prefix / sum(map(len, batches))))
    return errors
