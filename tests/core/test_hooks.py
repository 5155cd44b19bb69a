"""Plugins: found through the entry point group, and loud when they are broken."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from safe_sched import Fixed, hooks
from safe_sched.errors import OptionError, PluginError, UnscoredError
from safe_sched.hooks import RowLosses, RowLossesRequest, hookimpl, manager, row_losses
from safe_sched.scheduler import Scheduler
from safe_sched.schedulers import BDS, CATALOG, build

ROWS = [{"text": "a"}, {"text": "b"}]


class Half(Fixed):
    """What a third party might bring."""

    name = "half"


class Entry:
    """An entry point whose module is made here."""

    def __init__(self, name: str, load: Callable[[], Any]) -> None:
        self.name, self.value, self.load = name, f"{name}.plugin", load


def plugin(**functions: Any) -> types.ModuleType:
    module = types.ModuleType("plugin")
    for name, function in functions.items():
        setattr(module, name, hookimpl(function))
    return module


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Have these plugins installed, and no other."""

    def now(*plugins: Any) -> None:
        entries = [p if isinstance(p, Entry) else Entry(f"p{i}", lambda p=p: p) for i, p in enumerate(plugins)]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: entries)
        manager.cache_clear()

    yield now
    manager.cache_clear()


def losses_of(count: int) -> RowLosses:
    return RowLosses(torch.arange(count), torch.ones(count), torch.ones(count, dtype=torch.long))


def test_a_plugin_adds_a_scheduler_by_name(install: Any) -> None:
    install(plugin(safe_sched_schedulers=lambda: {"half": Half}))
    built = build("half", values=[1.0, 0.5])
    assert isinstance(built, Half)
    assert isinstance(built, Scheduler)
    with pytest.raises(OptionError, match=r"unknown scheduler 'halve' \(did you mean 'half'\?\); allowed: 'anti"):
        build("halve")
    install()  # negative control
    with pytest.raises(OptionError, match="unknown scheduler 'half'; allowed: 'antibody', 'bds', 'bds_released'"):
        build("half")


def test_what_is_built_in_needs_no_plugin_and_stays_what_it_is(install: Any) -> None:
    def broken() -> Any:
        raise AssertionError("loaded")

    install(Entry("broken", broken))
    assert isinstance(build("bds"), BDS)
    install(plugin(safe_sched_schedulers=lambda: {"bds": Half, "half": Half}))
    assert isinstance(build("half", values=[1.0]), Half)
    assert isinstance(build("bds"), BDS)
    assert "half" not in CATALOG


def test_two_plugins_with_one_name_are_an_error_unless_they_agree(install: Any) -> None:
    one = plugin(safe_sched_schedulers=lambda: {"half": Half})
    install(one, plugin(safe_sched_schedulers=lambda: {"half": Half}))
    assert isinstance(build("half", values=[1.0]), Half)
    install(one, plugin(safe_sched_schedulers=lambda: {"half": Fixed}))
    with pytest.raises(PluginError, match="two plugins bring a scheduler 'half': .*Uninstall one of them"):
        build("half")


def test_a_misspelt_hook_is_an_error(install: Any) -> None:
    install(Entry("mine", lambda: plugin(safe_sched_scheduler=lambda: {})))
    with pytest.raises(PluginError, match=r"the plugin 'mine' \(mine.plugin\) cannot .*unknown hook 'safe_sched_sched"):
        build("half")


def test_a_hook_with_an_unknown_argument_is_an_error(install: Any) -> None:
    install(plugin(safe_sched_row_losses=lambda rows: None))
    with pytest.raises(PluginError, match=r"the plugin 'p0' .*PluginValidationError.*rows"):
        row_losses(RowLossesRequest("m", ROWS))


def test_a_plugin_that_cannot_be_imported_is_an_error(install: Any) -> None:
    def load() -> Any:
        raise ModuleNotFoundError("No module named 'quux'")

    install(Entry("mine", load))
    with pytest.raises(PluginError, match=r"'mine' .*ModuleNotFoundError: No module named 'quux'. Update or uninstall"):
        build("half")


def test_the_first_answer_counts_and_none_is_no_answer(install: Any) -> None:
    """Pluggy asks the plugin that was registered last first."""
    found = losses_of(2)
    never = plugin(safe_sched_row_losses=lambda request: pytest.fail("asked"))
    install(
        never, plugin(safe_sched_row_losses=lambda request: found), plugin(safe_sched_row_losses=lambda request: None)
    )
    assert row_losses(RowLossesRequest("m", ROWS)) is found


@pytest.mark.parametrize(
    "plugins", [[], [plugin(safe_sched_row_losses=lambda request: None)]], ids=["none", "no answer"]
)
def test_where_nothing_can_measure_the_error_says_what_to_install(plugins: Any, install: Any) -> None:
    install(*plugins)
    with pytest.raises(PluginError, match=r"pip install 'safe-sched\[trl\]'"):
        row_losses(RowLossesRequest("m", ROWS))


def test_an_answer_for_other_rows_is_an_error(install: Any) -> None:
    install(plugin(safe_sched_row_losses=lambda request: losses_of(3)))
    with pytest.raises(PluginError, match=r"a plugin gave \(3,\) losses for 2 rows; needed: one per row"):
        row_losses(RowLossesRequest("m", ROWS))


def test_rows_without_a_loss_are_named() -> None:
    found = losses_of(9)
    found.require_complete()
    found.nll[[2, 4]] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(UnscoredError, match=r"the loss of 2 of 9 rows is not finite \(rows 2, 4, counted from 0\)"):
        found.require_complete()
    found.label_tokens[1:8] = 0
    with pytest.raises(
        UnscoredError, match=r"7 of 9 rows have no label token.*\(rows 1, 2, 3, 4, 5, ..., counted from"
    ):
        found.require_complete()


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"max_length": 1}, "max_length=1; allowed: a whole number >= 2, or None"),
        ({"batch_size": 0}, "batch_size=0; allowed: a whole number >= 1"),
        ({"device": "tpu"}, "device='tpu'; allowed: 'auto', 'cpu', 'cuda'"),
        ({"dtype": "int8"}, "dtype='int8'; allowed: 'auto', 'float32'"),
    ],
)
def test_a_request_out_of_range_is_an_error(option: Any, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        RowLossesRequest("m", ROWS, **option)


def test_our_own_plugins_are_installed_and_load_no_trainer() -> None:
    """Looking up a third party's scheduler must not wait for TRL, nor need it."""
    code = "import sys; from safe_sched import hooks; print(sorted(n for n, _ in hooks.manager().list_name_plugin())); "
    code += "print(sorted({'transformers', 'trl', 'datasets', 'axolotl', 'safe_sched_hf'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["['axolotl', 'hf']", "['safe_sched_hf']"]


def test_the_markers_belong_to_the_entry_point_group() -> None:
    assert hooks.hookimpl.project_name == hooks.hookspec.project_name == hooks.PROJECT == "safe_sched"


def test_a_front_end_is_a_plugins(install):
    """The first that knows the name runs it, with what stands behind the name; a name that nobody knows is an error."""
    asked = []

    def safe_sched_command(name: str, arguments: Any) -> int | None:
        asked.append((name, arguments))
        return 7 if name == "mine" else None

    install(plugin(safe_sched_command=safe_sched_command))
    assert hooks.command("mine", ["run", "--x"], needs="mine") == 7
    assert asked == [("mine", ["run", "--x"])]
    with pytest.raises(PluginError, match="can run safe-sched other. Install what it takes: pip install 'other'"):
        hooks.command("other", [], needs="other")
