"""The site: what its pages link to, and what of it can be checked without Sphinx."""

import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE_PACKAGES = ("sphinx", "myst_nb", "furo", "sphinx_copybutton")
needs_sphinx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in SITE_PACKAGES), reason="requirements-site.txt is not installed"
)


class Links(HTMLParser):
    """The anchors of a page, and what it refers to."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.targets = {""}, []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        self.targets += [attributes[name] for name in ("href", "src") if attributes.get(name) is not None]


def broken_links(site):
    """Each reference inside the site to a file or an anchor that is not there, with the page that has it."""
    pages = {path: Links(path) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for target in page.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            file = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not file.is_file() or (file in pages and unquote(url.fragment) not in pages[file].anchors):
                broken.append(f"{path.relative_to(site)}: {target}")
    return broken


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<p id="x"></p><a href="#x"><a href="#y"><a href="b.html#x"><img src="c.png">')
    (tmp_path / "b.html").write_text('<a href="a.html#x"><a href="https://example.org/z"><a href="d%20d.txt">')
    (tmp_path / "d d.txt").write_text("")
    assert sorted(broken_links(tmp_path)) == ["a.html: #y", "a.html: b.html#x", "a.html: c.png"]


def documents():
    """The Markdown of the repository, {path: text}: its documents and the cells of its notebooks."""
    found = {path: path.read_text() for pattern in ("*.md", "docs/*.md", "models/*.md") for path in ROOT.glob(pattern)}
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        found[path] = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return found


def anchors(text):
    """The anchors of a document's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ +(.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_documents_link_to_files_and_headings_that_exist():
    texts, broken = documents(), []
    for path, text in texts.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
            url = urlsplit(target)
            if url.scheme:
                continue
            file = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not file.exists() or (url.fragment and url.fragment not in anchors(texts[file])):
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert broken == []


def test_every_notebook_and_document_is_in_the_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    contents = set(
        re.findall(r"^(?:.*<)?(/?[\w/*-]+)>?$", "".join(re.findall(r"```\{toctree\}(.*?)```", index, re.S)), re.M)
    )
    assert {path.stem for path in ROOT.glob("docs/*.md")} - {"index"} <= contents
    assert {"/notebooks/*", "/README", "/models/README"} <= contents


def test_every_failure_names_its_source():
    text = (ROOT / "docs" / "it-failed-on-inf2.md").read_text()
    entries = re.split(r"^### ", text, flags=re.M)[1:]
    assert len(entries) > 20
    assert [entry.splitlines()[0] for entry in entries if not re.search(r"^\*Source:\*\s", entry, re.M)] == []


def test_the_glossary_points_to_notebooks_that_use_the_word():
    def plain(text):
        return re.sub(r"[-_ ]+", " ", text.lower())

    words, missing = 0, []
    for entry in re.split(r"^## ", (ROOT / "docs" / "glossary.md").read_text(), flags=re.M)[1:]:
        word = entry.splitlines()[0]
        for number, name in re.findall(r"\[(\d\d)\]\(\.\./notebooks/([\w.]+)\)", entry):
            cells = json.loads((ROOT / "notebooks" / name).read_text())["cells"]
            text = "\n".join("".join(cell["source"]) for cell in cells)
            words += 1
            if not name.startswith(number) or plain(word) not in plain(text):
                missing.append(f"{word}: {number}")
    assert words > 25 and missing == []


@needs_sphinx
def test_a_cell_whose_source_is_hidden_is_folded(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    spec = importlib.util.spec_from_file_location("site_conf", ROOT / "docs" / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    hidden, shown = {"jupyter": {"source_hidden": True}, "tags": ["a"]}, {"tags": ["a"]}
    folded = conf.fold_hidden({"cells": [{"metadata": hidden}, {"metadata": shown}, {"metadata": {}}]})
    assert [cell["metadata"].get("tags", []) for cell in folded["cells"]] == [["a", "hide-input"], ["a"], []]


@needs_sphinx
def test_the_site_builds_without_a_warning_and_its_links_hold(tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "-d", tmp_path / "doctrees"]
    done = subprocess.run([*command, ".", site], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert broken_links(site) == []
    assert {path.stem for path in ROOT.glob("notebooks/*.ipynb")} <= {
        path.stem for path in site.glob("notebooks/*.html")
    }
