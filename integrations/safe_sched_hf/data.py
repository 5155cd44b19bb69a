"""Data of the Hugging Face libraries: data sets to mix into, data sets of the hub, and tokenizers by name."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch.utils.data

from safe_sched.errors import DataError, ModelError
from safe_sched.mixing.plan import PROVENANCE, Maker, MixPlan, Row
from safe_sched.mixing.sets import RowSet, spread

_BATCH = 1000  # user rows that a stream hands over at once
_HUB_NAME = re.compile(r"hf://(?P<path>\w[\w.-]*/\w[\w.-]*)(?:/(?P<config>\w[\w.-]*))?(?::(?P<split>\w[\w.-]*))?")

# data sets to mix into ----------------------------------------------------------------------------------------------


def row_set(data: object) -> RowSet | None:
    """A set of datasets as something to mix with, None for anything else.

    Raises:
        DataError: It has several splits.
    """
    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise DataError(f"a {type(data).__name__} has splits ({', '.join(map(str, data))}); mix one of them")
    if isinstance(data, datasets.Dataset):
        return _Table(data)
    if isinstance(data, datasets.IterableDataset):
        return _Stream(data)
    return None


class _Table:
    """The user's table stays where it is, on disk or in memory; the safety rows are a small one beside it."""

    def __init__(self, data: datasets.Dataset) -> None:
        self.data = data

    def sample(self, count: int) -> list[dict[str, Any]]:
        plain = self.data.with_format(None)
        return plain.select(spread(len(plain), count)).to_list()

    def mixed(self, plan: MixPlan) -> datasets.Dataset:
        users = len(self.data)
        count = plan.require_any(users)
        user = self.data
        if plan.provenance:
            user = user.add_column(PROVENANCE, ["user"] * users)  # pyright: ignore[reportCallIssue]
        if count == 0:
            return user
        safety = _table([plan.safety(k) for k in range(count)], user.features)
        both = datasets.concatenate_datasets([user.with_format(None), safety])
        mixed = both.select(plan.schedule.order(users))
        form = user.format
        if form["type"] is not None or set(form["columns"]) != set(user.column_names):
            mixed.set_format(form["type"], form["columns"], form["output_all_columns"], **form["format_kwargs"])
        return mixed


def _table(rows: list[dict[str, Any]], features: datasets.Features) -> datasets.Dataset:
    _require_known({name: None for row in rows for name in row}, features)
    with _unfitting():
        return datasets.Dataset.from_list(rows, features=features)


def _require_known(row: Mapping[str, Any], columns: Iterable[str]) -> None:
    if unknown := sorted(set(row) - set(columns)):
        raise DataError(f"safety rows have the columns {unknown}, the user's have {sorted(columns)}; name the schema")


@contextlib.contextmanager
def _unfitting() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(
            f"a safety row does not fit the features of the user's rows: {' '.join(str(error).split())}. Cast them to "
            "features that hold text, or mix before they are made."
        ) from error


class _Stream:
    """Mixed batch by batch as it is read, so that its shards, its shuffling and its position stay its own."""

    def __init__(self, data: datasets.IterableDataset) -> None:
        self.data = data

    def sample(self, count: int) -> list[dict[str, Any]]:
        return list(itertools.islice(self.data.with_format(None), count))

    def mixed(self, plan: MixPlan) -> datasets.IterableDataset:
        if plan.schedule.share == 0 and not plan.provenance:
            return self.data
        features = None if self.data.features is None else self.data.features.copy()
        if features is not None:
            plan = dataclasses.replace(plan, make=_Typed(plan.make, features.arrow_schema))
            if plan.provenance:
                features = datasets.Features({**features, PROVENANCE: datasets.Value("string")})
        plain = self.data.with_format(None)
        mixed = plain.map(_Batches(plan), with_indices=True, batched=True, batch_size=_BATCH, features=features)
        kind = getattr(getattr(self.data, "_formatting", None), "format_type", None)
        return mixed if kind is None else mixed.with_format(kind)


class _Typed:
    """Gives safety rows the types of the user's columns, whose turns may have fields that a new one has not."""

    def __init__(self, make: Maker, schema: pa.Schema) -> None:
        self.make, self.schema = make, schema

    def __call__(self, row: Row, counter: int) -> dict[str, Any]:
        made = self.make(row, counter)
        _require_known(made, self.schema.names)
        with _unfitting():
            return {
                field.name: pa.array([made.get(field.name)], type=field.type).to_pylist()[0] for field in self.schema
            }


class _Batches:
    """Columns of some user rows in, columns of these rows and the safety rows between them out."""

    def __init__(self, plan: MixPlan) -> None:
        self.plan = plan

    def __call__(self, columns: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        worker = torch.utils.data.get_worker_info()
        plan = self.plan if worker is None or worker.id == 0 else self.plan.at(lane=worker.id)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        mixed = list(plan.interleave(rows, first=numbers[0], end=False))
        names = dict.fromkeys(name for row in mixed for name in row)
        return {name: [row.get(name) for row in mixed] for name in names}


# the hub ------------------------------------------------------------------------------------------------------------


class HubRows:
    """The rows of one split, fetched as they are gone through.

    Args:
        source: ``hf://owner/name``, with ``/config`` and ``:split`` where there are several.

    Raises:
        DataError: That is no such name, or there is no such data set, config or split, or no network.
    """

    def __init__(self, source: str) -> None:
        found = _HUB_NAME.fullmatch(source)
        if found is None:
            raise DataError(
                f"{source!r} is no data set of the hub; allowed: hf://owner/name, hf://owner/name:split, "
                "hf://owner/name/config:split"
            )
        if Path(found["path"]).exists():  # load_dataset would take that
            raise DataError(f"there is a folder {found['path']} here; give its path, or start from another folder")
        self._source = source
        try:
            self._rows = datasets.load_dataset(
                found["path"], found["config"], split=found["split"] or "train", streaming=True
            )
        except Exception as error:  # what the hub, the network and a damaged file raise has no common class
            raise self._failed(error) from error

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """The rows, from the first one on."""
        rows = iter(self._rows)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise self._failed(error) from error
            yield row

    def _failed(self, error: Exception) -> DataError:
        reason = " ".join(str(error).split())[:300]
        return DataError(
            f"{self._source} cannot be read: {type(error).__name__}: {reason}. Look at the name, the config, the split "
            "and the network (HF_HUB_OFFLINE forbids it); or download the files and give their folder"
        )


def tokenizer(name: str) -> Any:
    """The tokenizer of a folder, or of the hub where there is no such folder.

    Raises:
        ModelError: There is none, or its files are damaged.
    """
    from transformers import AutoTokenizer  # data sets can be read without it

    local = Path(name).expanduser().is_dir()
    source = str(Path(name).expanduser()) if local else name
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{name} cannot be loaded as a tokenizer: {reason}. Give the folder, or the hub name, of the model whose "
            "tokenizer made the tokens"
        ) from error
