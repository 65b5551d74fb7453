"""The double of torch_neuronx keeps the rules that its docstring names; what passes through it can be relied on."""

import importlib.metadata
import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    TINY_SHAPES,
    answer_eagerly,
    cut,
    make_pixels,
    make_questions,
    make_tiny_blip,
    pad,
    start_python,
)
from torch import nn

import blip_helpers

DOUBLE = Path(__file__).parent / "double"
X, Y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 2, 3])
QUESTIONS, PIXELS = make_questions([4, 9, 2]), make_pixels(3)


class Two(nn.Module):
    def forward(self, left, right):
        return left.sum() + right


class Sum(nn.Module):
    """The sum of all inputs so far, as a state, and its double."""

    def __init__(self):
        super().__init__()
        self.kept = nn.Parameter(torch.zeros(2, 2))
        self.seen = nn.Parameter(torch.zeros(1))
        self.register_buffer("buffer", torch.zeros(2, 2))

    def forward(self, x):
        total = self.kept + x
        return 2 * total, total, self.seen + 1

    def aliases(self):
        return {self.kept: 1, self.seen: 2}


class Returns(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output(x)


@pytest.fixture
def double(monkeypatch):
    monkeypatch.syspath_prepend(DOUBLE)
    for name in ("DEVICE", "LOG", "CORES"):
        monkeypatch.delenv(f"TORCH_NEURONX_DOUBLE_{name}", raising=False)
    for name in ("NEURON_PLATFORM_TARGET_OVERRIDE", "NEURON_RT_VISIBLE_CORES"):
        monkeypatch.delenv(name, raising=False)
    import torch_neuronx

    yield torch_neuronx
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_neuronx"]:
        del sys.modules[name]


@pytest.fixture
def stateful(double):
    module = Sum()
    return double.trace(module, X, input_output_aliases=module.aliases())


def refuses(kind, match=""):
    return pytest.raises(kind, match=f"(?s)double of torch_neuronx.*{match}")


def in_a_process(code, *arguments, **environment):
    """Run a piece of Python that sees the double; the error it ends with, or its output."""
    before = dict(os.environ)
    os.environ.update({"PYTHONPATH": str(DOUBLE), **environment})
    try:
        process = start_python(code, *arguments)
    finally:
        os.environ.clear()
        os.environ.update(before)
    output, errors = process.communicate(timeout=300)
    return errors if process.returncode else output


# What it is


def test_it_says_what_it_is(double):
    assert importlib.util.find_spec("torch_neuronx")
    assert "double" in importlib.metadata.version("torch-neuronx") == double.__version__
    assert "double" in importlib.metadata.version("neuronx-cc")
    assert "double" in double.__doc__.splitlines()[0]
    assert blip_helpers.default_backend() == "neuron"
    assert blip_helpers.what_runs_here() == "test double of torch_neuronx"


def test_it_is_gone_when_a_test_is_over():
    assert blip_helpers.default_backend() == "cpu"


# What is traced


def test_a_trace_answers_like_its_module(double):
    traced = double.trace(Two(), (X, Y))
    assert isinstance(traced, torch.jit.ScriptModule)
    assert torch.equal(traced(2 * X, Y), Two()(2 * X, Y))
    assert torch.equal(double.trace(lambda x: 3 * x, X)(X), 3 * X)


def test_a_trace_is_a_copy(double):
    module = nn.Linear(2, 2)
    traced, before = double.trace(module, X), module(X)
    with torch.no_grad():
        module.weight.zero_()
    assert torch.equal(traced(X), before)


@pytest.mark.parametrize(
    "wrong", [[X, Y], {"left": X}, (X, 3), (X, [Y]), "text"], ids=lambda wrong: type(wrong).__name__
)
def test_inputs_are_tensors_in_a_tuple(double, wrong):
    with refuses(TypeError):
        double.trace(Two(), wrong)


def test_each_part_keeps_its_mode(double):
    module = nn.Sequential(nn.Dropout().eval())
    assert module.training
    assert torch.equal(double.trace(module, X)(X), X)


@pytest.mark.parametrize("wrong", [(), (X, X), (X, Y.to("meta"))], ids=["none", "twice", "not on the CPU"])
def test_inputs_are_different_and_on_the_cpu(double, wrong):
    with refuses(ValueError):
        double.trace(Two(), wrong)


def test_what_follows_the_inputs_is_a_keyword(double):
    with refuses(TypeError):
        double.trace(Two(), (X, Y), {})


def test_unknown_keywords_are_a_warning(double):
    with pytest.warns(UserWarning, match=r"double of torch_neuronx: Unexpected keyword arguments: \['options'\]"):
        double.trace(Two(), (X, Y), options=None)


@pytest.mark.parametrize("unused", ["", "its shape alone"])
def test_an_unused_input_is_ignored_with_a_warning(double, unused):
    module = (lambda x, y: x + y.shape[0]) if unused else (lambda x, y: x + 3)
    with pytest.warns(UserWarning, match=r"double of .* unused. Tensor will be ignored. \(index=1, shape=.*\[3\]"):
        traced = double.trace(module, (X, Y))
    assert torch.equal(traced(X, 5 * Y), X + 3)


@pytest.mark.parametrize("output", [lambda x: (), lambda x: {"x": x}, lambda x: (x, 3), lambda x: None])
def test_outputs_are_tensors(double, output):
    with refuses(ValueError):
        double.trace(Returns(output), X)


@pytest.mark.parametrize("operator", [torch.sort, torch.nonzero], ids=lambda operator: operator.__name__)
def test_operators_that_the_compiler_does_not_know(double, operator):
    with pytest.raises(RuntimeError, match=f"neuronx-cc failed with 2 .*double of torch_neuronx.*{operator.__name__}"):
        double.trace(Returns(lambda x: operator(x)[0]), X)


@pytest.mark.parametrize("where", ["in", "out", "weights"])
def test_there_is_no_float64(double, where):
    module = {"in": nn.Identity(), "out": Returns(torch.Tensor.double), "weights": nn.Linear(2, 2).double()}[where]
    with refuses(RuntimeError, "float64"):
        double.trace(module, X if where == "out" else X.double())


# Shapes and dtypes


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("wrong", [(X[:1], Y), (X.half(), Y), (X, Y.int()), (X, Y[None])], ids=str)
def test_another_shape_or_dtype_is_an_error(double, tmp_path, wrong, saved):
    traced = double.trace(Two(), (X, Y))
    if saved:
        torch.jit.save(traced, tmp_path / "two.pt")
        traced = torch.jit.load(tmp_path / "two.pt")
    with refuses(RuntimeError, "this graph was traced for"):
        traced(*wrong)


@pytest.mark.parametrize("call", [lambda t: t(X), lambda t: t(X, Y, Y), lambda t: t(left=X, right=Y)])
def test_calls_are_positional_and_complete(double, call):
    with pytest.raises(RuntimeError):
        call(double.trace(Two(), (X, Y)))


# The compiler's arguments


@pytest.mark.parametrize(
    "args",
    [
        None,
        "",
        "--model-type transformer --auto-cast=matmult --auto-cast-type fp8_e4m3 --optlevel=3",
        ["--model-type=unet-inference", "-O", "1", "--logfile", "a log.txt", "--verbose", "35"],
        "-O1 --enable-saturate-infinity --target=trn2 --logical-nc-config 1",
        *([*map(str, blip_helpers.neuron_compiler_args("all", t, optlevel=1, logfile="l"))] for t in ("bf16", "tf32")),
    ],
    ids=str,
)
def test_documented_arguments_are_taken(double, args):
    double.trace(Two(), (X, Y), compiler_args=args)


@pytest.mark.parametrize(
    ("args", "flag"),
    [
        ("--auto-cast matmul", "--auto-cast"),
        ("--auto-cast=fp16", "--auto-cast"),
        ("--autocast none", "--autocast"),
        ("--auto-cast-type fp32", "--auto-cast-type"),
        ("--optlevel 4", "--optlevel"),
        ("-O0", "--optlevel"),
        ("--model-type transformers", "--model-type"),
        ("--target inf1", "--target"),
        ("--logfile", "--logfile"),
        ("--enable-saturate-infinity=1", "--enable-saturate-infinity"),
        ("-lnc 1 --target inf2", "--logical-nc-config"),
        ("transformer", "transformer"),
    ],
)
def test_other_arguments_fail_in_the_compiler(double, args, flag):
    for given in (args, shlex.split(args)):
        with pytest.raises(RuntimeError, match=f"^neuronx-cc failed with 2 .*double of torch_neuronx.*{flag}( |\\))"):
            double.trace(Two(), (X, Y), compiler_args=given)


# State


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_state_stays_inside(double, stateful, tmp_path, saved, mode):
    if saved:
        torch.jit.save(stateful, tmp_path / "sum.pt")
        stateful = torch.jit.load(tmp_path / "sum.pt")
    double.move_trace_to_device(stateful, 0)
    with mode():
        assert torch.equal(stateful(X)[0], 2 * X)
        assert torch.equal(stateful(X)[0], 4 * X)
    kept, seen = list(stateful.parameters())[:2]
    assert torch.equal(kept, 2 * X) and torch.equal(seen, torch.tensor([2.0]))
    with mode(), torch.no_grad():
        for state, value in zip(stateful.parameters(), [X, seen], strict=False):
            state.copy_(value)
        assert torch.equal(stateful(X)[0], 4 * X)


def test_a_trace_begins_with_the_state_that_its_module_has(double):
    module = Sum()
    with torch.no_grad():
        module.kept += 1
    traced = double.trace(module, X, input_output_aliases=module.aliases())
    double.move_trace_to_device(traced, 0)
    assert torch.equal(traced(X)[0], 2 * (X + 1))
    assert torch.equal(module.kept, torch.ones(2, 2))


def test_aliased_outputs_are_returned_and_cannot_be_read(double, stateful):
    double.move_trace_to_device(stateful, 0)
    output, kept, seen = stateful(X)
    assert (kept.device.type, kept.shape, seen.shape) == ("meta", (2, 2), (1,))
    with pytest.raises((RuntimeError, NotImplementedError)):
        (output + kept).tolist()


def test_state_has_to_be_moved_after_loading(double, stateful, tmp_path):
    with refuses(RuntimeError, "move_trace_to_device"):
        stateful(X)
    double.move_trace_to_device(stateful, 0)
    torch.jit.save(stateful, tmp_path / "sum.pt")
    with refuses(RuntimeError, "move_trace_to_device"):
        torch.jit.load(tmp_path / "sum.pt")(X)


def test_parameters_from_before_the_move_are_not_the_state(double, stateful):
    (before, *_) = stateful.parameters()
    double.move_trace_to_device(stateful, 0)
    with torch.no_grad():
        before.fill_(7)
    assert torch.equal(stateful(X)[0], 2 * X)


@pytest.mark.parametrize(
    ("kind", "aliases"),
    [
        (KeyError, lambda m: {m.buffer: 1, m.seen: 2}),
        (KeyError, lambda m: {nn.Parameter(m.kept.detach().clone()): 1, m.seen: 2}),
        (KeyError, lambda m: {X: 1}),
        (ValueError, lambda m: {m.kept: 0}),
        (ValueError, lambda m: {m.kept: 1}),
        (ValueError, lambda m: {m.kept: 1, m.seen: 3}),
        (ValueError, lambda m: {m.kept: 1, m.seen: 1}),
        (ValueError, lambda m: {m.kept: 1, m.seen: -1}),
        (ValueError, lambda m: {m.kept: 2, m.seen: 1}),
        (ValueError, lambda m: {m.seen: 2, m.kept: 1}),
    ],
    ids=["buffer", "clone", "foreign", "real", "real last", "range", "twice", "negative", "shapes", "order"],
)
def test_aliases_are_checked(double, kind, aliases):
    module = Sum()
    with refuses(kind):
        double.trace(module, X, input_output_aliases=aliases(module))


def test_aliases_need_a_module_and_a_real_output(double):
    module = Sum()
    with refuses(AssertionError):
        double.trace(lambda x: module(x), X, input_output_aliases=module.aliases())
    alone = Returns(lambda x: x + module.kept)
    alone.kept = module.kept
    with refuses(ValueError):
        double.trace(alone, X, input_output_aliases={module.kept: 0})


# Cores


def test_cores_take_turns_unless_a_context_says_which(double, tmp_path):
    torch.jit.save(double.trace(Two(), (X, Y)), tmp_path / "two.pt")

    def load():
        return torch.jit.load(tmp_path / "two.pt").neff.core

    assert [load(), load(), load()] == [0, 1, 0]
    with double.neuron_cores_context(start_nc=1, nc_count=1):
        assert [load(), load()] == [1, 1]
    assert load() == 1
    assert load() == 0


@pytest.mark.parametrize("wrong", [(2, 1), (-2, 1), (0, 3), (0, 0), (1, 2)], ids=str)
def test_there_are_two_cores(double, stateful, wrong):
    with refuses(ValueError), double.neuron_cores_context(*wrong):
        pass
    with refuses(ValueError):
        double.move_trace_to_device(stateful, 2)


def test_a_process_takes_every_core_that_it_sees(double, tmp_path, monkeypatch):
    path = tmp_path / "relu.pt"
    monkeypatch.setenv("TORCH_NEURONX_DOUBLE_CORES", str(tmp_path))
    torch.jit.save(double.trace(nn.ReLU(), torch.ones(2)), path)
    for visible in ("0", "1", "0-1"):
        assert "NeuronCore(s) not available" in in_a_process(LOAD, path, NEURON_RT_VISIBLE_CORES=visible)


def test_a_process_that_sees_one_core_leaves_the_other(double, tmp_path, monkeypatch):
    path = tmp_path / "relu.pt"
    monkeypatch.setenv("TORCH_NEURONX_DOUBLE_CORES", str(tmp_path))
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "0")
    torch.jit.save(double.trace(nn.ReLU(), torch.ones(2)), path)
    assert [torch.jit.load(path).neff.core for _ in range(2)] == [0, 0]
    assert "NeuronCore(s) not available" in in_a_process(LOAD, path, NEURON_RT_VISIBLE_CORES="0,1")
    assert json.loads(in_a_process(LOAD, path, NEURON_RT_VISIBLE_CORES="1")) == [1.0, 1.0]
    with refuses(ValueError), double.neuron_cores_context(1, 1):
        pass


