"""Traced parts in a directory, and the manifest that says what they are; nothing stale or changed is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from inf2.files import hash_weights, sha256, whole_file
from inf2.process import clean_state, one_writer
from inf2.rounding import ImitatedAutoCast, split_flags
from inf2.tensors import StaticGraph, describe, describe_inputs
from inf2.tracing import (
    known_backend,
    load_traced,
    neuron_compiler_args,
    package_version,
    save_traced,
    trace_module,
)

# To be raised by whoever changes what a manifest says, or what a stand-in computes: artifacts are then traced again.
FORMAT = 4
# How far a sketch may lie from another, relative to its row: other CPUs sum in another order, by some millionths.
SAME = 5e-5


class Part(NamedTuple):
    """A module to be traced, and what the model that it is a part of has to do with it.

    Attributes
    ----------
    module, example_inputs, aliases
        As `trace_module` takes them; fp32 and in eval mode.
    answers : sequence of Tensor
        What the model's own modules answer to probe inputs: a part is kept as long as they answer the same.
    check : callable, optional
        Called with the module before it is traced, and with the graph where that runs here in fp32: raises a
        `ValueError` where it does not answer probe inputs as the model does.
    """

    module: torch.nn.Module
    example_inputs: tuple
    aliases: dict
    answers: tuple = ()
    check: Callable | None = None


@clean_state()
def trace_parts(
    parts, directory, description, *, dtype=torch.float32, backend=None, compiler_args=None, cpu_backend=False
):
    """Trace modules into `directory`: what is there already and still valid is kept, and for the rest a reason printed.

    Each part is complete on disk before the manifest names it: after an interruption the next call goes on from there.
    One process, and one thread of it, writes to a directory at a time; another one waits, and keeps what it finds.

    Parameters
    ----------
    parts : dict of str to `Part`, or to a tuple of its first three attributes or more
    directory : str or Path
        Made if missing. Holds ``manifest.json`` and a ``.pt`` file a part.
    description : dict
        What JSON can write, for whoever loads the parts: it stands in the manifest.
    dtype : {torch.float32, torch.bfloat16}
        What matrices are multiplied in: the compiler's flags say it, and the stand-in imitates them. OpenVINO computes
        all else in it, too.
    backend, compiler_args, cpu_backend
        As in `trace_module`.

    Raises
    ------
    ValueError
        If an argument is not of the kind described here.
    """
    directory, backend = Path(directory), known_backend(backend)
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype is {dtype!r}; there are torch.float32 and torch.bfloat16")
    if dtype == torch.bfloat16 and compiler_args is not None:
        raise ValueError("dtype=torch.bfloat16 chooses the compiler's flags: pass it or compiler_args, not both")
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file: pass a directory")
    if compiler_args is None:
        compiler_args = neuron_compiler_args("none" if dtype == torch.float32 else "matmult", "bf16")
    made_with = {
        "dtype": str(dtype).removeprefix("torch."),
        "backend": backend,
        "compiler_args": split_flags(compiler_args),
        "versions": _versions(backend),
    }
    parts = {name: Part(*part) for name, part in parts.items()}
    wanted = {name: _description_of(part) | made_with for name, part in parts.items()}
    how = {"backend": backend, "compiler_args": compiler_args, "cpu_backend": cpu_backend}
    directory.mkdir(parents=True, exist_ok=True)
    with one_writer(directory):
        _trace_what_is_missing(parts, directory, {"format": FORMAT, **description, "backend": backend}, wanted, how)


def _trace_what_is_missing(parts, directory, manifest, wanted, how):
    for left in directory.glob(".*.unfinished"):  # by a writer that was killed
        left.unlink()
    reasons, known = _what_to_trace(directory, wanted)
    for name, part in parts.items():
        if reasons[name] and part.check:
            part.check(part.module)
    manifest = manifest | {"parts": known}
    _write_manifest(directory, manifest)
    width = max(map(len, parts))
    for name, part in parts.items():
        print(f"{name:<{width}}  {'traced: ' + reasons[name] if reasons[name] else 'kept'}", flush=True)
        if reasons[name]:
            traced = trace_module(part.module, part.example_inputs, input_output_aliases=part.aliases, **how)
            save_traced(traced, directory / f"{name}.pt")
            if part.check and how["backend"] != "neuron" and ImitatedAutoCast(how["compiler_args"]).cast == "none":
                part.check(traced)
            manifest["parts"][name] = wanted[name] | {"sha256": sha256(directory / f"{name}.pt")}
            _write_manifest(directory, manifest)
            del traced


def load_parts(directory, *, core=None):
    """Load what `trace_parts` left, on Neuron onto the NeuronCore `core`.

    Returns
    -------
    dict of str to StaticGraph

    Raises
    ------
    ValueError
        If the artifact is incomplete, was changed, or was made by other versions or for another backend.
    """
    directory = Path(directory)
    manifest = check_parts(directory)
    return {
        name: StaticGraph(
            load_traced(
                directory / f"{name}.pt", backend=manifest["backend"], core=core, with_state=bool(part["state"])
            ),
            part["inputs"],
            keeps_state=bool(part["state"]),
        )
        for name, part in manifest["parts"].items()
    }


def check_parts(directory):
    """The manifest of an artifact that can be loaded here; a `ValueError` as of `load_parts` if it cannot."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    versions = _versions(known_backend(manifest["backend"]))
    missing = [name for name, part in manifest["parts"].items() if part is None]
    for name, part in manifest["parts"].items():
        if name in missing:
            continue
        problem = difference_between(part, {**part, "versions": versions}) or _damage(directory, name, part)
        if problem:
            raise ValueError(f"{name}: {problem}; trace the model again, what is still valid will be kept")
    if missing:
        raise ValueError(f"{', '.join(missing)} not traced yet; call trace() again, it goes on where it stopped")
    return manifest


