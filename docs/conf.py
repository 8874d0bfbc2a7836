"""Sphinx, by `make docs`. Its source is the whole tree, so that the README, the benchmarks' tables and the
links between them are what they are on GitHub; a link to a source file is a download."""

from functools import partial
from importlib.metadata import version as _version

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.logging import getLogger

project = "finefuse"
author = "the finefuse authors"
version = release = _version("finefuse")
html_title = f"finefuse {version}"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "benchmarks/results/*.md"]
exclude_patterns = [".*", "build", "out", "shared"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_show_copyright = False
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_extra_path = ["_site"]  # index.html, which leads to docs/index.html

autodoc_typehints = "none"  # docstrings say the types
python_maximum_signature_line_length = 90


def verbatim(app, what, name, obj, options, lines):
    """Docstrings are plain text with formulas."""
    lines[:] = ["::", "", *(f"   {line}" for line in lines), ""]


def mathml(self, node, block=False):
    """Formulas as MathML: the browser draws them, nothing is fetched from elsewhere."""
    try:
        formula = tex2mathml(node.astext(), as_block=block)
        self.body.append(f"<div>{formula}</div>" if block else formula)
    except MathError as error:
        getLogger(__name__).warning("%s: %s", node.astext(), error, location=node)
    raise SkipNode


def setup(app):
    app.connect("autodoc-process-docstring", verbatim)
    app.add_html_math_renderer("mathml", (mathml, None), (partial(mathml, block=True), None))
