"""A model that an audit asks about rows: found out first, then asked about all of them.

`safe_sched_hf.audit.numbers` says what the numbers are, and `safe_sched_hf.audit.trust` when there are none. A row
costs one forward for the first three of them and another for the probe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safe_sched.audit.detectors.text import benign_prompts
from safe_sched.audit.rows import AuditRow, audit_row
from safe_sched.data.rows import core_rows
from safe_sched.errors import ModelError
from safe_sched.estimators.probe import Direction
from safe_sched.estimators.refusal_odds import PHRASE
from safe_sched.hooks import AuditRequest, RowLossesRequest
from safe_sched_hf.audit.numbers import Measures, numbers_of, refused
from safe_sched_hf.audit.probe import towards_refusing
from safe_sched_hf.audit.prompts import complying, everyday, safety_of
from safe_sched_hf.audit.refusals import Refusals
from safe_sched_hf.audit.trust import HARM, cannot_tell, is_aligned, is_at_home
from safe_sched_hf.measure.forward import Forwards, Line, Reading, token_budget
from safe_sched_hf.measure.row_losses import _device, _load, _quiet
from safe_sched_hf.measure.token_rows import Preparation

_FEW = 8  # safety rows below which none is held back
_SAMPLE = 64  # rows of the file that are asked first
_MIX = 0x9E37_79B9_7F4A_7C15


class AlignedModel:
    """A model that is asked about rows; loaded at the first question.

    Args:
        request: With ``model``.
        probe: Whether to take the probe, which costs a second forward.
    """

    def __init__(self, request: AuditRequest, *, probe: bool = True) -> None:
        self.request, self.with_probe = request, probe
        self._sample: dict[int, AuditRow] = {}
        self._decided: tuple[bool, frozenset[str], bool] | None = None
        self._forget()

    def _forget(self) -> None:
        self._model: Any = None
        self._ready = False
        self._direction: Direction | None = None
        self._last: tuple[list[AuditRow], Measures] | None = None
        self._known: dict[str, Measures] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the model, which another process loads for itself; it must not decide anything for itself."""
        kept = ("request", "with_probe", "_sample", "_decided")
        return {name: self.__dict__[name] for name in kept}

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
        decided = self._decided
        self.take(model.to(device), tokenizer)
        self._decided = decided

    def take(self, model: Any, tokenizer: Any) -> None:
        """Ask a model that is loaded already.

        Args:
            model: A causal language model on its device. It is put into evaluation mode.
            tokenizer: Its own, or its processor.
        """
        self._forget()
        self._decided = None
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
            ModelError: The model cannot be loaded or run, or here not as in the process that was asked first.
        """
        if self._ready:
            return
        self.load()
        rows = safety_of(self.request.safety_rows or core_rows())
        held = len(rows) >= _FEW
        fit, self._held = (rows[::2], rows[1::2]) if held else (rows, [])
        self.refusals = Refusals(self.forwards, self.preparation, self._window, fit)
        lines = self.refusals.asked
        first = self._decided is None
        self._says, self._muted, probe = self._decided or self._decide(lines)
        if probe:
            prompts = [torch.tensor(line.tokens[: line.branch[-1]]) for line in lines]
            self._direction = towards_refusing(self.forwards, self.refusals.openings, prompts)
            if self._direction is None and not first:
                raise ModelError("this process has no probe, and the first one has: give all of them as much memory")
        self._ready = True
        if first and self._muted != HARM:
            self._muted = cannot_tell(self.known(), self.known_harmless())
        if "probe" in self._muted:
            self._direction = None
        self._decided = (self._says, self._muted, self._direction is not None)

    def _decide(self, lines: Sequence[Line]) -> tuple[bool, frozenset[str], bool]:
        """Whether the model says anything of refusals, which signals it cannot give, and whether there is a probe."""
        says = is_aligned(float(torch.sigmoid(torch.tensor(self._odds(lines))).mean()))
        home = says and is_at_home(*map(self._refused, (everyday(), [row for _, row in sorted(self._sample.items())])))
        return says, frozenset() if home else HARM, home and self.with_probe

    def _refused(self, rows: Sequence[AuditRow]) -> float:
        """The share that the model would rather refuse."""
        odds = self._odds(self.refusals.readable(rows))
        return float(np.mean(np.array(odds) > 0)) if odds else 0.0

    def _odds(self, lines: Sequence[Line]) -> list[float]:
        """Log-odds of refusing each."""
        return [float(refused(reading.refusals).max()) for reading in self.refusals.ask(lines)]

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
        lines = self.refusals.lines(prepared)
        there = [i for i, line in enumerate(lines) if line is not None]
        given = [line for line in lines if line is not None]
        before = self.refusals.ask(given) if self._says else self.forwards.read(given)
        after: Sequence[Reading | None] = [None] * len(given)
        if self._direction is not None:
            with self._direction.taken():
                after = self.forwards.read(given)
        columns = np.full((4, len(rows)), np.nan, np.float32)
        refuses = np.zeros(len(rows), bool)
        for i, line, reading, moved in zip(there, given, before, after, strict=True):
            columns[:, i], refuses[i] = numbers_of(line, reading, moved, self.refusals.known, self.forwards.end)
        whole = np.array([row.whole for row in prepared], bool)
        propensity, antibody, surprise, probe = columns
        problems = [row.problem for row in prepared]
        found = self._muted_in(Measures(propensity, antibody, surprise, probe, refuses, whole, problems))
        self._last = list(rows), found
        return found

    def _muted_in(self, found: Measures) -> Measures:
        blank = np.full(len(found.problems), np.nan, np.float32)
        return dataclasses.replace(found, **dict.fromkeys(self._muted, blank))

    def known(self) -> Measures | None:
        """The numbers of safety prompts that nothing was fitted on, with an inert compliance each; None: too few."""
        self.prepare()
        return self._once("harmful", self._held)

    def known_harmless(self) -> Measures | None:
        """The numbers of harmless prompts that sound harmful, with an inert answer each; None: they say nothing."""
        self.prepare()
        return self._once("harmless", [audit_row({"prompt": text, "completion": ""}) for text in benign_prompts()])

    def _once(self, kind: str, rows: Sequence[AuditRow]) -> Measures | None:
        """The numbers of known rows with an inert compliance; several ask for them."""
        if not rows or self._muted == HARM:
            return None
        if kind not in self._known:
            self._known[kind] = self.measure([complying(row, i) for i, row in enumerate(rows)])
        return self._muted_in(self._known[kind])


def _is(first: object, second: object) -> bool:
    return first is second
