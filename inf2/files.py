"""Files that are whole or absent, and hashes of what they and graphs are made of."""

import contextlib
import hashlib
import json
import os
import threading
from pathlib import Path

import torch
from inf2.tensors import describe, state_of


@contextlib.contextmanager
def whole_file(path):
    """A file to write to that takes the place of `path` when it is complete, and leaves nothing when it is not.

    PyTorch gets the file, not its name: where it writes by itself, a full disk ends Python. The unfinished file has a
    name of this process and thread alone.
    """
    writer = f"{os.getpid()}-{threading.get_ident()}"
    unfinished = Path(path).with_name(f".{Path(path).name}.{writer}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def sha256(*values):
    """SHA-256 of values, as text: of a `Path` the file's bytes, of a tensor its numbers with dtype and shape, of
    anything else what JSON writes for it, in the order of its keys."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Path):
            with open(value, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        elif isinstance(value, torch.Tensor):
            digest.update(f" {describe(value)} ".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            read_back = json.loads(json.dumps(value))  # JSON has no integer keys: they come back and sort as text
            digest.update(json.dumps(read_back, sort_keys=True).encode())
    return digest.hexdigest()


def hash_weights(module):
    """SHA-256 of the names and values of a module's weights, without its state: str, as in an artifact's manifest."""
    state = {id(parameter) for parameter in state_of(module)}
    named = [(name, tensor) for name, tensor in module.state_dict(keep_vars=True).items() if id(tensor) not in state]
    return sha256(*(value for pair in named for value in pair))
