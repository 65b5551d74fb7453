"""Files that are whole or absent."""

import pytest
from conftest import (
    read_json,
    start_python,
)


@pytest.mark.parametrize("what", ["traced", "lowered"])
def test_a_full_disk_is_an_error_and_leaves_nothing(what, tmp_path):
    code = """
import resource, signal, sys, unittest.mock, torch, blip_helpers as bh
traced = bh.trace_module(torch.nn.Linear(100, 100), torch.ones(1, 100), backend="cpu")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    if sys.argv[2] == "traced":
        bh.save_traced(traced, sys.argv[1])
    else:
        bh.Lowered.save(unittest.mock.Mock(proto=bytes(10000)), sys.argv[1])
except OSError:
    print("true")
"""
    assert read_json(start_python(code, tmp_path / "graph", what)) is True
    assert list(tmp_path.iterdir()) == []
