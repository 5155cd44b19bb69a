"""What every test session does besides: it keeps what docs/compatibility.md is made of."""

from __future__ import annotations

import pytest

from tests.compat import Collector


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compat", action="store_true", help="run the tests of docs/compatibility.md and no others")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compat(feature, column, reason=...): what it shows in docs/compatibility.md")
    config.pluginmanager.register(Collector(config), "compat")
