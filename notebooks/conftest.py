"""Notebook 06 lowers graphs, which takes torch-xla; that exists for Linux on x86-64 alone."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("torch_xla") else ["06_check_before_inf2.ipynb"]
