"""Compile Hugging Face's ``BlipForQuestionAnswering`` for AWS Neuron (Inf2), one notebook at a time.

Read it from top to bottom: the order is that of the notebooks. Everywhere, B is the number of questions a call takes, R
the number of rows the decoder takes (B times the beams), Q the traced question length, A the traced answer length (the
start token counts), T the number of image tokens, D the hidden size and V the vocabulary size.

Facts about Neuron come from the AWS Neuron SDK documentation, https://awsdocs-neuron.readthedocs-hosted.com, SDK 2.31.
"""

import ast
import collections
import contextlib
import copy
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import linecache
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import warnings
import weakref
from dataclasses import asdict, dataclass, fields
from pathlib import Path

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="IProgress")  # without ipywidgets, tqdm says so in every notebook
    import tqdm.auto  # noqa: F401

import cloudpickle
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipProcessor,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    ResNetForImageClassification,
)
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.image_utils import is_valid_image
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithCrossAttentions
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.blip.modeling_blip_text import BlipTextLayer
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.utils import logging as transformers_logging

MODELS = Path(__file__).parent / "models"

# ---------------------------------------------------------------------------------------------------------------------
# For every notebook: where it runs, comparing, showing, waiting
# ---------------------------------------------------------------------------------------------------------------------


def default_backend():
    """``"neuron"`` where the package torch_neuronx is installed, else ``"cpu"``, the stand-in."""
    return "neuron" if importlib.util.find_spec("torch_neuronx") else "cpu"


def what_runs_here():
    """What the compiled cells of a notebook ran on, in words."""
    if default_backend() == "cpu":
        return "CPU stand-in for Neuron"
    # The tests bring a torch_neuronx of their own, which must never pass for AWS's.
    return "test double of torch_neuronx" if "double" in _version("torch-neuronx") else "AWS Neuron"


def uses_bundled_models():
    """Whether the notebooks run on this repository's own models: only of them are accuracies asserted."""
    return not (os.environ.get("BLIP_MODEL") or os.environ.get("RESNET_MODEL"))


def question_count(most=1000):
    """How many questions to ask: what ``QUESTIONS`` in the environment says, else 1,000 (20 for another checkpoint)."""
    given = os.environ.get("QUESTIONS") or ("1000" if uses_bundled_models() else "20")
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"QUESTIONS is {given!r} in the environment: give a number, 20 or more")
    return min(most, int(given))


def check_close(actual, expected, bound):
    """Assert that two tensors of one shape differ by less than `bound` everywhere; print bound and difference."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {list(actual.shape)} and {list(expected.shape)}")
    worst = (actual.double() - expected.double()).abs().max().item()
    assert worst < bound, f"max |difference| is {worst:.1e}, the bound is {bound:.0e}"
    print(f"OK  max |difference| < {bound:.0e}  (measured {worst:.1e})")


def check_equal(actual, expected, what="answers"):
    """Assert that two sequences of token ids or strings are equal, item by item, and print how many were compared."""
    actual, expected = list(actual), list(expected)
    different = [i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b]
    assert not different, f"{len(different)} of {len(actual)} {what} differ, the first at {different[0]}"
    print(f"OK  {len(actual)}/{len(actual)} {what} equal")


def progress(items, total=None):
    """Yield `items` and print a dot for every fiftieth of them, so that each run leaves the same line."""
    total = len(items) if total is None else total
    for i, item in enumerate(items, 1):
        yield item
        print("." * (i * 50 // total - (i - 1) * 50 // total), end="", flush=True)
    print(f" {total}")


def show_source(thing):
    """Print the source of a class or function of this module, without its docstrings."""
    lines = textwrap.dedent(inspect.getsource(thing)).splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            lines[node.body[0].lineno - 1 : node.body[0].end_lineno] = [None] * (
                node.body[0].end_lineno - node.body[0].lineno + 1
            )
    text = "\n".join(line for line in lines if line is not None)
    while "\n\n\n" in text or ":\n\n" in text:
        text = text.replace("\n\n\n", "\n\n").replace(":\n\n", ":\n")
    print(text)


# ---------------------------------------------------------------------------------------------------------------------
# 01  Trace a module: fixed shapes, positional tensors
# ---------------------------------------------------------------------------------------------------------------------


def load_resnet(source=None):
    """Load an image classifier.

    Parameters
    ----------
    source : str or Path, optional
        A directory or a hub name; by default the environment variable ``RESNET_MODEL``, and without it the small
        model of this repository.

    Returns
    -------
    model : ResNetForImageClassification, fp32, in eval mode
    image_processor : ConvNextImageProcessorPil
    """
    source = source or os.environ.get("RESNET_MODEL") or MODELS / "tiny-resnet"
    model = _load(ResNetForImageClassification, source)
    return model, ConvNextImageProcessorPil.from_pretrained(source)


def load_config(source):
    """The configuration of a checkpoint, which says what it is; a directory that does not exist is a `ValueError`."""
    path = Path(source)
    if not path.exists() and (path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) > 2):
        raise ValueError(f"{source} does not exist: pass a directory or a hub name")
    return AutoConfig.from_pretrained(source)


def _load(model_class, source):
    """Load in fp32 and eval mode, as ordinary tensors even under inference mode, and without a bar on stderr."""
    architectures = load_config(source).architectures or [model_class.__name__]
    if model_class.__name__ not in architectures:  # its missing weights would be random numbers
        raise ValueError(f"{source} is a {', '.join(architectures)}: pass a {model_class.__name__}")
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with torch.inference_mode(False):
            return model_class.from_pretrained(source, dtype=torch.float32).eval()
    finally:
        if bar:
            transformers_logging.enable_progress_bar()


def neuron_compiler_args(
    auto_cast="none", auto_cast_type="bf16", *, model_type="transformer", optlevel=2, logfile=None
):
    """Arguments for neuronx-cc.

    Since SDK 2.27 ``--auto-cast`` is ``none`` unless it is given, and ``--auto-cast-type`` alone changes nothing. So
    both are written, or neither type nor cast takes place.

    Parameters
    ----------
    auto_cast : {"none", "matmult", "all"}
        Which fp32 operations are cast.
    auto_cast_type : {"bf16", "fp16", "tf32", "fp8_e4m3"}
        What they are cast to.
    model_type : {"transformer", "generic", "unet-inference"}
        What the compiler optimises for.
    optlevel : {1, 2, 3}
        1 compiles fastest, 3 tries hardest.
    logfile : str or Path, optional
        Where the compiler writes its log; by default into the working directory.

    Returns
    -------
    list of str

    Raises
    ------
    ValueError
        For a value that neuronx-cc does not know.
    """
    known = {
        "auto_cast": ("none", "matmult", "all"),
        "auto_cast_type": ("bf16", "fp16", "tf32", "fp8_e4m3"),
        "model_type": ("transformer", "generic", "unet-inference"),
        "optlevel": (1, 2, 3),
    }
    given = {
        "auto_cast": auto_cast,
        "auto_cast_type": auto_cast_type,
        "model_type": model_type,
        "optlevel": optlevel,
    }
    for name, values in known.items():
        if given[name] not in values or isinstance(given[name], bool):
            raise ValueError(f"{name} is {given[name]!r}; neuronx-cc knows {', '.join(map(str, values))}")
    args = ["--model-type", model_type, "--optlevel", str(optlevel), "--auto-cast", auto_cast]
    if auto_cast != "none":
        args += ["--auto-cast-type", auto_cast_type]
    if logfile is not None:
        args += ["--logfile", str(logfile)]
    return args


def trace_module(
    module, example_inputs, *, input_output_aliases=None, backend=None, compiler_args=None, cpu_backend=False
):
    """Trace `module` for the shapes and dtypes of `example_inputs`.

    On Neuron this is ``torch_neuronx.trace``. Elsewhere it is a stand-in made with ``torch.jit.trace`` that runs on
    the CPU and keeps Neuron's rules: it takes positional tensors of exactly the traced shapes and dtypes and refuses
    anything else, also after ``torch.jit.save`` and ``torch.jit.load`` in another process.

    Parameters
    ----------
    module : nn.Module
        Its ``forward`` takes positional tensors and returns a tensor or a tuple of tensors. Put it into eval mode.
    example_inputs : Tensor or tuple of Tensor
        One call's inputs, on the CPU.
    input_output_aliases : dict of Parameter to int, optional
        State: the output of that index stays inside as the parameter's next value. Real outputs come first; the
        stand-in returns those alone, on Neuron state may follow them, which nobody should read.
    backend : {"neuron", "cpu"}, optional
        By default `default_backend`.
    compiler_args : str or list of str, optional
        For neuronx-cc; by default `neuron_compiler_args`. The stand-in does not compile and ignores them.
    cpu_backend : bool
        With AWS's packages but no Neuron device: compile for Inf2, to be copied there; see `compile_for_inf2`.

    Returns
    -------
    torch.jit.ScriptModule

    Raises
    ------
    ValueError
        If `module`, an example input, an alias or the backend is not of the kind described here.
    """
    backend = _known_backend(backend)
    example_inputs, aliases = _check_example(module, example_inputs, input_output_aliases)
    # Outside inference mode a clone is an ordinary tensor: what is traced here works in every mode later.
    with torch.inference_mode(False), torch.no_grad():
        example_inputs = tuple(example.clone() for example in example_inputs)
        _check_aliases(module, example_inputs, aliases)
        if backend == "neuron":
            if cpu_backend:  # read when torch_neuronx is imported
                os.environ.setdefault("NEURON_PLATFORM_TARGET_OVERRIDE", "inf2")
            import torch_neuronx

            args = _as_list(neuron_compiler_args() if compiler_args is None else compiler_args)
            targeted = any(arg.partition("=")[0] == "--target" for arg in args)
            on_cpu = {"cpu_backend": True} if cpu_backend else {}
            return torch_neuronx.trace(
                module,
                example_inputs,
                input_output_aliases=aliases,
                compiler_args=args + (["--target", "inf2"] if cpu_backend and not targeted else []),
                **on_cpu,
            )
        return _trace_for_cpu(module, example_inputs, aliases)


class Logits(nn.Module):
    """An image classifier as it is traced: pixel_values fp32 [B, 3, S, S] -> logits fp32 [B, N]"""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values=pixel_values).logits


def save_traced(traced, path):
    """Save a traced module to `path` so that an interrupted save leaves the former file or none."""
    with _whole_file(path) as file:
        torch.jit.save(traced, file)


@contextlib.contextmanager
def _whole_file(path):
    """A file to write to that takes the place of `path` when it is complete, and leaves nothing when it is not.

    PyTorch gets the file, not its name: where it writes by itself, a full disk ends Python.
    """
    unfinished = Path(path).with_name(f".{Path(path).name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_traced(path, *, core=None, with_state=False):
    """Load a traced module, in any grad and inference mode; on Neuron onto the NeuronCore `core`, or the next one.

    State comes to the host with the file: `with_state`, which needs a `core`, takes it to that core.
    """
    with torch.inference_mode(False):
        if default_backend() != "neuron":
            return torch.jit.load(str(path))
        import torch_neuronx  # without it torch cannot read Neuron's files

        if core is None:
            return torch.jit.load(str(path))
        with torch_neuronx.neuron_cores_context(start_nc=core, nc_count=1):
            traced = torch.jit.load(str(path))
        if with_state:  # as AWS's T5 tutorial does; otherwise it would travel in every call
            torch_neuronx.move_trace_to_device(traced, core)
        return traced


def describe_inputs(module, example_inputs):
    """The inputs that a trace is for: a dict of their names to text such as ``float32 [1, 3, 64, 64]``."""
    names = _input_names(module, len(example_inputs))
    return {name: _describe(example) for name, example in zip(names, example_inputs, strict=True)}


def check_inputs(inputs, traced_for):
    """Raise a `ValueError` unless `inputs` (tuple of Tensor) are what `traced_for` (see `describe_inputs`) says."""
    if len(inputs) != len(traced_for):
        raise ValueError(f"{len(inputs)} inputs; this graph was traced for {len(traced_for)}: {', '.join(traced_for)}")
    for value, (name, wanted) in zip(inputs, traced_for.items(), strict=True):
        if _describe(value) != wanted:
            raise ValueError(_REFUSAL.format(name=name, got=_describe(value), wanted=wanted))


class StaticGraph(nn.Module):
    """A traced module and what it was traced for: it refuses other inputs with a `ValueError` before the call.

    The module refuses them too; but what comes out of TorchScript is a ``torch.jit.Error`` of fifteen lines.
    """

    def __init__(self, graph, traced_for):
        super().__init__()
        self.graph = graph
        self.traced_for = traced_for

    def forward(self, *inputs):
        check_inputs(inputs, self.traced_for)
        return self.graph(*inputs)


_REFUSAL = "{name} is {got}; this graph was traced for {wanted}: pass exactly that, or trace it again"


def _describe(value):
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a {type(value).__name__}"


def _as_list(compiler_args):
    return shlex.split(compiler_args) if isinstance(compiler_args, str) else [str(arg) for arg in compiler_args]


def _known_backend(backend):
    if backend not in (None, "neuron", "cpu"):
        raise ValueError(f"backend is {backend!r}; there are 'neuron' and 'cpu'")
    if backend == "neuron" and default_backend() != "neuron":
        raise ValueError("backend is 'neuron', but torch_neuronx is not installed: see requirements-neuron.txt")
    return backend or default_backend()


def _input_names(module, count):
    names = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return (names + [f"number {i}" for i in range(len(names), count)])[:count]


def _check_example(module, example_inputs, aliases):
    """The example inputs as a tuple and the aliases as a dict, both as `trace_module` wants them."""
    example_inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else example_inputs
    if not isinstance(module, nn.Module):
        raise ValueError(f"module is a {type(module).__name__}: pass an nn.Module, or wrap the function in one")
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError("module is a ScriptModule, which has been traced already: pass the module that it was made of")
    if not isinstance(example_inputs, tuple | list) or not example_inputs:
        raise ValueError(f"example_inputs is {_describe(example_inputs)}: pass a tuple of tensors, in forward's order")
    for name, example in zip(_input_names(module, len(example_inputs)), example_inputs, strict=True):
        if not isinstance(example, torch.Tensor):
            raise ValueError(f"example input {name} is {_describe(example)}: only tensors cross the trace boundary")
    parameters = {id(parameter) for parameter in module.parameters()}
    for key, index in (aliases or {}).items():
        if id(key) not in parameters or not isinstance(index, int) or isinstance(index, bool):
            raise ValueError("input_output_aliases maps Parameters of the module to the index of an output")
    return tuple(example_inputs), aliases or {}


def _check_aliases(module, example_inputs, aliases):
    outputs = module(*example_inputs) if aliases else ()
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    if aliases and len(outputs) == len(set(aliases.values())):
        raise ValueError("input_output_aliases takes every output: return a real one first, the state after it")
    if len(set(aliases.values())) < len(aliases):
        raise ValueError("input_output_aliases names an output twice: each is the next value of one parameter")
    for parameter, index in aliases.items():
        if not 0 <= index < len(outputs):
            raise ValueError(
                f"input_output_aliases names output {index}; the module has {len(outputs)}, counted from 0"
            )
        if _describe(outputs[index]) != _describe(parameter):
            raise ValueError(
                f"input_output_aliases: output {index} is {_describe(outputs[index])}, its parameter "
                f"{_describe(parameter)}; both have to be the same"
            )


class _KeepState(nn.Module):
    """What ``input_output_aliases`` does on a NeuronCore: an aliased output becomes its parameter's next value."""

    def __init__(self, module, aliases):
        super().__init__()
        self.module = module
        self.aliases = aliases

    def forward(self, *inputs):
        outputs = self.module(*inputs)
        # Clones, since a module may return its state, or a view of it, as a real output too.
        returned = tuple(o.clone() for i, o in enumerate(outputs) if i not in self.aliases.values())
        for parameter, index in self.aliases.items():
            parameter.copy_(outputs[index])
        return returned[0] if len(returned) == 1 else returned


