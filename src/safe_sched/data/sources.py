"""One thing to audit: a file, a folder, a data set of the hub, with the schema and the layout of its rows."""

from __future__ import annotations

import functools
import glob
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safe_sched.data import BadRow, Kind, RowFile, open_rows
from safe_sched.data.kinds import PACKED, form_of, is_data, opened
from safe_sched.data.reading import HUB
from safe_sched.data.schemas.renamed import RowFormat
from safe_sched.errors import DataError

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class DataSource:
    """Rows, with where they stand.

    Attributes:
        name: As the report calls it.
        target: What `safe_sched.data.open_rows` takes.
        schema: The schema of its rows, or None to detect it.
        layout: What brings its rows into that schema, or None where they are in it.
        kind: The kind of the file where its name does not tell.
        alias: What the file is called in the places of its rows, or None for its own name.
    """

    name: str
    target: str
    schema: str | None = None
    layout: RowFormat | None = None
    kind: Kind | None = None
    alias: str | None = None

    @functools.cached_property
    def file(self) -> RowFile:
        """The file, opened.

        Raises:
            DataError: There is no such file, or it is of no known kind.
            PluginError: Nothing that is installed can open a hub data set.
        """
        try:
            return open_rows(self.target, on_bad="collect", kind=self.kind)
        except OSError as error:
            raise DataError(f"{self.name[:300]} cannot be opened: {error.strerror or error}") from error
        except DataError as error:
            raise error if self.name == self.target else DataError(f"{self.name}: {error}") from error

    def rows(self) -> Iterator[tuple[str, Mapping[str, Any]] | BadRow]:
        """Every row as it stands in the file, with its place, and what is no row, anew at every call.

        Raises:
            DataError: A file is damaged.
        """
        file = self.file
        for found in file.found():
            if isinstance(found, BadRow):
                yield found if self.alias is None else BadRow(self.alias, found.line, found.reason)
            else:
                yield file.where if self.alias is None else f"{self.alias}, {file.where.rpartition(', ')[2]}", found

    def laid_out(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row in the columns of its schema.

        Raises:
            DataError: Something that the layout needs is not there, or of another type.
        """
        return row if self.layout is None else self.layout.row(row)


def data_sources(
    name: str,
    target: str,
    layout: RowFormat | None,
    *,
    folders: tuple[Path, ...],
    config: str | None = None,
    split: str | None = None,
    kind: Kind | None = None,
) -> list[DataSource]:
    """What a trainer's own file calls a data set, as sources.

    Args:
        name: As the report calls it.
        target: A file, a folder, or a data set of the hub, ``owner/name``.
        layout: Of its rows.
        folders: Where relative names begin; the first where there is such a file counts.
        config: The configuration of a hub data set.
        split: The split of a hub data set, or of a folder whose files or folders are named after splits.
        kind: The kind of the files where their names do not tell.

    Raises:
        DataError: There is no such file, or it cannot be read.
    """
    schema = None if layout is None else layout.schema

    def source(of: Path | str, kind: Kind | None = None) -> DataSource:
        found = DataSource(f"{name} ({of})", str(of), schema, layout, kind)
        _ = found.file  # so that a file that is not there is an error now
        return found

    shown = target if len(target) <= 200 else f"{target[:200]}..."
    if "://" in target and not target.startswith(HUB):
        raise DataError(f"{name}: {shown} cannot be read; get the files, and give their folder")
    path = next((folder / target for folder in folders if there(folder / target)), None)
    if path is None:
        if target.startswith(HUB):
            return [source(target)]
        if not _HUB_ID.fullmatch(target) or is_data(Path(target)):
            raise DataError(f"{name}: no file or folder {shown}; looked for in {_or(folders)}")
        return [source(f"{HUB}{target}" + (f"/{config}" if config else "") + (f":{split}" if split else ""))]
    if path.is_dir():
        return [source(file, kind and _kind(file, kind)) for file in _of_split(path, split, name)]
    if split not in (None, "train"):
        raise DataError(f"{name}: {path} is one file, which has no split {split!r}; leave the split out, or cut it")
    return [source(path, _kind(path, kind))]


def there(path: Path) -> bool:
    """Whether there is such a file or folder; a name that no file can have is none."""
    return os.path.exists(path)  # Path.exists raises for names that are too long


def matching(name: str, pattern: str, folders: tuple[Path, ...]) -> list[str]:
    """The files that a name or a pattern such as ``data/*.jsonl`` stands for, sorted.

    Raises:
        DataError: There is none.
    """
    for folder in folders:
        try:
            found = sorted(glob.glob(pattern, root_dir=folder, recursive=True))
        except (OSError, ValueError, re.error):  # a name that no file can have
            continue
        if found := [one for one in found if os.path.isfile(folder / one)]:
            return [str(folder / one) for one in found]
    raise DataError(f"{name}: no file {pattern[:200]}; looked for in {_or(folders)}")


def _kind(path: Path, kind: Kind | None) -> Kind | None:
    """The kind of a file. What is called JSON may be one list, or one object a line: its first character tells."""
    if kind is None and is_data(path):
        kind = form_of(path).kind
    if kind != "json":
        return kind
    with opened(str(path), PACKED.get(path.suffix.lower())) as stream:
        first = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return "jsonl" if first == b"{" else "json"


def _of_split(folder: Path, split: str | None, name: str) -> list[Path]:
    files = open_rows(folder).paths
    if split is None:
        return files
    named = [file for file in files if split in re.split(r"[\W_]+", str(file.relative_to(folder)))]
    if not named and split != "train":
        raise DataError(f"{name}: no file in {folder} is named after the split {split!r}; leave it out, or name files")
    return named or files


def _or(folders: tuple[Path, ...]) -> str:
    return " and ".join(dict.fromkeys(str(folder) for folder in folders))
