"""A module compiled by OpenVINO for the CPU at hand: a real compiler under the rules that the stand-in keeps.

What comes out is TorchScript around one operator, ``inf2::openvino``, as what comes out of ``torch_neuronx.trace`` is
around one of Neuron's: saved, loaded and refused in the same way. The file holds OpenVINO's portable form of the
module, its IR, so that it is compiled where it is loaded. Where this module was imported, ``torch.jit.load`` reads it.

Facts about OpenVINO come from its documentation, https://docs.openvino.ai/2026, and were measured with 2026.4.1.
"""

import importlib.util
import os
import sys
import tempfile
import threading
from pathlib import Path

import torch
from inf2.rounding import ImitatedAutoCast
from inf2.stand_in import checked_trace, quiet_properties
from inf2.tensors import as_tuple, describe
from torch import nn

DTYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "boolean": torch.bool,
}
_turns = threading.Lock()  # to compile; two first calls of a graph would both do it


def import_openvino():
    """The package, without what it sends to its makers when it is imported and when it converts.

    Raises
    ------
    ValueError
        If it is not installed.
    """
    if importlib.util.find_spec("openvino") is None:
        raise ValueError('OpenVINO is not installed: pip install "openvino>=2026.4,<2027"')
    hidden = "openvino" not in sys.modules and "openvino_telemetry" not in sys.modules
    if hidden:
        sys.modules["openvino_telemetry"] = None  # openvino has a stub in its place
    try:
        import openvino
    finally:
        if hidden:
            del sys.modules["openvino_telemetry"]
    return openvino


class StateAsInputs(nn.Module):
    """A module whose state is handed to it, behind its inputs, and comes back behind its outputs."""

    def __init__(self, module, aliases):
        super().__init__()
        self.module = module
        self.parameters_of_state, self.indices = list(aliases), list(aliases.values())

    def forward(self, *tensors):
        inputs = tensors[: len(tensors) - len(self.indices)]
        for parameter, given in zip(self.parameters_of_state, tensors[len(inputs) :], strict=True):
            # Whoever reads the Parameter, and by whatever name: the trace has the input in its place.
            torch._C._set_value_trace(parameter, torch._C._get_value_trace(given))
        outputs = as_tuple(self.module(*inputs))
        returned = [output for i, output in enumerate(outputs) if i not in self.indices]
        return (*returned, *(outputs[i] for i in self.indices))


class OnOpenVino(nn.Module):
    """A call of the operator, to be traced: inputs as the module's, its real outputs alone.

    ``state`` is what the graph keeps, as Parameters.
    """

    def __init__(self, network, weights, state, alone):
        super().__init__()
        self.register_buffer("network", network)
        self.register_buffer("weights", weights)
        self.state = nn.ParameterList(nn.Parameter(value.clone(), requires_grad=False) for value in state)
        self.alone = alone

    def forward(self, *inputs):
        outputs = torch.ops.inf2.openvino(self.network, self.weights, list(self.state), list(inputs))
        return outputs[0] if self.alone else tuple(outputs)


def trace_for_openvino(module, example_inputs, aliases, compiler_args=()):
    """Convert a module to OpenVINO's IR, and compile that for this CPU behind the checks of the stand-in.

    ``--auto-cast matmult`` or ``all`` to bf16 in `compiler_args` is OpenVINO's hint to compute in that type, which is
    nearer to ``all``; state stays in its own dtype between calls. With AVX-512 but without its bf16 instructions bf16
    is imitated; a CPU without AVX-512 computes in fp32, says the documentation. Where the module says int64, OpenVINO
    counts in 32 bits: what is larger comes out wrong.

    Raises
    ------
    ValueError
        If OpenVINO cannot convert the module, or makes other shapes of its outputs than PyTorch; if `compiler_args`
        cast to fp16.
    """
    cast = ImitatedAutoCast(compiler_args)
    if cast.cast != "none" and cast.dtype != torch.bfloat16:
        raise ValueError("--auto-cast-type is fp16; OpenVINO is asked for fp32 or bf16: pass one of them")
    precision = "f32" if cast.cast == "none" else "bf16"
    outputs, model = _convert(module, example_inputs, aliases)
    alone = len(outputs) - len(aliases) == 1 if aliases else isinstance(outputs, torch.Tensor)
    changed, parted = _part_from_inputs(import_openvino(), model, len(example_inputs), len(aliases))
    for name, value in (("precision", [precision]), ("changed", changed), ("parted", parted)):
        model.set_rt_info(" ".join(map(str, value)), ["inf2", name])
    graph = OnOpenVino(*_serialize(model), list(aliases), alone)
    return checked_trace(graph.train(module.training), module, example_inputs, list(graph.state))