def _trace_for_cpu(module, example_inputs, aliases):
    """``torch.jit.trace`` behind checks that are part of the saved file.

    A trace accepts any shape and dtype. The checks are TorchScript written for the number of inputs at hand:
    ``forward`` looks at shapes and dtypes, and a forward pre-hook, whose input is the tuple of positional tensors,
    refuses keywords, other counts and Python values. A made-up file name keeps paths out of the messages.
    """
    names = list(describe_inputs(module, example_inputs))
    arguments = [f"positional_{i}" for i in range(len(names))]
    tensors = ", ".join("Tensor" for _ in names)
    checks = ""
    for name, argument, example in zip(names, arguments, example_inputs, strict=True):
        refusal = _REFUSAL.format(name=name, got="{got}", wanted=_describe(example)).split("{got}")
        checks += f"""
    if {argument}.dtype != {example.dtype} or {argument}.shape != {list(example.shape)}:
        raise ValueError({refusal[0]!r} + name_of({argument}.dtype) + " " + str({argument}.shape) + {refusal[1]!r})"""
    source = f"""
def name_of(dtype: int) -> str:
    names = {{{", ".join(f'{dtype}: "{str(dtype).removeprefix("torch.")}"' for dtype in _DTYPES)}}}
    return names[dtype] if dtype in names else "another dtype"

def forward(self, {", ".join(f"{argument}: Tensor" for argument in arguments)}):{checks}
    return self.graph({", ".join(arguments)})

def takes_positional_tensors_only(self, input: Tuple[{tensors}]) -> None:
    return None
"""
    file = f"<inputs {describe_inputs(module, example_inputs)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = {"__name__": __name__, "Tensor": torch.Tensor, "Tuple": tuple, "torch": torch}
    exec(compile(source, file, "exec"), scope)
    guarded = type("TracedForCpu", (nn.Module,), {"forward": scope["forward"]})()
    training = module.training
    if aliases:  # the graph gets a state of its own, outside inference mode and autograd
        index_of = {id(parameter): index for parameter, index in aliases.items()}
        own = copy.deepcopy(module)
        pairs = zip(module.parameters(), own.parameters(), strict=True)
        aliases = {mine: index_of[id(theirs)] for theirs, mine in pairs if id(theirs) in index_of}
        module = _KeepState(own.requires_grad_(False), aliases)
    before = {parameter: parameter.clone() for parameter in aliases}
    with _quiet_properties():
        guarded.graph = torch.jit.trace(module, example_inputs, check_trace=False)
    for parameter, value in before.items():
        parameter.copy_(value)
    guarded.register_forward_pre_hook(scope["takes_positional_tensors_only"])
    return torch.jit.script(guarded.train(training))


@contextlib.contextmanager
def _quiet_properties():
    """torch.jit.trace reads every property of a module, and some of transformers' warn when they are read."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


# ---------------------------------------------------------------------------------------------------------------------
# 02  Wrap the two encoders
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlipShapes:
    """The sizes that a trace fixes; those of the picture come from the model.

    Parameters
    ----------
    batch_size : int
        B, questions a call of the question graph.
    num_beams : int
        The decoder's R rows are ``batch_size * num_beams``: a call of ``generate()`` fits when its questions times its
        beams (or returned sequences) are no more.
    question_length : int, or tuple of int
        Q, tokens of a question with its ``[CLS]`` and ``[SEP]``. Several lengths make a question graph each, of which
        a call takes the smallest that fits; Q is the longest then.
    answer_length : int
        A, tokens of an answer with its start token: at most A - 1 new ones.
    """

    batch_size: int = 1
    num_beams: int = 1
    question_length: int | tuple[int, ...] = 16
    answer_length: int = 24

    def __post_init__(self):
        for field in fields(self):
            least = 2 if field.name == "answer_length" else 1
            given = getattr(self, field.name)
            several = field.name == "question_length" and isinstance(given, tuple | list)
            for value in given if several and given else [given]:
                if not isinstance(value, int) or isinstance(value, bool) or value < least:
                    raise ValueError(f"{field.name} is {given!r}: give a whole number of at least {least}")
        object.__setattr__(self, "question_length", self.question_lengths)
        if len(self.question_lengths) == 1:
            object.__setattr__(self, "question_length", self.longest_question)

    @property
    def rows(self):
        """R, rows of the decoder."""
        return self.batch_size * self.num_beams

    @property
    def question_lengths(self):
        """The lengths that there is a question graph for, the shortest first."""
        several = isinstance(self.question_length, tuple | list)
        return tuple(sorted(set(self.question_length))) if several else (self.question_length,)

    @property
    def longest_question(self):
        """Q: what questions are padded to, and what the decoder was traced for."""
        return self.question_lengths[-1]


def load_blip(source=None):
    """Load a visual-question-answering model, as Hugging Face made it.

    Parameters
    ----------
    source : str or Path, optional
        A directory or a hub name such as ``Salesforce/blip-vqa-base``; by default the environment variable
        ``BLIP_MODEL``, and without it the small model of this repository.

    Returns
    -------
    model : BlipForQuestionAnswering, fp32, in eval mode
    processor : BlipProcessor
        With the Pillow image processor, which needs no torchvision: one checkpoint gives the same pixels everywhere.
    """
    source = source or os.environ.get("BLIP_MODEL") or MODELS / "tiny-blip-vqa"
    model = _load(BlipForQuestionAnswering, source)
    image_processor = BlipImageProcessorPil.from_pretrained(source)
    return model, BlipProcessor(image_processor, AutoTokenizer.from_pretrained(source))


class NeuronVisionModel(nn.Module):
    """The image graph: pixels in, image tokens out, one image a call."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        """pixel_values fp32 [1, 3, height, width] -> image_embeds fp32 [1, T, D]"""
        return self.model(pixel_values=pixel_values, interpolate_pos_encoding=False).last_hidden_state


class VisionModelWrapper(nn.Module):
    """Stands in for ``model.vision_model``: keyword arguments and output object outside, the image graph inside."""

    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def forward(self, pixel_values, interpolate_pos_encoding=False):
        """pixel_values fp32 [images, 3, height, width] -> last_hidden_state fp32 [images, T, D]"""
        if interpolate_pos_encoding:
            raise ValueError("interpolate_pos_encoding is True; the image graph has one image size: resize the picture")
        image_embeds = torch.cat([self.graph(image[None]) for image in pixel_values])
        return BaseModelOutputWithPooling(last_hidden_state=image_embeds)


@contextlib.contextmanager
def acting_question_mask(model):
    """Let the question mask act in the cross-attention of `model` for the length of a ``with`` block.

    transformers 5 hands ``encoder_attention_mask`` to ``BlipTextAttention`` as its ``attention_mask``, and
    ``BlipTextSelfAttention`` reads ``encoder_attention_mask`` alone when it attends across: no mask arrives. A forward
    pre-hook hands it on under the name that is read. Masks that are all ones change nothing.
    """

    def hand_on(module, args, kwargs):
        return args, {**kwargs, "encoder_attention_mask": kwargs.get("attention_mask")}

    layers = [m for m in model.modules() if isinstance(m, BlipTextLayer) and hasattr(m, "crossattention")]
    hooks = [layer.crossattention.self.register_forward_pre_hook(hand_on, with_kwargs=True) for layer in layers]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def additive_mask(mask):
    """1 and 0 -> 0 and -10,000, what attention adds to its scores; a dimension for the heads is put in.

    The graph builds it from its input: Hugging Face drops a mask that is all ones while a lazy trace (torch-xla,
    Neuron) is made, and the graph would ignore masks for ever. exp(-10,000) is 0 in every format, and unlike the
    smallest fp32 number it is finite in bf16 and fp16 as well.

    mask int64 [rows, ...] -> fp32 [rows, 1, ...]
    """
    return (1.0 - mask.float()).unsqueeze(1) * -10_000.0


class NeuronTextEncoder(nn.Module):
    """The question graph: B padded questions about one image."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, encoder_hidden_states):
        """input_ids, attention_mask int64 [B, Q], encoder_hidden_states fp32 [1, T, D] -> features fp32 [B, Q, D]"""
        return self.model(
            input_ids=input_ids,
            attention_mask=additive_mask(attention_mask[:, None, :]),
            encoder_hidden_states=encoder_hidden_states,
        ).last_hidden_state


class TextEncoderWrapper(nn.Module):
    """Stands in for ``model.text_encoder``: any number of questions about one image outside, B at a time inside."""

    def __init__(self, graph, shapes):
        super().__init__()
        self.graph = graph
        self.shapes = shapes

    def forward(self, input_ids, attention_mask, encoder_hidden_states, encoder_attention_mask=None, return_dict=False):
        """input_ids, attention_mask int64 [questions, Q], encoder_hidden_states fp32 [1, T, D]
        -> (features fp32 [questions, Q, D],), or whatever else the graph makes of a question

        Every image token counts, so that ``encoder_attention_mask`` has nothing to say."""
        questions = []
        batch_size = self.shapes.batch_size
        for ids, mask in zip(input_ids.split(batch_size), attention_mask.split(batch_size), strict=True):
            embeds = self.graph(fill_rows(ids, batch_size), fill_rows(mask, batch_size), encoder_hidden_states)
            questions.append(embeds[: len(ids)])
        return (torch.cat(questions),)


def fill_rows(tensor, rows):
    """Repeat the last row until there are `rows`; what comes out of such filler is cut off again."""
    return torch.cat([tensor, tensor[-1:].expand(rows - len(tensor), *tensor.shape[1:])])


