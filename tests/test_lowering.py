"""Lowering through torch-xla: the graph, its process, what it refuses."""

import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import (
    TESTS,
    TINY_SHAPES,
    Apply,
    Counter,
    X,
    Y,
    make_pixels,
    make_questions,
    needs_xla,
    start_python,
)
from inf2.lowering import xla_process
from torch import nn

import blip_helpers as bh

ROOT = TESTS.parent


@needs_xla
def test_lowering_leaves_the_caller_as_it_was(tiny):
    module, inputs = bh.parts_to_trace(tiny, TINY_SHAPES, "padded")["text_decoder"]
    before = {name: (id(p), p.data_ptr(), p.clone()) for name, p in module.named_parameters()}
    lowered = bh.lower_module(module, inputs)
    after = dict(module.named_parameters())
    assert list(after) == list(before)
    for name, (identity, pointer, value) in before.items():
        assert (id(after[name]), after[name].data_ptr()) == (identity, pointer) and torch.equal(after[name], value)
    assert torch.get_default_device() == torch.device("cpu") and "torch_xla" not in sys.modules
    assert torch.allclose(lowered.outputs[0][0], module(*inputs), atol=1e-5)


@needs_xla
def test_a_tied_weight_is_one_parameter(tiny):
    module, inputs = bh.parts_to_trace(tiny, TINY_SHAPES, "padded")["text_decoder"]
    vocabulary = f"float32 {list(tiny.text_decoder.get_input_embeddings().weight.shape)}"
    assert [p.type for p in bh.lower_module(module, inputs).parameters].count(vocabulary) == 1


@needs_xla
@pytest.mark.parametrize("value", [0.0, 1.0, 3.0])
def test_a_number_is_an_input_and_no_constant(value):
    lowered = bh.lower_module(Apply(lambda self, x, scale: x * scale), (X, torch.tensor(value)))
    assert [p.kind for p in lowered.parameters].count("input") == 2 and not lowered.unused
    assert torch.equal(lowered.run(X, torch.tensor(7.0))[0], 7 * X)


@needs_xla
def test_state_is_shown_as_such_and_kept():
    module = Counter()
    lowered = bh.lower_module(module, X, input_output_aliases={module.total: 1})
    assert {p.name: p.kind for p in lowered.parameters if p.kind != "constant"} == {"x": "input", "total": "state"}
    assert [r.kind for r in lowered.results] == ["output", "state"]
    number = [p.kind for p in lowered.parameters].index("state")
    assert f"{{1}}: ({number}, {{}}, must-alias)" in lowered.text
    graph = bh.XlaGraph(lowered, [module.total])
    assert [graph(x)[0, 0].item() for x in (X, Y, X)] == [0.0, 1.0, 0.0]
    assert not module.total.any()


@needs_xla
def test_a_graph_runs_on_other_inputs_than_its_example(tiny):
    parts = bh.parts_to_trace(tiny, TINY_SHAPES, "cached")
    graphs = {}
    for name, (module, inputs) in parts.items():
        state = list(getattr(module, "state", []))
        aliases = {parameter: index for index, parameter in enumerate(state, 1)}
        graphs[name] = bh.XlaGraph(bh.lower_module(module, inputs, input_output_aliases=aliases), state)
    compiled = bh.NeuronBlipForQuestionAnswering(
        tiny.config, graphs, TINY_SHAPES, tiny.text_decoder.generation_config, bh.DecoderCachedGenerator
    )
    for seed, length in ((1, 4), (2, 9)):
        (question,), pixels = make_questions([length], seed), make_pixels(1, seed)
        limit = {"max_new_tokens": 7, "num_beams": 2}
        assert torch.equal(compiled.generate(question, pixels, **limit), tiny.generate(question, pixels, **limit))


@needs_xla
def test_the_process_ends_with_its_parent(tmp_path):
    code = """
import os, sys, torch, blip_helpers as bh
from inf2.lowering import xla_process
class Forever(torch.nn.Module):
    def forward(self, x):
        open(sys.path[0] + "/started", "w").close()
        while x.device.type == "xla":
            pass
        return x
sys.path.insert(0, sys.argv[1])
print(xla_process().process.pid, flush=True)
bh.lower_module(Forever(), torch.ones(2))
"""
    parent = start_python(code, tmp_path)
    pid = int(parent.stdout.readline())
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


