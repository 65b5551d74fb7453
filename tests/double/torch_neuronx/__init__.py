"""A test double of AWS's package ``torch_neuronx``, for tests on machines without it.

It is not AWS's package and has none of its code. It compiles nothing: what ``trace`` returns runs on PyTorch's CPU. It
says nothing about numbers, speed or memory on Neuron, nor whether neuronx-cc can compile a graph. What it does is to
refuse what the real package refuses, so that code which passes here keeps the rules below. Whatever it says itself
contains "double of torch_neuronx". Where sources are silent or disagree it takes the strictest reading.

From the AWS Neuron SDK documentation, https://awsdocs-neuron.readthedocs-hosted.com, SDK 2.31:

- PyTorch NeuronX Tracing API: signature of ``trace``; shapes and dtypes are fixed, CPU tensors in and out, operations
  whose shapes depend on data are not supported; the result is saved and loaded as any ScriptModule and runs on Neuron
  devices alone; ``cpu_backend=True`` needs ``--target``; loading places a model on the cores in turn.
- PyTorch NeuronX NeuronCore Placement APIs: ``neuron_cores_context`` acts on ``torch.jit.load`` inside it.
- NeuronX Runtime Configuration: a process reserves all cores, or those of ``NEURON_RT_VISIBLE_CORES``, until
  it ends, and counts them from 0; NRT status codes and Runtime Troubleshooting: "NeuronCore(s) not available".
- Neuron Compiler CLI Reference Guide: flags and their values. Flags that are not in it are refused.
- Data Types: there is no float64 on Inf2.
- T5 inference tutorial: real outputs come first and are read by index; after loading, ``move_trace_to_device`` takes
  the state to the device, and what ``parameters()`` lists after that are first of all the states.

From the Python source of an older torch_neuronx: keys of ``input_output_aliases`` are Parameters of an ``nn.Module``;
an unused input is ignored with a warning; the result has the structure of what ``func`` returned, aliased outputs
included; ``move_trace_to_device`` replaces the Parameters; unknown keywords are a warning; "neuronx-cc failed with".
From reports about newer releases: the platform error at import; states come in the order of the module's parameters,
not of the dict, so that both orders have to be the same.

Inferred: a wrong shape or dtype is a RuntimeError; without a device, so are running and loading. Unknown: whether 2.9
lets the host read aliased outputs (here they are tensors on the meta device, which nobody can read), and what a call
does whose state was not moved (here it is refused).

In the environment, ``TORCH_NEURONX_DOUBLE_DEVICE=0`` makes a host without a Neuron device (by default there is an
inf2.xlarge: one chip, two cores), ``TORCH_NEURONX_DOUBLE_LOG`` names a file that gets a line of JSON a trace, and
``TORCH_NEURONX_DOUBLE_CORES`` a directory that stands for the chip: processes that share it share its cores.
"""

import copy
import fcntl
import functools
import json
import os
import shlex
import sys
import warnings
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__version__ = "2.9.0+double"

CORES = 2
_SAYS = "double of torch_neuronx: "
_REFUSED_OPERATORS = {  # the first two have no shape before there is data, the others are not in the compiler
    *("aten::nonzero", "aten::masked_select", "aten::sort", "aten::argsort", "aten::linalg_solve_triangular"),
}
_SHAPE_ALONE = {"aten::size", "aten::ones_like", "aten::zeros_like", "aten::full_like", "aten::empty_like"}
_SWITCH, _ANYTHING = (), None
_FLAGS = {
    "--framework": ("XLA",),
    "--target": ("inf2", "trn1", "trn1n", "trn2"),
    "--model-type": ("generic", "transformer", "unet-inference"),
    "--auto-cast": ("none", "matmult", "all"),
    "--auto-cast-type": ("bf16", "fp16", "tf32", "fp8_e4m3"),
    "--native-int64": ("default", "enabled", "disabled"),
    "--implicit-integer-downcast": _ANYTHING,
    "--distribution-strategy": ("llm-training",),
    "--logical-nc-config": ("1", "2"),
    "--optlevel": ("1", "2", "3"),
    "--enable-mixed-precision-accumulation": _SWITCH,
    "--disable-mixed-precision-accumulation": _SWITCH,
    "--enable-saturate-infinity": _SWITCH,
    "--enable-fast-context-switch": _SWITCH,
    "--enable-fast-loading-neuron-binaries": _SWITCH,
    "--logfile": _ANYTHING,
    "--output": _ANYTHING,
    "--verbose": ("info", "warning", "error", "critical", "debug", "35"),
}
_SHORT = {"-O": "--optlevel", "-lnc": "--logical-nc-config"}
_TRN2_ALONE = ("--logical-nc-config", "--native-int64")

