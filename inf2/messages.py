"""What this process and the one that runs torch-xla say to each other: pickled calls, and the code that they share."""

import inspect
import io

import cloudpickle
import torch
from inf2.files import sha256


def pack(value):
    """Bytes of a value; classes of a notebook travel along."""
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=cloudpickle)
    return buffer.getbuffer()


def unpack(data):
    """The value that `pack` was given."""
    return torch.load(io.BytesIO(data), weights_only=False)


def hash_code(module):
    """A hash of the code of each class that a module is made of, to be compared between processes."""

    def tree(value):
        if inspect.iscode(value):
            return [value.co_code.hex(), value.co_names, tree(value.co_consts)]
        if isinstance(value, tuple | frozenset):
            return sorted(map(repr, value)) if isinstance(value, frozenset) else list(map(tree, value))
        return repr(value)

    classes = {type(part) for part in module.modules()}
    functions = {c: {n: inspect.unwrap(f) for n, f in vars(c).items() if inspect.isfunction(f)} for c in classes}
    # By name alone: a class that a function made has another qualified name on the other side.
    return sorted(
        [c.__module__, c.__name__, sha256({n: tree(f.__code__) for n, f in functions[c].items()})] for c in classes
    )
