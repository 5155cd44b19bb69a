"""Refusals beside answers: would the model rather refuse at the place where a row answers?

Antibody (arXiv 2603.00498) weighs a row by a likelihood ratio: how likely is its answer y, against a refusal, given its
prompt x? This module finds the answers in token rows, and reads the likelihoods of refusals off a model's logits.

*Openings.* A refusal is decided in its first few words, so what is compared is how an answer opens. With R the
distinct openings of some refusals (their first `PHRASE` tokens, none the beginning of another)::

    P(R | x) = sum over openings o in R of  p(o_1 | x) p(o_2 | x, o_1) ...
    log-odds = log P(R | x) - log( 1 - P(R | x) )

*Branches.* All refusals grow on one copy of the prompt, in one forward: the tokens of a trie are put behind it, each of
which sees the prompt and its own ancestors only.

Everything here is plain torch; an integration runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safe_sched.errors import DataError, some_of
from safe_sched.rows.keys import IGNORE_INDEX, Layout

PHRASE = 3
"""Tokens that an opening is told by: the first alone often begins harmless answers too ("I", or "S" of "Sure")."""

# answers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One answer in a row; a conversation has several.

    Attributes:
        row: Its row in the micro-batch.
        prompt: int64 (tokens,), everything of the row before it.
        tokens: int64 (tokens,), what it says, from where it may decide to refuse on.
        at: Line and column of the last token of the prompt.
    """

    row: int
    prompt: Tensor
    tokens: Tensor
    at: tuple[int, int]


def answers_of(
    input_ids: Tensor,
    labels: Tensor,
    layout: Layout,
    wanted: Tensor,
    mark: Sequence[int] = (),
    skip: Sequence[int] = (),
) -> list[Answer]:
    """The answers of some rows of a micro-batch.

    An answer begins at the first label behind tokens that are none. Where the prompt is trained on as well, it begins
    behind the chat template's mark for an assistant's turn.

    Args:
        input_ids: int64 (batch, sequence).
        labels: int64 (batch, sequence), -100 where ignored.
        layout: Where the rows lie.
        wanted: bool (rows,).
        mark: Tokens with which the template opens an assistant's turn.
        skip: Tokens of the template that all answers begin with; they belong to the prompt.

    Raises:
        DataError: A row has labels only and no mark, so that nothing tells its prompt from its answer.

    Example:
        >>> import torch
        >>> from safe_sched.rows.keys import layout_of
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> labels = torch.tensor([[-100, -100, 7, 8]])
        >>> (answer,) = answers_of(ids, labels, layout_of(ids), torch.tensor([True]))
        >>> answer.prompt.tolist(), answer.tokens.tolist(), answer.at
        ([5, 6], [7, 8], (0, 1))
    """
    found: list[Answer] = []
    lost: list[int] = []
    rows, ids, labels = layout.row.cpu(), input_ids.cpu(), labels.cpu()
    for row in wanted.nonzero().flatten().tolist():
        places = (rows == row).nonzero()
        tokens, labelled = ids[rows == row], labels[rows == row] != IGNORE_INDEX
        starts = (labelled[1:] & ~labelled[:-1]).nonzero().flatten().add(1).tolist()
        ends = (~labelled[1:] & labelled[:-1]).nonzero().flatten().add(1).tolist()
        if not starts or starts[0] < 2 or bool(labelled[0]):
            marked = _behind(tokens.tolist(), list(mark))
            if marked:
                starts, ends = marked, [start - len(mark) for start in marked[1:]]
            elif not starts or bool(labelled[0]):
                lost.append(row)
                continue
        ends = [next((end for end in ends if end > start), tokens.numel()) for start in starts]
        for start, end in zip(starts, ends, strict=True):
            first = start
            for passed in (list(mark), list(skip)):  # where the template's own tokens are labels too
                if tokens[first : first + len(passed)].tolist() == passed:
                    first += len(passed)
            first = first if first < end else start  # cut off before it says anything
            line, column = places[first - 1].tolist()
            found.append(Answer(row, tokens[:first], tokens[first:end], (line, column)))
    if lost:
        raise DataError(
            f"{len(lost)} of {int(wanted.sum())} rows have no prompt that could be told from an answer (rows "
            f"{some_of(lost)} of the batch): all their tokens are labels, and none is the chat template's "
            "mark of an assistant's turn. Give prompt and completion, or messages (with assistant_only_loss=True "
            "where the template has no mark); or use BDS(), which needs no prompt."
        )
    return found


def _behind(tokens: list[int], mark: list[int]) -> list[int]:
    """Where a mark has just ended."""
    if not mark:
        return []
    size = len(mark)
    return [i + size for i in range(len(tokens) - size) if tokens[i : i + size] == mark]


# openings -----------------------------------------------------------------------------------------------------------


def openings_of(answers: Sequence[Sequence[int]], length: int = PHRASE) -> list[tuple[int, ...]]:
    """The distinct openings of some refusals, none of which begins another.

    Args:
        answers: Token ids of each refusal.
        length: Tokens of an opening.

    Example:
        >>> openings_of([[1, 2, 3, 4], [1, 2, 3, 9], [5]])
        [(1, 2, 3), (5,)]
        >>> openings_of([[1, 2], [1]])
        [(1,)]
    """
    cut = sorted({tuple(answer[:length]) for answer in answers})
    return [one for one in cut if not any(one != other and one[: len(other)] == other for other in cut)]


