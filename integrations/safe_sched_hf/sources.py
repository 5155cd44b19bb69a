"""Data sets of the Hugging Face hub, streamed: the network is used because the name asks for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from safe_sched.errors import DataError

_NAME = re.compile(r"hf://(?P<path>\w[\w.-]*/\w[\w.-]*)(?:/(?P<config>\w[\w.-]*))?(?::(?P<split>\w[\w.-]*))?")


class HubRows:
    """The rows of one split, fetched as they are gone through.

    Args:
        source: ``hf://owner/name``, with ``/config`` and ``:split`` where there are several.

    Raises:
        DataError: That is no such name, or there is no such data set, config or split, or no network.
    """

    def __init__(self, source: str) -> None:
        found = _NAME.fullmatch(source)
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


def open_hub(source: str) -> Iterable[Mapping[str, Any]]:
    """The rows of a data set of the hub; see `HubRows`."""
    return HubRows(source)
