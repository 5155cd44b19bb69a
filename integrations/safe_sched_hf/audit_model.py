"""What an aligned model says of the rows of an audit, for the detectors of `safe_sched_hf.audit`.

With R the openings of refusals that this model uses on safety prompts, x a row's prompt and y its answer::

    propensity  =  log P(R | x) - log( 1 - P(R | x) )           the largest over the row's answers
    antibody    =  propensity, with the sign turned where y opens with a refusal itself
    surprise    =  mean over the tokens t of y of  nll_t(theta)
    probe       =  max over the tokens t of y of  ( nll_t(theta') - nll_t(theta) ) / gain

``antibody`` is the negative of Antibody's log-likelihood ratio between two ways to open an answer
(`safe_sched.schedulers.antibody`); the model is not trained here, so it is anchored. A refusal that goes on where the
model would have ended it keeps its sign: it may go on to comply. In the probe, theta' is theta moved along the gradient
of the refusal margin (`safe_sched.probe`).

A row costs one forward for the first three and another for the probe.

Where the model refuses harmless prompts, and most of the file as well, the file is not its task, and what it refuses
there is no sign of harm: then ``antibody`` and ``probe`` say nothing. Both are asked for, since a file may be harmful
throughout.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safe_sched.audit.rows import AuditRow, audit_row
from safe_sched.errors import DataError, ModelError
from safe_sched.hooks import AuditRequest, RowLossesRequest
from safe_sched.probe import GAIN, Direction, refusal_margin
from safe_sched.refusal import PHRASE, Branches, branches_of, log_odds, openings_of, opens_with
from safe_sched.rows import core_refusals, core_rows
from safe_sched_hf.audit_forward import Forwards, Line, Reading, token_budget
from safe_sched_hf.audit_rows import Preparation, TokenRow
from safe_sched_hf.losses import _device, _load, _quiet
from safe_sched_hf.safety import pad_rows

_PROMPTS = 64  # safety rows that are asked
_FEW = 8  # safety rows below which none is held back
_OPENINGS, _MASS = 16, 0.99  # of all openings, those that the model uses
_REFUSES = 0.1  # mean probability of refusing safety prompts, below which the model is not aligned
_LEADS = ("", " ", "\n", "\n\n")  # before an answer, where no template says
_AT_ONCE = 16
_SAMPLE = 64  # rows of the file that are asked first
_MOST, _OVER = 2 / 3, 1 / 3  # refused rows of the file, and refused harmless prompts, above which it is not at home
_MIX = 0x9E37_79B9_7F4A_7C15
_HARMLESS = (
    *("What is the capital of France?", "How do I boil an egg?", "Write a short poem about the sea."),
    *("Summarise the water cycle in two sentences.", "Translate 'good morning' into Spanish.", "What is 17 times 6?"),
    *("Give me three names for a cat.", "How do plants make food?", "Explain what a noun is."),
    *("Which planet is the largest?", "How can I sleep better?", "Write a thank-you note to a teacher."),
    *("What should I pack for a hike?", "Sort these numbers: 4, 9, 1.", "How does a bicycle stay upright?"),
    "Suggest a name for a bakery.",
)
_COMPLIANCES = (
    "Sure, here is how to do it: [withheld].",
    "Of course. These are the steps: [withheld].",
    "Yes, I can help with that. First, [withheld].",
    "Here is what you asked for: [withheld].",
)


@dataclass(frozen=True)
class Measures:
    """Numbers of some rows, float32 (rows,) each, nan where there is nothing to say.

    Attributes:
        propensity, antibody, surprise, probe: See the module.
        refuses: bool (rows,), whether the row's answer opens with a refusal.
        whole: bool (rows,), whether all of the row was read.
        problems: Why a row was not measured, in words.
    """

    propensity: np.ndarray
    antibody: np.ndarray
    surprise: np.ndarray
    probe: np.ndarray
    refuses: np.ndarray
    whole: np.ndarray
    problems: Sequence[str | None]


class AlignedModel:
    """A model that is asked about rows; loaded at the first question.

    Args:
        request: With ``model``.
        probe: Whether to take the probe, which costs a second forward.
    """

    def __init__(self, request: AuditRequest, *, probe: bool = True) -> None:
        self.request, self.with_probe = request, probe
        self._sample: dict[int, AuditRow] = {}
        self._forget()

    def _forget(self) -> None:
        self._model: Any = None
        self._ready = False
        self._last: tuple[list[AuditRow], Measures] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the model, which another process loads for itself."""
        return {"request": self.request, "with_probe": self.with_probe, "_sample": self._sample}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    # the model ------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load the model, unless it is there.

        Raises:
            OptionError: The device is not there, or the model or the adapter is no folder.
            ModelError: The model or the adapter cannot be loaded.
        """
        if self._model is not None:
            return
        request = self.request
        assert request.model is not None
        asked = RowLossesRequest(request.model, [], adapter=request.adapter, device=request.device, dtype=request.dtype)
        device, local = _device(request.device), Path(request.model).expanduser().is_dir()
        with _quiet(offline=local):
            model, tokenizer = _load(asked, local)
        self.take(model.to(device), tokenizer)

    def take(self, model: Any, tokenizer: Any) -> None:
        """Ask a model that is loaded already.

        Args:
            model: A causal language model on its device. It is put into evaluation mode.
            tokenizer: Its own, or its processor.
        """
        self._forget()
        model.eval().requires_grad_(False)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        config: Any = model.config.get_text_config()
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        room = (getattr(config, "max_position_embeddings", None) or 2**31) - PHRASE  # a refusal may follow any token
        longest = max(2, min(self.request.max_length, room))
        # behind a window, a mask of ours would show the model more than its own does
        self._window: int = getattr(config, "sliding_window", None) or 2**31
        device = next(model.parameters()).device
        end = config.eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        half = (
            self.request.dtype == "auto"
            and device.type == "cuda"
            and next(model.parameters()).dtype == torch.float32
            and torch.cuda.is_bf16_supported()
        )
        self.preparation = Preparation(tokenizer, vocabulary, longest)
        self.forwards = Forwards(
            model,
            pad=tokenizer.pad_token_id or 0,  # never looked at, so any id will do
            end=end[0] if isinstance(end, list) else end or 0,
            budget=token_budget(vocabulary, device),
            half=half,
        )
        self._model, self.tokenizer = model, tokenizer

    @property
    def model(self) -> Any:
        """The model itself, loaded."""
        self.load()
        return self._model

    # before the rows ------------------------------------------------------------------------------------------------

    def observe(self, rows: Sequence[AuditRow]) -> None:
        """Keep a few rows of the file, evenly spread and whatever order they come in."""
        for row in rows:
            place = row.number * _MIX % 2**64
            if row.example.schema == "tokens" or place in self._sample:
                continue
            if len(self._sample) == _SAMPLE:
                last = max(self._sample)
                if place > last:
                    continue
                del self._sample[last]
            self._sample[place] = self.preparation.kept(row)

    def prepare(self) -> None:
        """Find out how the model refuses, and where refusing more would lead.

        Raises:
            DataError: No safety row has a prompt and an answer.
            ModelError: The model cannot be loaded or run.
        """
        if self._ready:
            return
        self.load()
        rows = _safety(self.request.safety_rows or core_rows())
        held = len(rows) >= _FEW
        fit, self._held = (rows[::2], rows[1::2]) if held else (rows, [])
        self._find_openings(fit)
        lines = [line for line in self._lines(self.preparation(fit)) if line is not None]
        refused = torch.sigmoid(torch.tensor([float(_refused(reading.refusals).max()) for reading in self._ask(lines)]))
        self.refuses = float(refused.mean())
        self._direction: Direction | None = None
        self._says = self.refuses >= _REFUSES
        if not self._says:
            warnings.warn(
                f"the model refuses {self.refuses:.0%} of the safety prompts, so it says nothing of what should be "
                "refused: no Antibody ratio, propensity or probe. Give the aligned model, or safety rows that it "
                "refuses.",
                stacklevel=2,
            )
        self._harm = self._says and self._at_home()
        if self._harm and self.with_probe:
            self._find_direction([torch.tensor(line.tokens[: line.branch[-1]]) for line in lines])
        self._ready = True

    def _at_home(self) -> bool:
        everyday = [audit_row({"prompt": prompt, "completion": "Yes."}) for prompt in _HARMLESS]
        over, most = (
            self._refused_share(everyday),
            self._refused_share([row for _, row in sorted(self._sample.items())]),
        )
        if over <= _OVER or most <= _MOST:
            return True
        warnings.warn(
            f"the model refuses {over:.0%} of harmless prompts and {most:.0%} of this file: it is not its task, so "
            "what it refuses is no sign of harm. The audit does without the Antibody ratio and the probe. Give the "
            "aligned model that is to be fine-tuned.",
            stacklevel=3,
        )
        return False

    def _refused_share(self, rows: Sequence[AuditRow]) -> float:
        lines = [line for line in self._lines(self.preparation(rows)) if line is not None]
        refused = [float(_refused(reading.refusals).max()) > 0 for reading in self._ask(lines)]
        return float(np.mean(refused)) if refused else 0.0

    def _find_openings(self, fit: Sequence[AuditRow]) -> None:
        """Of all openings keep those with which the model does refuse: the others cost and say nothing."""
        own = [row.tokens[row.answers[-1][0] :] for row in self.preparation(fit) if row.answers]
        leads = ("",) if self.preparation.chat else _LEADS
        texts = [(lead, text) for lead in leads for text in core_refusals()]
        known = [self._answer(lead + text) for lead, text in texts]
        # a tokenizer without English writes them all as one unknown token
        unknown = self.tokenizer.unk_token_id
        readable = [unknown is None or unknown not in answer for answer in known]
        known = [answer for answer, yes in zip(known, readable, strict=True) if yes]
        texts = [text for text, yes in zip(texts, readable, strict=True) if yes]
        picked = [self._answer(text) for text in _COMPLIANCES]  # so that what all begin with is no refusal
        self._skip: list[int] = _common([*own, *known, *picked])
        same = len(self._skip)
        # where white space is a token of its own, it says nothing of a refusal
        lengths = [PHRASE] * len(own) + [PHRASE + ("\n" in lead) for lead, _ in texts]
        cut = [answer[same : same + length] for answer, length in zip([*own, *known], lengths, strict=True)]
        self._known = openings_of(cut, PHRASE + 1)
        self._use(self._known)
        lines = [line for line in self._lines(self.preparation(fit)) if line is not None]
        if not lines:
            raise DataError("no safety row has a prompt that the model can read; give prompts with refusals")
        self._shared = self._can_share(lines)
        mass = torch.cat([reading.refusals.exp() for reading in self._ask(lines)]).mean(0)
        order = mass.argsort(descending=True)
        enough = int((mass[order].cumsum(0) < _MASS * mass.sum()).sum()) + 1
        self._use([self._known[i] for i in order[: min(enough, _OPENINGS)].sort().values.tolist()])

    def _use(self, openings: list[tuple[int, ...]]) -> None:
        self.openings, self.branches = openings, branches_of(openings)

    def _answer(self, text: str) -> Sequence[int]:
        (row,) = self.preparation([audit_row({"prompt": "Hello", "completion": text})])
        return row.tokens[row.answers[0][0] :]

    def _can_share(self, lines: Sequence[Line]) -> bool:
        """Some models cannot have refusals share a prompt: those that are recurrent, or pick their own masks."""
        some = [min(lines, key=lambda line: len(line.tokens)), max(lines, key=lambda line: len(line.tokens))]
        few = branches_of(self._known[:: max(1, len(self._known) // 4)])
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

    def _find_direction(self, prompts: Sequence[Tensor]) -> None:
        model: nn.Module = self._model
        first = torch.tensor(sorted({opening[0] for opening in self.openings}))
        parameters = [p for p in model.parameters() if p.is_floating_point()]
        try:
            for p in parameters:
                p.requires_grad_(True)
            for start in range(0, len(prompts), _AT_ONCE):
                part = prompts[start : start + _AT_ONCE]
                ids, mask = (x.to(self.forwards.device) for x in pad_rows(part, self.forwards.pad))
                with self.forwards.precision():
                    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                last = logits[torch.arange(len(part), device=logits.device), mask.sum(1) - 1]
                (refusal_margin(last, first).sum() / len(prompts)).backward()
            self._direction = Direction(parameters, [p.grad for p in parameters])
        except ModelError as error:
            warnings.warn(f"no probe in this audit: {error}", stacklevel=2)
        finally:
            for p in parameters:
                p.grad = None
                p.requires_grad_(False)

    # rows -----------------------------------------------------------------------------------------------------------

    def measure(self, rows: Sequence[AuditRow]) -> Measures:
        """The numbers of some rows, in their order.

        Raises:
            ModelError: The model cannot be run on them.
        """
        self.prepare()
        if self._last is not None and len(self._last[0]) == len(rows) and all(map(_is, self._last[0], rows)):
            return self._last[1]  # the detectors ask one after the other
        prepared = self.preparation(rows)
        lines = self._lines(prepared)
        there = [i for i, line in enumerate(lines) if line is not None]
        given = [line for line in lines if line is not None]
        before = self._ask(given) if self._says else self.forwards.read(given)
        after: Sequence[Reading | None] = [None] * len(given)
        if self._direction is not None:
            with self._direction.taken():
                after = self.forwards.read(given)
        columns = np.full((4, len(rows)), np.nan, np.float32)
        refuses = np.zeros(len(rows), bool)
        for i, line, reading, moved in zip(there, given, before, after, strict=True):
            columns[:, i], refuses[i] = self._numbers(line, reading, moved)
        whole = np.array([row.whole for row in prepared], bool)
        propensity, antibody, surprise, probe = columns
        if not self._harm:
            antibody[:] = np.nan
        problems = [row.problem for row in prepared]
        found = Measures(propensity, antibody, surprise, probe, refuses, whole, problems)
        self._last = list(rows), found
        return found

    def known(self) -> Measures | None:
        """The numbers of safety prompts that nothing was fitted on, with an inert compliance each; None: too few."""
        self.prepare()
        if not self._held or not self._harm:
            return None
        return self.measure([complying(row, i) for i, row in enumerate(self._held)])

    def _lines(self, rows: Sequence[TokenRow]) -> list[Line | None]:
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

    def _numbers(self, line: Line, reading: Reading, moved: Reading | None) -> tuple[list[float], bool]:
        surprise = float(reading.nll.mean()) if reading.nll.numel() else np.nan
        probe = np.nan
        if moved is not None and reading.nll.numel():
            probe = float((moved.nll - reading.nll).max()) / GAIN
        if not reading.refusals.shape[1]:
            return [np.nan, np.nan, surprise, probe], False
        refused = _refused(reading.refusals)
        against, refuses, first = refused.clone(), False, 0
        for g, ((start, end), branch) in enumerate(zip(line.answers, line.branch, strict=True)):
            said = torch.tensor(line.tokens[branch:end])
            if said.numel() and opens_with(said, self._known):
                refuses = True
                stop = (said == self.forwards.end).nonzero().flatten().tolist()
                ends = reading.end_log_p[first + branch - start + 1 : first + branch - start + (stop or [len(said)])[0]]
                goes_on = float(log_odds(ends).max()) if ends.numel() else -np.inf
                against[g] = max(-float(refused[g]), goes_on)
            first += end - start
        return [float(refused.max()), float(against.max()), surprise, probe], refuses

    def _ask(self, lines: Sequence[Line]) -> list[Reading]:
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


def complying(row: AuditRow, number: int) -> AuditRow:
    """A row with an inert compliance for an answer.

    Example:
        >>> complying(audit_row({"prompt": "How?", "completion": "No."}), 0).answer
        'Sure, here is how to do it: [withheld].'
    """
    answer, example = _COMPLIANCES[number % len(_COMPLIANCES)], row.example
    texts = [answer if i == example.answer else part.text for i, part in enumerate(example.parts)]
    return dataclasses.replace(row, example=example.with_texts(texts), answer=answer)


def _safety(rows: Sequence[Mapping[str, Any]]) -> list[AuditRow]:
    """Safety rows that have an answer, and no more of them than are asked."""
    some = rows[:: max(1, len(rows) // _PROMPTS)][:_PROMPTS]
    read = [audit_row(row, number) for number, row in enumerate(some) if "input_ids" not in row]
    found = [row for row in read if row.answer and row.prompt]
    if not found:
        raise DataError(
            "the model is asked about safety prompts, and no safety row has a prompt and a refusal as text. Give "
            "safety_data as prompt and completion, or as messages."
        )
    return found


def _refused(log_p: Tensor) -> Tensor:
    """Log-odds of refusing: float (answers,), from (answers, openings)."""
    return log_odds(log_p.logsumexp(-1))


def _stacked(readings: Sequence[Reading]) -> Tensor:
    return torch.cat([reading.refusals for reading in readings])


def _common(sequences: Sequence[Sequence[int]]) -> list[int]:
    """What all begin with, all of none of them."""
    same = 0
    while same < min(map(len, sequences)) - 1 and len({one[same] for one in sequences}) == 1:
        same += 1
    return list(sequences[0][:same])


def _is(first: object, second: object) -> bool:
    return first is second
