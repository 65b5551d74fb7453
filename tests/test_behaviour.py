"""A model with hooks, adapters, wrapped layers or patched methods gives its own answers compiled, or is refused."""

import functools
import types

import pytest
import torch
from conftest import TINY_SHAPES, WORDS, answer_eagerly, cut, make_pixels, make_questions, make_tiny_blip, pad
from torch import nn

from blip_helpers import compile_for_inf2, read_manifest, trace

QUESTIONS, PIXELS = make_questions([3, 10, 1, 7, 5, 10]), make_pixels(6)
DOT = WORDS.index("dot")


class Adapter(nn.Module):
    """A linear layer with a low-rank product beside it, which can be switched off, as LoRA has it."""

    def __init__(self, layer):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layer, self.on = layer, True
        self.down = nn.Parameter(torch.randn(layer.in_features, 2, generator=generator))
        self.up = nn.Parameter(torch.randn(2, layer.out_features, generator=generator))

    def forward(self, x):
        return self.layer(x) + (x @ self.down @ self.up if self.on else 0)


class Wrapped(nn.Module):
    """A layer inside another module, which passes on whatever it is called with, and changes what comes out."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return _shifted(self.layer(*args, **kwargs))


def _shifted(output):
    if hasattr(output, "last_hidden_state"):
        output.last_hidden_state = _shifted(output.last_hidden_state)
        return output
    first = output[0] if isinstance(output, tuple) else output
    first = first + torch.linspace(-1, 1, first.shape[-1])
    return (first, *output[1:]) if isinstance(output, tuple) else first


def adapt(name):
    def change(model):
        parent, _, child = name.rpartition(".")
        adapter = Adapter(model.get_submodule(name)).eval().requires_grad_(False)
        setattr(model.get_submodule(parent), child, adapter)
        return adapter

    return change


def hook(name):
    return lambda model: model.get_submodule(name).register_forward_hook(lambda module, args, output: _shifted(output))


def hook_before(name):
    def before(module, args, kwargs):
        return (_shifted(args[0]), *args[1:]), kwargs

    return lambda model: model.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True)


def patch(name):
    def change(model):
        module = model.get_submodule(name)
        forward = type(module).forward
        module.forward = types.MethodType(
            lambda self, *args, **kwargs: _shifted(forward(self, *args, **kwargs)), module
        )

    return change


def wrap(name):
    def change(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Wrapped(model.get_submodule(name)).eval())

    return change


def lower_one_token(model):
    def lower(module, args, output):
        output.logits[..., DOT] -= 50
        return output

    model.text_decoder.register_forward_hook(lower)


def mean_of_tokens(model):
    """Padding takes part in it."""
    model.text_encoder.encoder.layer[0].register_forward_hook(
        lambda module, args, output: output - output.mean(dim=1, keepdim=True)
    )


def mean_of_rows(model):
    """Other questions of the call take part in it."""
    model.text_encoder.encoder.layer[1].register_forward_hook(
        lambda module, args, output: output - output.mean(dim=0, keepdim=True) / 2
    )


def decide_by_value(model):
    """A trace keeps one of the two ways."""
    model.vision_model.embeddings.register_forward_hook(
        lambda module, args, output: -output if args[0].mean() > 0 else output
    )


def at_one_position(model):
    """A hook that looks at how much was said."""

    def last(module, args, output):
        return output * (2 if args[0].shape[1] == 3 else 1)

    model.text_decoder.bert.embeddings.word_embeddings.register_forward_hook(last)


def generate_otherwise(model):
    generate = model.generate
    model.generate = lambda *args, **kwargs: generate(*args, **kwargs | {"suppress_tokens": [DOT]})


def decode_otherwise(model):
    forward = model.text_decoder.forward

    @functools.wraps(forward)
    def patched(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[..., DOT] += 50
        return output

    model.text_decoder.forward = patched


LAYER = "text_decoder.bert.encoder.layer.1"
CHANGES = {
    "hook on the decoder": lower_one_token,
    "hook on the decoder's model": hook("text_decoder.bert"),
    "hook on a layer": hook(LAYER),
    "hook on self-attention": hook(f"{LAYER}.attention.self"),
    "hook on attention": hook(f"{LAYER}.attention"),
    "hook on cross-attention": hook(f"{LAYER}.crossattention"),
    "hook on a cross-attention's key": hook(f"{LAYER}.crossattention.self.key"),
    "hook on the embeddings": hook("text_decoder.bert.embeddings"),
    "hook on the head": hook("text_decoder.cls.predictions"),
    "hook before a layer": hook_before(LAYER),
    "hook before a linear layer": hook_before(f"{LAYER}.intermediate.dense"),
    "adapter of a query": adapt(f"{LAYER}.attention.self.query"),
    "adapter of a cross-attention's value": adapt(f"{LAYER}.crossattention.self.value"),
    "adapter in the question encoder": adapt("text_encoder.encoder.layer.0.attention.self.query"),
    "adapter in the vision model": adapt("vision_model.encoder.layers.0.mlp.fc1"),
    "patched layer": patch(LAYER),
    "patched self-attention": patch(f"{LAYER}.attention.self"),
    "patched decoder": decode_otherwise,
    "patched generate": generate_otherwise,
    "wrapped layer": wrap(LAYER),
    "wrapped cross-attention": wrap(f"{LAYER}.crossattention"),
    "wrapped vision model": wrap("vision_model.encoder.layers.1"),
    "hook that averages tokens": mean_of_tokens,
    "hook that averages questions": mean_of_rows,
    "hook that decides by a value": decide_by_value,
    "hook that looks at the length": at_one_position,
}
KEPT = [name for name in CHANGES if "adapter" in name] + ["hook before a linear layer", "hook on the embeddings"]


def answers(compiled):
    ids, mask = pad(QUESTIONS)
    rows = TINY_SHAPES.batch_size
    given = zip(ids.split(rows), PIXELS.split(rows), mask.split(rows), strict=True)
    return cut([row for batch in given for row in compiled.generate(*batch, max_new_tokens=7)])


def eager_answers(model):
    return cut(answer_eagerly(model, QUESTIONS, PIXELS, max_new_tokens=7))


@pytest.mark.parametrize("decoder", ["padded", "cached"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_gives_its_own_answers_or_is_refused(tmp_path, change, decoder):
    model = make_tiny_blip()
    CHANGES[change](model)
    try:
        compiled = trace(model, tmp_path / "artifact", TINY_SHAPES, decoder=decoder)
    except ValueError as error:
        assert change not in KEPT, error
        assert "fold it into the weights, or remove it" in str(error)
        assert not any((tmp_path / "artifact").glob("*.pt")) or change == "hook that decides by a value"
    else:
        assert answers(compiled) == eager_answers(model)


def test_a_hook_that_a_cached_decoder_would_lose_is_refused_with_the_difference(tmp_path):
    model = make_tiny_blip()
    lower_one_token(model)
    with pytest.raises(ValueError, match=r"text_decoder: what is traced differs .* by .* of the largest value at"):
        trace(model, tmp_path, TINY_SHAPES)


def test_what_a_decoder_that_returns_tokens_would_lose_is_refused_although_no_probe_chooses_it(tmp_path):
    model = make_tiny_blip()
    lower_one_token(model)
    with pytest.raises(ValueError, match="text_decoder"):
        trace(model, tmp_path, TINY_SHAPES, decoder="unrolled")


def test_a_refused_trace_leaves_an_artifact_that_is_not_loaded(tmp_path):
    model = make_tiny_blip()
    decide_by_value(model)
    with pytest.raises(ValueError, match="vision_model: what is traced"):
        trace(model, tmp_path, TINY_SHAPES)
    assert read_manifest(tmp_path)["parts"]["vision_model"] is None


ADAPTED = {
    "vision_model": "vision_model.encoder.layers.0.mlp.fc1",
    "text_encoder": "text_encoder.encoder.layer.0.attention.self.query",
    "text_decoder": f"{LAYER}.attention.self.query",
    "text_encoder text_decoder": f"{LAYER}.crossattention.self.value",
}


@pytest.mark.parametrize("changed", ADAPTED)
def test_a_model_that_answers_otherwise_is_not_kept(tmp_path, capsys, changed):
    model = make_tiny_blip()
    adapter = adapt(ADAPTED[changed])(model)
    before = answers(trace(model, tmp_path, TINY_SHAPES))
    adapter.on = False
    capsys.readouterr()
    compiled = trace(model, tmp_path, TINY_SHAPES)
    said = [line for line in capsys.readouterr().out.splitlines() if "kept" not in line]
    assert [line.split()[0] for line in said] == changed.split()
    assert all(line.endswith("traced: the model answers probe inputs otherwise") for line in said)
    assert answers(compiled) == eager_answers(model) != before


def test_a_hook_that_is_removed_is_noticed(tmp_path):
    model = make_tiny_blip()
    handle = hook("vision_model.encoder.layers.0")(model)
    trace(model, tmp_path, TINY_SHAPES)
    handle.remove()
    assert answers(trace(model, tmp_path, TINY_SHAPES)) == eager_answers(model)


def test_rounding_of_another_cpu_does_not_trace_again(tmp_path, capsys):
    model = make_tiny_blip()
    handles = [
        module.register_forward_hook(lambda module, args, output: output * (1 + 1e-6))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    trace(model, tmp_path, TINY_SHAPES)
    capsys.readouterr()
    for handle in handles:
        handle.remove()
    trace(model, tmp_path, TINY_SHAPES)
    assert capsys.readouterr().out.count("kept") == 3


def test_a_model_to_be_compiled_elsewhere_is_compared_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr("inf2.tracing.neuron_is_here", lambda: True)
    monkeypatch.setattr("inf2.artifact._versions", lambda backend: {})
    model = make_tiny_blip()
    lower_one_token(model)
    with pytest.raises(ValueError, match="text_decoder: what is traced differs"):
        compile_for_inf2(model, tmp_path, TINY_SHAPES)
