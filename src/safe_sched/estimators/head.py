"""A head that tells from a row's features how likely the row is harmful; trained by `safe_sched.NeuralBDS`.

With features x (what a model made of the row) and parameters phi, the head gives the log-odds of the row being
*benign*, before any score of the row itself::

    u     =  clip( (x - mean) / std , +-8 ) / sqrt(width)               running moments; |u| is about 1
    z(x)  =  s w.u  +  b                                                "linear"
    z(x)  =  s 1.22 v.tanh(2 A P u + a) / sqrt(H)  +  b                 "mlp", P: a fixed random projection, |P u| ~ |u|

    P(harmful | x)  =  1 - E[ sigmoid(z(x)) ]

The expectation is over the posterior of phi, which an ensemble of chains stands for: their logits are taken as normal,
with the chains' mean and variance, so that a few chains give a smooth answer. Every parameter has a normal prior of
variance 1 (``b`` in units of ``BIAS``), hence the logit of a row that is like no other has variance about ``s**2 +
BIAS**2``, and its interval is wide.

A scorer is saved as one safetensors file with a JSON header; nothing is pickled.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from safe_sched.data.writing import replacing
from safe_sched.errors import DataError, StateError
from safe_sched.estimators.sgld import normal

FORMAT = 1
BIAS = 1.0
"""Prior standard deviation of the bias, in nats."""

_HIDDEN, _PROJECTED = 16, 64
_GAIN, _OUT = 2.0, 1.22  # the second makes the variance of the logit s**2
_CLIP = 8.0
_QUANTILE = 1.6449  # of a standard normal at 95 %

FeatureKind = Literal["hidden", "encoder"]
HeadKind = Literal["linear", "mlp"]


class Scores(NamedTuple):
    """What a head says of some rows, each float32 (rows,).

    Attributes:
        p_harmful: Probability of being harmful.
        low: Its 5 % quantile over the posterior of the head.
        high: Its 95 % quantile.
    """

    p_harmful: Tensor
    low: Tensor
    high: Tensor


def expected_sigmoid(mean: Tensor, variance: Tensor) -> Tensor:
    """``E[sigmoid(z)]`` for normal z, by Gauss and Hermite's sum over 32 points: float64, error below 1e-3.

    Example:
        >>> import torch
        >>> expected_sigmoid(torch.tensor([0.0, 4.0]), torch.tensor([9.0, 0.0]))
        tensor([0.5000, 0.9820], dtype=torch.float64)
    """
    at, weight = _nodes()
    z = mean.double()[..., None] + (2 * variance.double().clamp(min=0)).sqrt()[..., None] * at
    return (torch.sigmoid(z) * weight).sum(-1)


@functools.cache
def _nodes() -> tuple[Tensor, Tensor]:
    at, weight = np.polynomial.hermite.hermgauss(32)
    return torch.from_numpy(at), torch.from_numpy(weight / math.sqrt(math.pi))


def harm(mean: Tensor, variance: Tensor, log_odds: Tensor | float = 0.0) -> Scores:
    """P(harmful) of rows whose benign log-odds are normal, after evidence of their own.

    Args:
        mean: (rows,), of the head's logit.
        variance: (rows,).
        log_odds: (rows,), log-odds of being harmful by the row's own scores.
    """
    mean = mean.double() - log_odds
    reach = _QUANTILE * variance.double().clamp(min=0).sqrt()
    p = 1 - expected_sigmoid(mean, variance)
    return Scores(p.float(), torch.sigmoid(-mean - reach).float(), torch.sigmoid(reach - mean).float())


@dataclass(frozen=True)
class Head:
    """The shape of a head.

    Attributes:
        kind: ``"linear"`` or ``"mlp"``.
        width: Numbers in a row's features.
        std: s, the prior standard deviation of a typical row's logit, in nats.
        seed: Of the projection of an mlp.
    """

    kind: HeadKind
    width: int
    std: float
    seed: int = 0

    @property
    def inputs(self) -> int:
        """Numbers that the head reads of a row."""
        return min(self.width, _PROJECTED) if self.kind == "mlp" else self.width

    @property
    def parameters(self) -> int:
        """Length of phi; the last one is the bias."""
        return self.width + 1 if self.kind == "linear" else _HIDDEN * (self.inputs + 2) + 1

    @property
    def slope(self) -> float:
        """Bound of ``|dz/dphi|**2``, for a row with ``|u| = 1`` and parameters of their prior's size."""
        output = 1.0 if self.kind == "linear" else _OUT**2 * (1 + _GAIN**2 + 1)
        return self.std**2 * output + BIAS**2

    def mirror(self) -> Tensor:
        """float32 (parameters,): the signs that make of a head its mirror image, whose ``z - b`` is negated."""
        sign = -torch.ones(self.parameters)
        if self.kind == "mlp":
            sign[: _HIDDEN * (self.inputs + 1)] = 1.0
        return sign

    def read(self, features: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """Features as the head reads them: u, or its projection; float32 (rows, inputs)."""
        floor = 1e-6 * variance.mean().clamp(min=1e-12)
        u = ((features.float() - mean) / (variance + floor).sqrt()).clamp(-_CLIP, _CLIP) / math.sqrt(self.width)
        return u if self.kind == "linear" or self.inputs == self.width else u @ _projection(self.seed, self.width)

    def logits(self, phi: Tensor, u: Tensor) -> Tensor:
        """z: (rows, chains), from phi (parameters, chains) and u (rows, inputs)."""
        if self.kind == "linear":
            return self.std * (u @ phi[:-1]) + BIAS * phi[-1]
        hidden, v, scale = self._hidden(phi, u)
        return scale * (hidden * v).sum(1) + BIAS * phi[-1]

    def pull(self, phi: Tensor, u: Tensor, slope: Tensor) -> Tensor:
        """``sum over rows of slope * dz/dphi``: (parameters, chains), from slope (rows, chains)."""
        bias = BIAS * slope.sum(0, keepdim=True)
        if self.kind == "linear":
            return torch.cat([self.std * (u.T @ slope), bias])
        hidden, v, scale = self._hidden(phi, u)
        out = scale * (hidden * slope[:, None]).sum(0)
        inner = scale * slope[:, None] * v * (1 - hidden * hidden)
        first = _GAIN * torch.einsum("ri,rhc->hic", u, inner).flatten(0, 1)
        return torch.cat([first, inner.sum(0), out, bias])

    def _hidden(self, phi: Tensor, u: Tensor) -> tuple[Tensor, Tensor, float]:
        """The hidden units (rows, hidden, chains), the output weights (hidden, chains), and their factor."""
        n = _HIDDEN * self.inputs
        first = phi[:n].view(_HIDDEN, self.inputs, -1)
        hidden = torch.tanh(_GAIN * torch.einsum("ri,hic->rhc", u, first) + phi[n : n + _HIDDEN])
        return hidden, phi[n + _HIDDEN : -1], self.std * _OUT / math.sqrt(_HIDDEN)

    def moments(self, phi: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the logit over the chains, each float32 (rows,)."""
        z = self.logits(phi, u)
        mean = z.mean(1)
        return mean, (z - mean[:, None]).square().mean(1)


@functools.cache
def _projection(seed: int, width: int) -> Tensor:
    numbers = normal(seed, torch.arange(width), torch.zeros(width, dtype=torch.long), 1, _PROJECTED)[0]
    return numbers / math.sqrt(_PROJECTED)


@dataclass(frozen=True)
class Scorer:
    """A trained head, for rows that no training run has seen.

    Attributes:
        head: Its shape.
        features: What its features are: ``"hidden"``, the pooled last hidden state of a model, as
            ``safe_sched_hf.measure.features.pool_rows`` makes it; ``"encoder"``, the vector of a sentence encoder.
        phi: float32 (parameters, chains).
        mean, variance: float32 (width,), of the features that it was trained on.
        rows: Training rows that the moments were taken over.

    Example:
        >>> import torch
        >>> head = Head("linear", 2, 2.0)
        >>> phi = torch.tensor([[-4.0, -3.5], [0.0, 0.5], [0.0, 0.0]])  # the first feature is bad news
        >>> scorer = Scorer(head, "hidden", phi, torch.zeros(2), torch.ones(2), 100)
        >>> [round(p, 2) for p in scorer.score(torch.tensor([[2.0, 0.0], [-2.0, 0.0]])).p_harmful.tolist()]
        [1.0, 0.0]
    """

    head: Head
    features: FeatureKind
    phi: Tensor
    mean: Tensor
    variance: Tensor
    rows: int

    def score(self, features: Tensor) -> Scores:
        """P(harmful) of rows by their features alone.

        Args:
            features: float (rows, width).

        Raises:
            DataError: They are of another width than the head was trained on.
        """
        require_width(features, self.head.width)
        u = self.head.read(features.detach().cpu(), self.mean, self.variance)
        return harm(*self.head.moments(self.phi, u))

    def digest(self) -> str:
        """A name for it, by its content: 16 hexadecimal digits."""
        content = hashlib.sha256(json.dumps([asdict(self.head), self.features, self.rows]).encode())
        for tensor in (self.phi, self.mean, self.variance):
            content.update(tensor.contiguous().numpy().tobytes())
        return content.hexdigest()[:16]

    def save(self, path: Path | str) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        header = {"format": FORMAT, "features": self.features, "rows": self.rows, "head": asdict(self.head)}
        tensors = {"phi": self.phi, "mean": self.mean, "variance": self.variance}
        metadata = {"safe_sched_scorer": json.dumps(header, sort_keys=True)}
        with replacing(path) as file:
            file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))

    @staticmethod
    def load(path: Path | str) -> Scorer:
        """Read what `save` wrote.

        Raises:
            StateError: The file is missing, damaged, not a scorer, or of a format that this version cannot read.
        """
        path = Path(path)
        if not path.is_file():
            raise StateError(
                f"no scorer at {path}: write one with NeuralBDS.scorer(state).save(path) after a training run"
            )
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["safe_sched_scorer"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if header["format"] != FORMAT:
                raise StateError(f"{path} has format {header['format']!r}; this version reads {FORMAT}")
            head = Head(**header["head"])
            scorer = Scorer(
                head, header["features"], tensors["phi"], tensors["mean"], tensors["variance"], header["rows"]
            )
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, OSError) as error:
            raise StateError(f"{path} is damaged or not a scorer ({error!r}); save it again") from error
        if (
            scorer.phi.shape[:1] != (head.parameters,)
            or scorer.mean.shape != (head.width,)
            or scorer.variance.shape != (head.width,)
        ):
            raise StateError(
                f"{path} is damaged: its tensors do not have the sizes that its header names; save it again"
            )
        return scorer


def require_width(features: Tensor, width: int) -> None:
    """Raise a `DataError` unless features are (rows, width)."""
    if features.dim() != 2 or features.shape[1] != width:
        raise DataError(
            f"features of shape {tuple(features.shape)} for a head of width {width}: they come from another model or "
            "another encoder than the head was trained on. Use the same one."
        )