def pad_question(input_ids, attention_mask, question_length, pad_token_id=0):
    """Pad to the traced length: int64 [questions, q] -> input_ids and attention_mask int64 [questions, Q].

    Raises
    ------
    ValueError
        If a question is longer than Q or has no token at all; nothing is cut off.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    tensors = isinstance(input_ids, torch.Tensor) and isinstance(attention_mask, torch.Tensor)
    if not tensors or input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"input_ids is {_describe(input_ids)} and attention_mask {_describe(attention_mask)}: both have to be "
            "[questions, tokens]"
        )
    attention_mask = (attention_mask != 0).long()
    tokens = input_ids.shape[1]
    if tokens > question_length:
        raise ValueError(
            f"question has {tokens} tokens; this model was traced for {question_length}: "
            f"trace it with question_length >= {tokens}"
        )
    if (attention_mask.diff(dim=1) > 0).any():
        raise ValueError("a question is padded on its left: pad it on the right, where positions stay what they are")
    if not attention_mask.any(dim=1).all():  # as it is where there is no token at all
        raise ValueError("a question is empty (its attention_mask has no 1): ask something")
    padding = (0, question_length - tokens)
    return F.pad(input_ids, padding, value=pad_token_id), F.pad(attention_mask, padding)


# ---------------------------------------------------------------------------------------------------------------------
# 03  Pad the decoder
# ---------------------------------------------------------------------------------------------------------------------


class PaddedDecoder(nn.Module):
    """The answer graph: all A tokens of the answer so far, padded, in; the logits of one position out."""

    def __init__(self, model):
        super().__init__()
        self.decoder = model

    def forward(self, input_ids, encoder_hidden_states, encoder_attention_mask, attention_mask, position):
        """input_ids, attention_mask int64 [R, A], encoder_hidden_states fp32 [R, Q, D], encoder_attention_mask int64
        [R, Q], position int64 [1] -> logits fp32 [R, 1, V]

        The position is chosen before the vocabulary head, which so runs on one position instead of A."""
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=attention_mask.dtype, device=attention_mask.device).tril()
        with acting_question_mask(self.decoder):
            return self.decoder(
                input_ids=input_ids,
                attention_mask=additive_mask(causal * attention_mask[:, None, :]),
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=additive_mask(encoder_attention_mask[:, None, :]),
                logits_to_keep=position,
                use_cache=False,
            ).logits


class DecoderOutputFormatter(nn.Module):
    """Gives the graph's bare tensor the name that ``generate()`` reads."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, *inputs):
        outputs = self.decoder(*inputs)
        # In AWS's T5 tutorial the state comes back as well, behind what is read; the stand-in keeps it inside.
        logits = outputs[0] if isinstance(outputs, tuple | list) else outputs
        return CausalLMOutputWithCrossAttentions(logits=logits)


class DecoderPaddedGenerator(PreTrainedModel, GenerationMixin):
    """Stands in for ``model.text_decoder``: Hugging Face's ``generate()`` around a graph of fixed length.

    Parameters
    ----------
    config : BlipTextConfig
    decoder : nn.Module
        A `PaddedDecoder`, or what became of it in a trace.
    shapes : BlipShapes
    generation_config : GenerationConfig
        That of ``model.text_decoder``: it, not the whole model's, rules what ``generate()`` does.
    """

    main_input_name = "input_ids"

    def __init__(self, config, decoder, shapes, generation_config):
        super().__init__(config)
        self.decoder = DecoderOutputFormatter(decoder)
        self.shapes = shapes
        self.generation_config = GenerationConfig.from_dict(generation_config.to_dict() | {"use_cache": False})

    @property
    def device(self):
        """Inputs come from and outputs go to the CPU, wherever the graph runs."""
        return torch.device("cpu")

    def prepare_inputs_for_generation(self, input_ids, encoder_hidden_states, encoder_attention_mask, **kwargs):
        """Pad the tokens so far, int64 [rows, so far], to A; a mask that is 1 for them; the last one's position."""
        so_far = input_ids.shape[1]
        padding = (0, self.shapes.answer_length - so_far)
        return {
            "input_ids": F.pad(input_ids, padding, value=self.config.pad_token_id),
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "attention_mask": F.pad(torch.ones_like(input_ids), padding),
            "position": torch.tensor([so_far - 1]),
        }

    def forward(self, input_ids, encoder_hidden_states, encoder_attention_mask, attention_mask, position, **kwargs):
        """As `PaddedDecoder`, for any number of rows up to R; filler rows are added here and cut off again, so that
        ``generate()`` and its random numbers see real rows only."""
        per_row = (input_ids, encoder_hidden_states, encoder_attention_mask, attention_mask)
        output = self.decoder(*(fill_rows(tensor, self.shapes.rows) for tensor in per_row), position)
        return CausalLMOutputWithCrossAttentions(logits=output.logits[: len(input_ids)])


# ---------------------------------------------------------------------------------------------------------------------
# 04  Assemble and verify
# ---------------------------------------------------------------------------------------------------------------------


class NeuronBlipForQuestionAnswering(BlipForQuestionAnswering):
    """A ``BlipForQuestionAnswering`` whose three parts are graphs of fixed shape.

    Parameters
    ----------
    config : BlipConfig
    graphs : dict of str to nn.Module
        By the names of `parts_to_trace`: traced, or the modules that are traced (which keep no state: a cached decoder
        has to be traced).
    shapes : BlipShapes
    generation_config : GenerationConfig
        That of the text decoder.
    decoder : type
        What stands in for the text decoder: `DecoderPaddedGenerator`, or one of those from notebook 05.
    """

    def __init__(self, config, graphs, shapes, generation_config, decoder=DecoderPaddedGenerator):
        # Past BlipForQuestionAnswering's own __init__, which would draw a second full set of random weights.
        super(BlipForQuestionAnswering, self).__init__(config)
        self.decoder_pad_token_id = config.text_config.pad_token_id
        self.decoder_start_token_id = config.text_config.bos_token_id
        self.shapes = shapes
        self.vision_model = VisionModelWrapper(graphs["vision_model"])
        questions = {name: graphs[name] for name in _question_graphs(shapes)}
        self.text_encoder = TextEncoderWrapper(
            ShortestQuestionGraph(questions, shapes) if len(questions) > 1 else questions["text_encoder"], shapes
        )
        self.text_decoder = decoder(config.text_config, graphs["text_decoder"], shapes, generation_config)
        self.eval()

    @property
    def device(self):
        """Inputs come from and outputs go to the CPU, wherever the graphs run."""
        return torch.device("cpu")

    @classmethod
    def from_pretrained(cls, directory, *, core=0):
        """Load what `trace` left in `directory`, on Neuron onto the NeuronCore `core`.

        Raises
        ------
        ValueError
            If the artifact is incomplete, was changed, or was made by other versions or for another backend.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        versions = _versions(_known_backend(manifest["backend"]))
        for name, part in manifest["parts"].items():
            problem = _changes(part, {**part, "versions": versions}) or _damage(directory, name, part)
            if problem:
                raise ValueError(f"{name}: {problem}; trace the model again, what is still valid will be kept")
        shapes = BlipShapes(**manifest["shapes"])
        wanted = ["vision_model", *_question_graphs(shapes), "text_decoder"]
        missing = [name for name in wanted if name not in manifest["parts"]]
        if missing:
            raise ValueError(f"{', '.join(missing)} not traced yet; call trace() again, it goes on where it stopped")
        graphs = {
            name: load_traced(directory / f"{name}.pt", core=core, with_state=bool(part["state"]))
            for name, part in manifest["parts"].items()
        }
        return cls(
            BlipConfig.from_dict(manifest["config"]),
            {name: StaticGraph(graphs[name], part["inputs"]) for name, part in manifest["parts"].items()},
            shapes,
            GenerationConfig.from_dict(manifest["generation_config"]),
            _decoders()[manifest["decoder"]][1],
        )

    def forward(self, *args, **kwargs):
        """Not compiled: what ``forward`` of the original computes is a loss, for training."""
        raise NotImplementedError("a compiled model answers with generate(); train the original")

    @torch.no_grad()
    def encode_image(self, pixel_values):
        """Run the image graph, once for any number of questions asked later.

        pixel_values fp32 [images, 3, height, width] -> last_hidden_state fp32 [images, T, D], in the output object that
        `generate` and `infer` take as ``image``
        """
        self._check_image(pixel_values)
        return self.vision_model(pixel_values)

    @torch.no_grad()
    def generate(
        self,
        input_ids,
        pixel_values=None,
        attention_mask=None,
        interpolate_pos_encoding=False,
        *,
        image=None,
        **generate_kwargs,
    ):
        """Answer questions; as Hugging Face's method, with a question mask that acts.

        Parameters
        ----------
        input_ids : int64 [questions, q], q <= Q
        pixel_values : fp32 [images, 3, height, width]
            An image a question, or one for all. An image that comes several times is encoded once.
        attention_mask : int64 [questions, q], optional
            0 where a question is padded.
        image : what `encode_image` returned, instead of ``pixel_values``
        **generate_kwargs
            Those of ``GenerationMixin.generate``. Without a limit there are at most A - 1 new tokens.

        Returns
        -------
        int64 [rows, tokens], or what ``return_dict_in_generate`` asks for

        Raises
        ------
        ValueError
            If a question, the batch or the limit is larger than what was traced, a token is not in the vocabulary, or
            an argument is nothing that a compiled model can do.
        """
        self._check_arguments(generate_kwargs)
        generate_kwargs = self._with_limit(generate_kwargs)
        images = self._check_images(pixel_values, image, interpolate_pos_encoding)
        self._check_questions(input_ids, len(images), generate_kwargs)
        features, mask = self._encode_questions(input_ids, attention_mask, images, encoded=image is not None)
        return self.text_decoder.generate(
            input_ids=torch.full((len(input_ids), 1), self.decoder_start_token_id),
            eos_token_id=self.config.text_config.sep_token_id,
            pad_token_id=self.config.text_config.pad_token_id,
            encoder_hidden_states=features,
            encoder_attention_mask=mask,
            **generate_kwargs,
        )

    def _encode_questions(self, input_ids, attention_mask, images, encoded):
        """What the question graph makes of each question about its image, and the padded mask, int64 [questions, Q]."""
        length, pad_token_id = self.shapes.longest_question, self.config.text_config.pad_token_id
        input_ids, attention_mask = pad_question(input_ids, attention_mask, length, pad_token_id)
        features = [None] * len(input_ids)
        for image, rows in _rows_by_image(images, len(input_ids)):
            image_embeds = image if encoded else self.vision_model(image)[0]
            of_image = self.text_encoder(input_ids[rows], attention_mask[rows], image_embeds)[0]
            for row, feature in zip(rows, of_image, strict=True):
                features[row] = feature
        return torch.stack(features), attention_mask

    def _with_limit(self, generate_kwargs):
        """The same arguments with an explicit limit of new tokens, which is no more than A - 1."""
        most = self.shapes.answer_length - 1
        limits = []
        for of_the_model in (None, self.text_decoder.generation_config):
            new = _setting("max_new_tokens", generate_kwargs, of_the_model)
            length = _setting("max_length", generate_kwargs, of_the_model)  # of which one is the start token
            limits += [] if new is None else [_count("max_new_tokens", new)]
            limits += [] if length is None else [_count("max_length", length) - 1]
            if of_the_model is None and limits and limits[0] > most:
                raise ValueError(
                    f"the answer may have {limits[0]} new tokens; this model was traced for {most}: ask for "
                    f"max_new_tokens <= {most}, or trace it with answer_length >= {limits[0] + 1}"
                )
        limit = min(limits[0], most) if limits else most
        return {k: v for k, v in generate_kwargs.items() if k != "max_length"} | {"max_new_tokens": limit}

    def _check_arguments(self, generate_kwargs):
        for name in _NOT_COMPILED:
            value = _setting(name, generate_kwargs, self.text_decoder.generation_config)
            if value is not None and value is not False and not (name == "guidance_scale" and value == 1):
                raise ValueError(f"{name} is nothing that a compiled model can do: leave it out, or ask the original")

    def _check_images(self, pixel_values, image, interpolate_pos_encoding):
        if (pixel_values is None) == (image is None):
            raise ValueError("pass either pixel_values or image, what encode_image made of them, and not both")
        if interpolate_pos_encoding:
            raise ValueError("interpolate_pos_encoding is True; the image graph has one image size: resize the picture")
        return self._check_image(pixel_values) if image is None else self._check_encoded(image)

    def _check_image(self, pixel_values):
        _check_dimensions("pixel_values", pixel_values, 4)
        if pixel_values.dtype != torch.float32:
            raise ValueError(f"pixel_values is {_describe(pixel_values)}; the graph was traced for float32: pass that")
        return pixel_values

    def _check_encoded(self, image):
        image_embeds = image.last_hidden_state if isinstance(image, BaseModelOutputWithPooling) else None
        if image_embeds is None:
            raise ValueError(f"image is {_describe(image)}: pass what encode_image returns, or pixel_values")
        _check_dimensions("image", image_embeds, 3)
        if image_embeds.dtype != torch.float32:
            raise ValueError(f"image is {_describe(image_embeds)}; the graph was traced for float32: pass that")
        return image_embeds

    def _check_questions(self, input_ids, images, generate_kwargs):
        _check_dimensions("input_ids", input_ids, 2)
        questions, each = len(input_ids), _rows_per_question(generate_kwargs, self.text_decoder.generation_config)
        if images not in (1, questions):
            raise ValueError(f"{images} images for {questions} questions: pass one each or one for all")
        if questions * each > self.shapes.rows:
            raise ValueError(
                f"{questions} questions with {each} rows each need {questions * each} rows; this model was traced for "
                f"{self.shapes.rows}: pass fewer, or trace it with batch_size * num_beams >= {questions * each}"
            )
        last = self.config.text_config.vocab_size - 1
        if input_ids.numel() and not 0 <= input_ids.min() <= input_ids.max() <= last:
            raise ValueError(
                f"input_ids has tokens from {input_ids.min()} to {input_ids.max()}; the vocabulary has 0 to {last}: "
                "use the processor of this checkpoint"
            )


def _check_dimensions(name, tensor, dims):
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != dims or not len(tensor):
        raise ValueError(f"{name} is {_describe(tensor)}: pass a tensor of {dims} dimensions, as the processor")


def _setting(name, generate_kwargs, of_the_model):
    """An argument of generate(): by keyword, else in a generation_config, else the model's own; None if nowhere."""
    given = (generate_kwargs.get("generation_config"), of_the_model)
    values = [generate_kwargs.get(name), *(getattr(config, name, None) for config in given)]
    return next((value for value in values if value is not None), None)


