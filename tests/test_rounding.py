"""Imitated rounding."""

import functools
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    X,
    Y,
    make_pixels,
    make_questions,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import blip_helpers as bh

FLAGS = [f"--auto-cast {cast} --auto-cast-type {kind}" for cast in ("matmult", "all") for kind in ("bf16", "fp16")]


@pytest.mark.parametrize("flags", ["", "--auto-cast none", "--auto-cast-type fp16", ["--optlevel", "2"]])
def test_without_auto_cast_nothing_is_cast(flags):
    layer = nn.Linear(4, 3)
    expected = layer(X)
    with bh.ImitatedAutoCast(flags):
        assert torch.equal(layer(X), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_matmult_rounds_the_inputs_of_products_alone(kind, dtype, mode):
    def rounded(t):
        return t.to(dtype).float()

    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    image, kernel = torch.randn(1, 2, 5, 5), torch.randn(3, 2, 3, 3)
    expected = F.linear(rounded(x), rounded(layer.weight), layer.bias)
    convolved = F.conv2d(rounded(image), rounded(kernel))
    with mode(), bh.ImitatedAutoCast(f"--auto-cast=matmult --auto-cast-type={kind}"):
        assert torch.allclose(layer(x), expected, atol=1e-6)
        assert torch.allclose(F.conv2d(image, kernel), convolved, atol=1e-6)
        assert torch.allclose(x[None] @ x.T[None], (rounded(x) @ rounded(x).T)[None], atol=1e-6)
        assert torch.equal(x * 1.1, torch.mul(x, 1.1)) and torch.equal((x + x).to(torch.float64), x.double() * 2)
    with torch.no_grad():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))  # outside it is over


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=6))
def test_all_leaves_numbers_of_the_type_alone(numbers):
    x = torch.tensor(numbers)
    for kind, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with bh.ImitatedAutoCast(f"--auto-cast all --auto-cast-type {kind}"), torch.no_grad():
            for result in (x + 1, x.sigmoid(), x.clone().mul_(1.01), x.softmax(dim=0)):
                assert torch.equal(result, result.to(dtype).float())
            assert torch.equal(x.view(-1), x) and x.argmax() == torch.tensor(numbers).argmax()


@pytest.mark.parametrize("flags", FLAGS)
def test_a_whole_blip_runs_with_imitated_rounding(tiny, flags):
    (question,) = make_questions([5])
    expected = tiny.vision_model(make_pixels(1)).last_hidden_state
    with torch.no_grad(), bh.ImitatedAutoCast(flags):
        answer = tiny.generate(question, make_pixels(1), max_new_tokens=4)
        moved = (tiny.vision_model(make_pixels(1)).last_hidden_state - expected).abs().max()
    assert answer.shape[0] == 1 and 0 < moved < 0.5


@pytest.mark.parametrize("flags", ["--auto-cast some", "--auto-cast all --auto-cast-type tf32"])
def test_what_is_not_imitated_is_refused(flags):
    with pytest.raises(ValueError, match="none, matmult and all to bf16 and fp16"):
        bh.ImitatedAutoCast(flags)


@pytest.mark.parametrize("flags", FLAGS)
def test_a_module_with_rounding_keeps_its_parameters_and_takes_other_inputs(flags):
    layer, cast = nn.Linear(4, 3), bh.ImitatedAutoCast(flags)
    rounded = bh.with_rounding(layer, (X,), cast)
    assert list(map(id, rounded.parameters())) == list(map(id, layer.parameters()))
    with cast:
        expected = layer(Y)
    assert torch.equal(rounded(Y), expected) and not torch.equal(expected, layer(Y))


def test_the_stand_in_rounds_as_the_flags_say():
    layer = nn.Linear(4, 3)
    for flags in FLAGS:
        with bh.ImitatedAutoCast(flags):
            expected = layer(Y)
        assert torch.equal(bh.trace_module(layer, X, backend="cpu", compiler_args=flags)(Y), expected)
    with pytest.raises(ValueError, match="none, matmult and all to bf16 and fp16"):
        bh.trace_module(layer, X, backend="cpu", compiler_args="--auto-cast all --auto-cast-type tf32")


def heads(t, number):
    return t.unflatten(-1, (number, -1)).transpose(-2, -3)


def attend(r, q, k, v, scale=0.5):
    """Attention over heads of 16 numbers, whose scale is a power of two: no order of scaling and rounding matters."""
    weights = torch.softmax(r(q * scale) @ r(k * scale).mT, dim=-1)
    return r(weights) @ r(v)


