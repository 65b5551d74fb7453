"""What the check says: a sentence for each thing that is wrong with a graph, or only worth a remark."""

from inf2.lowering import place_in_python
from inf2.rules import (
    CONSTANT_BYTES,
    CONSTANT_BYTES_SOURCE,
    DYNAMIC_SHAPES,
    HOST_ON_WEIGHT,
    HOST_TENSORS,
    INT32,
    LISTS,
    MASKED_SLICE,
    REFUSED_OPERATORS,
    REFUSED_TYPES,
    REMEDIES,
    REPORTED_CALLS,
    REPORTED_OPERATORS,
    SPLIT,
    UNFOLD,
)

READ = "aten::_local_scalar_dense"


def graph_findings(lowered):
    """What is wrong with a graph by itself, whatever its results: yields a sentence each."""
    for name, place in lowered.on_host.items():
        if name != READ and place.reads:
            yield f"{name} runs on the host{place_in_python(place)}{_about_host(name, place)}"
    for operator in lowered.operators:
        if operator in REFUSED_OPERATORS:
            listed = REFUSED_OPERATORS[operator] in LISTS
            said = "is listed as unsupported" if listed else "is refused by neuronx-cc"
            yield _refused(operator, said, lowered, REFUSED_OPERATORS)
    for operator in lowered.dynamic:
        where = place_in_python(lowered.where.get(operator))
        yield f"{operator} has a dynamic shape{where}: use fixed sizes, with torch.where or padding ({DYNAMIC_SHAPES})"
    for name in lowered.types:
        if name in REFUSED_TYPES:
            yield _refused(name, "is no type of Inf2", lowered, REFUSED_TYPES)
    if "a slice that is masked in place" in lowered.calls:
        where = place_in_python(lowered.calls["a slice that is masked in place"])
        yield f"a slice is overwritten by its own masked_fill{where}, a compile error: use torch.where ({MASKED_SLICE})"
    drawn = list(random_findings(lowered))
    for name in () if drawn else lowered.beyond_32_bits:  # the state of random numbers has them
        yield f"{name} has an int64 beyond 32 bits, which Inf2 cuts: use smaller numbers ({INT32})"
    size = constant_bytes(lowered)
    if size > CONSTANT_BYTES:
        where = place_in_python(lowered.calls.get("aten::_to_copy"))
        yield (
            f"constants have {size / 1e9:.1f} GB{where}, and a graph at most 2: "
            f"register them as buffers ({CONSTANT_BYTES_SOURCE})"
        )
    for name in lowered.unused:
        yield f"{name} is in no result: torch_neuronx drops it or fails on it"
    for first, second in lowered.twice:
        yield f"{first} and {second} are one weight, and the graph holds it twice: assign one to the other"
    yield from drawn


def random_findings(lowered):
    """What draws random numbers, on Neuron or while the graph is recorded: yields a sentence each."""
    drawn = lowered.where.get("rng-bit-generator") or lowered.where.get("rng")
    for name, place in {**({"rng-bit-generator": drawn} if drawn else {}), **lowered.random}.items():
        layer = f"layer {place.layer}" if place.layer else "the module"
        draws = "draws random numbers" if drawn else f"draws random numbers on the host, with {name}"
        remedy = "call eval() before the trace if it is dropout, else make the numbers an input"
        yield f"{layer} {draws}{place_in_python(place._replace(layer=''))}: {remedy}"
        return


def result_findings(lowered, differing):
    """What the results say: findings where they are `differing` (a sentence) from eager, else notes."""
    found, notes = [], []
    read = lowered.on_host.get(READ)
    if read and differing and read.reads == "input":
        where = place_in_python(read)
        found.append(f"a value is read in Python while the graph is recorded, and becomes a constant{where}")
    elif read:
        said, so = _ABOUT_READING[read.reads]
        notes.append(f"{said} is read in Python{place_in_python(read)}{so}")
    for number, fingerprint in enumerate(lowered.fingerprints[1:], 2):
        if fingerprint != lowered.fingerprints[0]:
            said = f"example {number} gives another graph than example 1"
            if differing:
                found.append(f"{said}: a value of an input is a constant in it")
            else:
                notes.append(f"{said}, which gives eager's results for every example all the same")
            break
    split = lowered.calls.get("aten::split_with_sizes")
    if differing and split:
        differing += (
            f": split with unequal sizes{place_in_python(split)} is wrong without functionalization, as torch_neuronx "
            f"runs; use slices or torch.tensor_split ({SPLIT})"
        )
    return found + [differing] * bool(differing), notes


_ABOUT_READING = {
    "input": (
        "a value of an input",
        ": the graph of example 1 gives eager's results for every example; where it is a mask, trace with a padded "
        "example, as here, since a full one may leave the mask out",
    ),
    "weight": (
        "a value of a weight",
        ", and becomes a constant; torch-neuronx 2.9 may end the process on it: read it before the trace",
    ),
    "": ("a value that no input changes", ", and becomes a constant"),
}


def _about_host(name, place):
    if place.reads == "input":
        return " while the graph is recorded, and becomes a constant: use an operator that torch-xla has"
    remedy = next(remedy for words, remedy in UNFOLD.items() if words in f"{place.layer} {name}")
    return f" on a weight, where torch-neuronx 2.9 ends the process: {remedy} ({HOST_ON_WEIGHT})"


def graph_notes(lowered):
    """What is only reported of a graph: yields a sentence each."""
    for operator, (said, source) in REPORTED_OPERATORS.items():
        if operator in lowered.operators or operator in lowered.types:
            yield f"{operator} {said}{place_in_python(lowered.where.get(operator))} ({source})"
    for operator, (said, source) in REPORTED_CALLS.items():
        if operator in lowered.calls:
            yield f"{operator} {said}{place_in_python(lowered.calls[operator])} ({source})"
    for name, place in lowered.on_host.items():
        if name != READ and not place.reads:
            yield f"{name} runs on the host{place_in_python(place)} on what no input changes, and becomes a constant"
    if lowered.host_tensors:
        (name, place), *others = lowered.host_tensors.items()
        yield (
            f"{name}{f' and {len(others)} more' if others else ''}, made on the host, meets tensors of the device"
            f"{place_in_python(place)} and becomes a constant; torch_neuronx may refuse that: register it as a "
            f"buffer, or make it on an input's device ({HOST_TENSORS})"
        )
    if lowered.constants:
        yield f"result {', '.join(lowered.constants)} is no tensor: it stays what it is for example 1"


def constant_bytes(lowered):
    """Bytes of what is in a graph but is neither input, weight nor state: tensors of the host, and the graph itself."""
    return len(lowered.proto) + sum(p.nbytes for p in lowered.parameters if p.kind == "constant")


def _refused(name, said, lowered, sources):
    remedy = f": {REMEDIES[name]}" if name in REMEDIES else ""
    return f"{name} {said}{place_in_python(lowered.where.get(name))}{remedy} ({sources[name]})"
