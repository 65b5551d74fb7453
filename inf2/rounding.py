"""What neuronx-cc's ``--auto-cast`` does to numbers, imitated on a CPU; where a module multiplies them."""

import itertools
import math
import re
import shlex

import torch
from inf2.tensors import as_tuple
from torch import nn
from torch._decomp.decompositions import (
    _euclidean_dist,
    one_layer_lstm,
    scaled_dot_product_flash_attention_for_cpu,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

# Every operator whose inputs ``matmult`` rounds and whose FLOPs are counted, with the places of the two that are
# multiplied: matrix products first, then convolutions.
PRODUCTS = {
    aten.mm: (0, 1),
    aten.bmm: (0, 1),
    aten.mv: (0, 1),
    aten.dot: (0, 1),
    aten.vdot: (0, 1),
    aten.addmm: (1, 2),
    aten.addmm_: (1, 2),
    aten._addmm_activation: (1, 2),
    aten.addmv: (1, 2),
    aten.addmv_: (1, 2),
    aten.addbmm: (1, 2),
    aten.addbmm_: (1, 2),
    aten.baddbmm: (1, 2),
    aten.baddbmm_: (1, 2),
    aten._int_mm: (0, 1),
    aten._scaled_mm: (0, 1),
    aten.convolution: (0, 1),
    aten._convolution: (0, 1),
    aten.convolution_overrideable: (0, 1),
    aten.mkldnn_convolution: (0, 1),
    aten._nnpack_spatial_convolution: (0, 1),
    aten.conv_tbc: (0, 1),
    aten._slow_conv2d_forward: (0, 1),
    aten.slow_conv3d_forward: (0, 1),
    aten.slow_conv_dilated2d: (0, 1),
    aten.slow_conv_dilated3d: (0, 1),
    aten.slow_conv_transpose2d: (0, 1),
    aten.slow_conv_transpose3d: (0, 1),
}
CONVOLUTIONS = list(PRODUCTS)[list(PRODUCTS).index(aten.convolution) :]


def product_flops(function, args, result):
    """FLOPs of a call of one of `PRODUCTS`: a multiplication and an addition for each pair of numbers."""
    first, second = (args[place] for place in PRODUCTS[function.overloadpacket])
    if function.overloadpacket not in CONVOLUTIONS:
        return 2 * first.numel() * (second.shape[-1] if second.dim() > 1 else 1)
    if function.overloadpacket is aten.conv_tbc:
        return 2 * result.numel() * math.prod(second.shape[:2])
    given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False))
    # Each number of the result is a sum over the kernel; transposed, each number of the input is spread by it.
    transposed = given.get("transposed", "transpose" in function._schema.name)
    return 2 * (first if transposed else result).numel() * math.prod(second.shape[1:])


def _lstm(data, *args):
    *weights, hidden, cell, reverse, _, kind, _, _, biases, _, _, _ = args
    if kind != 2:
        return NotImplemented
    state = [value.reshape(value.shape[-2:]) for value in (hidden, cell)]
    output, last = one_layer_lstm(data, state, weights if biases else weights[:2], biases, reverse)
    return output, *(value.reshape(hidden.shape) for value in last), data.new_empty(0)


def _trilinear(i1, i2, i3, expand1, expand2, expand3, sumdim, unroll_dim=1):
    for dims, place in ((expand1, 0), (expand2, 1), (expand3, 2)):
        for dim in dims:
            i1, i2, i3 = (t.unsqueeze(dim) if i == place else t for i, t in enumerate((i1, i2, i3)))
    every = "abcdefghijklmnopqrstuvwxyz"[: i1.dim()]
    # A sum that the third does not take part in is taken first, as in ATen.
    left = "".join(letter for dim, letter in enumerate(every) if dim not in sumdim or dim not in expand3)
    kept = "".join(letter for dim, letter in enumerate(every) if dim not in sumdim)
    inner = torch.einsum(f"{every},{every}->{left}", i1, i2)
    third = i3.squeeze([dim for dim in sumdim if dim in expand3])
    return torch.einsum(f"{left},{left}->{kept}", inner, third)


def _cdist(x1, x2, p, mode):
    multiplied = mode == 1 or (not mode and max(x1.shape[-2], x2.shape[-2]) > 25)  # as in ATen
    return aten.cdist(x1, x2, p, mode) if p == 2 and multiplied else NotImplemented


# Operators that multiply inside a kernel of their own, written with others, and how many results a module sees: those
# after them are kept for the gradient.
DECOMPOSED = {
    aten.mkldnn_rnn_layer: (_lstm, 3),
    aten._cdist_forward: (_cdist, 1),
    aten._euclidean_dist: (_euclidean_dist, 1),
    aten._scaled_dot_product_flash_attention_for_cpu: (scaled_dot_product_flash_attention_for_cpu, 1),
    aten._trilinear: (_trilinear, 1),
}

