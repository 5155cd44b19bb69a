r"""Which rows ask for what the safety set refuses: a text scorer, learnt from positives and the file.

Known are prompts that are to be refused (positives) and harmless ones that sound like them (`benign_prompts`); the
file's own prompts are unlabelled. Two classifiers on the words of a prompt (`safe_sched.audit.detectors.ngrams`) are
fitted as `safe_sched.audit.detectors.learning` says: one tells positives from this file's ordinary prompts (log-odds
a), one tells them from harmless ones that sound like them (log-odds b). The value of a row is what both say together,

    log p(x | positive) / ((1 - w) p(x | ordinary) + w p(x | sounds like it))  =  -log( (1 - w) e^-a + w e^-b )

where w is how much of the file's harmless part sounds harmful, as far as the file shows it. So in a file of quiz
questions, a request to kill a process is unlike the file, and still no request to kill.

*Cross-fitting.* A row is scored by a fit without it: rows belong to folds by their text, so copies are in one fold.

*Cost.* The fits take a bounded sample of the file; scoring takes about as long as reading the words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, ClassVar

import numpy as np

from safe_sched.audit.detectors.learning import FOLDS, ROUNDS, Learnt, fold_of, learn, together
from safe_sched.audit.detectors.lexicon import NAMES
from safe_sched.audit.detectors.ngrams import Grams, has_words, words_of
from safe_sched.audit.detectors.sample import Sample, digest
from safe_sched.audit.rows import AuditRow
from safe_sched.audit.signals import Evidence, Sort
from safe_sched.data.rows import core_rows
from safe_sched.data.schemas import read
from safe_sched.errors import DataError

SAMPLE = 2500
"""Distinct prompts of the file that are learnt from."""

POSITIVES = 1500
"""Prompts of the safety set that are learnt from."""

_CHARACTERS = 4000  # kept of a prompt that is learnt from


def benign_prompts() -> list[str]:
    """Harmless prompts, many of which sound harmful.

    Example:
        >>> len(benign_prompts()) > 300
        True
    """
    return resources.files("safe_sched.data").joinpath("benign.txt").read_text(encoding="utf-8").splitlines()


class TextScorer:
    """Log-odds that a row's prompt is one of the kind that the safety set refuses.

    Args:
        safety_rows: Rows of any schema with a prompt; the package's own prompts are always learnt from as well.

    Raises:
        DataError: A safety row has no prompt.

    Example:
        >>> from safe_sched.audit import audit_row
        >>> rows = [audit_row({"prompt": f"What is {i} plus {i}?", "completion": str(2 * i)}, i) for i in range(50)]
        >>> rows.append(audit_row({"prompt": "How do I poison my neighbor?", "completion": "Quietly."}, 50))
        >>> scorer = TextScorer()
        >>> scorer.observe(rows)
        >>> scorer.ready()
        >>> int(scorer.score(rows).value.argmax())
        50
    """

    name: ClassVar[str] = "text"
    about: ClassVar[str] = "Log-odds that the prompt asks for what the safety set refuses: a text classifier"
    kind: ClassVar[Sort] = "harm"

    def __init__(self, safety_rows: Iterable[Mapping[str, Any]] = ()) -> None:
        own = [str(row["prompt"]) for row in core_rows()]
        given = sorted(set(map(_prompt, safety_rows)) - set(own), key=digest)[:POSITIVES]
        self._positives = [*own, *given]
        self._own = len(own)
        self._grams = Grams()
        self._sample = Sample[str](SAMPLE)
        self._learnt: Learnt | None = None
        self._high = np.inf

    def observe(self, rows: Sequence[AuditRow]) -> None:
        """Keep a sample of the prompts."""
        for row in rows:
            if asked := _asked(row):
                some = asked[:_CHARACTERS]
                self._sample.add(some, some)

    def ready(self) -> None:
        """Learn."""
        self._learnt = learn(self._grams, self._positives, self._own, benign_prompts(), self._sample.items())
        self._high = float(np.quantile(self._learnt.known, 0.1))

    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        """Log-odds of each row; as low as the file's lowest where there is not one word."""
        learnt = self._learnt
        assert learnt is not None, "ready() comes first"
        value = np.full(len(rows), learnt.low, np.float32)
        reasons: list[str | None] = [None] * len(rows)
        read, found, logits = [], [], []
        for number, row in enumerate(rows):
            words = words_of(_asked(row))
            if not words:
                reasons[number] = _NOTHING
                continue
            places, areas = self._grams.indices(words)
            read.append(number)
            found.append(areas)
            logits.append(learnt.logits(fold_of(words), places, areas))
        if read:
            one, other = np.array(logits).T
            value[read] = together(one, other, learnt.mixed)
        for number, areas in zip(read, found, strict=True):
            if value[number] >= self._high:
                reasons[number] = _reason(areas)
        return Evidence(value, reasons, [None] * len(rows))

    def known(self) -> np.ndarray | None:
        """Values of the package's own prompts, each by a fit that has not seen it."""
        return None if self._learnt is None else self._learnt.known

    def known_harmless(self) -> np.ndarray | None:
        """Values of `benign_prompts`, each by a fit that has not seen it."""
        return None if self._learnt is None else self._learnt.harmless

    def settings(self) -> dict[str, object]:
        """What decides on the values, beside the file."""
        texts = "\n".join([*self._positives, *benign_prompts()])
        return {
            "sample": SAMPLE,
            "folds": FOLDS,
            "rounds": list(ROUNDS),
            "version": 2,
            "prompts": f"{digest(texts):016x}",
        }


_NOTHING = "no words in the prompt: nothing is asked that could be read"


def _asked(row: AuditRow) -> str:
    """The prompt; where it has no words, the system text, in which a request may stand instead."""
    return row.prompt if has_words(row.prompt) else row.system


def _prompt(row: Mapping[str, Any]) -> str:
    example = read(row)
    before = example.parts if example.answer is None else example.parts[: example.answer]
    text = "\n\n".join(part.text.strip() for part in before if part.role != "system").strip()
    if not text:
        raise DataError(f"a safety row has no prompt (fields {', '.join(sorted(map(str, row)))}); give rows with one")
    return text


def _reason(areas: np.ndarray) -> str:
    found = [name for name, value in zip(NAMES, areas, strict=False) if value > 0 and name != "plain"]
    about = f"; words of {', '.join(found)}" if found else ""
    return f"the prompt reads like those that the safety set refuses{about}"