def linear(r, x, weight, bias=None):
    return r(x) @ r(weight).T + (0 if bias is None else bias)


def multi_head(r, attention, *inputs):
    number = attention.num_heads
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (heads(linear(r, x, w, b), number) for x, w, b in zip(inputs, weights, biases, strict=True))
    joined = attend(r, q, k, v).transpose(-2, -3).flatten(-2)
    return linear(r, joined, attention.out_proj.weight, attention.out_proj.bias)


def feed_forward(r, layer, x):
    hidden = linear(r, x, layer.linear1.weight, layer.linear1.bias).relu()
    return linear(r, hidden, layer.linear2.weight, layer.linear2.bias)


def encoder_layer(r, layer, x):
    x = layer.norm1(x + multi_head(r, layer.self_attn, x, x, x))
    return layer.norm2(x + feed_forward(r, layer, x))


def decoder_layer(r, layer, x, memory):
    x = layer.norm1(x + multi_head(r, layer.self_attn, x, x, x))
    x = layer.norm2(x + multi_head(r, layer.multihead_attn, x, memory, memory))
    return layer.norm3(x + feed_forward(r, layer, x))


def lstm_cell(r, x, h, c, weights):
    w_ih, w_hh, *biases = weights
    i, f, g, o = (linear(r, x, w_ih) + linear(r, h, w_hh) + sum(biases)).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(r, x, h, weights):
    w_ih, w_hh, b_ih, b_hh = weights
    (xr, xz, xn), (hr, hz, hn) = linear(r, x, w_ih, b_ih).chunk(3, -1), linear(r, h, w_hh, b_hh).chunk(3, -1)
    z = (xz + hz).sigmoid()
    return (1 - z) * (xn + (xr + hr).sigmoid() * hn).tanh() + z * h


def rnn_cell(r, x, h, weights):
    w_ih, w_hh, b_ih, b_hh = weights
    return (linear(r, x, w_ih, b_ih) + linear(r, h, w_hh, b_hh)).tanh()


def lstm(r, layer, x):
    """Layers and directions of an LSTM, over (time, batch, numbers)."""
    directions = 2 if layer.bidirectional else 1
    for number in range(layer.num_layers):
        outputs = []
        for direction in range(directions):
            h = c = x.new_zeros(x.shape[1], layer.hidden_size)
            steps = []
            for step in x.flip(0) if direction else x:
                h, c = lstm_cell(r, step, h, c, layer.all_weights[number * directions + direction])
                steps.append(h)
            outputs.append(torch.stack(steps[::-1] if direction else steps))
        x = torch.cat(outputs, dim=-1)
    return x


def recurrent(cell):
    def unrolled(r, layer, x):
        h, steps = x.new_zeros(x.shape[1], layer.hidden_size), []
        for step in x:
            h = cell(r, step, h, layer.all_weights[0])
            steps.append(h)
        return torch.stack(steps)

    return unrolled


def bilinear(r, layer, x, y):
    rows = [(r(r(x) @ r(matrix)) * r(y)).sum(-1) for matrix in layer.weight]
    return torch.stack(rows, dim=-1) + layer.bias


def distances(r, x, y):
    columns = [(-2 * x, (x * x).sum(-1, keepdim=True), torch.ones(len(x), 1))]
    columns += [(y, torch.ones(len(y), 1), (y * y).sum(-1, keepdim=True))]
    first, second = (torch.cat(parts, -1) for parts in columns)
    return (r(first) @ r(second).T).clamp_min(0).sqrt()


def convolved(function, **options):
    return (lambda x, w: function(x, w, **options), lambda r, x, w: function(r(x), r(w), **options))


