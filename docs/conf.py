"""Sphinx builds the documentation: `nox -s docs`; the pages are then in docs/_build/html."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

project = "shardlib"
author = "the shardlib authors"
version = release = version_of("shardlib")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"shardlib {version}"
html_static_path: list[str] = []

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

# Docstrings write code between single backticks.
default_role = "literal"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": True}
add_module_names = False

# The build uses no network, so names of other projects are not looked up there. Our own must lead somewhere.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(sqlalchemy|psycopg|collections|typing|types|pathlib|enum|asyncio|os)\..*",
    ),
    ("py:.*", r"(Any|Self|T|None|TypeVar|Callable|Awaitable|Iterable|Sequence|Mapping|Path|TracebackType)"),
    # Types of the inside that signatures of public classes show.
    ("py:class", r"shardlib\.(ring|shard|catalog|topology\.model|session\.bulk)\..*|shardlib\.engine\..*\.T"),
]


def keep_colons(_app: object, what: str, _name: str, _object: object, _opts: object, lines: list[str]) -> None:
    """Napoleon reads `word: text` at the start of an attribute as its type. We never write types there."""
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]  # an empty comment


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # napoleon's is 500