_compiling = False
_pinned_core, _next_core = None, 0


def trace(
    func,
    example_inputs,
    *_,
    input_output_aliases={},  # noqa: B006 - the documented signature; nothing writes into it
    compiler_workdir=None,
    compiler_args=None,
    partitioner_config=None,
    inline_weights_to_neff=True,
    cpu_backend=False,
    **kwargs,
):
    """Check everything that the real one would refuse; return a ScriptModule for the CPU with the run-time checks."""
    if _:
        raise TypeError(f"{_SAYS}arguments after example_inputs are keywords; the real one warns, and guesses")
    if kwargs:
        warnings.warn(f"{_SAYS}Unexpected keyword arguments: {list(kwargs)}", UserWarning, stacklevel=2)
    if partitioner_config is not None:
        raise NotImplementedError(f"{_SAYS}it has no partitioner")
    args = _check_compiler_args(compiler_args)
    if cpu_backend and "--target" not in args:
        raise RuntimeError(f"{_SAYS}cpu_backend=True needs --target in compiler_args")
    if not cpu_backend:
        _require_device()
    inputs = _check_inputs(example_inputs)
    with torch.inference_mode(False), torch.no_grad():
        outputs = func(*inputs)
        _check_aliases(func, outputs, input_output_aliases)
        tensors = [*inputs, *_as_tuple(outputs), *(func.parameters() if isinstance(func, nn.Module) else ())]
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            raise _compiler_failure("float64 is no data type of Inf2")
        traced = _trace_for_cpu(func, inputs, input_output_aliases)
    if log := os.environ.get("TORCH_NEURONX_DOUBLE_LOG"):
        with open(log, "a", encoding="utf-8") as file:
            entry = {"func": type(func).__name__, "inputs": _describe_all(inputs), "states": len(input_output_aliases)}
            file.write(json.dumps(entry | {"compiler_args": args, "cpu_backend": cpu_backend}) + "\n")
    return traced


def move_trace_to_device(trace, device_id):
    """Take the state to a core, in place: Parameters that were listed before are not the state any more."""
    _require_device()
    if not isinstance(device_id, int) or not 0 <= device_id < len(_cores()):
        raise ValueError(f"{_SAYS}device_id is {device_id!r}; there are cores 0 to {len(_cores()) - 1}")
    trace.neff.core, trace.neff.moved = device_id, True
    for name, state in list(trace.named_parameters()):
        if name.startswith("state_"):
            setattr(trace, name, nn.Parameter(state.clone(), requires_grad=False))


@contextmanager
def neuron_cores_context(start_nc=-1, nc_count=-1):
    """Models that ``torch.jit.load`` loads inside go to the core `start_nc`; not thread safe."""
    global _pinned_core
    _require_device()
    cores = len(_cores())
    if start_nc not in range(-1, cores) or nc_count not in (-1, *range(1, cores + 1 - max(start_nc, 0))):
        raise ValueError(f"{_SAYS}start_nc={start_nc!r}, nc_count={nc_count!r}: there are {cores} cores")
    before, _pinned_core = _pinned_core, None if start_nc == -1 else start_nc
    try:
        yield
    finally:
        _pinned_core = before


class _Neff(nn.Module):
    """Stands where ``neuron::Model`` stands in a real trace: it looks for a device when it is loaded, and at each call.

    It does so through custom operations: as there, a process that has not imported torch_neuronx cannot load the file.
    """

    def __init__(self, wanted: str, stateful: bool):
        super().__init__()
        self.wanted = wanted
        self.stateful = stateful
        self.moved = False
        self.core = 0

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return torch.ops.neuron_double.forward(inputs, self.wanted, self.stateful and not self.moved)

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool, bool]:
        return self.wanted, self.stateful, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool, bool]) -> None:
        self.wanted, self.stateful, self.training = state
        self.moved = False
        self.core = torch.ops.neuron_double.load(self.wanted)


