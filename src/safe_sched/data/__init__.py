"""Rows in and out: files of any size and kind, schemas, token rows, and the small safety set of the package.

`safe_sched/data/README.md` tells where the safety set comes from.
"""

from safe_sched.data.kinds import KINDS, Kind
from safe_sched.data.reading import NAMED, BadRow, OnBad, RowFile, open_rows
from safe_sched.data.writing import RowWriter

__all__ = ["KINDS", "NAMED", "BadRow", "Kind", "OnBad", "RowFile", "RowWriter", "open_rows"]
