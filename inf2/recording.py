"""The child process, ``python -m inf2.recording FILE_DESCRIPTOR``: torch-xla records modules there, and runs graphs.

It records as ``torch_neuronx.trace`` does: tensors of the inputs and the module on XLA's device, one call, then
``LoweringContext.build`` of its results. `inf2.lowering` has the environment that is set for it.
"""

import collections
import json
import os
import re
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection

import torch
import torch_xla
from inf2 import hlo as hlo_module
from inf2.files import sha256
from inf2.hlo import HloValue, instructions_of, types_of
from inf2.messages import hash_code, pack, unpack
from inf2.operators import OURS, TORCH, Operators, exceeds_int32, find_place, layers_of
from inf2.stand_in import quiet_properties
from inf2.tensors import describe
from inf2.trees import describe_nested, flatten, named_results, unflatten
from torch import nn
from torch_xla.debug import metrics


class Recorder:
    """Lowers modules and runs their graphs. A graph is kept with its weights on XLA's device until it is released."""

    def __init__(self):
        self.graphs, self.count, self.layers = {}, 0, {}

    def lower(self, module, examples, aliases, code):
        """Record a module for each of `examples`; the fields of `inf2.lowering.Lowered`, but ``inputs``.

        None where `code` says that a class of the module is another here than in the process that asks.
        """
        if hash_code(module) != code:
            return None
        device = torch.device("xla")
        self.layers = layers_of(module)
        names = list(describe_nested(module, examples[0]))
        examples = [flatten(inputs) for inputs in examples]
        owners = move_module(device, module, aliases)
        moved = [(list(move_tensor(device, tensor) for tensor in inputs), structure) for inputs, structure in examples]
        recorded = [record(module, inputs, structure, owners, self.layers) for inputs, structure in moved]
        context, inputs, results, constants, operators = recorded[0]
        graph = json.loads(context.hlo_json())
        used, read = hlo_module.used_instructions(graph)
        hlo_module.drop_unused(graph, used)
        places = hlo_module.name_operators(graph, operators)
        by_number = dict(context.device_parameter_id_tensor_mapping())
        owned = [*(("input", n, t) for n, t in zip(names, inputs, strict=True)), *owners]
        slots = [context.tensor_parameter_id(tensor) for *_, tensor in owned]
        parameters = [
            HloValue("constant", f"constant {n}", *type_and_size(by_number[n])) for n in range(len(by_number))
        ]
        for (kind, name, tensor), slot in zip(owned, slots, strict=True):
            if slot >= 0:
                parameters[slot] = HloValue(kind, name, *type_and_size(tensor))
        proto = hlo_module.without_unused(context.hlo(), used)
        input_slots = slots[: len(inputs)]
        state_slots = [slot for (kind, *_), slot in zip(owned, slots, strict=True) if kind == "state"]
        key = self._keep(proto, by_number, input_slots, state_slots, device)
        pairs = [(aliases[p], slot) for p, slot in zip(aliases, state_slots, strict=True) if slot >= 0]
        proto = hlo_module.with_aliases(proto, pairs)
        unused = [
            f"{kind} {name}"
            for (kind, name, _), slot in zip(owned, slots, strict=True)
            if kind != "weight" and slot not in read
        ]
        trained = {slot for (*_, tensor), slot in zip(owned, slots, strict=True) if isinstance(tensor, nn.Parameter)}
        return {
            "text": text_of(proto),
            "proto": proto,
            "parameters": tuple(parameters),
            "results": tuple(
                HloValue("state" if i in aliases.values() else "output", f"result {name}", *of_type)
                for i, (name, of_type) in enumerate(results)
            ),
            **facts_of(graph, operators),
            "where": places,
            "on_host": operators.on_host,
            "calls": operators.calls,
            "random": operators.random,
            "host_tensors": operators.host_tensors,
            "constants": tuple(constants),
            "beyond_32_bits": tuple(p.name for n, p in enumerate(parameters) if exceeds_int32(by_number[n].cpu())),
            "unused": tuple(unused),
            "twice": duplicate_weights(parameters, by_number, trained),
            "fingerprints": tuple(fingerprint(context, inputs, owners) for context, inputs, *_ in recorded),
            "outputs": tuple(self.run(key, inputs, None) for inputs, _ in examples),
            "key": key,
        }

    def _keep(self, proto, *whereabouts):
        self.count += 1
        key = f"{os.getpid()}_{self.count}"  # never that of a graph in an earlier process
        self.graphs[key] = computation_of(f"graph{key}", proto), *whereabouts
        return key

    def run(self, key, inputs, state):
        """Run a graph: a tuple of results on the CPU. State None leaves the state as the module had it."""

        if key not in self.graphs:
            raise RuntimeError("the process that held this graph has ended: lower the module again")
        computation, by_number, slots, state_slots, device = self.graphs[key]
        arguments = dict(by_number)
        given = [*zip(slots, inputs, strict=True), *zip(state_slots if state else (), state or (), strict=True)]
        arguments |= {slot: tensor.to(device) for slot, tensor in given if slot >= 0}
        ordered = [arguments[number] for number in range(len(arguments))]
        results = torch_xla._XLAC._xla_user_computation(f"xla::graph{key}", ordered, computation)
        torch_xla._XLAC._xla_sync_multi(list(results), [str(device)], wait=True, sync_xla_data=True)
        return tuple(result.cpu() for result in results)

    def release(self, key):
        """Forget a graph that nobody holds any more."""
        self.graphs.pop(key, None)


