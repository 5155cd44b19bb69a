import importlib.metadata
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# the sources beside this file, also where the package is not installed
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "integrations")]

project = "safe-sched"
author = "The safe-sched authors"
copyright = author
try:
    release = importlib.metadata.version("safe-sched")
except importlib.metadata.PackageNotFoundError:
    release = "from source"
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "api/generated"]

# `name` in a docstring links to what it names, where that is documented
default_role = "py:obj"
# indented blocks are formulas and sketches; code says that it is code
highlight_language = "none"
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

autodoc_member_order = "bysource"
# docstrings give shape, range and unit of every argument; the bare types stay out of their way
autodoc_typehints = "none"
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "safe-sched"
