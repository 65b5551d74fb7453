"""What notebook 06 teaches: lowering through torch-xla, the check, imitated rounding, cost; and the command blip.py."""

import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import TESTS, TINY_SHAPES, make_pixels, make_questions, make_tiny_blip, read_json, start_python
from hypothesis import given
from hypothesis import strategies as st
from inf2.lowering import XlaProcess, xla_process
from torch import nn
from transformers import BertConfig, BlipForImageTextRetrieval, ResNetConfig, ResNetForImageClassification

import blip_helpers as bh

ROOT = TESTS.parent
needs_xla = pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="torch-xla is not installed")
X = torch.tensor([[0.5, -1.0, 2.0, -0.25], [1.5, 3.0, -2.0, 0.75]])
Y = torch.tensor([[-0.5, 1.0, -3.0, 1.25], [2.5, -1.0, 0.5, -0.75]])


class Apply(nn.Module):
    """A function as a module, with a matrix of its own."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(1, 2, 4, 4), requires_grad=False)

    def forward(self, x, *more):
        return self.function(self, x, *more)


def findings(function, calls=((X,), (Y,))):
    return bh.check_module(Apply(function), list(calls)).findings


def branch(self, x):
    return x if x.sum() > -100 else -x


@needs_xla
@pytest.mark.parametrize("kind", ["padded", "cached", "greedy"])
def test_every_graph_of_a_blip_is_clean(tiny, kind):
    shapes = bh.BlipShapes(batch_size=2, question_length=(4, 8), answer_length=6)
    parts = bh.parts_to_trace(tiny, shapes, kind)
    checked = dict(bh.check_parts(parts, tiny.config.text_config.vocab_size))
    assert list(checked) == ["vision_model", "text_encoder_4", "text_encoder_8", "text_decoder"]
    for name, result in checked.items():
        assert result.findings == () and result.difference < 1e-5, name
        lowered = result.lowered
        inputs = {p.name: p.type for p in lowered.parameters if p.kind == "input"}
        assert inputs == bh.describe_inputs(*parts[name])
        assert len(set(lowered.fingerprints)) == 1 and len(lowered.fingerprints) == 4
        assert [p.kind for p in lowered.results].count("output") == 1


@needs_xla
def test_a_resnet_is_clean_without_what_nothing_uses():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    module = bh.Logits(ResNetForImageClassification(config).eval())
    result = bh.check_module(module, [(torch.zeros(1, 3, 32, 32),), (torch.randn(1, 3, 32, 32),)])
    assert result.findings == ()
    assert "while" not in result.lowered.operators  # a max pooling also computes indices, in a loop
    assert " while(" not in result.lowered.text


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
def test_a_number_is_on_the_device_before_its_graph_is_recorded():
    # A thousand times, because what is seen too early depends on which thread is first.
    module, example = Apply(lambda self, x, scale: x * scale), (X, torch.tensor(1.0))
    assert bh.check_module(module, [example] * 1000).findings == ()


@needs_xla
def test_equal_numbers_are_not_one_input():
    two, three, five = torch.tensor(2.0), torch.tensor(3.0), torch.tensor(5.0)
    module = Apply(lambda self, x, y: x * 10 + y * 2)
    assert bh.lower_module(module, (two, two)).run(three, five)[0] == 40
    assert bh.check_module(module, [(two, two), (three, three), (five, two)]).findings == ()


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.total = nn.Parameter(torch.zeros(2, 4), requires_grad=False)

    def forward(self, x):
        return self.total * 2, self.total + x


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
@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda self, x: x[x > 0].sum(), ("aten::nonzero", "becomes a constant")),
        (lambda self, x: x.sort(dim=-1).values, ("sort is refused", "api-torch-neuronx-trace")),
        (lambda self, x: x.int().topk(2).values, ("sort is refused", "api-torch-neuronx-trace")),
        (lambda self, x: x * float(x.max()), ("read in Python", "becomes a constant")),
        (branch, ("read in Python", "test_check.py", "if x.sum() > -100")),
        (lambda self, x: x if x.cpu().sum() > -100 else -x, ("read in Python", "becomes a constant")),
        (lambda self, x: x if sum(x.flatten().tolist()) > -100 else -x, ("read in Python", "becomes a constant")),
        (lambda self, x: x + self.weight.add_(1).sum(), ("weight weight is written in forward", "lost")),
        (lambda self, x: x + self.weight[0].copy_(x[0]).sum(), ("weight weight is written in forward", "lost")),
        (lambda self, x: x * torch.ones(2, 4, dtype=torch.float64, device=x.device), ("float64 is no type",)),
        (lambda self, x: x.double().sum().float(), ("float64 is no type", "data-types")),
        (lambda self, x: x + F.interpolate(self.weight, (6, 6), mode="bicubic").sum(), ("upsample_bicubic2d",)),
        (lambda self, x: torch.where(x > 0, x, torch.zeros(4)), ("cannot be lowered", "Expected XLA tensor")),
        (lambda self, x: torch.zeros(2), ("result 0", "computed on the host")),
    ],
    ids=[
        "nonzero",
        "sort",
        "topk",
        "item",
        "branch",
        "cpu copy",
        "list",
        "written",
        "written view",
        "float64 tensor",
        "float64",
        "bicubic",
        "cpu",
        "host",
    ],
)
def test_what_fails_is_named(function, words):
    assert any(all(word in finding for word in words) for finding in findings(function)), findings(function)


@needs_xla
@pytest.mark.parametrize(
    ("function", "operator", "page"),
    [
        (lambda self, x: torch.erf(x), "erf", "issues/1081"),
        (lambda self, x: x.topk(2).values, "topk", "EVRF013"),
        (lambda self, x: x.argmax(dim=-1), "variadic reduce", "jax-neuronx-known-issues"),
        (lambda self, x: torch.linalg.svdvals(x), "while", "jax-neuronx-known-issues"),
        (lambda self, x: x.masked_fill(x > 0, -1e9), "float64 number", "data-types"),
    ],
    ids=["erf", "topk", "argmax", "while", "float64"],
)
def test_what_may_be_refused_is_a_note(function, operator, page):
    checked = bh.check_module(Apply(function), [(X,), (Y,)])
    (note,) = (note for note in checked.notes if note.startswith(operator))
    assert page in note and not any(finding.startswith(operator) for finding in checked.findings)


@needs_xla
@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x + torch.tensor(x.sum().item(), device=x.device),  # in the HLO
        lambda self, x: x * float(x.max()),  # among its parameters
    ],
)
def test_a_value_in_the_graph_shows_in_the_second_example(function):
    found = findings(function)
    assert any("example 2 gives another graph" in finding for finding in found)
    assert any("differ from eager" in finding and "example 2" in finding for finding in found)


def written(self, x):
    x += 1
    return x * 2


@needs_xla
@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: torch.where(x > 0, -torch.inf, x),
        lambda self, x: x**0.5,  # NaN, of negative numbers
        lambda self, x: x[:, 4:],
        written,
    ],
    ids=["infinity", "nan", "empty", "input"],
)
def test_what_is_right_has_no_finding(function):
    inputs = X.clone(), Y.clone()
    assert findings(function, [(inputs[0],), (inputs[1],)]) == ()
    assert torch.equal(inputs[0], X) and torch.equal(inputs[1], Y)


@needs_xla
@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("device", ["xla", "cpu"])
def test_what_is_not_finite_on_one_side_alone_is_named(device, value):
    (found,) = findings(lambda self, x: torch.where(x > 0, value if x.device.type == device else 0.0, x))
    assert "differ from eager by inf" in found


@needs_xla
def test_what_eager_refuses_is_a_finding():
    table = nn.Embedding(4, 3)
    found = bh.check_module(table, [(torch.tensor([1]),), (torch.tensor([4]),)]).findings
    assert len(found) == 1 and found[0].startswith("eager fails on example 2: IndexError")


@needs_xla
def test_an_unused_input_is_named():
    (found,) = findings(lambda self, x, unused: x + 1, [(X, Y), (Y, X)])
    assert found.startswith("input number 1 is in no result")


class Overwritten(Counter):
    def forward(self, x):
        return x * 2, x + 1


@needs_xla
def test_state_that_is_never_read_is_named():
    module = Overwritten()
    (found,) = bh.check_module(module, [(X,), (Y,)], input_output_aliases={module.total: 1}).findings
    assert found.startswith("state total is in no result")


@needs_xla
def test_a_weight_that_is_there_twice_is_named():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = nn.Parameter(module[0].weight.detach().clone())
    (found,) = bh.check_module(module, [(X,), (Y,)]).findings
    assert "0.weight" in found and "1.weight" in found and "twice" in found
    module[1].weight = module[0].weight
    assert bh.check_module(module, [(X,), (Y,)]).findings == ()


@needs_xla
def test_results_that_differ_from_eager_are_named():
    (found,) = findings(lambda self, x: x + (1e-3 if x.device.type == "xla" else 0.0))
    assert "differ from eager" in found


@needs_xla
def test_a_module_that_ends_the_process_is_named_and_the_next_one_is_checked():
    (found,) = findings(lambda self, x: os.abort() if x.device.type == "xla" else x)
    assert "cannot be lowered: it ended the process with status -6" in found
    assert findings(lambda self, x: x + 1) == ()


@needs_xla
def test_a_process_that_was_ended_by_others_is_no_finding():
    process = xla_process().process
    process.kill()
    process.wait()
    assert findings(lambda self, x: x + 1) == ()


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
def test_a_module_of_python_that_changed_is_checked_as_it_is_now(tmp_path, monkeypatch):
    path = tmp_path / "changing.py"
    source = "import torch\nclass Best(torch.nn.Module):\n    def forward(self, x):\n        return x.{}\n"
    path.write_text(source.format("amax(-1)"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    changing = importlib.import_module("changing")
    assert bh.check_module(changing.Best(), [(X,), (Y,)]).findings == ()
    path.write_text(source.format("sort(-1).values[:, -1]"))
    importlib.reload(changing)
    (found,) = bh.check_module(changing.Best(), [(X,), (Y,)]).findings
    assert "sort is refused" in found
    changing.Best.forward = lambda self, x: x + 1
    (found,) = bh.check_module(changing.Best(), [(X,), (Y,)]).findings
    assert "another in this process than in its file" in found


@needs_xla
def test_files_of_the_working_directory_are_not_imported(tmp_path):
    (tmp_path / "random.py").write_text("raise RuntimeError('not this one')")
    done = subprocess.run(
        [sys.executable, ROOT / "blip.py", "check", bh.MODELS / "tiny-resnet"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_xla
def test_a_module_that_cannot_be_pickled_says_so_and_others_stay():
    lowered = bh.lower_module(Apply(lambda self, x: x + 1), X)
    locked = Counter()
    locked.lock = threading.Lock()
    for module in (locked, nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))):
        with pytest.raises(RuntimeError, match="the module cannot be pickled"):
            bh.lower_module(module, X)
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


@pytest.mark.parametrize("what", ["traced", "lowered"])
def test_a_full_disk_is_an_error_and_leaves_nothing(what, tmp_path):
    code = """
