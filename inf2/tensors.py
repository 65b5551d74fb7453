"""What crosses the boundary of a graph: inputs of one shape and dtype each, outputs, and state that stays inside."""

import inspect

import torch
from inf2.process import Owner
from torch import nn

REFUSAL = "{name} is {got}; this graph was traced for {wanted}: pass exactly that, or trace it again"


def describe(value):
    """What a value is, in words: ``float32 [1, 3, 64, 64]`` of a tensor, ``a list`` of anything else."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a {type(value).__name__}"


def as_tuple(outputs):
    """What a module returns, a tensor or several, as a tuple."""
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def input_names(module, count):
    """The first `count` names that a module's ``forward`` gives its positional arguments."""
    names = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return (names + [f"number {i}" for i in range(len(names), count)])[:count]


def describe_inputs(module, example_inputs):
    """The inputs that a trace is for: a dict of their names to text such as ``float32 [1, 3, 64, 64]``."""
    names = input_names(module, len(example_inputs))
    return {name: describe(example) for name, example in zip(names, example_inputs, strict=True)}


def check_inputs(inputs, traced_for):
    """Raise a `ValueError` unless `inputs` (tuple of Tensor) are what `traced_for` (see `describe_inputs`) says."""
    if len(inputs) != len(traced_for):
        raise ValueError(f"{len(inputs)} inputs; this graph was traced for {len(traced_for)}: {', '.join(traced_for)}")
    for value, (name, wanted) in zip(inputs, traced_for.items(), strict=True):
        if describe(value) != wanted:
            raise ValueError(REFUSAL.format(name=name, got=describe(value), wanted=wanted))


class StaticGraph(nn.Module):
    """A traced module and what it was traced for: it refuses other inputs with a `ValueError` before the call.

    The module refuses them too; but what comes out of TorchScript is a ``torch.jit.Error`` of fifteen lines. One that
    keeps state answers in the process that made it alone, and is a `RuntimeError` in another, such as a fork.
    """

    def __init__(self, graph, traced_for, *, keeps_state=False):
        super().__init__()
        self.graph = graph
        self.traced_for = traced_for
        self.owner = Owner() if keeps_state else None

    def forward(self, *inputs):
        if self.owner is not None:
            self.owner.check()
        check_inputs(inputs, self.traced_for)
        if torch.is_autocast_enabled("cpu"):  # it would cast the stand-in's products, which a compiled graph has fixed
            with torch.autocast("cpu", enabled=False):
                return self.graph(*inputs)
        return self.graph(*inputs)


def state_of(module):
    """The Parameters that a module keeps in ``module.state``, in their order: they are no weights."""
    return list(getattr(module, "state", []))


def state_aliases(module):
    """The ``input_output_aliases`` of a module that returns one real output and then, in its order, its state."""
    return {parameter: index for index, parameter in enumerate(state_of(module), 1)}


def check_example(module, example_inputs, aliases):
    """The example inputs as a tuple and the aliases as a dict, both as `trace_module` wants them.

    Raises
    ------
    ValueError
        If one of the three is not of the kind that `trace_module` describes.
    """
    example_inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else example_inputs
    if not isinstance(module, nn.Module):
        raise ValueError(f"module is a {type(module).__name__}: pass an nn.Module, or wrap the function in one")
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError("module is a ScriptModule, which has been traced already: pass the module that it was made of")
    if not isinstance(example_inputs, tuple | list) or not example_inputs:
        raise ValueError(f"example_inputs is {describe(example_inputs)}: pass a tuple of tensors, in forward's order")
    for name, example in zip(input_names(module, len(example_inputs)), example_inputs, strict=True):
        if not isinstance(example, torch.Tensor):
            raise ValueError(f"example input {name} is {describe(example)}: only tensors cross the trace boundary")
    parameters = {id(parameter) for parameter in module.parameters()}
    for key, index in (aliases or {}).items():
        if id(key) not in parameters or not isinstance(index, int) or isinstance(index, bool):
            raise ValueError("input_output_aliases maps Parameters of the module to the index of an output")
    return tuple(example_inputs), aliases or {}


def check_aliases(module, example_inputs, aliases):
    """Call a module that has `aliases`, and raise a `ValueError` unless its outputs fit them."""
    if not aliases:
        return
    outputs = as_tuple(module(*example_inputs))
    if len(outputs) == len(set(aliases.values())):
        raise ValueError("input_output_aliases takes every output: return a real one first, the state after it")
    if len(set(aliases.values())) < len(aliases):
        raise ValueError("input_output_aliases names an output twice: each is the next value of one parameter")
    for parameter, index in aliases.items():
        if not 0 <= index < len(outputs):
            raise ValueError(
                f"input_output_aliases names output {index}; the module has {len(outputs)}, counted from 0"
            )
        if describe(outputs[index]) != describe(parameter):
            raise ValueError(
                f"input_output_aliases: output {index} is {describe(outputs[index])}, its parameter "
                f"{describe(parameter)}; both have to be the same"
            )