def test_the_former_name_warns(double):
    with (
        pytest.warns(DeprecationWarning, match="double of torch_neuronx"),
        double.experimental.neuron_cores_context(0, 1),
    ):
        pass


# Without a device


HOST = {"TORCH_NEURONX_DOUBLE_DEVICE": "0", "NEURON_PLATFORM_TARGET_OVERRIDE": "inf2"}
COMPILE = """
import sys, torch, torch_neuronx
traced = torch_neuronx.trace(torch.nn.ReLU(), torch.ones(2), compiler_args=sys.argv[2], cpu_backend=sys.argv[3] == "on")
torch.jit.save(traced, sys.argv[1])
print("saved")
traced(torch.ones(2))
"""
LOAD = "import sys, torch, torch_neuronx; print(torch.jit.load(sys.argv[1])(torch.ones(2)).tolist())"
LOAD_ALONE = "import sys, torch; torch.jit.load(sys.argv[1])"


def test_a_host_without_a_device_compiles_and_does_not_run(tmp_path):
    path = tmp_path / "relu.pt"
    assert "could not be initialized" in in_a_process(COMPILE, path, "--target inf2", "on", **HOST)
    assert "could not be initialized" in in_a_process(LOAD, path, **HOST)
    assert json.loads(in_a_process(LOAD, path)) == [1.0, 1.0]
    assert "Unknown builtin op: neuron_double::" in in_a_process(LOAD_ALONE, path)


