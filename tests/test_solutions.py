"""The solutions of the notebooks' exercises: each runs behind its notebook's cells, and asserts what it claims."""

import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).resolve().parents[1]
SOLUTION = re.compile(r"<details>\s*<summary>Solution.*?</summary>(.*?)</details>", re.DOTALL)
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def solutions(path):
    """The code of each solution in a notebook."""
    cells = nbformat.read(path, as_version=4).cells
    folded = [part for cell in cells if cell.cell_type == "markdown" for part in SOLUTION.findall(cell.source)]
    return [code for part in folded for code in CODE.findall(part)]


NOTEBOOKS = [path for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if solutions(path)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_solutions_hold(path, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT)
    # The notebook runs in a folder of its own, and writes into a build/ beside it.
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'notebooks'}")
    monkeypatch.setenv("QUESTIONS", "20")
    for name in ("BLIP_MODEL", "RESNET_MODEL"):
        monkeypatch.delenv(name, raising=False)
    import run_series

    notebook = nbformat.read(path, as_version=4)
    codes = solutions(path)
    assert all("assert" in code or "check_" in code for code in codes)
    notebook.cells += [new_code_cell(code) for code in codes]
    (tmp_path / "notebooks").mkdir()
    copied = tmp_path / "notebooks" / path.name
    nbformat.write(notebook, copied)
    try:
        run_series.run(copied)
    finally:
        sys.modules.pop("run_series", None)