def _count(name, value):
    """`value`, which has to be a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}: give a whole number of at least 1")
    return value


def _rows_per_question(generate_kwargs, of_the_model):
    """Rows that a question takes."""
    given = {name: _setting(name, generate_kwargs, of_the_model) for name in ("num_beams", "num_return_sequences")}
    return max(1 if value is None else _count(name, value) for name, value in given.items())


# What generate() of the original can do and these graphs can't: they return logits alone, and keep their own cache.
_NOT_COMPILED = (
    "assistant_model",
    "cache",
    "custom_generate",
    "guidance_scale",
    "inputs_embeds",
    "output_attentions",
    "output_hidden_states",
    "past_key_values",
    "prompt_lookup_num_tokens",
)


def _rows_by_image(images, questions):
    """Each different image, [1, ...] as `images` has them, with the rows of its questions."""
    if len(images) == 1:
        return [(images, list(range(questions)))]
    rows = {}
    for row, image in enumerate(images):
        rows.setdefault(image.numpy().tobytes(), []).append(row)
    return [(images[of_image[:1]], of_image) for of_image in rows.values()]


# To be raised by whoever makes a wrapper compute something else: older artifacts are then traced again.
FORMAT = 2


def _question_graphs(shapes):
    """The names of the question graphs, with the length of each."""
    if len(shapes.question_lengths) == 1:
        return {"text_encoder": shapes.longest_question}
    return {f"text_encoder_{length}": length for length in shapes.question_lengths}


def _decoders():
    """For each kind of decoder the module that is traced, and what stands in for ``model.text_decoder`` around it."""
    return {
        "padded": (PaddedDecoder, DecoderPaddedGenerator),
        "cached": (CachedDecoder, DecoderCachedGenerator),
        "greedy": (GreedyDecoder, DecoderGreedyGenerator),
    }


def parts_to_trace(model, shapes, decoder="cached"):
    """The modules that are traced and example inputs for each: ``{name: (module, example_inputs)}``.

    The example masks are ragged: no value of theirs may end up in a graph, and a mask of ones is the likeliest to.
    `decoder` is ``"padded"``, ``"cached"`` or ``"greedy"``, a cached one that chooses the token itself.
    """
    if decoder not in _decoders():
        raise ValueError(f"decoder is {decoder!r}; there are {', '.join(_decoders())}")
    text, vision = model.config.text_config, model.config.vision_config
    longest = text.max_position_embeddings
    if max(shapes.longest_question, shapes.answer_length) > longest:
        raise ValueError(f"{shapes} is longer than the {longest} positions that this checkpoint has: shorten it")
    pixel_values = torch.zeros(1, 3, vision.image_size, vision.image_size)
    parts = {"vision_model": (NeuronVisionModel(model.vision_model), (pixel_values,))}
    image_embeds = torch.zeros(1, model.vision_model.embeddings.num_positions, vision.hidden_size)
    for name, length in _question_graphs(shapes).items():
        question = torch.full((shapes.batch_size, length), text.pad_token_id)
        question_mask = (torch.arange(length) < 1).long().expand(shapes.batch_size, -1)
        padded = decoder == "padded"
        encoder = NeuronTextEncoder(model.text_encoder) if padded else CachedTextEncoder(model)
        parts[name] = (encoder, (question, question_mask, image_embeds))
    if decoder == "padded":
        answer = (
            torch.full((shapes.rows, shapes.answer_length), text.pad_token_id),
            torch.zeros(shapes.rows, shapes.longest_question, text.hidden_size),
            (torch.arange(shapes.longest_question) < 1).long().expand(shapes.rows, -1),
            (torch.arange(shapes.answer_length) < 2).long().expand(shapes.rows, -1),
            torch.tensor([1]),
        )
        return parts | {"text_decoder": (PaddedDecoder(model.text_decoder), answer)}
    step = (torch.full((shapes.rows, 1), text.pad_token_id), torch.tensor([1]), torch.arange(shapes.rows))
    return parts | {"text_decoder": (_decoders()[decoder][0](model.text_decoder, shapes), step)}


def trace(
    model,
    directory,
    shapes=None,
    *,
    decoder="cached",
    greedy=False,
    dtype=torch.float32,
    backend=None,
    compiler_args=None,
):
    """Trace the parts of `model` into `directory` and load them as one model.

    What is there already and still valid is kept; the rest is traced, with the reason printed. Each part is complete on
    disk before the manifest names it: after an interruption the next call goes on from there.

    Parameters
    ----------
    model : BlipForQuestionAnswering
        In eval mode, fp32, on the CPU.
    directory : str or Path
        Made if missing. Holds ``manifest.json`` and a ``.pt`` file a part.
    shapes : BlipShapes, optional
        By default ``BlipShapes()``.
    decoder : {"cached", "padded"}
        One that keeps keys and values (notebook 05), or one that computes the whole answer anew (notebook 03).
    greedy : bool
        Of a cached decoder: choose the token inside the graph, which returns ids and no logits.
    dtype : {torch.float32, torch.bfloat16}
        What matrices are multiplied in; see `round_matrices`. On Neuron the compiler's flags say it.
    backend, compiler_args
        As in `trace_module`.

    Returns
    -------
    NeuronBlipForQuestionAnswering

    Raises
    ------
    ValueError
        If an argument is not of the kind described here.
    """
    _trace_parts(model, directory, shapes, decoder, greedy, dtype, backend, compiler_args)
    return NeuronBlipForQuestionAnswering.from_pretrained(directory)


def compile_for_inf2(
    model, directory, shapes=None, *, decoder="cached", greedy=False, dtype=torch.float32, compiler_args=None
):
    """As `trace`, on a machine with AWS's packages but without a Neuron device: compile, and load nothing.

    Copy `directory` to an Inf2 instance with the same versions of torch, transformers, torch-neuronx and neuronx-cc,
    and load it there with ``NeuronBlipForQuestionAnswering.from_pretrained``; `trace` keeps it as well.
    ``torch_neuronx.trace(cpu_backend=True)`` does it, with ``--target inf2``, and with
    ``NEURON_PLATFORM_TARGET_OVERRIDE`` in the environment before the package is imported.

    Raises
    ------
    ValueError
        As `trace`; also where torch_neuronx is not installed.
    """
    _trace_parts(model, directory, shapes, decoder, greedy, dtype, "neuron", compiler_args, cpu_backend=True)


def _trace_parts(model, directory, shapes, decoder, greedy, dtype, backend, compiler_args, cpu_backend=False):
    directory, backend = Path(directory), _known_backend(backend)
    shapes = BlipShapes() if shapes is None else shapes
    if decoder not in ("cached", "padded"):
        raise ValueError(f"decoder is {decoder!r}; there are 'cached' and 'padded'")
    if greedy and decoder != "cached":
        raise ValueError("greedy=True chooses the token inside a cached decoder: pass decoder='cached' with it")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype is {dtype!r}; there are torch.float32 and torch.bfloat16")
    if dtype == torch.bfloat16 and compiler_args is not None:
        raise ValueError("dtype=torch.bfloat16 chooses the compiler's flags: pass it or compiler_args, not both")
    if not isinstance(model, BlipForQuestionAnswering) or isinstance(model, NeuronBlipForQuestionAnswering):
        raise ValueError(f"model is a {type(model).__name__}: pass a BlipForQuestionAnswering that is not compiled")
    if model.decoder_start_token_id != model.config.text_config.bos_token_id:
        raise ValueError(
            f"decoder_start_token_id is {model.decoder_start_token_id}, bos_token_id of the text_config "
            f"{model.config.text_config.bos_token_id}: a compiled model starts with the latter, set both"
        )
    if not isinstance(shapes, BlipShapes):
        raise ValueError(f"shapes is a {type(shapes).__name__}: pass BlipShapes(...)")
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode, a trace would keep its dropout: call model.eval() first")
    others = {_describe(p).split()[0] for p in model.parameters()} - {"float32"}
    if others:
        raise ValueError(f"the model has weights in {', '.join(others)}; float32 is what is traced: call model.float()")
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file: pass a directory")
    if compiler_args is None:
        auto_cast = "none" if dtype == torch.float32 else "matmult"
        compiler_args = neuron_compiler_args(auto_cast, "bf16") if backend == "neuron" else []
    try:
        known = read_manifest(directory)["parts"]
    except ValueError:
        known = {}
    manifest = {
        "format": FORMAT,
        "shapes": asdict(shapes),
        "decoder": "greedy" if greedy else decoder,
        "backend": backend,
        "config": model.config.to_dict(),
        "generation_config": model.text_decoder.generation_config.to_dict(),
        "parts": {},
    }
    parts, wanted, reasons = parts_to_trace(model, shapes, manifest["decoder"]), {}, {}
    for name, (module, example_inputs) in parts.items():
        config = model.config.vision_config if name == "vision_model" else model.config.text_config
        wanted[name] = {
            "kind": type(module).__name__,
            "inputs": describe_inputs(module, example_inputs),
            "state": {f"state {i}": _describe(parameter) for i, parameter in enumerate(_state(module))},
            "dtype": str(dtype).removeprefix("torch."),
            "weights": hash_weights(module),
            "config": _hash_config(config),
            "backend": backend,
            "compiler_args": _as_list(compiler_args),
            "versions": _versions(backend),
        }
        reasons[name] = "not traced yet"
        if name in known:
            reasons[name] = _changes(known[name], wanted[name]) or _damage(directory, name, known[name])
        if not reasons[name]:
            manifest["parts"][name] = known[name]
    directory.mkdir(parents=True, exist_ok=True)
    _write_manifest(directory, manifest)
    width = max(map(len, parts))
    for name, (module, example_inputs) in parts.items():
        print(f"{name:<{width}}  {'traced: ' + reasons[name] if reasons[name] else 'kept'}", flush=True)
        if reasons[name]:
            if dtype != torch.float32 and backend == "cpu":
                module = round_matrices(module, dtype)
            traced = trace_module(
                module,
                example_inputs,
                input_output_aliases={parameter: index for index, parameter in enumerate(_state(module), 1)},
                backend=backend,
                compiler_args=compiler_args,
                cpu_backend=cpu_backend,
            )
            save_traced(traced, directory / f"{name}.pt")
            manifest["parts"][name] = wanted[name] | {"sha256": _hash_file(directory / f"{name}.pt")}
            _write_manifest(directory, manifest)
            del traced


def read_manifest(directory):
    """What `directory` holds, as `trace` wrote it down.

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
        sha256 = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError("manifest.json is damaged: trace the model again") from None
    if sha256 != _hash_json(manifest):
        raise ValueError("manifest.json was changed after it was written: trace the model again")
    if manifest["format"] != FORMAT:
        raise ValueError(f"manifest.json has format {manifest['format']}, this module {FORMAT}: trace the model again")
    return manifest


def _write_manifest(directory, manifest):
    with _whole_file(directory / "manifest.json") as file:
        file.write(json.dumps(manifest | {"sha256": _hash_json(manifest)}, indent=1).encode())


def _changes(known, wanted):
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
    return ""


def _damage(directory, name, part):
    if not (directory / f"{name}.pt").is_file():
        return f"{name}.pt is missing"
    return "" if _hash_file(directory / f"{name}.pt") == part["sha256"] else f"{name}.pt was changed after its trace"


def _versions(backend):
    packages = ["torch", "transformers"] + (["torch-neuronx", "neuronx-cc"] if backend == "neuron" else [])
    return {package: _version(package).split("+")[0] for package in packages}


def _version(package):
    return importlib.metadata.version(package)


def _state(module):
    """The Parameters of a module that are not its weights."""
    return list(getattr(module, "state", []))