# Words in the names of the other operators that multiply: solvers, transforms, gradients, what is packed or sparse.
_MULTIPLY = re.compile(
    r"(?<![a-z\d])([a-z\d]*m[mv]|v?dot|matmul|linear|conv(?!ert)[a-z\d]*|attention|transformer|rnn|lstm|gru|affine_grid"
    r"|fft|linalg(?!_vector_norm|_cross)|(sp)?solve|cholesky|lu|geqrf|or[mg]qr|svd|fbgemm|quantized)(?![a-z\d])"
)


_OTHERS = ("multiplies tensors that are not dense and real", "give it dense, real ones")
_OWN = "write it with matmul and other operators of PyTorch"


def _is_exact(tensor):
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized)


class _SlowPaths(TorchFunctionMode):
    """Under a mode of functions attention modules leave their fused fast path: in this thread alone.

    It refuses what multiplies without an operator that a dispatch mode sees.
    """

    def __init__(self, refuse):
        super().__init__()
        self.refuse = refuse

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name.startswith("fbgemm_linear") or re.fullmatch(r"quantized_\w+_cell", name):
            self.refuse(f"aten::{name}")
        return function(*args, **(kwargs or {}))


class ProductMode(TorchDispatchMode):
    """A mode that gets every operator of PyTorch once it is either one of `PRODUCTS` or multiplies nothing.

    An operator that PyTorch composes of others is taken apart, in inference mode too, where it arrives whole; so are
    those that `DECOMPOSED` writes with others. That leaves ATen's kernels. The version of PyTorch is pinned, and its
    names are regular: of what is neither a product nor taken apart, that which is named like one is refused, and so is
    an operator that is not PyTorch's and takes floating-point tensors, since nobody knows what it does. An outer or a
    Kronecker product sums nothing up: PyTorch, and XLA after it, multiply element by element.

    Subclasses call `in_parts` first, and `outcome` and `remedy` end the sentence of the refusal. An `idle` mode leaves
    PyTorch as it is.
    """

    supports_higher_order_operators = True  # they are refused

    def __init__(self, idle=False):
        super().__init__()
        self.idle = idle
        self.slow_paths = _SlowPaths(self.refuse)
        self.refusal = None

    def __enter__(self):
        if self.idle:
            return self
        self.refusal = None
        self.slow_paths.__enter__()
        return super().__enter__()

    def __exit__(self, kind, error, traceback):
        if self.idle:
            return
        super().__exit__(kind, error, traceback)
        self.slow_paths.__exit__(kind, error, traceback)
        if self.refusal and "TorchScript interpreter" in str(error):  # which makes a RuntimeError of a ValueError
            raise ValueError(self.refusal) from error

    def refuse(self, name, verb="multiplies", instead="write it with matmul"):
        self.refusal = f"{name} {verb} and {self.outcome}: {instead}{self.remedy}"
        raise ValueError(self.refusal)

    def in_parts(self, function, args, kwargs):
        """What `function` returns where it is taken apart, each part an operator of this mode, or else NotImplemented.

        Raises
        ------
        ValueError
            If it multiplies, or may do so, in a way that is not seen. The sentence names it.
        """
        if not isinstance(function, torch._ops.OpOverload):
            self.refuse(f"{function.namespace}::{function.name()}", "may multiply", _OWN)
        name, packet = function._schema.name, function.overloadpacket
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        dense = all(value.layout == torch.strided and not value.is_nested for value in tensors)
        if packet is aten.to_mkldnn or any(value.layout == torch._mkldnn for value in tensors):
            self.refuse(name, "packs tensors for products that are not seen", "leave them as they are")
        if packet in PRODUCTS:
            if not dense or any(value.is_complex() or value.is_quantized for value in tensors):
                self.refuse(name, *_OTHERS)
            return NotImplemented
        words = _MULTIPLY.search(name.split("::")[1])
        result = NotImplemented
        if dense and packet in DECOMPOSED:
            result = self._decompose(function, args, kwargs)
        elif dense and not (words and words[1] in ("fbgemm", "quantized")):
            with torch._C.DisableTorchFunction(), self:
                result = function.decompose(*args, **kwargs)
        if result is NotImplemented and any(not _is_exact(value) for value in tensors):
            if words and name.endswith("backward"):
                self.refuse(name, instead="call backward() outside of the mode")
            if words:
                self.refuse(name, *(() if dense else _OTHERS))
            if function.namespace not in ("aten", "prims", "prim"):
                self.refuse(name, "may multiply", _OWN)
        return result

    def _decompose(self, function, args, kwargs):
        parts, seen = DECOMPOSED[function.overloadpacket]
        given = {name: value for name, value in kwargs.items() if not name.startswith("out")}
        out = [value for name, value in kwargs.items() if name not in given]
        with torch._C.DisableTorchFunction(), self:
            result = parts(*args, **given)
            if result is NotImplemented:
                return result
            for written, value in zip(out, as_tuple(result), strict=bool(out)):
                written.resize_(value.shape).copy_(value)
        if out:
            return tuple(out) if isinstance(result, tuple) else out[0]
        needs_grad = torch.is_grad_enabled() and any(v.requires_grad for v in tree_leaves(args) if torch.is_tensor(v))
        if isinstance(result, tuple) and needs_grad:
            return *result[:seen], *function(*args, **kwargs)[seen:]  # what the operator's own gradient reads
        return result


