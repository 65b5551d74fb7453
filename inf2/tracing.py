"""Trace a module with ``torch_neuronx.trace``, its stand-in on a CPU or OpenVINO; save and load what comes out.

Facts about Neuron come from the AWS Neuron SDK documentation, https://awsdocs-neuron.readthedocs-hosted.com, SDK 2.31.
"""

import importlib.metadata
import importlib.util
import os

import torch
from inf2.files import whole_file
from inf2.open_vino import compile_loaded, import_openvino, trace_for_openvino
from inf2.process import clean_state
from inf2.rounding import split_flags
from inf2.stand_in import trace_for_cpu
from inf2.tensors import check_aliases, check_example

BACKENDS = ("neuron", "cpu", "openvino")
CHOICE = "NEURON_REHEARSAL_BACKEND"  # the variable of the environment that chooses one of them


def neuron_is_here():
    """Whether the package torch_neuronx is installed."""
    return importlib.util.find_spec("torch_neuronx") is not None


def default_backend():
    """The backend that the environment's ``NEURON_REHEARSAL_BACKEND`` names.

    Without it ``"neuron"`` where the package torch_neuronx is installed, else ``"cpu"``, the stand-in.
    """
    return os.environ.get(CHOICE) or ("neuron" if neuron_is_here() else "cpu")


def known_backend(backend):
    """The backend that an argument names, `default_backend` for None; a `ValueError` where it is unknown or missing."""
    name, backend = ("backend", backend) if backend is not None else (CHOICE, default_backend())
    if backend not in BACKENDS:
        raise ValueError(f"{name} is {backend!r}; there are 'neuron', 'cpu' and 'openvino'")
    if backend == "neuron" and not neuron_is_here():
        raise ValueError(f"{name} is 'neuron', but torch_neuronx is not installed: see requirements-neuron.txt")
    if backend == "openvino":
        import_openvino()
    return backend


def package_version(package):
    """The installed version of a package, as its metadata says."""
    return importlib.metadata.version(package)


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
    for name, given, known in (
        ("auto_cast", auto_cast, ("none", "matmult", "all")),
        ("auto_cast_type", auto_cast_type, ("bf16", "fp16", "tf32", "fp8_e4m3")),
        ("model_type", model_type, ("transformer", "generic", "unet-inference")),
        ("optlevel", optlevel, (1, 2, 3)),
    ):
        if given not in known or isinstance(given, bool):
            raise ValueError(f"{name} is {given!r}; neuronx-cc knows {', '.join(map(str, known))}")
    args = ["--model-type", model_type, "--optlevel", str(optlevel), "--auto-cast", auto_cast]
    if auto_cast != "none":
        args += ["--auto-cast-type", auto_cast_type]
    if logfile is not None:
        args += ["--logfile", str(logfile)]
    return args


@clean_state()
def trace_module(
    module, example_inputs, *, input_output_aliases=None, backend=None, compiler_args=None, cpu_backend=False
):
    """Trace `module` for the shapes and dtypes of `example_inputs`.

    On Neuron this is ``torch_neuronx.trace``. Elsewhere it is a stand-in made with ``torch.jit.trace`` that runs on
    the CPU and keeps Neuron's rules: it takes positional tensors of exactly the traced shapes and dtypes and refuses
    anything else, also after ``torch.jit.save`` and ``torch.jit.load`` in another process. What the process is set to,
    such as autocast or another default dtype, is not in the graph (see `inf2.process.clean_state`).

    Parameters
    ----------
    module : nn.Module
        Its ``forward`` takes positional tensors and returns a tensor or a tuple of tensors. Put it into eval mode.
    example_inputs : Tensor or tuple of Tensor
        One call's inputs, on the CPU.
    input_output_aliases : dict of Parameter to int, optional
        State: the output of that index stays inside as the parameter's next value. Real outputs come first; the
        stand-in returns those alone, on Neuron state may follow them, which nobody should read.
    backend : {"neuron", "cpu", "openvino"}, optional
        By default `default_backend`. OpenVINO compiles for the CPU at hand, under the stand-in's rules (see
        `inf2.open_vino`).
    compiler_args : str or list of str, optional
        For neuronx-cc; by default `neuron_compiler_args`. Of these the stand-in imitates ``--auto-cast`` to bf16 and
        fp16, and OpenVINO is asked to compute in bf16.
    cpu_backend : bool
        With AWS's packages but no Neuron device: compile for Inf2, to be copied there.

    Returns
    -------
    torch.jit.ScriptModule

    Raises
    ------
    ValueError
        If `module`, an example input, an alias or the backend is not of the kind described here.
    """
    backend = known_backend(backend)
    example_inputs, aliases = check_example(module, example_inputs, input_output_aliases)
    compiler_args = split_flags(neuron_compiler_args() if compiler_args is None else compiler_args)
    example_inputs = tuple(example.clone() for example in example_inputs)
    check_aliases(module, example_inputs, aliases)
    if backend == "cpu":
        return trace_for_cpu(module, example_inputs, aliases, compiler_args)
    if backend == "openvino":
        return trace_for_openvino(module, example_inputs, aliases, compiler_args)
    return _trace_for_neuron(module, example_inputs, aliases, compiler_args, cpu_backend)


def _trace_for_neuron(module, example_inputs, aliases, compiler_args, cpu_backend):
    options = {}
    if cpu_backend:
        os.environ.setdefault("NEURON_PLATFORM_TARGET_OVERRIDE", "inf2")  # read when torch_neuronx is imported
        options["cpu_backend"] = True
        if not any(arg.partition("=")[0] == "--target" for arg in compiler_args):
            compiler_args = [*compiler_args, "--target", "inf2"]
    import torch_neuronx

    return torch_neuronx.trace(
        module, example_inputs, input_output_aliases=aliases, compiler_args=compiler_args, **options
    )


def save_traced(traced, path):
    """Save a traced module to `path` so that an interrupted save leaves the former file or none."""
    with whole_file(path) as file:
        torch.jit.save(traced, file)


def load_traced(path, *, backend=None, core=None, with_state=False):
    """Load a traced module, in any grad and inference mode; on Neuron onto the NeuronCore `core`, or the next one.

    `backend` is what it was traced for, by default "neuron" where torch_neuronx is installed: a module for the CPU
    takes no core there. OpenVINO compiles its modules here, for as many threads as PyTorch has.

    State comes to the host with the file: `with_state`, which needs a `core`, takes it to that core.
    """
    with torch.inference_mode(False):
        if not neuron_is_here() or backend in ("cpu", "openvino"):
            traced = torch.jit.load(str(path))
            compile_loaded(traced)
            return traced
        import torch_neuronx  # without it torch cannot read Neuron's files

        if core is None:
            return torch.jit.load(str(path))
        with torch_neuronx.neuron_cores_context(start_nc=core, nc_count=1):
            traced = torch.jit.load(str(path))
        if with_state:  # as AWS's T5 tutorial does; otherwise it would travel in every call
            torch_neuronx.move_trace_to_device(traced, core)
        return traced
