"""The summary as JSON: it fits its schema, and the schema stays as it was published."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from safe_sched.audit.findings import VERSION, Bad, Share
from safe_sched.errors import DataError
from safe_sched.report.summary import SummaryModel, summary_json, summary_schema
from tests.core.reports import NASTY, findings_of


def test_the_shipped_schema_is_that_of_the_model():
    """A change of the model needs a new version and a new file, not a change of this one."""
    shipped = summary_schema()
    assert shipped.pop("$schema") == "https://json-schema.org/draft/2020-12/schema"
    assert shipped == SummaryModel.model_json_schema()
    assert shipped["properties"]["version"]["const"] == VERSION
    assert set(shipped["required"]) == set(shipped["properties"])
    assert shipped["additionalProperties"] is False


def test_the_summary_goes_out_and_in_without_loss():
    found = findings_of([0.9, None, 0.1], signals={"a": [1, 2, 3]}, bad=[Bad(NASTY[0], one) for one in NASTY])
    written = json.dumps(summary_json(found), allow_nan=False)
    assert json.loads(written) == json.loads(json.dumps(found.summary.as_json()))
    assert summary_json(found)["flagged"] == 1


def test_what_is_not_known_is_null():
    """JSON has no NaN. Control: the same summary as it is cannot be written."""
    found = findings_of([None, None])
    with pytest.raises(ValueError, match="JSON compliant"):
        json.dumps(found.summary.as_json(), allow_nan=False)
    assert summary_json(found)["expected_share"] == {"value": None, "low": None, "high": None}


@pytest.mark.parametrize(
    "change",
    [
        {"coverage": 1.5},
        {"rows": -1},
        {"version": 2},
        {"flagged": 0.5},
        {"expected_share": Share(0.1, -0.1, 0.2)},
        {"threshold": math.inf},
        {"sources": (1,)},
    ],
)
def test_a_summary_that_does_not_fit_is_an_error_that_names_the_field(change):
    found = findings_of([0.9])
    summary = dataclasses.replace(found.summary, **change)
    with pytest.raises(DataError, match=rf"version 1 of its schema: {next(iter(change))}"):
        summary_json(dataclasses.replace(found, summary=summary))
