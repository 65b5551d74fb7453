"""The runner of the notebooks, and what they have to teach."""

import ast
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def series(monkeypatch, tmp_path):
    """Run the series with these arguments; its pages go to a directory of the test."""
    monkeypatch.syspath_prepend(ROOT)
    import run_series

    monkeypatch.setattr(run_series, "ROOT", tmp_path)
    monkeypatch.setattr(run_series, "BUILD", tmp_path / "build")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_series.py", *map(str, arguments)])
        run_series.main()

    yield run
    sys.modules.pop("run_series", None)


def test_without_torch_xla_notebook_06_is_left_out(series, monkeypatch, capsys):
    monkeypatch.setattr("run_series.importlib.util.find_spec", lambda name: None)
    series(ROOT / "notebooks" / "06_check_before_inf2.ipynb")
    assert capsys.readouterr().out.startswith("left out: 06_check_before_inf2 takes torch-xla")


def test_a_cell_that_fails_ends_it_and_the_page_shows_what_came_before(series, tmp_path):
    path = tmp_path / "some.ipynb"
    cells = [new_code_cell(source) for source in ("print(6 * 7)", "assert 'this' == 'that'", "print(9 * 9)")]
    nbformat.write(new_notebook(cells=cells), path)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"(?s)FAILED: some.ipynb, cell \[2\].*AssertionError.*build/some.html"):
        series("--store", path)
    page = (tmp_path / "build" / "some.html").read_text()
    assert "42" in page and "AssertionError" in page and "<pre>81" not in page
    assert path.read_bytes() == before


@pytest.mark.parametrize("module", ["blip_graphs.py", "blip_helpers.py"])
def test_a_notebook_shows_or_explains_every_class_and_function_of_the_helper(module):
    cells = [cell for path in (ROOT / "notebooks").glob("*.ipynb") for cell in nbformat.read(path, as_version=4).cells]
    text = "\n".join(cell.source for cell in cells)
    helper = ast.parse((ROOT / module).read_text())
    defined = [node.name for node in helper.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert defined and [name for name in defined if not re.search(rf"\b{name}\b", text)] == []
