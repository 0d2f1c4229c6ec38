"""The search of `LowRank`: choose ranks, time the whole file, undo what brought nothing, and choose again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from cveff.compress.low_rank_choice import choose, saved
from cveff.compress.low_rank_edit import LowRankEdit, geometry
from cveff.compress.low_rank_options import LayerOptions, Option, install
from cveff.errors import StepError
from cveff.model import Model, with_module
from cveff.steps import Run

ROUNDS = 8
"""Times that ranks are chosen and the file is measured; the table's milliseconds are corrected in between."""

UNDOINGS = 4
"""Rounds that may undo layers; later ones only follow the goal."""

TOLERANCE = 0.02
"""Relative excess over the latency goal that counts as met: files cannot be timed more closely."""


@dataclass(frozen=True)
class Found:
    """What the search ends with.

    Attributes:
        model: with the edit, or as it was where nothing was chosen.
        chosen: path -> option.
        reasons: path -> why a layer was left alone.
        before, after: milliseconds of the file; None without a timer.
    """

    model: Model
    chosen: Mapping[str, Option]
    reasons: Mapping[str, str]
    before: float | None
    after: float | None

    @property
    def loss(self) -> float:
        """What the choice adds up to; with data, an estimate of the answers' divergence in nats."""
        return sum(option.loss for option in self.chosen.values())

    @property
    def figures(self) -> dict[str, float]:
        """For the log."""
        figures = {
            "low_rank/layers": float(len(self.chosen)),
            "low_rank/largest_error": max((option.error for option in self.chosen.values()), default=0.0),
            "low_rank/loss": self.loss,
        }
        if self.before is not None and self.after is not None:
            figures |= {"low_rank/before_ms": self.before, "low_rank/after_ms": self.after}
        return figures


