"""Configuration of the documentation; `make docs` builds it."""

import sys
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "DSVL"
author = "the DSVL authors"
copyright = author
pyproject = Path(__file__).parent.parent / "pyproject.toml"
release = version = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "docstrings",
    "generated_reference",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a generated page may start at a lower level than the page that includes it

default_role = "code"
smartquotes_action = "qe"  # leave the dashes of flags as they are
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # types are in the signatures
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"DSVL {release}"
html_static_path = ["_static"]
