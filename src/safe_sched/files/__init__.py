"""Files of rows, of any size: read row by row, written whole or not at all."""

from safe_sched.files.kinds import KINDS, Kind
from safe_sched.files.readers import BadRow
from safe_sched.files.reading import NAMED, OnBad, RowFile, open_rows
from safe_sched.files.writing import RowWriter

__all__ = ["KINDS", "NAMED", "BadRow", "Kind", "OnBad", "RowFile", "RowWriter", "open_rows"]