import resource, signal, sys, unittest.mock, torch, blip_helpers as bh
traced = bh.trace_module(torch.nn.Linear(100, 100), torch.ones(1, 100), backend="cpu")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    if sys.argv[2] == "traced":
        bh.save_traced(traced, sys.argv[1])
    else:
        bh.Lowered.save(unittest.mock.Mock(proto=bytes(10000)), sys.argv[1])
except OSError:
    print("true")
"""
    assert read_json(start_python(code, tmp_path / "graph", what)) is True
    assert list(tmp_path.iterdir()) == []


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
def test_a_class_of_a_script_is_lowered_and_its_line_is_named(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        """
import json, torch, blip_helpers
class Script(torch.nn.Module):
    def forward(self, x):
        best = x.sort().values
        return best + 1
print(json.dumps(blip_helpers.check_module(Script(), [(torch.randn(3),), (torch.randn(3),)]).findings))
"""
    )
    (found,) = read_json(start_python(f"exec(compile(open({str(script)!r}).read(), {str(script)!r}, 'exec'))"))
    assert "sort is refused by neuronx-cc at Script.forward, `best = x.sort().values`" in found


@needs_xla
def test_the_proto_is_saved_and_the_text_names_no_file(tmp_path):
    lowered = bh.lower_module(Apply(lambda self, x: x + 1), X)
    lowered.save(tmp_path / "graph.pb")
    assert (tmp_path / "graph.pb").read_bytes() == lowered.proto
    assert lowered.text.startswith("HloModule") and str(ROOT) not in lowered.text


def test_without_torch_xla_it_says_so(monkeypatch):
    monkeypatch.setattr("inf2.lowering.importlib.util.find_spec", lambda name: None)
    for module in ("lowering", "checks"):
        monkeypatch.setattr(f"inf2.{module}.xla_process", XlaProcess)
    for call in (lambda: bh.lower_module(Counter(), X), lambda: bh.check_module(Counter(), [X, Y])):
        with pytest.raises(RuntimeError, match=r"torch-xla is not installed.*Linux on x86-64"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bh.lower_module(lambda x: x, X), "module is a function"),
        (lambda: bh.lower_module(Counter(), (X, 1)), "only tensors cross"),
        (lambda: bh.lower_module(Counter(), X, input_output_aliases={X: 1}), "maps Parameters of the module"),
        (lambda: bh.check_module(Counter(), [(X,)]), "pass two or more"),
        (lambda: bh.check_module(Counter(), [(X,), (X[:1],)]), r"this graph was traced for float32 \[2, 4\]"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


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
    assert bh.count_flops(attention, (torch.randn(1, 2, 5, 8),)) == 2 * (2 * 2 * 5 * 5 * 8)
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


def inf2(*arguments, **environment):
    command = [sys.executable, ROOT / "blip.py", *map(str, arguments)]
    # Notebooks, CI and users may have set these.
    clean = {k: v for k, v in os.environ.items() if k not in ("BLIP_MODEL", "RESNET_MODEL", "QUESTIONS")}
    return subprocess.run(
        command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, processor):
    directory = tmp_path_factory.mktemp("checkpoint")
    make_tiny_blip().save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@needs_xla
def test_the_command_checks_every_graph(checkpoint):
    done = inf2("check", checkpoint, "--question-length", 4, 8)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 graphs checked, 0 findings" in done.stdout
    assert all(name in done.stdout for name in ("vision_model", "padded text_encoder_4", "greedy text_decoder"))


@needs_xla
def test_the_command_fails_on_a_finding(tmp_path, processor):
    model = make_tiny_blip(tie_word_embeddings=False)
    model.config.tie_word_embeddings = False
    head = model.text_decoder.cls.predictions.decoder
    head.weight = nn.Parameter(model.text_decoder.get_input_embeddings().weight.detach().clone())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    done = inf2("check", tmp_path, "--decoders", "padded")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FOUND padded text_decoder" in done.stdout and "1 findings" in done.stdout


def test_the_command_names_another_kind_of_model(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    done = inf2("check", tmp_path)
    assert done.returncode == 2 and "is a bert; this series compiles blip and resnet" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_names_another_head(tmp_path, processor):
    BlipForImageTextRetrieval(make_tiny_blip().config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for arguments in (("check", tmp_path), ("compile", tmp_path / "artifact", "--model", tmp_path)):
        done = inf2(*arguments)
        assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
        assert "is a BlipForImageTextRetrieval: pass a BlipForQuestionAnswering" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "/nowhere/at/all"), "/nowhere/at/all does not exist"),
        (("check", "--answer-length", 65), "longer than the 64 positions"),
        (("check", "--batch-size", 0), "batch_size"),
        (("report", "somewhere", "--questions", 0), "--questions is 0"),
        (("report", "somewhere", "--model", bh.MODELS / "tiny-resnet"), "is a ResNetForImageClassification"),
        (("check", "tests"), "tests"),
    ],
)
def test_a_mistake_is_a_sentence_and_exit_status_2(arguments, message):
    done = inf2(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_damaged_weights_are_a_sentence(checkpoint, tmp_path):
    damaged = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes(b"{}")
    done = inf2("check", damaged)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_an_interrupted_import_is_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = inf2("check", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")


@needs_xla
def test_an_interrupted_check_says_so():
    command = [sys.executable, "-u", ROOT / "blip.py", "check", bh.MODELS / "tiny-blip-vqa"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.endswith("interrupted\n") and "Traceback" not in errors


def test_the_command_needs_awss_packages_to_compile(checkpoint, tmp_path):
    done = inf2("compile", tmp_path / "artifact", "--model", checkpoint)
    assert done.returncode == 2 and "torch_neuronx is not installed" in done.stderr


def test_compiled_without_a_device_and_kept_where_there_is_one(checkpoint, tmp_path):
    """Through the double of torch_neuronx: the rules of cpu_backend, and that the artifact is taken as it is."""
    log, double = tmp_path / "log", {"PYTHONPATH": f"{TESTS / 'double'}{os.pathsep}{ROOT}"}
    shapes = ("--question-length", 8, "--answer-length", 6)
    done = inf2(
        *("compile", tmp_path / "artifact", "--model", checkpoint, *shapes),
        **double | {"TORCH_NEURONX_DOUBLE_DEVICE": "0", "TORCH_NEURONX_DOUBLE_LOG": str(log)},
    )
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(calls) == 3 and all(call["cpu_backend"] for call in calls)
    assert all(call["compiler_args"][-2:] == ["--target", "inf2"] for call in calls)
    code = f"""
