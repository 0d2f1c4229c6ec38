"""`ReduceTokens`: let a vision transformer go on with fewer tokens than it began with."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import ClassVar, cast, get_args

import torch
from torch import nn

from cveff.compress.distill import Distill, Imitation
from cveff.dynamic.dynamicvit_loss import TokenImitation
from cveff.dynamic.token_edit import Method, TokenReduction, reduced_blocks
from cveff.dynamic.token_vit import require_vit
from cveff.errors import StepError
from cveff.model import Model, with_module
from cveff.steps import Run
from cveff.train.loop import fit
from cveff.train.objective import Objective

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReduceTokens:
    """Merge or drop tokens between the blocks of timm's vision transformers; shapes stay static, for every engine.

    Class, distillation and register tokens are never touched. Where the head looks at patch tokens (average or
    attention pooling), the last block gives every patch the token that stands for it, so the head weighs by size.

    Attributes:
        method: "tome" merges similar tokens and needs no training (Bolya et al., arXiv:2210.09461). "evit" keeps those
            the class token attends to (Liang et al., arXiv:2202.07800). "dynamicvit" learns which to keep (Rao et al.,
            arXiv:2106.02034).
        r: of ToMe: tokens merged in each block of `at`, or a number for each of those blocks. A block can merge half of
            its tokens at most; more is cut to that, and said.
        inflect: of ToMe with one `r`: how it changes over the blocks, linearly and with the mean r: -1 falls from 2r to
            0, 1 rises from 0 to 2r.
        keep_rate: of the others: share of tokens that stays each time, above 0 and up to 1.
        at: numbers of the blocks, from 0; by default all of them for ToMe, and those after a quarter, a half and three
            quarters of the depth for the others (3, 6 and 9 of 12).
        fuse: of EViT: the dropped tokens become one, their mean weighted by attention.
        proportional: of ToMe: attention counts a token as often as the patches it stands for; set to false for
            networks trained without (MAE).
        restore: give back as many tokens as came in, for dense maps (`forward_features`, segmentation); by default only
            where the head looks at them.
        recover: fine-tune afterwards, by default not at all; DynamicViT's predictors are learned then, for which the
            paper's losses are `Distill(alpha=1/3, temperature=1.0)` and 30 epochs.
        ratio_weight: of DynamicViT: weight of the squared error of the kept share.
        token_weight: of DynamicViT: weight of the squared error of kept tokens against the teacher's.

    Raises:
        StepError: at construction, for a value out of range or settings that contradict each other.
    """

    method: Method = "tome"
    r: int | tuple[int, ...] = 8
    inflect: float = 0.0
    keep_rate: float = 0.7
    at: tuple[int, ...] = ()
    fuse: bool = True
    proportional: bool = True
    restore: bool | None = None
    recover: Distill | None = None
    ratio_weight: float = 2.0
    token_weight: float = 0.5

    kind: ClassVar[str] = "reduce_tokens"
    requires: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise StepError(
                f"reduce_tokens.method is {self.method!r}; give one of {', '.join(get_args(Method))}"
            )
        if min((self.r,) if isinstance(self.r, int) else self.r, default=-1) < 0:
            raise StepError(
                f"reduce_tokens.r is {self.r!r}; give 0 or more tokens, or a number for each block"
            )
        if not -1 <= self.inflect <= 1:
            raise StepError(f"reduce_tokens.inflect is {self.inflect!r}; give a number from -1 to 1")
        if self.inflect and not isinstance(self.r, int):
            raise StepError(
                "reduce_tokens.inflect changes one r over the blocks, and r is a list; leave one out"
            )
        if not 0 < self.keep_rate <= 1:
            raise StepError(f"reduce_tokens.keep_rate is {self.keep_rate!r}; give a share above 0, up to 1")
        if self.at != tuple(sorted(set(self.at))):
            raise StepError(f"reduce_tokens.at is {self.at!r}; give different blocks in ascending order")
        if min(self.ratio_weight, self.token_weight) < 0:
            raise StepError("reduce_tokens.ratio_weight and token_weight are weights; give 0 or more")
        if self.recover is not None and self.recover.train.epochs == 0:
            raise StepError("reduce_tokens.recover.train.epochs is 0; train for some, or leave recover out")

    def __call__(self, model: Model, run: Run) -> Model:
        """Reduce tokens, and fine-tune if asked to.

        Raises:
            StepError: no vision transformer, no such block, images are needed and there are none, or predictors would
                stay untrained.
            TrainingError, CheckpointError: as `Train`.
        """
        if self.recover is not None and (run.data is None or run.data.train is None):
            raise StepError("ReduceTokens fine-tunes, which needs data; pass data=… with a training split")
        if self.method == "dynamicvit" and self.recover is None and self.keep_rate < 1:
            raise StepError(
                "reduce_tokens.recover is missing, without which DynamicViT's predictors would drop tokens at random; "
                "pass recover=Distill(alpha=1/3, temperature=1.0), or use 'tome' or 'evit'"
            )
        edit = self.plan(model.module)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            module = edit.apply(model.module)
        run.progress.message(_summary(module, edit))
        reduced = with_module(model, module, edit)
        if self.recover is not None and edit.at:
            reduced = fit(reduced, self.recover.train, run, self._objective(self.recover, reduced, run))
        return Model(reduced.spec, reduced.module.cpu().eval())

    def attach(self, module: nn.Module) -> nn.Module:
        """A changed copy of one of timm's networks; the original is untouched.

        DynamicViT's predictors are new: train the copy with `cveff.dynamic.dynamicvit_loss.RatioObjective`.

        Args:
            module: takes (N, C, H, W).

        Raises:
            StepError: no vision transformer, or no such block.
        """
        edit = self.plan(module)
        changed = edit.apply(copy.deepcopy(module))
        if _clamped(changed, edit):
            _log.warning("%s", _summary(changed, edit))
        return changed

    def plan(self, module: nn.Module) -> TokenReduction:
        """The edit these settings mean for `module`.

        Raises:
            StepError: no vision transformer, or `r` has not one number for each block.
        """
        network = require_vit(module)
        depth = len(cast(nn.Sequential, network.blocks))
        restore = self.restore
        if restore is None:
            restore = network.global_pool != "token" or getattr(network, "attn_pool", None) is not None
        if self.method != "tome":
            at = self.at or tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))
            return TokenReduction(
                self.method,
                at if self.keep_rate < 1 else (),
                keep_rate=self.keep_rate,
                fuse=self.fuse,
                restore=restore,
                ratio_weight=self.ratio_weight,
            )
        at = self.at or tuple(range(depth))
        chosen = [(block, r) for block, r in zip(at, self.schedule(len(at)), strict=True) if r > 0]
        return TokenReduction(
            "tome",
            tuple(block for block, _ in chosen),
            tuple(r for _, r in chosen),
            proportional=self.proportional,
            restore=restore,
        )

    def schedule(self, num_blocks: int) -> tuple[int, ...]:
        """Tokens ToMe merges in each of `num_blocks` blocks.

        Raises:
            StepError: `r` is a list of another length.
        """
        if not isinstance(self.r, int):
            if len(self.r) != num_blocks:
                raise StepError(
                    f"reduce_tokens.r has {len(self.r)} numbers for {num_blocks} blocks; give one a block, or set `at`"
                )
            return self.r
        first = self.r * (1 - self.inflect)
        step = 2 * (self.r - first) / max(1, num_blocks - 1)
        return tuple(int(first + step * index + 1e-9) for index in range(num_blocks))

    def _objective(self, recover: Distill, reduced: Model, run: Run) -> Objective:
        objective = recover.objective(reduced, run)
        if self.method != "dynamicvit" or self.token_weight == 0 or not isinstance(objective, Imitation):
            return objective
        if recover.cache_teacher:
            raise StepError(
                "reduce_tokens.recover.cache_teacher keeps logits, and tokens are imitated too; set it to false, or "
                "token_weight to 0"
            )
        return TokenImitation(objective, objective.teacher, self.token_weight)


def _clamped(module: nn.Module, edit: TokenReduction) -> dict[int, int]:
    """Blocks in which fewer tokens than asked for can be merged, and how many that is."""
    blocks, count = reduced_blocks(module), _num_patches(module)
    if blocks is None or count is None or edit.method != "tome":
        return {}
    counts = (count, *blocks.counts(count))
    merged = {block: counts[block] - counts[block + 1] for block in edit.at}
    return {block: merged[block] for block, r in zip(edit.at, edit.r, strict=True) if merged[block] < r}


def _summary(module: nn.Module, edit: TokenReduction) -> str:
    blocks, count = reduced_blocks(module), _num_patches(module)
    if blocks is None or count is None:
        return (
            f"{edit.method}: no tokens are reduced"
            if blocks is None
            else f"{edit.method}: tokens are reduced"
        )
    counts = blocks.counts(count)
    text = f"{edit.method}: of {count} patch tokens {counts[-1]} are left after the last block"
    text += f", {sum(counts) / (count * len(counts)):.0%} on average"
    clamped = _clamped(module, edit)
    if clamped:
        text += "; more than half of a block's tokens cannot be merged, so r is " + ", ".join(
            f"{r} in block {block}" for block, r in clamped.items()
        )
    return text


def _num_patches(module: nn.Module) -> int | None:
    return getattr(getattr(module, "patch_embed", None), "num_patches", None)