class _Model(nn.Module):
    """`func` with its states as Parameters ``state_0``, ``state_1`` ..., in front of all its other ones."""

    def __init__(self, func, neff, aliases):
        super().__init__()
        self.neff = neff
        self.indices = list(aliases.values())
        self.states, memo = [], {}
        for i, parameter in enumerate(aliases):
            self.states.append(nn.Parameter(parameter.clone(), requires_grad=False))
            self.register_parameter(f"state_{i}", self.states[-1])
            memo[id(parameter)] = self.states[-1]
        # A copy, since what is compiled does not change with the model.
        self.func = copy.deepcopy(func, memo).requires_grad_(False) if isinstance(func, nn.Module) else func

    def forward(self, *inputs):
        outputs = self.func(*self.neff(list(inputs)))
        if not self.states:
            return outputs
        # Clones, since an output may be a view of a state.
        returned = [output.clone() for output in outputs]
        for state, index in zip(self.states, self.indices, strict=True):
            state.copy_(returned[index])
            returned[index] = torch.empty_like(state, device="meta")
        return tuple(returned)


def _trace_for_cpu(func, inputs, aliases):
    global _compiling
    neff = torch.jit.script(_Neff(";".join(_describe_all(inputs)), bool(aliases)))
    model = _Model(func, neff, aliases)
    model.training = getattr(func, "training", False)  # and not .train(), which would tell its parts as well
    before = [state.clone() for state in model.states]
    _compiling = True
    try:
        with warnings.catch_warnings(action="ignore"):  # torch.jit.trace is no part of the real package
            traced = torch.jit.trace(model, inputs, check_trace=False, strict=False)
    finally:
        _compiling = False
    for state, value in zip(model.states, before, strict=True):
        state.copy_(value)
    nodes = list(traced.inlined_graph.nodes())
    if refused := _REFUSED_OPERATORS & {node.kind() for node in nodes}:
        raise _compiler_failure(f"{', '.join(sorted(refused))} is not supported")
    (unpacked,) = (node for node in nodes if node.kind() == "prim::ListUnpack" and _comes_from_neff(node))
    for i, value in enumerate(unpacked.outputs()):
        if all(use.user.kind() in _SHAPE_ALONE for use in value.uses()):
            what = f"(index={i}, shape={inputs[i].shape}, dtype={inputs[i].dtype})"
            said = f"{_SAYS}Received an input tensor that was unused. Tensor will be ignored. {what}"
            warnings.warn(said, UserWarning, stacklevel=3)
    return traced


def _comes_from_neff(node):
    return node.inputsAt(0).node().kind() == "neuron_double::forward"


def _check_inputs(example_inputs):
    inputs = example_inputs if type(example_inputs) is tuple else (example_inputs,)
    for given in inputs:
        if not isinstance(given, Tensor):
            raise TypeError(f"{_SAYS}example_inputs has a {type(given).__name__}: it takes a tensor or a tuple of them")
        if given.device.type != "cpu":
            raise ValueError(f"{_SAYS}example_inputs has a tensor on {given.device}: it takes those of the CPU")
    if not inputs or len({id(given) for given in inputs}) < len(inputs):
        raise ValueError(f"{_SAYS}example_inputs has no tensor, or one twice, which would become one input")
    return inputs


def _check_aliases(func, outputs, aliases):
    """Refuse aliases that break a rule."""
    outputs = _as_tuple(outputs)
    if not outputs or not all(isinstance(output, Tensor) for output in outputs):
        raise ValueError(f"{_SAYS}func has to return a tensor, or a tuple of one or more")
    if not aliases:
        return
    assert isinstance(func, nn.Module), f"{_SAYS}with input_output_aliases, func has to be an nn.Module"
    names = {id(parameter): name for name, parameter in func.named_parameters()}
    if any(id(key) not in names for key in aliases):
        raise KeyError(f"{_SAYS}a key of input_output_aliases is no Parameter of func")
    found = {names[id(key)]: index for key, index in aliases.items()}
    if list(found) != [name for name in names.values() if name in found]:
        raise ValueError(f"{_SAYS}input_output_aliases has another order than the Parameters of func")
    if sorted(found.values()) != list(range(len(outputs) - len(found), len(outputs))) or len(found) == len(outputs):
        raise ValueError(
            f"{_SAYS}input_output_aliases names {list(found.values())}: real outputs first, then each state"
        )
    for key, index in aliases.items():
        if _describe_all([key]) != _describe_all([outputs[index]]):
            raise ValueError(f"{_SAYS}output {index} has another shape or dtype than the Parameter that it becomes")


