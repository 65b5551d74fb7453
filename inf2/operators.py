"""What a module does while it is called: where its operators come from, which read what, what runs on the host."""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from inf2.tensors import describe
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TORCH = f"{Path(torch.__file__).parent}{os.sep}"
OURS = f"{Path(__file__).parent}{os.sep}"
_CALL = nn.Module._call_impl.__code__
# Their results depend on a tensor's shape and type, not on its values.
_LIKE = {f"aten::{kind}_like" for kind in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")}
_LIKE |= {f"aten::new_{kind}" for kind in ("zeros", "ones", "full", "empty", "empty_strided")}
# What they put somewhere is what the caller asked for, such as minus infinity into a mask.
_FILLS = {f"aten::{kind}" for kind in ("fill", "fill_", "full", "full_like", "masked_fill", "masked_fill_", "new_full")}
_FILLS |= {"aten::where", "aten::scalar_tensor", "aten::_scaled_dot_product_flash_attention_for_cpu"}
INT32 = torch.iinfo(torch.int32)
INT64 = torch.iinfo(torch.int64)


class Place(NamedTuple):
    """Where something happened.

    `file` is "" for what torch's own modules do without a line of anybody else; `layer` is the dotted name of the
    submodule with its class. `reads` says which values it was done to: ``"input"``, ``"weight"`` or "".
    """

    file: str
    line: int
    function: str
    layer: str = ""
    reads: str = ""


def layers_of(module):
    """For the id of each submodule, ``encoder.layers.0 (BertLayer)``; of the module itself the class alone."""
    return {id(part): f"{name} ({type(part).__name__})" if name else "" for name, part in module.named_modules()}


def find_place(layers, frame):
    """The `Place` of a frame: the first line outside of torch, going outwards, and the innermost layer."""
    frames = []
    while frame and not frame.f_code.co_filename.startswith(OURS):
        frames.append(frame)
        frame = frame.f_back
    called = next((f for f in frames if f.f_code is _CALL), None)
    layer = layers.get(id(called.f_locals["self"]), "") if called else ""
    for f in frames:
        if not f.f_code.co_filename.startswith(TORCH):
            return Place(f.f_code.co_filename, f.f_lineno, f.f_code.co_qualname, layer)
    inside = next((f for f in frames if f.f_code.co_name == "forward"), None)
    return Place(inside.f_code.co_filename, inside.f_lineno, "", layer) if inside else Place("", 0, "", layer)


class Operators(TorchDispatchMode):
    """Notes the lines of Python that operators come from, what they read, and which ran on the host.

    Attributes
    ----------
    float64 : bool
        Whether a tensor of that type was made; a number is one for torch-xla in any case.
    places : dict of (file, line) to dict of str to Place
        The aten operators called there, each with the first layer that did.
    calls : dict of str to Place
        Where each aten operator was called first.
    on_host : dict of str to Place
        Operators that fell back to the host, and ``aten::_local_scalar_dense`` for values that Python read.
    random, host_tensors : dict of str to Place
        Operators that draw random numbers; tensors of the host, described, that met those of the device.
    """

    def __init__(self, metrics, layers, inputs, weights):
        super().__init__()
        self.metrics, self.layers = metrics, layers
        self.places, self.calls, self.on_host, self.random, self.host_tensors = {}, {}, {}, {}, {}
        self.counted, self.filled, self.float64 = {}, {}, False
        self.reads = {id(t): {"input"} for t in inputs} | {id(t): {"weight"} for t in weights}
        self.root, self.alive = {}, []  # of a view the id of what it is a view of; what lives keeps its id

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        place = find_place(self.layers, sys._getframe(1))
        self.places.setdefault(place[:2], {}).setdefault(name, place)
        self.calls.setdefault(name, place)
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        made = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        self.float64 |= any(tensor.dtype == torch.float64 and tensor.dim() for tensor in made)
        reads = self._follow(function, name, args, given, made)
        place = place._replace(reads="input" if "input" in reads else "weight" if "weight" in reads else "")
        on_device = [tensor for tensor in given if tensor.device.type == "xla"]
        if torch.Tag.nondeterministic_seeded in function.tags and not on_device and made:
            self.random.setdefault(name, place)
        if on_device and (name == "aten::_local_scalar_dense" or any(tensor.device.type != "xla" for tensor in made)):
            self._note_on_host("aten::_local_scalar_dense", place)  # .item(), .cpu(), .tolist(), .numpy()
        for tensor in given:
            if on_device and tensor.device.type == "cpu" and tensor.dim() and name != "aten::_to_copy":
                self.host_tensors.setdefault(describe(tensor), place)
        for counter in self.metrics.counter_names():
            if counter.startswith("aten::"):
                count = self.metrics.counter_value(counter)
                if self.counted.get(counter, 0) != count:
                    self.counted[counter] = count
                    self._note_on_host(counter, place)
        return result

    def _follow(self, function, name, args, given, made):
        """Which kinds of values the results depend on; notes it of them."""
        reads = set().union(*(self.reads.get(self.root.get(id(t), id(t)), set()) for t in given))
        reads = set() if name in _LIKE else reads
        _ = [tensor.shape for tensor in made]  # what torch-xla resized, such as arange, knows its size once it is asked
        self.alive += given + made
        known = {id(tensor) for tensor in given}
        for tensor in made:
            if id(tensor) in known:
                continue
            if getattr(function, "is_view", False) and given:
                self.root[id(tensor)] = self.root.get(id(given[0]), id(given[0]))
            else:
                self.reads[id(tensor)] = reads
                if name == "aten::masked_fill":
                    self.filled[id(tensor)] = self.root.get(id(given[0]))
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                root = self.root.get(id(value), id(value))
                self.reads[root] = self.reads.get(root, set()) | reads
                if name == "aten::copy_" and len(given) > 1 and self.filled.get(id(given[1])) == root != id(value):
                    self.calls.setdefault("a slice that is masked in place", find_place(self.layers, sys._getframe(2)))
        return reads

    def _note_on_host(self, name, place):
        order = ("", "weight", "input")
        if name not in self.on_host or order.index(self.on_host[name].reads) < order.index(place.reads):
            self.on_host[name] = place


class Values(TorchDispatchMode):
    """Notes where a number that is not finite comes out of finite ones in eager, and an int64 beyond 32 bits."""

    def __init__(self, layers):
        super().__init__()
        self.layers, self.not_finite, self.beyond_32_bits = layers, None, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "empty" not in function._schema.name:  # what is in there is left over
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and tensor.numel():
                    self._look_at(tensor, function._schema.name, args)
        return result

    def _look_at(self, tensor, name, args):
        if self.not_finite is None and name not in _FILLS and not is_finite(tensor) and is_finite(*tree_leaves(args)):
            self.not_finite = find_place(self.layers, sys._getframe(2))
        if tensor.dtype == torch.int64 and self.beyond_32_bits is None and exceeds_int32(tensor):
            self.beyond_32_bits = find_place(self.layers, sys._getframe(2))


def is_finite(*values):
    """Whether every number of those values that are tensors of floating point is finite."""
    tensors = [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def exceeds_int32(tensor):
    """Whether an int64 tensor has a value beyond 32 bits; one near the ends of int64 means no bound, or an infinity."""
    if tensor.dtype != torch.int64 or not tensor.numel():
        return False
    beyond = (tensor > INT32.max) | (tensor < INT32.min)
    return bool((beyond & (tensor.abs() < INT64.max // 2) & (tensor != INT64.min)).any())
