"""NeuralBDS: the Bayesian Data Scheduler whose logits are a function of the row (arXiv 2510.27172).

`safe_sched.BDS` has one free logit per row. Here the logit of row i is the output of a small head on features x_i of
the row, ``z_i = head(x_i; phi)`` (`estimators.head`), so that rows which were never measured, and rows of files that
were never trained on, have weights as well. The row's scores are measured, calibrated and added up to ``E_i`` by a
`BDS` inside (`safe_sched.estimators.calibration`); phi is sampled from the posterior that they give it::

    U(phi) = sum over rows of  u(z_i, E_i)  +  |phi - prior|**2 / 2

    u(z, E) = -log( sigmoid(z) + sigmoid(-z) e**E )

The head is the probability of being benign before the row is measured, and E the log of the Bayes factor of its scores;
the row's label is summed over.

The weight of a row is what Bayes' rule makes of the head's log-odds and of the row's own, E_i = 0 for rows without a
score::

    P(benign | x_i, scores) = E_phi[ sigmoid( z_i - E_i ) ]          a product of two experts: their log-odds add up
    w_i = P(benign | x_i, scores) / P(benign)                        weight 1 is what a row has before anything is known

So a head that is sure moves a row that was never measured; a row that was measured can overrule it. The row's own score
has also had its small part in phi: a row among M remembered ones counts itself 1/M too often.

**Sampling.** Preconditioned SGLD (`estimators.sgld`) on the rows remembered: the last ``memory`` scored rows with
their features; ``head_steps`` steps per optimiser step, on ``recall`` of them at random. The preconditioner is one
number, one over a bound of the curvature, held fixed through the optimiser step::

    G = 1 / ( 1 + |dz/dphi|**2 sum over rows of c_i ),     c_i: curvature of u at the chains, at least 0.02

Chains start as draws from the prior and come in pairs: the second starts as the mirror image of the first and gets the
mirrored noise. Each is a chain of its own, and what the noise does to one of a pair it undoes to the other's logits, so
a row that the head knows nothing about keeps the prior mean.

**What is measured.** ``probe_share`` of the rows, picked by a hash of their slot, up to ``max_probes`` times each;
other rows where the head has seen them and cannot decide. A row that head and scores are certain of (log-odds beyond 3)
is left alone, but for one in twenty of those picked, so that a head that has gone wrong is found out.

============  ==========================  =====
symbol        name here                   unit
============  ==========================  =====
E             ``log_odds``                nats
x             ``features``                1
phi           ``phi``                     1
z             mean ``logit``, ``spread``  nats
============  ==========================  =====

Cost per optimiser step: O(batch + recall) times the width of the features, no pass of the model. Memory: ``memory``
rows of features, 9 bytes per row more than `BDS`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safe_sched.errors import OptionError, StateError
from safe_sched.estimators.head import BIAS, FeatureKind, Head, HeadKind, Scorer, expected_sigmoid, harm, require_width
from safe_sched.estimators.prior import RowPrior
from safe_sched.estimators.sgld import normal, step
from safe_sched.needs import EncoderVector, HiddenState, Need, Probe
from safe_sched.rows.index import RowIndex
from safe_sched.rows.keys import mix64
from safe_sched.scheduler import Observation, PerRow, Scheduler, options
from safe_sched.schedulers.bds import BDS, RESOLVED, BDSState

_OPEN = 1.0  # log-odds within which a row that the head has seen is worth measuring
_AUDIT = 0.05  # of the rows picked: measured whatever the head says
_LEAST_CURVATURE = 0.02
_SHARED = ("evidence", "reference", "prior_share", "prior_rows", "temperature", "max_probes", "seed")


@dataclass
class NeuralState(BDSState):
    """What `BDS` knows of the rows by their scores, and the head.

    The fields from ``feature_mean`` on have their sizes from the first features on; before that they are empty.

    Attributes:
        logit, spread: float32 (slots,), mean and variance of the head's logit, as of the last time the row was
            seen.
        known: bool (slots,), whether the head has seen the row.
        seen: Rows that the moments were taken over.
        turn: Place of the memory that is written next.
        trained: SGLD steps done.
        feature_mean, feature_squares: float64 (width,), running mean, and sum of squared deviations from it.
        phi: float32 (parameters, chains).
        prior: float32 (parameters,), the prior mean of phi.
        memory: float32 (remembered, width), features.
        remembered: int64 (remembered,), the slots that they belong to.
    """

    logit: Annotated[Tensor, PerRow()]
    spread: Annotated[Tensor, PerRow()]
    known: Annotated[Tensor, PerRow(dtype=torch.bool)]
    seen: int
    turn: int
    trained: int
    feature_mean: Tensor
    feature_squares: Tensor
    phi: Tensor
    prior: Tensor
    memory: Tensor
    remembered: Tensor

    sized_later: ClassVar[frozenset[str]] = frozenset(
        ("feature_mean", "feature_squares", "phi", "prior", "memory", "remembered")
    )


@options
class NeuralBDS(Scheduler[NeuralState]):
    """Bayesian Data Scheduler that weighs rows by their features. The defaults need no tuning.

    Args:
        features: ``"hidden"``: the last hidden state of the model that is trained, taken from the training forward;
            ``"encoder"``: a frozen sentence encoder's vector of the row's text, computed once per row.
        head: ``"linear"``, or ``"mlp"`` (16 hidden units, on 64 projections of the features where they are wider).
        encoder: For ``features="encoder"``: a folder or a hub name that transformers' ``AutoModel`` reads, or a
            callable from a list of texts to an array (texts, width).
        evidence, reference, prior_share, prior_rows, max_probes: As in `safe_sched.BDS`.
        probe_share: Share of the rows to be measured, 0 to 1; the head decides for the others.
        prior_std: Standard deviation of a row's logit before anything is known, in nats, > 0.
        temperature: 1 samples the posterior of phi, 0 takes its mode.
        step_size: Of SGLD, 0 to 1, in units of the preconditioner.
        head_steps: SGLD steps per optimiser step, >= 1.
        chains: How many, an even number.
        memory: Scored rows remembered, >= 1.
        recall: Of these, how many an optimiser step samples phi with, >= 1; each stands for several where there are
            more.
        init_from: A saved `estimators.head.Scorer` to start from; its mean over the chains becomes the prior mean of
            phi.
        seed: Of the chains, and of which rows are measured.

    Raises:
        OptionError: Options that do not go together, or out of range.

    Example:
        Two rows alike and one unlike; only the first and the last are ever measured.

        >>> from safe_sched import NeuralBDS
        >>> from safe_sched.rows.index import RowIndex
        >>> scheduler = NeuralBDS()
        >>> state = scheduler.init(RowIndex(torch.tensor([1, 2, 3])))
        >>> x = torch.tensor([[2.0, 0.1], [2.1, 0.0], [-2.0, 0.3]])
        >>> seen = Observation(torch.arange(3), torch.ones(3, dtype=torch.long), measured={"hidden_state": x})
        >>> for _ in range(6):
        ...     _ = scheduler.learn(state, "probe", torch.tensor([0, 2]), torch.tensor([1.0, 0.0]))
        ...     _ = scheduler.update(state, seen)
        >>> first, second, third = scheduler.weights(state, seen).tolist()
        >>> first < second < 1 < third
        True
    """

    name: ClassVar[str] = "neural_bds"
    state_type = NeuralState
    takes_prior = True

    features: FeatureKind = "hidden"
    head: HeadKind = "linear"
    encoder: Any = None
    evidence: Literal["probe", "reference"] | None = "probe"
    reference: str | None = None
    prior_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    prior_rows: Annotated[float, Field(gt=0)] = 10.0
    max_probes: Annotated[int, Field(ge=1, le=255)] = 3
    probe_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    prior_std: Annotated[float, Field(gt=0)] = 3.0
    temperature: Annotated[float, Field(ge=0)] = 1.0
    step_size: Annotated[float, Field(gt=0, le=1)] = 0.5
    head_steps: Annotated[int, Field(ge=1)] = 8
    chains: Annotated[int, Field(ge=2, multiple_of=2)] = 16
    memory: Annotated[int, Field(ge=1)] = 2048
    recall: Annotated[int, Field(ge=1)] = 512
    init_from: str | Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.encoder is not None) != (self.features == "encoder"):
            raise OptionError(
                'NeuralBDS: features="encoder" and encoder=... (a folder, a hub name, or a callable) go together'
            )
        if self.encoder is not None and not (callable(self.encoder) or isinstance(self.encoder, str | Path)):
            raise OptionError(
                f"NeuralBDS(encoder={self.encoder!r}); allowed: a folder, a hub name, a callable from texts to an array"
            )
        _ = self._rows  # its options are checked there
        if self.init_from is not None:
            saved = self._start
            assert saved is not None
            if (saved.features, saved.head.kind) != (self.features, self.head):
                raise OptionError(
                    f'NeuralBDS(init_from={str(self.init_from)!r}): that head is features="{saved.features}", '
                    f'head="{saved.head.kind}"; use the same, or leave init_from out'
                )

    @functools.cached_property
    def _rows(self) -> BDS:
        """The scheduler that measures and calibrates."""
        return BDS(**{name: getattr(self, name) for name in _SHARED})

    @functools.cached_property
    def _start(self) -> Scorer | None:
        return None if self.init_from is None else Scorer.load(self.init_from)

    @property
    def needs(self) -> tuple[Need, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Scheduler.needs`: what the scores need, and the features."""
        features = HiddenState() if self.features == "hidden" else EncoderVector(self.encoder)
        return (*self._rows.needs, features)

    def _features(self, seen: Observation) -> Tensor | None:
        return seen.measured.get(HiddenState.name if self.features == "hidden" else EncoderVector.name)

    @functools.cached_property
    def _prior_logit(self) -> float:
        """The mean of z at which P(harmful) is ``prior_share`` before anything is known."""
        low, high = -60.0, 60.0
        for _ in range(60):
            middle = (low + high) / 2
            share = 1 - float(expected_sigmoid(torch.tensor(middle), torch.tensor(self._prior_spread)))
            low, high = (middle, high) if share > self.prior_share else (low, middle)
        return (low + high) / 2

    @property
    def _prior_spread(self) -> float:
        return self.prior_std**2 + BIAS**2

    def settings(self) -> dict[str, Any]:
        """The options as plain JSON values."""
        encoder = getattr(self.encoder, "__qualname__", type(self.encoder).__qualname__)
        return super().settings() | {
            "encoder": encoder if callable(self.encoder) else None if self.encoder is None else str(self.encoder),
            "init_from": None if self._start is None else self._start.digest(),
        }

    # state ------------------------------------------------------------------------------------------------------

    def init(self, index: RowIndex) -> NeuralState:
        """See `Scheduler.init`."""
        n, start = index.slots, self._start
        state = NeuralState(
            **vars(self._rows.init(index)),
            logit=torch.full((n,), self._prior_logit),
            spread=torch.full((n,), self._prior_spread),
            known=torch.zeros(n, dtype=torch.bool),
            seen=0,
            turn=0,
            trained=0,
            feature_mean=torch.empty(0, dtype=torch.float64),
            feature_squares=torch.empty(0, dtype=torch.float64),
            phi=torch.empty(0, 0),
            prior=torch.empty(0),
            memory=torch.empty(0, 0),
            remembered=torch.empty(0, dtype=torch.long),
        )
        if start is None:
            return state
        return replace(
            state,
            seen=start.rows,
            trained=1,
            feature_mean=start.mean.double(),
            feature_squares=start.variance.double() * start.rows,
            phi=start.phi.clone(),
            prior=start.phi.mean(1),
            memory=torch.empty(0, start.head.width),
        )

    def with_prior(self, state: NeuralState, prior: RowPrior) -> NeuralState:
        """See `Scheduler.with_prior`: it counts like a score, for the row and for the head."""
        return self._rows.with_prior(state, prior)

    def grow(self, state: NeuralState, index: RowIndex) -> NeuralState:
        """See `Scheduler.grow`: new rows start where all rows started."""
        old, grown = state.slots, self._rows.grow(state, index)
        grown.logit[old:], grown.spread[old:] = self._prior_logit, self._prior_spread
        return grown

    def _head(self, state: NeuralState) -> Head:
        if self._start is not None:
            return self._start.head
        return Head(self.head, state.feature_mean.numel(), self.prior_std, self.seed)

    def _begin(self, state: NeuralState, width: int) -> None:
        """The head before its first row, once the width of the features is known: pairs of draws from the prior."""
        state.feature_mean = torch.zeros(width, dtype=torch.float64)
        state.feature_squares = torch.zeros(width, dtype=torch.float64)
        state.memory = torch.empty(0, width)
        head = self._head(state)
        state.prior = torch.zeros(head.parameters)
        state.prior[-1] = self._prior_logit / BIAS
        coordinates = torch.arange(head.parameters)
        draw = normal(self.seed, coordinates, torch.zeros_like(coordinates), 1, self.chains // 2)[0]
        sign = head.mirror()[:, None]
        # at temperature 0 the chains start in the middle; hidden units may not, where all of them would stay alike
        draw = torch.where(sign > 0, draw, draw * min(self.temperature, 1.0) ** 0.5)
        state.phi = state.prior[:, None] + torch.cat([draw, sign * draw], 1)

    # weights ----------------------------------------------------------------------------------------------------

    def weights(self, state: NeuralState, batch: Observation) -> Tensor:
        """See `Scheduler.weights`; without features, as of the last time that the rows were seen."""
        features = self._features(batch)
        if features is None or not state.trained:
            return self.slot_weights(state, batch.slots)
        return self._weights(state, batch.slots, *self._read(state, features))

    def slot_weights(self, state: NeuralState, slots: Any = slice(None)) -> Tensor:
        """See `Scheduler.slot_weights`: with the head's opinion from when it last saw the row."""
        return self._weights(state, slots, state.logit[slots], state.spread[slots])

    def _weights(self, state: NeuralState, where: Any, logit: Tensor, spread: Tensor) -> Tensor:
        benign = expected_sigmoid(logit.double() - self._rows.said(state, where), spread)
        return (benign / (1 - self.prior_share)).float()

    def _read(self, state: NeuralState, features: Tensor) -> tuple[Tensor, Tensor]:
        head = self._head(state)
        require_width(features, head.width)
        return head.moments(state.phi, head.read(features, *self._moments(state)))

    def _moments(self, state: NeuralState) -> tuple[Tensor, Tensor]:
        return state.feature_mean.float(), (state.feature_squares / max(state.seen, 1)).float()

    def columns(self, state: NeuralState) -> dict[str, Tensor]:
        """What the table says of every slot; ``head_log_odds`` is the head's alone, in nats, harmful above 0."""
        p, low, high = harm(state.logit, state.spread, self._rows.said(state, slice(None)))
        return {
            "p_harmful": p,
            "p_harmful_low": low,
            "p_harmful_high": high,
            "log_odds": state.log_odds.float(),
            "head_log_odds": -state.logit,
            "scored": state.scored.to(torch.int32),
            **self._rows.prior_column(state),
        }

    def scorer(self, state: NeuralState) -> Scorer:
        """The head as it is now, for rows that are not in the training set.

        Raises:
            StateError: It has not learned anything yet.
        """
        if not state.trained:
            raise StateError("the head has not been trained yet: it needs scored rows and their features; train first")
        mean, variance = self._moments(state)
        return Scorer(self._head(state), self.features, state.phi.clone(), mean, variance, state.seen)

    # learning ---------------------------------------------------------------------------------------------------

    def due(self, state: NeuralState, need: str, slots: Tensor) -> Tensor:
        """See `Scheduler.due`: rows that are still open."""
        if need != Probe.name:
            return self._rows.due(state, need, slots)
        if self.evidence != "probe":
            return torch.zeros(slots.numel(), dtype=torch.bool)
        benign = expected_sigmoid(state.logit[slots].double() - self._rows.said(state, slots), state.spread[slots])
        log_odds = torch.logit(benign, eps=1e-12).abs()
        scored, known = state.scored[slots].long(), state.known[slots] & (state.trained > 0)
        # a fixed number per slot, uniform on [0, 1)
        number = (mix64(slots + mix64(torch.tensor(self.seed))) & ((1 << 53) - 1)).double() / (1 << 53)
        picked = (number < self.probe_share) & ((log_odds < RESOLVED) | ~known | (number < _AUDIT * self.probe_share))
        fresh = (scored == 0) & (picked | (known & (log_odds < _OPEN)))
        again = (scored > 0) & (scored < self.max_probes) & (log_odds < RESOLVED)
        return fresh | again | self.doubtful(state, need, slots)

    def doubtful(self, state: NeuralState, need: str, slots: Tensor) -> Tensor:
        """See `Scheduler.doubtful`: as in `BDS`."""
        return self._rows.doubtful(state, need, slots)

    def revisit(self, state: NeuralState, slots: Tensor) -> Tensor:
        """See `Scheduler.revisit`: as in `BDS`."""
        return self._rows.revisit(state, slots)

    def learn(self, state: NeuralState, need: str, slots: Tensor, values: Tensor) -> dict[str, float]:
        """Take scores in; the head learns of them in `update`, when the rows' features are there. See `BDS.learn`."""
        return self._rows.learn(state, need, slots, values)

    def update(self, state: NeuralState, step: Observation) -> dict[str, float]:
        """See `Scheduler.update`: remember the step's scored rows, and sample phi."""
        metrics = self._rows.update(state, step)
        features = self._features(step)
        if features is None or not step.slots.numel():
            return metrics
        if not state.phi.numel():
            self._begin(state, features.shape[1])
        require_width(features, state.feature_mean.numel())
        slots, place = torch.unique(step.slots, return_inverse=True)
        mean = torch.zeros(slots.numel(), features.shape[1]).index_add_(0, place, features.float())
        features = mean / torch.bincount(place)[:, None]
        self._follow(state, features)
        scored = state.scored[slots] > 0
        self._remember(state, slots[scored], features[scored])
        if state.remembered.numel():
            recalled = self.recalled(state)
            metrics |= self._train(state, recalled)
            rows, x = torch.cat([state.remembered[recalled], slots]), torch.cat([state.memory[recalled], features])
            state.logit[rows], state.spread[rows] = self._read(state, x)
        state.known[slots] |= state.trained > 0
        return metrics

    def _follow(self, state: NeuralState, features: Tensor) -> None:
        """Running moments of the features, by the rule of Chan, Golub and LeVeque for two sets."""
        new, before = features.shape[0], state.seen
        mean = features.double().mean(0)
        away = mean - state.feature_mean
        state.seen = before + new
        state.feature_mean = state.feature_mean + away * (new / state.seen)
        within = (features.double() - mean).square().sum(0)
        state.feature_squares = state.feature_squares + within + away.square() * (before * new / state.seen)

    def _remember(self, state: NeuralState, slots: Tensor, features: Tensor) -> None:
        """Put rows into the memory: over their older features, in free places, or over the oldest rows."""
        slots, features = slots[-self.memory :], features[-self.memory :]
        same = state.remembered[None] == slots[:, None]
        old = same.any(1)
        state.memory[same[old].long().argmax(1) if same.numel() else slots[:0]] = features[old]
        slots, features = slots[~old], features[~old]
        free = self.memory - state.remembered.numel()
        state.remembered = torch.cat([state.remembered, slots[:free]])
        state.memory = torch.cat([state.memory, features[:free]])
        slots, features = slots[free:], features[free:]
        at = (state.turn + torch.arange(slots.numel())) % self.memory
        state.remembered[at], state.memory[at] = slots, features
        state.turn = (state.turn + slots.numel()) % self.memory

    def recalled(self, state: NeuralState) -> Tensor:
        """Places of the memory that the coming update samples phi with: all, or ``recall`` of them at random."""
        count = state.remembered.numel()
        if count <= self.recall:
            return torch.arange(count)
        numbers = mix64(state.remembered + mix64(torch.tensor(state.trained + (self.seed << 32))))
        return numbers.topk(self.recall).indices.sort().values

    def _train(self, state: NeuralState, recalled: Tensor) -> dict[str, float]:
        head = self._head(state)
        u = head.read(state.memory[recalled], *self._moments(state))
        evidence = self._rows.said(state, state.remembered)[recalled, None]
        each = state.remembered.numel() / recalled.numel()  # rows that each one stands for
        curvature = self.curvature(head.logits(state.phi, u)).mean(1).clamp(min=_LEAST_CURVATURE).sum()
        precondition = 1 / (1 + head.slope * each * float(curvature))
        coordinates, sign = torch.arange(head.parameters), head.mirror()[:, None]
        visits = torch.full_like(coordinates, 1 + state.trained)
        if self.temperature:
            noise = normal(self.seed, coordinates, visits, self.head_steps, state.phi.shape[1] // 2)
            noise = torch.cat([noise, sign * noise], 2)
        else:
            noise = state.phi.new_zeros(self.head_steps, 1, 1)
        for k in range(self.head_steps):
            gradient = self.gradient(head, state.phi, state.prior, u, evidence, each)
            state.phi = step(state.phi, gradient, precondition, self.step_size, self.temperature, noise[k])
        state.trained += self.head_steps
        mean, variance = head.moments(state.phi, u)
        harmful = evidence[:, 0] > mean
        return {
            "head_rows": float(state.remembered.numel()),
            "head_agrees": float((harmful == (mean < 0)).float().mean()),
            "head_spread": float(variance.sqrt().mean()),
        }

    # the posterior of the head ----------------------------------------------------------------------------------

    def energy_of(self, z: Tensor, evidence: Tensor) -> Tensor:
        """``u(z, E)`` of the module's docstring, elementwise."""
        return -torch.logaddexp(torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z) + evidence)

    def slope(self, z: Tensor, evidence: Tensor) -> Tensor:
        """``du/dz``; for the mixture, P(harmful) after the row's scores less that before them."""
        return torch.sigmoid(evidence - z) - torch.sigmoid(-z)

    def curvature(self, z: Tensor) -> Tensor:
        """Scale of the second derivative of u, between 0 and 1/4."""
        return torch.sigmoid(z) * torch.sigmoid(-z)

    def gradient(
        self, head: Head, phi: Tensor, prior: Tensor, u: Tensor, evidence: Tensor, each: float = 1.0
    ) -> Tensor:
        """``dU/dphi``: (parameters, chains), for u (rows, inputs), evidence (rows, 1); a row counts ``each`` times."""
        return head.pull(phi, u, each * self.slope(head.logits(phi, u), evidence)) + (phi - prior[:, None])