def _convert(module, example_inputs, aliases):
    """What the module returns for the example, its state last, and OpenVINO's model of it."""
    openvino = import_openvino()
    whole = StateAsInputs(module, aliases).eval() if aliases else module
    tensors = (*example_inputs, *(parameter.clone() for parameter in aliases))
    with quiet_properties():
        traced = torch.jit.trace(whole, tensors, check_trace=False)
    outputs = traced(*(tensor.clone() for tensor in tensors))
    if not all(isinstance(output, torch.Tensor) for output in as_tuple(outputs)):
        raise ValueError(f"{type(module).__name__} returns {describe(outputs)}: return a tensor or a tuple of tensors")
    shapes = [openvino.PartialShape(list(tensor.shape)) for tensor in tensors]
    try:
        with quiet_properties():
            model = openvino.convert_model(traced, input=shapes, example_input=tensors)
        _as_pytorch(openvino, model, tensors, as_tuple(outputs))
    except ValueError:
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if "No conversion rule" in line), str(error))
        raise ValueError(
            f"OpenVINO cannot convert {type(module).__name__}: {reason.strip()[:300]}; trace it with backend='cpu'"
        ) from error
    return outputs, model


def _as_pytorch(openvino, model, inputs, outputs):
    """Give a model's inputs and outputs the dtypes that PyTorch's have; a `ValueError` where the shapes are others."""
    if (len(model.inputs), len(model.outputs)) != (len(inputs), len(outputs)):
        raise ValueError(
            f"OpenVINO makes {len(model.inputs)} inputs and {len(model.outputs)} outputs of {len(inputs)} and "
            f"{len(outputs)}; trace it with backend='cpu'"
        )
    processed = openvino.preprocess.PrePostProcessor(model)
    for ports, tensors, side in ((model.inputs, inputs, processed.input), (model.outputs, outputs, processed.output)):
        for i, (port, tensor) in enumerate(zip(ports, tensors, strict=True)):
            if port.partial_shape.is_dynamic or list(port.shape) != list(tensor.shape):
                raise ValueError(
                    f"number {i} of the module's {'in' if ports is model.inputs else 'out'}puts is {describe(tensor)}, "
                    f"OpenVINO makes it {port.partial_shape}; trace it with backend='cpu'"
                )
            if DTYPES.get(port.element_type.get_type_name()) != tensor.dtype:
                name = next((name for name, dtype in DTYPES.items() if dtype == tensor.dtype), None)
                if name is None:
                    raise ValueError(f"OpenVINO has no {describe(tensor)}; trace it with backend='cpu'")
                side(i).tensor().set_element_type(getattr(openvino.Type, name))
    processed.build()


def _part_from_inputs(openvino, model, inputs, states):
    """Take the outputs away that hand a state through as it is, and part the others from an input they are.

    OpenVINO writes anything, even into the input, where an output in memory of ours is an input as it is. Such a one
    gets a dimension in front here. Returns the numbers of the states that a call changes, and of those outputs.
    """
    changed, parted, kept = [], [], 0
    parameters, results = model.get_parameters(), model.get_results()
    places = {parameter.get_friendly_name(): i for i, parameter in enumerate(parameters)}
    for i, result in enumerate(results):
        source, state = result.input_value(0), i - (len(results) - states)
        place = places.get(source.get_node().get_friendly_name())
        if state >= 0 and place == inputs + state:
            model.remove_result(result)
            continue
        if state >= 0:
            changed.append(state)
        if place is not None:
            front = openvino.opset13.unsqueeze(source, openvino.opset13.constant(0))
            result.input(0).replace_source_output(front.output(0))
            parted.append(kept)
        kept += 1
    model.validate_nodes_and_infer_types()
    return changed, parted


def _serialize(model):
    """A model's IR: the network and its weights, as two tensors of bytes, uint8."""
    openvino = import_openvino()
    with tempfile.TemporaryDirectory() as directory:
        paths = Path(directory, "ir.xml"), Path(directory, "ir.bin")
        openvino.serialize(model, *paths)
        # A byte more, since nothing can be made of an empty file.
        return tuple(torch.frombuffer(bytearray(path.read_bytes() + b"\n"), dtype=torch.uint8) for path in paths)


