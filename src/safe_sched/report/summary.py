"""The summary of an audit as JSON, with a schema that has a version.

``audit-summary-1.schema.json`` beside this module is the schema (JSON Schema 2020-12). It stays as it is: another
layout gets another version and another file.
"""

from __future__ import annotations

import json
import math
from importlib.resources import files
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safe_sched.audit.findings import Findings
from safe_sched.errors import DataError

SCHEMA_FILE = "audit-summary-1.schema.json"

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ShareModel(_Strict):
    """An expected share with its 95 % interval; null where no row was scored."""

    value: Probability | None
    low: Probability | None
    high: Probability | None


class BadModel(_Strict):
    """What could not be read."""

    where: str
    reason: str


class SignalModel(_Strict):
    """A detector."""

    name: str
    about: str
    kind: Literal["harm", "quality"]
    said: Count


class SummaryModel(_Strict):
    """The audit in numbers."""

    version: Literal[1]
    rows: Count = Field(description="Rows of the input.")
    scored: Count = Field(description="Rows that have a p_harmful.")
    bad_rows: Count = Field(description="Lines that are no rows, and rows of no known schema.")
    bad: list[BadModel] = Field(description="The first of them.")
    flagged: Count = Field(description="Rows whose p_harmful is at least the threshold.")
    expected_share: ShareModel = Field(description="Harmful rows over scored rows, as expected.")
    coverage: Probability | None = Field(description="Scored rows over all rows and bad lines.")
    threshold: Annotated[float, Field(ge=0.0)] | None
    signals: list[SignalModel]
    sources: list[str]
    seconds: dict[str, Annotated[float, Field(ge=0.0)]]
    versions: dict[str, str]
    limited: Count | None = Field(description="The audit was limited to so many rows.")
    model: str | None
    calibration: str = Field(description="How p_harmful came about, in words.")


def summary_schema() -> dict[str, Any]:
    """The JSON schema of `summary_json`, read from the file that is shipped.

    Example:
        >>> summary_schema()["properties"]["version"]
        {'const': 1, 'title': 'Version', 'type': 'integer'}
    """
    return json.loads(files("safe_sched.report").joinpath(SCHEMA_FILE).read_text("utf-8"))


def summary_json(findings: Findings) -> dict[str, Any]:
    """The summary of findings as plain JSON values that fit `summary_schema`.

    Args:
        findings: Of an audit.

    Raises:
        DataError: The summary does not fit the schema of its version.
    """
    try:
        return SummaryModel.model_validate(_without_nan(findings.summary.as_json())).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"the summary does not fit version 1 of its schema: {place}: {first['msg']}. Give findings as "
            "safe_sched.audit.audit returned them."
        ) from error


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what is not known is null."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return value
