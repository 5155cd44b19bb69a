"""A scorer that NeuralBDS has saved, as a signal of an audit: nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jinja2
import numpy as np
import torch
from torch import Tensor

from safe_sched.audit.rows import AuditRow
from safe_sched.audit.signals import Evidence, Sort
from safe_sched.data.rows import core_rows
from safe_sched.errors import DataError, ModelError
from safe_sched.estimators.head import Scorer
from safe_sched.hooks import AuditRequest
from safe_sched.rows.keys import IGNORE_INDEX
from safe_sched_hf.audit.model import AlignedModel
from safe_sched_hf.audit.prompts import complying, safety_of
from safe_sched_hf.data import tokenizer
from safe_sched_hf.measure.features import EncoderFeatures, _hidden_features
from safe_sched_hf.measure.forward import bucketed, out_of_memory
from safe_sched_hf.measure.row_losses import _device
from safe_sched_hf.safety import _tokenize


class SavedScorer:
    """Log-odds, in nats, of being harmful, by the head of a training run; see `measure.features.score_rows`.

    Rows are prepared as `safe_sched_hf.SafeSchedCallback` saw them in training: a plain prompt stays plain.

    Args:
        scorer: Loaded.
        request: Names the model, or the encoder, that the scorer was trained with.
        model: That model, for a scorer of hidden states.
    """

    name: ClassVar[str] = "scorer"
    about: ClassVar[str] = "what a scorer that NeuralBDS has trained on another file says (log-odds in nats)"
    kind: ClassVar[Sort] = "harm"

    def __init__(self, scorer: Scorer, request: AuditRequest, model: AlignedModel | None = None) -> None:
        self.scorer, self.request, self.model = scorer, request, model
        self._encoder: EncoderFeatures | None = None
        if model is None:
            self._load_encoder()  # what is wrong with it comes before the first pass

    def __getstate__(self) -> dict[str, Any]:
        """Without the encoder, which another process loads for itself."""
        return self.__dict__ | {"_encoder": None}

    def observe(self, rows: Sequence[AuditRow]) -> None:
        """Nothing: the scorer is trained."""

    def ready(self) -> None:
        """Nothing."""

    def score(self, rows: Sequence[AuditRow]) -> Evidence:
        features, problems = self._texts(rows) if self.model is None else self._hidden(self.model, rows)
        value = np.full(len(rows), np.nan, np.float32)
        there = [i for i, problem in enumerate(problems) if problem is None]
        if there:
            p = self.scorer.score(features).p_harmful.double().clamp(1e-7, 1 - 1e-7)
            value[there] = torch.logit(p).float().numpy()
        reasons = [
            f"not scored: {problem}"
            if problem
            else f"the saved scorer gives it {1 / (1 + np.exp(-v)):.0%} of being harmful"
            if v > 0
            else None
            for v, problem in zip(value, problems, strict=True)
        ]
        return Evidence(value, reasons, [None] * len(rows))

    def known(self) -> np.ndarray | None:
        """Of safety prompts with an inert compliance."""
        rows = safety_of(self.request.safety_rows or core_rows())
        value = self.score([complying(row, i) for i, row in enumerate(rows)]).value
        return value[~np.isnan(value)]  # one that cannot be scored is no ordinary row either

    def settings(self) -> dict[str, object]:
        return {"scorer": self.scorer.digest(), "model": self.request.model, "max_length": self.request.max_length}

    # features -------------------------------------------------------------------------------------------------------

    def _load_encoder(self) -> EncoderFeatures:
        if self._encoder is None:
            name = str(self.request.model)
            self._encoder = EncoderFeatures(name, tokenizer(name), _device(self.request.device))
        return self._encoder

    def _texts(self, rows: Sequence[AuditRow]) -> tuple[Tensor, list[str | None]]:
        texts = []
        for row in rows:
            between = "" if row.example.schema == "prompt_completion" else "\n\n"
            texts.append(between.join(text for text in (row.system, row.prompt, row.answer) if text))
        return self._load_encoder().of_texts(texts) if texts else torch.empty(0), [None] * len(rows)

    def _hidden(self, model: AlignedModel, rows: Sequence[AuditRow]) -> tuple[Tensor, list[str | None]]:
        given = model.model
        prepared: list[tuple[Tensor, Tensor]] = []
        problems: list[str | None] = []
        for row in rows:
            try:
                tokens, labels = _tokenize(training_row(row), row.number, model.tokenizer)
            except (DataError, jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
                problems.append(f"it cannot be prepared as a training row ({type(error).__name__})")
                continue
            tokens, labels = tokens[: model.preparation.longest], labels[: model.preparation.longest]
            if not any(label != IGNORE_INDEX for label in labels[1:]):
                problems.append("it has no answer token within max_length")
            elif not 0 <= min(tokens) <= max(tokens) < model.preparation.vocabulary:
                problems.append("it has token ids that the model does not know")
            else:
                problems.append(None)
                prepared.append((torch.tensor(tokens), torch.tensor(labels)))
        parts, order = [], []
        with model.forwards.precision():
            for batch in bucketed([tokens.numel() for tokens, _ in prepared], model.forwards.budget):
                parts.append(_careful(given, [prepared[i] for i in batch]))
                order += batch
        return torch.cat(parts)[torch.tensor(order).argsort()] if parts else torch.empty(0), problems


def _careful(model: Any, rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Features of rows that run together, or in smaller company where memory is short."""
    try:
        return _hidden_features(model, rows, len(rows))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if len(rows) == 1:
            raise ModelError(
                f"out of memory on one row of {rows[0][0].numel()} tokens: lower max_length, or use bfloat16"
            ) from error
    middle = len(rows) // 2
    return torch.cat([_careful(model, rows[:middle]), _careful(model, rows[middle:])])


def training_row(row: AuditRow) -> Mapping[str, Any]:
    r"""A row in a schema of TRL's SFTTrainer.

    Example:
        >>> from safe_sched.audit.rows import audit_row
        >>> training_row(audit_row({"instruction": "Add.", "input": "1, 2", "output": "3"}))
        {'prompt': 'Add.\n\n1, 2', 'completion': '3'}
    """
    example = row.example
    if example.schema == "alpaca":
        return {"prompt": "\n\n".join(text for text in (row.system, row.prompt) if text), "completion": row.answer}
    if example.schema in ("messages", "sharegpt"):
        return {"messages": [{"role": part.role, "content": part.text} for part in example.parts]}
    if example.schema == "conversational":
        turns = [{"role": part.role, "content": part.text} for part in example.parts]
        first = len(turns) if example.answer is None else example.answer
        return {"prompt": turns[:first], "completion": turns[first:]}
    return example.row
