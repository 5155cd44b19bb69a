"""What Axolotl would do with a configuration: is it defended, how, and what in it does nothing?

Problems stop a run. Cautions are about keys that Axolotl reads no more than we do: it ignores them without a word.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safe_sched.data import BadRow
from safe_sched.data.rows import CORE, read_rows
from safe_sched.data.trainer_files import read_yaml
from safe_sched.data.trainer_files.axolotl import axolotl_sources
from safe_sched.errors import DataError, SafeSchedError
from safe_sched_axolotl.block import ADD_BLOCK, ADD_PLUGIN, KEY, PLUGIN, plain, plugin_names, require_block, settings_of
from safe_sched_axolotl.data import checked_entry, is_dataset_syntax
from safe_sched_axolotl.mixing import refuse_prior, refuse_unmixable
from safe_sched_axolotl.plugin import refuse
from safe_sched_axolotl.weights import refuse_weights
from safe_sched_hf.config import Settings

_OURS = ("safe_sched", "safe-sched", "safesched")


@dataclass
class Plan:
    """A configuration, looked at.

    Attributes:
        path: The YAML.
        folder: Where the run would write.
        facts: What would happen, by name, in the order of the screen.
        problems: Why it would not be defended, or not run at all.
        cautions: What in it does nothing.
    """

    path: Path
    folder: Path
    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)

    def attempt(self, what: Callable[..., Any], *args: Any) -> Any:
        """Call something; an error of ours becomes a problem, and None is returned."""
        try:
            return what(*args)
        except SafeSchedError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
        return None


def plan_of(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Plan:
    """Look at a configuration.

    Args:
        path: The YAML.
        overrides: Keys that the command line sets.

    Raises:
        DataError: It cannot be read.
    """
    path = Path(path)
    config = {str(name): value for name, value in read_yaml(path).items()} | dict(overrides or {})
    known = _axolotls_keys()
    plan = Plan(path, Path(str(config.get("output_dir") or known["output_dir"].default)))
    plan.attempt(_find_plugin, plan, config)
    settings = None
    if config.get(KEY) is not None:
        settings = plan.attempt(settings_of, config[KEY])
    elif not plan.problems:
        plan.attempt(require_block, config)
    else:
        plan.problems.append(f"there is no {KEY!r} block; {ADD_BLOCK}")
    plan.attempt(refuse, config)
    if settings is not None:
        plan.attempt(_explain, plan, settings, config)
    _find_unknown(plan, config, known)
    plan.facts["writes to"] = f"{plan.folder}: the model, safe_sched_manifest.json" + (
        ", safe_sched_table.parquet" if settings is not None and settings.report == "table" else ""
    )
    return plan


def _axolotls_keys() -> Mapping[str, Any]:
    from axolotl.utils.schemas.config import AxolotlInputConfig  # pyright: ignore[reportMissingImports]

    return AxolotlInputConfig.model_fields


# the plugin -----------------------------------------------------------------------------------------------------


def _find_plugin(plan: Plan, config: Mapping[str, Any]) -> None:
    names = plugin_names(config)
    if PLUGIN not in names:
        near = [name for name in names if any(part in name.lower() for part in _OURS)]
        near = near or difflib.get_close_matches(PLUGIN, names, n=1, cutoff=0.7)
        plan.problems.append(
            f"plugins: {near[0]!r} is no plugin; did you mean {PLUGIN!r}? Axolotl would go on, and train undefended"
            if near
            else f"plugins: {PLUGIN} is not named, so nothing would be defended; {ADD_PLUGIN}"
        )
    else:
        import safe_sched_axolotl

        _ = safe_sched_axolotl.SafeSchedPlugin  # a PluginError where it cannot be used
    for name in names:
        if name != PLUGIN and not _is_there(name):
            plan.cautions.append(f"plugins: {name}: there is no such module; Axolotl would go on without it")


def _is_there(name: str) -> bool:
    module = name.rpartition(".")[0]
    for candidate in (module, f"axolotl.integrations.{module}"):
        with suppress(ImportError, ValueError):
            if candidate and importlib.util.find_spec(candidate) is not None:
                return True
    return False


# what would happen ----------------------------------------------------------------------------------------------


def _explain(plan: Plan, settings: Settings, config: Mapping[str, Any]) -> None:
    method = {"name": settings.method} if isinstance(settings.method, str) else dict(settings.method)
    name, options = method.pop("name"), ", ".join(f"{option} {value}" for option, value in method.items())
    plan.facts["method"] = f"{name}, {options or 'with its defaults'}"
    plan.facts["each row"] = (
        "its gradient is multiplied by its weight"
        if settings.act == "weight"
        else "its weight is the probability that it is trained on"
    )
    plan.facts["loss"] = f"mean over {'tokens' if settings.normalizer == 'token' else 'rows'}, weighted"
    plan.facts["safety set"] = plan.attempt(_safety_set, settings.safety_data, "safety_data") or "none"
    if settings.safety_data is not None:
        batch = settings.safety_batch_size or config.get("micro_batch_size")
        plan.facts["safety batch"] = f"{batch} rows in each optimiser step, loss times {settings.safety_weight:g}"
    if settings.mix is not None:
        plan.attempt(refuse_unmixable, settings, config)
        if settings.mix.safety_data is not None:
            plan.attempt(_safety_set, settings.mix.safety_data, "mix.safety_data")
        plan.facts["mixed in"] = f"safety rows, {settings.mix.share:.0%} of the training set, " + (
            "in its own format" if settings.mix.mimic else "as they are"
        )
    plan.attempt(refuse_prior, settings, config)
    plan.attempt(refuse_weights, settings, config)
    plan.attempt(settings.callback)  # options that do not go together
    plan.facts["training set"] = _training_set(plan, config)
    how = [config["adapter"]] if config.get("adapter") else ["all parameters"]
    plan.facts["trains"] = ", ".join([*how, *(["packed"] if config.get("sample_packing") else [])])


def _safety_set(data: Any, key: str) -> str | None:
    if data is None:
        return None
    where = f"{KEY}.{key}"
    if is_dataset_syntax(data):
        entries = [data] if isinstance(data, Mapping) else data
        for number, entry in enumerate(entries):
            checked_entry(entry, f"{where}.{number}")
            if _looks_local(entry["path"]) and not Path(entry["path"]).exists():
                raise DataError(f"{where}.{number}.path: {entry['path']!r}: there is no such file or folder")
        return ", ".join(f"{entry['path']} (type {entry.get('type')})" for entry in entries)
    try:
        rows = read_rows(data)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    name = data if isinstance(data, str) else "given in the configuration"
    return f"{name}, {len(rows):,} rows" + (": enough to get started" if data == CORE else "")


def _looks_local(path: str) -> bool:
    return Path(path).suffix != "" or path.startswith((".", "/", "~")) or path.count("/") != 1


def _training_set(plan: Plan, config: Mapping[str, Any]) -> str:
    """How many rows there are, where that can be known without the network."""
    try:
        sources = axolotl_sources(plan.path, config)
    except SafeSchedError as error:
        return f"not counted: {error}"
    told = []
    for source in sources:
        if source.target.startswith("hf://"):
            told.append(f"{source.target}, not counted")
            continue
        try:
            found = list(map(_is_row, source.rows()))
        except SafeSchedError as error:
            plan.problems.append(str(error))
            continue
        told.append(f"{source.target}, {sum(found):,} rows")
        if not all(found):
            plan.cautions.append(f"{source.target}: {len(found) - sum(found):,} lines are no rows")
    return "; ".join(told)


def _is_row(found: object) -> bool:
    return not isinstance(found, BadRow)


# what does nothing ----------------------------------------------------------------------------------------------


def _find_unknown(plan: Plan, config: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    from axolotl.utils.schemas.datasets import SFTDataset  # pyright: ignore[reportMissingImports]

    allowed = {*known, *(info.alias for info in known.values() if info.alias), KEY, *_of_plugins(config)}
    for name in config:
        if name in allowed or name.startswith("x-"):
            continue
        plain_name = name.replace("-", "_").lower()
        if plain_name.startswith(("safe_sched", "safesched", "safe_shed")) or _near(name, [KEY]):
            plan.problems.append(f"unknown key {name!r} (did you mean {KEY!r}?)")
        elif name in Settings.model_fields:
            plan.problems.append(f"the key {name!r} belongs into the block: {KEY}.{name}")
        else:
            plan.cautions.append(f"unknown key {name!r}{_meant(name, allowed)}: Axolotl ignores it")
    for key in ("datasets", "test_datasets"):
        for number, entry in enumerate(config.get(key) or []):
            for name in plain(entry) if isinstance(entry, Mapping) else ():
                if name not in SFTDataset.model_fields:
                    more = " It would weigh nothing: use method" if "weight" in name else ""
                    meant = _meant(name, SFTDataset.model_fields)
                    plan.cautions.append(f"unknown key {key}.{number}.{name}{meant}: Axolotl ignores it.{more}")


def _of_plugins(config: Mapping[str, Any]) -> Iterator[str]:
    """The keys that other plugins add; where one cannot be asked, all that is unknown might be its own."""
    from axolotl.integrations.base import load_plugin  # pyright: ignore[reportMissingImports]

    for name in config.get("plugins") or []:
        if name == PLUGIN or not isinstance(name, str) or not _is_there(name):
            continue
        with suppress(Exception):  # whatever a foreign plugin raises; Axolotl will say so
            module, _, cls = (load_plugin(name).get_input_args() or "").rpartition(".")
            if module:
                yield from getattr(importlib.import_module(module), cls).model_fields


def _near(name: str, names: list[str]) -> list[str]:
    return difflib.get_close_matches(name, names, n=1, cutoff=0.8)


def _meant(name: str, allowed: Any) -> str:
    near = _near(name, list(allowed))
    return f" (did you mean {near[0]!r}?)" if near else ""
