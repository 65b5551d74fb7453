"""Run the notebooks in order and leave them as HTML in ``build/``: ``python run_series.py [--store] [NOTEBOOK]``.

The first cell that fails ends it, and its notebook's page shows what came before.
"""

import argparse
import importlib.util
import logging
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"


class ThisPython(AsyncKernelManager):
    """Starts the interpreter that runs this script, whatever kernels the machine has under the name python3."""

    kernel_spec = KernelSpec(**get_kernel_dict())
    transport_encryption = "auto"


def run(path):
    """Run a notebook from top to bottom, where it lies; return it with its outputs, and its number of code cells."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_manager_class=ThisPython,
        resources={"metadata": {"path": path.parent}},
        coalesce_streams=True,
        record_timing=False,
    )
    cells = [(i, cell) for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and cell.source.strip()]
    form = "{desc:<28}{percentage:3.0f}% |{bar:30}| {n_fmt}/{total_fmt} cells, {elapsed}{postfix}"
    with client.setup_kernel(), tqdm(total=len(cells), desc=path.stem, bar_format=form) as bar:
        for number, (index, cell) in enumerate(cells, 1):
            first_line = cell.source.strip().splitlines()[0]
            bar.set_postfix_str(first_line[:40])
            try:
                client.execute_cell(cell, index)
            except (CellExecutionError, RuntimeError) as error:  # the latter where the kernel died
                bar.close()
                last_lines = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip().splitlines()[-8:]
                page = leave_page(notebook, path)
                why = [f"FAILED: {path.name}, cell [{number}]: {first_line}", *last_lines, f"as far as it went: {page}"]
                sys.exit("\n    ".join(why))
            except KeyboardInterrupt:
                client.shutdown_kernel = "immediate"
                raise
            bar.update()
        bar.set_postfix_str("")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook, len(cells)


def answers_verified(notebook):
    """How many answers the cells of a notebook say that they compared."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "\n".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    return sum(map(int, re.findall(r"^OK  (\d+)/\1 answers equal", text, re.MULTILINE)))


def as_html(notebook, path):
    """A page that shows the same without a network: no scripts, pictures inside, links to the other pages."""
    exporter = HTMLExporter(template_name="lab", embed_images=True)
    html, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": path.stem, "path": str(path.parent)}})
    html = re.sub(r"<script\b.*?</script>", "", html, flags=re.DOTALL)
    return re.sub(r'href="(\w+)\.ipynb', r'href="\1.html', html)


def leave_page(notebook, path):
    """Write a notebook's page into build/, and return its path from the repository."""
    BUILD.mkdir(exist_ok=True)
    page = BUILD / f"{path.stem}.html"
    write(page, as_html(notebook, path))
    return page.relative_to(ROOT)


def write(path, text):
    """Write a file whole: an interruption leaves the former one."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description="Run the notebooks in order and leave them as HTML in build/.")
    parser.add_argument("--store", action="store_true", help="if all of them pass, store the outputs in the notebooks")
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK", help="by default all in notebooks/")
    arguments = parser.parse_args()
    paths = [path.resolve() for path in arguments.notebooks] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        sys.exit(f"no such notebook: {', '.join(missing)}" if missing else "there are no notebooks in notebooks/")

    if not importlib.util.find_spec("torch_xla"):
        for path in (path for path in paths if path.stem.startswith("06")):
            print(f"left out: {path.stem} takes torch-xla, which exists for Linux on x86-64 alone")
        paths = [path for path in paths if not path.stem.startswith("06")]
        if not paths:
            return

    done, rows = {}, []
    for path in paths:
        start = time.perf_counter()
        done[path], cells = run(path)
        leave_page(done[path], path)
        rows.append((path.stem, cells, time.perf_counter() - start, answers_verified(done[path])))
    if arguments.store:
        for path, notebook in done.items():
            write(path, nbformat.writes(notebook) + "\n")

    rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    print(f"\n{'notebook':<28}{'cells':>6}{'seconds':>10}{'answers verified':>19}")
    for name, cells, seconds, answers in rows:
        print(f"{name:<28}{cells:>6}{seconds:>10.1f}{answers:>19,}")
    print(f"HTML in {BUILD.relative_to(ROOT)}/")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        logging.disable()  # asyncio would report the cell that was given up
        sys.exit("\ninterrupted: nothing was stored")