def test_a_host_without_a_device_has_to_say_what_it_compiles_for(tmp_path):
    path = tmp_path / "relu.pt"
    without = {"TORCH_NEURONX_DOUBLE_DEVICE": "0", "NEURON_PLATFORM_TARGET_OVERRIDE": ""}
    assert "double of torch_neuronx: Unsupported Platform" in in_a_process("import torch_neuronx", **without)
    assert "--target" in in_a_process(COMPILE, path, "--optlevel 1", "on", **HOST)
    assert "could not be initialized" in in_a_process(COMPILE, path, "--target inf2", "off", **HOST)
    assert not path.exists()


def test_traces_are_logged(double, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_NEURONX_DOUBLE_LOG", str(tmp_path / "log"))
    double.trace(Two(), (X, Y), compiler_args="--optlevel=1")
    assert json.loads((tmp_path / "log").read_text()) == {
        "func": "Two",
        "inputs": ["float32 [2, 2]", "int64 [3]"],
        "states": 0,
        "compiler_args": ["--optlevel", "1"],
        "cpu_backend": False,
    }


# BLIP through it


@pytest.fixture(scope="module")
def expected(tiny):
    return cut(answer_eagerly(tiny, QUESTIONS, PIXELS, max_new_tokens=TINY_SHAPES.answer_length - 1))


WAYS = {"padded": {"decoder": "padded"}, "cached": {}, "unrolled": {"decoder": "unrolled"}}
IN_A_FRESH_PROCESS = """
import json, sys, torch
from conftest import cut, make_pixels, make_questions, pad
from blip_helpers import NeuronBlipForQuestionAnswering

ids, mask = pad(make_questions([4, 9, 2]))
compiled = NeuronBlipForQuestionAnswering.from_pretrained(sys.argv[1])
print(json.dumps(cut(compiled.generate(ids, make_pixels(3), mask))))
"""


@pytest.mark.parametrize("way", WAYS)
def test_blip_answers_through_it_like_eager(double, tmp_path, expected, way):
    compiled = blip_helpers.trace(make_tiny_blip(), tmp_path / way, TINY_SHAPES, backend="neuron", **WAYS[way])
    ids, mask = pad(QUESTIONS)
    for _ in range(2):
        assert cut(compiled.generate(ids, PIXELS, mask)) == expected
    assert json.loads(in_a_process(IN_A_FRESH_PROCESS, tmp_path / way).splitlines()[-1]) == expected


def test_each_replica_has_a_core_and_a_state_of_its_own(double, tmp_path, expected):
    blip_helpers.trace(make_tiny_blip(), tmp_path, TINY_SHAPES, backend="neuron")
    replicas = blip_helpers.load_replicas(tmp_path, 2)
    graphs = [[m for m in replica.modules() if hasattr(m, "neff")] for replica in replicas]
    assert [{graph.neff.core for graph in of_one} for of_one in graphs] == [{0}, {1}]
    ids, mask = pad(QUESTIONS)
    assert cut(replicas[0].generate(ids, PIXELS, mask)) == expected
    assert not any(state.any() for state in list(replicas[1].text_decoder.decoder.parameters())[:4])


@pytest.mark.parametrize("way", WAYS)
def test_an_artifact_for_the_cpu_takes_no_core(double, tmp_path, monkeypatch, expected, way):
    monkeypatch.setenv("TORCH_NEURONX_DOUBLE_CORES", str(tmp_path))
    compiled = blip_helpers.trace(make_tiny_blip(), tmp_path / way, TINY_SHAPES, backend="cpu", **WAYS[way])
    ids, mask = pad(QUESTIONS)
    assert cut(compiled.generate(ids, PIXELS, mask)) == expected
    assert not list(tmp_path.glob("core*"))