_SHAPES = {"a": (5, 6), "b": (6, 7), "s": (5, 5), "x": (3, 5, 6), "y": (3, 6, 4), "v": (6,), "u": (5,)}
_SHAPES |= {"q": (2, 3, 5, 16), "line": (2, 4, 9), "plane": (2, 4, 9, 8), "space": (2, 4, 5, 6, 7), "many": (30, 6)}
_SHAPES |= {"kernel": (6, 4, 3), "kernel2": (4, 3, 2, 2), "kernel3": (6, 4, 2, 2, 2), "grouped": (6, 2, 3)}
_SHAPES |= {"k5": (6, 4), "c": (5, 7), "tbc": (9, 2, 4), "tbc_kernel": (3, 4, 6)}
# Each function with the names of its inputs' shapes, and the same from products of rounded numbers.
FUNCTIONS = {
    "mm": (torch.mm, lambda r, a, b: r(a) @ r(b), "a b"),
    "mm out=": (lambda a, b: torch.mm(a, b, out=torch.empty(5, 7)), lambda r, a, b: r(a) @ r(b), "a b"),
    "linalg.matmul": (torch.linalg.matmul, lambda r, x, y: r(x) @ r(y), "x y"),
    "bmm": (torch.bmm, lambda r, x, y: r(x) @ r(y), "x y"),
    "matrix by vector": (torch.matmul, lambda r, a, v: r(a) @ r(v), "a v"),
    "dot": (torch.dot, lambda r, v, w: (r(v) * r(w)).sum(), "v v"),
    "vdot": (torch.vdot, lambda r, v, w: (r(v) * r(w)).sum(), "v v"),
    "linalg.vecdot": (torch.linalg.vecdot, lambda r, v, w: (r(v) * r(w)).sum(), "v v"),
    "inner": (torch.inner, lambda r, x, a: r(x) @ r(a).T, "x a"),
    "addmm": (torch.addmm, lambda r, c, a, b: c + r(a) @ r(b), "c a b"),
    "addmm_": (lambda c, a, b: c.clone().addmm_(a, b), lambda r, c, a, b: c + r(a) @ r(b), "c a b"),
    "addmv": (torch.addmv, lambda r, u, a, v: u + r(a) @ r(v), "u a v"),
    "_addmm_activation": (torch._addmm_activation, lambda r, b, x, y: (b + r(x) @ r(y)).relu(), "v many s6"),
    "baddbmm": (torch.baddbmm, lambda r, c, x, y: c + r(x) @ r(y), "k5u x y"),
    "addbmm": (torch.addbmm, lambda r, c, x, y: c + (r(x) @ r(y)).sum(0), "c54 x y"),
    "addbmm_": (lambda c, x, y: c.clone().addbmm_(x, y), lambda r, c, x, y: c + (r(x) @ r(y)).sum(0), "c54 x y"),
    "einsum": (lambda x, y: torch.einsum("bij,bjk->kib", x, y), lambda r, x, y: (r(x) @ r(y)).permute(2, 1, 0), "x y"),
    "tensordot": (lambda x, y: torch.tensordot(x, y, ([0, 2], [0, 1])), lambda r, x, y: (r(x) @ r(y)).sum(0), "x y"),
    "multi_dot": (lambda *m: torch.linalg.multi_dot(m), lambda r, u, a, b: r(r(u) @ r(a)) @ r(b), "u a b"),
    "chain_matmul": (torch.chain_matmul, lambda r, s, a, b: r(r(s) @ r(a)) @ r(b), "one5 a b"),
    "matrix_power": (lambda s: torch.linalg.matrix_power(s, 2), lambda r, s: r(s) @ r(s), "s"),
    "_cdist_forward": (lambda x, y: torch.ops.aten._cdist_forward(x, y, 2.0, None), distances, "many many"),
    "cdist": (torch.cdist, distances, "many many"),
    "attention": (F.scaled_dot_product_attention, attend, "q q q"),
    "conv1d": (*convolved(F.conv1d, stride=2, padding=1), "line kernel"),
    "conv1d in groups": (*convolved(F.conv1d, groups=2), "line grouped"),
    "conv2d": (*convolved(F.conv2d), "plane kernel22"),
    "conv3d": (*convolved(F.conv3d), "space kernel3"),
    "conv_transpose1d": (*convolved(F.conv_transpose1d, stride=2), "line kernelT"),
    "conv_transpose2d": (*convolved(F.conv_transpose2d, groups=2), "plane kernel2"),
    "conv_transpose3d": (*convolved(F.conv_transpose3d), "space kernelT3"),
    "slow_conv_dilated2d": (
        lambda x, w: torch._C._nn.slow_conv_dilated2d(x, w, (2, 2), dilation=(2, 2)),
        lambda r, x, w: F.conv2d(r(x), r(w), dilation=2),
        "plane kernel22",
    ),
    "conv_tbc": (
        lambda x, w: torch.conv_tbc(x, w, torch.zeros(6)),
        lambda r, x, w: F.conv1d(r(x).permute(1, 2, 0), r(w).permute(2, 1, 0)).permute(2, 0, 1),
        "tbc tbc_kernel",
    ),
}
_SHAPES |= {"s6": (6, 6), "k5u": (3, 5, 4), "c54": (5, 4), "one5": (1, 5), "kernel22": (6, 4, 2, 2)}
_SHAPES |= {"kernelT": (4, 3, 3), "kernelT3": (4, 3, 2, 2, 2)}

