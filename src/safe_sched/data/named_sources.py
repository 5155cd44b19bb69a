"""What a user names, as sources of rows: files, folders, the hub, or the data sets of a trainer's own file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safe_sched.data.kinds import STDIO
from safe_sched.data.reading import HUB
from safe_sched.data.sources import DataSource, there
from safe_sched.errors import DataError

YAML = (".yaml", ".yml")
"""Endings of a trainer's file."""


def sources_of(paths: Sequence[str | Path], *, test: bool = False) -> list[DataSource]:
    r"""What a user named, opened: what is not there is an error before any row is read.

    ============================  ==========================================================================
    ``train.jsonl``, a folder     see `safe_sched.data.open_rows`, which also knows ``hf://owner/name``
    ``-``                         JSON lines from standard input, which can be read once
    ``train.yml``                 ``datasets`` and ``pretraining_dataset`` of an Axolotl YAML; or ``dataset``
                                  of a LlamaFactory YAML, looked up in its ``dataset_dir``
    ``dataset_info.json``         all data sets of LlamaFactory's list, where all are files
    ``dataset_info.json:a,b``     two of them, from the hub if that is where they are
    ============================  ==========================================================================

    A trainer's file is read as the trainer reads it: which columns and turns are trained on, under which names.
    Relative names in a YAML begin in the working folder, as they do for the trainer, or else beside the YAML. What
    cannot be followed (preference data, scripts, parts of a split) is an error, and never left out.

    Args:
        paths: What was named; at least one.
        test: Whether the rows that are held out for evaluation are wanted too (``test_datasets``, ``eval_dataset``).

    Raises:
        DataError: There is no such file, it is of no known kind, or describes data in a way that is not known.
        OptionError: PyYAML is not installed, or a data set of that name is not described.
        PluginError: Nothing that is installed can open a hub data set.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "qa.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
        >>> _ = (folder / "train.yml").write_text("datasets: [{path: qa.jsonl, type: alpaca_chat.load_qa}]")
        >>> source, = sources_of([folder / "train.yml"])
        >>> [(source.schema, source.laid_out(row)) for _, row in source.rows()]
        [('alpaca', {'instruction': '1+1?', 'output': '2'})]
    """
    if not paths:
        raise DataError("nothing to audit; give a file, a folder, hf://owner/name, or - for JSON lines")
    if [str(path) for path in paths].count(STDIO) > 1:
        raise DataError("standard input ('-') is named twice, and can only be read once")
    return [source for path in paths for source in _of(str(path), test)]


def _of(path: str, test: bool) -> list[DataSource]:
    from safe_sched.data.trainer_files.llamafactory import NAME, info_sources

    file, chosen, names = path.partition(f"{NAME}:")
    if chosen and not path.startswith(HUB) and not there(Path(path)):
        return info_sources(Path(f"{file}{NAME}"), [name.strip() for name in names.split(",")])
    if not path.startswith(HUB) and Path(path).name == NAME:
        return info_sources(Path(path))
    if not path.startswith(HUB) and Path(path).suffix.lower() in YAML:
        return _of_yaml(Path(path), test)
    source = DataSource(path, path)
    _ = source.file
    return [source]


def _of_yaml(path: Path, test: bool) -> list[DataSource]:
    from safe_sched.data.trainer_files import read_yaml
    from safe_sched.data.trainer_files.axolotl import axolotl_sources
    from safe_sched.data.trainer_files.llamafactory import NAME, info_sources

    config = read_yaml(path)
    if "dataset" not in config:
        return axolotl_sources(path, config, test=test)
    names: list[str] = []
    for key in ("dataset", *(("eval_dataset",) if test else ())):
        told = config.get(key) or []
        told = told.split(",") if isinstance(told, str) else told
        if not isinstance(told, list) or not all(isinstance(name, str) for name in told):
            raise DataError(f"{path}: {key} is no list of names, as LlamaFactory has it; Axolotl has datasets")
        names += [name.strip() for name in told]
    if not names:
        raise DataError(f"{path}: dataset names nothing; needed: names that stand in {NAME}")
    place = config.get("dataset_dir", "data")
    if not isinstance(place, str):
        raise DataError(f"{path}: dataset_dir is a {type(place).__name__}; needed: the folder of {NAME}")
    folder = next((one for one in (Path(place), path.parent / place) if there(one / NAME)), None)
    if folder is None:
        raise DataError(f"{path}: no {NAME} in dataset_dir={place[:200]!r}, here or beside the YAML")
    return info_sources(folder / NAME, names)
