"""The benchmarks run; what they measure decides no test."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def refusal_of(name, arguments, monkeypatch, capsys):
    """What a benchmark says of arguments that it does not take."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(name).read_arguments()
    return capsys.readouterr().err


def compare(*arguments):
    command = [sys.executable, ROOT / "benchmarks" / "compare.py", "--model", "tiny", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_the_benchmark_prints_and_writes_every_contestant():
    done = compare("--dtypes", "fp32", "--rounds", "7", "--work", "step,one", "--answer-length", "6")
    assert done.returncode == 0, done.stderr
    written = json.loads((ROOT / "build" / "benchmark" / "tiny-6.json").read_text())
    names = [row["name"] for row in written["rows"]]
    ours = ["padded fp32", "the article's fp32", "cached fp32"]
    assert names == ["HF eager fp32, its cache", *ours, "HF eager fp32", *ours, "unrolled fp32"]
    assert {row["answers that differ"] for row in written["rows"] if "answers that differ" in row} == {0}
    assert all(name in done.stdout for name in names) and written["machine"]["torch"] in done.stdout
    assert (ROOT / "build" / "benchmark" / "tiny-6.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "3"], "--rounds is 3"),
        (["--dtypes", "fp16"], "--dtypes is fp16"),
        (["--work", "two"], "--work is two"),
        (["--decoders", "beam"], "--decoders is beam"),
        (["--answer-length", "4"], "--answer-length is 4: these decoders need 5"),
        (["--answer-length", "3", "--decoders", "cached"], "--answer-length is 3: these decoders need 4"),
    ],
)
def test_bad_arguments_are_named(arguments, message, monkeypatch, capsys):
    assert message in refusal_of("compare", arguments, monkeypatch, capsys)


def host(*arguments):
    command = [sys.executable, ROOT / "benchmarks" / "host.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_the_time_of_the_host_is_split():
    done = host("--rounds", "3", "--pictures", "640x480", "--questions", "1")
    assert done.returncode == 0, done.stderr
    written = json.loads((ROOT / "build" / "benchmark" / "host.json").read_text())
    whole = [row for row in written["rows"] if "whole" in row]
    assert {row["as"] for row in whole} == {"decoded", "JPEG"}
    assert {"Hugging Face", "cached, new", "cached, seen"} <= {row["name"] for row in whole}
    for row in whole:
        assert row["name"] in done.stdout
        parts = sum(row[part] for part in ("picture", "tokenizer", "generate", "rest"))
        assert abs(parts - row["whole"]) < 1e-6 and row["picture, CPU"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "2"], "--rounds is 2"),
        (["--pictures", "1x1"], "--pictures is 1x1"),
        (["--questions", "2"], "--questions is 2"),
    ],
)
def test_bad_arguments_of_the_host_are_named(arguments, message, monkeypatch, capsys):
    assert message in refusal_of("host", arguments, monkeypatch, capsys)
