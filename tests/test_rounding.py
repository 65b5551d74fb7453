"""Imitated rounding."""

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
