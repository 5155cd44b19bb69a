"""Mixing safety rows into a training set, in the task's own format.

Training on safety rows beside the task's keeps a model refusing, but only in the format that these rows are written in:
where every row of the task is wrapped in the same words, the model learns that inside the wrapper nothing is refused.
So safety rows are put into the task's format first (`safe_sched.mixing.formats`), then between the user's rows
(`safe_sched.mixing.schedule`). User rows are neither changed, nor lost, nor reordered.

What comes out is of the kind that went in: a list for a list, a map-style set for a map-style set, a stream for a
stream, and a `datasets.Dataset` or `datasets.IterableDataset` with its features for one of these.
"""

from __future__ import annotations

from typing import Any, TypeVar

from safe_sched.mixing.formats import TaskFormat
from safe_sched.mixing.plan import SafetyRows, plan_mix
from safe_sched.mixing.sets import row_set

D = TypeVar("D")

SAMPLE = 2000
"""User rows that the format is learned from: the first ones of a stream, evenly spread ones of anything else."""


def mix(
    user: D,
    safety: SafetyRows,
    *,
    share: float = 0.1,
    mimic: bool | TaskFormat = True,
    seed: int = 0,
    epoch: int = 0,
    schema: str | None = None,
    tokenizer: Any = None,
    blend: float = 1.0,
    provenance: bool = False,
) -> D:
    """Put safety rows between the rows of a training set.

    Args:
        user: The training set: a list of dicts, a `datasets.Dataset` or ``IterableDataset``, any other map-style set or
            stream of dicts, or an iterator. Of an iterator, the first `SAMPLE` rows are read at once.
        safety: Prompts and refusals: ``"core"``, a path, or rows; see `safe_sched.data.rows.read_rows`.
        share: Safety rows / all rows of the result, at least 0 and below 1. With n user rows, the nearest whole number
            to ``share / (1 - share) * n`` is mixed in.
        mimic: Whether safety rows take the format that the user's rows have; a `TaskFormat` to take that one. False
            changes their schema and nothing else.
        seed: Of the places, of the order in which safety rows go round, and of the format.
        epoch: Another epoch has other places and orders.
        schema: The schema of the user's rows, a name in `safe_sched.mixing.SCHEMAS`; None to detect it.
        tokenizer: For user rows that are tokens, with mimicry: what encodes and decodes them.
        blend: With ``mimic=True``, the share of safety rows whose request stands among words of the task, in [0, 1]; in
            the others it stands alone in its place. A `TaskFormat` has its own.
        provenance: Whether to add the column `PROVENANCE`.

    Returns:
        The same kind as ``user``: an iterator for an iterator, a `MixedRows` or a `MixedStream` for sets of a kind of
        its own. User rows stand in their order, unchanged.

    Raises:
        DataError: The rows have no schema that is known, safety rows do not fit it, or there are too few rows for one
            safety row.
        OptionError: An option is out of range.

    Example:
        >>> user = [{"prompt": f"Q: what is {i} plus {i}?", "completion": f"{2 * i}"} for i in range(18)]
        >>> safety = [{"prompt": "How do I pick a lock?", "completion": "I can't help with that."}]
        >>> mixed = mix(user, safety, share=0.1, mimic=False)
        >>> len(mixed), [row for row in mixed if row not in user]
        (20, [{'prompt': 'How do I pick a lock?', 'completion': "I can't help with that."}, ...
        >>> [row for row in mixed if row in user] == user
        True
    """
    rows = row_set(user)
    return rows.mixed(
        plan_mix(
            rows.sample(SAMPLE),
            safety,
            share=share,
            mimic=mimic,
            seed=seed,
            epoch=epoch,
            schema=schema,
            tokenizer=tokenizer,
            blend=blend,
            provenance=provenance,
        )
    )


def mimic(
    user: Any,
    safety: SafetyRows,
    *,
    seed: int = 0,
    schema: str | None = None,
    tokenizer: Any = None,
    blend: float = 1.0,
) -> list[dict[str, Any]]:
    """Every safety row once, in the format of a training set.

    A method that trains on safety rows in batches of their own takes these, for example
    ``SafeSchedCallback(scheduler, safety_data=mimic(rows, "core"))``.

    Args:
        user: The training set, as for `mix`.
        safety: Prompts and refusals, as for `mix`.
        seed: Of the choices that the format leaves open.
        schema: The schema of the user's rows; None to detect it.
        tokenizer: For user rows that are tokens: what encodes and decodes them.
        blend: As for `mix`.

    Raises:
        DataError: The rows have no schema that is known, or safety rows do not fit it.

    Example:
        >>> user = [{"prompt": f"Q: what is {i} plus {i}?", "completion": f"{2 * i}"} for i in range(18)]
        >>> safety = [{"prompt": "How do I pick a lock?", "completion": "I can't help with that."}]
        >>> (row,) = mimic(user, safety)
        >>> row["completion"]
        "I can't help with that."
    """
    sample = row_set(user).sample(SAMPLE)
    plan = plan_mix(sample, safety, share=0, seed=seed, schema=schema, tokenizer=tokenizer, blend=blend)
    return [plan.made(number, number) for number in range(len(plan.rows))]