def computation_of(name, proto):
    """What XLA makes of a serialized ``HloModuleProto``; it fails on one that is not well formed."""

    return torch_xla._XLAC._xla_op_computation_from_module_proto(name, proto)


def text_of(proto):
    """HLO as text, without metadata, which names files of this machine."""

    text = torch_xla._XLAC._xla_computation_text(computation_of("graph", proto))
    return re.sub(r", metadata=\{[^}]*\}", "", text)


def facts_of(graph, operators):
    """What a graph in JSON consists of: its operators counted, those of dynamic shape, its element types."""
    instructions = instructions_of(graph)
    return {
        "operators": dict(collections.Counter(i["opcode"] for i in instructions).most_common()),
        "dynamic": tuple(dict.fromkeys(i["opcode"] for i in instructions if hlo_module.is_dynamic(i))),
        "types": tuple(dict.fromkeys(name for i in instructions for name in types_of(i, operators))),
    }


def move_tensor(device, tensor):
    """On torch-xla equal numbers share their data, and in a graph they would be one parameter: each gets its own."""
    return tensor.to(device) if tensor.dim() else tensor[None].to(device)[0].clone()


def move_module(device, module, aliases):
    """Move a module, in place; ``Module.to`` would give each use of a tied weight a copy of its own.

    Returns (kind, name, tensor on the device) for each of its tensors, the state in the order of the aliases.
    """
    names = {id(t): name for name, t in [*module.named_parameters(), *module.named_buffers()]}
    state, moved = [id(parameter) for parameter in aliases], {}
    originals = []
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                originals.append(tensor)  # while it lives, its id is not another's
                if id(tensor) not in moved:
                    there = move_tensor(device, tensor.detach())
                    parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(there, requires_grad=False) if parameter else there
                tensors[name] = moved[id(tensor)]
    weights = [("weight", names[i], tensor) for i, tensor in moved.items() if i not in state]
    return weights + [("state", names[i], moved[i]) for i in state]