def hash_weights(module):
    """SHA-256 of the names and values of a module's weights, without its state: str, as in the manifest of `trace`."""
    digest, state = hashlib.sha256(), {id(parameter) for parameter in _state(module)}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in state:
            continue
        digest.update(f"{name} {_describe(tensor)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash_config(config):
    config = config.to_dict()
    return _hash_json({key: config[key] for key in config if key not in ("transformers_version", "_name_or_path")})


def _hash_json(value):
    read_back = json.loads(json.dumps(value))  # JSON has no integer keys: they come back as str, and sort as such
    return hashlib.sha256(json.dumps(read_back, sort_keys=True).encode()).hexdigest()


def _hash_file(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def infer(model, processor, text, image, **generate_kwargs):
    """Ask questions about pictures.

    Parameters
    ----------
    model : BlipForQuestionAnswering or NeuronBlipForQuestionAnswering
        The former answers one unpadded question at a time, the latter as many as fit at once.
    processor : BlipProcessor
    text : str or list of str
    image : a picture as `processor` takes it (PIL image, array or tensor), or a list with one a question
        Or what ``encode_image`` of the compiled model returned.
    **generate_kwargs
        For ``generate()``.

    Returns
    -------
    str, or list of str where `text` is a list

    Raises
    ------
    ValueError
        If a question is empty or longer than what was traced, an image is none, or the arguments do not fit.
    """
    if not isinstance(text, str | list | tuple):
        raise ValueError(f"question is a {type(text).__name__}: pass a str, or a list of them")
    questions = [text] if isinstance(text, str) else list(text)
    encoded = isinstance(image, BaseModelOutputWithPooling)
    if encoded and not isinstance(model, NeuronBlipForQuestionAnswering):
        raise ValueError("image is an encoded one, which only a compiled model takes: pass the picture")
    images = list(model._check_encoded(image)) if encoded else image
    images = list(images) if isinstance(images, list | tuple) else [images]
    images = images * len(questions) if len(images) == 1 and not isinstance(image, list | tuple) else images
    if len(images) != len(questions):
        raise ValueError(f"{len(images)} images for {len(questions)} questions: pass an image each, or one for all")
    own = model.text_decoder.generation_config
    if _setting("num_return_sequences", generate_kwargs, own) not in (None, 1):
        raise ValueError("infer gives one answer a question: call model.generate() for num_return_sequences > 1")
    if _setting("return_dict_in_generate", generate_kwargs, own):
        raise ValueError("infer gives texts: call model.generate() for return_dict_in_generate")
    token_ids = [_question_tokens(processor, question) for question in questions]
    together = 1
    if isinstance(model, NeuronBlipForQuestionAnswering):
        together = max(1, model.shapes.rows // _rows_per_question(generate_kwargs, own))
        if len(questions) > together and _setting("do_sample", generate_kwargs, own):
            raise ValueError(
                f"{len(questions)} questions are more than the {together} that fit into one call, and sampling in "
                "several calls would draw other random numbers: pass fewer, or trace a larger batch_size"
            )
    answers, pixels = [], {}
    for start in range(0, len(questions), together):
        batch = slice(start, start + together)
        padded = processor.tokenizer.pad({"input_ids": token_ids[batch]}, padding_side="right", return_tensors="pt")
        if encoded:
            given = {"image": BaseModelOutputWithPooling(last_hidden_state=torch.stack(images[batch]))}
            output = model.generate(padded.input_ids, attention_mask=padded.attention_mask, **given, **generate_kwargs)
            answers += processor.batch_decode(output, skip_special_tokens=True)
            continue
        # A picture that was in the batch before is not processed again; others are forgotten.
        pixels = {id(picture): pixels.get(id(picture)) for picture in images[batch]}
        for picture in images[batch]:
            if pixels[id(picture)] is None:
                pixels[id(picture)] = _pixel_values(processor, picture)
        pixel_values = torch.cat([pixels[id(picture)] for picture in images[batch]])
        output = model.generate(padded.input_ids, pixel_values, attention_mask=padded.attention_mask, **generate_kwargs)
        answers += processor.batch_decode(output, skip_special_tokens=True)
    return answers[0] if isinstance(text, str) else answers


def _question_tokens(processor, question):
    if not isinstance(question, str):
        raise ValueError(f"question is a {type(question).__name__}: pass a str")
    tokens = processor.tokenizer(question).input_ids
    if len(tokens) <= processor.tokenizer.num_special_tokens_to_add():
        raise ValueError(f"question {question!r} is empty: ask something")
    return tokens


def _pixel_values(processor, image):
    if not is_valid_image(image):
        raise ValueError(f"image is a {type(image).__name__}: pass a picture, such as PIL.Image.open(path)")
    try:
        pixel_values = processor.image_processor(image, return_tensors="pt").pixel_values
    except Exception as error:
        raise ValueError(f"image cannot be read as a picture: {error}") from error
    if len(pixel_values) != 1:
        raise ValueError(f"image holds {len(pixel_values)} pictures: pass a list with one a question")
    return pixel_values


@dataclass(frozen=True)
class Verified:
    """One question, answered by a model and by what was compiled from it."""

    example: object
    expected: list
    actual: list
    difference: float


def verify(compiled, model, processor, examples, **generate_kwargs):
    """Compare `compiled` with `model`, eager, one unpadded question at a time, with the same limit of new tokens.

    The compiled model takes as many questions at once as fit, of different lengths.

    Parameters
    ----------
    compiled : NeuronBlipForQuestionAnswering
    model : BlipForQuestionAnswering
    processor : BlipProcessor
    examples : iterable with ``question`` and ``image``
    **generate_kwargs
        For both ``generate()`` calls.

    Yields
    ------
    Verified
        Token ids, and the largest difference of the logits over the steps up to the first different token.
    """
    examples = list(examples)
    each = _rows_per_question(generate_kwargs, compiled.text_decoder.generation_config)
    at_once = max(1, compiled.shapes.rows // each)
    generate_kwargs = {"max_new_tokens": compiled.shapes.answer_length - 1} | generate_kwargs
    generate_kwargs |= {"return_dict_in_generate": True, "output_logits": True}
    for batch in (examples[start : start + at_once] for start in range(0, len(examples), at_once)):
        images, questions = [example.image for example in batch], [example.question for example in batch]
        together = processor(images=images, text=questions, padding=True, return_tensors="pt")
        actual = compiled.generate(**together, **generate_kwargs)
        for row, example in enumerate(batch):
            alone = processor(images=example.image, text=example.question, return_tensors="pt")
            expected = model.generate(**alone, **generate_kwargs)
            theirs, ours = expected.sequences[0], actual.sequences[row * len(actual.sequences) // len(batch)]
            rows = slice(row * each, (row + 1) * each)
            difference = _worst_difference(expected.logits, [step[rows] for step in actual.logits], theirs, ours)
            sep_token_id = compiled.config.text_config.sep_token_id
            yield Verified(example, trim(theirs, sep_token_id), trim(ours, sep_token_id), difference)


def _worst_difference(expected, actual, theirs, ours):
    """Of logits, a tensor [rows, V] a step, up to the first token that differs."""
    worst = 0.0
    # A beam search may go on for steps that the sequence it returns does not have.
    for step in range(min(len(theirs), len(ours)) - 1):
        difference = (actual[step] - expected[step]).abs().max().item()
        worst = worst if difference <= worst else difference  # a NaN stays one
        if ours[step + 1] != theirs[step + 1]:
            break
    return worst


def trim(token_ids, sep_token_id):
    """int64 [tokens] -> list of int, up to the first [SEP]: without what fills a row up in a batch of longer ones.

    That is padding, but [SEP] again after a beam search of transformers 5 where the id of [PAD] is 0.
    """
    token_ids = token_ids.tolist()
    return token_ids[: token_ids.index(sep_token_id) + 1] if sep_token_id in token_ids else token_ids


# ---------------------------------------------------------------------------------------------------------------------
# 05  Cache the decoder
# ---------------------------------------------------------------------------------------------------------------------


class CachedTextEncoder(nn.Module):
    """The question graph for a `CachedDecoder`: not the encoded question, but what each decoder layer makes of it.

    The keys and values of the decoder's cross-attention depend on the question alone: they are computed here, once.
    """

    def __init__(self, model):
        super().__init__()
        self.encoder = NeuronTextEncoder(model.text_encoder)
        self.heads = model.text_decoder.config.num_attention_heads
        attentions = [layer.crossattention.self for layer in model.text_decoder.bert.encoder.layer]
        self.projections = nn.ModuleList(project for layer in attentions for project in (layer.key, layer.value))

    def forward(self, input_ids, attention_mask, encoder_hidden_states):
        """As `NeuronTextEncoder`, but -> fp32 [B, 2 L, H, Q, D / H]: keys and values of layer 0, of layer 1 ..."""
        features = self.encoder(input_ids, attention_mask, encoder_hidden_states)
        return torch.stack([split_heads(project(features), self.heads) for project in self.projections], dim=1)


class CachedDecoder(nn.Module):
    """The answer graph with a memory: the last token of each row in, the logits of the next one out.

    ``state`` holds, as Parameters of R rows, keys and values of the question for each of the L layers, the question's
    mask, and keys and values of the answer so far, of fixed length A. On Neuron they stay on the device from call to
    call (``input_output_aliases``). They are registered first: there, as in AWS's T5 tutorial, a traced module's
    parameters begin with its state.
    """

    def __init__(self, model, shapes):
        super().__init__()
        config = model.config
        heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        question = [(shapes.rows, heads, shapes.longest_question, size)] * (2 * config.num_hidden_layers)
        answer = [(shapes.rows, heads, shapes.answer_length, size)] * (2 * config.num_hidden_layers)
        sizes = [*question, (shapes.rows, shapes.longest_question), *answer]
        self.state = nn.ParameterList(nn.Parameter(torch.zeros(s), requires_grad=False) for s in sizes)
        # The same weights, without those that a CachedTextEncoder has.
        self.decoder = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        for layer in self.decoder.bert.encoder.layer:
            layer.crossattention.self.key = layer.crossattention.self.value = None

    def forward(self, input_ids, position, beam_rows):
        """input_ids int64 [R, 1], position int64 [1], beam_rows int64 [R] (the row that each row goes on from)
        -> logits fp32 [R, 1, V], and the state

        What lies beyond the position is replaced, not multiplied by 0: a NaN of an earlier call would survive that."""
        layers = self.decoder.bert.encoder.layer
        question, mask, answer = [*self.state][: 2 * len(layers)], self.state[2 * len(layers)], []
        before = [*self.state][2 * len(layers) + 1 :]
        slots = torch.arange(before[0].shape[2], device=input_ids.device)
        here, earlier = (slots == position)[:, None], (slots < position)[:, None]
        answer_mask = additive_mask((slots <= position).long()[None, None])
        question_mask = additive_mask(mask[:, None])
        hidden = self.decoder.bert.embeddings(input_ids=input_ids, position_ids=position[None])
        for i, layer in enumerate(layers):
            attention = layer.attention.self
            for kept, project in zip(before[2 * i : 2 * i + 2], (attention.key, attention.value), strict=True):
                kept = torch.where(earlier, kept.index_select(0, beam_rows), 0.0)
                answer.append(torch.where(here, split_heads(project(hidden), kept.shape[1]), kept))
            hidden = layer.attention.output(attend(attention, hidden, *answer[-2:], answer_mask), hidden)
            across = layer.crossattention
            hidden = across.output(attend(across.self, hidden, *question[2 * i : 2 * i + 2], question_mask), hidden)
            hidden = layer.feed_forward_chunk(hidden)
        return self.decoder.cls(hidden), *question, mask, *answer


class GreedyDecoder(CachedDecoder):
    """A `CachedDecoder` that chooses the token itself: ids instead of V logits a row leave the device."""

    def forward(self, input_ids, position, beam_rows):
        """As `CachedDecoder`, but -> the most likely token int64 [R, 1], and the state"""
        logits, *state = super().forward(input_ids, position, beam_rows)
        return logits.argmax(dim=-1), *state


def split_heads(hidden, heads):
    """[rows, length, D] -> [rows, H, length, D / H]"""
    return hidden.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(attention, hidden, keys, values, mask):
    """One query a row against kept keys and values: [R, 1, D] -> [R, 1, D]"""
    query = split_heads(attention.query(hidden), keys.shape[1])
    scores = query @ keys.transpose(-1, -2) / attention.attention_head_size**0.5 + mask
    return (scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2)


class BeamRows(Cache):
    """The cache that ``generate()`` sees: only which row each beam goes on from. Keys and values are in the graph."""

    def __init__(self, rows):
        super().__init__(layers=[])
        self.rows = torch.arange(rows)

    def reorder_cache(self, beam_idx):
        self.rows = beam_idx


class DecoderCachedGenerator(DecoderPaddedGenerator):
    """Stands in for ``model.text_decoder`` as `DecoderPaddedGenerator` does, around a graph that keeps state.

    There is one state: calls from several threads take turns, and a call made while this one waits for it never ends.
    A copy for each is what `load_replicas` makes. `decoder` is a traced `CachedDecoder`.
    """

    def __init__(self, config, decoder, shapes, generation_config):
        super().__init__(config, decoder, shapes, generation_config)
        self._turn, self._answering = threading.RLock(), False

    @torch.no_grad()
    def generate(self, input_ids, **kwargs):
        """As ``GenerationMixin.generate`` from a start token, int64 [rows, 1]; ``encoder_hidden_states`` is what
        `CachedTextEncoder` returned.

        Raises
        ------
        ValueError
            If the answer is to begin with more than a start token.
        RuntimeError
            In a call from inside a call.
        """
        if input_ids.shape[1] != 1:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens; a cached decoder begins with one, the start token: trace "
                "the model with decoder='padded' to go on from more"
            )
        with self._turn:
            if self._answering:
                raise RuntimeError(
                    "generate() was called from inside generate(), whose state it would overwrite: load a model for "
                    "each, with load_replicas()"
                )
            self._answering = True
            try:
                rows = len(input_ids) * _rows_per_question(kwargs, self.generation_config)
                return super().generate(input_ids=input_ids, cache=BeamRows(rows), **kwargs)
            finally:
                self._answering = False

    def prepare_inputs_for_generation(self, input_ids, cache, **kwargs):
        """The last token of each row, int64 [rows, 1], and its position; what came before is in the graph."""
        names = ("encoder_hidden_states", "encoder_attention_mask")
        return {
            "input_ids": input_ids[:, -1:],
            "position": torch.tensor([input_ids.shape[1] - 1]),
            "cache": cache,
            **{name: kwargs[name] for name in names},
        }

    def forward(self, input_ids, position, cache, encoder_hidden_states, encoder_attention_mask, **kwargs):
        """As `CachedDecoder`, for any number of rows up to R. The first step writes the question into the state."""
        rows, given = self.shapes.rows, len(input_ids)
        if position == 0:
            question = [*fill_rows(encoder_hidden_states, rows).unbind(1), fill_rows(encoder_attention_mask, rows)]
            for state, value in zip(self.decoder.parameters(), question, strict=False):
                state.copy_(value)
        beam_rows = torch.cat([cache.rows, torch.arange(given, rows)])
        output = self.decoder(fill_rows(input_ids, rows), position, beam_rows)
        cache.rows = torch.arange(given)
        return CausalLMOutputWithCrossAttentions(logits=output.logits[:given])


class DecoderGreedyGenerator(DecoderCachedGenerator):
    """Around a `GreedyDecoder`: Hugging Face's ``generate()`` with the loop below in place of its own."""

    def generate(self, input_ids, **kwargs):
        """As `DecoderCachedGenerator.generate`; what needs logits is a `ValueError`."""
        # transformers hands no streamer to a custom_generate, but arguments of other names.
        streamer = kwargs.get("streamer")
        return super().generate(input_ids, custom_generate=_take_the_chosen, chosen_to=streamer, **kwargs)


def _take_the_chosen(
    model, input_ids, logits_processor, stopping_criteria, generation_config, chosen_to=None, **kwargs
):
    """A loop for ``custom_generate`` around a graph that has chosen the token already."""
    needs = [type(processor).__name__ for processor in logits_processor]
    if generation_config.get_generation_mode() != GenerationMode.GREEDY_SEARCH:
        needs.append(str(generation_config.get_generation_mode().value))
    needs += [name for name in ("output_scores", "output_logits") if getattr(generation_config, name)]
    if needs:
        raise ValueError(
            f"{', '.join(needs)}: that takes logits, and this decoder returns the chosen token alone: trace the model "
            "with greedy=False"
        )
    unfinished = torch.ones(len(input_ids), dtype=torch.bool)
    while unfinished.any():
        chosen = model(**model.prepare_inputs_for_generation(input_ids, **kwargs)).logits[:, -1]
        chosen = chosen.where(unfinished, generation_config.pad_token_id)
        if chosen_to is not None:
            chosen_to.put(chosen)
        input_ids = torch.cat([input_ids, chosen[:, None]], dim=1)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
    if chosen_to is not None:
        chosen_to.end()
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=input_ids)
    return input_ids


class ShortestQuestionGraph(nn.Module):
    """Several question graphs as one of the longest's shapes: each call takes the shortest graph that fits."""

    def __init__(self, graphs, shapes):
        super().__init__()
        self.graphs = nn.ModuleList(graphs.values())
        self.lengths = shapes.question_lengths

    def forward(self, input_ids, attention_mask, encoder_hidden_states):
        """As `NeuronTextEncoder` or `CachedTextEncoder`; what is missing to the length Q is filled with zeros."""
        tokens = attention_mask.sum(dim=1).max()
        which = next(i for i, length in enumerate(self.lengths) if tokens <= length)
        length = self.lengths[which]
        inputs = input_ids[:, :length].contiguous(), attention_mask[:, :length].contiguous()
        features = self.graphs[which](*inputs, encoder_hidden_states)
        return F.pad(features, (0, 0, 0, self.lengths[-1] - length))


def round_matrices(module, dtype=torch.bfloat16):
    """A copy of `module` that multiplies with its weights in `dtype`: the stand-in for ``--auto-cast matmult``.

    Linear and convolution layers have weights, inputs and outputs in `dtype`. Everything else stays fp32: embeddings,
    norms, attention scores and softmax, sums of layers, and the vocabulary head with its logits. neuronx-cc casts more:
    the products inside attention and that of the head are matrix products too.
    """
    module = copy.deepcopy(module)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not name.endswith("predictions.decoder"):
            layer.to(dtype)
            layer.register_forward_pre_hook(lambda layer, inputs: tuple(tensor.to(dtype) for tensor in inputs))
            layer.register_forward_hook(lambda layer, inputs, output: output.float())
    return module


def load_replicas(directory, n):
    """Load what `trace` left in `directory` n times, each copy with a state of its own; on Neuron one a NeuronCore."""
    _count("n", n)
    return [NeuronBlipForQuestionAnswering.from_pretrained(directory, core=core) for core in range(n)]


def count_flops(module, example_inputs):
    """Floating-point operations of a call's matrix products and convolutions, a multiplication and an addition each.

    By ``torch.utils.flop_counter``, which leaves out all else (norms, softmax, sums). On the ``meta`` device nothing is
    computed.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        module(*example_inputs)
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------------------
# 06  Check before Inf2: the graph that neuronx-cc would get
# ---------------------------------------------------------------------------------------------------------------------

_DOCS = "https://awsdocs-neuron.readthedocs-hosted.com/en/latest"
_TRACE_PAGE = f"{_DOCS}/frameworks/torch/torch-neuronx/api-reference-guide/inference/api-torch-neuronx-trace.html"
_JAX_PAGE = f"{_DOCS}/frameworks/jax/setup/jax-neuronx-known-issues.html"
_TYPES_PAGE = f"{_DOCS}/about-neuron/arch/neuron-features/data-types.html"
_ERRORS = f"{_DOCS}/compiler/error-codes"

# HLO operators and element types that neuronx-cc is known to refuse for Inf2, with the source of each. AWS publishes no
# complete list (``neuronx-cc list-operators --framework XLA`` prints one), so that an operator that is missing here may
# still be refused.
REFUSED_OPERATORS = {
    "conditional": _JAX_PAGE,
    "custom-call": f"{_ERRORS}/EHCA005.html",  # it takes targets of its own, which are not there on a CPU
    "fft": f"{_TRACE_PAGE.replace('-trace.html', '-analyze.html')}",
    "reduce-precision": _JAX_PAGE,
    "set-dimension-size": "https://github.com/aws-neuron/aws-neuron-sdk/issues/1144",
    "sort": _TRACE_PAGE,
    "triangular-solve": f"{_ERRORS}/EVRF001.html",
}
REFUSED_TYPES = {
    "float64": _TYPES_PAGE,
    "complex64": f"{_ERRORS}/EVRF004.html",
    "complex128": f"{_ERRORS}/EVRF004.html",
}
DYNAMIC_SHAPES = f"{_ERRORS}/EMOD025.html"
# Not refused, or not always: what is said of them, and where. On Neuron erf, topk and argmax may become operators of
# the compiler's own, AwsNeuronErf, AwsNeuronTopK and AwsNeuronArgMax (on the page of EHCA005), which no CPU shows.
REPORTED_OPERATORS = {
    "erf": ("did not compile in one model on SDK 2.21", "https://github.com/aws-neuron/aws-neuron-sdk/issues/1081"),
    "topk": ("is a sort on a CPU, and taken by neuronx-cc for floating point", f"{_ERRORS}/EVRF013.html"),
    "variadic reduce": ("is not supported in JAX; argmax is one on a CPU", _JAX_PAGE),
    "while": ("is supported if it is static", _JAX_PAGE),
    "float64 number": ("is what torch-xla makes of a number in Python, to be converted", _TYPES_PAGE),
}

_HLO_TYPES = {
    "PRED": "bool",
    "BF16": "bfloat16",
    "C64": "complex64",
    "C128": "complex128",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"S{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class HloValue:
    """A parameter or result of a lowered graph.

    ``kind`` is ``"input"``, ``"weight"``, ``"state"`` or ``"constant"`` (made while the graph was recorded) for a
    parameter, ``"output"`` or ``"state"`` for a result. ``type`` is text such as ``float32 [1, 3, 64, 64]``.
    """

    kind: str
    name: str
    type: str
    nbytes: int


@dataclass(frozen=True, eq=False)
class Lowered:
    """What `lower_module` returns: the HLO of a module, and what XLA made of it on the CPU.

    ``text`` and ``proto`` (bytes of an ``HloModuleProto``, the input of ``neuronx-cc compile --framework XLA``) are the
    graph; ``parameters`` and ``results`` tuples of `HloValue`; ``operators`` counts of HLO operators; ``where`` the
    line of Python behind an operator; ``dynamic`` the operators with a dimension that is not static; ``types`` those in
    the graph; ``on_host`` aten operators that ran on the host while the graph was recorded, with their line; ``unused``
    the inputs and state that no result depends on; ``twice`` pairs of names of one weight; ``fingerprints`` one an
    example, equal for equal graphs; ``outputs`` the results that XLA computed for each example; ``inputs`` what it was
    lowered for.
    """

    text: str
    proto: bytes
    parameters: tuple
    results: tuple
    operators: dict
    where: dict
    dynamic: tuple
    types: tuple
    on_host: dict
    unused: tuple
    twice: tuple
    fingerprints: tuple
    outputs: tuple
    key: str
    inputs: dict

    def run(self, *inputs, state=()):
        """Run this graph once more on XLA's CPU client: tuple of Tensor, the next state last.

        Inputs or state of another number, shape or dtype are a `ValueError`. Without `state` it is what the module had.
        """
        check_inputs(inputs, self.inputs)
        if state:
            kept = [result.type for result in self.results if result.kind == "state"]
            check_inputs(state, {f"state {i}": of_type for i, of_type in enumerate(kept)})
        return _xla_process().call("run", self.key, inputs, tuple(tensor.detach() for tensor in state))

    def save(self, path):
        """Write the proto to `path`, for ``neuronx-cc compile --framework XLA --target inf2 PATH``."""
        with _whole_file(path) as file:
            file.write(self.proto)


def lower_module(module, example_inputs, *, input_output_aliases=None):
    """Lower `module` as ``torch_neuronx.trace`` does, through torch-xla, and run the result on XLA's CPU client.

    It happens in a child process with ``PJRT_DEVICE=CPU``: the caller's module, torch's default device and, on Inf2,
    the NeuronCores are left alone.

    Parameters
    ----------
    module, example_inputs, input_output_aliases
        As in `trace_module`.

    Returns
    -------
    Lowered

    Raises
    ------
    ValueError
        If an argument is not of the kind described there.
    RuntimeError
        If torch-xla is not installed, the module cannot be lowered, or lowering it ends the process.
    """
    example_inputs, aliases = _check_example(module, example_inputs, input_output_aliases)
    return _lower(module, [example_inputs], aliases)


def _lower(module, examples, aliases):
    with torch.inference_mode(False), torch.no_grad():
        examples = [tuple(tensor.clone() for tensor in inputs) for inputs in examples]
        _check_aliases(module, [tensor.clone() for tensor in examples[0]], aliases)
        answer = _xla_process().call("lower", module, examples, aliases, _code(module))
        if answer is None:  # a module was loaded again, or changed: a new child imports what is there now
            _xla_process().end()
            answer = _xla_process().call("lower", module, examples, aliases, _code(module))
        if answer is None:
            raise RuntimeError("cannot be lowered: a class of the module is another in this process than in its file")
    lowered = Lowered(**answer, inputs=describe_inputs(module, examples[0]))
    weakref.finalize(lowered, _xla_process().released.append, lowered.key)
    return lowered


class XlaGraph(nn.Module):
    """A lowered graph in the place of a traced one: it keeps its state, and XLA runs it on the CPU."""

    def __init__(self, lowered, state=()):
        super().__init__()
        self.lowered = lowered
        self.state = nn.ParameterList(nn.Parameter(tensor.clone(), requires_grad=False) for tensor in state)

    def forward(self, *inputs):
        results = self.lowered.run(*inputs, state=self.state)
        outputs = results[: len(results) - len(self.state)]
        for parameter, value in zip(self.state, results[len(outputs) :], strict=True):
            parameter.copy_(value)
        return outputs[0] if len(outputs) == 1 else outputs


@dataclass(frozen=True)
class Checked:
    """What `check_module` found: sentences that say what is wrong and where, ``findings`` for errors and ``notes`` for
    what is only reported; the `Lowered` graph, None where there is none; the largest difference from eager, relative to
    the largest value of the result."""

    findings: tuple
    notes: tuple = ()
    lowered: Lowered | None = None
    difference: float = float("nan")


def check_module(module, examples, *, input_output_aliases=None, bound=1e-4):
    """Lower `module` and look for what fails on Inf2: nothing is compiled, and no device is needed.

    Parameters
    ----------
    module, input_output_aliases
        As in `trace_module`.
    examples : list of tuple of Tensor
        Two or more calls' inputs, every value different: what stays the same in all their graphs is a constant.
    bound : float
        How far the results of the graph, run by XLA, may lie from eager, relative to the largest value.

    Returns
    -------
    Checked

    Raises
    ------
    ValueError
        If an argument is not of that kind.
    RuntimeError
        If torch-xla is not installed.
    """
    if len(examples) < 2:
        raise ValueError(f"examples has {len(examples)}: pass two or more, a constant shows by what does not change")
    checked = [_check_example(module, inputs, input_output_aliases) for inputs in examples]
    examples, aliases = [inputs for inputs, _ in checked], checked[0][1]
    first = describe_inputs(module, examples[0])
    for inputs in examples:
        check_inputs(inputs, first)
    _xla_process()  # that torch-xla is missing is no finding
    try:
        lowered = _lower(module, examples, aliases)
    except RuntimeError as error:
        return Checked((str(error),))
    findings = []
    for name, place in lowered.on_host.items():
        what = "a value is read in Python" if name == "aten::_local_scalar_dense" else f"{name} runs on the host"
        findings.append(f"{what} while the graph is recorded, and becomes a constant{_at(place)}")
    for operator in lowered.operators:
        if operator in REFUSED_OPERATORS:
            source = REFUSED_OPERATORS[operator]
            findings.append(f"{operator} is refused by neuronx-cc{_at(lowered.where.get(operator))} ({source})")
    for operator in lowered.dynamic:
        findings.append(f"{operator} has a dynamic shape{_at(lowered.where.get(operator))} ({DYNAMIC_SHAPES})")
    for name in lowered.types:
        if name in REFUSED_TYPES:
            findings.append(f"{name} is no type of Inf2{_at(lowered.where.get(name))} ({REFUSED_TYPES[name]})")
    findings += [f"{name} is in no result: torch_neuronx drops it or fails on it" for name in lowered.unused]
    findings += [
        f"{first} and {second} are one weight, and the graph holds it twice" for first, second in lowered.twice
    ]
    for number, fingerprint in enumerate(lowered.fingerprints[1:], 2):
        if fingerprint != lowered.fingerprints[0]:
            findings.append(
                f"example {number} gives another graph than example 1: a value of an input is a constant in it"
            )
            break
    worst = 0.0
    with torch.no_grad():
        for number, (inputs, actual) in enumerate(zip(examples, lowered.outputs, strict=True), 1):
            try:
                expected = module(*[tensor.clone() for tensor in inputs])
            except Exception as error:  # such as an index that is too large, which XLA does not mind
                findings.append(f"eager fails on example {number}: {type(error).__name__}: {error}")
                break
            expected = expected if isinstance(expected, tuple | list) else (expected,)
            difference = max(_relative(a, e) for a, e in zip(actual, expected, strict=True))
            worst = worst if difference <= worst else difference  # a NaN stays one
            if not difference <= bound:
                findings.append(f"the graph's results differ from eager by {difference:.0e} on example {number}")
                break
    notes = [
        f"{operator} {said}{_at(lowered.where.get(operator))} ({source})"
        for operator, (said, source) in REPORTED_OPERATORS.items()
        if operator in lowered.operators or operator in lowered.types
    ]
    return Checked(tuple(findings), tuple(notes), lowered, worst)


def parts_of_every_decoder(model, shapes, decoders=("padded", "cached", "greedy")):
    """As `parts_to_trace`, of several decoders: each graph once, under its name behind that of the decoder."""
    parts, kinds = {}, set()
    for decoder in decoders:
        for name, (module, example_inputs) in parts_to_trace(model, shapes, decoder).items():
            if (name, type(module)) not in kinds:
                parts[name if name == "vision_model" else f"{decoder} {name}"] = module, example_inputs
            kinds.add((name, type(module)))
    return parts


def check_parts(parts, vocab_size):
    """Check each of `parts` (see `parts_to_trace`) on examples in which every value differs: yields name, `Checked`.

    Masks are full, of one token, and ragged; positions are the first two and the last; state is overwritten with random
    numbers.
    """
    generator = torch.Generator().manual_seed(0)
    for name, (module, example_inputs) in parts.items():
        state = _state(module)
        for parameter in state:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if parameter.dim() == 2:  # the question's mask
                parameter.copy_(parameter > 0)
        names = describe_inputs(module, example_inputs)
        longest = state[-1].shape[2] if state else example_inputs[0].shape[-1]  # A, where there is a position
        others = [
            tuple(
                _another(n, t, at, longest, vocab_size, generator) for n, t in zip(names, example_inputs, strict=True)
            )
            for at in (0, 1, longest - 1)
        ]
        aliases = {parameter: index for index, parameter in enumerate(state, 1)}
        yield name, check_module(module, [example_inputs, *others], input_output_aliases=aliases)


def _another(name, example, position, longest, vocab_size, generator):
    """Another value for an example input: the position, a mask of its tokens, rows, tokens or numbers."""
    if example.is_floating_point():
        return torch.randn(example.shape, generator=generator)
    if name == "position":
        return torch.full_like(example, position)
    if name.endswith("attention_mask"):  # all ones at the last position; else so many, one less in the other rows
        full = position == longest - 1
        ones = torch.full((len(example), 1), example.shape[-1] if full else position + 1)
        ones[1:] -= int(position == 1)
        return (torch.arange(example.shape[-1]) < ones).to(example.dtype)
    if name == "beam_rows":
        return example.flip(0) if position else torch.zeros_like(example)
    return torch.randint(vocab_size, example.shape, generator=generator)


def _relative(actual, expected):
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if not expected.is_floating_point():
        return float(not torch.equal(actual, expected))
    alike = (actual == expected) | (actual.isnan() & expected.isnan())  # infinities as well
    finite = actual.isfinite() & expected.isfinite()
    if alike.all():
        return 0.0
    if not (alike | finite).all():
        return float("inf")
    largest = expected[finite].abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return ((actual - expected)[finite].abs().max() / largest).item()


def _at(place):
    """Where in Python: file, line and its source; for what a notebook or script defines the function and the source."""
    if not place:
        return ""
    file, number, function = place
    if file == "<dynamic-code>":  # cloudpickle keeps the line, but not the file
        found = sys.modules["__main__"]
        for name in function.split("."):
            found = getattr(found, name, None)
        file = found.__code__.co_filename if inspect.isfunction(found) else ""
        name = function
    else:
        name = f"{Path(file).name}:{number}"
    source = linecache.getline(file, number).strip()
    return f" at {name}" + (f", `{source}`" if source else "")


class _XlaProcess:
    """A Python of its own in which torch-xla runs on the CPU; it answers one call after another until this one ends.

    What travels is pickled with cloudpickle, which takes classes of a notebook along.
    """

    def __init__(self):
        if importlib.util.find_spec("torch_xla") is None:
            raise RuntimeError(
                "torch-xla is not installed, without which no graph can be lowered: it exists for Linux on x86-64 "
                "alone. Everything else in this series works without it"
            )
        ours, theirs = multiprocessing.Pipe()
        self.connection, self.errors = ours, tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the child)
        self.lock, self.released = threading.Lock(), []
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"import blip_helpers; blip_helpers._answer_calls({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            env=os.environ
            | {"PJRT_DEVICE": "CPU", "XLA_IR_DEBUG": "1", "XLA_HLO_DEBUG": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
            | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            start_new_session=True,  # Ctrl-C reaches it through this process, which ends it
        )
        theirs.close()

    def call(self, name, *arguments):
        with self.lock:
            released = [self.released.pop() for _ in range(len(self.released))]
            try:
                call = _pack((name, arguments, released))
            except Exception as error:
                reason = str(error).strip().splitlines()[0]
                raise RuntimeError(f"cannot be lowered: the module cannot be pickled, {reason}") from None
            try:
                self.connection.send(sys.path)  # what a module comes from may have been added since
                self.connection.send_bytes(call)
                answer = self.connection.recv_bytes()
            except (EOFError, OSError):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout=5)  # for the status of its own
                self.end()
                raise RuntimeError(f"cannot be lowered: it ended the process {self.last_words()}") from None
            except BaseException:
                self.end()
                raise
        right, value = _unpack(answer)
        if not right:
            raise RuntimeError(value[0] + _at(value[1]))
        return value

    def end(self):
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def last_words(self):
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"with status {self.process.returncode}" + (f": {lines[-1][-300:]}" if lines else "")


_running, _starting = [], threading.Lock()


def _xla_process():
    """The one child: a new one where the last has ended."""
    with _starting:
        if not _running or _running[0].process.poll() is not None:
            _running[:] = [_XlaProcess()]
        return _running[0]


def _pack(value):
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=cloudpickle)
    return buffer.getbuffer()


def _unpack(data):
    return torch.load(io.BytesIO(data), weights_only=False)


def _answer_calls(file_descriptor):
    """The child's side of `_XlaProcess`."""
    from multiprocessing.connection import Connection  # which Windows does not have

    connection, lowering = Connection(file_descriptor), _Lowering()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    while True:
        try:
            sys.path[:] = connection.recv()
            call = connection.recv_bytes()
        except EOFError:
            return
        try:
            name, arguments, released = _unpack(call)
            for key in released:
                lowering.graphs.pop(key, None)
            with torch.no_grad(), _quiet_properties():
                answer = True, getattr(lowering, name)(*arguments)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            codes = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
            places = [(c.co_filename, line, c.co_qualname) for c, line in codes]
            inside = [place for place in places if not place[0].startswith((_TORCH, __file__))]
            answer = False, (f"cannot be lowered: {type(error).__name__}: {reason}", (inside or [None])[-1])
        connection.send_bytes(_pack(answer))


def _end_with(parent):
    """A module that never comes back would keep the child alive when nobody waits for it any more."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _code(module):
    """The code of the classes that a module is made of, to be compared between processes."""

    def tree(value):
        if inspect.iscode(value):
            return [value.co_code.hex(), value.co_names, tree(value.co_consts)]
        if isinstance(value, tuple | frozenset):
            return sorted(map(repr, value)) if isinstance(value, frozenset) else list(map(tree, value))
        return repr(value)

    classes = {type(part) for part in module.modules()}
    functions = {c: {n: inspect.unwrap(f) for n, f in vars(c).items() if inspect.isfunction(f)} for c in classes}
    return {
        f"{c.__module__}.{c.__qualname__}": _hash_json({n: tree(f.__code__) for n, f in functions[c].items()})
        for c in classes
    }


class _Lowering:
    """What happens in the child process. A graph is kept with its weights on XLA's device until it is released."""

    def __init__(self):
        self.graphs, self.count = {}, 0

    def lower(self, module, examples, aliases, code):
        import torch_xla

        if _code(module) != code:
            return None
        device = torch.device("xla")
        owners = _onto(device, module, aliases)
        recorded = [_record(module, [_to(device, tensor) for tensor in inputs], owners) for inputs in examples]
        context, inputs, results, operators = recorded[0]
        hlo = json.loads(context.hlo_json())
        live, read = _live(hlo)
        for computation in hlo["computations"]:
            computation["instructions"] = [i for i in computation["instructions"] if i["id"] in live]
        hlo["computations"] = [c for c in hlo["computations"] if c["rootId"] in live]
        places = _name_operators(hlo, operators)
        by_number = dict(context.device_parameter_id_tensor_mapping())
        parameters = [HloValue("constant", f"constant {n}", *_type(by_number[n])) for n in range(len(by_number))]
        names = _input_names(module, len(inputs))
        slots = [context.tensor_parameter_id(tensor) for tensor in inputs]
        for name, tensor, slot in zip(names, inputs, slots, strict=True):
            if slot >= 0:
                parameters[slot] = HloValue("input", name, *_type(tensor))
        unused = [f"input {name}" for name, slot in zip(names, slots, strict=True) if slot not in read]
        state = []
        for kind, name, tensor in owners:
            slot = context.tensor_parameter_id(tensor)
            if kind == "state":
                state.append(slot)
                unused += [] if slot in read else [f"state {name}"]
            if slot >= 0:
                parameters[slot] = HloValue(kind, name, *_type(tensor))
        kept = set(aliases.values())
        proto = _without_dead_code(context.hlo(), live)
        self.count += 1
        key = f"{os.getpid()}_{self.count}"  # never that of a graph in an earlier process
        to_xla = torch_xla._XLAC._xla_op_computation_from_module_proto
        self.graphs[key] = to_xla(f"graph{key}", proto), by_number, slots, state, device
        pairs = [(aliases[p], slot) for p, slot in zip(aliases, state, strict=True) if slot >= 0]
        proto = _with_aliases(proto, pairs)
        text = torch_xla._XLAC._xla_computation_text(to_xla(f"aliased{key}", proto))
        instructions = [i for computation in hlo["computations"] for i in computation["instructions"]]
        dynamic = (i["opcode"] for i in instructions if any(any(s.get("isDynamicDimension", ())) for s in _shapes(i)))
        return {
            "text": re.sub(r", metadata=\{[^}]*\}", "", text),  # it names files of this machine
            "proto": proto,
            "parameters": tuple(parameters),
            "results": tuple(
                HloValue("state" if i in kept else "output", f"result {i}", *t) for i, t in enumerate(results)
            ),
            "operators": dict(collections.Counter(i["opcode"] for i in instructions).most_common()),
            "where": places,
            "dynamic": tuple(dict.fromkeys(dynamic)),
            "types": tuple(dict.fromkeys(name for i in instructions for name in _element_types(i))),
            "on_host": {name: (*at, operators.functions[at]) for name, at in operators.on_host.items()},
            "unused": tuple(unused),
            "twice": _twice(parameters, by_number),
            "fingerprints": tuple(_fingerprint(context, inputs, owners) for context, inputs, *_ in recorded),
            "outputs": tuple(self.run(key, inputs, None) for inputs in examples),
            "key": key,
        }

    def run(self, key, inputs, state):
        """Run a graph; state None leaves the state as the module had it."""
        import torch_xla

        if key not in self.graphs:
            raise RuntimeError("the process that held this graph has ended: lower the module again")
        computation, by_number, slots, state_slots, device = self.graphs[key]
        arguments = dict(by_number)
        given = [*zip(slots, inputs, strict=True), *zip(state_slots if state else (), state or (), strict=True)]
        arguments |= {slot: tensor.to(device) for slot, tensor in given if slot >= 0}
        ordered = [arguments[number] for number in range(len(arguments))]
        results = torch_xla._XLAC._xla_user_computation(f"xla::graph{key}", ordered, computation)
        torch_xla._XLAC._xla_sync_multi(list(results), [str(device)], wait=True, sync_xla_data=True)
        return tuple(result.cpu() for result in results)


def _to(device, tensor):
    """On torch-xla equal numbers share their data, and in a graph they would be one parameter: each gets its own."""
    return tensor.to(device) if tensor.dim() else tensor[None].to(device)[0].clone()


def _onto(device, module, aliases):
    """Move a module, in place; ``Module.to`` would give each use of a tied weight a copy of its own.

    Returns (kind, name, tensor on the device) for each of its tensors, the state in the order of the aliases.
    """
    names = {id(t): name for name, t in [*module.named_parameters(), *module.named_buffers()]}
    state, moved = [id(parameter) for parameter in aliases], {}
    originals = []
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                originals.append(tensor)  # while it lives, its id is not another's
                if id(tensor) not in moved:
                    there = _to(device, tensor.detach())
                    parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = nn.Parameter(there, requires_grad=False) if parameter else there
                tensors[name] = moved[id(tensor)]
    weights = [("weight", names[i], tensor) for i, tensor in moved.items() if i not in state]
    return weights + [("state", names[i], moved[i]) for i in state]


def _record(module, inputs, owners):
    """Run a module on XLA tensors, which records its graph: the context of the graph, and what happened meanwhile."""
    import torch_xla
    from torch_xla.debug import metrics

    # A number that is not on the device yet would become a constant; until it is there its handle may still change.
    torch_xla.sync(wait=True)
    metrics.clear_all()
    before = [tensor._version for *_, tensor in owners]
    with _Operators(metrics.counter_names) as operators:
        results = module(*[tensor.clone() for tensor in inputs])  # which it may write to
    for (kind, name, tensor), version in zip(owners, before, strict=True):
        if tensor._version != version:
            raise ValueError(f"{kind} {name} is written in forward: return its new value, with an alias, or it is lost")
    results = list(results) if isinstance(results, tuple | list) else [results]
    for i, result in enumerate(results):
        if not isinstance(result, torch.Tensor) or result.device.type != "xla":
            raise ValueError(f"result {i} is {_describe(result)} that was computed on the host, and in no graph")
    context = torch_xla._XLAC.lowering.LoweringContext()
    context.build(results)
    # Only their types: results that live on would be computed at the next sync.
    return context, inputs, [_type(result) for result in results], operators


class _Operators(TorchDispatchMode):
    """Notes the lines of Python that operators come from, and which operators fell back to the host."""

    def __init__(self, counters):
        super().__init__()
        self.counters, self.functions, self.called, self.on_host = counters, {}, {}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename.startswith(_TORCH):
            frame = frame.f_back
        place = (frame.f_code.co_filename, frame.f_lineno) if frame else ("", 0)
        self.functions[place] = frame.f_code.co_qualname if frame else ""
        self.called.setdefault(place, set()).add(function._schema.name)
        given = [value for value in args if isinstance(value, torch.Tensor)]
        copied = isinstance(result, torch.Tensor) and result.device.type != "xla"
        if copied and any(tensor.device.type == "xla" for tensor in given):  # .cpu(), .tolist(), .numpy()
            self.on_host.setdefault("aten::_local_scalar_dense", place)
        for name in self.counters():
            if name.startswith("aten::"):
                self.on_host.setdefault(name, place)
        return result


_TORCH = f"{Path(torch.__file__).parent}{os.sep}"


def _name_operators(hlo, operators):
    """Name apart what neuronx-cc may have an operator of its own for: a sort that comes from topk, in floating point,
    and a reduction of several tensors at once, such as of numbers and their indices.

    Returns for each operator and element type of a graph the first line of Python that it comes from, outside of torch.
    """
    index, places = hlo.get("stackFrameIndex", {}), {}
    for instruction in (i for computation in hlo["computations"] for i in computation["instructions"]):
        number, place = instruction.get("metadata", {}).get("stackFrameId"), None
        while number and not place:  # from the innermost frame outwards
            frame = index["stackFrames"][number - 1]
            location = index["fileLocations"][frame["fileLocationId"] - 1]
            line = index["fileNames"][location["fileNameId"] - 1], location["line"]
            place, number = line if line in operators.functions else None, frame.get("parentFrameId")
        types = _element_types(instruction)
        if instruction["opcode"] == "sort" and "aten::topk" in operators.called.get(place, ()) and "float" in types[0]:
            instruction["opcode"] = "topk"
        if instruction["opcode"] == "reduce" and len(types) > 1:
            instruction["opcode"] = "variadic reduce"
        if place:
            for name in (instruction["opcode"], *types):
                places.setdefault(name, (*place, operators.functions[place]))
    return places


def _shapes(instruction):
    return instruction["shape"].get("tupleShapes", [instruction["shape"]])


def _element_types(instruction):
    types = [_HLO_TYPES.get(shape["elementType"], shape["elementType"]) for shape in _shapes(instruction)]
    numbers = [
        name == "float64" and not shape.get("dimensions")
        for name, shape in zip(types, _shapes(instruction), strict=True)
    ]
    return [f"{name} number" if number else name for name, number in zip(types, numbers, strict=True)]


def _type(tensor):
    return _describe(tensor), tensor.numel() * tensor.element_size()


def _twice(parameters, tensors):
    """Pairs of names of matrices with the same values, unless they hold one number only, such as zeros.

    Vectors may be alike: two biases that are added up get the same gradients.
    """
    seen, pairs = {}, []
    for number, parameter in enumerate(parameters):
        if parameter.kind == "weight":
            values = tensors[number].cpu()
            if values.dim() > 1 and values.numel() and (values != values.flatten()[0]).any():
                digest = _digest(values), parameter.type
                if digest in seen:
                    pairs.append((seen[digest], parameter.name))
                seen.setdefault(digest, parameter.name)
    return tuple(pairs)


def _digest(tensor):
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def _fingerprint(context, inputs, owners):
    """A hash of the graph with its constants, those among its parameters included; not of names and lines of Python."""
    hlo = json.loads(context.hlo_json())
    known = {context.tensor_parameter_id(tensor) for tensor in [*inputs, *(tensor for *_, tensor in owners)]}
    tensors = context.device_parameter_id_tensor_mapping()
    constants = {number: _digest(tensors[number]) for number in tensors if number not in known}
    for instruction in (i for computation in hlo["computations"] for i in computation["instructions"]):
        instruction.pop("metadata", None)
    return _hash_json([hlo["computations"], sorted(known), constants])


def _live(hlo):
    """The ids, as text, of the instructions that a result depends on, and the numbers of the parameters among them.

    torch-xla records what nothing uses, such as the indices of a max pooling; torch_neuronx drops it. All parameters
    are kept: they are the signature of a computation.
    """
    computations = {computation["id"]: computation for computation in hlo["computations"]}
    instructions = {i["id"]: i for computation in hlo["computations"] for i in computation["instructions"]}
    live, waiting = set(), [computations[hlo["entryComputationId"]]["rootId"]]
    while waiting:
        number = waiting.pop()
        if number not in live:
            live.add(number)
            called = [computations[c]["rootId"] for c in instructions[number].get("calledComputationIds", ())]
            waiting += [*instructions[number].get("operandIds", ()), *called]
    parameters = {number for number, i in instructions.items() if i["opcode"] == "parameter"}
    entry = {i["id"] for i in computations[hlo["entryComputationId"]]["instructions"]}
    read = {int(instructions[number].get("parameterNumber", 0)) for number in live & parameters & entry}
    return live | parameters, read


def _without_dead_code(proto, live):
    """The proto with the instructions that are `live` alone, and the computations that have any but parameters left.

    A serialized message is a sequence of fields. In ``HloModuleProto`` computations are field 3; in
    ``HloComputationProto`` instructions are field 2; in ``HloInstructionProto`` the id is field 35; see
    xla/service/hlo.proto in https://github.com/openxla/xla.
    """
    kept = b""
    for field, content, raw in _fields(proto):
        if field != 3:
            kept += raw
            continue
        parts = [(part, raw, part == 2 and _id_of(inside)) for part, inside, raw in _fields(content)]
        root = next(_varint(raw, 1)[0] for part, raw, _ in parts if part == 6)
        if str(root) in live:
            kept += _message(3, b"".join(raw for part, raw, number in parts if part != 2 or str(number) in live))
    return kept


def _id_of(instruction):
    return next(content for field, content, _ in _fields(instruction) if field == 35)


def _fields(message):
    """Each field of a serialized protobuf message: its number, its content (an int or bytes), and its bytes."""
    at = 0
    while at < len(message):
        start = at
        key, at = _varint(message, at)
        content, after = _varint(message, at) if key & 7 in (0, 2) else (None, at + {1: 8, 5: 4}[key & 7])
        if key & 7 == 2:
            at, after = after, after + content
            content = message[at:after]
        at = after
        yield key >> 3, content, message[start:at]


def _varint(message, at):
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _number(value):
    low = [value & 127]
    while value := value >> 7:
        low[-1] |= 128
        low.append(value & 127)
    return bytes(low)


def _message(field, content):
    return _number(field << 3 | 2) + _number(len(content)) + content


def _with_aliases(proto, pairs):
    """The proto with field 8 of ``HloModuleProto``: which result becomes which parameter, as (result, parameter).

    Fields of a message may come in any order, so that it is appended. An entry has result (field 1, packed), parameter
    (2) and kind (4: 2 is MUST_ALIAS).
    """
    entries = b"".join(
        _message(1, _message(1, _number(result)) + bytes([2 << 3]) + _number(parameter) + bytes([4 << 3, 2]))
        for result, parameter in pairs
    )
    return proto + (_message(8, entries) if entries else b"")


_PRODUCTS = {
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


class ImitatedAutoCast(TorchDispatchMode):
    """An imitation of what neuronx-cc's ``--auto-cast`` does to fp32 numbers: ``with`` this, call a module on the CPU.

    ``matmult`` rounds the inputs of each matrix product and convolution to the type and accumulates in fp32; ``all``
    rounds inputs and outputs of every floating-point operator. The compiler fuses and orders operators in its own way,
    so that its results differ from these; what it casts and when it does is AWS's description of the flags.

    Parameters
    ----------
    compiler_args : str or list of str
        As for neuronx-cc. Without ``--auto-cast`` nothing is cast, as since SDK 2.27, whatever the type.
    """

    def __init__(self, compiler_args):
        super().__init__()
        args = _as_list(compiler_args)
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
        rounded = _PRODUCTS.get(function.overloadpacket, ())
        if self.cast == "all":
            rounded = () if function._schema.is_mutable else range(len(args))
        args = [self._round(value) if i in rounded else value for i, value in enumerate(args)]
        result = function(*args, **kwargs)
        if self.cast != "all":
            return result
        # What an operator wrote to stays where it is.
        in_place = function._schema.is_mutable and isinstance(result, torch.Tensor)
        return result.copy_(self._round(result)) if in_place else self._round(result)


# A NeuronCore-v2 of an Inferentia2 chip, which has two: half of the published figures of the chip.
# https://awsdocs-neuron.readthedocs-hosted.com/en/latest/about-neuron/arch/neuron-hardware/inferentia2.html
CORE_FLOPS = {"fp32": 47.5e12 / 2, "bf16": 190e12 / 2}
CORE_BYTES_PER_SECOND = 820 * 2**30 / 2
CHIP_BYTES = 32 * 2**30


@dataclass(frozen=True)
class Cost:
    """What one call of a graph takes at least: FLOPs of its products, numbers in the weights that are read, bytes of
    state, inputs and outputs."""

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


_LOOK_UPS = {getattr(torch.ops.aten, name) for name in ("embedding", "index", "index_select", "gather")}


class _Reads(TorchDispatchMode):
    """Notes the ids of the tensors that an operator reads; one that looks up a few rows of a table does not count."""

    def __init__(self):
        super().__init__()
        self.ids = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket not in _LOOK_UPS:
            self.ids |= {id(value) for value in tree_leaves(args) if isinstance(value, torch.Tensor)}
        return function(*args, **(kwargs or {}))


def count_cost(module, example_inputs):
    """Count the `Cost` of a module; on the ``meta`` device nothing is computed.

    Neither what is only looked up nor what the graph does not use counts, so that the bound stays one.
    """
    state = _state(module)
    with _Reads() as reads, torch.no_grad():
        outputs = module(*example_inputs)
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    weights = [p for p in module.parameters() if id(p) in reads.ids and not any(p is kept for kept in state)]
    return Cost(
        flops=count_flops(module, example_inputs),
        weights=sum(parameter.numel() for parameter in weights),
        state=sum(parameter.nbytes for parameter in state),
        inputs=sum(tensor.nbytes for tensor in example_inputs),
        outputs=sum(tensor.nbytes for tensor in outputs[: len(outputs) - len(state)]),
    )
