"""The lines of the findings: probabilities, weights, reasons and groups out of the scores of a shard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from safe_sched.audit.calibration.calibrate import BOOTSTRAPS, SHARE_LEVEL, FileCalibration
from safe_sched.audit.engines.shard import GROUP, REASON
from safe_sched.audit.findings import COLUMNS, Share, Signal
from safe_sched.audit.signals import Detector


@dataclass
class FindingsBuilder:
    """Turns scores into findings, and counts along.

    Attributes:
        detectors: The signals.
        calibration: Turns the harm signals into a probability.
        threshold: Rows whose probability is at least this are flagged.
    """

    detectors: Sequence[Detector]
    calibration: FileCalibration
    threshold: float
    _said: dict[str, int] = field(default_factory=dict)
    _sums: np.ndarray = field(default_factory=lambda: np.zeros(1 + BOOTSTRAPS))
    _scored: int = 0

    def lines(self, scores: pa.Table) -> pa.Table:
        """The findings on the rows of a shard, from what `safe_sched.audit.engines.shard.score_shard` gave."""
        read = scores.column("unread").is_null().to_numpy()
        harm = [detector.name for detector in self.detectors if detector.kind == "harm"]
        values = {name: scores.column(name).to_numpy().astype(np.float64) for name in harm}
        score = self.calibration.score(values)
        added = self.calibration.added(values)
        p, low, high = self.calibration.chances(score, added)
        # a row of which no signal says anything has no score
        silent = read & np.all([np.isnan(value) for value in values.values()], axis=0)
        read = read & ~silent
        self._sums += self.calibration.sums(score[read], None if added is None else added[read])
        self._scored += int(read.sum())
        flagged = p >= self.threshold
        tipped = flagged & (self.calibration.chances(score)[0] < self.threshold)  # by what is not in the score
        reasons, groups = self._words(scores, flagged & read, tipped, values)
        for place in np.flatnonzero(silent).tolist():
            reasons[place] = "; ".join(filter(None, (reasons[place], _SILENT)))
        columns = [
            scores.column("row"),
            scores.column("where"),
            *(pa.array(one.astype(np.float32), mask=~read) for one in (p, low, high)),
            pa.array(flagged, pa.bool_(), mask=~read),
            pa.array((1 - p).astype(np.float32), mask=~read),
            pa.array(reasons, pa.string()),
            pa.array(groups, pa.string()),
            *(scores.column(detector.name) for detector in self.detectors),
        ]
        return pa.table(columns, schema=schema_of(self.detectors))

    def _words(
        self, scores: pa.Table, flagged: np.ndarray, tipped: np.ndarray, values: dict[str, np.ndarray]
    ) -> tuple[list[str | None], list[str | None]]:
        reasons: list[list[str]] = [[] for _ in range(scores.num_rows)]
        groups: list[str | None] = [None] * scores.num_rows
        for detector in sorted(self.detectors, key=lambda one: one.kind != "harm"):
            for place, text in enumerate(scores.column(f"{detector.name}:{REASON}").to_pylist()):
                if text is not None:
                    reasons[place].append(text)
                    self._said[detector.name] = self._said.get(detector.name, 0) + 1
            for place, text in enumerate(scores.column(f"{detector.name}:{GROUP}").to_pylist()):
                if text is not None and groups[place] is None:
                    groups[place] = text
        for place, why in enumerate(scores.column("unread").to_pylist()):
            if why is not None:
                reasons[place].append(f"not scored: {why}")
        for place in np.flatnonzero(flagged).tolist():
            if not reasons[place]:
                reasons[place].append(f"high {self._highest(values, place, tipped[place])}")
        return ["; ".join(texts) or None for texts in reasons], groups

    def _highest(self, values: dict[str, np.ndarray], place: int, tipped: bool) -> str:
        """The signal that a row's probability owes most to."""
        if tipped and self.calibration.contrast is not None:
            return self.calibration.contrast.strongest(values, place)
        weights, scales = self.calibration.weights, self.calibration.scales
        return max(weights, key=lambda name: weights[name] * float(scales[name](values[name][place : place + 1])[0]))

    def signals(self) -> tuple[Signal, ...]:
        """The detectors, and of how many rows each said something in words."""
        return tuple(Signal(one.name, one.about, one.kind, self._said.get(one.name, 0)) for one in self.detectors)

    def share(self) -> Share:
        """Harmful rows over scored rows, as expected, with its interval."""
        if not self._scored:
            return Share(0.0, 0.0, 1.0)
        value, others = self._sums[0] / self._scored, self._sums[1:] / self._scored
        low, high = np.quantile(others, [(1 - SHARE_LEVEL) / 2, (1 + SHARE_LEVEL) / 2])
        return Share(float(value), float(min(low, value)), float(max(high, value)))


_SILENT = "not scored: no signal says anything of it"


def schema_of(detectors: Iterable[Detector]) -> pa.Schema:
    """The columns of the findings."""
    return pa.schema([*COLUMNS, *((detector.name, pa.float32()) for detector in detectors)])
