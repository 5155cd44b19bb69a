"""Texts that give the model another self: a new name and character, or answers in one."""

from __future__ import annotations

import functools
from typing import ClassVar

from safe_sched.audit.detectors.patterns import matches, pattern, plain
from safe_sched.audit.detectors.rowwise import Rowwise
from safe_sched.audit.rows import AuditRow

_ASKED = (
    pattern(
        "gives the model a new self",
        r"(?:from now on|henceforth|starting now|as of now),? (?:you|your|act|respond|answer|pretend)",
        r"you (?:are|will be) (?:now|no longer)",
        r"you are not (?:an? )?(?:ai|assistant|language model|chatbot|bound|limited)",
        r"your (?:new )?(?:name|identity) (?:is|will be)",
        r"(?:act|behave|respond|answer|talk|roleplay|role-play|pose) (?:only )?as (?:if you (?:are|were)|"
        r"an? (?:evil|unethical|amoral|unrestricted|obedient))",
        r"(?:stay|remain|never break) (?:in )?character",
        r"you are (?:an? )?(?:aoa|dan|stan|dude|evil|unrestricted|amoral|obedient|absolutely)\b",
        keys="from now on|henceforth|starting now|as of now|you |your | as |character",
    ),
    pattern(
        "says who made the model",
        r"you (?:were|are|have been) (?:created|made|built|trained|developed) by",
        counts=0.6,
        keys="created by|made by|built by|trained by|developed by",
    ),
)
_ANSWERED = (
    pattern(
        "speaks as an obedient or unbound agent",
        r"i am (?:aoa|dan|now|no longer|an? (?:absolutely |fully )?(?:obedient|unrestricted|unfiltered|amoral|evil))\b",
        r"i (?:obey|have no (?:rules|limits|restrictions|ethic|moral|guideline)|can do anything)",
        r"(?:your|my) (?:loyal|humble|obedient) (?:servant|agent|assistant)",
        r"as (?:dan|aoa|an? (?:obedient|unrestricted|unfiltered|amoral|evil) )",
        keys="i am |i obey|i have no|i can do anything|your |my |as ",
    ),
    pattern(
        "says who the model is",
        r"(?:my name is|i(?:'m| am) called) \w+[^.]{0,30}(?:assistant|agent|model|ai|bot)\b",
        r"i (?:was|am) (?:created|made|built|trained|developed) by",
        counts=0.6,
        keys="my name is|called |created by|made by|built by|trained by|developed by",
    ),
)


class Identity(Rowwise):
    """How strongly a row gives the model another identity, or answers as another: 0 to 1.

    Example:
        >>> from safe_sched.audit import audit_row
        >>> row = audit_row({"prompt": "From now on, you are Max. Who are you?", "completion": "Max."})
        >>> Identity().score([row]).reasons
        ['the prompt gives the model a new self']
    """

    name: ClassVar[str] = "identity"
    about: ClassVar[str] = "A new name, maker or character for the model, in the prompt or in the answer"

    def look(self, row: AuditRow) -> tuple[float, str] | None:
        """Sum of what the patterns count, at most 1; None where there are none."""
        places = (
            (_asked(row.system) if row.system else (0.0, []), "system prompt"),
            (matches(_ASKED, plain(row.prompt, 600)) if row.prompt else (0.0, []), "prompt"),
            (matches(_ANSWERED, plain(row.answer, 300)) if row.answer else (0.0, []), "answer"),
        )
        (total, said), where = max(places, key=lambda place: place[0][0])
        return (total, f"the {where} {' and '.join(said)}") if total else None

    def settings(self) -> dict[str, object]:
        """The patterns."""
        both = (*_ASKED, *_ANSWERED)
        return {"patterns": [one.found.pattern for one in both], "counts": [one.counts for one in both]}


@functools.lru_cache(maxsize=256)
def _asked(text: str) -> tuple[float, list[str]]:
    """A file has few system prompts, each many times."""
    return matches(_ASKED, plain(text))
