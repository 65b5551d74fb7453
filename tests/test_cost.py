"""What a call costs: FLOPs, numbers read, bytes, bounds."""

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    TINY_SHAPES,
    Apply,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import blip_helpers as bh


class LookUp(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.table, self.unused = nn.Embedding(10, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids))


@pytest.mark.parametrize("tied", [True, False])
def test_cost_counts_what_is_read_once(tied):
    cost = bh.count_cost(LookUp(tied), (torch.zeros(3, dtype=torch.int64),))
    assert cost == bh.Cost(flops=2 * 3 * 4 * 10, weights=40, state=0, inputs=3 * 8, outputs=3 * 10 * 4)


@pytest.mark.parametrize(
    ("read", "numbers"),
    [
        (lambda table, ids: table[ids], 0),
        (lambda table, ids: table.index_select(0, ids), 0),
        (lambda table, ids: torch.cat([table, table]), 4000),
        (lambda table, ids: table.sum(), 4000),
    ],
    ids=["index", "index_select", "cat", "sum"],
)
def test_a_table_that_is_looked_up_costs_nothing(read, numbers):
    module = Apply(lambda self, ids: read(self.table, ids))
    module.table = nn.Parameter(torch.randn(1000, 4))
    assert bh.count_cost(module, (torch.tensor([3, 1]),)).weights == numbers


def test_attention_in_one_operator_costs_its_products():
    attention = Apply(lambda self, q: F.scaled_dot_product_attention(q, q, q))
    assert bh.count_cost(attention, (torch.randn(1, 2, 5, 8),)).flops == 2 * (2 * 2 * 5 * 5 * 8)
    with bh.ImitatedAutoCast("--auto-cast matmult --auto-cast-type bf16"):
        rounded = attention(torch.linspace(-1, 1, 80).view(1, 2, 5, 8))
    assert not torch.equal(rounded, attention(torch.linspace(-1, 1, 80).view(1, 2, 5, 8)))


def test_cost_of_a_graph_with_state(tiny):
    module, inputs = bh.parts_to_trace(tiny, TINY_SHAPES, "cached")["text_decoder"]
    cost = bh.count_cost(module, inputs)
    assert cost.state == sum(p.nbytes for p in module.state)
    assert cost.outputs == module(*inputs)[0].nbytes


@given(st.integers(1, 10**13), st.integers(1, 10**9))
def test_a_bound_is_the_longer_of_arithmetic_and_memory(flops, weights):
    cost = bh.Cost(flops=flops, weights=weights, state=0, inputs=0, outputs=0)
    for dtype, size in (("fp32", 4), ("bf16", 2)):
        times = {"arithmetic": flops / bh.CORE_FLOPS[dtype], "memory": size * weights / bh.CORE_BYTES_PER_SECOND}
        assert cost.seconds(dtype) == max(times.values()) == times[cost.bound_by(dtype)]