def _check_compiler_args(compiler_args):
    """Refuse what neuronx-cc's documentation does not know; return the arguments as a list."""
    given = shlex.split(compiler_args) if isinstance(compiler_args, str) else list(compiler_args or [])
    if not all(isinstance(arg, str) for arg in given):
        raise TypeError(f"{_SAYS}compiler_args has to be a str or a list of them")
    args, found = list(given), {}
    while args:
        flag, equals, value = args.pop(0).partition("=")
        if flag[:2] == "-O" and flag[2:]:
            flag, equals, value = "-O", "=", flag[2:]
        flag = _SHORT.get(flag, flag)
        if flag not in _FLAGS:
            raise _compiler_failure(f"unknown flag {flag}")
        if _FLAGS[flag] != _SWITCH and not equals:
            value = args.pop(0) if args else ""
        if _FLAGS[flag] is _ANYTHING or _FLAGS[flag] == _SWITCH:
            wrong = not value if _FLAGS[flag] is _ANYTHING else equals
        else:
            wrong = value not in _FLAGS[flag]
        if wrong:
            raise _compiler_failure(f"{flag} does not take {value!r}")
        found[flag] = value
    for flag in found.keys() & set(_TRN2_ALONE):
        if found.get("--target") != "trn2":
            raise _compiler_failure(f"{flag} is for --target trn2 alone")
    return [part for arg in given for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]


def _compiler_failure(why):
    return RuntimeError(f"neuronx-cc failed with 2 ({_SAYS}{why})")


def _as_tuple(outputs):
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def _describe_all(tensors):
    return [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in tensors]


def _device_present():
    return os.environ.get("TORCH_NEURONX_DOUBLE_DEVICE", "1") != "0"


def _require_device():
    if not _device_present():
        raise RuntimeError(f"{_SAYS}The PyTorch Neuron Runtime could not be initialized: there is no Neuron device")
    _cores()


@functools.cache
def _cores():
    """The cores of this process, as locked files, which stay open as long as it lives."""
    visible = []
    for part in os.environ.get("NEURON_RT_VISIBLE_CORES", f"0-{CORES - 1}").split(","):
        first, _, last = part.partition("-")
        visible += range(int(first), int(last or first) + 1)
    if not set(visible) <= set(range(CORES)):
        raise RuntimeError(f"{_SAYS}NEURON_RT_VISIBLE_CORES names {visible}: there are cores 0 to {CORES - 1}")
    chip = os.environ.get("TORCH_NEURONX_DOUBLE_CORES")
    files = [open(os.path.join(chip, f"core{core}"), "w") if chip else None for core in visible]  # noqa: SIM115
    try:
        for file in filter(None, files):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(f"{_SAYS}NeuronCore(s) not available: another process has one of {visible}") from None
    return files


def _load(wanted):
    """The core that a loaded model goes to: that of the context, else the next one."""
    global _next_core
    _require_device()
    if _pinned_core is not None:
        return _pinned_core
    core = _next_core % len(_cores())
    _next_core += 1
    return core


def _forward(inputs, wanted, state_is_on_the_host):
    """Refuse a call, or hand on its inputs, as clones, since an operation may not return what it was given."""
    if not _compiling:
        _require_device()
        for i, (got, want) in enumerate(zip(_describe_all(inputs), wanted.split(";"), strict=True)):
            if got != want:
                raise RuntimeError(f"{_SAYS}input {i} is {got}; this graph was traced for {want}")
        if state_is_on_the_host:
            raise RuntimeError(f"{_SAYS}the state is still on the host: call move_trace_to_device after loading")
    return [given.clone() for given in inputs]


if not _device_present() and not os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE"):
    raise RuntimeError(
        f"{_SAYS}Unsupported Platform: there is no Neuron device, and no NEURON_PLATFORM_TARGET_OVERRIDE (to compile)"
    )
if not hasattr(torch.ops.neuron_double, "load"):  # PyTorch keeps operations for ever, a test may import this twice
    torch.library.define("neuron_double::load", "(str wanted) -> int")
    torch.library.define("neuron_double::forward", "(Tensor[] inputs, str wanted, bool on_host) -> Tensor[]")
    for _name in ("load", "forward"):

        @torch.library.impl(f"neuron_double::{_name}", "CompositeExplicitAutograd")
        def _call(*args, _name=f"_{_name}"):
            return getattr(sys.modules["torch_neuronx"], _name)(*args)


from torch_neuronx import experimental  # noqa: E402, F401