@needs_xla
def test_a_module_that_cannot_be_pickled_says_so_and_others_stay():
    lowered = bh.lower_module(Apply(lambda self, x: x + 1), X)
    locked = Counter()
    locked.lock = threading.Lock()
    with pytest.raises(RuntimeError, match="the module cannot be pickled"):
        bh.lower_module(locked, X)
    assert torch.equal(lowered.run(X)[0], X + 1)


@needs_xla
def test_a_graph_of_a_process_that_ended_is_refused():
    lowered = bh.lower_module(Apply(lambda self, x: x + 1), X)
    xla_process().end()
    with pytest.raises(RuntimeError, match="lower the module again"):
        lowered.run(X)


@needs_xla
def test_a_graph_that_nobody_holds_is_released():
    lowered = bh.lower_module(Apply(lambda self, x: x + 1), X)
    key = lowered.key
    del lowered
    bh.lower_module(Apply(lambda self, x: x + 1), X)
    with pytest.raises(RuntimeError, match="lower the module again"):
        xla_process().call("run", key, (X,), ())


@needs_xla
@pytest.mark.parametrize("wrong", [X[:1], X.double(), X.T])
def test_a_lowered_graph_refuses_other_shapes_and_dtypes(wrong):
    lowered = bh.lower_module(Counter(), X)
    with pytest.raises(ValueError, match=r"this graph was traced for float32 \[2, 4\]"):
        lowered.run(wrong)


@needs_xla
@pytest.mark.parametrize("wrong", [(X[:1],), (X.double(),), (X, X), (1,)], ids=["shape", "dtype", "number", "type"])
def test_a_lowered_graph_refuses_other_state(wrong):
    module = Counter()
    lowered = bh.lower_module(module, X, input_output_aliases={module.total: 1})
    with pytest.raises(ValueError, match="traced for"):
        lowered.run(X, state=wrong)


@needs_xla
def test_a_graph_of_several_outputs_returns_them():
    module = Apply(lambda self, x: (x + 1, x * 2))
    assert all(map(torch.equal, bh.XlaGraph(bh.lower_module(module, X))(X), (X + 1, X * 2)))


def test_an_output_is_the_next_value_of_one_parameter():
    module = Counter()
    module.other = nn.Parameter(torch.zeros(2, 4))
    for take in (bh.trace_module, bh.lower_module):
        with pytest.raises(ValueError, match="names an output twice"):
            take(module, X, input_output_aliases={module.total: 1, module.other: 1})


def test_what_is_traced_is_not_lowered():
    with pytest.raises(ValueError, match="has been traced already"):
        bh.lower_module(torch.jit.trace(nn.Linear(4, 4), X), X)


@needs_xla
def test_an_alias_of_no_output_is_named():
    module = Counter()
    with pytest.raises(ValueError, match="names output 2; the module has 2"):
        bh.lower_module(module, X, input_output_aliases={module.total: 2})


@needs_xla
def test_an_interruption_ends_the_process():
    process = xla_process()
    with mock.patch.object(process, "connection") as connection, pytest.raises(KeyboardInterrupt):
        connection.recv_bytes.side_effect = KeyboardInterrupt
        bh.lower_module(Apply(lambda self, x: x + 1), X)
    assert process.process.poll() is not None
    assert torch.equal(bh.lower_module(Apply(lambda self, x: x + 1), X).outputs[0][0], X + 1)


@needs_xla
def test_the_proto_is_saved_and_the_text_names_no_file(tmp_path):
    lowered = bh.lower_module(Apply(lambda self, x: x + 1), X)
    lowered.save(tmp_path / "graph.pb")
    assert (tmp_path / "graph.pb").read_bytes() == lowered.proto
    assert lowered.text.startswith("HloModule") and str(ROOT) not in lowered.text
