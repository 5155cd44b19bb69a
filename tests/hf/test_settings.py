"""The block of a configuration file: it reaches every option, and an error names the key."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import types
from typing import Any

import pytest
import yaml
from datasets import Dataset

from safe_sched import BDS, Fixed
from safe_sched.errors import DataError, OptionError
from safe_sched.hooks import hookimpl, manager
from safe_sched.mixing import mix
from safe_sched.schedulers import CATALOG, build
from safe_sched_hf import SafeSchedCallback
from safe_sched_hf.config import Mix, Settings, json_schema, read_settings
from safe_sched_hf.methods import method_names, scheduler_of
from tests.support import text_rows


def read(text: str) -> Settings:
    return read_settings(yaml.safe_load(text))


@pytest.mark.parametrize("name", sorted(set(CATALOG) - {"fixed"}))
def test_every_option_of_every_method_can_be_written(name: str) -> None:
    """What a scheduler says of itself, written into a block, makes the same scheduler."""
    told: Any = yaml.safe_load(yaml.safe_dump(build(name).settings()))
    fields = {field.name for field in dataclasses.fields(CATALOG[name])}
    given = {key: value for key, value in told.items() if key == "name" or (key in fields and value is not None)}
    assert read_settings({"method": given}).scheduler().settings() == build(name).settings()
    for option in fields:
        with pytest.raises(OptionError, match=rf"safe_sched\.method\.{option}|safe_sched\.method: "):
            read_settings({"method": {"name": name, option: object()}})


def test_methods_within_methods_can_be_written() -> None:
    turns = {"safety_data": "core", "parts": [{"name": "lisa", "rho": 1e-2}], "method": {"name": "bds", "draws": 64}}
    written = read_settings(turns).callback()
    assert written.parts[0].settings()["rho"] == 0.01
    assert written.scheduler.settings()["draws"] == 64
    both: Any = read("method: {name: combined, prior_share: 0.2, parts: [bds, {name: antibody, tau: 2}]}").scheduler()
    assert (both.prior_share, [part.name for part in both.parts], both.parts[1].tau) == (0.2, ["bds", "antibody"], 2)
    fixed: Any = read("method: {name: fixed, values: [1, 0.5]}").scheduler()
    assert isinstance(fixed, Fixed)
    assert fixed.values == [1, 0.5]


def test_a_method_of_a_plugin_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Fixed):
        name = "mine"

    plugin = types.ModuleType("plugin")
    plugin.safe_sched_schedulers = hookimpl(lambda: {"mine": Mine})  # pyright: ignore[reportAttributeAccessIssue]
    point = types.SimpleNamespace(name="p", value="p", load=lambda: plugin)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [point])
    plugin.safe_sched_schedulers.__name__ = "safe_sched_schedulers"
    manager.cache_clear()
    try:
        assert isinstance(scheduler_of({"name": "mine"}), Mine)
        assert "mine" in method_names()
    finally:
        manager.cache_clear()


def test_every_option_of_the_callback_can_be_written() -> None:
    """The block's keys are the callback's arguments, and what is written arrives; front ends hand ``rows`` over."""
    ours = set(inspect.signature(SafeSchedCallback).parameters) - {"scheduler", "unknown", "rows"}
    assert ours == set(Settings.model_fields) - {"method", "mix"}
    settings = read(
        """
        method: {name: bds, draws: 8}
        safety_data: core
        safety_batch_size: 3
        safety_weight: 5e-1
        normalizer: row
        model_temperature: 1
        act: sample
        seed: 7
        report: none
        prior: safe_sched.p_harmful
        """
    )
    callback = settings.callback()
    assert isinstance(callback.scheduler, BDS)
    assert [part.name for part in callback.parts] == ["safety_batch", "sampling", "parameter_noise"]
    for name in ours - {"parts"}:  # which other tests write
        assert (
            getattr(callback, name)
            == getattr(settings, name)
            != inspect.signature(SafeSchedCallback).parameters[name].default
        )
    assert settings.callback(safety_data=text_rows(2)).safety_data == text_rows(2)


def test_an_empty_block_has_the_defaults_of_the_callback() -> None:
    parameters = inspect.signature(SafeSchedCallback).parameters
    for name, value in read_settings({}).model_dump(exclude={"mix", "method"}).items():
        assert value == (list(parameters[name].default) if name == "parts" else parameters[name].default)
    assert read_settings({}).method == parameters["scheduler"].default


ERRORS = [
    ("methd: bds", "safe_sched.methd: unknown key 'methd' (did you mean 'method'?)"),
    ("method: bsd", "safe_sched.method: unknown method 'bsd' (did you mean 'bds'?)"),
    ("method: 3", "safe_sched.method: 3; allowed: a name"),
    ("method: {draws: 3}", "allowed: a name, or a name with options"),
    ("method: {name: bds, drws: 8}", "safe_sched.method.drws: unknown option of 'bds' 'drws' (did you mean 'draws'?)"),
    ("method: {name: bds, draws: 1}", "safe_sched.method.draws: BDS(draws=1): Input should be greater than or equal"),
    ("parts: [{name: lisa, user_steps: 0}]", "safe_sched.parts.0.user_steps: Lisa(user_steps=0): Input should be"),
    ("parts: [{name: lisa, user_stps: 9}]", "safe_sched.parts.0.user_stps: unknown option of 'lisa' 'user_stps' (did"),
    ("parts: [lsia]", "safe_sched.parts.0: unknown part 'lsia' (did you mean 'lisa'?)"),
    ("method: {name: lisa}", "safe_sched.method: unknown method 'lisa'"),
    ("method: {name: combined, parts: [bds, fixed]}", "safe_sched.method: 'fixed' cannot be combined"),
    ("method: {name: combined, parts: bds}", "safe_sched.method.parts: 'bds'; allowed: a list"),
    ("method: {name: combined, parts: [bds, {name: antibody, taw: 1}]}", "safe_sched.method.parts.1.taw: "),
    ("method: {name: combined, parts: [bds, antibody], prior_share: much}", "safe_sched.method.prior_share: 'much'"),
    ("method: {name: combined, prior: 1}", "safe_sched.method.prior: unknown option of 'combined' 'prior'"),
    ("mix: {share: 1.5}", "safe_sched.mix.share: 1.5; Input should be less than 1"),
    ("mix: {shre: 0.1}", "safe_sched.mix.shre: unknown key 'shre' (did you mean 'share'?)"),
    ("mix: {blend: .nan}", "safe_sched.mix.blend: nan; "),
    ("mix: 0.1", "safe_sched.mix: 0.1; "),
    ("safety_weight: -1", "safe_sched.safety_weight: -1; Input should be greater than or equal to 0"),
    ("safety_weight: yes", "safe_sched.safety_weight: True; a number is needed, not yes or no"),
    ("safety_weight: .inf", "safe_sched.safety_weight: inf; "),
    ("safety_batch_size: 0", "safe_sched.safety_batch_size: 0; "),
    ("safety_batch_size: 1.5", "safe_sched.safety_batch_size: 1.5; "),
    ("normalizer: rows", "safe_sched.normalizer: 'rows'; Input should be 'token' or 'row'"),
    ("act: wait", "safe_sched.act: 'wait'; Input should be 'weight' or 'sample'"),
    ("report: pdf", "safe_sched.report: 'pdf'; "),
    ("seed: -1", "safe_sched.seed: -1; "),
    ("prior: [0.1, 0.2]", "safe_sched.prior: [0.1, 0.2]; "),
    (
        "{method: {name: fixed, column: weight}, mix: {share: 0.1}}",
        "safe_sched.method.column: 'weight'; safety rows that safe_sched.mix puts between",
    ),
    ("{prior: p, mix: {share: 0.1}}", "safe_sched.prior: 'p'; safety rows that safe_sched.mix puts between"),
    ("true", "safe_sched: True; allowed: keys with values"),
    ("- bds", "safe_sched: ['bds']; allowed: keys with values"),
]


@pytest.mark.parametrize(("text", "expected"), ERRORS)
def test_an_error_names_the_key(text: str, expected: str) -> None:
    with pytest.raises(OptionError) as caught:
        read(text)
    assert expected in str(caught.value)


def test_options_that_do_not_go_together_name_the_block() -> None:
    with pytest.raises(OptionError, match=r"^safe_sched: 'bds' measures 'probe' with safety rows: give safety_data"):
        read("method: bds").callback()
    with pytest.raises(OptionError, match=r"^defence\.mix: there is nothing to mix in; name it, defence\.safety_data"):
        read_settings({"mix": True}, where="defence").mixed(text_rows(4))


def test_mixing_is_that_of_mix() -> None:
    rows, safety = text_rows(30), text_rows(5, seed=9)
    settings = read("mix: {share: 0.2, mimic: false, seed: 4, schema: prompt_completion}")
    assert settings.mixed(rows, safety_data=safety) == mix(
        rows, safety, share=0.2, mimic=False, seed=4, schema="prompt_completion"
    )
    table = settings.mixed(Dataset.from_list(rows), safety_data=safety)
    assert table.to_list() == settings.mixed(rows, safety_data=safety)
    own = read_settings({"safety_data": "core", "mix": {"safety_data": safety, "share": 0.2, "mimic": False}})
    assert {row["prompt"] for row in own.mixed(rows)} == {row["prompt"] for row in rows + safety}
    with pytest.raises(DataError):
        read_settings({"mix": True, "safety_data": safety}).mixed([{"unknown": 1}] * 30)
    for off in ({}, {"mix": False}, {"mix": None}):
        assert read_settings(off).mixed(rows) is rows
    assert read_settings({"mix": True}).mix == Mix()


def test_the_schema_for_editors_has_every_key() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(Settings.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["method"]["anyOf"][0]["enum"] == method_names()
