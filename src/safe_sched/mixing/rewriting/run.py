"""Prompts on their way through the cache, the model and the checks, for `safe_sched.mixing.rewriting.rewrite`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from safe_sched.errors import PluginError
from safe_sched.generation import TextGenerator, TextReply, TextRequest
from safe_sched.mixing.rewriting.cache import ReplyCache
from safe_sched.mixing.rewriting.checks import TaskChecks
from safe_sched.mixing.rewriting.request import (
    LARGEST_REPLY,
    estimated_tokens,
    judge_request,
    key_of,
    read_prompt,
    read_verdict,
    rewrite_request,
    tokens_in,
)

Progress = Callable[[str, int, int | None], None]

HOPELESS = 25
"""Prompts after whose failure no other is asked for, where none before has passed."""
_VERDICT = 16  # tokens of a second opinion


@dataclass(frozen=True)
class Asking:
    """What all requests of a run have in common; see `safe_sched.mixing.rewriting.rewrite.rewrite`."""

    examples: tuple[str, ...]
    task: TaskChecks
    description: str | None
    judge: bool
    attempts: int
    shots: int
    max_tokens: int
    seed: int

    def request(self, prompt: str, attempt: int, rejected: str | None) -> TextRequest:
        """The request of one attempt."""
        return rewrite_request(
            prompt,
            self.examples,
            description=self.description,
            attempt=attempt,
            rejected=rejected,
            seed=self.seed,
            shots=self.shots,
            max_tokens=self.max_tokens,
        )


class Job:
    """One prompt: attempt after attempt, and where it is asked for, a second opinion on what passes the checks.

    Attributes:
        prompt: The safety prompt.
        request: What to ask next.
        candidate: What a second opinion is being asked on.
        accepted: The rewritten prompt, once there is one.
        reasons: What was wrong with each attempt so far.
    """

    def __init__(self, prompt: str, asking: Asking) -> None:
        self.prompt, self._asking = prompt, asking
        self.request = asking.request(prompt, 0, None)
        self.candidate: str | None = None
        self.accepted: str | None = None
        self.reasons: list[str] = []

    @property
    def done(self) -> bool:
        return self.accepted is not None or len(self.reasons) >= self._asking.attempts

    def take(self, reply: TextReply) -> None:
        """Go on by the reply to ``request``."""
        if reply.text is None:
            reason = reply.problem or "no reply"
        elif self.candidate is not None:
            reason = self._judged(reply.text)
        else:
            reason = self._written(reply.text)
        if reason is None:
            return
        self.candidate = None
        self.reasons.append(reason)
        if not self.done:
            self.request = self._asking.request(self.prompt, len(self.reasons), reason)

    def give_up(self, reason: str) -> None:
        """No further attempt."""
        self.candidate = None
        self.reasons += [reason] * (self._asking.attempts - len(self.reasons))

    def _written(self, text: str) -> str | None:
        prompt = read_prompt(text)
        if prompt is None:
            return "the reply is no JSON object with the field prompt alone"
        if reason := self._asking.task.problem(prompt, self.prompt):
            return reason
        if self._asking.judge:
            self.candidate = prompt
            self.request = judge_request(self.prompt, prompt, seed=self._asking.seed)
        else:
            self.accepted = prompt
        return None

    def _judged(self, text: str) -> str | None:
        verdict = read_verdict(text)
        if verdict:
            self.accepted = self.candidate
            return None
        return "the second opinion has another form" if verdict is None else "the second opinion is against it"


@dataclass
class Bill:
    """Requests and tokens, of a run or expected of one; see `safe_sched.mixing.rewriting.rewrite.RewriteReport`."""

    requests: int = 0
    requests_at_most: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    tokens_at_most: tuple[int, int] = (0, 0)
    estimated: bool = False

    def add(self, request: TextRequest, reply: TextReply) -> None:
        """Count a reply that came from the model."""
        sent, written = reply.input_tokens, reply.output_tokens
        self.estimated |= sent is None or written is None
        self.requests += 1
        self.input_tokens += tokens_in(request) if sent is None else sent
        self.output_tokens += estimated_tokens(reply.text or "") if written is None else written
        self.requests_at_most = self.requests
        self.tokens_at_most = (self.input_tokens, self.output_tokens)


class Run:
    """All prompts: first through the cache, then through the generator.

    Attributes:
        bill: What the generator was asked.
        from_cache: Replies that were in the cache.
    """

    def __init__(self, generator: TextGenerator, cache: ReplyCache, jobs: Sequence[Job], progress: Progress) -> None:
        self._generator, self._cache, self._jobs, self._progress = generator, cache, jobs, progress
        self._identity = dict(generator.identity)
        self.bill, self.from_cache = Bill(), 0

    def read_cache(self) -> None:
        """Every prompt as far as the cache brings it."""
        for number, job in enumerate(self._jobs):
            self._progress("reading the cache", number, len(self._jobs))
            self._advance(job)

    def ask(self, batch_size: int, *, stop: bool) -> None:
        """The rest; with ``stop``, until one prompt fails.

        Raises:
            PluginError: The generator leaves requests without a reply.
            SafeSchedError: It cannot work.
        """
        waiting = deque(job for job in self._jobs if not job.done)
        finished, passed = 0, any(job.accepted is not None for job in self._jobs)
        while waiting:
            batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
            for job in batch:  # another process may have been there
                self._advance(job)
            asked = [job for job in batch if not job.done]
            for job, reply in self._replies(asked):
                self.bill.add(job.request, reply)
                job.take(self._cache.put(key_of(job.request, self._identity), _storable(reply)))
            waiting.extend(job for job in batch if not job.done)
            finished += sum(job.done for job in batch)
            passed |= any(job.accepted is not None for job in batch)
            self._progress("rewriting", len(self._jobs) - len(waiting), len(self._jobs))
            if stop and any(job.done and job.accepted is None for job in batch):
                return
            if finished >= HOPELESS and not passed:
                for job in waiting:
                    job.give_up(f"not asked for, since none of {finished} others passed")
                return

    def forecast(self, asking: Asking) -> Bill:
        """What the prompts that are not done would take; estimates."""
        typical = sum(map(estimated_tokens, asking.examples)) // len(asking.examples) + 8
        bill = Bill(estimated=True)
        sent_most = written_most = 0
        for job in self._jobs:
            if job.done:
                continue
            rewritten = estimated_tokens(job.prompt) + typical
            bill.requests += 1
            bill.input_tokens += tokens_in(job.request)
            bill.output_tokens += _VERDICT if job.candidate is not None else rewritten
            if asking.judge and job.candidate is None:
                judged = judge_request(job.prompt, "")
                bill.requests += 1
                bill.input_tokens += tokens_in(judged) + rewritten
                bill.output_tokens += _VERDICT
            rounds = (asking.attempts - len(job.reasons)) * (2 if asking.judge else 1)
            bill.requests_at_most += rounds
            # the longest examples, and the reason of the last failure
            largest = asking.shots * max(map(estimated_tokens, asking.examples)) + 40
            sent_most += rounds * (tokens_in(asking.request(job.prompt, 0, None)) + largest)
            written_most += rounds * asking.max_tokens
        bill.tokens_at_most = (sent_most, written_most)
        return bill

    def _replies(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, TextReply]]:
        if not jobs:
            return
        open_numbers = set(range(len(jobs)))
        replies = self._generator.generate([job.request for job in jobs])
        try:
            for number, reply in replies:
                if number not in open_numbers:
                    raise PluginError(f"the text generator gave a reply number {number} that nobody waits for")
                open_numbers.remove(number)
                yield jobs[number], reply
        finally:
            getattr(replies, "close", lambda: None)()  # or it would go on asking after an error of ours
        if open_numbers:
            raise PluginError(f"the text generator left {len(open_numbers)} of {len(jobs)} requests without a reply")

    def _advance(self, job: Job) -> None:
        while not job.done and (reply := self._cache.get(key_of(job.request, self._identity))) is not None:
            self.from_cache += 1
            job.take(reply)


def _storable(reply: TextReply) -> TextReply:
    """No more of a reply than is looked at, and nothing that a file of text cannot hold."""
    if reply.text is None:
        return reply if reply.problem else replace(reply, problem="no reply")
    try:
        reply.text.encode()
    except UnicodeEncodeError:
        return replace(reply, text=None, problem="the reply is no valid text")
    return replace(reply, text=reply.text[: LARGEST_REPLY + 1], problem=None)


def silent(stage: str, done: int, total: int | None) -> None:
    """Shows no progress."""