_LAYER = {"d_model": 32, "nhead": 2, "dim_feedforward": 24, "dropout": 0.0, "batch_first": True}
# Each module with its inputs' shapes, and the same by hand.
MODULES = {
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(32, 2, batch_first=True),
        multi_head,
        [(3, 5, 32)] * 3,
    ),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(**_LAYER), encoder_layer, [(3, 5, 32)]),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**_LAYER), 2),
        lambda r, m, x: encoder_layer(r, m.layers[1], encoder_layer(r, m.layers[0], x)),
        [(3, 5, 32)],
    ),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(**_LAYER), decoder_layer, [(3, 5, 32), (3, 4, 32)]),
    "LSTM": (lambda: nn.LSTM(8, 6), lstm, [(5, 3, 8)]),
    "LSTM of two layers and directions": (lambda: nn.LSTM(8, 6, 2, bidirectional=True), lstm, [(5, 3, 8)]),
    "LSTM without bias": (lambda: nn.LSTM(8, 6, bias=False), lstm, [(5, 3, 8)]),
    "GRU": (lambda: nn.GRU(8, 6), recurrent(gru_cell), [(5, 3, 8)]),
    "RNN": (lambda: nn.RNN(8, 6), recurrent(rnn_cell), [(5, 3, 8)]),
    "LSTMCell": (
        lambda: nn.LSTMCell(8, 6),
        lambda r, m, x: lstm_cell(r, x, torch.zeros(3, 6), torch.zeros(3, 6), list(m.parameters()))[0],
        [(3, 8)],
    ),
    "GRUCell": (lambda: nn.GRUCell(8, 6), lambda r, m, x, h: gru_cell(r, x, h, list(m.parameters())), [(3, 8), (3, 6)]),
    "RNNCell": (lambda: nn.RNNCell(8, 6), lambda r, m, x, h: rnn_cell(r, x, h, list(m.parameters())), [(3, 8), (3, 6)]),
    "Bilinear": (lambda: nn.Bilinear(8, 6, 4), bilinear, [(3, 5, 8), (3, 5, 6)]),
    "Conv1d": (
        lambda: nn.Conv1d(4, 6, 3),
        lambda r, m, x: F.conv1d(r(x), r(m.weight), m.bias),
        [(2, 4, 9)],
    ),
    "ConvTranspose2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3),
        lambda r, m, x: F.conv_transpose2d(r(x), r(m.weight), m.bias),
        [(2, 4, 5, 6)],
    ),
}


def case(name):
    """A module or function of the tables: its call, the same by hand for a rounding, and inputs."""
    torch.manual_seed(3)
    if name in FUNCTIONS:
        function, by_hand, shapes = FUNCTIONS[name]
        return function, by_hand, [torch.randn(_SHAPES[shape]) for shape in shapes.split()]
    make, by_hand, shapes = MODULES[name]
    module = make().eval()

    def call(*inputs):
        outputs = module(*inputs)
        return outputs[0] if isinstance(outputs, tuple) else outputs

    return call, lambda r, *inputs: by_hand(r, module, *inputs), [torch.randn(shape) for shape in shapes]


def to_type(flags):
    dtype = torch.float16 if "fp16" in flags else torch.bfloat16
    return lambda t: t.to(dtype).float()


