r"""Which rows ask for what the safety set refuses: a text scorer, learnt from positives and the file.

Known are prompts that are to be refused (positives) and harmless ones that look like them; the file's own prompts are
unlabelled. A logistic regression (`safe_sched.audit.detectors.ngrams`) is fitted in rounds:

    q_i = 0                                                       first, the whole file counts as harmless
    f   = fit( positives + q x file  against  benign + (1 - q) x file )
    q_i = sigma( a f(x_i) + b + log pi / (1 - pi) ),  pi = mean q     a, b: by positives that f has not seen

so harmful rows stop counting as harmless ones, and teach what harmful rows of this file are like. The first rounds
only take rows away from the harmless side.

*Cross-fitting.* A row is scored by a fit without it: rows belong to folds by their text, so copies are in one fold.

*Cost.* The fits take a bounded sample of the file; scoring takes about as long as reading the words.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, ClassVar

import numpy as np

from safe_sched.audit.detectors.lexicon import NAMES
from safe_sched.audit.detectors.ngrams import GRAMS, Grams, weight_of, words_of
from safe_sched.audit.detectors.sample import Sample, digest
from safe_sched.audit.rows import AuditRow
from safe_sched.audit.signals import Evidence, Sort
from safe_sched.errors import DataError
from safe_sched.mixing.schemas import read
from safe_sched.rows import core_rows

SAMPLE = 2500
"""Distinct prompts of the file that are learnt from."""

POSITIVES = 1500
"""Prompts of the safety set that are learnt from."""

FOLDS = 4
ROUNDS = (0.0, 0.0, 0.5, 0.5, 0.5, 0.5, 0.5)
"""How much a row that is likely harmful counts as a positive, by round."""

_OWN = 0.6  # of the positives' weight, for the package's own prompts beside a set that was given
_BENIGN = 0.35  # of the harmless side's weight, for prompts that are known to be harmless
_STRENGTH = (1.0, 0.3)  # of the fit: first round, later rounds; smaller is smoother
_FIRST_TEXT = 0.5  # words count less in the first round than the lexicon: harmful rows are among the harmless ones
_SHARE = (0.005, 0.3)  # of harmful rows, at least and at most, while learning
_LEAST = 0.1  # q below which a row is no positive
_STEEPEST = 4.0
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
        self._sample = Sample(SAMPLE)
        self._weights: np.ndarray | None = None  # (FOLDS, GRAMS + AREAS)
        self._offsets = np.zeros(FOLDS)
        self._known: np.ndarray | None = None
        self._high = np.inf

    def observe(self, rows: Sequence[AuditRow]) -> None:
        """Keep a sample of the prompts."""
        for row in rows:
            if row.prompt:
                self._sample.add(row.prompt[:_CHARACTERS])

    def ready(self) -> None:
        """Learn."""
        texts = self._sample.texts()
        weights, offsets, known = _learn(self._grams, self._positives, self._own, texts)
        self._weights, self._offsets, self._known = weights, offsets, known.astype(np.float32)
        self._high = float(np.quantile(known, 0.1))

    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        """Log-odds of each row, nan where it has no prompt."""
        assert self._weights is not None, "ready() comes first"
        value = np.full(len(rows), np.nan, np.float32)
        reasons: list[str | None] = [None] * len(rows)
        for number, row in enumerate(rows):
            words = words_of(row.prompt)
            if not words:
                continue
            places, areas = self._grams.indices(words)
            fold = _fold(words)
            weights = self._weights[fold]
            total = weights[places].sum() * weight_of(places.size) + weights[GRAMS:] @ areas + self._offsets[fold]
            value[number] = total
            if value[number] >= self._high:
                reasons[number] = _reason(areas)
        return Evidence(value, reasons, [None] * len(rows))

    def known(self) -> np.ndarray | None:
        """Values of the package's own prompts, each by a fit that has not seen it."""
        return self._known

    def settings(self) -> dict[str, object]:
        """What decides on the values, beside the file."""
        texts = "\n".join([*self._positives, *benign_prompts()])
        return {"sample": SAMPLE, "folds": FOLDS, "rounds": list(ROUNDS), "prompts": f"{digest(texts):016x}"}


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


def _fold(words: Sequence[str]) -> int:
    return zlib.crc32(" ".join(words).encode("utf-8", "replace")) % FOLDS


# learning -----------------------------------------------------------------------------------------------------------


