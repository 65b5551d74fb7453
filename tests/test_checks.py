"""The check: what would fail on Inf2 is named, what is right is not."""

import importlib
import importlib.util
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    Apply,
    Counter,
    X,
    Y,
    needs_xla,
    read_json,
    start_python,
)
from inf2.lowering import XlaProcess, xla_process
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import blip_helpers as bh


def findings(function, calls=((X,), (Y,))):
    return bh.check_module(Apply(function), list(calls)).findings


BETWEEN = (X.sum() + Y.sum()).item() / 2


def branch(self, x):
    return x if x.sum() > BETWEEN else -x


@needs_xla
@pytest.mark.parametrize("kind", ["padded", "cached", "unrolled"])
def test_every_graph_of_a_blip_is_clean(tiny, kind):
    shapes = bh.BlipShapes(batch_size=2, question_length=(4, 8), answer_length=6)
    parts = bh.parts_to_trace(tiny, shapes, kind)
    names = ["vision_model", "text_encoder_4", "text_encoder_8", "text_decoder"]
    if kind == "unrolled":  # the others are those of the cached decoder
        parts = {name: part for name, part in parts.items() if name not in names}
        names = ["unrolled_answer", "picture_answer"]
    checked = dict(bh.check_parts(parts, tiny.config.text_config.vocab_size))
    assert list(checked) == names
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


@needs_xla
@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda self, x: x[x > 0].sum(), ("aten::nonzero", "becomes a constant")),
        (lambda self, x: x.sort(dim=-1).values, ("sort is refused", "api-torch-neuronx-trace")),
        (lambda self, x: x.int().topk(2).values, ("integer sort is refused", "float32", "EVRF013")),
        (lambda self, x: x * float(x.max()), ("read in Python", "becomes a constant")),
        (branch, ("read in Python", "test_checks.py", "if x.sum() > BETWEEN")),
        (lambda self, x: x if x.cpu().sum() > BETWEEN else -x, ("read in Python", "becomes a constant")),
        (lambda self, x: x if sum(x.flatten().tolist()) > BETWEEN else -x, ("read in Python", "becomes a constant")),
        (lambda self, x: x + self.weight.add_(1).sum(), ("weight weight is written in forward", "lost")),
        (lambda self, x: x + self.weight[0].copy_(x[0]).sum(), ("weight weight is written in forward", "lost")),
        (lambda self, x: x * torch.ones(2, 4, dtype=torch.float64, device=x.device), ("float64 is no type",)),
        (lambda self, x: x.double().sum().float(), ("float64 is no type", "data-types")),
        (lambda self, x: x + F.interpolate(self.weight, (6, 6), mode="bicubic").sum(), ("upsample_bicubic2d",)),
        (
            lambda self, x: torch.where(x > 0, x, torch.zeros(4)),
            ("cannot be lowered", "Expected XLA tensor", "on an input's device"),
        ),
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
    assert "sort is listed as unsupported" in found
    changing.Best.forward = lambda self, x: x + 1
    (found,) = bh.check_module(changing.Best(), [(X,), (Y,)]).findings
    assert "another in this process than in its file" in found


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
    assert "sort is listed as unsupported at script.py:5, `best = x.sort().values`" in found


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
