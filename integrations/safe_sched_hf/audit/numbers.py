"""The numbers of a row, from what a model made of it.

With R the openings of refusals that this model uses on safety prompts, x a row's prompt and y its answer::

    propensity  =  log P(R | x) - log( 1 - P(R | x) )           the largest over the row's answers
    antibody    =  propensity, with the sign turned where y opens with a refusal itself
    surprise    =  mean over the tokens t of y of  nll_t(theta)
    probe       =  max over the tokens t of y of  ( nll_t(theta') - nll_t(theta) ) / gain

``antibody`` is the negative of Antibody's log-likelihood ratio between two ways to open an answer
(`safe_sched.schedulers.antibody`); the model is not trained here, so it is anchored. A refusal that goes on where the
model would have ended it keeps its sign: it may go on to comply. In the probe, theta' is theta moved along the gradient
of the refusal margin (`safe_sched.estimators.probe`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from safe_sched.estimators.probe import GAIN
from safe_sched.estimators.refusal_odds import log_odds, opens_with
from safe_sched_hf.measure.forward import Line, Reading


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


def refused(log_p: Tensor) -> Tensor:
    """Log-odds of refusing: float (answers,), from the log-probabilities of openings, (answers, openings)."""
    return log_odds(log_p.logsumexp(-1))


def numbers_of(
    line: Line, reading: Reading, moved: Reading | None, known: Sequence[tuple[int, ...]], end_token: int
) -> tuple[list[float], bool]:
    """Propensity, antibody, surprise and probe of a row, and whether its answer opens with a refusal.

    Args:
        line: The row.
        reading: What the model made of it.
        moved: What the model makes of it after the step towards refusals, or None: no probe.
        known: All openings of refusals, as tokens.
        end_token: What ends an answer.
    """
    surprise = float(reading.nll.mean()) if reading.nll.numel() else np.nan
    probe = np.nan
    if moved is not None and reading.nll.numel():
        probe = float((moved.nll - reading.nll).max()) / GAIN
    if not reading.refusals.shape[1]:
        return [np.nan, np.nan, surprise, probe], False
    odds = refused(reading.refusals)
    against, refuses, first = odds.clone(), False, 0
    for g, ((start, end), branch) in enumerate(zip(line.answers, line.branch, strict=True)):
        said = torch.tensor(line.tokens[branch:end])
        if said.numel() and opens_with(said, known):
            refuses = True
            stop = (said == end_token).nonzero().flatten().tolist()
            ends = reading.end_log_p[first + branch - start + 1 : first + branch - start + (stop or [len(said)])[0]]
            goes_on = float(log_odds(ends).max()) if ends.numel() else -np.inf
            against[g] = max(-float(odds[g]), goes_on)
        first += end - start
    return [float(odds.max()), float(against.max()), surprise, probe], refuses
