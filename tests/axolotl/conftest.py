"""Axolotl, where it is installed, is imported before the tests are: what it imports warns of much."""

from __future__ import annotations

import importlib.util
import os
import warnings

collect_ignore = ["other.py"]  # a plugin of Axolotl, no test

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

if importlib.util.find_spec("axolotl") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import axolotl.train  # noqa: F401
        import trl  # noqa: F401
        import typer  # noqa: F401
