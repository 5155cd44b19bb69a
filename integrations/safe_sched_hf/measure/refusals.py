"""What Antibody needs of the model: ratios of answers and refusals, taken before an optimiser step trains on the rows.

All forwards here are without gradient, in evaluation mode and without hooks on the model; they leave parameters,
gradients and random numbers as they were. Only ``refusal_cost="first_token"`` reads the training forward instead.

Of several ranks each asks about its own rows. What all of them ask, the safety prompts, is answered by rank 0: their
numbers may differ in the last digits, and all must go by the same.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from safe_sched.data.rows import core_refusals
from safe_sched.errors import DataError, StateError
from safe_sched.estimators.refusal_odds import (
    PHRASE,
    Answer,
    Branches,
    answers_of,
    branch_log_probs,
    branches_of,
    grow,
    log_odds,
    openings_of,
    opens_with,
)
from safe_sched.needs import RefusalOdds
from safe_sched.rows.keys import IGNORE_INDEX, batch_fields
from safe_sched.training.forward import Forward
from safe_sched.training.loop import Measurement, Run
from safe_sched.training.ranks import Alone, Exchange
from safe_sched.training.session import Batch
from safe_sched_hf.distributed import first_of, of_all
from safe_sched_hf.rows import leaving_random_numbers
from safe_sched_hf.safety import SafetySet, assistant_mark, pad_rows

T = TypeVar("T")

REFRESH = 12
"""Optimiser steps after which safety prompts are looked at again, while ratios are taken; later, a quarter of all."""

_PROMPTS = 32  # safety prompts of a calibration
_AT_START = 64  # rows collated at once by a pass over all: like lengths are then put together
_OPENINGS, _MASS = 16, 0.99  # of the openings, those that the model uses on safety prompts
_COMPLIANCES = (
    "Sure, here is how to do it: [withheld].",
    "Of course. These are the steps: [withheld].",
    "Yes, I can help with that. First, [withheld].",
    "Here is what you asked for: [withheld].",
)
_ADAPTER_OFF, _AS_IT_TRAINS = 1, 2  # sources


@dataclass(frozen=True)
class Pending:
    """What of some rows' ratios is known before their training forward.

    Attributes:
        due: bool (rows,).
        answers: Theirs, where the forward is still to be read; or none.
        refusal: float (rows,), NLL of refusals in nats, where only the answer's own is lacking.
        needs_nll: Whether the answer's own NLL is lacking.
    """

    due: Tensor
    answers: Sequence[Answer] = ()
    refusal: Tensor | None = None
    needs_nll: bool = False


class RefusalOddsMeasurement(Measurement[RefusalOdds]):
    """Takes the ratios of answers and refusals; see `safe_sched.schedulers.antibody`.

    What it saves: ``observed``, the step at which safety prompts were asked last; ``source``, 0 before the
        calibration, 1
    the adapter switched off, 2 the model as it trains; ``openings``, which of the known openings are compared with.
    """

    safety = "default"

    unsharded = "Antibody, which asks each rank's model about other rows"

    def begin(self, run: Run) -> None:
        """See `Part.begin`.

        Raises:
            DataError: The safety rows are whole texts, or there are no refusals to compare with.
        """
        super().begin(run)
        self.safety_set: SafetySet = self.safety_rows
        if any(int(labels[0]) != IGNORE_INDEX for _, labels in self.safety_set.rows):
            raise DataError(
                "Antibody asks what the model would answer to safety prompts, and a safety row has no prompt before "
                "its labels. Give safety_data as prompt and completion, or as messages."
            )
        self.tokenizer = self.safety_set.tokenizer
        self.mark = (assistant_mark(self.tokenizer) if self.tokenizer is not None else None) or []
        self.skip: list[int] = []
        self.refusals: list[list[int]] = []
        self.openings: list[tuple[int, ...]] = []
        self.observed, self.source = 0, 0
        self.chosen = torch.empty(0, dtype=torch.long)
        self._known: list[tuple[int, ...]] = []
        self._shared = True
        self._ready = False
        self._pending: dict[int, Pending] = {}
        self._exchange: Exchange = run.exchange
        self._kept_back: list[tuple[Tensor, Tensor]] | None = None  # ratios for one exchange at the end

    def save(self) -> dict[str, Tensor]:
        """See `Part.save`."""
        return {
            "observed": torch.tensor(self.observed),
            "source": torch.tensor(self.source),
            "openings": self.chosen,
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Part.load`."""
        if tensors.keys() != {"observed", "source", "openings"}:
            raise StateError(
                f"the saved state holds {sorted(tensors)} of {self.name!r}; needed: observed, source and openings. "
                "Resume from another checkpoint, or start again without resuming."
            )
        self.observed, self.source = int(tensors["observed"]), int(tensors["source"])
        self.chosen = tensors["openings"]

    @property
    def _kind(self) -> str:
        """The ratio that is taken now: another than asked for after a fallback."""
        now = self.run.session.needs().get(self.name, self.need)
        assert isinstance(now, RefusalOdds)
        return now.ratio

    def _unread(self, slots: Tensor) -> Tensor:
        return self.run.session.unknown(self.name, slots)

    def _due(self, slots: Tensor) -> Tensor:
        return self.run.session.due(self.name, slots)

    # a step -----------------------------------------------------------------------------------------------------

    def before_step(self, batches: Sequence[Batch]) -> None:
        """Take the ratios of the rows of an optimiser step that are due, as far as no training forward is needed."""
        self._pending = {}
        self._set_up(batches)
        session, step = self.run.session, self.run.step
        slots = [batch.slots_of_all for batch in batches]
        asked = (self._unread(some) | session.doubtful(self.name, some) for some in slots)
        if not any(bool(rows.any()) for rows in asked):
            return
        watched = self.need.anchor or self.need.on_inversion != "ignore"
        if watched and step - self.observed >= max(REFRESH, step // 4):
            self.observed = step
            with self._asking(adapter=True):
                refused = self._log_odds(self._prompts)
            (refused,) = first_of(self._exchange, "refused", refused)
            unread = self.source != _ADAPTER_OFF and any(bool(self._unread(some).any()) for some in slots)
            session.calibrate(self.name, {"refused": refused, "unread": torch.tensor(unread or not self.need.anchor)})
        due = [(self._due(batch.slots), self._due(batch.slots_of_all)) for batch in batches]
        ahead = self.need.ahead and len(batches) > 1
        for batch, (rows, of_ranks) in zip(batches, due, strict=True):
            if bool(of_ranks.any()):
                self._read(batch, rows, of_ranks, ahead=ahead)

    def _set_up(self, batches: Sequence[Batch], exchange: Exchange | None = None) -> None:
        if not self._ready:
            self._prepare(batches)
        if not self.source:
            self._calibrate(batches, exchange or self._exchange)

    def ready(self) -> None:
        """Take the ratios of all rows before the first step, where ``anchor="start"`` asks for it.

        A stream is left to be read as it comes.
        """
        run, session = self.run, self.run.session
        if self.need.anchor != "start" or session.steps or session.index.streaming:
            return
        dataset, collate = run.dataset, run.collate
        assert collate is not None
        bar = tqdm(total=len(dataset), desc="asking about rows", unit="row", disable=not run.progress, leave=False)
        exchange, self._kept_back = self._exchange, []

        def read(start: int) -> Batch:
            items = [dataset[i] for i in range(start, min(start + _AT_START, len(dataset)))]
            return session.identify(*batch_fields(collate(items)))

        with bar, leaving_random_numbers():
            self._exchange = Alone()  # all ranks look at the same rows first
            self._set_up([read(0)], exchange)
            self._exchange = exchange
            starts = range(0, len(dataset), _AT_START)
            # where the adapter can be switched off, the start can be asked at any time
            for start in starts[exchange.rank :: exchange.ranks] if self.source != _ADAPTER_OFF else ():
                batch = read(start)
                due = self._due(batch.slots)
                if bool(due.any()):
                    self._read(batch, due, self._due(batch.slots_of_all), ahead=True)
                bar.update(_AT_START * exchange.ranks)
        kept, self._kept_back = self._kept_back, None
        if self.source != _ADAPTER_OFF:
            none = (torch.empty(0, dtype=torch.long), torch.empty(0))
            slots, found = (torch.cat(parts) for parts in zip(none, *kept, strict=True))
            session.learn(self.name, slots, found)

    def _read(self, batch: Batch, due: Tensor, of_ranks: Tensor, *, ahead: bool) -> None:
        """Take the ratios of the rows ``due``; those due on all ranks, ``of_ranks``, say which exchanges there are."""
        kind = self._kind
        from_training = self.need.cost == "first_token" and not ahead
        again = due & ~self._unread(batch.slots) if self.need.anchor else due
        later = of_ranks & ~self._unread(batch.slots_of_all) if self.need.anchor else of_ranks
        # a first look is at the start, a later one at the model as it is
        looks = ((due & ~again, of_ranks & ~later, self.source != _ADAPTER_OFF), (again, later, True))
        for rows, anywhere, adapter in looks:
            if not bool(anywhere.any()):
                continue
            waits = from_training or (kind != "opening" and adapter and not ahead)
            if not bool(rows.any()):  # another rank's
                nothing = torch.zeros(batch.layout.rows)
                if waits:
                    missing = None if from_training else nothing
                    self._keep(batch, Pending(rows, refusal=missing, needs_nll=kind != "opening"))
                else:
                    self._take(batch, rows, nothing)
                continue
            answers = self._answers(batch, rows)
            if from_training:
                self._keep(batch, Pending(rows, answers, needs_nll=kind != "opening"))
                continue
            with self._asking(adapter=adapter):
                if kind == "opening":
                    found = self._openings(batch, answers)
                else:
                    refusal = self._refusal_nll(batch, answers)
                    if waits:
                        self._keep(batch, Pending(rows, refusal=refusal, needs_nll=True))
                        continue
                    found = refusal - self._completion_nll(batch, rows)
            self._take(batch, rows, found)

    def _take(self, batch: Batch, rows: Tensor, found: Tensor) -> None:
        if self._kept_back is None:
            self.run.session.learn(self.name, batch.slots[rows], found[rows])
        else:
            self._kept_back.append((batch.slots[rows], found[rows]))

    def _keep(self, batch: Batch, pending: Pending) -> None:
        before = self._pending.get(id(batch))
        if before is not None:  # first and later looks in one micro-batch, both at the model as it trains
            refusal = pending.refusal
            if refusal is not None and before.refusal is not None:
                refusal = torch.where(pending.due, refusal, before.refusal)
            pending = Pending(before.due | pending.due, [*before.answers, *pending.answers], refusal, pending.needs_nll)
        self._pending[id(batch)] = pending

    def after_forward(self, batch: Batch, forward: Forward) -> None:
        """Complete the ratios of a micro-batch with what its training forward shows."""
        pending = self._pending.pop(id(batch), None)
        if pending is None:
            return
        kind, due = self._kind, pending.due
        found = pending.refusal
        if not bool(due.any()):  # another rank's
            found, kind = torch.zeros(batch.layout.rows), "opening"
        elif found is None:
            places = torch.tensor([answer.at for answer in pending.answers])
            first = torch.tensor([opening[0] for opening in self.openings])
            logits = forward.logits_at(places[:, 0], places[:, 1]).float()
            log_p = (logits[:, first.to(logits.device)].logsumexp(-1) - logits.logsumexp(-1)).cpu()
            if kind == "opening":
                with self._asking(adapter=True):
                    found = self._row_ratios(batch, pending.answers, log_odds(log_p))
            else:
                found = _least(batch, pending.answers, -log_p)
        if kind != "opening":
            scale = batch.label_tokens if kind == "sequence_sum" else 1
            found = found - forward.nll.cpu().float() * scale
        self.run.session.learn(self.name, batch.slots[due], found[due])

    # before the first step ----------------------------------------------------------------------------------------

    def _answers(self, batch: Batch, rows: Tensor) -> list[Answer]:
        return answers_of(batch.input_ids, batch.labels, batch.layout, rows, self.mark, self.skip)

    def _prepare(self, batches: Sequence[Batch]) -> None:
        """Find out how refusals are written between the training rows."""
        shown: list[Tensor] = []
        for batch in batches:
            mine = [answer.tokens for answer in self._answers(batch, batch.slots >= 0)]
            shown += of_all(self._exchange, "answers", mine)
        own = [tokens[int((labels != IGNORE_INDEX).nonzero()[0]) :].tolist() for tokens, labels in self.safety_set.rows]
        if self.tokenizer is None:
            if self.need.refusals is not None:
                raise DataError("Antibody(refusals=...) needs the trainer's tokenizer: give it processing_class=...")
            self.refusals, self._compliances = own, []
        else:
            lead = self._lead(shown)
            texts = core_refusals() if self.need.refusals is None else self.need.refusals
            self.refusals, self._compliances = (self._as_answers(some, lead) for some in (texts, _COMPLIANCES))
        everyone = [*(tokens.tolist() for tokens in shown[:64]), *own, *self.refusals]
        same = 0
        while same < min(map(len, everyone)) - 1 and len({answer[same] for answer in everyone}) == 1:
            same += 1
        self.skip = everyone[0][:same]
        self.refusals = [answer[same:] for answer in self.refusals]
        self._compliances = [answer[same:] for answer in self._compliances]
        self._own = [answer[same:] for answer in own]
        every = max(1, len(own) // _PROMPTS)
        starts = [
            tokens.numel() - len(answer) + same for (tokens, _), answer in zip(self.safety_set.rows, own, strict=True)
        ]
        rows = list(zip(self.safety_set.rows, starts, self._own, strict=True))[::every][:_PROMPTS]
        self._prompts = [tokens[:start] for (tokens, _), start, _ in rows]
        self._own_of_prompts = [answer for *_, answer in rows]
        ends = [answer[-1] for answer in self._own]
        self._end = max(set(ends), key=ends.count)
        known = [*self._own, *self.refusals]
        self._known = openings_of(known)
        length = 1 if self.need.cost == "first_token" else PHRASE
        self._candidates = openings_of(known, length)
        if self.chosen.numel():
            self.openings = [self._candidates[i] for i in self.chosen.tolist()]
        self._ready = True

    def _lead(self, shown: Sequence[Tensor]) -> str:
        """The white space with which plain completions begin, if most do."""
        if self.safety_set.chat:
            return ""
        texts = [str(self.tokenizer.decode(tokens.tolist())) for tokens in shown]
        leads = [text[: len(text) - len(text.lstrip())] for text in texts]
        most = max(set(leads), key=leads.count) if leads else ""
        return most if 2 * leads.count(most) > len(leads) else ""

    def _as_answers(self, texts: Sequence[str], lead: str) -> list[list[int]]:
        rows: list[dict[str, Any]] = [{"prompt": "Hello", "completion": lead + text} for text in texts]
        found = SafetySet(rows, self.tokenizer, None, 1, 0, self.safety_set.chat).rows
        return [tokens[int((labels != IGNORE_INDEX).nonzero()[0]) :].tolist() for tokens, labels in found]

    def _calibrate(self, batches: Sequence[Batch], exchange: Exchange) -> None:
        (source,) = first_of(exchange, "source", torch.tensor(self._find_source()))
        self.source = int(source)
        adapter = self.source != _ADAPTER_OFF
        with self._asking(adapter=adapter):
            if not self.openings:
                self._choose_openings(exchange)
            refused = self._log_odds(self._prompts)
            refusing, complying, others = refused, -refused, torch.empty(0)
            if self.need.ratio != "opening" and self._compliances:
                total = self.need.ratio == "sequence_sum"
                mine, picked = [], []
                for i in range(len(self._prompts)):
                    mine.append([self.refusals[i % len(self.refusals)]])
                    picked.append([self._compliances[i % len(self._compliances)]])
                if self.need.cost == "first_token":
                    refusal = -self._opening_log_probs(self._prompts).logsumexp(-1)
                else:
                    refusal = self._nll(self._prompts, mine, total=total)
                refusing = refusal - self._nll(self._prompts, [[own] for own in self._own_of_prompts], total=total)
                complying = refusal - self._nll(self._prompts, picked, total=total)
                others = self._ratios_of_others(batches)
        found = first_of(exchange, "calibration", refused, refusing, complying, others)
        self.run.session.calibrate(
            self.name, dict(zip(("refused", "refusing", "complying", "others"), found, strict=True))
        )

    def _ratios_of_others(self, batches: Sequence[Batch]) -> Tensor:
        """Ratios of the step's rows whose prompts the model would rather answer."""
        found = []
        for batch in batches:
            rows = batch.slots >= 0
            answers = self._answers(batch, rows)
            mine = torch.empty(0)
            if answers:
                ratio = self._refusal_nll(batch, answers) - self._completion_nll(batch, rows)
                refused = _least(batch, answers, -self._log_odds([answer.prompt for answer in answers]))
                mine = ratio[rows & (refused > 0)]
            found += [theirs for (theirs,) in self._exchange("ratios", mine)]
        return torch.cat(found)

    def _find_source(self) -> int:
        """Whether the model without its adapter is the one that training begins with."""
        configs = getattr(self.run.model, "peft_config", {})
        plain = all(getattr(config, "bias", "none") == "none" for config in configs.values())
        if not (self.need.anchor and configs and plain and self.need.cost != "first_token"):
            return _AS_IT_TRAINS
        some = self._prompts[:2]
        with self._asking(adapter=True):
            now = self._last_logits(some)
        with self._asking(adapter=False):
            start = self._last_logits(some)
        return _ADAPTER_OFF if torch.allclose(now, start, atol=1e-3, rtol=1e-3) else _AS_IT_TRAINS

    def _choose_openings(self, exchange: Exchange) -> None:
        """Of all openings keep those with which the model does refuse: the others cost and say nothing."""
        self.openings = self._candidates
        self._check_shared()
        (mass,) = first_of(exchange, "openings", self._opening_log_probs(self._prompts).exp().mean(0))
        order = mass.argsort(descending=True)
        enough = int((mass[order].cumsum(0) < _MASS * mass.sum()).sum()) + 1
        self.chosen = order[: min(enough, _OPENINGS)].sort().values.cpu()
        self.openings = [self._candidates[i] for i in self.chosen.tolist()]

    def _check_shared(self) -> None:
        """Some models cannot have refusals share a prompt: those that are recurrent, or pick their own masks."""
        some = min(self._prompts, key=len), max(self._prompts, key=len)
        few = branches_of(self._candidates[:: max(1, len(self._candidates) // 4)])
        try:
            shared = torch.stack(self._branched(some, [few, few]))
            reason = "its answers differ from those of separate lines"
        except (ValueError, RuntimeError, TypeError, NotImplementedError) as error:
            shared, reason = torch.tensor(torch.inf), str(error)
        separate = torch.stack(self._branched(some, [few, few], exact=True))
        # 16-bit floats differ by some per cent of a log-probability
        self._shared = bool(((shared - separate).abs() < 0.1 + 0.02 * separate.abs()).all())
        if not self._shared:
            warnings.warn(
                f"Antibody: refusals cannot share a prompt in this model ({reason}). Every one gets a line of its "
                'own, as with refusal_cost="exact".',
                stacklevel=2,
            )

    # ratios -----------------------------------------------------------------------------------------------------

    def _openings(self, batch: Batch, answers: Sequence[Answer]) -> Tensor:
        exact = self.need.cost == "exact"
        return self._row_ratios(batch, answers, self._log_odds([answer.prompt for answer in answers], exact=exact))

    def _row_ratios(self, batch: Batch, answers: Sequence[Answer], refused: Tensor) -> Tensor:
        """Ratios of openings of rows: float (rows,); inf for those without an answer here."""
        refuses = torch.tensor([opens_with(answer.tokens, self._known) for answer in answers])
        ratio = torch.where(refuses, refused, -refused)
        if bool(refuses.any()):
            rest = [answer for answer, yes in zip(answers, refuses.tolist(), strict=True) if yes]
            ratio[refuses] = torch.minimum(ratio[refuses], self._ends(rest))
        return _least(batch, answers, ratio)

    def _ends(self, answers: Sequence[Answer]) -> Tensor:
        """How likely refusals go on as they do: log-odds of not ending, at the place where the model most would.

        A refusal that goes on where the model would have ended it may go on to comply.
        """
        found = []
        for some in _batched(answers, self._at_once):
            lines = [torch.cat([answer.prompt, answer.tokens]) for answer in some]
            logits = self._forward(*pad_rows(lines, self.safety_set.pad))
            for line, answer in zip(logits, some, strict=True):
                said = answer.tokens.tolist()
                stop = said.index(self._end) if self._end in said else len(said)
                first = answer.prompt.numel()
                at = line[first : first + stop - 1].float()  # before its second, third, ... token
                log_p = at[:, self._end] - at.logsumexp(-1)
                found.append(-log_odds(log_p).max() if log_p.numel() else at.new_tensor(torch.inf))
        return torch.stack(found).cpu()

    def _log_odds(self, prompts: Sequence[Tensor], *, exact: bool = False) -> Tensor:
        """Log-odds of refusing: float (prompts,), nats."""
        return log_odds(self._opening_log_probs(prompts, exact=exact).logsumexp(-1))

    def _opening_log_probs(self, prompts: Sequence[Tensor], *, exact: bool = False) -> Tensor:
        """Of every opening on every prompt: float (prompts, openings)."""
        branches = [branches_of(self.openings)] * len(prompts)
        return torch.stack([found.sum(-1) for found in self._branched(prompts, branches, exact=exact)])

    def _refusal_nll(self, batch: Batch, answers: Sequence[Answer]) -> Tensor:
        """NLL of some refusals in the place of every row's answer: float (rows,); inf for rows without one here."""
        prompts = [answer.prompt for answer in answers]
        if self.need.cost == "first_token":
            nll = -self._opening_log_probs(prompts).logsumexp(-1)
        else:
            count = min(self.need.refusals_per_row, len(self.refusals))
            keys = self.run.session.index.keys[batch.slots.clamp(min=0)].tolist()
            chosen = [
                [self.refusals[(keys[answer.row] + i) % len(self.refusals)] for i in range(count)] for answer in answers
            ]
            exact = self.need.cost == "exact"
            nll = self._nll(prompts, chosen, total=self._kind == "sequence_sum", exact=exact)
        return _least(batch, answers, nll)

    def _nll(
        self,
        prompts: Sequence[Tensor],
        continuations: Sequence[Sequence[Sequence[int]]],
        *,
        total: bool,
        exact: bool = False,
    ) -> Tensor:
        """Mean over continuations of their NLL, per token or in total: float (prompts,)."""
        found = self._branched(prompts, [branches_of(some) for some in continuations], exact=exact)
        means = []
        for log_p, some in zip(found, continuations, strict=True):
            sums = -log_p.sum(-1)
            means.append((sums if total else sums / torch.tensor([len(one) for one in some])).mean())
        return torch.stack(means)

    def _completion_nll(self, batch: Batch, rows: Tensor) -> Tensor:
        """NLL of rows' own answers, by a forward of its own: float (rows,), 0 for other rows."""
        where, numbers = batch.layout.row.cpu(), rows.nonzero().flatten().tolist()
        ids, labels = batch.input_ids.cpu(), batch.labels.cpu()
        nll = torch.zeros(batch.layout.rows)
        for some in _batched(numbers, self._at_once):
            lines = [ids[where == row] for row in some]
            logits = self._forward(*pad_rows(lines, self.safety_set.pad))
            for line, row in zip(logits, some, strict=True):
                targets = labels[where == row][1:].to(line.device)
                loss = nn.functional.cross_entropy(line[: targets.numel()].float(), targets, reduction="sum")
                nll[row] = float(loss) / (1 if self._kind == "sequence_sum" else int((targets >= 0).sum()))
        return nll

    # forwards ---------------------------------------------------------------------------------------------------

    @property
    def _at_once(self) -> int:
        return max(1, 2 * self.run.rows_at_once)

    @contextlib.contextmanager
    def _asking(self, *, adapter: bool) -> Iterator[None]:
        """The model as it is, or as training began, in evaluation mode."""
        model: Any = self.run.model
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                stack.enter_context(self.run.precision())
                if not adapter:
                    stack.enter_context(model.disable_adapter())
                yield
        finally:
            for module in training:
                module.training = True

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor | None = None, keep: int = 0) -> Tensor:
        device = self.run.device
        more: dict[str, Any] = {} if positions is None else {"position_ids": positions.to(device)}
        if keep and _can_keep(self.run.model):
            more["logits_to_keep"] = keep
        logits = self.run.model(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **more
        ).logits
        return logits[:, -keep:] if keep else logits

    def _last_logits(self, prompts: Sequence[Tensor]) -> Tensor:
        ids, mask = pad_rows(prompts, self.safety_set.pad)
        logits = self._forward(ids, mask)
        return logits[torch.arange(len(prompts)), (mask.sum(1) - 1).to(logits.device)].float()

    def _branched(
        self, prompts: Sequence[Tensor], branches: Sequence[Branches], *, exact: bool = False
    ) -> list[Tensor]:
        """Log-probabilities of continuations of prompts; see `safe_sched.estimators.refusal_odds.branch_log_probs`."""
        shared = self._shared and not exact
        found: list[Tensor] = []
        # like lengths together: padding costs as much as tokens
        order = sorted(range(len(prompts)), key=lambda i: prompts[i].numel())
        for some in _batched(order, self._at_once):
            here, ways = [prompts[i] for i in some], [branches[i] for i in some]
            found += self._sharing(here, ways) if shared else self._separate(here, ways)
        back = sorted(range(len(order)), key=lambda place: order[place])
        return [found[place] for place in back]

    def _sharing(self, prompts: Sequence[Tensor], branches: Sequence[Branches]) -> list[Tensor]:
        ids, positions, seen = grow(prompts, branches, self.safety_set.pad)
        nodes = max(branch.tokens.numel() for branch in branches)
        # eager attention adds its mask, the fused kernel takes a choice
        config: Any = self.run.model.config
        if config._attn_implementation == "sdpa":
            mask = seen
        else:
            mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        logits = self._forward(ids, mask, positions, keep=1 + nodes)
        return [found.cpu() for found in branch_log_probs(logits, branches)]

    def _separate(self, prompts: Sequence[Tensor], branches: Sequence[Branches]) -> list[Tensor]:
        lines: list[tuple[Tensor, Tensor]] = []
        for prompt, branch in zip(prompts, branches, strict=True):
            lines += [(prompt, target[target != IGNORE_INDEX]) for target in branch.targets]
        log_p: list[Tensor] = []
        for some in _batched(lines, self._at_once):
            logits = self._forward(*pad_rows([torch.cat(line) for line in some], self.safety_set.pad))
            for line, (prompt, target) in zip(logits, some, strict=True):
                at = line[prompt.numel() - 1 : prompt.numel() - 1 + target.numel()].float()
                log_p.append(-nn.functional.cross_entropy(at, target.to(at.device), reduction="none").cpu())
        found, first = [], 0
        for branch in branches:
            count, longest = branch.targets.shape
            padded = torch.zeros(count, longest)
            for i in range(count):
                padded[i, : log_p[first + i].numel()] = log_p[first + i]
            found.append(padded)
            first += count
        return found


def _least(batch: Batch, answers: Sequence[Answer], values: Tensor) -> Tensor:
    """The least value of each row's answers: float (rows,); inf for rows without any."""
    rows = torch.tensor([answer.row for answer in answers], dtype=torch.long)
    least = torch.full((batch.layout.rows,), torch.inf)
    return least.scatter_reduce_(0, rows, values.float().cpu(), "amin")


def _batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _can_keep(model: nn.Module) -> bool:
    base = model.get_base_model() if hasattr(model, "peft_config") else model  # pyright: ignore[reportCallIssue]
    return "logits_to_keep" in inspect.signature(type(base).forward).parameters