class Compiled:
    """An IR compiled for this CPU, with the memory of its state: Parameters whose values it reads and replaces.

    Each state that a call changes has two places in memory. A call reads one and writes the other, which then is the
    Parameter's: nothing is copied. Calls take turns; each uses as many threads as PyTorch had when this was made.
    """

    def __init__(self, network, weights, state):
        openvino = import_openvino()
        core = openvino.Core()
        model = core.read_model(network.numpy().tobytes(), openvino.Tensor(weights.numpy(), shared_memory=True))
        config = {
            "INFERENCE_PRECISION_HINT": model.get_rt_info(["inf2", "precision"]).value,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # pinned threads of two processes would wait for each other
        }
        self.openvino, self.process, self.turn = openvino, os.getpid(), threading.Lock()
        self.compiled = core.compile_model(model, "CPU", config)
        numbers = {name: model.get_rt_info(["inf2", name]).value.split() for name in ("changed", "parted")}
        self.changed, self.parted = (list(map(int, some)) for some in numbers.values())
        ports = self.compiled.outputs
        self.returned = [(list(port.shape), DTYPES[port.element_type.get_type_name()]) for port in ports]
        self.returned = self.returned[: len(ports) - len(self.changed)]
        self.bind(state)

    def bind(self, state):
        """Two requests: one reads the Parameters' memory and writes the other place, one the other way round."""
        first = len(self.compiled.inputs) - len(state)
        here = [parameter.detach() for parameter in state]
        there = [torch.empty_like(value) if i in self.changed else value for i, value in enumerate(here)]
        self.places, self.requests = (here, there), []
        for read, written in ((here, there), (there, here)):
            request = self.compiled.create_infer_request()
            for i, value in enumerate(read):
                request.set_input_tensor(first + i, self.shared(value))
            for i, which in enumerate(self.changed):
                place = len(self.returned) + i
                value = written[which][None] if place in self.parted else written[which]
                request.set_output_tensor(place, self.shared(value))
            self.requests.append(request)
        self.now = 0

    def shared(self, tensor):
        """A tensor of OpenVINO's in the memory of one of PyTorch's."""
        if tensor.dtype == torch.bfloat16:  # which numpy has not
            shape = self.openvino.Shape(list(tensor.shape))
            return self.openvino.Tensor(tensor.view(torch.int16).numpy(), shape, self.openvino.Type.bf16)
        return self.openvino.Tensor(tensor.numpy(), shared_memory=True)

    def __call__(self, state, inputs):
        if os.getpid() != self.process:
            raise RuntimeError(
                f"this graph was compiled in process {self.process}, whose threads it needs: load it in process "
                f"{os.getpid()} as well"
            )
        with self.turn:
            read = self.places[self.now]
            if any(p.data_ptr() != value.data_ptr() for p, value in zip(state, read, strict=True)):
                self.bind(state)  # somebody gave a Parameter other memory
            request = self.requests[self.now]
            outputs = [torch.empty(shape, dtype=dtype) for shape, dtype in self.returned]
            for i, tensor in enumerate(inputs):
                request.set_input_tensor(i, self.shared(tensor.detach().contiguous()))
            for i, tensor in enumerate(outputs):
                request.set_output_tensor(i, self.shared(tensor))
            request.infer()
            if self.changed:
                self.now = 1 - self.now
                for which in self.changed:
                    state[which].set_(self.places[self.now][which])
            return [tensor[0] if i in self.parted else tensor for i, tensor in enumerate(outputs)]


def compiled_for(network, weights, state):
    """What was compiled of an IR: kept with its network, and gone with it."""
    if not hasattr(network, "compiled"):
        with _turns:
            if not hasattr(network, "compiled"):
                network.compiled = Compiled(network, weights, state)
    return network.compiled


def compile_loaded(traced):
    """Compile what was loaded, if it is OpenVINO's: otherwise its first call does it."""
    for _, graph in traced.named_children():
        if "network" in dict(graph.named_buffers(recurse=False)):
            compiled_for(graph.network, graph.weights, list(graph.parameters()))


def _run(network, weights, state, inputs):
    with torch.inference_mode(False):
        return compiled_for(network, weights, state)(state, inputs)


library = torch.library.Library("inf2", "DEF")
library.define("openvino(Tensor network, Tensor weights, Tensor(a!)[] state, Tensor[] inputs) -> Tensor[]")
library.impl("openvino", _run, "CPU")
