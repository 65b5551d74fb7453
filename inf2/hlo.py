"""HLO, the graph that neuronx-cc compiles: walked and named as JSON, cleaned and completed as a protobuf message.

Names and numbers of fields: xla/service/hlo.proto in https://github.com/openxla/xla.
"""

import functools
from dataclasses import dataclass

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_TYPES = {
    "PRED": "bool",
    "BF16": "bfloat16",
    "C64": "complex64",
    "C128": "complex128",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"S{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class HloValue:
    """A parameter or result of a lowered graph.

    Attributes
    ----------
    kind : str
        Of a parameter ``"input"``, ``"weight"``, ``"state"`` or ``"constant"`` (made while the graph was recorded), of
        a result ``"output"`` or ``"state"``.
    name : str
    type : str
        Such as ``float32 [1, 3, 64, 64]``.
    nbytes : int
    """

    kind: str
    name: str
    type: str
    nbytes: int


def instructions_of(hlo):
    """Every instruction of a graph in JSON, one computation after another."""
    return [instruction for computation in hlo["computations"] for instruction in computation["instructions"]]


def shapes_of(instruction):
    """The shapes of an instruction's result: one, or those of a tuple."""
    return instruction["shape"].get("tupleShapes", [instruction["shape"]])


def element_types(instruction):
    """Names of the element types of a result, such as ``float32``; a 0-dimensional float64 is a ``float64 number``."""
    named = [
        (_TYPES.get(shape["elementType"], shape["elementType"]), bool(shape.get("dimensions")))
        for shape in shapes_of(instruction)
    ]
    return [f"{name} number" if name == "float64" and not dims else name for name, dims in named]


def is_dynamic(instruction):
    """Whether a dimension of an instruction's result is not static."""
    return any(any(shape.get("isDynamicDimension", ())) for shape in shapes_of(instruction))


def used_instructions(hlo):
    """The ids, as text, of the instructions that a result depends on, and the numbers of the parameters among them.

    torch-xla records what nothing uses, such as the indices of a max pooling; torch_neuronx drops it. All parameters
    are kept: they are the signature of a computation.
    """
    computations = {computation["id"]: computation for computation in hlo["computations"]}
    instructions = {i["id"]: i for i in instructions_of(hlo)}
    used, waiting = set(), [computations[hlo["entryComputationId"]]["rootId"]]
    while waiting:
        number = waiting.pop()
        if number not in used:
            used.add(number)
            called = [computations[c]["rootId"] for c in instructions[number].get("calledComputationIds", ())]
            waiting += [*instructions[number].get("operandIds", ()), *called]
    parameters = {number for number, i in instructions.items() if i["opcode"] == "parameter"}
    entry = {i["id"] for i in computations[hlo["entryComputationId"]]["instructions"]}
    read = {int(instructions[number].get("parameterNumber", 0)) for number in used & parameters & entry}
    return used | parameters, read


def drop_unused(hlo, used):
    """Take the instructions that are not `used` out of a graph in JSON, and computations that have no result left."""
    for computation in hlo["computations"]:
        computation["instructions"] = [i for i in computation["instructions"] if i["id"] in used]
    hlo["computations"] = [c for c in hlo["computations"] if c["rootId"] in used]


def name_operators(hlo, operators):
    """Name apart what neuronx-cc may have an operator of its own for: a sort that comes from topk, in floating point,
    and a reduction of several tensors at once, such as of numbers and their indices.

    `operators` has, for lines of Python (file, number), the ``functions`` they are in and the aten operators
    ``called``. Returns for each operator and element type of a graph the first line that it comes from, outside of
    torch, as (file, number, function).
    """
    index, places = hlo.get("stackFrameIndex", {}), {}
    for instruction in instructions_of(hlo):
        number, place = instruction.get("metadata", {}).get("stackFrameId"), None
        while number and not place:  # from the innermost frame outwards
            frame = index["stackFrames"][number - 1]
            location = index["fileLocations"][frame["fileLocationId"] - 1]
            line = index["fileNames"][location["fileNameId"] - 1], location["line"]
            place, number = line if line in operators.functions else None, frame.get("parentFrameId")
        types = element_types(instruction)
        if instruction["opcode"] == "sort" and "aten::topk" in operators.called.get(place, ()) and "float" in types[0]:
            instruction["opcode"] = "topk"
        if instruction["opcode"] == "reduce" and len(types) > 1:
            instruction["opcode"] = "variadic reduce"
        if place:
            for name in (instruction["opcode"], *types):
                places.setdefault(name, (*place, operators.functions[place]))
    return places


_FIELDS = {
    "HloModule": [("computations", 3, "Computation"), ("input_output_alias", 8, "Aliases")],
    "Computation": [("instructions", 2, "Instruction"), ("root_id", 6, int)],
    "Instruction": [("id", 35, int)],
    "Aliases": [("entries", 1, "Alias")],
    "Alias": [("output_shape_index", 1, [int]), ("parameter_number", 2, int), ("kind", 4, int)],
}
_SINGLE, _MUST_ALIAS = ("input_output_alias",), 2


@functools.cache
def _hlo_module():
    """The protobuf class of ``HloModuleProto``, with the few fields named here; the others pass through unread."""
    file = descriptor_pb2.FileDescriptorProto(name="inf2/hlo.proto", package="inf2", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for message, fields in _FIELDS.items():
        described = file.message_type.add(name=message)
        for name, number, kind in fields:
            several = kind == [int] or (isinstance(kind, str) and name not in _SINGLE)
            field = described.field.add(name=name, number=number)
            field.label = kinds.LABEL_REPEATED if several else kinds.LABEL_OPTIONAL
            field.type = kinds.TYPE_MESSAGE if isinstance(kind, str) else kinds.TYPE_INT64
            if isinstance(kind, str):
                field.type_name = f".inf2.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inf2.HloModule"))


def without_unused(proto, used):
    """A serialized ``HloModuleProto`` with the instructions that are `used` alone, as `drop_unused` does with JSON."""
    module = _hlo_module().FromString(proto)
    for at, computation in reversed(list(enumerate(module.computations))):
        if str(computation.root_id) not in used:
            del module.computations[at]
            continue
        kept = [instruction for instruction in computation.instructions if str(instruction.id) in used]
        del computation.instructions[:]
        computation.instructions.extend(kept)
    return module.SerializeToString()


def with_aliases(proto, pairs):
    """The proto with ``input_output_alias``: which result becomes which parameter, as (result, parameter)."""
    module = _hlo_module().FromString(proto)
    for result, parameter in pairs:
        module.input_output_alias.entries.add(output_shape_index=[result], parameter_number=parameter, kind=_MUST_ALIAS)
    return module.SerializeToString()
