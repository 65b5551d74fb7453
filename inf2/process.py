"""What a process has one of: a state of torch to trace in, a turn to trace, a turn to write, and a module's state."""

import contextlib
import fcntl
import os
import threading
from pathlib import Path

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_DEVICES = ("cpu", "cuda", "xla", "mps", "xpu")


def _begin():
    """What a process starts with; a fork would inherit turns that threads of its parent have, for ever."""
    global _tracing, _writing
    _tracing, _writing = threading.RLock(), threading.local()


_begin()
os.register_at_fork(after_in_child=_begin)


@contextlib.contextmanager
def clean_state():
    """Trace, lower or check in a ``with`` block, or a function decorated with this: as in a fresh process.

    Autocast is off, the default dtype fp32, the default device the CPU, the CPU's products are not rounded
    (``torch.set_float32_matmul_precision``), and neither gradients nor inference mode are on; outside of inference mode
    a clone is an ordinary tensor, so that what is traced works in every mode later. One thread of the process is in
    here at a time, since the state is the process's and so is that of ``torch.jit.trace``.

    Raises
    ------
    RuntimeError
        In a mode that sees or changes operators, such as `inf2.ImitatedAutoCast`: a graph would keep what it does.
    """
    modes = [*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()]
    others = [type(mode).__name__ for mode in modes if not isinstance(mode, DeviceContext)]
    if others:
        raise RuntimeError(f"{', '.join(others)} is active, and a graph would keep what it does: leave it first")
    with _tracing, contextlib.ExitStack() as undo:
        undo.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        for products in (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn):
            if products.fp32_precision not in ("none", "ieee"):
                undo.callback(setattr, products, "fp32_precision", products.fp32_precision)
                products.fp32_precision = "ieee"
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                undo.callback(torch.set_autocast_enabled, device, True)
                torch.set_autocast_enabled(device, False)
        if torch.get_default_device().type != "cpu":
            undo.enter_context(torch.device("cpu"))
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.no_grad())
        yield


@contextlib.contextmanager
def one_writer(directory):
    """One thread of one process at a time writes to `directory`; others wait here, and say so.

    The lock is the directory's own: it leaves no file, and ends with the process that has it.
    """
    path, held = Path(directory).resolve(), _writing.__dict__.setdefault("directories", set())
    if path in held:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{directory} is being written to: waiting for its writer", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        held.add(path)
        try:
            yield
        finally:
            held.discard(path)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may have the descriptor as well
    finally:
        os.close(descriptor)


class Owner:
    """The process that made this: what keeps state is of use there alone, since a fork shares or splits the state."""

    def __init__(self):
        self.process = os.getpid()

    def check(self):
        """Raise a `RuntimeError` in any other process."""
        if os.getpid() != self.process:
            raise RuntimeError(
                f"this model keeps state, which belongs to process {self.process} that loaded it: load it in process "
                f"{os.getpid()} as well, with from_pretrained()"
            )
