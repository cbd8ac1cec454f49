"""The site's settings: Sphinx, furo and myst. `make docs` builds it into build/docs, offline; a warning is an error."""

from __future__ import annotations

import builtins
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.ext import napoleon
from sphinx.ext.napoleon.docstring import GoogleDocstring

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from docs import draw_architecture, write_reference  # noqa: E402
from starflow import __version__  # noqa: E402

project = "starflow"
author = "The starflow authors"
project_copyright = author
version = release = __version__
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
root_doc = "index"

html_theme = "furo"
html_title = "starflow"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b6e99", "color-brand-content": "#0b6e99"},
    "dark_css_variables": {"color-brand-primary": "#6cc5e8", "color-brand-content": "#6cc5e8"},
}
pygments_style = "default"
pygments_dark_style = "github-dark"

myst_enable_extensions = ["colon_fence"]  # formulas are text: MathJax would come from another site
myst_heading_anchors = 3

default_role = "literal"  # a name between single backticks in a docstring
nitpicky = True
# What is not ours lies on other sites, and the site builds offline: only our own names have to be found.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!starflow\.).*"),
    (r"py:class", r"starflow\..*\.(T|Number)"),  # type variables
]

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_use_type_comments = False
python_use_unqualified_type_names = True
python_display_short_literal_types = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

SECTIONS: Any = napoleon.Config(napoleon_use_ivar=True, napoleon_use_rtype=False)


def unlink_bare_words(_app: Sphinx, doctree: nodes.document) -> None:
    """A type such as `bytes`, or a field's name, is no link: Sphinx would find an attribute of the same name."""
    for link in list(doctree.findall(addnodes.pending_xref)):
        target = str(link.get("reftarget"))
        if link.get("refdomain") == "py" and (hasattr(builtins, target) or link.get("reftype") == "obj"):
            link.replace_self(nodes.Text(target))


def plain_text(_app: Sphinx, what: Any, name: str, thing: object, _options: object, lines: list[str]) -> None:
    """Docstrings are plain text with names in backticks and Google's sections, which this turns into reStructuredText.

    napoleon reads the sections. It is called here and not listed as an extension because it would take the words before
    a colon in a field's documentation for its type.
    """
    text, found = "\n".join(lines), []
    for part in re.split(r"((?:^[ ]*>>>.*\n(?:[ ]*\S.*(?:\n|\Z))*)|`[^`]+`)", text, flags=re.MULTILINE):
        verbatim = part.startswith("`") or part.lstrip().startswith(">>>")
        found.append(part if verbatim else re.sub(r"([|*\\]|(?<=\w)_(?!\w))", r"\\\1", part))
    text = re.sub(r"(?<!\w)(`[^`]+`)(?=\w)", r"\1\\ ", "".join(found))  # `Literal`s: what follows joins the name
    text = re.sub(r"(?<=\S)\n(?=[ ]*- )", r"\n\n", text)  # a list may follow its introduction without an empty line
    if what not in ("attribute", "data", "property"):
        text = str(GoogleDocstring(text, SECTIONS, None, what, name, thing))
    lines[:] = text.split("\n")


def short_defaults(
    _app: Sphinx, _what: str, _name: str, _thing: object, _options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """A default such as `<built-in function print>` is no Python, and Sphinx would give up the whole signature."""
    return re.sub(r"<[^<>]+>", "...", signature) if signature else signature, returns


def setup(app: Sphinx) -> None:
    """Draw the picture and write the generated pages before Sphinx looks for pages."""
    app.connect("autodoc-process-docstring", plain_text)
    app.connect("autodoc-process-signature", short_defaults)
    app.connect("doctree-read", unlink_bare_words)
    draw_architecture.main([])
    write_reference.main([])