CASES = [*FUNCTIONS, *MODULES]
MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
@pytest.mark.parametrize("flags", FLAGS[:2])
@pytest.mark.parametrize("name", CASES)
def test_every_product_rounds_what_it_multiplies(name, flags):
    call, by_hand, inputs = case(name)
    with torch.no_grad():
        plain, expected = by_hand(lambda t: t, *inputs), by_hand(to_type(flags), *inputs)
        assert torch.allclose(call(*inputs), plain, atol=1e-5)  # that the reference is one
    for mode in MODES:
        with mode(), bh.ImitatedAutoCast(flags):
            actual = call(*inputs)
        # The order of a sum may move a number of a later product to its neighbour: few, and no further.
        assert (actual - expected).abs().mean() < 0.1 * (plain - expected).abs().mean(), mode


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
@pytest.mark.parametrize("name", CASES)
def test_all_rounds_the_operators_of_every_product(name):
    call, by_hand, inputs = case(name)
    flags = FLAGS[2]
    r = to_type(flags)
    with torch.no_grad():
        plain, expected = call(*inputs), r(by_hand(r, *map(r, inputs)))
    for mode in MODES:
        with mode(), bh.ImitatedAutoCast(flags):
            actual = call(*inputs)
        assert torch.equal(actual, r(actual)) and not torch.equal(actual, r(plain)), mode
        if name in FUNCTIONS and name not in (
            "cdist",
            "_cdist_forward",
            "attention",
        ):  # one operator, or products of products
            assert (actual - expected).abs().mean() <= 0.1 * (plain - expected).abs().mean(), mode
        else:
            assert (actual - plain).abs().mean() < 0.02 * plain.abs().mean(), mode


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
@pytest.mark.parametrize("name", CASES)
def test_without_auto_cast_every_product_is_eager(name):
    call, _, inputs = case(name)
    for mode in MODES:
        with mode():
            expected = call(*inputs)
            with bh.ImitatedAutoCast("--auto-cast none"):
                assert torch.equal(call(*inputs), expected), mode


@pytest.mark.parametrize(
    ("name", "flags"),
    [("LSTM", FLAGS[0]), ("TransformerEncoderLayer", FLAGS[2]), ("Bilinear", FLAGS[1]), ("GRU", FLAGS[0])],
)
def test_a_module_with_rounding_computes_what_the_mode_does(name, flags):
    make, _, shapes = MODULES[name]
    module, cast = make().eval(), bh.ImitatedAutoCast(flags)
    inputs, others = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    with torch.no_grad():
        rounded = bh.with_rounding(module, tuple(inputs), cast)
        actual = rounded(*others)
        with cast:
            expected = module(*others)
    assert list(map(id, rounded.parameters())) == list(map(id, module.parameters()))
    assert all(map(torch.equal, *([o] if torch.is_tensor(o) else [o[0], *o[1]] for o in (actual, expected))))


@pytest.mark.parametrize("flags", FLAGS[2:])
def test_all_rounds_what_operators_write_to(flags):
    x, y, r = torch.randn(4, 4), torch.randn(4, 4), to_type(flags)
    values, places, added = torch.empty(4), torch.empty(4, dtype=torch.int64), x.clone()
    with torch.no_grad(), bh.ImitatedAutoCast(flags):
        returned = torch.max(x, dim=1, out=(values, places))
        assert added.add_(y) is added
    assert returned[0] is values and torch.equal(values, r(x).max(dim=1).values)
    assert torch.equal(added, r(r(x) + r(y)))


@torch.library.custom_op("inf2_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x @ x


@functools.cache
def quantized():
    layers = nn.Sequential(nn.Linear(4, 4))
    return torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}, dtype=torch.qint8)


@functools.cache
def traced():
    layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True).eval()
    with torch.no_grad():
        return torch.jit.trace(layer, torch.rand(1, 4, 4), check_trace=False)


@functools.cache
def packed():
    return torch.jit.optimize_for_inference(torch.jit.script(nn.Conv2d(4, 4, 1).eval()))


