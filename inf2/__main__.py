"""``python -m inf2 check FILE.py:FUNCTION``: what would fail on Inf2 in the modules that a function returns.

The function takes no argument and returns ``{name: (module, [inputs, inputs, ...])}``, with two or more calls' inputs
for each module, every value different. Exit status: 0, 1 on a finding, 2 if it could not be done, 130 if it was
interrupted.
"""

import argparse
import signal
import sys


def interrupted(*_):
    print("\ninterrupted", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted)  # before the imports, which take seconds

import importlib.util
from pathlib import Path

import torch
from inf2.checks import check_module
from inf2.table import print_checks
from inf2.tensors import state_aliases


def parts_of_file(named):
    """What the function FUNCTION of FILE.py returns, checked; a `ValueError` says what is wrong with it."""
    file, _, function = named.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise ValueError(f"{named!r} names no function: write FILE.py:FUNCTION")
    path = Path(file).resolve()
    if not path.is_file():
        raise ValueError(f"{file} does not exist")
    sys.path.insert(0, str(path.parent))  # where the file's own imports, and the child process, look for modules
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{file} has no function {function}")
    try:
        parts = getattr(module, function)()
    except Exception as error:
        raise ValueError(f"{function}() fails: {type(error).__name__}: {error}") from error
    if not isinstance(parts, dict) or not parts:
        raise ValueError(f"{function}() returned a {type(parts).__name__}: return a dict of modules")
    for name, part in parts.items():
        if not isinstance(part, tuple | list) or len(part) != 2 or not isinstance(part[1], tuple | list):
            raise ValueError(f"{function}() returned no pair for {name!r}: give (module, [inputs, inputs, ...])")
    return parts


def check_parts(parts):
    """Check each ``{name: (module, examples)}``, with a module's own ``state`` as aliases: yields name, `Checked`."""
    for name, (module, examples) in parts.items():
        try:
            yield name, check_module(module, examples, input_output_aliases=state_aliases(module))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def main():
    parser = argparse.ArgumentParser(prog="python -m inf2", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="lower modules and look for what fails on Inf2")
    check.add_argument("function", metavar="FILE.py:FUNCTION", help="returns {name: (module, [inputs, inputs, ...])}")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    try:
        parts = parts_of_file(arguments.function)
        first = {name: (module, examples[0] if examples else ()) for name, (module, examples) in parts.items()}
        first = {name: (m, (x,) if isinstance(x, torch.Tensor) else x) for name, (m, x) in first.items()}
        return print_checks(check_parts(parts), first)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"inf2 check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
