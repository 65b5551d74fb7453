"""Look for what fails on Inf2 in the graph that neuronx-cc would get, before anything is compiled."""

from dataclasses import dataclass

import torch
from inf2.lowering import Lowered, lower_examples, place_in_python, xla_process
from inf2.process import clean_state
from inf2.rules import DYNAMIC_SHAPES, REFUSED_OPERATORS, REFUSED_TYPES, REPORTED_OPERATORS
from inf2.tensors import as_tuple, check_example, check_inputs, describe_inputs


@dataclass(frozen=True)
class Checked:
    """What `check_module` found.

    Attributes
    ----------
    findings : tuple of str
        What is wrong, and where.
    notes : tuple of str
        What is only reported.
    lowered : Lowered or None
        The graph; None where there is none.
    difference : float
        The largest difference from eager, relative to the largest value of the result.
    """

    findings: tuple
    notes: tuple = ()
    lowered: Lowered | None = None
    difference: float = float("nan")


@clean_state()
def check_module(module, examples, *, input_output_aliases=None, bound=1e-4):
    """Lower `module` and look for what fails on Inf2: nothing is compiled, and no device is needed.

    Parameters
    ----------
    module, input_output_aliases
        As in `trace_module`.
    examples : list of tuple of Tensor
        Two or more calls' inputs, every value different: what stays the same in all their graphs is a constant.
    bound : float
        How far the results of the graph, run by XLA, may lie from eager, relative to the largest value.

    Returns
    -------
    Checked

    Raises
    ------
    ValueError
        If an argument is not of that kind.
    RuntimeError
        If torch-xla is not installed.
    """
    if len(examples) < 2:
        raise ValueError(f"examples has {len(examples)}: pass two or more, a constant shows by what does not change")
    checked = [check_example(module, inputs, input_output_aliases) for inputs in examples]
    examples, aliases = [inputs for inputs, _ in checked], checked[0][1]
    first = describe_inputs(module, examples[0])
    for inputs in examples:
        check_inputs(inputs, first)
    xla_process()  # that torch-xla is missing is no finding
    try:
        lowered = lower_examples(module, examples, aliases)
    except RuntimeError as error:
        return Checked((str(error),))
    worst, differing = compare_with_eager(module, examples, lowered.outputs, bound)
    findings = (*graph_findings(lowered), *differing)
    notes = tuple(
        f"{operator} {said}{place_in_python(lowered.where.get(operator))} ({source})"
        for operator, (said, source) in REPORTED_OPERATORS.items()
        if operator in lowered.operators or operator in lowered.types
    )
    return Checked(findings, notes, lowered, worst)


def graph_findings(lowered):
    """What is wrong with a graph by itself: yields a sentence each."""

    def where(name):
        return place_in_python(lowered.where.get(name))

    for name, place in lowered.on_host.items():
        what = "a value is read in Python" if name == "aten::_local_scalar_dense" else f"{name} runs on the host"
        yield f"{what} while the graph is recorded, and becomes a constant{place_in_python(place)}"
    for operator in lowered.operators:
        if operator in REFUSED_OPERATORS:
            yield f"{operator} is refused by neuronx-cc{where(operator)} ({REFUSED_OPERATORS[operator]})"
    for operator in lowered.dynamic:
        yield f"{operator} has a dynamic shape{where(operator)} ({DYNAMIC_SHAPES})"
    for name in lowered.types:
        if name in REFUSED_TYPES:
            yield f"{name} is no type of Inf2{where(name)} ({REFUSED_TYPES[name]})"
    for name in lowered.unused:
        yield f"{name} is in no result: torch_neuronx drops it or fails on it"
    for first, second in lowered.twice:
        yield f"{first} and {second} are one weight, and the graph holds it twice"
    for number, fingerprint in enumerate(lowered.fingerprints[1:], 2):
        if fingerprint != lowered.fingerprints[0]:
            yield f"example {number} gives another graph than example 1: a value of an input is a constant in it"
            break


def compare_with_eager(module, examples, outputs, bound):
    """The largest relative difference of a graph's `outputs` from eager, and what is wrong with the first that is."""
    worst = 0.0
    with torch.no_grad():
        for number, (inputs, actual) in enumerate(zip(examples, outputs, strict=True), 1):
            try:
                expected = as_tuple(module(*[tensor.clone() for tensor in inputs]))
            except Exception as error:  # such as an index that is too large, which XLA does not mind
                return worst, [f"eager fails on example {number}: {type(error).__name__}: {error}"]
            difference = max(relative_difference(a, e) for a, e in zip(actual, expected, strict=True))
            worst = worst if difference <= worst else difference  # a NaN stays one
            if not difference <= bound:
                return worst, [f"the graph's results differ from eager by {difference:.0e} on example {number}"]
    return worst, []


def relative_difference(actual, expected):
    """The largest difference of two tensors, relative to the largest value; infinite where one alone is not finite."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if not expected.is_floating_point():
        return float(not torch.equal(actual, expected))
    alike = (actual == expected) | (actual.isnan() & expected.isnan())  # infinities as well
    finite = actual.isfinite() & expected.isfinite()
    if alike.all():
        return 0.0
    if not (alike | finite).all():
        return float("inf")
    largest = expected[finite].abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return ((actual - expected)[finite].abs().max() / largest).item()
