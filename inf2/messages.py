"""What this process and the one that runs torch-xla say to each other: pickled calls, and the code that they share."""

import contextlib
import importlib.machinery
import inspect
import io
import marshal
import os
import sys
import types

import cloudpickle
import torch
from inf2.files import sha256
from torch import nn
from torch.nn.utils import parametrize


class _Pickler(cloudpickle.Pickler):
    """Of what another process cannot import the code travels along, with the names of its files."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.by_value, self.importable = [], {}

    def reducer_override(self, value):
        if isinstance(value, types.CodeType):  # cloudpickle leaves out the file
            return marshal.loads, (marshal.dumps(value),)
        if isinstance(value, nn.Module) and parametrize.is_parametrized(value):
            names = [name for name in value.parametrizations if name in vars(type(value))]
            return _parametrized, (type(value).__bases__[0], names), dict(vars(value)), None, None, _set_attributes
        if isinstance(value, type | types.FunctionType | types.ModuleType):
            self._travel_along(value)
        return super().reducer_override(value)

    def _travel_along(self, value):
        module = value if inspect.ismodule(value) else sys.modules.get(getattr(value, "__module__", None) or "")
        if module is None or module.__name__ in ("__main__", "builtins") or not getattr(module, "__file__", None):
            return
        if module.__name__ not in self.importable:
            self.importable[module.__name__] = _is_importable(module)
            if not self.importable[module.__name__]:
                with contextlib.suppress(ValueError):  # it is not in sys.modules, and travels along in any case
                    cloudpickle.register_pickle_by_value(module)
                    self.by_value.append(module)

    def dump(self, value):
        try:
            return super().dump(value)
        finally:
            for module in self.by_value:
                cloudpickle.unregister_pickle_by_value(module)


def _is_importable(module):
    """Whether a process with the same ``sys.path`` finds the file that a module came from under its name."""
    root, _, rest = module.__name__.partition(".")
    found = importlib.machinery.PathFinder.find_spec(root)
    if found is None:
        return False
    return bool(rest) or os.path.realpath(found.origin or "") == os.path.realpath(module.__file__)


def _parametrized(base, names):
    """An empty module whose tensors `names` are parametrizations of others, as ``torch.nn.utils.parametrize`` makes."""
    module = base.__new__(base)
    module.__dict__["_parametrized_names"] = names
    return module


def _set_attributes(module, attributes):
    names = module.__dict__.pop("_parametrized_names")
    module.__dict__.update(attributes)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)


_PICKLE = types.SimpleNamespace(__name__="inf2.messages", Pickler=_Pickler, dumps=cloudpickle.dumps)


def pack(value):
    """Bytes of a value; classes of a notebook travel along, and those of a file that another process cannot import."""
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=_PICKLE)
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
