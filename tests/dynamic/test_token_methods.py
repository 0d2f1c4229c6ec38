"""What merging, keeping and predicting compute, against the papers' definitions written out."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.dynamic import ReduceTokens
from cveff.dynamic.dynamicvit import KeepPredicted
from cveff.dynamic.dynamicvit_loss import RatioObjective, ratio_error, token_error
from cveff.dynamic.evit import KeepAttended
from cveff.dynamic.token_blocks import ReducedBlocks
from cveff.dynamic.token_edit import reduced_blocks
from cveff.dynamic.token_state import Tokens, begin
from cveff.dynamic.token_vit import Attended
from cveff.dynamic.tome import MergeTokens
from cveff.train.objective import CrossEntropy


def attended(keys: Tensor, queries: Tensor | None = None) -> Attended:
    """Attention with keys (B, heads, N, D); its output is not looked at."""
    return Attended(keys[:, 0], keys if queries is None else queries, keys, keys)


def merged_by_hand(x: Tensor, size: Tensor, keys: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """ToMe of one image by its definition: x (N, C), size (n,), keys (heads, N, D)."""
    if r == 0:
        return x, size
    metric = F.normalize(keys.mean(0)[prefix:], dim=-1)
    patches = x[prefix:]
    a, b = range(0, len(patches), 2), range(1, len(patches), 2)
    best = {i: max(b, key=lambda j: float(metric[i] @ metric[j])) for i in a}
    gone = sorted(a, key=lambda i: -float(metric[i] @ metric[best[i]]))[:r]
    tokens, sizes = [], []
    for i in (*[i for i in a if i not in gone], *b):
        group = [i, *[g for g in gone if best[g] == i]]
        weights = torch.stack([size[g] for g in group])
        sizes.append(weights.sum())
        tokens.append((weights[:, None] * torch.stack([patches[g] for g in group])).sum(0) / sizes[-1])
    return torch.cat((x[:prefix], torch.stack(tokens))), torch.stack(sizes)


def test_merging_is_the_papers() -> None:
    torch.manual_seed(0)
    for count, prefix, r in ((16, 1, 5), (15, 2, 7), (9, 0, 2), (2, 1, 1)):
        tokens = Tokens(torch.randn(3, prefix + count, 8), prefix)
        sizes = torch.ones(3, count)
        for _ in range(2):  # twice, so that sizes differ
            keys = torch.randn(3, 2, tokens.x.shape[1], 4)
            after = MergeTokens(r)(tokens, attended(keys))
            r_now = min(r, tokens.num_patches // 2)
            for image in range(3):
                x, size = merged_by_hand(tokens.x[image], sizes[image], keys[image], r_now, prefix)
                assert torch.allclose(after.x[image], x, atol=1e-6)
                if after.size is not None:
                    assert torch.equal(after.size[image], size)
            tokens, sizes = after, torch.ones(3, after.num_patches) if after.size is None else after.size
            assert (sizes.sum(1) == count).all()


def test_merging_equal_tokens_and_restoring_them_is_the_identity() -> None:
    torch.manual_seed(0)
    values = torch.randn(2, 3, 8)
    kinds = torch.cat((torch.zeros(1), torch.randint(1, 3, (24,)))).long()  # the first is protected
    x = values[:, kinds]
    tokens = begin(x, 1, None, restore=True)
    for _ in range(2):
        tokens = MergeTokens(3)(tokens, attended(tokens.x[:, None]))
    assert tokens.num_patches == 18 and torch.equal(tokens.size.sum(1), torch.full((2,), 24.0))
    assert torch.allclose(tokens.restored(), x, rtol=1e-6, atol=1e-6)


def test_attention_to_a_merged_token_is_attention_to_its_parts() -> None:
    """Equation 1: with the logarithm of its size a token counts as often as the patches it stands for."""
    torch.manual_seed(0)
    block = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=3).blocks[
        0
    ]
    x = torch.randn(2, 4, 24)
    size = torch.tensor([[1.0, 3.0, 2.0]]).expand(2, -1)
    merged = Tokens(x, 1, size=size, proportional=True)
    repeated = x[:, torch.tensor([0, 1, 2, 2, 2, 3, 3])]
    with torch.no_grad():
        found = block(merged.x, attn_mask=merged.bias())
        expected = block(repeated)[:, torch.tensor([0, 1, 2, 5])]
    assert torch.allclose(found, expected, atol=1e-6)
    assert merged._replace(proportional=False).bias() is None


def test_float16_stays_finite() -> None:
    tokens = Tokens(torch.randn(1, 9, 8).half(), 1, size=torch.full((1, 8), 2000.0), proportional=True)
    bias = tokens.bias()
    assert bias is not None and bias.dtype == torch.float16 and bias.isfinite().all()
    masked = Tokens(torch.randn(1, 9, 8).half(), 1, mask=torch.zeros(1, 8)).bias()
    assert masked is not None and masked.isfinite().all()
    after = MergeTokens(3)(tokens, attended(torch.zeros(1, 2, 9, 4).half()))  # keys without direction
    assert after.x.dtype == torch.float16 and after.x.isfinite().all()


def test_kept_tokens_are_the_class_tokens() -> None:
    torch.manual_seed(0)
    queries, keys, x = torch.randn(2, 3, 11, 4), torch.randn(2, 3, 11, 4), torch.randn(2, 11, 8)
    share = (queries @ keys.transpose(2, 3) * 4**-0.5).softmax(-1).mean(1)[:, 0, 1:]  # (B, 10)
    after = KeepAttended(0.6)(Tokens(x, 1), attended(keys, queries))
    assert after.num_patches == 7
    for image in range(2):
        order = share[image].argsort(descending=True)
        assert torch.equal(after.x[image, 1:7], x[image, 1 + order[:6]])
        rest = order[6:]
        fused = (share[image, rest, None] * x[image, 1 + rest]).sum(0) / share[image, rest].sum()
        assert torch.allclose(after.x[image, 7], fused, atol=1e-6)
    dropped = KeepAttended(0.6, fuse=False)(Tokens(x, 1), attended(keys, queries))
    assert torch.equal(dropped.x, after.x[:, :7])


def test_without_class_token_the_mean_query_asks() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 3, 10, 4), torch.randn(2, 3, 10, 4)
    scores = KeepAttended(0.5, has_class_token=False).scores(queries, keys, 0)
    mean = queries.mean(2, keepdim=True)
    same = KeepAttended(0.5).scores(torch.cat((mean, queries), 2), keys, 0)
    assert torch.equal(scores, same)


def network(global_pool: str = "token") -> nn.Module:
    torch.manual_seed(0)
    module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        embed_dim=32,
        depth=3,
        num_heads=2,
        num_classes=4,
        global_pool=global_pool,
        class_token=global_pool == "token",
    )
    reduced = ReduceTokens("dynamicvit", keep_rate=0.5, at=(1, 2), restore=global_pool != "token").attach(
        module
    )
    return reduced.eval()


def test_masking_in_training_is_dropping_in_use() -> None:
    """Predictors that draw what they would keep give the same logits, but for what masked tokens leak."""
    for pool in ("token", "avg"):
        module = network(pool)
        x = torch.randn(3, 3, 64, 64)
        with torch.no_grad():
            expected = module(x)
            blocks = reduced_blocks(module)
            assert isinstance(blocks, ReducedBlocks)
            for reducer in blocks.reducers.values():
                reducer.training = True
                reducer.draw = _certain(reducer)
            assert torch.allclose(module(x), expected, atol=2e-4)


def _certain(reducer: nn.Module):
    """What replaces the random draw: the top of the tokens that are left."""

    def draw(logits: Tensor, mask: Tensor | None) -> Tensor:
        keep = logits[..., 0] - logits[..., 1]
        if mask is not None:
            keep = keep.masked_fill(mask == 0, float("-inf"))
        top = keep.topk(reducer.remaining(16, 16), dim=-1).indices
        return torch.zeros_like(keep).scatter(1, top, 1.0)

    return draw


def test_predictors_learn_to_keep_their_share() -> None:
    module = network().train()
    images, targets = torch.randn(8, 3, 64, 64), torch.randint(0, 4, (8,))
    objective = RatioObjective(CrossEntropy(), 2.0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    predictors = [part for part in module.modules() if isinstance(part, KeepPredicted)]
    assert [predictor.ratio for predictor in predictors] == [0.5, 0.25]
    for _ in range(60):
        optimizer.zero_grad()
        objective.loss(module, images, targets).backward()
        assert all(predictor.score[0].weight.grad.abs().sum() > 0 for predictor in predictors)
        optimizer.step()
    masks: list[Tensor] = []
    for predictor in predictors:
        predictor.register_forward_hook(lambda _, __, out: masks.append(out.mask))
    with torch.no_grad():
        for _ in range(10):
            module(images)
    shares = [float(torch.stack(masks[index::2]).mean()) for index in (0, 1)]
    assert abs(shares[0] - 0.5) < 0.1 and abs(shares[1] - 0.25) < 0.1  # 1280 draws: a deviation of 0.014


def test_losses_are_the_papers() -> None:
    masks = [torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]]), torch.tensor([[0.0, 1, 0, 0], [1, 1, 0, 0]])]
    predictors = [KeepPredicted(4, 0.5), KeepPredicted(4, 0.25)]
    expected = ((0.5 - 0.5) ** 2 + (1 - 0.5) ** 2 + (0.25 - 0.25) ** 2 + (0.5 - 0.25) ** 2) / 2
    assert float(ratio_error(predictors, masks)) == expected
    own, other = torch.zeros(2, 3, 2), torch.ones(2, 3, 2)
    other[:, 0] = 9  # the class token is not compared
    other[0, 2] = 5  # nor is a masked one
    assert float(token_error(own, other, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))) == 2.0
