"""Look for what fails on Inf2 in the graph that neuronx-cc would get, before anything is compiled."""

import inspect
from dataclasses import dataclass

import torch
from inf2.findings import graph_findings, graph_notes, random_findings, result_findings
from inf2.lowering import Lowered, lower_examples, place_in_python, xla_process
from inf2.operators import Values, exceeds_int32, layers_of
from inf2.process import clean_state
from inf2.rounding import ImitatedAutoCast
from inf2.rules import DRIFT, HINTS, INT32, NESTED, NOT_FINITE, ORDER
from inf2.tensors import REFUSAL, describe, input_names
from inf2.trees import check_nested, describe_nested, flatten, named_results, unflatten

# The cast that neuronx-cc makes of fp32 models if it is asked for the usual one.
AUTO_CAST = ["--auto-cast", "matmult", "--auto-cast-type", "bf16"]


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

    A finding is what fails, by a public source or by a result that is wrong. A note is what may fail, or bears on the
    answers: which sources disagree, what is read in Python though every example comes out right, what an imitation of
    ``--auto-cast matmult`` changes. Each names the layer and the line it comes from, where there is one.

    Parameters
    ----------
    module, input_output_aliases
        As in `trace_module`. A module that a function or a file made, which another process cannot import, and
        parametrized weights (``weight_norm``, ``spectral_norm``) are taken as well.
    examples : list of tuple
        Two or more calls' inputs, every value different: what stays the same in all their graphs is a constant. Each
        input is a tensor, or a tuple, list or dict of tensors. The first one is what would be traced: give it a
        padded mask. Results may be nested, in tuples, dicts and output objects.
    bound : float
        How far the results of the graph, run by XLA, may lie from eager, relative to the largest value; further where
        the module is of bfloat16 or float16.

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
    checked = [check_nested(module, inputs, input_output_aliases) for inputs in examples]
    examples, aliases = [inputs for inputs, _ in checked], checked[0][1]
    check_alike(module, examples)
    xla_process()  # that torch-xla is missing is no finding
    try:
        lowered = lower_examples(module, examples, aliases)
    except RuntimeError as error:
        return Checked((_why_not(module, examples[0], str(error)),), tuple(order_notes(module, examples)))
    values = Values(layers_of(module))
    bound = bound_for(module, examples, bound)
    worst, differing = compare_with_eager(module, examples, lowered, bound, values)
    found, notes = result_findings(lowered, differing)
    findings = [*graph_findings(lowered), *value_findings(examples, values)]
    if not list(random_findings(lowered)):  # which are no one's second time
        findings += found
    notes = [*graph_notes(lowered), *notes, *order_notes(module, examples)]
    if not differing:
        notes += eager_notes(module, examples[0], lowered, values, bound)
    return Checked(tuple(findings), tuple(notes), lowered, worst)


def check_alike(module, examples):
    """Raise a `ValueError` unless all examples have the structure, shapes and dtypes of the first."""
    first = describe_nested(module, examples[0])
    for number, inputs in enumerate(examples[1:], 2):
        given = describe_nested(module, inputs)
        if list(given) != list(first):
            raise ValueError(f"example {number} has the inputs {', '.join(given)}; example 1 has {', '.join(first)}")
        for name, wanted in first.items():
            if given[name] != wanted:
                raise ValueError(REFUSAL.format(name=name, got=given[name], wanted=wanted))


def _why_not(module, inputs, error):
    """The error of a module that cannot be lowered, with what to do about it; eager's where it cannot be called."""
    try:
        _call(module, inputs)
    except Exception as own:
        return f"eager fails on example 1: {type(own).__name__}: {own}"
    hints = [hint for words, hint in HINTS.items() if words in error]
    return f"{error}: {hints[0]}" if hints else error


def _call(module, inputs):
    """What a module returns for inputs that it may write to, as pairs of name and value."""
    tensors, structure = flatten(inputs)
    with torch.no_grad():
        return named_results(module(*unflatten([tensor.clone() for tensor in tensors], structure)))


