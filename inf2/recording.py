"""The child process, ``python -m inf2.recording FILE_DESCRIPTOR``: torch-xla records modules there, and runs graphs."""

import collections
import json
import os
import re
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch_xla
from inf2 import hlo as hlo_module
from inf2.files import sha256
from inf2.hlo import HloValue, element_types, instructions_of
from inf2.messages import hash_code, pack, unpack
from inf2.stand_in import quiet_properties
from inf2.tensors import as_tuple, describe, input_names
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_xla.debug import metrics

_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_OURS = f"{Path(__file__).parent}{os.sep}"


class Recorder:
    """Lowers modules and runs their graphs. A graph is kept with its weights on XLA's device until it is released."""

    def __init__(self):
        self.graphs, self.count = {}, 0

    def lower(self, module, examples, aliases, code):
        """Record a module for each of `examples`; the fields of `inf2.lowering.Lowered`, but ``inputs``.

        None where `code` says that a class of the module is another here than in the process that asks.
        """
        if hash_code(module) != code:
            return None
        device = torch.device("xla")
        owners = move_module(device, module, aliases)
        recorded = [record(module, [move_tensor(device, tensor) for tensor in inputs], owners) for inputs in examples]
        context, inputs, results, operators = recorded[0]
        graph = json.loads(context.hlo_json())
        used, read = hlo_module.used_instructions(graph)
        hlo_module.drop_unused(graph, used)
        places = hlo_module.name_operators(graph, operators)
        by_number = dict(context.device_parameter_id_tensor_mapping())
        names = input_names(module, len(inputs))
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
        return {
            "text": text_of(proto),
            "proto": proto,
            "parameters": tuple(parameters),
            "results": tuple(
                HloValue("state" if i in aliases.values() else "output", f"result {i}", *t)
                for i, t in enumerate(results)
            ),
            **facts_of(graph),
            "where": places,
            "on_host": {name: (*at, operators.functions[at]) for name, at in operators.on_host.items()},
            "unused": tuple(unused),
            "twice": duplicate_weights(parameters, by_number),
            "fingerprints": tuple(fingerprint(context, inputs, owners) for context, inputs, *_ in recorded),
            "outputs": tuple(self.run(key, inputs, None) for inputs in examples),
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


def facts_of(graph):
    """What a graph in JSON consists of: its operators counted, those of dynamic shape, its element types."""
    instructions = instructions_of(graph)
    return {
        "operators": dict(collections.Counter(i["opcode"] for i in instructions).most_common()),
        "dynamic": tuple(dict.fromkeys(i["opcode"] for i in instructions if hlo_module.is_dynamic(i))),
        "types": tuple(dict.fromkeys(name for i in instructions for name in element_types(i))),
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


def record(module, inputs, owners):
    """Run a module on XLA tensors, which records its graph: the context of the graph, and what happened meanwhile."""

    # A number that is not on the device yet would become a constant; until it is there its handle may still change.
    torch_xla.sync(wait=True)
    metrics.clear_all()
    before = [tensor._version for *_, tensor in owners]
    with Operators(metrics.counter_names) as operators:
        results = module(*[tensor.clone() for tensor in inputs])  # which it may write to
    for (kind, name, tensor), version in zip(owners, before, strict=True):
        if tensor._version != version:
            raise ValueError(f"{kind} {name} is written in forward: return its new value, with an alias, or it is lost")
    results = list(as_tuple(results))
    for i, result in enumerate(results):
        if not isinstance(result, torch.Tensor) or result.device.type != "xla":
            raise ValueError(f"result {i} is {describe(result)} that was computed on the host, and in no graph")
    context = torch_xla._XLAC.lowering.LoweringContext()
    context.build(results)
    # Only their types: results that live on would be computed at the next sync.
    return context, inputs, [type_and_size(result) for result in results], operators


class Operators(TorchDispatchMode):
    """Notes the lines of Python that operators come from, and which operators fell back to the host."""

    def __init__(self, counters):
        super().__init__()
        self.counters, self.functions, self.called, self.on_host = counters, {}, {}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename.startswith(_TORCH):
            frame = frame.f_back
        place = (frame.f_code.co_filename, frame.f_lineno) if frame else ("", 0)
        self.functions[place] = frame.f_code.co_qualname if frame else ""
        self.called.setdefault(place, set()).add(function._schema.name)
        given = [value for value in args if isinstance(value, torch.Tensor)]
        copied = isinstance(result, torch.Tensor) and result.device.type != "xla"
        if copied and any(tensor.device.type == "xla" for tensor in given):  # .cpu(), .tolist(), .numpy()
            self.on_host.setdefault("aten::_local_scalar_dense", place)
        for name in self.counters():
            if name.startswith("aten::"):
                self.on_host.setdefault(name, place)
        return result


def type_and_size(tensor):
    """A tensor's type in words, and its bytes."""
    return describe(tensor), tensor.numel() * tensor.element_size()


def duplicate_weights(parameters, tensors):
    """Pairs of names of matrices with the same values, unless they hold one number only, such as zeros.

    Vectors may be alike: two biases that are added up get the same gradients.
    """
    seen, pairs = {}, []
    for number, parameter in enumerate(parameters):
        if parameter.kind == "weight":
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
            codes = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
            places = [(c.co_filename, line, c.co_qualname) for c, line in codes]
            inside = [place for place in places if not place[0].startswith((_TORCH, _OURS))]
            answer = False, (f"cannot be lowered: {type(error).__name__}: {reason}", (inside or [None])[-1])
        connection.send_bytes(pack(answer))


def end_with(parent):
    """A module that never comes back would keep the child alive when nobody waits for it any more."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    answer_calls(int(sys.argv[1]))
