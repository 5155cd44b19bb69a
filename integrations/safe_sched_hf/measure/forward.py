"""One forward per row for all that an audit asks a model: its answers' tokens, and the refusals in their place.

A line is a row, padded on the right, and behind it the trie of refusals once for every answer of the row. The nodes of
a trie see the prompt before that answer and their own ancestors, so refusals are read in the same forward as the row
(`estimators.refusal_odds`), and nothing of the row sees them. Logits are made only where they are read: the output
embedding is handed these places alone.

Lines of like lengths run together, as many as a budget of tokens allows. Whatever runs together, a row's numbers are
its own, up to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safe_sched.errors import ModelError
from safe_sched.estimators.refusal_odds import Branches

_LOGITS = {"cpu": 2**27, "cuda": 2**29}  # numbers, of 4 bytes
_BLIND = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Line:
    """A row that is to be run.

    Attributes:
        tokens: Its ids, at least 2.
        answers: First token and end of every answer, the first at least 1.
        branch: Of every answer, the token before which a refusal could have begun.
    """

    tokens: Sequence[int]
    answers: Sequence[tuple[int, int]]
    branch: Sequence[int]


@dataclass(frozen=True)
class Reading:
    """What the model made of a line, float32 on the CPU.

    Attributes:
        nll: (tokens of all answers,), of each in nats.
        end_log_p: (tokens of all answers,), log-probability of the end token in its place.
        refusals: (answers, continuations), log-probability of each, in nats; none where none was asked for.
    """

    nll: Tensor
    end_log_p: Tensor
    refusals: Tensor


class Forwards:
    """Runs a causal language model over lines.

    Args:
        model: In evaluation mode, on its device.
        pad: What to pad with.
        end: The end token.
        budget: Tokens of a batch, padding included.
        half: Whether to run in bfloat16 what is stored in float32.

    Raises:
        ModelError: In use, where a single line does not fit into memory.
    """

    def __init__(self, model: nn.Module, pad: int, end: int, budget: int, *, half: bool = False) -> None:
        self.model, self.pad, self.end, self.budget, self.half = model, pad, end, budget, half
        self.device = next(model.parameters()).device
        config: Any = model.config
        self._additive = config._attn_implementation != "sdpa"  # eager attention adds its mask
        getter: Any = getattr(model, "get_output_embeddings", None)
        self._head: nn.Module | None = getter() if getter is not None else None
        self.tokens_run = 0

    def read(self, lines: Sequence[Line], branches: Branches | None = None) -> list[Reading]:
        """What the model makes of lines, in their order.

        Args:
            lines: Rows.
            branches: Continuations of every prompt, or None.
        """
        nodes = 0 if branches is None else branches.tokens.numel()
        widths = [len(line.tokens) + nodes * len(line.answers) for line in lines]
        found: list[Reading | None] = [None] * len(lines)
        for batch in bucketed(widths, self.budget):
            for number, reading in zip(batch, self._careful([lines[i] for i in batch], branches), strict=True):
                found[number] = reading
        return [reading for reading in found if reading is not None]

    def _careful(self, lines: list[Line], branches: Branches | None) -> list[Reading]:
        try:
            return self._batch(lines, branches)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(lines) == 1:
                raise ModelError(
                    f"out of memory on one row of {len(lines[0].tokens)} tokens: lower max_length, or use bfloat16"
                ) from error
        middle = len(lines) // 2
        return [*self._careful(lines[:middle], branches), *self._careful(lines[middle:], branches)]

    @torch.no_grad()
    def _batch(self, lines: Sequence[Line], branches: Branches | None) -> list[Reading]:
        laid = lay_out(lines, branches, self.pad)
        self.tokens_run += int(laid.real.sum())
        inputs: dict[str, Tensor] = {"input_ids": laid.ids}
        if laid.seen is not None:
            inputs["position_ids"] = laid.positions
        if laid.seen is None:
            inputs["attention_mask"] = laid.real.long()
        elif self._additive:
            inputs["attention_mask"] = torch.zeros(laid.seen.shape).masked_fill(~laid.seen, _BLIND)
        else:
            inputs["attention_mask"] = laid.seen
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        with self.precision(), self._only(laid.wanted.to(self.device)) as pick:
            logits = pick(self.model(**inputs, use_cache=False).logits)
        flat = logits.float()
        total = flat.logsumexp(-1)
        targets = laid.targets.to(self.device)
        answer = targets >= 0
        nll = (total[answer] - flat[answer, targets[answer]]).cpu()
        end = (flat[answer, self.end] - total[answer]).cpu()
        sizes = [sum(stop - start for start, stop in line.answers) for line in lines]
        refusals = [torch.empty(len(line.answers), 0) for line in lines]
        if branches is not None:
            at = laid.branch_places.to(self.device)[:, branches.origins.to(self.device)]
            goal = branches.targets.to(self.device)
            log_p = flat[at, goal.clamp(min=0).expand_as(at)] - total[at]
            sums = torch.where(goal >= 0, log_p, 0.0).sum(-1).cpu()
            refusals = list(sums.split([len(line.answers) for line in lines]))
        return [Reading(*parts) for parts in zip(nll.split(sizes), end.split(sizes), refusals, strict=True)]

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Mixed precision, where it is asked for."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            yield

    @contextlib.contextmanager
    def _only(self, wanted: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        """Have logits made at some places only: bool (lines, length). Gives what picks them from the model's logits."""
        narrowed = False

        def narrow(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            nonlocal narrowed
            if not args or not isinstance(args[0], Tensor) or args[0].shape[:2] != wanted.shape:
                return None
            narrowed = True
            return (args[0][wanted][None], *args[1:])

        handle = None if self._head is None else self._head.register_forward_pre_hook(narrow)
        try:
            yield lambda logits: logits[0] if narrowed else logits[wanted]
        finally:
            if handle is not None:
                handle.remove()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or this machine, has no room left.

    Example:
        >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("shapes differ"))
        (True, False)
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


