"""Any PyTorch module, rehearsed for AWS Inferentia2 (Inf2) on a CPU: traced, kept on disk, lowered, checked, counted.

``python -m inf2 check FILE.py:FUNCTION`` checks modules from the command line. Each module here has one subject and
imports only those that stand above it: process, tensors, files, rounding, stand_in, open_vino, tracing, artifact, hlo,
messages, recording (which runs in a child process alone), lowering, rules, checks, cost, table, notebook.
"""

from inf2.artifact import Part, load_parts, read_manifest, trace_parts
from inf2.checks import Checked, check_module, relative_difference
from inf2.cost import CHIP_BYTES, CORE_BYTES_PER_SECOND, CORE_FLOPS, Cost, count_cost
from inf2.files import hash_weights
from inf2.hlo import HloValue
from inf2.lowering import Lowered, XlaGraph, lower_module
from inf2.notebook import check_close, check_equal, progress, refused, show_source, what_runs_here
from inf2.process import Owner, clean_state
from inf2.rounding import ImitatedAutoCast, Rounded, with_rounding
from inf2.rules import REFUSED_OPERATORS, REFUSED_TYPES, REPORTED_OPERATORS
from inf2.stand_in import KeepState
from inf2.table import print_checks
from inf2.tensors import StaticGraph, check_inputs, describe, describe_inputs, state_aliases, state_of
from inf2.tracing import default_backend, load_traced, neuron_compiler_args, save_traced, trace_module

__all__ = [
    "CHIP_BYTES",
    "CORE_BYTES_PER_SECOND",
    "CORE_FLOPS",
    "REFUSED_OPERATORS",
    "REFUSED_TYPES",
    "REPORTED_OPERATORS",
    "Checked",
    "Cost",
    "HloValue",
    "ImitatedAutoCast",
    "KeepState",
    "Lowered",
    "Owner",
    "Part",
    "Rounded",
    "StaticGraph",
    "XlaGraph",
    "check_close",
    "check_equal",
    "check_inputs",
    "check_module",
    "clean_state",
    "count_cost",
    "default_backend",
    "describe",
    "describe_inputs",
    "hash_weights",
    "load_parts",
    "load_traced",
    "lower_module",
    "neuron_compiler_args",
    "print_checks",
    "progress",
    "read_manifest",
    "refused",
    "relative_difference",
    "save_traced",
    "show_source",
    "state_aliases",
    "state_of",
    "trace_module",
    "trace_parts",
    "what_runs_here",
    "with_rounding",
]
