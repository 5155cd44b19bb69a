"""The core knows no trainer: importing it imports none."""

from __future__ import annotations

import json
import subprocess
import sys

TRAINERS = {"transformers", "trl", "peft", "accelerate", "datasets", "axolotl", "safe_sched_hf"}

PROBE = """
import json, pkgutil, sys, importlib
import safe_sched
first = sorted({name.partition(".")[0] for name in sys.modules})
parts = [m.name for m in pkgutil.walk_packages(safe_sched.__path__, "safe_sched.")]
for name in parts:
    importlib.import_module(name)
print(json.dumps([first, parts, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def test_importing_the_core_imports_no_trainer():
    """Neither the package nor any module of it. Control: the probe does see what the core imports, and all modules."""
    found = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    package, parts, everything = json.loads(found.stdout)
    assert not TRAINERS & set(package)
    assert not TRAINERS & set(everything)
    assert not {"typer", "rich", "pluggy"} & set(package)  # for the command line and for plugins, when they are used
    assert {"torch", "pydantic", "safe_sched"} <= set(package)
    assert {"safetensors", "pyarrow", "typer", "rich", "pluggy"} <= set(everything)
    assert {"safe_sched.training.session", "safe_sched.schedulers.bds", "safe_sched.cli.losses"} <= set(parts)
