"""What neuronx-cc's ``--auto-cast`` does to numbers, imitated on a CPU."""

import itertools
import shlex

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

# The operators whose inputs ``matmult`` rounds, with the places of the two that are multiplied.
PRODUCTS = {
    torch.ops.aten.mm: (0, 1),
    torch.ops.aten.bmm: (0, 1),
    torch.ops.aten.addmm: (1, 2),
    torch.ops.aten.baddbmm: (1, 2),
    torch.ops.aten.mv: (0, 1),
    torch.ops.aten.addmv: (1, 2),
    torch.ops.aten.dot: (0, 1),
    torch.ops.aten.linear: (0, 1),
    torch.ops.aten.matmul: (0, 1),
    torch.ops.aten.convolution: (0, 1),
    torch.ops.aten.conv2d: (0, 1),
}


def split_flags(compiler_args):
    """Arguments of neuronx-cc, a str or a list, as a list of str."""
    return shlex.split(compiler_args) if isinstance(compiler_args, str) else [str(arg) for arg in compiler_args]


class ImitatedAutoCast(TorchDispatchMode):
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
    """

    def __init__(self, compiler_args):
        super().__init__()
        args = split_flags(compiler_args)
        given = {flag: value for flag, value in itertools.pairwise(args) if flag.startswith("--auto-cast")}
        given |= dict(arg.split("=", 1) for arg in args if arg.startswith("--auto-cast") and "=" in arg)
        self.cast, name = given.get("--auto-cast", "none"), given.get("--auto-cast-type", "bf16")
        if self.cast not in ("none", "matmult", "all") or name not in ("bf16", "fp16"):
            raise ValueError(
                f"--auto-cast {self.cast} --auto-cast-type {name}: none, matmult and all to bf16 and fp16 are imitated"
            )
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]

    def __enter__(self):
        self.attention = sdpa_kernel(SDPBackend.MATH)  # whose products are operators of their own
        self.attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.attention.__exit__(*error)

    def _round(self, value):
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            return value.to(self.dtype).float()
        return type(value)(map(self._round, value)) if isinstance(value, list | tuple) else value

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.cast == "none" or getattr(function, "is_view", False):
            return function(*args, **kwargs)
        rounded = PRODUCTS.get(function.overloadpacket, ())
        if self.cast == "all":
            rounded = () if function._schema.is_mutable else range(len(args))
        args = [self._round(value) if i in rounded else value for i, value in enumerate(args)]
        result = function(*args, **kwargs)
        if self.cast != "all":
            return result
        # What an operator wrote to stays where it is.
        in_place = function._schema.is_mutable and isinstance(result, torch.Tensor)
        return result.copy_(self._round(result)) if in_place else self._round(result)


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