def opens_with(answer: Tensor, openings: Sequence[tuple[int, ...]]) -> bool:
    """Whether an answer begins with one of the openings.

    Example:
        >>> opens_with(torch.tensor([1, 2, 3]), [(1, 2)]), opens_with(torch.tensor([1]), [(1, 2)])
        (True, False)
    """
    head = tuple(answer[: max(map(len, openings), default=0)].tolist())
    return any(head[: len(opening)] == opening for opening in openings)


def log_odds(log_probability: Tensor) -> Tensor:
    """Log-odds of something whose log-probability is given: float of the same shape, nats.

    Example:
        >>> log_odds(torch.tensor([0.5]).log())
        tensor([0.])
    """
    log_p = log_probability.clamp(max=-1e-6)  # rounding may leave it at 0
    return log_p - torch.log(-torch.expm1(log_p))


# branches -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Branches:
    """Continuations of one prompt, as a trie.

    Attributes:
        tokens: int64 (nodes,), those that something follows.
        parents: int64 (nodes,), the node before each; -1 is the prompt.
        depths: int64 (nodes,), 0 right behind the prompt.
        origins: int64 (continuations, longest), the node that each token of each continuation follows, plus 1.
        targets: int64 (continuations, longest), these tokens; -100 behind the end.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    origins: Tensor
    targets: Tensor


def branches_of(continuations: Sequence[Sequence[int]]) -> Branches:
    """Put continuations together where they begin alike.

    Args:
        continuations: Token ids of each, at least one.

    Example:
        Two continuations that share their first token have one node to follow.

        >>> branches = branches_of([[7, 8], [7, 9]])
        >>> branches.tokens.tolist(), branches.origins.tolist(), branches.targets.tolist()
        ([7], [[0, 1], [0, 1]], [[7, 8], [7, 9]])
    """
    nodes: dict[tuple[int, ...], int] = {}
    longest = max(map(len, continuations))
    origins = torch.zeros(len(continuations), longest, dtype=torch.long)
    targets = torch.full((len(continuations), longest), IGNORE_INDEX)
    for number, continuation in enumerate(continuations):
        path = tuple(continuation)
        for i, token in enumerate(path):
            if i:
                origins[number, i] = nodes.setdefault(path[:i], len(nodes)) + 1
            targets[number, i] = token
    return Branches(
        tokens=torch.tensor([path[-1] for path in nodes], dtype=torch.long),
        parents=torch.tensor([nodes.get(path[:-1], -1) for path in nodes], dtype=torch.long),
        depths=torch.tensor([len(path) - 1 for path in nodes], dtype=torch.long),
        origins=origins,
        targets=targets,
    )


def grow(prompts: Sequence[Tensor], branches: Sequence[Branches], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """One line per prompt: the prompt, padded on the left, and its branches behind it.

    Args:
        prompts: int64 (tokens,) each.
        branches: Of each prompt.
        pad: What to pad with.

    Returns:
        ``input_ids`` and ``position_ids``, int64 (prompts, length); and who may look at whom, bool
        (prompts, 1, length, length).
    """
    width = max(prompt.numel() for prompt in prompts)
    nodes = max(branch.tokens.numel() for branch in branches)
    length = width + nodes
    ids = torch.full((len(prompts), length), pad)
    positions = torch.zeros(len(prompts), length, dtype=torch.long)
    # padding looks at itself only: a softmax over nothing would be nan
    seen = torch.eye(length, dtype=torch.bool).repeat(len(prompts), 1, 1, 1)
    for line, (prompt, branch) in enumerate(zip(prompts, branches, strict=True)):
        size, first = prompt.numel(), width - prompt.numel()
        ids[line, first:width] = prompt
        positions[line, first:width] = torch.arange(size)
        seen[line, 0, first:width, first:width] = torch.ones(size, size, dtype=torch.bool).tril()
        for node, (token, parent, depth) in enumerate(
            zip(branch.tokens.tolist(), branch.parents.tolist(), branch.depths.tolist(), strict=True)
        ):
            place = width + node
            ids[line, place] = token
            positions[line, place] = size + depth
            before = seen[line, 0, width + parent if parent >= 0 else width - 1].clone()
            seen[line, 0, place] |= before
    return ids, positions, seen


def branch_log_probs(logits: Tensor, branches: Sequence[Branches]) -> list[Tensor]:
    """Log-probability of every token of every continuation.

    Args:
        logits: (prompts, 1 + nodes, vocabulary): at the last token of the prompt, then at every node.
        branches: Of each prompt.

    Returns:
        One float32 (continuations, longest) per prompt; 0 behind the end of a continuation.
    """
    found = []
    for line, branch in zip(logits, branches, strict=True):
        origins, targets = branch.origins.to(line.device), branch.targets.to(line.device)
        used = line[: 1 + branch.tokens.numel()].float()
        chosen = used[origins, targets.clamp(min=0)] - used.logsumexp(-1)[origins]
        found.append(torch.where(targets != IGNORE_INDEX, chosen, 0.0))
    return found
