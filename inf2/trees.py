"""Nested inputs and outputs: tuples, lists, dicts and output objects of tensors, flattened in one order and named."""

import dataclasses
from collections.abc import Mapping

import torch
from inf2.tensors import check_example, describe, input_names
from torch.utils import _pytree as pytree


def flatten(inputs):
    """A call's inputs as a list of their tensors, and the structure that `unflatten` puts them back into."""
    return pytree.tree_flatten(tuple(inputs))


def unflatten(tensors, structure):
    """The inputs that `flatten` took apart."""
    return pytree.tree_unflatten(list(tensors), structure)


def leaves_of(value, name):
    """Pairs of a name such as ``past[0][1]`` and what is there, in the order of `flatten`.

    transformers' output objects are mappings; an entry that is None is none of theirs.
    """
    if isinstance(value, Mapping):
        parts = [(f"{name}[{key}]" if name else str(key), part) for key, part in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = [(f"{name}.{key}" if name else key, part) for key, part in zip(value._fields, value, strict=True)]
    elif isinstance(value, tuple | list):
        parts = [(f"{name}[{key}]" if name else str(key), part) for key, part in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        keys = [field.name for field in dataclasses.fields(value)]
        parts = [(f"{name}.{key}" if name else key, getattr(value, key)) for key in keys]
    else:
        return [(name, value)]
    return [leaf for key, part in parts for leaf in leaves_of(part, key)]


def named_results(outputs):
    """What a module returns as pairs of name and value; entries that are None are left out."""
    results = [("0", outputs)] if isinstance(outputs, torch.Tensor) else leaves_of(outputs, "")
    return [(name, value) for name, value in results if value is not None]


def describe_nested(module, inputs):
    """As `describe_inputs`, for inputs that may be nested: ``{"pair[0]": "float32 [2, 4]"}``."""
    names = input_names(module, len(inputs))
    leaves = [leaf for name, value in zip(names, inputs, strict=True) for leaf in leaves_of(value, name)]
    return {name: describe(leaf) for name, leaf in leaves}


def check_nested(module, inputs, aliases):
    """As `check_example`, for inputs of which each is a tensor or a tuple, list or dict of tensors, nested or not."""
    if isinstance(inputs, torch.Tensor) or not isinstance(inputs, tuple | list) or not inputs:
        return check_example(module, inputs, aliases)
    names = input_names(module, len(inputs))
    for name, value in zip(names, inputs, strict=True):
        for path, leaf in leaves_of(value, name):
            if not isinstance(leaf, torch.Tensor):
                raise ValueError(
                    f"example input {path} is {describe(leaf)}: only tensors cross the trace boundary; give a "
                    f"wrapper's forward the tensors alone, and set {path} inside"
                )
    return tuple(inputs), check_example(module, flatten(inputs)[0], aliases)[1]
