"""What the plugin says of a configuration, before Axolotl does anything with it. These need no Axolotl."""

from __future__ import annotations

from typing import Any

import pytest

from safe_sched.errors import ModelError, OptionError, PluginError
from safe_sched_axolotl.args import SafeSchedArgs
from safe_sched_axolotl.block import PLUGIN
from safe_sched_axolotl.plugin import PARALLEL, UNSUPPORTED, Hooks

BLOCK = {"method": "bds", "safety_data": "core"}
WEIGHED = {"name": "fixed", "column": "weight"}


class Answers(dict):
    """Like Axolotl's own dict: a key that is not there is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def config(**changes: Any) -> Answers:
    return Answers({"plugins": [PLUGIN], "safe_sched": dict(BLOCK)} | changes)


def test_a_block_with_its_plugin_is_taken() -> None:
    Hooks().register(config())


def test_a_plugin_without_its_block_is_an_error() -> None:
    with pytest.raises(OptionError, match="no 'safe_sched' block; say what it is to do"):
        Hooks().register(config(safe_sched=None))


def test_a_block_under_a_name_that_is_nearly_right_is_named() -> None:
    with pytest.raises(OptionError, match="there is 'safe-sched': rename it"):
        Hooks().register(Answers({"plugins": [PLUGIN], "safe-sched": BLOCK}))


def test_a_block_without_its_plugin_is_an_error_where_the_plugin_is_loaded() -> None:
    """Axolotl asks every plugin of the process, also those of an earlier configuration."""
    with pytest.raises(OptionError, match="does not name safe_sched_axolotl.SafeSchedPlugin; add it"):
        Hooks().register(config(plugins=["other.Plugin"]))


def test_a_configuration_that_names_nothing_of_ours_is_left_alone() -> None:
    hooks, other = Hooks(), Answers({"plugins": ["other.Plugin"], "rl": "dpo"})
    hooks.register(other)
    assert hooks.load_datasets(other) is None
    assert hooks.add_callbacks_post_trainer(other, None) == []
    hooks.post_trainer_create(other, None)
    hooks.post_train(other, None)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"methd": "bds"}, r"safe_sched.methd: unknown key 'methd' \(did you mean 'method'\?\)"),
        ({"method": "bsd"}, r"safe_sched.method: unknown method 'bsd' \(did you mean 'bds'\?\)"),
        ({"method": {"name": "bds", "draws": 0}, "safety_data": "core"}, "safe_sched.method.draws"),
        ({"mix": {"share": 2}}, "safe_sched.mix.share: 2"),
        ({"mix": {"shares": 0.1}}, r"safe_sched.mix.shares: unknown key 'shares' \(did you mean 'share'\?\)"),
        ({"safety_weight": "much"}, "safe_sched.safety_weight: 'much'"),
        ({"method": "bds"}, "give safety_data"),
        ([], r"safe_sched: \[\]; allowed: keys with values"),
    ],
)
def test_a_block_that_is_not_allowed_is_an_error_that_names_the_key(block: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Hooks().register(config(safe_sched=block))


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_another_training_than_fine_tuning_is_refused(key: str) -> None:
    with pytest.raises(ModelError, match=f"^{key}: .*remove {key}"):
        Hooks().register(config(**{key: "x"}))


@pytest.mark.parametrize("key", PARALLEL)
def test_rows_that_processes_share_are_refused(key: str) -> None:
    Hooks().register(config(**{key: 1}))
    with pytest.raises(ModelError, match=f"^{key}: 2: .*allowed: 1"):
        Hooks().register(config(**{key: 2}))


@pytest.mark.parametrize("more", [{}, {"fsdp_version": 1}, {"fsdp_config": {"fsdp_version": 1}}])
def test_fsdp_of_the_first_version_is_refused(more: dict[str, Any]) -> None:
    sharded: dict[str, Any] = {"fsdp_config": {"offload_params": False}}
    for second in ({"fsdp_version": 2}, {"fsdp_config": {"fsdp_version": 2}}):
        Hooks().register(config(**(sharded | second)))
    with pytest.raises(ModelError, match="^fsdp_version: .*set fsdp_version: 2"):
        Hooks().register(config(**(sharded | more)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"streaming": True}, "streaming is read while training"),
        ({"safe_sched": BLOCK | {"mix": True, "safety_data": [{"path": "a.jsonl", "type": "alpaca"}]}}, "makes tokens"),
        ({"safe_sched": {"method": "fixed", "mix": True}}, "safe_sched.mix.safety_data: None"),
    ],
)
def test_what_cannot_be_mixed_is_refused(changes: dict[str, Any], words: str) -> None:
    block = {"safe_sched": BLOCK | {"mix": {"share": 0.1}}}
    with pytest.raises(OptionError, match=words):
        Hooks().register(config(**(block | changes)))


@pytest.mark.parametrize("changes", [{"datasets": [{"path": "a.jsonl", "type": "alpaca"}]}, {"streaming": True}])
def test_a_prior_that_axolotl_would_drop_is_refused(changes: dict[str, Any]) -> None:
    """A data set of tokens keeps its columns."""
    block = {"safe_sched": BLOCK | {"prior": "p_harmful"}}
    Hooks().register(config(**block, datasets=[{"path": "tokens.parquet"}]))
    with pytest.raises(OptionError, match="safe_sched.prior: 'p_harmful': Axolotl drops every column"):
        Hooks().register(config(**(block | changes)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"safe_sched": {"method": {"name": "fixed", "values": [1.0]}}}, "method.values: Axolotl shuffles the rows"),
        ({"streaming": True}, "method.column: 'weight': with streaming Axolotl drops the column"),
        ({"safe_sched": BLOCK | {"method": WEIGHED, "mix": True}}, "method.column: 'weight'; safety rows that"),
    ],
)
def test_weights_that_cannot_be_tied_to_rows_are_refused(changes: dict[str, Any], words: str) -> None:
    block = {"safe_sched": {"method": WEIGHED}}
    Hooks().register(config(**block))
    with pytest.raises(OptionError, match=words):
        Hooks().register(config(**(block | changes)))


def test_a_trainer_without_the_callback_is_an_error() -> None:
    class Handler:
        callbacks: tuple[Any, ...] = ()

    class Bare:
        callback_handler = Handler()

    with pytest.raises(ModelError, match="Bare was made without the plugins' callbacks"):
        Hooks().post_trainer_create(config(), Bare())


def test_the_key_claims_one_name() -> None:
    assert list(SafeSchedArgs.model_fields) == ["safe_sched"]


def test_what_keeps_the_plugin_from_loading_is_no_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Axolotl prints an ImportError, and trains on."""
    import safe_sched_axolotl
    from safe_sched_axolotl import plugin

    def fail() -> None:
        raise ImportError("no such thing")

    monkeypatch.setattr(plugin, "plugin_class", fail)
    with pytest.raises(PluginError, match=r"ImportError: no such thing.*pip install") as caught:
        _ = safe_sched_axolotl.SafeSchedPlugin
    assert not isinstance(caught.value, ImportError)


def test_importing_the_package_imports_no_trainer() -> None:
    import subprocess
    import sys

    code = "import safe_sched_axolotl, sys; print({'torch', 'axolotl', 'transformers'} & set(sys.modules) or 'light')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "light"


def test_the_command_is_left_to_others_where_axolotl_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from safe_sched_axolotl.hooks import safe_sched_command

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert safe_sched_command("axolotl", ["check", "train.yaml"]) is None
    assert safe_sched_command("trl", ["sft"]) is None