import torch, blip_helpers as bh
model, _ = bh.load_blip({str(checkpoint)!r})
bh.trace(model, {str(tmp_path / "artifact")!r}, bh.BlipShapes(question_length=8, answer_length=6))
"""
    kept = subprocess.run([sys.executable, "-c", code], env=os.environ | double, capture_output=True, text=True)
    assert kept.returncode == 0, kept.stderr
    assert [line.split() for line in kept.stdout.splitlines()] == [
        ["vision_model", "kept"],
        ["text_encoder", "kept"],
        ["text_decoder", "kept"],
    ]


def test_the_report_is_a_table_of_what_came_out(tmp_path):
    model, _ = bh.load_blip(bh.MODELS / "tiny-blip-vqa")
    shapes = bh.BlipShapes(batch_size=4, question_length=(8, 16))
    bh.trace(model, tmp_path / "artifact", shapes, backend="cpu")
    done = inf2("report", tmp_path / "artifact", "--questions", 8)
    assert done.returncode == 0, done.stderr
    for row in (
        "| ran on | CPU stand-in for Neuron |",
        "| answers equal to eager | 8 of 8 |",
        "| vision_model, a call |",
        "| text_encoder_8, a call |",
        "| text_encoder_16, a call |",
        "| text_decoder, a call |",
    ):
        assert row in done.stdout


def test_the_report_is_of_the_model_that_was_traced(traced_directory):
    done = inf2("report", traced_directory)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "traced from other weights" in done.stderr and "--model" in done.stderr


def test_the_report_of_no_artifact_says_so(tmp_path):
    done = inf2("report", tmp_path)
    assert done.returncode == 2 and "no manifest.json" in done.stderr and "Traceback" not in done.stderr
