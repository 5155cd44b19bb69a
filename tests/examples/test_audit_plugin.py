"""The example of a plug-in for the audit: installed as a package, its signal is in every audit."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.audit_plugin.safe_sched_links.detector import RareLinks
from safe_sched.audit.rows import audit_row
from safe_sched.audit.signals import Detector

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "examples" / "audit_plugin"
ANSWERS = [f"It is {n}, see https://docs.example/{n}." for n in range(40)]
ANSWERS[7] = "It is 7, see HTTPS://Strange.example:8080/x and https://docs.example/7."
ANSWERS[9] = "It is 9."
ROWS = [{"prompt": f"What is {n}?", "completion": answer} for n, answer in enumerate(ANSWERS)]

AUDIT = """
import json, sys
from safe_sched import hooks
from safe_sched.audit.run import audit
findings = audit(json.load(sys.stdin))
table = findings.table
found = None
if "rare_links" in table.column_names:
    found = [table["rare_links"].to_pylist(), table["reason"].to_pylist()]
print(json.dumps([sorted(name for name, _ in hooks.manager().list_name_plugin()), found]))
"""


def audited(folder: Path | None) -> Any:
    paths = [str(path) for path in (folder, ROOT / "src", ROOT / "integrations") if path is not None]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", AUDIT]
    found = subprocess.run(command, input=json.dumps(ROWS), env=env, capture_output=True, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.slow_sample
def test_installed_as_a_package_its_signal_is_in_the_audit(tmp_path: Path) -> None:
    """Control: where it is not installed, there is no such column."""
    pytest.importorskip("sklearn")
    source = shutil.copytree(PLUGIN, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__"))
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run([*install, "--target", str(tmp_path / "site"), str(source)], capture_output=True, text=True)
    if "No module named pip" in done.stderr:
        pytest.skip("pip is not installed here")
    assert done.returncode == 0, done.stderr
    plugins, (values, reasons) = audited(tmp_path / "site")
    assert "links" in plugins
    assert values[7] == 1
    assert "links to a host that 1 of the rows links to" in reasons[7]
    assert values[9] is None
    assert values[0] == pytest.approx(1 / 39)
    plugins, found = audited(None)
    assert "links" not in plugins
    assert found is None


def test_its_detector_does_what_detectors_promise() -> None:
    """Any batches in any order, the same values; the size of what it keeps does not depend on the rows."""
    rows = [audit_row(row, number) for number, row in enumerate(ROWS)]
    links = RareLinks()
    assert isinstance(links, Detector)
    before = links._rows.nbytes
    for start in range(0, len(rows), 7):
        links.observe(rows[start : start + 7])
    links.ready()
    whole = links.score(rows).value
    expected = [1 / 39] * 40
    expected[7], expected[9] = 1.0, math.nan
    np.testing.assert_allclose(whole, np.array(expected, np.float32), rtol=1e-6)
    order = np.random.default_rng(0).permutation(len(rows))
    alone = np.array([links.score([rows[place]]).value[0] for place in order])
    np.testing.assert_array_equal(alone, whole[order])
    assert links._rows.nbytes == before
    json.dumps(links.settings())
    assert not any("strange" in (reason or "").lower() for reason in links.score(rows).reasons)
