"""What is put between user rows, and where: safety rows that have been given, in the schema of the user's rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safe_sched.data.rows import read_rows
from safe_sched.data.schemas import detect, read
from safe_sched.data.schemas.conversion import Converter
from safe_sched.errors import DataError
from safe_sched.mixing.formats import TaskFormat, induce_format
from safe_sched.mixing.schedule import Schedule, interleave

Row = Mapping[str, Any]
SafetyRows = str | Path | Iterable[Row]
Maker = Callable[[Row, int], dict[str, Any]]

PROVENANCE = "safe_sched_source"
"""The column that says where a row comes from: ``"user"`` or ``"safety"``."""

_TRIED = 20  # safety rows that are made before the work, so that what does not fit stops it there


@dataclass(frozen=True)
class MixPlan:
    """What is put between user rows, and where.

    Attributes:
        schedule: Which safety row stands where.
        rows: The safety rows, as they were given.
        make: Puts a safety row into the user's schema; the number chooses among the ways to do so.
        provenance: Whether every row gets the column `PROVENANCE`.
    """

    schedule: Schedule
    rows: Sequence[Row]
    make: Callable[[Row, int], dict[str, Any]]
    provenance: bool = False

    def safety(self, k: int) -> dict[str, Any]:
        """Safety row number k of the mix."""
        schedule = self.schedule
        row = self.made(schedule.pick(k), (schedule.epoch << 48) + (schedule.lane << 40) + k)
        return {**row, PROVENANCE: "safety"} if self.provenance else row

    def user(self, row: Any) -> Any:
        """A user row as it stands in the mix: itself, unless a column is asked for."""
        if not self.provenance:
            return row
        if PROVENANCE in row:
            raise _mixed_already()
        return {**row, PROVENANCE: "user"}

    def made(self, number: int, counter: int) -> dict[str, Any]:
        """One of the safety rows in the user's schema.

        Raises:
            DataError: It does not fit there.
        """
        try:
            return self.make(self.rows[number], counter)
        except DataError as error:
            raise DataError(f"safety row {number}: {error}") from error

    def at(self, epoch: int | None = None, lane: int | None = None) -> MixPlan:
        """The same for another epoch or another worker."""
        changes = {name: value for name, value in (("epoch", epoch), ("lane", lane)) if value is not None}
        return dataclasses.replace(self, schedule=dataclasses.replace(self.schedule, **changes))

    def interleave(self, user: Iterable[Any], first: int = 0, end: bool = True) -> Iterator[Any]:
        """A stream of user rows with safety rows between them; see `safe_sched.mixing.schedule.interleave`.

        Raises:
            DataError: A user row has the column `PROVENANCE` already, and it is asked for.
        """
        return interleave(map(self.user, user), self.schedule, self.safety, first, end)

    def require_any(self, users: int) -> int:
        """How many safety rows a number of user rows get.

        Raises:
            DataError: None, although some were asked for.
        """
        count, share = self.schedule.count(users), self.schedule.share
        if share > 0 and count == 0:
            least = 1 / (2 * users + 1)
            digits = 1 - math.floor(math.log10(least))
            least = math.ceil(least * 10**digits) / 10**digits
            raise DataError(
                f"share={share:g} of {users} user rows is less than half a safety row, so none would be mixed in. "
                f"Raise share to {least:g} or more, or mix more rows at once; share=0 asks for none."
            )
        return count


def plan_mix(
    sample: Sequence[Row],
    safety: SafetyRows,
    *,
    share: float = 0.1,
    mimic: bool | TaskFormat = True,
    seed: int = 0,
    epoch: int = 0,
    schema: str | None = None,
    tokenizer: Any = None,
    blend: float = 1.0,
    provenance: bool = False,
) -> MixPlan:
    """What `mix` would put between user rows, from a sample of these; see there.

    Raises:
        DataError: There are no user rows or no safety rows, or they do not fit.
    """
    rows = read_rows(safety)
    schedule = Schedule(share, len(rows), seed, epoch)
    if not sample:
        raise DataError("there are no user rows to mix safety rows into")
    if any(PROVENANCE in row for row in sample):
        raise _mixed_already()
    for number, row in enumerate(rows):
        try:
            example = read(row)
        except DataError as error:
            raise DataError(f"safety row {number}: {error}") from error
        if example.answer is None and mimic is not False:
            raise DataError(
                f"safety row {number} has schema {example.schema!r}, which does not tell its prompt from its refusal. "
                "Give prompt and completion, or messages; or mix it as it is, without mimicry."
            )
    try:
        make = _maker(sample, mimic, seed, schema, tokenizer, blend)
    except DataError as error:
        raise DataError(f"the user's rows ({len(sample)} were looked at, counted from 0): {error}") from error
    plan = MixPlan(schedule, rows, make, provenance)
    for number in range(min(_TRIED, len(rows))):
        plan.made(number, number)
    return plan


def _maker(
    sample: Sequence[Row], mimic: bool | TaskFormat, seed: int, schema: str | None, tokenizer: Any, blend: float
) -> Maker:
    if isinstance(mimic, TaskFormat):
        return mimic.render
    if not mimic:
        return Converter(sample, detect(sample) if schema is None else schema)
    return induce_format(sample, schema=schema, seed=seed, blend=blend, tokenizer=tokenizer).render


def _mixed_already() -> DataError:
    return DataError(
        f"a user row has the column {PROVENANCE!r} already, so safety rows have been mixed in before. Mix into the "
        "original rows, or drop the column."
    )
