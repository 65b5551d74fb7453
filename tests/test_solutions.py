"""The solutions of the notebooks' exercises; test_neuron_path.py runs them, apart from those of notebook 06."""

import sys
from pathlib import Path

import nbformat
import pytest
from conftest import needs_xla, solutions
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MEETS_THE_CHECK = ROOT / "notebooks" / "06_check_before_inf2.ipynb"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_solution_asserts(path):
    codes = solutions(nbformat.read(path, as_version=4))
    assert codes and all("assert" in code or "check_" in code for code in codes)


@needs_xla
def test_solutions_of_06_hold(monkeypatch, tmp_path):
    """With the cells that they use, and not those that lower every graph."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'notebooks'}")
    monkeypatch.setenv("QUESTIONS", "20")
    for name in ("BLIP_MODEL", "RESNET_MODEL"):
        monkeypatch.delenv(name, raising=False)
    import run_series

    notebook = nbformat.read(MEETS_THE_CHECK, as_version=4)
    codes = solutions(notebook)
    chapters = [i for i, cell in enumerate(notebook.cells) if "## One graph, read" in cell.source]
    notebook.cells = notebook.cells[: chapters[0]] + [new_code_cell(code) for code in codes]
    (tmp_path / "notebooks").mkdir()
    copied = tmp_path / "notebooks" / MEETS_THE_CHECK.name
    nbformat.write(notebook, copied)
    try:
        run_series.run(copied)
    finally:
        sys.modules.pop("run_series", None)
