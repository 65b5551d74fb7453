"""python -m inf2 check: the check for modules of anybody."""

import importlib.util
import subprocess
import sys

import pytest

needs_xla = pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="torch-xla is not installed")
FILE = """
import torch
from torch import nn


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.state = nn.ParameterList([nn.Parameter(torch.zeros(4), requires_grad=False)])

    def forward(self, x):
        return self.state[0] * 2, self.state[0] + x


def calls():
    return [(torch.randn(4),), (torch.randn(4),)]


def right():
    return {"line": (nn.Linear(4, 2), [torch.randn(4), torch.randn(4)]), "sum": (Sum(), calls())}


def sorts():
    class Best(nn.Module):
        def forward(self, x):
            return x.sort().values[-1]

    return {"best": (Best(), calls())}


def one():
    return {"line": (nn.Linear(4, 2), calls()[:1])}


def none():
    return {"line": (nn.Linear(4, 2), [])}


def number():
    return 3


def module():
    return {"line": nn.Linear(4, 2)}


def fails():
    raise RuntimeError("not today")
"""


@pytest.fixture
def check(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name")

    def run(function):
        command = [sys.executable, "-m", "inf2", "check", function]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return run


@needs_xla
def test_modules_of_anybody_are_checked(check):
    done = check("mine.py:right")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 graphs checked, 0 findings" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[1:3]] == ["line", "sum"]


@needs_xla
def test_a_finding_is_exit_status_1_and_names_the_place(check):
    done = check("mine.py:sorts")
    assert done.returncode == 1, done.stdout + done.stderr
    at = next(number for number, line in enumerate(FILE.splitlines(), 1) if "x.sort()" in line)
    assert f"FOUND best: sort is listed as unsupported at mine.py:{at}, `return x.sort().values[-1]`" in done.stdout


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("mine.py:one", "line: examples has 1: pass two or more"),
        ("mine.py:none", "line: examples has 0: pass two or more"),
        ("mine.py:number", "number() returned a int: return a dict of modules"),
        ("mine.py:module", "module() returned no pair for 'line'"),
        ("mine.py:fails", "fails() fails: RuntimeError: not today"),
        ("mine.py:absent", "mine.py has no function absent"),
        ("mine.py", "names no function: write FILE.py:FUNCTION"),
        ("absent.py:right", "absent.py does not exist"),
        ("broken.py:right", "broken.py cannot be imported: ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_checked_is_a_sentence_and_exit_status_2(check, function, message):
    done = check(function)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
