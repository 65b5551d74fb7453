"""backend="openvino": the rules, state, files and answers that the stand-in has, from a real compiler."""

import gc
import importlib.util
import os
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import TINY_SHAPES, make_pixels, make_questions
from inf2 import read_manifest
from torch import nn

import blip_helpers
from blip_helpers import NeuronBlipForQuestionAnswering, load_traced, save_traced, trace, trace_module

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
X = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def by_openvino(module, *inputs, **how):
    return trace_module(module, inputs, backend="openvino", **how)


class Calls(nn.Module):
    """A module that is a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


class Sum(nn.Module):
    """Keeps the sum of what it got, and reads it by another name than the Parameter's."""

    def __init__(self):
        super().__init__()
        self.kept = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
        self.untouched = nn.Parameter(torch.ones(3), requires_grad=False)
        self.by_another_name = [self.kept]

    def forward(self, x):
        total = self.by_another_name[0] + x
        return total.sum() * self.untouched[0], total, self.untouched

    def aliases(self):
        return {self.kept: 1, self.untouched: 2}


@pytest.fixture
def graph():
    module = Sum()
    return by_openvino(module, X, input_output_aliases=module.aliases())


def test_without_the_package_one_sentence_says_what_to_install(tiny, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find_spec(name))
    for call in (
        lambda: by_openvino(Sum(), X),
        lambda: trace(tiny, tmp_path / "new", TINY_SHAPES, backend="openvino"),
    ):
        with pytest.raises(ValueError, match=r'^OpenVINO is not installed: pip install "openvino>=2026\.4,<2027"$'):
            call()
    assert not (tmp_path / "new").exists()


def test_a_variable_of_the_environment_chooses_the_backend(monkeypatch):
    monkeypatch.setenv("NEURON_REHEARSAL_BACKEND", "openwine")
    with pytest.raises(ValueError, match="NEURON_REHEARSAL_BACKEND is 'openwine'; there are 'neuron', 'cpu' and"):
        trace_module(Sum(), X)


@needs_openvino
def test_the_variable_is_named_by_what_runs_here(monkeypatch):
    monkeypatch.setenv("NEURON_REHEARSAL_BACKEND", "openvino")
    assert blip_helpers.default_backend() == "openvino"
    assert blip_helpers.what_runs_here() == "OpenVINO on the CPU"
    buffers = dict(trace_module(Sum(), X).named_buffers())
    assert "graph.network" in buffers


# The rules


@needs_openvino
@pytest.mark.parametrize(
    ("wrong", "got"), [(X[:1], r"float32 \[1, 3\]"), (X.double(), r"float64 \[2, 3\]"), (X[0], r"float32 \[3\]")]
)
def test_another_shape_or_dtype_is_refused_by_the_sentence(graph, wrong, got):
    wanted = rf"x is {got}; this graph was traced for float32 \[2, 3\]: pass exactly that, or trace it again"
    with pytest.raises(torch.jit.Error, match=wanted):
        graph(wrong)


@needs_openvino
@pytest.mark.parametrize("inputs", [(), (X, X), ([X],), (None,)])
def test_other_inputs_than_positional_tensors_are_refused(graph, inputs):
    with pytest.raises((RuntimeError, torch.jit.Error)):
        graph(*inputs)


@needs_openvino
def test_what_cannot_be_converted_is_named():
    with pytest.raises(ValueError, match=r"cannot convert Calls: .*aten::lgamma; trace it with backend='cpu'"):
        by_openvino(Calls(torch.lgamma), X)
    with pytest.raises(ValueError, match=r"outputs is int64 \[6, 2\], OpenVINO makes it .*trace it with"):
        by_openvino(Calls(torch.nonzero), X)


