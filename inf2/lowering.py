"""Lower a module as ``torch_neuronx.trace`` does, through torch-xla, in a child process that this one talks to."""

import contextlib
import importlib.util
import linecache
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

from inf2.files import whole_file
from inf2.messages import hash_code, pack, unpack
from inf2.process import clean_state
from inf2.tensors import check_aliases, check_inputs
from inf2.trees import check_nested, describe_nested, flatten, leaves_of, unflatten
from torch import nn


@dataclass(frozen=True, eq=False)
class Lowered:
    """What `lower_module` returns: the HLO of a module, and what XLA made of it on the CPU.

    Attributes
    ----------
    text : str
        The graph as XLA prints it.
    proto : bytes
        The graph as an ``HloModuleProto``, the input of ``neuronx-cc compile --framework XLA``.
    parameters, results : tuple of HloValue
        In the order of the graph.
    operators : dict of str to int
        How often each HLO operator occurs, the most frequent first.
    types : tuple of str
        The element types in the graph.
    dynamic : tuple of str
        The operators with a dimension that is not static.
    where : dict of str to Place
        The first line of Python behind each operator and element type; see `inf2.operators.Place`.
    on_host : dict of str to Place
        aten operators that ran on the host while the graph was recorded, and which values they read.
    calls, random, host_tensors : dict of str to Place
        The aten operators that were called; those that drew random numbers on the host; tensors of the host that met
        those of the device.
    constants : tuple of str
        Results that are no tensors: numbers and text, which stay what they were for the first example.
    beyond_32_bits : tuple of str
        Parameters with an int64 beyond 32 bits.
    unused : tuple of str
        Inputs and state that no result depends on.
    twice : tuple of (str, str)
        Names of weights that hold the same numbers.
    fingerprints : tuple of str
        One an example, equal for equal graphs.
    outputs : tuple of tuple of Tensor
        The results that XLA computed for each example.
    inputs : dict of str to str
        What it was lowered for; see `describe_inputs`.
    key : str
        The child process's name for the graph.
    """

    text: str
    proto: bytes
    parameters: tuple
    results: tuple
    operators: dict
    types: tuple
    dynamic: tuple
    where: dict
    on_host: dict
    calls: dict
    random: dict
    host_tensors: dict
    constants: tuple
    beyond_32_bits: tuple
    unused: tuple
    twice: tuple
    fingerprints: tuple
    outputs: tuple
    inputs: dict
    key: str

    def run(self, *inputs, state=()):
        """Run this graph once more on XLA's CPU client: tuple of Tensor, the next state last.

        Inputs or state of another number, shape or dtype are a `ValueError`. Without `state` it is what the module had.
        """
        inputs = tuple(tensor for value in inputs for _, tensor in leaves_of(value, ""))
        check_inputs(inputs, self.inputs)
        if state:
            kept = [result.type for result in self.results if result.kind == "state"]
            check_inputs(state, {f"state {i}": of_type for i, of_type in enumerate(kept)})
        return xla_process().call("run", self.key, inputs, tuple(tensor.detach() for tensor in state))

    def save(self, path):
        """Write the proto to `path`, for ``neuronx-cc compile --framework XLA --target inf2 PATH``."""
        with whole_file(path) as file:
            file.write(self.proto)


def lower_module(module, example_inputs, *, input_output_aliases=None):
    """Lower `module` as ``torch_neuronx.trace`` does, through torch-xla, and run the result on XLA's CPU client.

    It happens in a child process with ``PJRT_DEVICE=CPU``: the caller's module, torch's default device and, on Inf2,
    the NeuronCores are left alone.

    Parameters
    ----------
    module, example_inputs, input_output_aliases
        As in `trace_module`; each input may be a tuple, list or dict of tensors, and results may be nested as well, in
        output objects of transformers too. In a graph they are in one row, without what is None.

    Returns
    -------
    Lowered

    Raises
    ------
    ValueError
        If an argument is not of the kind described there.
    RuntimeError
        If torch-xla is not installed, the module cannot be lowered, or lowering it ends the process.
    """
    example_inputs, aliases = check_nested(module, example_inputs, input_output_aliases)
    return lower_examples(module, [example_inputs], aliases)


@clean_state()
def lower_examples(module, examples, aliases):
    """As `lower_module`, for several calls' inputs, which have been checked."""
    flat = [flatten(inputs) for inputs in examples]
    examples = [unflatten([tensor.clone() for tensor in inputs], structure) for inputs, structure in flat]
    check_aliases(module, unflatten([tensor.clone() for tensor in flat[0][0]], flat[0][1]), aliases)
    answer = xla_process().call("lower", module, examples, aliases, hash_code(module))
    if answer is None:  # a module was loaded again, or changed: a new child imports what is there now
        xla_process().end()
        answer = xla_process().call("lower", module, examples, aliases, hash_code(module))
        if answer is None:
            raise RuntimeError("cannot be lowered: a class of the module is another in this process than in its file")
    lowered = Lowered(**answer, inputs=describe_nested(module, examples[0]))
    weakref.finalize(lowered, xla_process().released.append, lowered.key)
    return lowered


