"""The small helpers that every notebook uses, and what importing the module does not do."""

import subprocess
import sys

import pytest
import torch
from conftest import TESTS, read_json, start_python
from torch import nn

from blip_helpers import (
    check_close,
    check_equal,
    default_backend,
    progress,
    question_count,
    refused,
    show_source,
    what_runs_here,
)

NAN, INF = float("nan"), float("inf")


def test_check_close_prints_the_bound_and_the_difference(capsys):
    check_close(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.00005]), 1e-4)
    output = capsys.readouterr().out
    assert output.startswith("OK  max |difference| < 1e-04  (measured 5.0e-05)")


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.2]),
        ([1.0, 2.0], [1.0, 1.8]),
        ([1.0, NAN], [1.0, 2.0]),
        ([1.0, 2.0], [NAN, 2.0]),
        ([NAN], [NAN]),
        ([INF], [1.0]),
        ([INF], [-INF]),
        ([1.0, 2.0], [1.0]),
        ([1.0], [[1.0]]),
    ],
)
def test_check_close_fails(actual, expected, capsys):
    with pytest.raises(AssertionError):
        check_close(torch.tensor(actual), torch.tensor(expected), 0.1)
    assert "OK" not in capsys.readouterr().out


def test_check_close_does_not_wrap_unsigned_numbers():
    with pytest.raises(AssertionError):
        check_close(torch.tensor([0], dtype=torch.uint8), torch.tensor([255], dtype=torch.uint8), 2)


def test_check_equal_counts(capsys):
    check_equal(["a", "b"], ["a", "b"])
    check_equal([[1, 2], [3]], [[1, 2], [3]], "rows")
    assert capsys.readouterr().out == "OK  2/2 answers equal\nOK  2/2 rows equal\n"


def test_check_equal_says_how_many_differ_and_where(capsys):
    with pytest.raises(AssertionError, match="2 of 3 answers differ, the first at 1"):
        check_equal([1, 2, 3], [1, 3, 4])
    assert "OK" not in capsys.readouterr().out


@pytest.mark.parametrize(("actual", "expected"), [([1], [1, 2]), ([1, 2], [1])])
def test_check_equal_fails_on_another_number(actual, expected):
    with pytest.raises((AssertionError, ValueError)):
        check_equal(actual, expected)


@pytest.mark.parametrize("count", [1, 7, 49, 50, 51, 1000])
def test_progress_yields_everything_and_prints_fifty_dots(count, capsys):
    assert list(progress(range(count))) == list(range(count))
    assert capsys.readouterr().out == "." * 50 + f" {count}\n"


def test_progress_takes_an_iterator_of_known_length(capsys):
    assert list(progress(iter("abc"), total=3)) == ["a", "b", "c"]
    assert capsys.readouterr().out == "." * 50 + " 3\n"


def test_progress_prints_on_the_way(capsys):
    items = progress(range(100))
    for _ in range(51):
        next(items)
    assert capsys.readouterr().out == "." * 25


class Shown(nn.Module):
    """Not shown."""

    kept = "this is shown"

    def forward(self, x):
        """Not shown either.

        In several lines.
        """
        return x  # shown as well

    def longer(self, x):
        "Not shown."
        text = """shown"""
        return text


def test_show_source_leaves_out_docstrings_only(capsys):
    show_source(Shown)
    shown = capsys.readouterr().out
    assert "ot shown" not in shown and "several lines" not in shown
    for line in (
        "class Shown(nn.Module):",
        '    kept = "this is shown"',
        "        return x  # shown as well",
        '        text = """shown"""',
    ):
        assert line in shown.splitlines()
    compile(shown, "shown", "exec")


def test_show_source_shows_a_method_without_its_indentation(capsys):
    show_source(Shown.forward)
    assert capsys.readouterr().out == "def forward(self, x):\n    return x  # shown as well\n"


def test_questions_are_counted_by_the_environment(monkeypatch):
    for name in ("QUESTIONS", "BLIP_MODEL", "RESNET_MODEL"):
        monkeypatch.delenv(name, raising=False)
    assert (question_count(), question_count(500)) == (1000, 500)
    monkeypatch.setenv("BLIP_MODEL", "elsewhere")
    assert question_count() == 20
    monkeypatch.setenv("QUESTIONS", "300")
    assert (question_count(), question_count(100)) == (300, 100)


def test_what_runs_here_says_so(monkeypatch):
    monkeypatch.setattr("inf2.tracing.importlib.util.find_spec", lambda name: None)
    assert (default_backend(), what_runs_here()) == ("cpu", "CPU stand-in for Neuron")
    monkeypatch.setattr("inf2.tracing.importlib.util.find_spec", lambda name: object())
    for version, words in (("2.9.0.2.15.32035", "AWS Neuron"), ("2.9.0+double", "test double of torch_neuronx")):
        monkeypatch.setattr("inf2.notebook.package_version", lambda name, version=version: version)
        assert (default_backend(), what_runs_here()) == ("neuron", words)


@pytest.fixture(scope="module")
def imported():
    """What `import blip_helpers` does in a fresh process that stands in the notebooks' folder."""
    code = """
import json, os, sys
events = []
def listen(event, arguments):
    if event.startswith("socket.") and event != "socket.__new__" or event in ("subprocess.Popen", "urllib.Request"):
        events.append(event)
    if event == "open" and str(arguments[0]).endswith((".safetensors", ".pt", ".bin", ".ipynb")):
        events.append(str(arguments[0]))
sys.addaudithook(listen)
import torch, transformers
def state():
    return [str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.get_num_threads(), torch.random.get_rng_state().tolist(), sorted(os.environ), sorted(os.listdir())]
before, own = state(), len(events)
import blip_helpers
models = [name for name, value in vars(blip_helpers).items() if isinstance(value, (torch.nn.Module, torch.Tensor))]
print(json.dumps({"events": events[own:], "same state": state() == before, "models": models}))
"""
    return read_json(start_python(code, cwd=TESTS.parent / "notebooks"))


def test_importing_opens_no_connection_and_no_weights(imported):
    assert imported["events"] == []


def test_importing_changes_nothing(imported):
    assert imported["same state"]


def test_importing_makes_no_model(imported):
    assert imported["models"] == []


@pytest.mark.parametrize("call", ["check_close(torch.zeros(2), torch.ones(2), 1e-4)", "check_equal([1], [2])"])
def test_a_comparison_fails_under_python_O_as_well(call):
    code = f"import torch; from inf2 import check_close, check_equal; {call}"
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "AssertionError" in done.stderr and "OK" not in done.stdout


@pytest.mark.parametrize(
    ("error", "printed"),
    [(ValueError("first\nsecond"), "ValueError: first\n"), (torch.jit.Error("first\nsecond"), "Error: second\n")],
)
def test_a_refusal_is_printed_with_its_sentence(error, printed, capsys):
    def fail(*inputs):
        raise error

    refused(fail, 1, 2)
    assert capsys.readouterr().out == printed


def test_what_is_not_refused_fails():
    with pytest.raises(AssertionError, match="nothing was refused"):
        refused(print)
