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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import blip_helpers as bh

LAYER = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True}


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


def attention_flops(rows, queries, keys, width=8):
    """Four projections of numbers to as many, and two products of queries and keys."""
    return 2 * rows * width * (width * (2 * queries + 2 * keys) + 2 * queries * keys)


def feed_forward_flops(rows, width=8, inner=16):
    return 2 * rows * 2 * width * inner


ENCODER_LAYER = attention_flops(3, 5, 5) + feed_forward_flops(15)
DECODER_LAYER = ENCODER_LAYER + attention_flops(3, 5, 4)
LSTM_LAYER = 2 * 5 * 3 * 4 * 6 * (8 + 6)
# Modules, the shapes of their inputs, and FLOPs by hand: two for each pair of numbers that is multiplied.
MODULES = {
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        [(3, 5, 8), (3, 4, 8), (3, 4, 8)],
        attention_flops(3, 5, 4),
    ),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(**LAYER), [(3, 5, 8)], ENCODER_LAYER),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**LAYER), 2),
        [(3, 5, 8)],
        2 * ENCODER_LAYER,
    ),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(**LAYER), [(3, 5, 8), (3, 4, 8)], DECODER_LAYER),
    "LSTM": (lambda: nn.LSTM(8, 6), [(5, 3, 8)], LSTM_LAYER),
    "LSTM of two directions": (lambda: nn.LSTM(8, 6, bidirectional=True), [(5, 3, 8)], 2 * LSTM_LAYER),
    "LSTM with projection": (
        lambda: nn.LSTM(8, 6, proj_size=2),
        [(5, 3, 8)],
        2 * 15 * (4 * 6 * 8 + 4 * 6 * 2 + 6 * 2),
    ),
    "GRU": (lambda: nn.GRU(8, 6), [(5, 3, 8)], LSTM_LAYER * 3 // 4),
    "RNN": (lambda: nn.RNN(8, 6), [(5, 3, 8)], LSTM_LAYER // 4),
    "LSTMCell": (lambda: nn.LSTMCell(8, 6), [(3, 8)], LSTM_LAYER // 5),
    "GRUCell": (lambda: nn.GRUCell(8, 6), [(3, 8)], LSTM_LAYER * 3 // 20),
    "Bilinear": (lambda: nn.Bilinear(8, 6, 4), [(3, 5, 8), (3, 5, 6)], 2 * 15 * 4 * (8 * 6 + 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), [(2, 4, 9)], 2 * 2 * 6 * 7 * 3 * 2),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), [(2, 4, 9, 7)], 2 * 2 * 6 * 4 * 3 * 9 * 4),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), [(2, 4, 5, 3)], 2 * 2 * 4 * 15 * 9 * 6),
}
FUNCTIONS = {
    "mv": (torch.mv, [(5, 6), (6,)], 2 * 5 * 6),
    "dot": (torch.dot, [(6,), (6,)], 2 * 6),
    "addmv": (torch.addmv, [(5,), (5, 6), (6,)], 2 * 5 * 6),
    "addmm_": (lambda c, a, b: c.clone().addmm_(a, b), [(5, 7), (5, 6), (6, 7)], 2 * 5 * 6 * 7),
    "addbmm": (torch.addbmm, [(5, 4), (3, 5, 6), (3, 6, 4)], 2 * 3 * 5 * 6 * 4),
    "baddbmm": (torch.baddbmm, [(3, 5, 4), (3, 5, 6), (3, 6, 4)], 2 * 3 * 5 * 6 * 4),
    "einsum": (lambda x, y: torch.einsum("bij,bjk->kib", x, y), [(3, 5, 6), (3, 6, 4)], 2 * 3 * 5 * 6 * 4),
    "tensordot": (lambda x, y: torch.tensordot(x, y, 2), [(3, 5, 6), (5, 6, 4)], 2 * 3 * 5 * 6 * 4),
    "matrix_power": (lambda x: torch.linalg.matrix_power(x, 4), [(5, 5)], 2 * 2 * 5**3),
    "cdist": (torch.cdist, [(30, 6), (40, 6)], 2 * 30 * 40 * 8),
    "conv_tbc": (torch.conv_tbc, [(9, 2, 4), (3, 4, 6), (6,)], 2 * 7 * 2 * 6 * 3 * 4),
    "outer, where nothing is summed": (torch.outer, [(5,), (6,)], 0),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", [*MODULES, *FUNCTIONS])
def test_cost_counts_every_product_and_the_weights_that_it_reads(name, device, mode):
    make, shapes, flops = MODULES.get(name) or FUNCTIONS[name]
    if name in MODULES:
        module = make().eval().to(device)
        weights = sum(parameter.numel() for parameter in module.parameters())
    else:
        module, weights = Apply(lambda self, *inputs: make(*inputs)), 0
    with mode():
        cost = bh.count_cost(module, tuple(torch.ones(shape, device=device) for shape in shapes))
    assert (cost.flops, cost.weights) == (flops, weights)


def test_flops_are_those_of_torchs_own_counter(tiny):
    for name, (module, inputs) in bh.parts_to_trace(tiny, TINY_SHAPES, "padded").items():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            module(*inputs)
        assert bh.count_cost(module, inputs).flops == counter.get_total_flops() > 0, name


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda self, x: torch.linalg.inv(x), "aten::linalg_inv_ex"),
        (lambda self, x: torch.fft.fft(x), "aten::_fft_r2c"),
        (lambda self, x: x.to_sparse() @ x, "aten::mm"),
        (lambda self, x: torch.nested.as_nested_tensor([x, x]).matmul(x), "aten::matmul"),
    ],
    ids=["inv", "fft", "sparse", "nested"],
)
def test_what_cannot_be_counted_is_refused_by_name(function, operator):
    with pytest.raises(ValueError, match=f"^{operator} multiplies .*is not counted: "):
        bh.count_cost(Apply(function), (torch.eye(4),))


@pytest.mark.parametrize("function", [F.embedding_bag, lambda ids, table: table.take(ids), F.embedding])
def test_rows_that_are_looked_up_by_any_name_cost_nothing(function):
    module = Apply(lambda self, ids: function(ids, self.table))
    module.table = nn.Parameter(torch.randn(1000, 4))
    assert bh.count_cost(module, (torch.tensor([[3, 1]]),)).weights == 0


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
