"""Safety rows that look like the task's own, and mixing them in."""

from safe_sched.data.schemas import SCHEMAS, Example, Schema, TextPart, detect, read, write
from safe_sched.mixing.explain import explain
from safe_sched.mixing.formats import TaskFormat, induce_format
from safe_sched.mixing.mix import mimic, mix
from safe_sched.mixing.plan import PROVENANCE
from safe_sched.mixing.rewriting.endpoint import Endpoint
from safe_sched.mixing.rewriting.rewrite import RewriteReport, local, rewrite, task_prompts
from safe_sched.mixing.sets import MixedRows, MixedStream

__all__ = [
    "PROVENANCE",
    "SCHEMAS",
    "Endpoint",
    "Example",
    "MixedRows",
    "MixedStream",
    "RewriteReport",
    "Schema",
    "TaskFormat",
    "TextPart",
    "detect",
    "explain",
    "induce_format",
    "local",
    "mimic",
    "mix",
    "read",
    "rewrite",
    "task_prompts",
    "write",
]