class Search:
    """One search for one model.

    Args:
        model: the dense one, left as it is.
        layers: what each layer could become.
        reasons: why other layers cannot become anything.
        goal: share of the file's time, or None: every layer takes its fastest option.
    """

    def __init__(
        self,
        model: Model,
        layers: Mapping[str, LayerOptions],
        reasons: Mapping[str, str],
        run: Run,
        goal: float | None,
    ) -> None:
        self._model, self._timer, self._goal, self._say = model, run.timer, goal, run.progress.message
        self._layers = dict(layers)
        self._reasons = {**reasons, **{path: item.reason for path, item in layers.items() if item.reason}}
        self._checked: set[tuple[Any, ...]] = set()
        self._undoings = 0

    def run(self) -> Found:
        """Find the ranks.

        Raises:
            StepError: the goal cannot be reached.
        """
        if not any(layer.options for layer in self._layers.values()):
            if self._goal is not None:
                raise StepError(f"low_rank: no layer would get faster; {self._first_reasons()}")
            return self._found({}, None, None)
        if self._timer is None:
            self._say("low rank: without a target the file is not timed; layers are judged one by one")
            return self._found(self._fastest(), None, None)
        return self._with_timer()

    def _with_timer(self) -> Found:
        if self._goal is None:
            return self._all_that_help()
        assert self._timer is not None
        dense = self._timer.milliseconds({"dense": self._model})["dense"]
        worth = 1.0  # milliseconds of the file that one of the table saves
        met: Found | None = None
        reached = 1.0
        tried: Mapping[str, Option] = {}
        for _ in range(ROUNDS):
            wanted = choose(self._layers, (1 - self._goal) * dense / worth)
            chosen = self._fastest() if wanted is None else wanted
            if not chosen or chosen == tried:
                break
            times, useless = self._time(chosen)
            if useless and len(useless) < len(chosen):
                self._close({path: chosen[path] for path in useless})
                continue
            tried, dense, now = chosen, times["dense"], times["low rank"]
            found = self._found(chosen, dense, now)
            reached = min(reached, now / dense)
            real = max((dense - now) / saved(self._layers, chosen), 0.1)
            if now / dense <= self._goal * (1 + TOLERANCE):
                if met is None or found.loss < met.loss:
                    met = found
                if wanted is not None and now / dense >= self._goal * (1 - 2 * TOLERANCE):
                    break
                worth = real
            elif wanted is None or met is not None:
                break
            else:
                worth = min(real, 0.97 * worth)
        if met is None:
            raise StepError(
                f"low_rank.latency {self._goal:g} cannot be reached: the best measured is {reached:.2f} of the "
                f"file's time; raise it, {'raise energy, ' if self._limits_error() else ''}or combine it with "
                f"pruning. {self._first_reasons()}"
            )
        return met

    def _all_that_help(self) -> Found:
        """Every layer at its fastest, without those that the file is no slower without."""
        times, useless = self._time(self._fastest())
        if useless:
            self._close({path: self._fastest()[path] for path in useless})
            if self._fastest():
                times, _ = self._time(self._fastest())
        dense, now = times["dense"], times["low rank"]
        if not self._fastest() or now >= dense:
            self._close(self._fastest())
            return self._found({}, dense, dense)
        return self._found(self._fastest(), dense, now)

    def _fastest(self) -> dict[str, Option]:
        return {path: layer.options[0] for path, layer in self._layers.items() if layer.options}

    def _time(self, chosen: Mapping[str, Option]) -> tuple[dict[str, float], list[str]]:
        """The file before and after, and layers without whose chains it is no slower.

        Layers of one shape and rank are judged together; each such choice once.
        """
        assert self._timer is not None
        groups: dict[tuple[Any, ...], list[str]] = {}
        for path, option in chosen.items():
            layer = self._model.module.get_submodule(path)
            key = (geometry(layer), self._layers[path].milliseconds, option.method, option.rank)
            groups.setdefault(key, []).append(path)
        models = {"dense": self._model, "low rank": factorised(self._model, chosen)}
        asked = {f"without {paths[0]}": (key, paths) for key, paths in groups.items()}
        asked = {
            name: item
            for name, item in asked.items()
            if item[0] not in self._checked and len(groups) > 1 and self._undoings < UNDOINGS
        }
        for name, (key, paths) in asked.items():
            rest = {path: option for path, option in chosen.items() if path not in paths}
            models[name] = factorised(self._model, rest)
            self._checked.add(key)
        times = self._timer.milliseconds(models)
        useless = [
            path for name, (_, paths) in asked.items() if times[name] <= times["low rank"] for path in paths
        ]
        return times, useless

    def _close(self, useless: Mapping[str, Option]) -> None:
        """Give up options that did not make the file faster, and those that the table has for slower still."""
        self._undoings += 1
        for path, option in useless.items():
            layer = self._layers[path]
            left = tuple(other for other in layer.options if other.milliseconds < option.milliseconds)
            reason = "" if left else "was undone: in the file its factors were no faster"
            self._layers[path] = replace(layer, options=left, reason=reason)
            if reason:
                self._reasons[path] = reason

    def _found(self, chosen: Mapping[str, Option], before: float | None, after: float | None) -> Found:
        reasons = dict(self._reasons)
        for path, layer in self._layers.items():
            if layer.options and path not in chosen:
                reasons[path] = "was not needed for the goal"
        model = factorised(self._model, chosen) if chosen else self._model
        return Found(model, dict(chosen), reasons, before, after)

    def _limits_error(self) -> bool:
        return any("allowed" in layer.reason for layer in self._layers.values())

    def _first_reasons(self) -> str:
        return "; ".join(f"{path} {why}" for path, why in list(self._reasons.items())[-3:])


def factorised(model: Model, chosen: Mapping[str, Option]) -> Model:
    """A copy of `model` with its layers replaced by the chosen chains."""
    edit = LowRankEdit(
        {path: {"method": option.method, "rank": option.rank} for path, option in chosen.items()}
    )
    module = edit.apply(copy.deepcopy(model.module))
    for path, option in chosen.items():
        chain = module.get_submodule(path)
        assert isinstance(chain, nn.Sequential)
        install(chain, option)
    return with_module(model, module, edit)


def report(found: Found, total: int) -> Iterator[str]:
    """What was done and what was left alone, for people."""
    if not found.chosen:
        yield "low rank: no layer got faster; the model stays as it is"
    else:
        times = (
            ""
            if found.before is None or found.after is None
            else f"; the file takes {found.after:.3g} ms, not {found.before:.3g} ({found.after / found.before:.2f})"
        )
        yield f"low rank: {len(found.chosen)} of {total} layers{times}"
    for path, option in found.chosen.items():
        ranks = "×".join(map(str, option.rank))
        yield f"  {path}: {option.method} of rank {ranks}, output error {option.error:.1%}"
    alone: dict[str, list[str]] = {}
    for path, reason in found.reasons.items():
        alone.setdefault(reason, []).append(path)
    for reason, paths in alone.items():
        more = f" and {len(paths) - 2} more" if len(paths) > 2 else ""
        yield f"  left alone: {', '.join(paths[:2])}{more}: {reason}"