@needs_openvino
def test_only_bf16_is_cast_to():
    hints = []
    for cast in ("none", "all"):
        graph = by_openvino(nn.Linear(3, 3), X, compiler_args=f"--auto-cast {cast} --auto-cast-type bf16")
        compiled = dict(graph.named_buffers())["graph.network"].compiled
        hints.append(compiled.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
    can = "BF16" in compiled.openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert hints == ["f32", "bf16" if can else "f32"]
    with pytest.raises(ValueError, match="--auto-cast-type is fp16; OpenVINO is asked for fp32 or bf16"):
        by_openvino(nn.Linear(3, 3), X, compiler_args="--auto-cast all --auto-cast-type fp16")


# Numbers

FUNCTIONS = {
    "one tensor": lambda x: x + 1,
    "a tuple of one": lambda x: (x + 1,),
    "an input as it is": lambda x: (x + 1, x, x),
    "an input's view": lambda x: (x.reshape(3, 2), x.t()),
    "an input alone": lambda x: x.contiguous(),
    "a constant": lambda x: (torch.ones(3), x * 2),
    "one output twice": lambda x: (x + 1,) * 2,
    "no dimension": lambda x: x.sum(),
    "bool": lambda x: (x > 2, ~(x > 2)),
}


def listed(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


@needs_openvino
@pytest.mark.parametrize("name", FUNCTIONS)
def test_outputs_are_those_of_the_module_and_inputs_stay(name):
    traced = by_openvino(Calls(FUNCTIONS[name]), X)
    given = X.clone()
    outputs, expected = traced(given), FUNCTIONS[name](X)
    assert type(outputs) is type(expected)
    for ours, theirs in zip(listed(outputs), listed(expected), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    assert torch.equal(given, X)
    before = [tensor.clone() for tensor in listed(outputs)]
    traced(given + 1)
    assert all(map(torch.equal, listed(outputs), before))  # no memory that the next call writes to


@needs_openvino
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8], ids=str
)
def test_every_dtype_comes_back(dtype):
    module = Calls(lambda x, unused: (x + x, x))
    traced = by_openvino(module, X.to(dtype), X > 2)
    for ours, theirs in zip(traced(X.to(dtype), X > 2), module(X.to(dtype), X > 2), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == dtype


@needs_openvino
def test_threads_take_turns():
    linear = nn.Linear(3, 3)
    traced = by_openvino(linear, X)
    expected, equal = traced(X), []
    assert torch.allclose(expected, linear(X), atol=1e-5)

    def call():
        for _ in range(50):
            equal.append(torch.equal(traced(X), expected))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 200


@needs_openvino
def test_a_fork_is_refused_and_may_load_another(tmp_path):
    traced = by_openvino(nn.Linear(3, 3), X)
    save_traced(traced, tmp_path / "linear.pt")
    traced(X)
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            traced(X)
        except RuntimeError as error:
            same = torch.equal(load_traced(tmp_path / "linear.pt")(X), torch.zeros(2, 3))
            os.write(writing, f"{error} {same}".encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    assert f"compiled in process {os.getpid()}, whose threads it needs: load it in process" in said
    assert said.endswith("False")


# State


@needs_openvino
def test_state_stays_and_is_read_and_written_as_parameters(graph):
    kept, untouched = graph.parameters()
    assert not kept.any()
    for calls in (1, 2, 3):
        assert graph(X) == calls * X.sum()
        assert torch.equal(kept, calls * X)
    kept.fill_(torch.nan)
    kept.copy_(X)
    untouched.fill_(2)
    assert graph(X) == 2 * 2 * X.sum()
    assert torch.equal(kept, 2 * X) and torch.equal(untouched, torch.full((3,), 2.0))
    kept.data = torch.zeros(2, 3)  # other memory
    assert graph(X) == 2 * X.sum() and torch.equal(kept, X)


@needs_openvino
def test_a_call_copies_no_state(graph):
    kept, _ = graph.parameters()
    places = []
    for _ in range(6):
        graph(X)
        places.append(kept.data_ptr())
    assert len(set(places)) == 2 and places[:2] * 3 == places
    assert dict(graph.named_buffers())["graph.network"].compiled.changed == [0]


@needs_openvino
def test_the_next_state_may_be_an_input_or_another_state():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.before = (nn.Parameter(torch.zeros(2, 3), requires_grad=False) for _ in range(2))

        def forward(self, x):
            return self.before, x, self.last

    module = Shift()
    graph = by_openvino(module, X, input_output_aliases={module.last: 1, module.before: 2})
    returned = [graph(number * X) for number in (1, 2, 3, 4)]
    assert [tensor[0, 0].item() for tensor in returned] == [0, 0, 1, 2]


@needs_openvino
def test_the_module_and_what_was_loaded_have_states_of_their_own(tmp_path):
    module = Sum()
    module.kept.copy_(X)
    graph = by_openvino(module, X, input_output_aliases=module.aliases())
    save_traced(graph, tmp_path / "sum.pt")
    replicas = [load_traced(tmp_path / "sum.pt") for _ in range(2)]
    assert [call(X).item() for call in (graph, graph, replicas[0])] == [42, 63, 42]
    assert torch.equal(next(replicas[1].parameters()), X) and torch.equal(module.kept, X)


@needs_openvino
def test_what_was_compiled_goes_with_its_graph():
    graph = by_openvino(nn.Linear(3, 3), X)
    compiled = weakref.ref(dict(graph.named_buffers())["graph.network"].compiled)
    gc.collect()
    graph(X)
    assert compiled() is not None
    del graph
    gc.collect()
    assert compiled() is None


# BLIP


@pytest.fixture(scope="module", params=["padded", "cached", "unrolled"])
def compiled(request, tiny, tmp_path_factory):
    pytest.importorskip("openvino")
    directory = tmp_path_factory.mktemp(request.param)
    shapes = replace(TINY_SHAPES, unrolled_steps=4) if request.param == "unrolled" else TINY_SHAPES
    return trace(tiny, directory, shapes, decoder=request.param, backend="openvino"), directory


def test_answers_are_those_of_eager(compiled, tiny):
    model, directory = compiled
    questions, pictures = make_questions([3, 5, 10, 4, 6, 7]), make_pixels(6)
    limit = {"max_new_tokens": TINY_SHAPES.answer_length - 1}
    replicas = [model, *blip_helpers.load_replicas(directory, 2)]
    for i, question in enumerate(questions):
        (expected,) = tiny.generate(question, pictures[i : i + 1], **limit).tolist()
        for replica in replicas:
            assert replica.generate(question, pictures[i : i + 1], **limit)[0].tolist() == expected
    for question in questions:
        beams = {"num_beams": 2, **limit}
        expected = tiny.generate(question, pictures[:1], **beams)
        assert torch.equal(model.generate(question, pictures[:1], **beams), expected)


def test_the_manifest_says_what_made_it(compiled, tiny, capsys, monkeypatch):
    _, directory = compiled
    manifest = read_manifest(directory)
    assert manifest["backend"] == "openvino"
    assert all("openvino" in part["versions"] for part in manifest["parts"].values())
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2026.9" if name == "openvino" else version(name))
    with pytest.raises(ValueError, match=r"openvino was .*, is 2026\.9; trace the model again"):
        NeuronBlipForQuestionAnswering.from_pretrained(directory)


@needs_openvino
def test_a_damaged_file_and_another_backends_are_traced_again(tiny, tmp_path, capsys):
    how = {"decoder": "padded", "backend": "openvino"}
    trace(tiny, tmp_path, TINY_SHAPES, **how)
    path = tmp_path / "text_decoder.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"text_decoder\.pt was changed after its trace"):
        NeuronBlipForQuestionAnswering.from_pretrained(tmp_path)
    capsys.readouterr()
    trace(tiny, tmp_path, TINY_SHAPES, **how)
    assert capsys.readouterr().out.count("kept") == 2
    trace(tiny, tmp_path, TINY_SHAPES, decoder="padded", backend="cpu")
    assert capsys.readouterr().out.count("traced: openvino was") == 3


@needs_openvino
def test_an_artifact_is_refused_where_the_package_is_not(tiny, tmp_path, monkeypatch):
    trace(tiny, tmp_path, TINY_SHAPES, decoder="padded", backend="openvino")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find_spec(name))
    with pytest.raises(ValueError, match="OpenVINO is not installed"):
        NeuronBlipForQuestionAnswering.from_pretrained(tmp_path)


@needs_openvino
def test_another_dtype_is_traced_again(tiny, tmp_path, capsys):
    for dtype in (torch.float32, torch.bfloat16):
        trace(tiny, tmp_path, TINY_SHAPES, backend="openvino", dtype=dtype)
    assert capsys.readouterr().out.count("traced: dtype was float32, is bfloat16") == 3
