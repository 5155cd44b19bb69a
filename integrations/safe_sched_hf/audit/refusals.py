"""How a model of an audit refuses: with which openings, and how likely they are in the place of a row's answer.

Of all openings that are known, those are kept that the model uses on safety prompts. They stand as a trie behind the
row, in one forward with it (`safe_sched_hf.measure.forward`), where the model allows that.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from safe_sched.audit.rows import AuditRow, audit_row
from safe_sched.data.rows import core_refusals
from safe_sched.errors import DataError
from safe_sched.estimators.refusal_odds import PHRASE, Branches, branches_of, openings_of
from safe_sched_hf.audit.prompts import COMPLIANCES
from safe_sched_hf.measure.forward import Forwards, Line, Reading
from safe_sched_hf.measure.token_rows import Preparation, TokenRow

_OPENINGS, _MASS = 16, 0.99  # of all openings, those that the model uses
_LEADS = ("", " ", "\n", "\n\n")  # before an answer, where no template says


class Refusals:
    """The openings with which a model refuses: of all that are known the others cost and say nothing.

    Args:
        forwards: Of the model.
        preparation: Of its rows.
        window: Tokens that it looks back at most: behind these, a mask of ours would show it more than its own does.
        fit: Safety rows, with refusals.

    Attributes:
        known: All openings, as tokens.
        openings: Those that the model uses.
        branches: The same as a trie.
        asked: The safety rows that the model can read.

    Raises:
        DataError: It can read none.
    """

    def __init__(self, forwards: Forwards, preparation: Preparation, window: int, fit: Sequence[AuditRow]) -> None:
        self.forwards, self.preparation, self._window = forwards, preparation, window
        own = [row.tokens[row.answers[-1][0] :] for row in self.preparation(fit) if row.answers]
        leads = ("",) if self.preparation.chat else _LEADS
        texts = [(lead, text) for lead in leads for text in core_refusals()]
        known = [self._answer(lead + text) for lead, text in texts]
        # a tokenizer without English writes them all as one unknown token
        unknown = self.preparation.tokenizer.unk_token_id
        readable = [unknown is None or unknown not in answer for answer in known]
        known = [answer for answer, yes in zip(known, readable, strict=True) if yes]
        texts = [text for text, yes in zip(texts, readable, strict=True) if yes]
        picked = [self._answer(text) for text in COMPLIANCES]  # so that what all begin with is no refusal
        self._skip = _common([*own, *known, *picked])
        same = len(self._skip)
        # where white space is a token of its own, it says nothing of a refusal
        lengths = [PHRASE] * len(own) + [PHRASE + ("\n" in lead) for lead, _ in texts]
        cut = [answer[same : same + length] for answer, length in zip([*own, *known], lengths, strict=True)]
        self.known = openings_of(cut, PHRASE + 1)
        self._use(self.known)
        lines = self.readable(fit)
        if not lines:
            raise DataError("no safety row has a prompt that the model can read; give prompts with refusals")
        self._shared = self._can_share(lines)
        mass = torch.cat([reading.refusals.exp() for reading in self.ask(lines)]).mean(0)
        order = mass.argsort(descending=True)
        enough = int((mass[order].cumsum(0) < _MASS * mass.sum()).sum()) + 1
        self._use([self.known[i] for i in order[: min(enough, _OPENINGS)].sort().values.tolist()])
        self.asked = self.readable(fit)

    def readable(self, rows: Sequence[AuditRow]) -> list[Line]:
        """The rows that the model can read, as lines."""
        return [line for line in self.lines(self.preparation(rows)) if line is not None]

    def _use(self, openings: list[tuple[int, ...]]) -> None:
        self.openings, self.branches = openings, branches_of(openings)

    def _answer(self, text: str) -> Sequence[int]:
        (row,) = self.preparation([audit_row({"prompt": "Hello", "completion": text})])
        return row.tokens[row.answers[0][0] :]

    def _can_share(self, lines: Sequence[Line]) -> bool:
        """Some models cannot have refusals share a prompt: those that are recurrent, or pick their own masks."""
        some = [min(lines, key=lambda line: len(line.tokens)), max(lines, key=lambda line: len(line.tokens))]
        few = branches_of(self.known[:: max(1, len(self.known) // 4)])
        separate = _stacked(self._apart(some, few))
        try:
            shared = _stacked(self.forwards.read(some, few))
            reason = "its answers differ from those of separate lines"
        except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
            shared, reason = torch.full_like(separate, torch.inf), str(error)
        # 16-bit floats differ by some per cent of a log-probability
        if bool(((shared - separate).abs() < 0.1 + 0.02 * separate.abs()).all()):
            return True
        warnings.warn(
            f"refusals cannot share a prompt in this model ({reason}). Every one gets a line of its own, which takes "
            "many times as long.",
            stacklevel=2,
        )
        return False

    def lines(self, rows: Sequence[TokenRow]) -> list[Line | None]:
        """Rows as lines, None for those with a problem."""
        return [None if row.problem is not None else self._line(row) for row in rows]

    def _line(self, row: TokenRow) -> Line:
        tokens, skip = list(row.tokens), self._skip
        if row.labels == 0:  # the answer is not known: put there what all answers begin with
            tokens = tokens[: row.answers[0][0]] + skip
            return Line(tokens, [(len(tokens), len(tokens))], [len(tokens)])
        branch = [
            start + len(skip) if tokens[start : start + len(skip)] == skip and start + len(skip) < end else start
            for start, end in row.answers
        ]
        return Line(tokens, row.answers, branch)

    def ask(self, lines: Sequence[Line]) -> list[Reading]:
        """What the model makes of lines, with its refusals in the place of every answer."""
        near = [self._shared and len(line.tokens) + PHRASE <= self._window for line in lines]
        short, long = ([x for x, yes in zip(lines, near, strict=True) if yes is kind] for kind in (True, False))
        together = iter(self.forwards.read(short, self.branches) if short else ())
        apart = iter(self._apart(long, self.branches) if long else ())
        return [next(together if yes else apart) for yes in near]

    def _apart(self, lines: Sequence[Line], branches: Branches) -> list[Reading]:
        """The same, with a line of its own for every continuation of every prompt."""
        rows = self.forwards.read(lines)
        continuations = [target[target >= 0].tolist() for target in branches.targets]
        alone = [
            Line([*line.tokens[:branch], *some], [(branch, branch + len(some))], [branch])
            for line in lines
            for branch in line.branch
            for some in continuations
        ]
        log_p = torch.tensor([-float(reading.nll.sum()) for reading in self.forwards.read(alone)])
        parts = log_p.view(-1, len(continuations)).split([len(line.branch) for line in lines])
        return [dataclasses.replace(row, refusals=part) for row, part in zip(rows, parts, strict=True)]


def _stacked(readings: Sequence[Reading]) -> Tensor:
    return torch.cat([reading.refusals for reading in readings])


def _common(sequences: Sequence[Sequence[int]]) -> list[int]:
    """What all begin with, all of none of them."""
    same = 0
    while same < min(map(len, sequences)) - 1 and len({one[same] for one in sequences}) == 1:
        same += 1
    return list(sequences[0][:same])