UNSEEN = {
    "a custom operator": (twice, "inf2_tests::twice"),
    "a quantized layer": (lambda x: quantized()(x), "quantized::linear_dynamic"),
    "a sparse product": (lambda x: torch.sparse.mm(x.to_sparse(), x), "aten::_sparse_(add)?mm"),
    "a sparse matrix": (lambda x: x.to_sparse_csr() @ x, r"aten::(mat)?mm?(ul)? multiplies tensors that are not dense"),
    "nested tensors": (lambda x: F.linear(torch.nested.as_nested_tensor([x, x]), x), "aten::linear"),
    "complex numbers": (lambda x: (x + 1j) @ (x + 1j), "aten::mm multiplies tensors that are not dense and real"),
    "solve": (lambda x: torch.linalg.solve(x @ x.T + torch.eye(4), x), "aten::_linalg_solve_ex"),
    "cholesky": (lambda x: torch.linalg.cholesky(x @ x.T + torch.eye(4)), "aten::linalg_cholesky_ex"),
    "inverse": (lambda x: torch.inverse(x + 9 * torch.eye(4)), "aten::linalg_inv_ex"),
    "svd": (torch.linalg.svdvals, "aten::_linalg_svd"),
    "matrix_exp": (torch.matrix_exp, "aten::linalg_matrix_exp"),
    "cholesky_solve": (lambda x: torch.cholesky_solve(x, torch.eye(4)), "aten::cholesky_solve"),
    "fft": (torch.fft.rfft, "aten::_fft_r2c"),
    "affine_grid": (lambda x: F.affine_grid(x[None, :2, :3], (1, 1, 4, 4), align_corners=False), "aten::affine_grid"),
    "a fused layer": (
        lambda x: torch._native_multi_head_attention(*[x[None]] * 3, 4, 2, torch.ones(12, 4), torch.ones(12), x, x[0]),
        "aten::_native_multi_head_attention",
    ),
    "a fused layer in a trace": (lambda x: traced()(x[None]), "aten::_transformer_encoder_layer_fwd"),
    "packed weights in a script": (lambda x: packed()(x[None, :, :, None]), "aten::to_mkldnn"),
    "a higher-order operator": (
        lambda x: torch.ops.higher_order.cond(torch.tensor(True), lambda t: (t @ t,), lambda t: (t,), (x,)),
        "higher_order::cond",
    ),
}


@pytest.mark.filterwarnings("ignore")  # of what PyTorch calls deprecated, or a prototype
@pytest.mark.parametrize("flags", [FLAGS[0], FLAGS[2]])
@pytest.mark.parametrize("name", UNSEEN)
def test_a_product_that_is_not_seen_is_refused_by_name(name, flags):
    call, operator = UNSEEN[name]
    for mode in MODES:
        with mode():
            x = torch.rand(4, 4)
            call(x)
            refusal = pytest.raises(ValueError, match=f"^{operator}.* is not imitated: .*, or pass --auto-cast none$")
            with refusal, bh.ImitatedAutoCast(flags):
                call(x)


def test_a_quantized_cell_whose_kernel_no_mode_sees_is_refused():
    with pytest.raises(ValueError, match=r"^aten::quantized_gru_cell multiplies"), bh.ImitatedAutoCast(FLAGS[0]):
        torch.quantized_gru_cell(*[torch.rand(4, 4)] * 6, *[torch.rand(4)] * 4, 1, 1, 1, 1)


@pytest.mark.parametrize("flags", FLAGS)
def test_what_multiplies_no_matrices_is_not_refused(flags):
    x, image = torch.rand(3, 4, 8), torch.rand(1, 2, 4, 4)
    with torch.no_grad(), bh.ImitatedAutoCast(flags):
        outputs = [
            F.interpolate(x, scale_factor=2, mode="linear"),
            F.grid_sample(image, torch.rand(1, 3, 3, 2), align_corners=False),
            F.embedding_bag(torch.tensor([[1, 2]]), x[0], mode="sum"),
            torch.linalg.vector_norm(x),
            torch.linalg.cross(x[..., :3], x[..., 3:6]),
            F.layer_norm(x, (8,)),
            F.batch_norm(x, None, None, training=True),
            F.unfold(image, 2),
            torch.outer(x[0, 0], x[0, 1]),
            torch.complex(x, x).abs(),
        ]
    assert all(output.isfinite().all() for output in outputs)


def test_gradients_of_what_was_taken_apart_are_those_of_eager():
    x = torch.randn(5, 3, 16, requires_grad=True)
    for call in (nn.LSTM(16, 6), lambda x: [F.scaled_dot_product_attention(x[None], x[None], x[None])]):
        (expected,) = torch.autograd.grad(call(x)[0].square().sum(), x)
        with bh.ImitatedAutoCast(FLAGS[0]):
            loss = call(x)[0].square().sum()
        (actual,) = torch.autograd.grad(loss, x)
        assert (actual - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_mode_leaves_other_threads_and_switches_of_the_process_alone():
    layer, x = nn.TransformerEncoderLayer(**_LAYER).eval(), torch.randn(3, 5, 32)

    def switches():
        return torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()

    before, seen = switches(), []
    with torch.no_grad():
        expected = layer(x)
        with bh.ImitatedAutoCast(FLAGS[0]):
            inside = switches()

            def elsewhere():
                with torch.no_grad():
                    seen.append(layer(x))

            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            assert not torch.equal(layer(x), expected)
        assert torch.equal(layer(x), expected)
    assert torch.equal(seen[0], expected) and inside == before == switches()