def compare_with_eager(module, examples, lowered, bound, values):
    """The largest relative difference of a graph from eager, and a sentence about the first that is wrong, or None.

    `values` watches the calls.
    """
    worst = 0.0
    for number, (inputs, actual) in enumerate(zip(examples, lowered.outputs, strict=True), 1):
        try:
            with values:
                results = _call(module, inputs)
        except Exception as error:  # such as an index that is too large, which XLA does not mind
            return float("nan"), f"eager fails on example {number}: {type(error).__name__}: {error}"
        expected = [(name, value) for name, value in results if isinstance(value, torch.Tensor)]
        if len(expected) != len(actual):
            return float("inf"), f"eager returns {len(expected)} results on example {number}, the graph {len(actual)}"
        for (name, wanted), got in zip(expected, actual, strict=True):
            if describe(got) != describe(wanted.to(got.dtype) if is_integer(got, wanted) else wanted):
                said = f"the graph's result {name} is {describe(got)}, eager's {describe(wanted)} on example {number}"
                return float("inf"), said
        difference = max(relative_difference(a, e.to(a.dtype)) for a, (_, e) in zip(actual, expected, strict=True))
        worst = worst if difference <= worst else difference  # a NaN stays one
        if not difference <= bound:
            return worst, f"the graph's results differ from eager by {difference:.0e} on example {number}"
    return worst, None


def is_integer(*tensors):
    """Whether none of the tensors is of floating point or complex, nor bool: Inf2 has 32 bits for all of them."""
    return not any(t.is_floating_point() or t.is_complex() or t.dtype == torch.bool for t in tensors)


def bound_for(module, examples, bound):
    """`bound`, or eight units in the last place of the coarsest floating-point type of a module and its inputs."""
    tensors = [*module.parameters(), *module.buffers(), *flatten(examples[0])[0]]
    types = {tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.element_size() > 1}
    return max([bound, *(8 * torch.finfo(dtype).eps for dtype in types - {torch.float32, torch.float64})])


def value_findings(examples, values):
    """What Inf2's 32 bits do to the values of the calls: yields a sentence each."""
    if any(exceeds_int32(tensor) for inputs in examples for tensor in flatten(inputs)[0]):
        yield f"an input has an int64 beyond 32 bits, which Inf2 cuts: pass smaller numbers ({INT32})"
    elif values.beyond_32_bits:
        place = place_in_python(values.beyond_32_bits)
        yield f"an int64 beyond 32 bits comes up{place}, which Inf2 cuts: use smaller numbers ({INT32})"


def order_notes(module, examples):
    """Which names the inputs have, where ``forward`` takes more than it is given: yields a sentence."""
    given, known = len(examples[0]), inspect.signature(module.forward).parameters
    names = [name for name, p in known.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if given < len(names):
        bound = ", ".join(input_names(module, given))
        left_out = ", ".join(names[given : given + 3])
        yield f"inputs are bound by their order, to {bound}; left out: {left_out} ({ORDER})"


def eager_notes(module, inputs, lowered, values, bound):
    """What eager says of a module whose graph agrees with it: yields a sentence each."""
    with torch.no_grad():
        outputs = module(*unflatten([tensor.clone() for tensor in flatten(inputs)[0]], flatten(inputs)[1]))
    flat = isinstance(outputs, tuple | list) and all(isinstance(value, torch.Tensor) for value in outputs)
    if not isinstance(outputs, torch.Tensor) and not flat:
        names = ", ".join(name for name, _ in named_results(outputs))
        yield f"forward returns a {type(outputs).__name__}; read a trace's results by position: {names} ({NESTED})"
    if values.not_finite:
        place = place_in_python(values.not_finite)
        yield f"numbers that are not finite come up{place}: some need --enable-saturate-infinity ({NOT_FINITE})"
    expected = [value for _, value in named_results(outputs) if isinstance(value, torch.Tensor)]
    for value, actual, result in zip(expected, lowered.outputs[0], lowered.results, strict=True):
        if describe(value) != describe(actual):
            yield f"{result.name} is {describe(actual)} in the graph, {describe(value)} in eager"
    try:
        with ImitatedAutoCast(AUTO_CAST):
            actual = [value for _, value in _call(module, inputs) if isinstance(value, torch.Tensor)]
    except Exception:  # an operator without bf16 on a CPU says nothing about Inf2
        return
    moved = max(relative_difference(a, e) for a, e in zip(actual, expected, strict=True))
    if not moved <= bound:
        yield f"{' '.join(AUTO_CAST)}, imitated, moves results by {moved:.0e} of the largest value ({DRIFT})"


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
