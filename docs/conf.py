"""Sphinx builds the site from the files as they stand in the repository: `make site`.

The source directory is the repository, so that a link between two files holds on disk, in JupyterLab and on the site.
No notebook is run: the site shows stored outputs.
"""

import json
import sys
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import download_reference, pending_xref

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "BLIP on AWS Inferentia2"
html_show_copyright = html_show_sphinx = False
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
root_doc = "docs/index"
include_patterns = ["README.md", "docs/*.md", "models/README.md", "notebooks/*.ipynb"]
exclude_patterns = [".*", "build", "**/.ipynb_checkpoints"]

# Pages

nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
myst_heading_anchors = 3

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]  # index.html, which leads from the root of the site to the home page
html_copy_source = html_use_index = False
pygments_style, pygments_dark_style = "tango", "monokai"
copybutton_selector = "div.highlight-python pre, div.cell_input pre, div.highlight-default pre"

# The API page

default_role = "code"  # `x` in a docstring
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
napoleon_google_docstring = False
napoleon_use_param = napoleon_use_rtype = False  # types as they are written, no links
napoleon_use_ivar = True
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|transformers|pathlib|collections|typing)\..*"),
    ("py:exc", r"\w+Error"),
    ("py:class", r"inf2\.rounding\.ProductMode"),  # a base class that nobody imports
    ("py:class", r"[\w ]+"),  # types in words, such as `str to int`
]


def fold_hidden(notebook):
    """Ask myst-nb to fold what JupyterLab folds: its tag is `hide-input`."""
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags", [])
        if cell["metadata"].get("jupyter", {}).get("source_hidden") and "hide-input" not in tags:
            cell["metadata"]["tags"] = [*tags, "hide-input"]
    return notebook


def read_source(app, docname, source):
    if app.env.doc2path(docname).suffix == ".ipynb":
        source[0] = json.dumps(fold_hidden(json.loads(source[0])))


def link(node, app, docname, page, anchor=""):
    uri = app.builder.get_relative_uri(docname, page) + anchor
    node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=True))


def link_folders(app, doctree):
    """A link to a folder leads to its README, or to what the API page says of the package."""
    for node in list(doctree.findall(pending_xref)):
        folder = ROOT / Path(app.env.docname).parent / str(node["reftarget"])
        if node["reftype"] == "myst" and folder.is_dir():
            path = folder.resolve().relative_to(ROOT)
            if (folder / "README.md").exists():
                link(node, app, app.env.docname, f"{path}/README")
            elif (folder / "__init__.py").exists():
                link(node, app, app.env.docname, "docs/api", f"#module-{path.name}")


def link_sources(app, doctree, docname):
    """A link to a module leads to its source as a page, where the API page has names of it; else to the file."""
    for node in list(doctree.findall(download_reference)):
        path = (ROOT / Path(docname).parent / node["reftarget"]).resolve().relative_to(ROOT)
        if ".".join(path.with_suffix("").parts) in app.env._viewcode_modules:
            link(node, app, docname, f"_modules/{path.with_suffix('').as_posix()}")


def setup(app):
    app.connect("source-read", read_source)
    app.connect("doctree-read", link_folders)
    app.connect("doctree-resolved", link_sources)