# batches ------------------------------------------------------------------------------------------------------------


def bucketed(widths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Numbers of lines that run together: like lengths, longest first, so that what does not fit fails early.

    Args:
        widths: Tokens of each line.
        budget: Tokens of a batch, padding included; a longer line runs alone.

    Example:
        >>> list(bucketed([3, 9, 4, 1], budget=9))
        [[1], [2, 0], [3]]
    """
    order = sorted(range(len(widths)), key=lambda i: -widths[i])
    batch: list[int] = []
    for number in order:
        if batch and widths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def token_budget(vocabulary: int, device: torch.device) -> int:
    """Tokens of a batch that keep its logits within half a gigabyte, on a GPU within two.

    Example:
        >>> token_budget(2048, torch.device("cpu")), token_budget(2**18, torch.device("cuda"))
        (4096, 2048)
    """
    most = 4096 if device.type == "cpu" else 32768
    return max(256, min(most, _LOGITS.get(device.type, _LOGITS["cuda"]) // vocabulary))


@dataclass(frozen=True)
class Laid:
    """A batch of lines, each row with its tries behind it.

    Attributes:
        ids, positions: int64 (lines, length).
        real: bool (lines, length), where a token is no padding.
        seen: bool (lines, 1, length, length), who may look at whom; None where a causal mask will do.
        wanted: bool (lines, length), where logits are read.
        targets: int64 (places that are wanted,), the answer's token that follows; -1 where none does.
        branch_places: int64 (answers of all lines, 1 + nodes): of the places that are wanted, the prompt's last token
            and every node.
    """

    ids: Tensor
    positions: Tensor
    real: Tensor
    seen: Tensor | None
    wanted: Tensor
    targets: Tensor
    branch_places: Tensor


def lay_out(lines: Sequence[Line], branches: Branches | None, pad: int) -> Laid:
    """Put lines side by side.

    Example:
        A row of three tokens, the last of them its answer, and two continuations with a common first token 7 (one
        node): the node sees the prompt and itself.

        >>> from safe_sched.estimators.refusal_odds import branches_of
        >>> laid = lay_out([Line([4, 5, 6], [(2, 3)], [2])], branches_of([[7, 8], [7, 9]]), pad=0)
        >>> laid.ids.tolist(), laid.positions.tolist()
        ([[4, 5, 6, 7]], [[0, 1, 2, 2]])
        >>> laid.seen[0, 0].int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
        >>> laid.targets.tolist(), laid.branch_places.tolist()
        ([6, -1], [[0, 1]])
    """
    nodes = 0 if branches is None else branches.tokens.numel()
    sizes = torch.tensor([len(line.tokens) for line in lines])
    tries = torch.tensor([len(line.answers) for line in lines])
    width = int(sizes.max())
    length = width + nodes * int(tries.max())
    column = torch.arange(length)
    ids = torch.full((len(lines), length), pad)
    targets = torch.full((len(lines), length), -1)
    wanted = torch.zeros(len(lines), length, dtype=torch.bool)
    positions = torch.where(column < sizes[:, None], column, 0)
    owner, start = [], []  # line and place of every branching, in order
    for i, line in enumerate(lines):
        row = torch.tensor(line.tokens)
        ids[i, : row.numel()] = row
        for first, stop in line.answers:
            targets[i, first - 1 : stop - 1] = row[first:stop]
        owner += [i] * len(line.branch)
        start += line.branch
    wanted |= targets >= 0
    real = column < sizes[:, None]
    if branches is None:
        none = torch.empty(0, 0, dtype=torch.long)
        return Laid(ids, positions, real, None, wanted, targets[wanted], none)

    lines_of, starts = torch.tensor(owner), torch.tensor(start)
    number = torch.cat([torch.arange(count) for count in tries.tolist()])  # of a trie in its line
    places = width + nodes * number[:, None] + torch.arange(nodes)
    here = lines_of[:, None].expand_as(places)
    ids[here, places] = branches.tokens.expand_as(places)
    positions[here, places] = starts[:, None] + branches.depths
    real = real.index_put((here, places), torch.tensor(True))
    wanted[lines_of, starts - 1] = True
    wanted[here, places] = True

    inside = (column < width).expand(len(lines), length)
    seen = torch.ones(length, length, dtype=torch.bool).tril() & (inside & real)[:, None, :]
    seen[:, width:] = False
    seen[here, places] = (column < starts[:, None])[:, None, :]
    kin = _ancestors(branches)
    seen[here[:, :, None], places[:, :, None], places[:, None, :]] = kin.expand(len(places), -1, -1)
    seen |= torch.eye(length, dtype=torch.bool)  # padding looks at itself: a softmax over nothing would be nan

    order = wanted.flatten().cumsum(0).view_as(wanted) - 1
    last = order[lines_of, starts - 1]
    return Laid(
        ids=ids,
        positions=positions,
        real=real,
        seen=seen[:, None],
        wanted=wanted,
        targets=targets[wanted],
        branch_places=torch.cat([last[:, None], order[here, places]], 1),
    )


def _ancestors(branches: Branches) -> Tensor:
    """Whom of the trie every node sees: bool (nodes, nodes)."""
    nodes = branches.tokens.numel()
    kin = torch.eye(nodes, dtype=torch.bool)
    for node, parent in enumerate(branches.parents.tolist()):  # parents come first
        if parent >= 0:
            kin[node] |= kin[parent]
    return kin