class XlaGraph(nn.Module):
    """A lowered graph in the place of a traced one: it keeps its state, and XLA runs it on the CPU."""

    def __init__(self, lowered, state=()):
        super().__init__()
        self.lowered = lowered
        self.state = nn.ParameterList(nn.Parameter(tensor.clone(), requires_grad=False) for tensor in state)

    def forward(self, *inputs):
        results = self.lowered.run(*inputs, state=self.state)
        outputs = results[: len(results) - len(self.state)]
        for parameter, value in zip(self.state, results[len(outputs) :], strict=True):
            parameter.copy_(value)
        return outputs[0] if len(outputs) == 1 else outputs


def place_in_python(place):
    """Where a `Place` is, in words that follow a sentence; "" for None.

    A file with its line and source; for what a notebook defines, the function and the source; the layer.
    """
    if not place:
        return ""
    file, number, function, layer, _ = place
    name = f"{Path(file).name}:{number}" if Path(file).is_file() else function
    source = linecache.getline(file, number).strip() if function else ""
    at = f" at {name}" + (f", `{source}`" if source else "") if function else ""
    return at + (f" in layer {layer}" if layer else "")


# What makes the child record as torch_neuronx does. XLA_DISABLE_FUNCTIONALIZATION=1 is its default, says AWS's page on
# environment variables (2026-03-13); somebody who sets it to 0, the remedy of AWS's page on PyTorch 2.9 for wrong
# results of split, is taken at their word. XLA_IR_DEBUG and XLA_HLO_DEBUG put lines of Python into the graph, as
# torch_neuronx does in its traces. PJRT_DEVICE imitates nothing: it would be NEURON. On that device torch-xla 2.9 takes
# float64 for float32 and int16 for int32, resizes by custom calls and gathers densely, none of which a CPU shows.
ENVIRONMENT = {"PJRT_DEVICE": "CPU", "XLA_IR_DEBUG": "1", "XLA_HLO_DEBUG": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
DEFAULTS = {"XLA_DISABLE_FUNCTIONALIZATION": "1"}


class XlaProcess:
    """A Python of its own in which torch-xla runs on the CPU; it answers one call after another until this one ends."""

    def __init__(self):
        if importlib.util.find_spec("torch_xla") is None:
            raise RuntimeError(
                "torch-xla is not installed, without which no graph can be lowered: it exists for Linux on x86-64 "
                "alone. Everything else in this series works without it"
            )
        ours, theirs = multiprocessing.Pipe()
        self.connection, self.errors = ours, tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the child)
        self.lock, self.released = threading.Lock(), []
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "inf2.recording", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=DEFAULTS
            | os.environ
            | ENVIRONMENT
            | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            start_new_session=True,  # Ctrl-C reaches it through this process, which ends it
        )
        theirs.close()

    def call(self, name, *arguments):
        """What the method `name` of the child's ``Recorder`` returns; what it raises is a `RuntimeError` here."""
        with self.lock:
            released = [self.released.pop() for _ in range(len(self.released))]
            try:
                call = pack((name, arguments, released))
            except Exception as error:
                reason = str(error).strip().splitlines()[0]
                raise RuntimeError(f"cannot be lowered: the module cannot be pickled, {reason}") from None
            try:
                self.connection.send(sys.path)  # what a module comes from may have been added since
                self.connection.send_bytes(call)
                answer = self.connection.recv_bytes()
            except (EOFError, OSError):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout=5)  # for the status of its own
                self.end()
                raise RuntimeError(f"cannot be lowered: it ended the process {self._last_words()}") from None
            except BaseException:
                self.end()
                raise
        right, value = unpack(answer)
        if not right:
            raise RuntimeError(value[0] + place_in_python(value[1]))
        return value

    def end(self):
        """End the child; the next call starts another."""
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def _last_words(self):
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"with status {self.process.returncode}" + (f": {lines[-1][-300:]}" if lines else "")


def _begin():
    """What a process starts with; a forked one leaves its parent's child alone."""
    global _running, _starting
    _running, _starting = [], threading.Lock()


_begin()
os.register_at_fork(after_in_child=_begin)


def xla_process():
    """The one child of this process: a new one where the last has ended."""
    with _starting:
        if not _running or _running[0].process.poll() is not None:
            _running[:] = [XlaProcess()]
        return _running[0]
