"""What every notebook uses: compare and say so, refuse and say why, wait, show a source, name what ran."""

import ast
import inspect
import textwrap
import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="IProgress")  # without ipywidgets, tqdm says so in every notebook
    import tqdm.auto  # noqa: F401

import torch
from inf2.tracing import known_backend, package_version


def what_runs_here(backend=None):
    """What a backend's graphs ran on, in words: by default the compiled cells of a notebook."""
    backend = known_backend(backend)
    if backend != "neuron":
        return {"cpu": "CPU stand-in for Neuron", "openvino": "OpenVINO on the CPU"}[backend]
    # The tests bring a torch_neuronx of their own, which must never pass for AWS's.
    return "test double of torch_neuronx" if "double" in package_version("torch-neuronx") else "AWS Neuron"


def check_close(actual, expected, bound):
    """Print that two tensors of one shape differ by less than `bound` everywhere, and how far they do.

    Raises
    ------
    AssertionError
        If they do not.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {list(actual.shape)} and {list(expected.shape)}")
    worst = (actual.double() - expected.double()).abs().max().item()
    if not worst < bound:
        raise AssertionError(f"max |difference| is {worst:.1e}, the bound is {bound:.0e}")
    print(f"OK  max |difference| < {bound:.0e}  (measured {worst:.1e})")


def check_equal(actual, expected, what="answers"):
    """Print that two sequences of token ids or strings are equal, item by item, and how many were compared.

    Raises
    ------
    AssertionError
        If they are not.
    """
    actual, expected = list(actual), list(expected)
    different = [i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b]
    if different:
        raise AssertionError(f"{len(different)} of {len(actual)} {what} differ, the first at {different[0]}")
    print(f"OK  {len(actual)}/{len(actual)} {what} equal")


def refused(call, *inputs, sentence=0):
    """Make a call that has to fail, and print its kind of error with one sentence of the message.

    It stands in the message's first line; of an error inside TorchScript in the last, which is what was raised there.
    An `AssertionError` where nothing was refused.
    """
    try:
        call(*inputs)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        line = lines[-1] if isinstance(error, torch.jit.Error) else lines[0]
        # Wrapped here, since a narrow page would break a long line inside a word.
        text = f"{type(error).__name__}: {line.split('. ')[sentence]}"
        print(textwrap.fill(text, 100, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False))
    else:
        raise AssertionError("nothing was refused")


def progress(items, total=None):
    """Yield `items` and print a dot for every fiftieth of them, so that each run leaves the same line."""
    total = len(items) if total is None else total
    for i, item in enumerate(items, 1):
        yield item
        print("." * (i * 50 // total - (i - 1) * 50 // total), end="", flush=True)
    print(f" {total}")


def show_source(thing):
    """Print the source of a class or function, without its docstrings."""
    lines = textwrap.dedent(inspect.getsource(thing)).splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            lines[node.body[0].lineno - 1 : node.body[0].end_lineno] = [None] * (
                node.body[0].end_lineno - node.body[0].lineno + 1
            )
    text = "\n".join(line for line in lines if line is not None)
    while "\n\n\n" in text or ":\n\n" in text:
        text = text.replace("\n\n\n", "\n\n").replace(":\n\n", ":\n")
    print(text)
