"""``mix:``: safety rows between the rows of the training set, before Axolotl makes tokens of them.

Each data set of ``datasets:`` is loaded, mixed in its own columns, and written to a Parquet file that takes its place
in the configuration. The file is named after its content, so a run that is started again, ``axolotl preprocess`` and
every process find the same one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from safe_sched.errors import DataError, OptionError
from safe_sched.training.record import rows_fingerprint
from safe_sched_axolotl.block import KEY, plain
from safe_sched_axolotl.data import WHERE, is_dataset_syntax, load
from safe_sched_hf.config import Settings

FOLDER = "safe_sched_mix"
"""Below ``dataset_prepared_path``."""


def mix_datasets(settings: Settings, cfg: Any) -> None:
    """Put mixed data sets in the place of those of a configuration.

    Args:
        settings: The block; without ``mix`` nothing is done.
        cfg: Axolotl's configuration, checked. Its ``datasets`` are changed.

    Raises:
        OptionError: The training set is a stream, or the safety rows are not given as rows.
        DataError: A data set has columns that safety rows cannot be written into.
    """
    if settings.mix is None:
        return
    from axolotl.utils.dict import DictDefault  # pyright: ignore[reportMissingImports]

    refuse_unmixable(settings, cfg)
    folder = Path(cfg.dataset_prepared_path or "last_run_prepared") / FOLDER
    mixed = []
    for number, entry in enumerate(cfg.datasets):
        if Path(entry["path"]).parent == folder:  # asked twice
            mixed.append(entry)
            continue
        where = f"datasets.{number}"
        raw = concatenate_datasets(list(load(entry, cfg, where)))
        if "input_ids" in raw.column_names:
            raise DataError(f"{where}: {entry['path']} has tokens; mix safety rows into the texts: safe-sched mix")
        try:
            rows = settings.mixed(raw)
        except DataError as error:
            raise DataError(f"{where}, {KEY}.mix: {error}") from error
        how = {name: value for name, value in plain(entry).items() if name not in WHERE}
        mixed.append(DictDefault({**how, "path": str(_written(rows, folder)), "ds_type": "parquet"}))
    cfg.datasets = mixed


def refuse_unmixable(settings: Settings, config: Any) -> None:
    """Stop where ``mix`` asks for what cannot be done.

    Raises:
        OptionError: Naming the key.
    """
    if settings.mix is None:
        return
    for key in ("streaming", "pretraining_dataset"):
        if config.get(key):
            raise OptionError(
                f"{KEY}.mix: {key} is read while training; mix into the file: safe-sched mix, or drop mix"
            )
    safety = settings.safety_data if settings.mix.safety_data is None else settings.mix.safety_data
    if safety is None or is_dataset_syntax(safety):
        raise OptionError(
            f"{KEY}.mix.safety_data: {safety!r}; allowed: core, a file with prompts and refusals, or rows. Axolotl's "
            "dataset syntax makes tokens, and they cannot take the format of a row"
        )


def refuse_prior(settings: Settings, config: Any) -> None:
    """Stop where ``prior`` names a column that Axolotl would drop.

    Raises:
        OptionError: Naming the key.
    """
    if settings.prior is None:
        return
    typed = any(isinstance(entry, Mapping) and entry.get("type") for entry in config.get("datasets") or [])
    if typed or config.get("streaming") or config.get("pretraining_dataset"):
        raise OptionError(
            f"{KEY}.prior: {settings.prior!r}: Axolotl drops every column but the tokens of a data set with a type, "
            "and of a stream. Give data sets of tokens (input_ids, labels and that column, no type), or leave prior out"
        )


def source_of(cfg: Any) -> dict[str, Any] | None:
    """The rows of a training set that is one data set, for the manifest; of several no file can be compared."""
    if cfg.streaming or cfg.pretraining_dataset or len(cfg.datasets or []) != 1:
        return None
    rows = concatenate_datasets(list(load(cfg.datasets[0], cfg, "datasets.0")))
    plain_rows: Any = rows.with_format(None)
    return {"columns": sorted(rows.column_names), "fingerprint": rows_fingerprint(plain_rows)}


def _written(rows: Dataset, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{os.getpid()}.part"
    rows.to_parquet(part)
    with open(part, "rb") as file:
        name = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    os.replace(part, folder / f"{name}.parquet")
    return folder / f"{name}.parquet"