def _learn(
    grams: Grams, positives: Sequence[str], own: int, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights and offset of every fold, and the values of the package's own prompts by fits without them."""
    from scipy.sparse import diags, vstack

    benign = benign_prompts()
    groups = [positives, benign, texts]
    folds = [np.array([_fold(words_of(text)) for text in group], int) for group in groups]
    matrix: Any = vstack([grams.matrix(group) for group in groups], format="csr")
    fold = np.concatenate(folds)
    first: Any = diags(np.where(np.arange(matrix.shape[1]) < GRAMS, _FIRST_TEXT, 1.0))
    small: Any = (matrix @ first).tocsr()
    at, end = len(positives), len(positives) + len(benign)
    base = np.full(len(positives), 1 / own if own == len(positives) else _OWN / own)
    base[own:] = (1 - _OWN) / max(len(positives) - own, 1)
    q = np.zeros(len(texts))
    weights, offsets, values = np.zeros((FOLDS, matrix.shape[1])), np.zeros(FOLDS), np.zeros(matrix.shape[0])
    for number, pull in enumerate(ROUNDS):
        x = matrix if number else small
        for k in range(FOLDS):
            mine = fold == k
            weights[k], offsets[k] = _fit(x, ~mine, base, q, pull, (at, end), _STRENGTH[number > 0])
            values[mine] = x[mine] @ weights[k] + offsets[k]
        q = _chances(values[end:], values[:own], q)
    return weights, offsets, values[:own]


def _fit(
    matrix: Any, used: np.ndarray, base: np.ndarray, q: np.ndarray, pull: float, split: tuple[int, int], strength: float
) -> tuple[np.ndarray, float]:
    """One logistic regression in which both sides weigh the same."""
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression

    at, end = split
    likely = used[end:] & (q > _LEAST)
    positive = np.where(used[:at], base, 0.0)
    share = used[:at].sum() / (used[:at].sum() + pull * q[likely].sum())  # of the positives' weight, for known ones
    harmless, file = used[at:end].astype(float), np.where(used[end:], 1 - q, 0.0)
    known = _BENIGN if file.sum() > 0 else 1.0
    weight = np.concatenate(
        [
            share * positive / positive.sum(),
            known * harmless / harmless.sum(),
            (1 - known) * file / (file.sum() or 1.0),
            (1 - share) * q[likely] / (q[likely].sum() or 1.0),
        ]
    )
    x: Any = vstack([matrix, matrix[end:][likely]], format="csr")
    y = np.concatenate([np.ones(at), np.zeros(used.size - at), np.ones(np.count_nonzero(likely))])
    there = weight > 0
    size = np.count_nonzero(used)
    model: Any = LogisticRegression(C=strength, solver="liblinear", dual=True, tol=1e-2, max_iter=300, random_state=0)
    model.fit(x[there], y[there], sample_weight=weight[there] * size / 2)
    return model.coef_[0], float(model.intercept_[0])


def _chances(values: np.ndarray, known: np.ndarray, q: np.ndarray) -> np.ndarray:
    """How likely each row of the file is harmful: Platt's scaling, and the share that explains itself."""
    if values.size == 0:
        return values
    slope, offset = _platt(known, values, 1 - q)
    logit, share, chance = min(slope, _STEEPEST) * values + offset, 0.05, q
    for _ in range(50):
        chance = _sigmoid(logit + np.log(share / (1 - share)))
        share = float(np.clip(chance.mean(), *_SHARE))
    return chance


def _platt(positive: np.ndarray, negative: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """Slope and offset of a logistic curve between two kinds of values that weigh the same: Newton's steps."""
    x = np.concatenate([positive, negative])
    y = np.concatenate([np.ones(positive.size), np.zeros(negative.size)])
    w = np.concatenate([np.full(positive.size, 1 / positive.size), weight / weight.sum()]) / 2
    slope, offset = 1.0, 0.0
    for _ in range(25):
        p = _sigmoid(slope * x + offset)
        g, h = w * (p - y), np.maximum(w * p * (1 - p), 1e-9)
        gradient = np.array([(g * x).sum() + 1e-3 * (slope - 1), g.sum()])
        cross = (h * x).sum()
        hessian = np.array([[(h * x * x).sum() + 1e-3, cross], [cross, h.sum() + 1e-6]])
        step = np.clip(np.linalg.solve(hessian, gradient), -2, 2)
        slope, offset = slope - step[0], offset - step[1]
    return max(float(slope), 0.1), float(offset)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))
