"""Calls whose sizes an edit corrects, in the order a module makes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.compress.flexible import Flexible, make_flexible
from cveff.compress.own_calls import own_calls
from cveff.compress.trace import trace
from cveff.runtime.input_spec import InputSpec


class Code(nn.Module):
    """A function as a module."""

    def __init__(self, call: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> object:
        return self.call(x)


@pytest.mark.parametrize(
    ("call", "correction", "expected"),
    [
        (lambda x: x.reshape(2, 3, 4), {"2": 6}, (2, 3, 6)),
        (lambda x: x.reshape([2, 3, 4]), {"2": 6}, (2, 3, 6)),
        (lambda x: x.reshape(shape=(2, 3, 4)), {"2": 6}, (2, 3, 6)),
        (lambda x: torch.reshape(x, (2, 9, -1)), {"1": 6}, (2, 6, 3)),
        (lambda x: x.view(2, 9, 2), {"1": 6, "2": 3}, (2, 6, 3)),
        (lambda x: x.unflatten(1, (9, 2)), {"0": 6, "1": 3}, (2, 6, 3)),
        (lambda x: x.unflatten(dim=1, sizes=(9, 2)), {"0": 6, "1": 3}, (2, 6, 3)),
        (lambda x: x[:, :1].expand(2, 7), {"1": 5}, (2, 5)),
        (lambda x: x.split([5, 12], 1)[1], {"0": 6, "1": 12}, (2, 12)),
        (lambda x: x.split(4, dim=1)[0], {"0": 6}, (2, 6)),
        (lambda x: x.chunk(2, 1)[1], {"0": 6, "1": 12}, (2, 12)),
        (lambda x: torch.chunk(x, 3, dim=1)[2], {"0": 5, "1": 5, "2": 8}, (2, 8)),
        (lambda x: torch.split(x, split_size_or_sections=[4, 4], dim=1)[1], {"0": 9, "1": 9}, (2, 9)),
    ],
)
def test_a_call_gets_the_sizes_the_edit_holds(
    call: Callable[[Tensor], Tensor], correction: dict[str, float], expected: tuple[int, ...]
) -> None:
    names = [f"{kind} 0" for kind in ("reshape", "unflatten", "expand", "split", "chunk")]
    module = make_flexible(Code(call), "", dict.fromkeys(names, correction))
    assert tuple(module(torch.zeros(2, 18)).shape) == expected


@pytest.mark.parametrize("options", [{}, {"scale": 3.0}])
def test_attention_gets_its_scale(options: dict[str, float]) -> None:
    x = torch.randn(1, 2, 3, 4)
    module = make_flexible(
        Code(lambda x: F.scaled_dot_product_attention(x, x, x, **options)),
        "",
        {"attention 0": {"scale": 0.7}},
    )
    assert torch.equal(module(x), F.scaled_dot_product_attention(x, x, x, scale=0.7))


def test_calls_are_counted_anew_in_every_forward_and_others_are_left_alone() -> None:
    module = make_flexible(
        Code(lambda x: x.view(torch.int32).view(torch.float32).reshape(-1).reshape(3, 4)),
        "",
        {"reshape 1": {"0": 6, "1": 3}},
    )
    for _ in range(2):
        assert module(torch.zeros(2, 9)).shape == (6, 3)


def test_a_module_made_flexible_twice_keeps_earlier_corrections() -> None:
    outer = nn.Sequential(Code(lambda x: x.reshape(3, 4).reshape(5, 2)))
    make_flexible(outer, "0", {"reshape 0": {"0": 6, "1": 3}})
    make_flexible(outer, "0", {"reshape 1": {"0": 9, "1": 2}})
    assert outer(torch.zeros(2, 9)).shape == (9, 2)
    assert type(outer[0]).__mro__.count(Flexible) == 1


class Keeping(nn.Module):
    """Makes a table once, of nothing or of its own buffer, and keeps it."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place, self.kept = place, {}
        self.register_buffer("grid", torch.arange(4.0))
        self.register_buffer("table", None, persistent=False)
        self.weight = nn.Parameter(torch.ones(2, 2))

    def make(self) -> Tensor:
        rows = torch.arange(2.0).reshape(1, -1).expand(2, 2)
        return rows.reshape(4).reshape(2, 2) + self.grid.reshape(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        table = {
            "buffer": self.table,
            "dictionary": self.kept.get("table"),
            "attribute": vars(self).get("own"),
        }
        found = table.get(self.place)
        if found is None:
            found = self.make()
            if self.place == "buffer":
                self.table = found
            elif self.place == "dictionary":
                self.kept["table"] = [found]
            else:
                self.own = (found,)
        found = found[0] if isinstance(found, (list, tuple)) else found
        return x.reshape(3, 4) + (self.weight.reshape(4) + found.reshape(4))[:2].sum()


@pytest.mark.parametrize("place", ["buffer", "dictionary", "attribute"])
def test_what_a_module_keeps_from_one_run_to_the_next_does_not_count(place: str) -> None:
    module = make_flexible(Keeping(place), "", {"reshape 0": {"0": 6, "1": 3}, "reshape 1": {"0": 4}})
    first, second = module(torch.ones(2, 9)), module(torch.ones(2, 9))
    assert first.shape == (6, 3) and torch.equal(first, second)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 12)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        unused = x.reshape(batch * tokens, -1).shape  # not in the graph: exporters drop what nothing reads
        del unused
        return self.fc(x).reshape(batch, tokens, 3, 4).sum(2)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Inner(), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x.reshape(len(x), 3, -1).transpose(1, 2)).reshape(len(x), -1, 4).mean(1))


def test_calls_are_matched_with_the_nodes_they_became() -> None:
    net = Outer().eval()
    spec = InputSpec(size=(4, 4), mean=(0.5,) * 3, std=(0.5,) * 3)
    graph = trace(net, spec)
    images = torch.zeros(1, 3, 4, 4)
    calls = own_calls(net, graph, images)
    ((inner, node),) = [
        (key, nodes)
        for key, nodes in calls.nodes.items()
        if key[0] == "inner" and len(graph.shapes[nodes[0].name]) == 4
    ]
    assert graph.shapes[node[0].name] == (1, 16, 3, 4) and inner == ("inner", "reshape 1")
    wanted = {name: (1, 16, 3, 2) if name == node[0].name else shape for name, shape in graph.shapes.items()}
    net.inner.fc = nn.Linear(3, 6)
    net.last = nn.Linear(2, 5)
    _, found = calls.watch(net, images, wanted)
    assert found["inner"] == {"reshape 1": frozenset(["3"])}
    assert calls.corrections(found, wanted)["inner"] == {"reshape 1": {"3": 2}}


def test_hooks_are_gone_after_watching() -> None:
    net = Outer().eval()
    graph = trace(net, InputSpec(size=(4, 4), mean=(0.5,) * 3, std=(0.5,) * 3))
    own_calls(net, graph, torch.zeros(1, 3, 4, 4))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())
