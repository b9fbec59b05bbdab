"""Sphinx configuration."""

import lightning_bcd

project = "lightning-bcd"
author = "The lightning-bcd authors"
copyright = author
version = release = lightning_bcd.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# Docstrings use single backticks for code, as Markdown does.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

doctest_test_doctest_blocks = "default"
doctest_global_setup = """
import logging
import os
import tempfile
import warnings

import torch

warnings.simplefilter("ignore")
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)
os.chdir(tempfile.mkdtemp())
torch.manual_seed(0)
torch.set_num_threads(1)
"""

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_title = f"lightning-bcd {release}"
