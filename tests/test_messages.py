"""What travels between the two processes."""

from conftest import read_json, start_python
from inf2.messages import hash_code, pack
from torch import nn


def make(best):
    class Best(nn.Module):
        def forward(self, x):
            return best(x)

    return Best()


def test_a_class_that_a_function_made_arrives_with_the_same_code(tmp_path):
    module = make(lambda x: x.amax(-1))
    (tmp_path / "module").write_bytes(pack(module))
    code = """
import json, pathlib, sys, torch
from inf2.messages import hash_code, unpack
arrived = unpack(pathlib.Path(sys.argv[1]).read_bytes())
print(json.dumps([hash_code(arrived), arrived(torch.arange(3.0)).item()]))
"""
    assert read_json(start_python(code, tmp_path / "module")) == [hash_code(module), 2.0]


def test_other_code_has_another_hash():
    class One(nn.Module):
        def forward(self, x):
            return x + 1

    before = hash_code(One())
    One.forward = lambda self, x: x + 2
    assert hash_code(One()) != before
