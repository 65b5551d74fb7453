"""A compiled module's rules on a CPU: positional tensors, fixed shapes and dtypes, state that stays inside."""

import contextlib
import copy
import linecache
import logging
import warnings

import torch
from inf2.rounding import ImitatedAutoCast, with_rounding
from inf2.tensors import REFUSAL, as_tuple, describe, describe_inputs
from torch import nn

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


class KeepState(nn.Module):
    """What ``input_output_aliases`` does on a NeuronCore: an aliased output becomes its parameter's next value."""

    def __init__(self, module, aliases):
        super().__init__()
        self.module = module
        self.aliases = aliases

    def forward(self, *inputs):
        outputs = as_tuple(self.module(*inputs))
        # Clones, since a module may return its state, or a view of it, as a real output too.
        returned = tuple(o.clone() for i, o in enumerate(outputs) if i not in self.aliases.values())
        for parameter, index in self.aliases.items():
            parameter.copy_(outputs[index])
        return returned[0] if len(returned) == 1 else returned


def trace_for_cpu(module, example_inputs, aliases, compiler_args=()):
    """``torch.jit.trace`` behind checks that are part of the saved file, with the rounding of `compiler_args`.

    A trace accepts any shape and dtype: `checking_module` refuses
    what was not traced.
    """
    rounded = with_rounding(module, example_inputs, ImitatedAutoCast(compiler_args))
    if aliases:  # the graph gets a state of its own, outside inference mode and autograd
        index_of = {id(parameter): index for parameter, index in aliases.items()}
        own = copy.deepcopy(rounded)
        pairs = zip(rounded.parameters(), own.parameters(), strict=True)
        aliases = {mine: index_of[id(theirs)] for theirs, mine in pairs if id(theirs) in index_of}
        rounded = KeepState(own.requires_grad_(False), aliases)
    return checked_trace(rounded, module, example_inputs, aliases)


def checked_trace(inner, module, example_inputs, state=()):
    """``torch.jit.trace`` of `inner`, which answers for `module`, behind its checks; `state` keeps its values."""
    guarded = checking_module(describe_inputs(module, example_inputs), example_inputs)
    before = [(parameter, parameter.clone()) for parameter in state]
    with quiet_properties():
        guarded.graph = torch.jit.trace(inner, example_inputs, check_trace=False)
    for parameter, value in before:
        parameter.copy_(value)
    return torch.jit.script(guarded.train(module.training))


def checking_module(traced_for, example_inputs):
    """A module that TorchScript compiles, whose ``graph`` is still missing and which lets through what it was made for.

    The checks are TorchScript written for the number of inputs at hand: ``forward`` looks at shapes and dtypes, and a
    forward pre-hook, whose input is the tuple of positional tensors, refuses keywords, other counts and Python values.
    A made-up file name keeps paths out of the messages.
    """
    arguments = [f"positional_{i}" for i in range(len(traced_for))]
    tensors = ", ".join("Tensor" for _ in arguments)
    checks = ""
    for name, argument, example in zip(traced_for, arguments, example_inputs, strict=True):
        refusal = REFUSAL.format(name=name, got="{got}", wanted=describe(example)).split("{got}")
        checks += f"""
    if {argument}.dtype != {example.dtype} or {argument}.shape != {list(example.shape)}:
        raise ValueError({refusal[0]!r} + name_of({argument}.dtype) + " " + str({argument}.shape) + {refusal[1]!r})"""
    source = f"""
def name_of(dtype: int) -> str:
    names = {{{", ".join(f'{dtype}: "{str(dtype).removeprefix("torch.")}"' for dtype in DTYPES)}}}
    return names[dtype] if dtype in names else "another dtype"

def forward(self, {", ".join(f"{argument}: Tensor" for argument in arguments)}):{checks}
    return self.graph({", ".join(arguments)})

def takes_positional_tensors_only(self, input: Tuple[{tensors}]) -> None:
    return None
"""
    file = f"<inputs {traced_for}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = {"__name__": __name__, "Tensor": torch.Tensor, "Tuple": tuple, "torch": torch}
    exec(compile(source, file, "exec"), scope)
    guarded = type("TracedForCpu", (nn.Module,), {"forward": scope["forward"]})()
    guarded.register_forward_pre_hook(scope["takes_positional_tensors_only"])
    return guarded


@contextlib.contextmanager
def quiet_properties():
    """torch.jit.trace reads every property of a module, and some of transformers' warn when they are read."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        logger.setLevel(level)
