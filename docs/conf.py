"""How the site is built: `make docs`."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

import vitprobe

project = "vitprobe"
author = "The vitprobe authors"
project_copyright = author
version = release = vitprobe.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "examples"]

html_theme = "furo"
html_title = "vitprobe"
html_static_path = ["_static"]
html_css_files = ["vitprobe.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options: dict[str, Any] = {
    "light_css_variables": {"color-brand-primary": "#0072b2", "color-brand-content": "#0072b2"},
    "dark_css_variables": {"color-brand-primary": "#56b4e9", "color-brand-content": "#56b4e9"},
}
# Neither is a prompt part of a command, nor output something to paste.
copybutton_exclude = ".linenos, .gp, .go"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# Notebooks are committed without outputs and run here; an error in one is an error of the build.
nb_execution_mode = "cache"
nb_execution_cache_path = "_build/notebooks"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_output_stderr = "remove"
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# Single backticks in docstrings are names.
default_role = "py:obj"


_ITEM = re.compile(r"[A-Za-z_]\w*(, [A-Za-z_]\w*)*: \S")


def _listed(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Lines such as `name: what it is` of a docstring as the items of a list, in place; a bar is
    no markup."""
    inside, fresh = False, True
    for i, line in enumerate(lines):
        text = line if ">>>" in line else line.replace("|", r"\|")
        if _ITEM.match(text) and (fresh or inside):
            names, _, rest = text.partition(": ")
            text = f"- **{names}**: {rest}"
            inside = True
        elif inside and line.strip():
            text = f"  {text.strip()}"
        else:
            inside = False
        fresh = not line.strip()
        lines[i] = text


def setup(app: Sphinx) -> None:
    """Before napoleon, whose sections have an indentation of their own."""
    app.connect("autodoc-process-docstring", _listed, priority=400)
