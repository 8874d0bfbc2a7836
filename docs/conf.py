"""Sphinx, by `make docs`. Its source is the whole tree, so that the README, the benchmarks' tables and the
links between them are what they are on GitHub; a link to a source file is a download."""

from importlib.metadata import version as _version

project = "finefuse"
author = "the finefuse authors"
version = release = _version("finefuse")
html_title = f"finefuse {version}"

# the last one: formulas without a network
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx-mathjax-offline"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "benchmarks/results/*.md"]
exclude_patterns = [".*", "build", "out", "shared"]
myst_fence_as_directive = ["math"]  # as GitHub has formulas: no character in them is Markdown
myst_heading_anchors = 3

html_theme = "furo"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_extra_path = ["_site"]  # index.html, which leads to docs/index.html

autodoc_typehints = "none"  # docstrings say the types
python_maximum_signature_line_length = 90


def verbatim(app, what, name, obj, options, lines):
    """Docstrings are plain text with formulas."""
    lines[:] = ["::", "", *(f"   {line}" for line in lines), ""]


def setup(app):
    app.connect("autodoc-process-docstring", verbatim)
