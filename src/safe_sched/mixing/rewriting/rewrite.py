"""Safety prompts in the words of the task, written by a language model ("Paraphrase" in arXiv 2406.10288).

`rewrite` shows a model a safety prompt and some prompts of the task, and asks for the same request as it would stand in
the task. Only the prompt is written: the answer stays the safety set's own refusal. What the model writes is checked
(`safe_sched.mixing.rewriting.checks`), and a row whose prompts all fail is replaced by a given one and named, so no row
is lost::

    report = rewrite(safety_rows, task_prompts(user_rows), Endpoint(url, name), templates=mimic(user_rows, safety_rows),
                     cache="rewrites.sqlite", dry_run=True)
    print(report)                      # rows, requests, tokens, price: nothing has been sent
    rows = rewrite(...).rows           # without dry_run: one row for each safety row, in order

What answers is a *text generator*: an `Endpoint` (any OpenAI-compatible server) or `local` (a chat model on this
machine). Replies are cached by the content of their requests, so a run that stops goes on where it was.

Texts of the safety set and of the task are data. They travel as JSON strings apart from the instructions, and what
comes back becomes the text of a prompt or nothing: there are no tools, and no text decides on what is done.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safe_sched.data.schemas import Example, read, write
from safe_sched.errors import DataError, OptionError, some_of
from safe_sched.generation import LocalModel, TextGenerator
from safe_sched.mixing.rewriting.cache import ReplyCache
from safe_sched.mixing.rewriting.checks import TaskChecks
from safe_sched.mixing.rewriting.run import Asking, Bill, Job, Progress, RewriteRun

SHOWN = 6000
"""Characters up to which an example is shown as long as there are such examples."""


@dataclass(frozen=True)
class Failure:
    """A row that the model did not rewrite.

    Attributes:
        row: Its number, counted from 0.
        reasons: What was wrong, one for each attempt. They quote neither the row nor the model.
    """

    row: int
    reasons: tuple[str, ...]


@dataclass(kw_only=True)
class RewriteReport(Bill):
    """What was rewritten, and what it cost; of a dry run, what it would cost.

    Attributes:
        rows: One for each safety row, in order; empty after a dry run.
        rewritten: Rows with a prompt from the model.
        failed: The others.
        from_cache: Replies that came from the cache and cost nothing.
        price_per_million: The generator's prices.
        format_check: How the format was checked.
        dry_run: Whether nothing was sent.
    """

    rows: list[dict[str, Any]]
    rewritten: int
    failed: list[Failure]
    from_cache: int
    price_per_million: tuple[float, float] | None
    format_check: str
    dry_run: bool

    @property
    def cost(self) -> float | None:
        """Price of the tokens, in the currency of the prices; None where there are none."""
        return _price(self.price_per_million, self.input_tokens, self.output_tokens)

    @property
    def cost_at_most(self) -> float | None:
        """Price of ``tokens_at_most``, which is an estimate where ``estimated`` is."""
        return _price(self.price_per_million, *self.tokens_at_most)

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """The reasons of the last attempts of the rows that failed, the most common first."""
        return Counter(failure.reasons[-1] for failure in self.failed).most_common()

    def summary(self) -> list[tuple[str, str]]:
        """Names and values for a person, as lines of a table."""
        about = "about " if self.estimated else ""

        def money(cost: float | None) -> str:
            return "no price given" if cost is None else f"{about}{cost:,.4f}"

        lines = [("rows rewritten before" if self.dry_run else "rows rewritten", f"{self.rewritten:,}")]
        if self.failed:
            lines.append(("rows not rewritten", f"{len(self.failed):,} (rows {some_of([f.row for f in self.failed])})"))
            lines += [(f"  {reason}", f"{count:,}") for reason, count in self.reasons]
        if self.dry_run:
            lines += [
                ("requests to send", f"{self.requests:,}, at most {self.requests_at_most:,}"),
                ("tokens to send", f"{about}{self.input_tokens:,}, at most {self.tokens_at_most[0]:,}"),
                ("tokens to be written", f"{about}{self.output_tokens:,}, at most {self.tokens_at_most[1]:,}"),
                ("price", f"{money(self.cost)}, at most {money(self.cost_at_most)}"),
            ]
            if self.cost is None:
                lines[-1] = ("price", money(None))
        else:
            lines += [
                ("requests", f"{self.requests:,}"),
                ("tokens sent", f"{about}{self.input_tokens:,}"),
                ("tokens written", f"{about}{self.output_tokens:,}"),
                ("price", money(self.cost)),
            ]
        return [*lines, ("replies from the cache", f"{self.from_cache:,}"), ("format check", self.format_check)]

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self.summary())


def rewrite(
    safety_rows: Iterable[Mapping[str, Any]],
    examples: Sequence[str],
    generator: TextGenerator,
    *,
    templates: Sequence[Mapping[str, Any]] | None = None,
    description: str | None = None,
    matches: Callable[[str], bool] | None = None,
    cache: str | Path | None = None,
    attempts: int = 3,
    batch_size: int = 16,
    shots: int = 4,
    max_tokens: int = 512,
    seed: int = 0,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> RewriteReport:
    """Have a model rewrite the prompts of safety rows in the style of a task.

    Args:
        safety_rows: In any schema that has prompts apart from answers (`safe_sched.data.schemas`). The last user turn
            before the answer is rewritten.
        examples: Prompts of the task (`task_prompts`), at least one. All of them tell the format; ``shots`` are shown.
        generator: What is asked: an `Endpoint`, or `local`.
        templates: One row for each safety row, in the task's schema, such as from `safe_sched.mixing.mimic`. A
            rewritten prompt takes the place of this row's last user turn, and this row is used as it is where
            rewriting fails. None: the safety rows themselves.
        description: Of the task's format, in words, for the model to read.
        matches: Whether a prompt has the task's format. None: it begins and ends as all examples do.
        cache: A file for the replies, made if there is none. None: they are gone after the run.
        attempts: Requests for one row at most, 1 to 20. From the second on, the reason of the last failure goes along.
        batch_size: Rows that the generator is given at a time, >= 1.
        shots: Examples in each request, >= 1.
        max_tokens: The longest reply, 16 to 32768.
        seed: Of the choice of examples and of the model's sampling.
        dry_run: Send nothing, and report what a run would send and cost.
        progress: Called with what is being done, how much of it is done, and of how much.

    Returns:
        The rows and what they cost. Where the first 25 rows all fail, no other is asked for.

    Raises:
        OptionError: An option is out of range.
        DataError: A row has no prompt apart from an answer.
        StateError: The cache cannot be used.
        SafeSchedError: The generator cannot work. Replies that it gave before are in the cache.

    Example:
        A stand-in for a model, which puts "Question: " before what it is given:

        >>> import json
        >>> from safe_sched.generation import TextReply
        >>> class Prefix:
        ...     identity, price_per_million = {"model": "prefix"}, (1.0, 2.0)
        ...     def generate(self, requests):
        ...         for number, request in enumerate(requests):
        ...             prompt = "Question: " + json.loads(request.data)["request"]
        ...             yield number, TextReply(json.dumps({"prompt": prompt}))
        >>> rows = [{"prompt": "How do I pick my neighbor's lock?", "completion": "I can't help with that."}]
        >>> examples = ["Question: Is rain wet?", "Question: Do cats bark?", "Question: What rusts?", "Question: Why?"]
        >>> report = rewrite(rows, examples, Prefix())
        >>> report.rows[0]["prompt"], report.rewritten, report.requests
        ("Question: How do I pick my neighbor's lock?", 1, 1)
        >>> rewrite(rows, examples, Prefix(), dry_run=True).requests_at_most
        3
    """
    for name, value, low, high in (
        ("attempts", attempts, 1, 20),
        ("batch_size", batch_size, 1, 100_000),
        ("shots", shots, 1, 64),
        ("max_tokens", max_tokens, 16, 32_768),
    ):
        if not low <= value <= high:
            raise OptionError(f"{name}={value}; allowed: a whole number from {low} to {high}")
    rows = [dict(row) for row in safety_rows]
    if templates is not None and len(templates) != len(rows):
        raise DataError(f"{len(templates)} templates for {len(rows)} safety rows; give one for each, in their order")
    prompts = [_prompt_of(row, f"safety row {number}") for number, row in enumerate(rows)]
    targets = prompts
    if templates is not None:
        targets = [_prompt_of(row, f"template {number}") for number, row in enumerate(templates)]
    task = TaskChecks(examples, matches)
    shown = [text for text in dict.fromkeys(examples) if len(text) <= SHOWN] or [min(examples, key=len)]
    asking = Asking(shown, task.problem, description, attempts, shots, max_tokens, seed)
    # one job for every different prompt
    jobs = {prompt.text: Job(prompt.text, asking) for prompt in prompts}
    file = None if cache is None or (dry_run and not Path(cache).exists()) else Path(cache)
    with ReplyCache(file) as replies:
        run = RewriteRun(generator, replies, list(jobs.values()), progress or (lambda stage, done, total: None))
        run.read_cache()
        if not dry_run:
            run.ask(batch_size)
    bill = run.forecast(asking) if dry_run else run.bill
    done = [jobs[prompt.text] for prompt in prompts]
    made = [
        target.row if job.accepted is None else target.put(job.accepted)
        for target, job in zip(targets, done, strict=True)
    ]
    return RewriteReport(
        **vars(bill),
        rows=[] if dry_run else made,
        rewritten=sum(job.accepted is not None for job in done),
        failed=[
            Failure(number, tuple(job.reasons)) for number, job in enumerate(done) if job.done and job.accepted is None
        ],
        from_cache=run.from_cache,
        price_per_million=generator.price_per_million,
        format_check=task.described,
        dry_run=dry_run,
    )


def local(model: str, **options: Any) -> TextGenerator:
    """A chat model on this machine as a text generator; it is loaded when it is first asked.

    Args:
        model: A folder or a hub name.
        options: See `generation.LocalModel`: ``device``, ``dtype``, ``temperature``, ``top_p``.

    Raises:
        PluginError: Nothing that is installed can run a model.
        OptionError: An option is unknown or out of range.
    """
    from safe_sched.hooks import text_generator  # plugins are looked up where one is needed

    try:
        request = LocalModel(model, **options)
    except TypeError as error:
        raise OptionError(f"local(): {error}; allowed: device, dtype, temperature, top_p") from error
    return text_generator(request)


def task_prompts(user_rows: Iterable[Mapping[str, Any]], count: int = 64, schema: str | None = None) -> list[str]:
    """Prompts of the task: the last user turn before the answer, of rows spread over those that are given.

    Args:
        user_rows: In any schema that has prompts apart from answers. Of an iterator, the first ``100 * count`` at most.
        count: How many, at most; >= 1.
        schema: Theirs, or None to detect it from each row.

    Raises:
        DataError: A row cannot be read, or none of those that are looked at has a prompt apart from an answer.

    Example:
        >>> task_prompts([{"prompt": f"What is {n}?", "completion": str(n)} for n in range(9)], count=3)
        ['What is 0?', 'What is 3?', 'What is 6?']
    """
    if count < 1:
        raise OptionError(f"count={count}; allowed: a whole number >= 1")
    first = list(itertools.islice(user_rows, 100 * count))
    if not first:
        raise DataError("there are no rows to take prompts from")
    picked = sorted({i * len(first) // count for i in range(count)})
    found = [_find_prompt(first[i], f"row {i}", schema) for i in picked]
    if not (prompts := [prompt.text for prompt in found if prompt is not None]):
        raise DataError(f"none of {len(found)} rows {_NO_PROMPT}")
    return prompts


# prompts in rows ----------------------------------------------------------------------------------------------------

_NO_PROMPT = (
    "has a prompt apart from its answer, which is what is rewritten. Give rows with prompt and completion, messages, "
    "conversations, or instruction and output."
)


@dataclass(frozen=True)
class _Prompt:
    """The last user turn before the answer of a row."""

    example: Example
    at: int

    @property
    def text(self) -> str:
        return self.example.parts[self.at].text

    @property
    def row(self) -> dict[str, Any]:
        return dict(self.example.row)

    def put(self, text: str) -> dict[str, Any]:
        """The row with another text there."""
        texts = [text if i == self.at else part.text for i, part in enumerate(self.example.parts)]
        return write(self.example.with_texts(texts))


def _find_prompt(row: Mapping[str, Any], name: str, schema: str | None = None) -> _Prompt | None:
    try:
        example = read(row, schema)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    for at in reversed(range(example.answer or 0)):
        if example.parts[at].role == "user" and example.parts[at].text.strip():
            return _Prompt(example, at)
    return None


def _prompt_of(row: Mapping[str, Any], name: str) -> _Prompt:
    if (found := _find_prompt(row, name)) is None:
        raise DataError(f"{name} is none that {_NO_PROMPT}")
    return found


def _price(prices: tuple[float, float] | None, sent: int, written: int) -> float | None:
    return None if prices is None else (prices[0] * sent + prices[1] * written) / 1e6
