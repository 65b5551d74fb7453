"""HLO as a protobuf message and as JSON: what is edited, and what passes through unread."""

from conftest import Apply, Counter, X, needs_xla
from inf2 import lower_module
from inf2.hlo import _hlo_module, element_types, is_dynamic, used_instructions, with_aliases, without_unused


def ids_of(proto):
    return [str(i.id) for c in _hlo_module().FromString(proto).computations for i in c.instructions]


@needs_xla
def test_fields_that_are_not_named_pass_through():
    proto = lower_module(Apply(lambda self, x: (x * 2).softmax(-1)), X).proto
    ids = ids_of(proto)
    assert len(ids) > 5 and len(without_unused(proto, set(ids))) == len(with_aliases(proto, [])) == len(proto)


@needs_xla
def test_an_unused_instruction_is_taken_out():
    proto = lower_module(Apply(lambda self, x: x * 2 + 1), X).proto
    ids = ids_of(proto)
    assert ids_of(without_unused(proto, set(ids[1:]))) == ids[1:]


@needs_xla
def test_xla_reads_the_aliases_that_were_written():
    module = Counter()
    lowered = lower_module(module, X, input_output_aliases={module.total: 1})
    number = [p.kind for p in lowered.parameters].index("state")
    assert f"input_output_alias={{ {{1}}: ({number}, {{}}, must-alias) }}" in lowered.text.splitlines()[0]
    (entry,) = _hlo_module().FromString(lowered.proto).input_output_alias.entries
    assert (list(entry.output_shape_index), entry.parameter_number) == ([1], number)


def instruction(number, opcode, *operands, **more):
    shape = {"elementType": "F32", "dimensions": ["2"]}
    return {"id": number, "opcode": opcode, "shape": shape, "operandIds": list(operands), **more}


def test_only_what_a_result_depends_on_is_used():
    read, unread = instruction("1", "parameter"), instruction("2", "parameter", parameterNumber="1")
    kept, dead = instruction("3", "negate", "1"), instruction("4", "sort", "2")
    graph = {"entryComputationId": "9", "computations": [{"id": "9", "rootId": "3"}]}
    graph["computations"][0]["instructions"] = [read, unread, kept, dead]
    assert used_instructions(graph) == ({"1", "2", "3"}, {0})


def test_types_are_named_as_torch_names_them():
    number = {"shape": {"elementType": "F64"}}
    several = {"shape": {"tupleShapes": [{"elementType": "S64"}, {"elementType": "PRED"}]}}
    assert element_types(number) == ["float64 number"] and element_types(several) == ["int64", "bool"]
    assert is_dynamic({"shape": {"elementType": "F32", "isDynamicDimension": [False, True]}})
    assert not is_dynamic(several)