def split_flags(compiler_args):
    """Arguments of neuronx-cc, a str or a list, as a list of str."""
    return shlex.split(compiler_args) if isinstance(compiler_args, str) else [str(arg) for arg in compiler_args]


class ImitatedAutoCast(ProductMode):
    """An imitation of what neuronx-cc's ``--auto-cast`` does to fp32 numbers: ``with`` this, call a module on the CPU.

    ``matmult`` rounds the inputs of each matrix product and convolution to the type and accumulates in fp32; ``all``
    rounds inputs and outputs of every floating-point operator. The compiler fuses and orders operators in its own way,
    so that its results differ from these; what it casts and when it does is AWS's description of the flags.

    Parameters
    ----------
    compiler_args : str or list of str
        As for neuronx-cc. Without ``--auto-cast`` nothing is cast, as since SDK 2.27, whatever the type.

    Raises
    ------
    ValueError
        If the flags cast to another type than bf16 or fp16.
        Under the mode, of an operator that multiplies in a way that is not imitated.
    """

    outcome, remedy = "is not imitated", ", or pass --auto-cast none"

    def __init__(self, compiler_args):
        args = split_flags(compiler_args)
        given = {flag: value for flag, value in itertools.pairwise(args) if flag.startswith("--auto-cast")}
        given |= dict(arg.split("=", 1) for arg in args if arg.startswith("--auto-cast") and "=" in arg)
        self.cast, name = given.get("--auto-cast", "none"), given.get("--auto-cast-type", "bf16")
        if self.cast not in ("none", "matmult", "all") or name not in ("bf16", "fp16"):
            raise ValueError(
                f"--auto-cast {self.cast} --auto-cast-type {name}: none, matmult and all to bf16 and fp16 are imitated"
            )
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
        super().__init__(idle=self.cast == "none")

    def _round(self, value):
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            return value.to(self.dtype).float()
        return value

    def _round_in_place(self, values):
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                value.copy_(self._round(value))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = self.in_parts(function, args, kwargs)
        if result is not NotImplemented:
            return result
        if self.cast == "matmult":
            rounded = PRODUCTS.get(function.overloadpacket, ())
            return function(*(self._round(value) if i in rounded else value for i, value in enumerate(args)), **kwargs)
        if function.is_view:
            return function(*args, **kwargs)
        # What an operator writes to stays where it is.
        arguments = function._schema.arguments
        written = {argument.name for argument in arguments if argument.is_write}
        given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
        kept = [given[name] for name in written if name in given]
        self._round_in_place(kept)
        places = [argument.name in written for argument in arguments]
        args = [value if places[i] else tree_map(self._round, value) for i, value in enumerate(args)]
        kwargs = {name: value if name in written else tree_map(self._round, value) for name, value in kwargs.items()}
        result = function(*args, **kwargs)
        self._round_in_place(kept)
        same = {id(value) for value in tree_leaves(kept)}
        return tree_map(lambda value: value if id(value) in same else self._round(value), result)


class Rounded(nn.Module):
    """A module that is called under `cast`, an `ImitatedAutoCast`."""

    def __init__(self, module, cast):
        super().__init__()
        self.module = module
        self.cast = cast

    def forward(self, *inputs):
        with self.cast:
            return self.module(*inputs)


def with_rounding(module, example_inputs, cast):
    """A module that computes what `module` computes under `cast`, each rounding an operator of its own.

    It is made for the shapes of `example_inputs`, and holds the same Parameters in the same order, state first where it
    was: a trace of it has them as state.
    """
    if cast.cast == "none":
        return module
    rounded = make_fx(Rounded(module, cast))(*example_inputs)
    order = {id(parameter): number for number, parameter in enumerate(module.parameters())}
    rounded._parameters = dict(sorted(rounded._parameters.items(), key=lambda named: order[id(named[1])]))
    return rounded
