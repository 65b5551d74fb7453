"""trace_module's stand-in keeps Neuron's rules: in this process, after save and load in another one, after freeze."""

import inspect
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import read_json, start_python
from torch import nn

from blip_helpers import (
    StaticGraph,
    check_inputs,
    describe_inputs,
    load_traced,
    neuron_compiler_args,
    save_traced,
    trace_module,
)

LEFT, RIGHT = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.tensor([7, 8, 9])
MODES = {"grad": nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


class Two(nn.Module):
    """A module of two inputs, of different dtypes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, left, right):
        return self.linear(left) + right


WRONG_TENSORS = {
    "another shape": lambda f: f(LEFT, torch.arange(4)),
    "another batch size": lambda f: f(torch.ones(1, 3), RIGHT),
    "another number of dimensions": lambda f: f(LEFT[0], RIGHT),
    "no dimension": lambda f: f(LEFT, torch.tensor(7)),
    "another dtype": lambda f: f(LEFT.double(), RIGHT),
    "another integer dtype": lambda f: f(LEFT, RIGHT.int()),
    "a dtype without a name": lambda f: f(LEFT.to(torch.complex64), RIGHT),
    "inputs in the wrong order": lambda f: f(RIGHT, LEFT),
}
WRONG_CALLS = {
    "one input too few": lambda f: f(LEFT),
    "one input too many": lambda f: f(LEFT, RIGHT, RIGHT),
    "no input": lambda f: f(),
    "a tuple of the inputs": lambda f: f((LEFT, RIGHT)),
    "keywords of the module": lambda f: f(left=LEFT, right=RIGHT),
    "one keyword of the module": lambda f: f(LEFT, right=RIGHT),
    "a keyword of the check": lambda f: f(input=(LEFT, RIGHT)),
    "an unknown keyword": lambda f: f(LEFT, RIGHT, other=RIGHT),
    "int": lambda f: f(LEFT, 7),
    "float": lambda f: f(1.0, RIGHT),
    "bool": lambda f: f(LEFT, True),
    "None": lambda f: f(LEFT, None),
    "str": lambda f: f(LEFT, "right"),
    "list": lambda f: f(LEFT, [7, 8, 9]),
    "list of tensors": lambda f: f([LEFT], RIGHT),
    "numpy array": lambda f: f(LEFT, np.array([7, 8, 9])),
    "numpy scalar": lambda f: f(LEFT, np.int64(7)),
}
# Once the user freezes the traced module, these names, which nobody uses, are no longer refused: freeze drops hooks.
NAMES_OF_THE_CHECK = {
    "keywords of the graph": lambda f: f(positional_0=LEFT, positional_1=RIGHT),
    "one keyword of the graph": lambda f: f(LEFT, positional_1=RIGHT),
}
REFUSED = WRONG_TENSORS | WRONG_CALLS | NAMES_OF_THE_CHECK
PLACES = ("in this process", "frozen", "loaded elsewhere", "loaded elsewhere, frozen")


def refusals(traced):
    """What each wrong call is refused with; None where it is accepted."""
    messages = {}
    for name, call in REFUSED.items():
        try:
            call(traced)
            messages[name] = None
        except Exception as error:
            messages[name] = str(error)
    return messages


@pytest.fixture(scope="module")
def two():
    torch.manual_seed(0)
    return Two().eval()


@pytest.fixture(scope="module")
def messages(two, tmp_path_factory):
    """`refusals` in each of the `PLACES`; and what a right call gives in another process."""
    traced = trace_module(two, (LEFT, RIGHT))
    frozen = torch.jit.freeze(traced)
    directory = tmp_path_factory.mktemp("two")
    save_traced(traced, directory / "traced.pt")
    save_traced(frozen, directory / "frozen.pt")
    code = """
import json, sys
from blip_helpers import load_traced
from test_tracing import LEFT, RIGHT, refusals
traced, frozen = (load_traced(f"{sys.argv[1]}/{name}.pt") for name in ("traced", "frozen"))
right = [traced(LEFT, RIGHT).tolist(), frozen(LEFT, RIGHT).tolist()]
print(json.dumps([refusals(traced), refusals(frozen), right]))
"""
    elsewhere = read_json(start_python(code, directory))
    return dict(zip((*PLACES, "right calls"), (refusals(traced), refusals(frozen), *elsewhere), strict=True))


@pytest.mark.parametrize(
    ("place", "call"),
    [(place, call) for place in PLACES for call in REFUSED if not ("frozen" in place and call in NAMES_OF_THE_CHECK)],
)
def test_a_wrong_call_is_refused(messages, place, call):
    assert messages[place][call] is not None


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", WRONG_TENSORS)
def test_the_refusal_of_a_tensor_ends_with_a_sentence(messages, place, call):
    sentence = messages[place][call].strip().splitlines()[-1]
    assert sentence.startswith("builtins.ValueError: ")
    assert sentence.endswith(": pass exactly that, or trace it again")
    assert ("left is " in sentence and "float32 [2, 3]" in sentence) or (
        "right is " in sentence and "int64 [3]" in sentence
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", WRONG_TENSORS | WRONG_CALLS)
def test_no_refusal_holds_a_path_of_the_machine(messages, place, call):
    assert not re.search(r"(?<!\w)/\w|[A-Z]:\\", messages[place][call])


def test_the_sentence_says_what_came_and_what_was_traced(messages):
    for place in PLACES:
        assert "right is int32 [3]; this graph was traced for int64 [3]" in messages[place]["another integer dtype"]
        assert (
            "left is float32 [1, 3]; this graph was traced for float32 [2, 3]" in messages[place]["another batch size"]
        )


def test_a_right_call_gives_what_the_module_gives(two, messages):
    expected = two(LEFT, RIGHT)
    assert torch.equal(trace_module(two, (LEFT, RIGHT))(LEFT, RIGHT), expected)
    assert torch.equal(trace_module(two, [LEFT, RIGHT])(LEFT, RIGHT), expected)
    for elsewhere in messages["right calls"]:  # of the traced module and of the frozen one
        torch.testing.assert_close(torch.tensor(elsewhere), expected)


def test_inputs_are_not_baked_in(two):
    traced = trace_module(two, (LEFT, RIGHT))
    assert torch.equal(traced(LEFT * 2, RIGHT + 1), two(LEFT * 2, RIGHT + 1))


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool],
)
@pytest.mark.parametrize("shape", [(), (0,), (2, 1)])
def test_every_dtype_and_shape_is_traced_and_kept(dtype, shape):
    traced = trace_module(nn.Flatten(0), torch.zeros(shape, dtype=dtype))
    assert traced(torch.ones(shape, dtype=dtype)).dtype == dtype
    with pytest.raises(Exception, match="this graph was traced for"):
        traced(torch.ones(shape, dtype=torch.float32))
    with pytest.raises(Exception, match="this graph was traced for"):
        traced(torch.ones((3, *shape), dtype=dtype))


@pytest.mark.parametrize("example", [None, 3, 1.5, "x", [1.0], np.ones(3)], ids=lambda example: type(example).__name__)
def test_an_example_that_is_no_tensor_is_a_value_error(two, example):
    with pytest.raises(ValueError, match="example input right is a"):
        trace_module(two, (LEFT, example))


@pytest.mark.parametrize("examples", [None, 3, {}, {"left": LEFT}, (), "x"], ids=str)
def test_examples_that_are_no_tuple_are_a_value_error(two, examples):
    with pytest.raises(ValueError, match="example_inputs"):
        trace_module(two, examples)


@pytest.mark.parametrize(
    "thing", [lambda left, right: left, torch.add, Two, None], ids=["lambda", "function", "class", "None"]
)
def test_only_a_module_is_traced(thing):
    with pytest.raises(ValueError, match=r"module is a .*nn\.Module"):
        trace_module(thing, (LEFT, RIGHT))


@pytest.mark.parametrize("backend", ["cuda", "Neuron", "", 1])
def test_an_unknown_backend_is_a_value_error(two, backend):
    with pytest.raises(ValueError, match="there are 'neuron', 'cpu' and 'openvino'"):
        trace_module(two, (LEFT, RIGHT), backend=backend)


def test_neuron_without_its_package_is_a_value_error(two, monkeypatch):
    monkeypatch.setattr("inf2.tracing.neuron_is_here", lambda: False)
    with pytest.raises(ValueError, match=r"torch_neuronx is not installed.*requirements-neuron\.txt"):
        trace_module(two, (LEFT, RIGHT), backend="neuron")


def test_the_module_of_the_caller_is_unchanged():
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Dropout(0.5))
    module[1].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    attributes = [sorted(vars(m)) for m in module.modules()]
    examples = torch.ones(2, 3, requires_grad=True)
    trace_module(module, examples)
    assert [m.training for m in module.modules()] == modes
    assert [sorted(vars(m)) for m in module.modules()] == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
def test_the_traced_module_has_the_mode_of_the_module(training):
    assert trace_module(nn.Linear(3, 3).train(training), LEFT).training == training


def test_a_save_that_fails_leaves_the_former_file_and_nothing_else(two, tmp_path, monkeypatch):
    save_traced(trace_module(two, (LEFT, RIGHT)), tmp_path / "two.pt")
    former = (tmp_path / "two.pt").read_bytes()

    def fail(traced, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch.jit, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save_traced(trace_module(two, (LEFT, RIGHT)), tmp_path / "two.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["two.pt"]
    assert (tmp_path / "two.pt").read_bytes() == former


# What is kept inside: input_output_aliases


class Sum(nn.Module):
    """Adds its input to what it kept; returns ten times that, then the new value of what it keeps."""

    def __init__(self):
        super().__init__()
        self.kept = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        kept = self.kept + x
        return 10 * kept, kept


X = torch.tensor([1.0, 2.0])


def trace_sum(module=None):
    module = module or Sum().eval()
    return trace_module(module, X, input_output_aliases={module.kept: 1})


def test_state_stays_inside_and_is_not_returned():
    traced = trace_sum()
    with torch.no_grad():
        results = [traced(X) for _ in range(3)]
    assert all(isinstance(result, torch.Tensor) for result in results)
    steps = torch.stack(results)
    assert torch.equal(steps[1:] - steps[:-1], 10 * X.expand(2, 2))


def test_state_begins_as_the_parameter_was():
    with torch.no_grad():
        assert torch.equal(trace_sum()(X), 10 * X)


def test_tracing_and_calling_leave_the_state_of_the_caller_alone():
    module = Sum().eval()
    traced = trace_sum(module)
    with torch.no_grad():
        traced(X)
    assert torch.equal(module.kept, torch.zeros(2))
    assert isinstance(module.kept, nn.Parameter) and module.kept.requires_grad


def test_state_is_saved_and_a_reload_begins_with_what_was_saved(tmp_path):
    traced = trace_sum()
    with torch.no_grad():
        first = traced(X)
        save_traced(traced, tmp_path / "sum.pt")
        traced(X)
        for _ in range(2):
            assert torch.equal(load_traced(tmp_path / "sum.pt")(X), first + 10 * X)


def test_state_is_kept_after_freeze():
    traced = torch.jit.freeze(trace_sum())
    with torch.no_grad():
        assert torch.equal(traced(X) + 10 * X, traced(X))


def test_a_module_with_state_refuses_too():
    with pytest.raises(Exception, match=r"x is float32 \[3\]; this graph was traced for float32 \[2\]"):
        trace_sum()(torch.ones(3))


def test_several_outputs_and_states(tmp_path):
    class Several(Sum):
        def __init__(self):
            super().__init__()
            self.calls = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return self.kept + x, self.calls * 1.0, self.calls + 1, self.kept + x

    module = Several().eval()
    traced = trace_module(module, X, input_output_aliases={module.kept: 3, module.calls: 2})
    with torch.no_grad():
        first, second = traced(X), traced(X)
    assert len(first) == len(second) == 2
    assert torch.equal(second[0] - first[0], X) and torch.equal(second[1] - first[1], torch.ones(1))


@pytest.mark.parametrize(
    "aliases", [{"kept": 1}, {torch.zeros(2): 1}, {nn.Parameter(torch.zeros(2)): 1}], ids=["str", "tensor", "other"]
)
def test_an_alias_is_of_a_parameter_of_the_module(aliases):
    with pytest.raises(ValueError, match="input_output_aliases"):
        trace_module(Sum(), X, input_output_aliases=aliases)


@pytest.mark.parametrize("index", [2, -1, 1.0, True, "1", None])
def test_an_alias_is_the_index_of_an_output(index):
    module = Sum()
    with pytest.raises(ValueError, match="input_output_aliases"):
        trace_module(module, X, input_output_aliases={module.kept: index})


@pytest.mark.parametrize(
    "output", [lambda x: x.sum(), lambda x: x[:1], lambda x: x.double()], ids=["0-d", "shape", "dtype"]
)
def test_an_aliased_output_has_shape_and_dtype_of_its_parameter(output):
    class Other(Sum):
        def forward(self, x):
            return x, output(self.kept + x)

    module = Other()
    with torch.no_grad(), pytest.raises(ValueError, match="input_output_aliases"):
        trace_module(module, X, input_output_aliases={module.kept: 1})


@pytest.mark.parametrize("output", [lambda kept: kept, lambda kept: (kept,)], ids=["tensor", "tuple"])
def test_a_module_that_returns_its_state_alone_is_a_value_error(output):
    class Alone(Sum):
        def forward(self, x):
            return output(self.kept + x)

    module = Alone()
    with pytest.raises(ValueError, match="input_output_aliases"):
        trace_module(module, X, input_output_aliases={module.kept: 0})


def test_an_earlier_result_does_not_change():
    class Former(Sum):
        def forward(self, x):
            return self.kept, self.kept + x

    module = Former().eval()
    traced = trace_module(module, X, input_output_aliases={module.kept: 1})
    with torch.no_grad():
        first = traced(X)
        before = first.clone()
        traced(X)
    assert torch.equal(first, before)


@pytest.mark.parametrize("tracing", MODES)
@pytest.mark.parametrize("loading", ["not loaded", *MODES])
@pytest.mark.parametrize("calling", MODES)
def test_every_mix_of_modes_works(tracing, loading, calling, tmp_path):
    module, two = Sum().eval(), Two().eval()
    with MODES[tracing]():
        summing = trace_module(module, X, input_output_aliases={module.kept: 1})
        adding = trace_module(two, (LEFT.clone(), RIGHT.clone()))
    if loading != "not loaded":
        save_traced(summing, tmp_path / "sum.pt")
        save_traced(adding, tmp_path / "two.pt")
        with MODES[loading]():
            summing, adding = load_traced(tmp_path / "sum.pt"), load_traced(tmp_path / "two.pt")
    with MODES[calling]():
        assert torch.equal(summing(X) + 10 * X, summing(X))
        torch.testing.assert_close(adding(LEFT, RIGHT), two(LEFT, RIGHT))
    with torch.no_grad():
        assert torch.equal(summing(X) + 10 * X, summing(X)), "after that in another mode"


@pytest.mark.parametrize("tracing", MODES)
@pytest.mark.parametrize("calling", MODES)
def test_a_module_made_in_inference_mode_works_in_every_mode(tracing, calling):
    with torch.inference_mode():
        module = Sum().eval()
    with MODES[tracing]():
        traced = trace_module(module, X, input_output_aliases={module.kept: 1})
    with MODES[calling]():
        assert torch.equal(traced(X) + 10 * X, traced(X))


# The check in Python, before the call


def test_static_graph_names_input_value_and_limit(two):
    graph = StaticGraph(two, describe_inputs(two, (LEFT, RIGHT)))
    assert torch.equal(graph(LEFT, RIGHT), two(LEFT, RIGHT))
    with pytest.raises(ValueError, match=r"^left is float32 \[1, 3\]; this graph was traced for float32 \[2, 3\]: "):
        graph(LEFT[:1], RIGHT)
    with pytest.raises(ValueError, match=r"^right is int32 \[3\]; this graph was traced for int64 \[3\]: "):
        graph(LEFT, RIGHT.int())
    with pytest.raises(ValueError, match=r"^right is a list; this graph was traced for int64 \[3\]: "):
        graph(LEFT, [7, 8, 9])
    with pytest.raises(ValueError, match=r"^3 inputs; this graph was traced for 2: left, right"):
        graph(LEFT, RIGHT, RIGHT)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        graph(LEFT, right=RIGHT)


def test_the_check_comes_before_the_call():
    def never(*inputs):
        raise AssertionError("called")

    with pytest.raises(ValueError, match="x is"):
        StaticGraph(never, {"x": "float32 [2]"})(torch.ones(3))


def test_inputs_are_described_by_the_names_of_forward(two):
    traced_for = {"left": "float32 [2, 3]", "right": "int64 [3]"}
    assert describe_inputs(two, (LEFT, RIGHT)) == traced_for
    check_inputs((LEFT, RIGHT), traced_for)


# Arguments for the compiler


def option(args, name):
    return args[args.index(name) + 1] if name in args else None


def test_nothing_is_cast_unless_asked():
    args = neuron_compiler_args()
    assert option(args, "--auto-cast") == "none"
    assert "--auto-cast-type" not in args


@pytest.mark.parametrize("auto_cast", ["matmult", "all"])
@pytest.mark.parametrize("auto_cast_type", ["bf16", "fp16", "tf32", "fp8_e4m3"])
def test_a_cast_has_its_type(auto_cast, auto_cast_type):
    args = neuron_compiler_args(auto_cast, auto_cast_type)
    assert (option(args, "--auto-cast"), option(args, "--auto-cast-type")) == (auto_cast, auto_cast_type)


def test_a_type_alone_is_not_passed_on():
    assert "--auto-cast-type" not in neuron_compiler_args(auto_cast_type="fp16")


@pytest.mark.parametrize(
    "wrong",
    [
        {"auto_cast": "matmul"},
        {"auto_cast": None},
        {"auto_cast_type": "fp32"},
        {"optlevel": 0},
        {"optlevel": "2"},
        {"optlevel": True},
    ],
    ids=str,
)
def test_what_the_compiler_does_not_know_is_a_value_error(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name} is .*neuronx-cc knows"):
        neuron_compiler_args(**wrong)


def test_optimisation_and_log_go_where_the_user_wants():
    args = neuron_compiler_args(optlevel=3, logfile="a log.txt")
    assert option(args, "--optlevel") == "3"
    assert option(args, "--logfile") == "a log.txt"
    assert "--logfile" not in neuron_compiler_args()
    assert all(isinstance(arg, str) for arg in args)


@pytest.fixture
def handed_on(monkeypatch):
    """What reaches torch_neuronx.trace, of which this is a double."""
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    calls = []
    double = ModuleType("torch_neuronx")
    double.__spec__ = ModuleSpec("torch_neuronx", None)
    double.trace = lambda module, inputs, **keywords: calls.append((module, inputs, keywords))
    monkeypatch.setitem(__import__("sys").modules, "torch_neuronx", double)
    return calls


def test_on_neuron_the_arguments_reach_the_compiler(handed_on):
    module = Sum()
    trace_module(module, X, input_output_aliases={module.kept: 1}, compiler_args="--logfile 'a log.txt'")
    trace_module(module, X, compiler_args=["--optlevel", 3])
    trace_module(module, X)
    (first, inputs, keywords), (_, _, as_list), (_, _, by_default) = handed_on
    assert first is module and torch.equal(inputs[0], X)
    assert keywords == {"input_output_aliases": {module.kept: 1}, "compiler_args": ["--logfile", "a log.txt"]}
    assert as_list["compiler_args"] == ["--optlevel", "3"]
    assert by_default["compiler_args"] == neuron_compiler_args()


def test_the_stand_in_can_be_asked_for_where_neuron_is(handed_on, two):
    assert torch.equal(trace_module(two, (LEFT, RIGHT), backend="cpu")(LEFT, RIGHT), two(LEFT, RIGHT))
    assert not handed_on


def test_only_trace_modules_own_keywords_follow_the_inputs():
    kinds = [p.kind for p in inspect.signature(trace_module).parameters.values()]
    assert kinds[2:] == [inspect.Parameter.KEYWORD_ONLY] * 4