def read_manifest(directory):
    """What `directory` holds, as `trace_parts` wrote it down; a part that is not traced yet is None.

    Raises
    ------
    ValueError
        If there is no manifest, it was changed, or another version of this module wrote it.
    """
    path = Path(directory) / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{directory} has no manifest.json: it holds nothing that trace() made, or not all of it")
    try:
        manifest = json.loads(path.read_bytes())
        given = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError("manifest.json is damaged: trace the model again") from None
    if given != sha256(manifest):
        raise ValueError("manifest.json was changed after it was written: trace the model again")
    if manifest["format"] != FORMAT:
        raise ValueError(f"manifest.json has format {manifest['format']}, this module {FORMAT}: trace the model again")
    return manifest


def _what_to_trace(directory, wanted):
    """For each part why it has to be traced, "" where it is kept, and what is known of it, None where it is not."""
    try:
        known = read_manifest(directory)["parts"]
    except ValueError:
        known = {}
    reasons = dict.fromkeys(wanted, "not traced yet")
    for name in wanted:
        if known.get(name):
            reasons[name] = difference_between(known[name], wanted[name]) or _damage(directory, name, known[name])
    return reasons, {name: None if reasons[name] else known[name] for name in wanted}


def _description_of(part):
    return {
        "kind": type(part.module).__name__,
        "inputs": describe_inputs(part.module, part.example_inputs),
        "state": {f"state {i}": describe(parameter) for i, parameter in enumerate(part.aliases)},
        "weights": hash_weights(part.module),
        "config": _hash_configurations(part.module),
        "answers": [sketch(answer) for answer in part.answers],
    }


def sketch(answer):
    """Five numbers in place of each row of a tensor, as text, to be compared by `same_sketch`.

    They are the row's root mean square, and four sums of its values with signs that are drawn once and for all, over
    the root of their number: another value anywhere in the row changes them by as much as it changes the row's norm.

    answer : Tensor [..., values]
    """
    rows = answer.detach().double().reshape(-1, answer.shape[-1])
    signs = torch.randint(2, (rows.shape[1], 4), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    sums = (rows @ signs) / rows.shape[1] ** 0.5
    numbers = torch.cat([rows.square().mean(dim=1, keepdim=True).sqrt(), sums], dim=1)
    return " ".join(f"{number:.7g}" for number in numbers.flatten().tolist())


def same_sketch(known, now):
    """Whether two texts of `sketch` are those of the same answers, as another CPU would compute them too."""
    known, now = (torch.tensor([float(number) for number in text.split()]).reshape(-1, 5) for text in (known, now))
    return known.shape == now.shape and bool(((known - now).abs() <= SAME * known[:, :1]).all())


def difference_between(known, wanted):
    """What differs between a traced part and the part that is wanted, in words; "" where nothing does."""
    if known["kind"] != wanted["kind"]:
        return f"it was a {known['kind']}, is a {wanted['kind']}"
    if known["weights"] != wanted["weights"]:
        return "the weights are others"
    if known["config"] != wanted["config"]:
        return "the configuration of the model is another"
    for kind in ("inputs", "state", "versions"):
        for name in known[kind] | wanted[kind]:
            was, now = known[kind].get(name, "absent"), wanted[kind].get(name, "absent")
            if was != now:
                return f"{name} was {was}, is {now}"
    for kind in ("dtype", "backend", "compiler_args"):
        if known[kind] != wanted[kind]:
            return f"{kind} was {known[kind]}, is {wanted[kind]}"
    answers = known["answers"], wanted["answers"]
    if len(answers[0]) != len(answers[1]) or not all(map(same_sketch, *answers)):
        return "the model answers probe inputs otherwise"
    return ""


def _damage(directory, name, part):
    if not (directory / f"{name}.pt").is_file():
        return f"{name}.pt is missing"
    return "" if sha256(directory / f"{name}.pt") == part["sha256"] else f"{name}.pt was changed after its trace"


def _versions(backend):
    of_backend = {"neuron": ["torch-neuronx", "neuronx-cc"], "cpu": [], "openvino": ["openvino"]}
    packages = ["torch", "transformers", *of_backend[backend]]
    return {package: package_version(package).split("+")[0] for package in packages}


def _hash_configurations(module):
    """A hash of the configurations that a module's parts carry, as transformers' do: a head more is no other weight."""
    configurations = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    apart = ("transformers_version", "_name_or_path")
    return sha256([{k: v for k, v in c.to_dict().items() if k not in apart} for c in configurations.values()])


def _write_manifest(directory, manifest):
    with whole_file(directory / "manifest.json") as file:
        file.write(json.dumps(manifest | {"sha256": sha256(manifest)}, indent=1).encode())
