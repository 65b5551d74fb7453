"""What a call of a graph costs at least: operations, bytes, and the bounds that a NeuronCore's figures give them."""

from dataclasses import dataclass

import torch
from inf2.process import clean_state
from inf2.rounding import PRODUCTS, ProductMode, product_flops
from inf2.tensors import state_of
from torch.utils._pytree import tree_leaves

# A NeuronCore-v2 of an Inferentia2 chip, which has two: half of the published figures of the chip.
# https://awsdocs-neuron.readthedocs-hosted.com/en/latest/about-neuron/arch/neuron-hardware/inferentia2.html
CORE_FLOPS = {"fp32": 47.5e12 / 2, "bf16": 190e12 / 2}
CORE_BYTES_PER_SECOND = 820 * 2**30 / 2
CHIP_BYTES = 32 * 2**30


@dataclass(frozen=True)
class Cost:
    """What one call of a graph takes at least.

    Attributes
    ----------
    flops : int
        Of its matrix products and convolutions, a multiplication and an addition each; norms, softmax and sums are
        left out.
    weights : int
        Numbers in the weights that are read, without those that are only looked up.
    state, inputs, outputs : int
        Bytes. What becomes the next state is no output.
    """

    flops: int
    weights: int
    state: int
    inputs: int
    outputs: int

    def moved(self, dtype="fp32"):
        """Bytes between memory and core: weights (2 bytes each in bf16), state read, inputs and outputs."""
        return self.weights * {"fp32": 4, "bf16": 2}[dtype] + self.state + self.inputs + self.outputs

    def seconds(self, dtype="fp32"):
        """A lower bound for one NeuronCore, from the chip's published figures: nothing was measured."""
        return max(self.flops / CORE_FLOPS[dtype], self.moved(dtype) / CORE_BYTES_PER_SECOND)

    def bound_by(self, dtype="fp32"):
        """``"arithmetic"`` or ``"memory"``: which of the two takes longer."""
        return "arithmetic" if self.flops / CORE_FLOPS[dtype] > self.moved(dtype) / CORE_BYTES_PER_SECOND else "memory"


_LOOK_UPS = {
    getattr(torch.ops.aten, name)
    for name in (
        "embedding",
        "_embedding_bag",
        "_embedding_bag_forward_only",
        "index",
        "index_select",
        "gather",
        "take",
    )
}


class _Count(ProductMode):
    """Sums up FLOPs and notes the ids of the tensors that an operator reads; a few rows of a table do not count."""

    outcome, remedy = "is not counted", ""

    def __init__(self):
        super().__init__()
        self.flops = 0
        self.ids = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = self.in_parts(function, args, kwargs)
        if result is not NotImplemented:
            return result
        result = function(*args, **kwargs)
        if function.overloadpacket not in _LOOK_UPS:
            self.ids |= {id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)}
        if function.overloadpacket in PRODUCTS:
            self.flops += product_flops(function, args, result)
        return result


@clean_state()
def count_cost(module, example_inputs):
    """Count the `Cost` of a module; on the ``meta`` device nothing is computed.

    FLOPs are those of the products that `ImitatedAutoCast` rounds, fused operators taken apart. Neither what is only
    looked up nor what the graph does not use counts, so that the bound stays one.

    Raises
    ------
    ValueError
        Of an operator that multiplies, or may do so, in a way that is not counted.
    """
    state = state_of(module)
    with _Count() as count:
        outputs = [value for value in tree_leaves(module(*example_inputs)) if isinstance(value, torch.Tensor)]
    weights = [p for p in module.parameters() if id(p) in count.ids and not any(p is kept for kept in state)]
    return Cost(
        flops=count.flops,
        weights=sum(parameter.numel() for parameter in weights),
        state=sum(parameter.nbytes for parameter in state),
        inputs=sum(tensor.nbytes for tensor in example_inputs),
        outputs=sum(tensor.nbytes for tensor in outputs[: len(outputs) - len(state)]),
    )