def record(module, inputs, structure, owners, layers):
    """Run a module on XLA tensors, which records its graph: the context of the graph, and what happened meanwhile."""

    # A number that is not on the device yet would become a constant; until it is there its handle may still change.
    torch_xla.sync(wait=True)
    metrics.clear_all()
    before = [tensor._version for *_, tensor in owners]
    given = [tensor.clone() for tensor in inputs]  # which it may write to
    with Operators(metrics, layers, given, [tensor for *_, tensor in owners]) as operators:
        outputs = module(*unflatten(given, structure))
    for (kind, name, tensor), version in zip(owners, before, strict=True):
        if tensor._version != version:
            raise ValueError(f"{kind} {name} is written in forward: {_about_writing(module, name)}")
    results, constants = [], []
    for name, result in named_results(outputs):
        if isinstance(result, bool | int | float | str):
            constants.append(name)
        elif not isinstance(result, torch.Tensor):
            raise ValueError(f"result {name} is {describe(result)}, which no graph returns: return its tensors")
        elif result.device.type != "xla":
            raise ValueError(f"result {name} is {describe(result)} that was computed on the host, and in no graph")
        else:
            results.append((name, result))
    if not results:
        raise ValueError("no tensor is returned: return one or more")
    context = torch_xla._XLAC.lowering.LoweringContext()
    context.build([result for _, result in results])
    # Only their types: results that live on would be computed at the next sync.
    return context, inputs, [(name, type_and_size(result)) for name, result in results], constants, operators


def _about_writing(module, name):
    """What to do about a tensor of a module that its forward writes to."""
    layer = module.get_submodule(name.rpartition(".")[0])
    if layer.training and isinstance(layer, nn.modules.batchnorm._NormBase):
        return f"{type(layer).__name__} {name.rpartition('.')[0]} is in training mode, call eval() before"
    return "return its new value, with an alias, or it is lost"


def type_and_size(tensor):
    """A tensor's type in words, and its bytes."""
    return describe(tensor), tensor.numel() * tensor.element_size()


def duplicate_weights(parameters, tensors, trained):
    """Pairs of names of matrices with the same values, unless they hold one number only, such as zeros.

    Vectors may be alike: two biases that are added up get the same gradients. So may tables that nobody trained: only
    the parameters numbered `trained` are compared.
    """
    seen, pairs = {}, []
    for number, parameter in enumerate(parameters):
        if parameter.kind == "weight" and number in trained:
            values = tensors[number].cpu()
            if values.dim() > 1 and values.numel() and (values != values.flatten()[0]).any():
                digest = sha256(values)
                if digest in seen:
                    pairs.append((seen[digest], parameter.name))
                seen.setdefault(digest, parameter.name)
    return tuple(pairs)


def fingerprint(context, inputs, owners):
    """A hash of the graph with its constants, those among its parameters included; not of names and lines of Python."""
    graph = json.loads(context.hlo_json())
    known = {context.tensor_parameter_id(tensor) for tensor in [*inputs, *(tensor for *_, tensor in owners)]}
    tensors = context.device_parameter_id_tensor_mapping()
    constants = {number: sha256(tensors[number]) for number in tensors if number not in known}
    for instruction in instructions_of(graph):
        instruction.pop("metadata", None)
    return sha256([graph["computations"], sorted(known), constants])


def place_of(error, layers):
    """Where an error came up, in a module that was called."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    outside = [frame for frame, _ in frames if not frame.f_code.co_filename.startswith((TORCH, OURS))]
    place = find_place(layers, frames[-1][0])
    if not outside:
        return place
    lines = {id(frame): line for frame, line in frames}
    code = outside[-1].f_code
    return place._replace(file=code.co_filename, line=lines[id(outside[-1])], function=code.co_qualname)


def answer_calls(file_descriptor):
    """Take one call after another, each a pickled (name, arguments, released graphs), until the other side is gone."""
    connection, recorder = Connection(file_descriptor), Recorder()
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    while True:
        try:
            sys.path[:] = connection.recv()
            call = connection.recv_bytes()
        except EOFError:
            return
        try:
            name, arguments, released = unpack(call)
            for key in released:
                recorder.release(key)
            with torch.no_grad(), quiet_properties():
                answer = True, getattr(recorder, name)(*arguments)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            answer = False, (f"cannot be lowered: {type(error).__name__}: {reason}", place_of(error, recorder.layers))
        connection.send_bytes(pack(answer))


def end_with(parent):
    """A module that never comes back would keep the child alive when nobody waits for it any more."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    answer_calls(int(sys.argv[1]))
