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
    **{f"F8{kind}": f"float8_{kind.lower()}" for kind in ("E4M3FN", "E5M2", "E4M3FNUZ", "E5M2FNUZ", "E4M3B11FNUZ")},
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


def types_of(instruction, operators):
    """As `element_types`; where no float64 was in Python it is torch-xla's, which compares with a number in float64."""
    return [
        f"{name} number" if name == "float64" and not operators.float64 else name for name in element_types(instruction)
    ]


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
    """Name apart what neuronx-cc treats apart, see `special_name`, and say where everything comes from.

    `operators` has, for lines of Python (file, number), the ``places`` of the aten operators called there. Returns for
    each operator and element type of a graph the `Place` of the first line that it comes from, outside of torch.
    """
    index, places = hlo.get("stackFrameIndex", {}), {}
    by_id = {instruction["id"]: instruction for instruction in instructions_of(hlo)}
    roots = {computation["id"]: by_id[computation["rootId"]] for computation in hlo["computations"]}
    for instruction in by_id.values():
        number, place = instruction.get("metadata", {}).get("stackFrameId"), None
        while number and not place:  # from the innermost frame outwards
            frame = index["stackFrames"][number - 1]
            location = index["fileLocations"][frame["fileLocationId"] - 1]
            line = index["fileNames"][location["fileNameId"] - 1], location["line"]
            place, number = line if line in operators.places else None, frame.get("parentFrameId")
        called = operators.places.get(place, {})
        name = special_name(instruction, by_id, roots, called)
        types = types_of(instruction, operators)
        instruction["opcode"] = name or instruction["opcode"]
        if place:
            aten = instruction["metadata"].get("opType", "").replace("__", "::")
            for name in (instruction["opcode"], *types):
                places.setdefault(name, called.get(aten) or next(iter(called.values())))
    return places


def special_name(instruction, by_id, roots, called):
    """A name of its own for an operator that is not like others with its opcode, else None.

    A sort of integers, or of more than 16,384 numbers, and one that comes from topk, in floating point; a product or
    power of integers; a scatter that computes with integers; dilated windows; shifts that are not of 32 bits; the
    lookup of int64; a literal beyond 32 bits; a reduction of several tensors at once.
    """
    opcode, types = instruction["opcode"], element_types(instruction)
    operands = [by_id[number] for number in instruction.get("operandIds", ())]
    first = element_types(operands[0])[0] if operands else ""
    window = instruction.get("window", {}).get("dimensions", ())
    wide = {key: any(int(d.get(key, 1)) > 1 for d in window) for key in ("baseDilation", "windowDilation", "stride")}
    if opcode == "sort" and "float" in types[0]:
        longest = max(int(shapes_of(instruction)[0]["dimensions"][int(d)]) for d in instruction["dimensions"])
        return "topk" if "aten::topk" in called else "long sort" if longest > LONGEST_SORT else None
    if opcode == "sort" and "int" in types[0]:
        return "integer sort"
    if opcode == "reduce" and len(types) > 1:
        return "variadic reduce"
    if opcode == "reduce-window" and len(operands) != 2:
        return "variadic reduce-window"
    if opcode == "reduce-window" and (wide["baseDilation"] or wide["windowDilation"]):
        return "dilated reduce-window"
    if opcode == "convolution" and wide["baseDilation"] and (wide["windowDilation"] or wide["stride"]):
        return "doubly dilated convolution" if wide["windowDilation"] else "strided convolution of dilated input"
    if opcode in ("dot", "power") and first in ("int64", "uint64"):
        return f"int64 {opcode}"
    if opcode == "dot" and "int" in first:
        return "integer dot"
    if opcode == "shift-right-arithmetic" and first not in ("int32", "uint32"):
        return "shift-right-arithmetic not of 32 bits"
    if opcode == "gather" and first == "int64" and element_types(operands[1])[0] == "int64":
        return "int64 gather"
    if opcode == "scatter" and "float" not in types[0]:
        computes = roots[instruction["calledComputationIds"][0]]["opcode"]
        return f"integer scatter with {computes}" if computes in SCATTERS else None
    if opcode == "constant" and types[0] in _RANGES:
        values = {int(value) for key in ("s64s", "u64s") for value in instruction.get("literal", {}).get(key, ())}
        lowest, highest = _RANGES[types[0]]
        return None if all(lowest <= value <= highest for value in values - _NO_BOUND) else "constant beyond 32 bits"
    return None


LONGEST_SORT = 16384
SCATTERS = ("add", "multiply", "minimum", "maximum", "and", "or")
_RANGES = {"int64": (-(2**31), 2**31 - 1), "uint64": (0, 2**32 - 1)}
_NO_BOUND = {-(2**63), 2**63 - 1, 2**64 - 1}  # where a maximum or minimum starts


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
