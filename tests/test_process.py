"""What a process is set to gets into no graph; processes, threads and forks do not get in each other's way."""

import contextlib
import json
import multiprocessing
import os
import threading
import time

import pytest
import torch
from conftest import (
    TINY_SHAPES,
    X,
    answer_eagerly,
    cut,
    make_pixels,
    make_questions,
    needs_xla,
    pad,
    start_python,
)
from inf2 import ImitatedAutoCast, check_module, clean_state, count_cost, lower_module, trace_module
from inf2.process import one_writer
from torch import nn

from blip_helpers import NeuronBlipForQuestionAnswering, trace


class Multiplies(nn.Module):
    """Products, and numbers that are made in forward, in the default dtype and on the default device."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 4, generator=generator, dtype=torch.float32, device="cpu"))

    def forward(self, x):
        return x @ self.weight + torch.tensor([0.1, 0.2, 0.3, 0.4]) + torch.linspace(0, 1, 4)


@contextlib.contextmanager
def products_in(precision):
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


STATES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "another default dtype": lambda: default_dtype(torch.float64),
    "half by default": lambda: default_dtype(torch.bfloat16),
    "another default device": lambda: torch.device("meta"),
    "gradients": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "rounded products": lambda: products_in("bf16"),
}
WANTED = Multiplies()(X).detach()


def in_state(state, call):
    with STATES[state]():
        result = call()
    assert torch.get_default_dtype() == torch.float32 and not torch.is_autocast_enabled("cpu")
    return result


@pytest.mark.parametrize("state", STATES)
def test_a_trace_is_that_of_a_clean_process(state):
    traced = in_state(state, lambda: trace_module(Multiplies(), X, backend="cpu"))
    assert torch.equal(traced(X), WANTED)


@pytest.mark.parametrize("state", STATES)
def test_a_state_is_left_as_it_was(state):
    with STATES[state]():
        before = state_of_process()
        with clean_state():
            assert state_of_process()[:4] == (torch.float32, "cpu", False, False)
        assert state_of_process() == before


def state_of_process():
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.backends.mkldnn.matmul.fp32_precision
    return torch.get_default_dtype(), torch.get_default_device().type, torch.is_autocast_enabled("cpu"), *modes


@needs_xla
@pytest.mark.parametrize("state", STATES)
def test_a_graph_is_lowered_and_checked_in_a_clean_process(state):
    lowered = in_state(state, lambda: lower_module(Multiplies(), X))
    assert [result.type for result in lowered.results] == ["float32 [2, 4]"]
    assert "bf16" not in lowered.text and "f64[2" not in lowered.text
    checked = in_state(state, lambda: check_module(Multiplies(), [X, X + 1]))
    assert checked.findings == ()


@pytest.mark.parametrize("state", ["autocast", "another default dtype"])
def test_a_whole_model_is_traced_in_a_clean_process(tmp_path, tiny, state):
    compiled = in_state(state, lambda: trace(tiny, tmp_path, TINY_SHAPES))
    assert answers(compiled) == EAGER(tiny)


def test_autocast_does_not_change_what_was_compiled(compiled, tiny):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert answers(compiled) == EAGER(tiny)


def test_a_mode_that_would_get_into_the_graph_is_refused():
    with (
        ImitatedAutoCast("--auto-cast all --auto-cast-type bf16"),
        pytest.raises(RuntimeError, match="ImitatedAutoCast"),
    ):
        trace_module(Multiplies(), X, backend="cpu")


def test_cost_is_that_of_a_clean_process():
    wanted = count_cost(Multiplies(), (X,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert count_cost(Multiplies(), (X,)) == wanted


QUESTIONS, PIXELS = make_questions([3, 10, 7]), make_pixels(3)


def answers(compiled):
    ids, mask = pad(QUESTIONS)
    return cut(compiled.generate(ids, PIXELS, mask, max_new_tokens=7))


def EAGER(model):
    return cut(answer_eagerly(model, QUESTIONS, PIXELS, max_new_tokens=7))


# Processes and threads that use one model


def in_fork(call, seconds=60):
    """What a call returns, or raises as text, in a process that is forked from this one."""
    ours, theirs = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:
        try:
            theirs.send(json.dumps(call()))
        except BaseException as error:
            theirs.send(json.dumps(f"{type(error).__name__}: {error}"))
        os._exit(0)
    try:
        assert ours.poll(seconds), "the forked process never answers"
        return json.loads(ours.recv())
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_fork_of_a_model_with_state_is_refused(tiny, traced_directory):
    compiled = NeuronBlipForQuestionAnswering.from_pretrained(traced_directory)
    compiled.share_memory()
    said = in_fork(lambda: answers(compiled))
    assert said.startswith(f"RuntimeError: this model keeps state, which belongs to process {os.getpid()}")
    assert answers(compiled) == EAGER(tiny)


def test_a_fork_loads_a_model_of_its_own(tiny, traced_directory):
    NeuronBlipForQuestionAnswering.from_pretrained(traced_directory)
    said = in_fork(lambda: answers(NeuronBlipForQuestionAnswering.from_pretrained(traced_directory)))
    assert said == EAGER(tiny)


def test_a_fork_of_a_padded_model_goes_on(tiny, tmp_path):
    compiled = trace(tiny, tmp_path, TINY_SHAPES, decoder="padded")
    assert in_fork(lambda: answers(compiled)) == EAGER(tiny)


def test_a_fork_while_a_thread_answers_does_not_wait_for_it(traced_directory):
    compiled = NeuronBlipForQuestionAnswering.from_pretrained(traced_directory)
    inside, leave = threading.Event(), threading.Event()

    def wait(row, so_far):
        inside.set()
        leave.wait(60)
        return [0]

    ids, mask = pad(QUESTIONS)
    thread = threading.Thread(
        target=compiled.generate, args=(ids, PIXELS, mask), kwargs={"prefix_allowed_tokens_fn": wait}
    )
    thread.start()
    try:
        assert inside.wait(60)
        assert in_fork(lambda: answers(compiled)).startswith("RuntimeError: this model keeps state")
    finally:
        leave.set()
        thread.join()


def test_a_graph_with_state_is_refused_in_a_fork_by_itself(traced_directory):
    graph = NeuronBlipForQuestionAnswering.from_pretrained(traced_directory).text_decoder.decoder.decoder
    inputs = torch.zeros(6, 1, dtype=torch.long), torch.tensor([0]), torch.arange(6)
    assert "keeps state" in in_fork(lambda: graph(*inputs).tolist())


def test_a_fork_while_a_thread_traces_traces_as_well():
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with clean_state():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert inside.wait(60)
        assert in_fork(lambda: trace_module(Multiplies(), X, backend="cpu")(X).tolist()) == WANTED.tolist()
    finally:
        leave.set()
        thread.join()


@needs_xla
def test_a_fork_lowers_in_a_child_of_its_own():
    lower_module(Multiplies(), X)
    said = in_fork(lambda: lower_module(Multiplies(), X).outputs[0][0].tolist(), seconds=120)
    torch.testing.assert_close(torch.tensor(said), WANTED)
    torch.testing.assert_close(lower_module(Multiplies(), X).outputs[0][0], WANTED)


def test_threads_that_trace_one_model_take_turns(tiny, tmp_path):
    failed = []

    def run(number):
        try:
            trace(tiny, tmp_path / str(number), TINY_SHAPES, decoder=["cached", "padded"][number % 2])
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for number in range(4):
        assert answers(NeuronBlipForQuestionAnswering.from_pretrained(tmp_path / str(number))) == EAGER(tiny)


TRACES = """
import sys
from conftest import TINY_SHAPES, make_tiny_blip
from blip_helpers import trace
trace(make_tiny_blip(), sys.argv[1], TINY_SHAPES)
"""


def test_processes_that_trace_into_one_directory_share_the_work(tiny, tmp_path):
    processes = [start_python(TRACES, tmp_path) for _ in range(3)]
    said = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert sum(output.count("traced:") for output, _ in said) == 3
    assert sum(output.count("kept") for output, _ in said) == 6
    assert answers(NeuronBlipForQuestionAnswering.from_pretrained(tmp_path)) == EAGER(tiny)
    assert {path.name for path in tmp_path.iterdir()} == {
        "manifest.json",
        *(f"{part}.pt" for part in ("vision_model", "text_encoder", "text_decoder")),
    }


def test_threads_that_trace_into_one_directory_share_the_work(tiny, tmp_path, capsys):
    threads = [threading.Thread(target=trace, args=(tiny, tmp_path, TINY_SHAPES)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = capsys.readouterr().out
    assert (said.count("traced:"), said.count("kept")) == (3, 6)


HOLDS = """
import sys, time
from inf2.process import one_writer
with one_writer(sys.argv[1]):
    print("holding", flush=True)
    time.sleep(600)
"""


def test_a_killed_writer_leaves_no_lock(tmp_path):
    process = start_python(HOLDS, tmp_path)
    assert process.stdout.readline().strip() == "holding"
    process.kill()
    process.communicate()
    start = time.monotonic()
    with one_writer(tmp_path):
        assert time.monotonic() - start < 5


def test_a_writer_waits_for_another_and_says_so(tmp_path, capsys):
    waited, first = threading.Event(), threading.Event()

    def second():
        first.wait(60)
        with one_writer(tmp_path):
            waited.set()

    thread = threading.Thread(target=second)
    thread.start()
    with one_writer(tmp_path), one_writer(tmp_path):  # which a function inside another may ask for again
        first.set()
        assert not waited.wait(0.5)
    thread.join()
    assert waited.is_set()
    assert capsys.readouterr().out == f"{tmp_path} is being written to: waiting for its writer\n"
