"""What travels between the two processes."""

import torch
from inf2.messages import hash_code, pack, unpack
from torch import nn


def make(best):
    class Best(nn.Module):
        def forward(self, x):
            return best(x)

    return Best()


def test_a_class_that_a_function_made_arrives_with_the_same_code():
    module = make(lambda x: x.amax(-1))
    arrived = unpack(pack(module))
    assert type(arrived) is not type(module) and hash_code(arrived) == hash_code(module)
    assert torch.equal(arrived(torch.arange(3.0)), torch.tensor(2.0))


def test_other_code_has_another_hash():
    class One(nn.Module):
        def forward(self, x):
            return x + 1

    before = hash_code(One())
    One.forward = lambda self, x: x + 2
    assert hash_code(One()) != before
