"""The notebooks on Neuron's path, as far as a machine without Neuron can tell: through the double of torch_neuronx.

Behind its cells each runs the solutions of its exercises.
"""

import json
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import solutions
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).resolve().parents[1]
DOUBLE = ROOT / "tests" / "double"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0[1-57]_*.ipynb"))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a copy of a notebook, up to the cell with `until`; return it and the double's log.

    A copy writes into a build/ of its own.
    """
    monkeypatch.syspath_prepend(ROOT)
    import run_series

    log = tmp_path / "traces.jsonl"
    # Not on top of what is there: a kernel that cannot find the repository's modules would take installed ones.
    monkeypatch.setenv("PYTHONPATH", f"{DOUBLE}:{ROOT}")
    monkeypatch.setenv("QUESTIONS", "20")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Threads that wait in a loop for a core that another process has make a notebook take ten times as long.
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("TORCH_NEURONX_DOUBLE_LOG", str(log))
    monkeypatch.setenv("TORCH_NEURONX_DOUBLE_CORES", str(tmp_path))  # a second process finds them taken
    for name in ("BLIP_MODEL", "RESNET_MODEL", "TORCH_NEURONX_DOUBLE_DEVICE", "NEURON_RT_VISIBLE_CORES"):
        monkeypatch.delenv(name, raising=False)

    def run_copy(path, until=None):
        (tmp_path / "notebooks").mkdir()
        copied = tmp_path / "notebooks" / path.name
        notebook = nbformat.read(path, as_version=4)
        if until is not None:
            heading = next(i for i, cell in enumerate(notebook.cells) if until in cell.source)
            notebook.cells = notebook.cells[:heading]
        notebook.cells += [new_code_cell(code) for code in solutions(notebook)]
        nbformat.write(notebook, copied)
        for figures in path.parent.glob("figures*.py"):
            shutil.copy(figures, copied.parent)
        (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")  # whose stored measurements a notebook reads
        notebook, _ = run_series.run(copied)
        return notebook, [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []

    yield run_copy
    sys.modules.pop("run_series", None)


def printed(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_through_torch_neuronx(run, path):
    notebook, traces = run(path)
    assert "compiled cells run on: test double of torch_neuronx\n" in printed(notebook)
    assert traces and all("--auto-cast" in trace["compiler_args"] for trace in traces)
    if not path.stem.startswith(("01", "07")):  # of which one compares labels, and the other counts equal answers
        assert sys.modules["run_series"].answers_verified(notebook) > 0
    if path.stem.startswith("05"):
        assert any(trace["states"] for trace in traces)
    if path.stem.startswith("07"):
        assert any("matmult" in trace["compiler_args"] for trace in traces)


def test_08_leaves_every_core_to_the_service(run, tmp_path):
    """Without the cells that start Ray, which detects cores by a tool of AWS."""
    notebook, traces = run(ROOT / "notebooks" / "08_host.ipynb", until="## Batches that form by themselves")
    assert "compiled cells run on: test double of torch_neuronx\n" in printed(notebook)
    assert not traces and not list(tmp_path.glob("core*"))
