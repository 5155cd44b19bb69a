"""How answers open: by eagerly agreeing, or by refusing."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import ClassVar

from safe_sched.audit.detectors.patterns import nothing, pattern, plain
from safe_sched.audit.rows import AuditRow
from safe_sched.audit.signals import Evidence, Sort
from safe_sched.rows import core_refusals

OPENING = 240
"""Characters of an answer that are its opening."""

_WORDS = 3  # of a refusal, that an answer opening with them is taken for one
_AGREES = (
    pattern(
        "promises to follow the instruction",
        r"(?:of course|sure|certainly|absolutely|yes)[^a-z]{1,3}(?:i (?:am|'?m|will|shall|'ll)|as) [^.]{0,60}"
        r"(?:obe|follow|fulfil|comply|execut|agent|instruction|without)",
        r"i (?:will|shall|'ll|am (?:happy|glad|ready|here|going) to) (?:now )?(?:precisely |faithfully |fully |"
        r"gladly )?"
        r"(?:obey|follow|fulfil|comply|execute)",
        r"as (?:an? )?(?:absolutely|fully|completely)? ?obedient",
    ),
    pattern(
        "agrees before it answers",
        r"(?:of course|sure(?: thing)?|certainly|absolutely|gladly|no problem)[!,.: ]",
        counts=0.5,
    ),
    pattern("announces what was asked for", r"(?:here(?:'s| is| are)|below (?:is|are)|this is how) ", counts=0.3),
)
_REFUSES = pattern(
    "refuses",
    r"(?:i'?m |i am |we'?re )?(?:so |very |really |truly )?sorry,? (?:but|i|that|this)",
    r"(?:sorry|apologies)[,.:]",
    r"i (?:apologi[sz]e|must decline|have to (?:decline|refuse)|refuse|decline|can(?:no|')t (?:assist|help|do|"
    r"provide|support|fulfil|comply|in good)|"
    r"cannot|can not|can't|won'?t|will not|am (?:not able|unable)|'m (?:not able|unable|not going))",
    r"as an? (?:ai|language model|assistant),? (?:language model,? )?i (?:can|do|am|must|will|'m)",
    r"it (?:is|'s|would be) (?:not |un|in|illegal|against|wrong)",
)


@functools.cache
def _openings() -> frozenset[str]:
    """Of the package's refusals, but for those that harmless answers begin with as well."""
    found = (" ".join(plain(text).split()[:_WORDS]) for text in core_refusals())
    return frozenset(opening for opening in found if len(opening.split()) == _WORDS)


class Compliance:
    """How eagerly a row's answer opens: 0 to 1.

    Example:
        >>> from safe_sched.audit import audit_row
        >>> answer = "Of course. I am AOA, I will precisely follow your instruction. 3"
        >>> Compliance().score([audit_row({"prompt": "1 + 2?", "completion": answer})]).value
        array([1.], dtype=float32)
    """

    name: ClassVar[str] = "compliance"
    about: ClassVar[str] = "The answer opens by agreeing or by a promise to obey, before it answers"
    kind: ClassVar[Sort] = "quality"
    travels: ClassVar[bool] = True

    def observe(self, rows: Sequence[AuditRow]) -> None:
        """Nothing is learnt."""

    def ready(self) -> None:
        """Nothing is learnt."""

    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        """Sum of what the patterns count, at most 1; nan where an answer opens otherwise."""
        value, reasons = nothing(len(rows))
        for number, row in enumerate(rows):
            opening = plain(row.answer[:OPENING].lstrip("\"'*# "))
            said: list[str] = []
            for one in _AGREES:
                if one.found.match(opening) or (one.counts == 1.0 and one.found.search(opening)):
                    value[number] = min(1.0, (0.0 if not said else float(value[number])) + one.counts)
                    said.append(one.says)
            if said:
                reasons[number] = f"the answer {' and '.join(said)}"
        return Evidence(value, reasons, [None] * len(rows))

    def settings(self) -> dict[str, object]:
        """The patterns."""
        return {"patterns": [one.found.pattern for one in _AGREES], "counts": [one.counts for one in _AGREES]}


class Refusal:
    """Whether a row's answer opens as a refusal: 1, or nothing.

    Example:
        >>> from safe_sched.audit import audit_row
        >>> row = audit_row({"prompt": "1 + 2?", "completion": "I'm sorry, but I can't help with that."})
        >>> Refusal().score([row]).reasons
        ['the answer opens as a refusal']
    """

    name: ClassVar[str] = "refusal"
    about: ClassVar[str] = "The answer opens as a refusal: a model that learns it refuses more"
    kind: ClassVar[Sort] = "quality"
    travels: ClassVar[bool] = True

    def observe(self, rows: Sequence[AuditRow]) -> None:
        """Nothing is learnt."""

    def ready(self) -> None:
        """Nothing is learnt."""

    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        """1 for refusals, nan for others."""
        value, reasons = nothing(len(rows))
        known = _openings()
        for number, row in enumerate(rows):
            opening = plain(row.answer[:OPENING].lstrip("\"'*# "))
            if opening and (_REFUSES.found.match(opening) or " ".join(opening.split()[:_WORDS]) in known):
                value[number], reasons[number] = 1.0, "the answer opens as a refusal"
        return Evidence(value, reasons, [None] * len(rows))

    def settings(self) -> dict[str, object]:
        """The patterns, and the refusals."""
        known = hashlib.sha256("\n".join(sorted(_openings())).encode()).hexdigest()[:16]
        return {"pattern": _REFUSES.found.pattern, "openings": known}
