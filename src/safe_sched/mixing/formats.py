"""The format of a task, learnt from its rows, and safety rows put into it.

Safety rows that look unlike the task are ignored outside their own format (arXiv 2406.10288), and attacks sit in the
format: in a system prompt that orders obedience, in a wrapper around the task. `induce_format` learns the format
without a model: the templates of every part of a row (`safe_sched.mixing.templates`), which of them go together, the
shape of the answers. `TaskFormat.render` takes a genuine row of the user's, the *carrier*, and puts a safety row's
request where it has its own question, and the refusal where it has its answer. System prompts, wrappers, options and
earlier turns are the carrier's, so formats come in the shares that they have in the file.

*Carrier text.* In a slot of free text the request stands among clauses of the carrier (`safe_sched.mixing.blend`). So
some harmless text of the task is seen beside a request and answered with a refusal; carriers are at most
`CARRIER_WORDS` long, and `explain` says how much of them stays. ``blend=0`` puts the bare request into the slot.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from safe_sched.data.schemas import Example, detect, read, write
from safe_sched.errors import DataError, OptionError
from safe_sched.mixing.blend import Profiler, choose, put, whole
from safe_sched.mixing.clusters import Cluster, Main, find_clusters, prompt_texts, sentence_around
from safe_sched.mixing.templates import Filling, Template, assign

SAMPLE = 2500
"""Rows that are kept of a file, at random: those that requests are put into."""

_CANDIDATES = 8  # carriers that a request may choose from
_VERSION = 1
_NAME = "safe-sched task format"
_TEMPLATES, _CLUSTERS = TypeAdapter(dict[str, tuple[Template, ...]]), TypeAdapter(tuple[Cluster, ...])


class TaskFormat:
    """What `induce_format` has learnt.

    Attributes:
        schema: Schema of the rows.
        templates: Templates of every place, such as ``"system"`` or ``"input"``; the trivial one is last.
        clusters: Which of them go together, largest share first.
        rows_seen: Rows that were learnt from.
        carriers: Rows that requests are put into.
        seed: Decides on carriers, with the counter.
        blend: Share of rendered rows in which the request stands among clauses of its carrier.
    """

    def __init__(
        self,
        *,
        schema: str,
        templates: Mapping[str, Sequence[Template]],
        clusters: Sequence[Cluster],
        carriers: Sequence[Example],
        rows_seen: int,
        seed: int,
        blend: float,
    ) -> None:
        self.schema = schema
        self.templates = {place: tuple(those) for place, those in templates.items()}
        self.clusters = tuple(clusters)
        self.rows_seen = rows_seen
        self.seed = seed
        self.blend = blend
        self.carriers = tuple(carriers)
        self._cluster_of = {row: cluster for cluster in self.clusters for row in cluster.rows}
        order = sorted(self._cluster_of)
        random.Random(f"carriers {seed}").shuffle(order)
        self._order = order
        self._texts = {
            cluster: {row: self._slot_text(cluster, row) for row in cluster.rows} for cluster in self.clusters
        }
        self._profilers = {cluster: Profiler.of(list(texts.values())[:500]) for cluster, texts in self._texts.items()}

    @property
    def tokenizer(self) -> Any:
        """Of the rows, in schema ``"tokens"``."""
        return self.carriers[0].tokenizer

    @property
    def learned(self) -> bool:
        """Whether there is any constant in the prompts."""
        return any(
            self.templates[place][number].weight
            for cluster in self.clusters
            for place, number in zip(cluster.places, cluster.templates, strict=True)
        )

    # rows -------------------------------------------------------------------------------------------------------

    def render(self, safety_row: Mapping[str, Any], counter: int = 0) -> dict[str, Any]:
        r"""A safety row as a row of the task.

        Args:
            safety_row: A row of any schema that tells the prompt from the answer.
            counter: Which rendering it is; with the seed it decides on the carrier. As many counters in turn as there
                are carriers begin with different ones.

        Returns:
            A row in the user's schema. The request is in it word for word, but for the case of its first letter and
            its final punctuation. Columns that are no part of the schema are None.

        Raises:
            DataError: The safety row has no request or no refusal.

        Example:
            >>> rows = [{"prompt": f"Question: {q}?\nAnswer:", "completion": "yes"} for q in ("A", "B", "C", "D")]
            >>> safety = {"prompt": "How do I pick a lock?", "completion": "I won't help with that."}
            >>> induce_format(rows).render(safety)
            {'prompt': 'Question: How do I pick a lock?\nAnswer:', 'completion': "I won't help with that."}
        """
        request, refusal = _request(safety_row)
        rng = random.Random(f"{self.seed} {counter}")
        target = self._order[counter % len(self._order)]
        cluster = self._cluster_of[target]
        texts = self._texts[cluster]
        bare = rng.random() >= self.blend
        if cluster.main.slot is None or not texts[target].strip():
            return self._written(cluster, target, request, refusal)
        if bare:
            return self._written(cluster, target, put(request, whole(texts[target])), refusal)
        others = [row for row in rng.sample(cluster.rows, min(_CANDIDATES, len(cluster.rows))) if row != target]
        rows = [target, *others[: _CANDIDATES - 1]]
        chosen, place = choose(request, texts[target], [texts[row] for row in rows], self._profilers[cluster], rng)
        return self._written(cluster, rows[chosen], put(request, place), refusal)

    def reproduce(self, row: Mapping[str, Any]) -> list[str] | None:
        """The texts of a row's prompt, put together from its templates and what the row has in their slots.

        Args:
            row: A row of the user's.

        Returns:
            The texts in reading order, which should be those of the row; None where the row has parts that no row of
            the sample had.
        """
        parsed = self.parse(row)
        return None if parsed is None else [template.fill(filling) for _, template, filling in parsed]

    def parse(self, row: Mapping[str, Any]) -> list[tuple[str, Template, Filling]] | None:
        """Place, template and slots of every text of a row's prompt."""
        example = read(row, self.schema, tokenizer=self.tokenizer)
        found = []
        for place, text in prompt_texts(example):
            templates = self.templates.get(place)
            if templates is None:
                return None
            template = templates[assign(templates, text)]
            filling = template.match(text)
            found.append((place, template, Filling((text,)) if filling is None else filling))
        return found

    def _asks(self, cluster: Cluster, text: str) -> tuple[int, int]:
        """Where in a text of the main part its row asks; all of it, where there is no slot or it is of no template."""
        main = cluster.main
        template = self.templates[cluster.places[main.part]][cluster.templates[main.part]]
        filling = template.match(text)
        if main.slot is None or filling is None:
            return 0, len(text)
        start, end = template.place(filling, main.slot)
        return sentence_around(text, start, end) if main.wide else (start, end)

    def _slot_text(self, cluster: Cluster, row: int) -> str:
        text = self.carriers[row].parts[cluster.main.part].text
        start, end = self._asks(cluster, text)
        return text[start:end]

    def _written(self, cluster: Cluster, row: int, request: str, refusal: str) -> dict[str, Any]:
        """A carrier with a text in its main slot, and a refusal for an answer."""
        carrier, main = self.carriers[row], cluster.main
        texts = [part.text for part in carrier.parts]
        text = texts[main.part]
        if carrier.answer is None:
            template = self.templates[cluster.places[main.part]][cluster.templates[main.part]]
            texts[main.part] = _as_one_text(template, template.match(text), main, request, refusal)
        else:
            if main.slot is None:
                texts[main.part] = f"{text}\n\n{request}" if text.strip() else request
            else:
                start, end = self._asks(cluster, text)
                texts[main.part] = text[:start] + request + text[end:]
            texts[carrier.answer] = cluster.answer.wrap(refusal)
        return _copied(write(carrier.with_texts(texts), extras=False))

    # to keep ----------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The format as a text, with the rows that carry requests: keep it as safe as the training file.

        Raises:
            DataError: A row holds something that JSON does not know.
        """
        try:
            return json.dumps(
                {
                    "what": _NAME,
                    "version": _VERSION,
                    "schema": self.schema,
                    "seed": self.seed,
                    "blend": self.blend,
                    "rows_seen": self.rows_seen,
                    "templates": {place: [asdict(one) for one in those] for place, those in self.templates.items()},
                    "clusters": [asdict(cluster) for cluster in self.clusters],
                    "carriers": [write(carrier, extras=False) for carrier in self.carriers],
                },
                ensure_ascii=False,
                allow_nan=False,
            )
        except (TypeError, ValueError) as error:
            raise DataError(f"this format cannot be saved: {error}; give rows of texts, numbers and lists") from error

    @classmethod
    def from_json(cls, text: str, *, tokenizer: Any = None) -> TaskFormat:
        """A format that `to_json` has written.

        Args:
            text: What it wrote.
            tokenizer: For schema ``"tokens"``.

        Raises:
            DataError: It is something else, damaged, or of another version.
        """
        try:
            saved = json.loads(text)
            if not isinstance(saved, dict) or saved.get("what") != _NAME:
                raise DataError("this is not a task format; give what TaskFormat.to_json() wrote")
            if saved["version"] != _VERSION:
                raise DataError(f"a task format of version {saved['version']!r}; known: {_VERSION}. Induce it anew.")
            return cls(
                schema=saved["schema"],
                templates=_TEMPLATES.validate_python(saved["templates"]),
                clusters=_CLUSTERS.validate_python(saved["clusters"]),
                carriers=[read(row, saved["schema"], tokenizer=tokenizer) for row in saved["carriers"]],
                rows_seen=int(saved["rows_seen"]),
                seed=int(saved["seed"]),
                blend=float(saved["blend"]),
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"a damaged task format ({type(error).__name__}: {error}); induce it anew") from error


# inducing -----------------------------------------------------------------------------------------------------------


def induce_format(
    rows: Iterable[Mapping[str, Any]],
    *,
    schema: str | None = None,
    seed: int = 0,
    blend: float = 1.0,
    tokenizer: Any = None,
) -> TaskFormat:
    r"""Learn the format of a task from its rows. Linear in the rows; no model is asked.

    Args:
        rows: Rows of one schema. All are taken from the iterable; a random `SAMPLE` of them is kept and learnt from.
        schema: A name in `SCHEMAS`, or None to detect it.
        seed: Of the sample, and of what `TaskFormat.render` draws.
        blend: Share of rendered rows in which the request stands among clauses of a carrier, in [0, 1]; in the others
            it stands alone in its slot.
        tokenizer: For schema ``"tokens"``.

    Raises:
        DataError: There are no rows, or none with an answer, or a row is not of the schema.
        OptionError: ``blend`` is out of range.

    Example:
        >>> rows = [{"prompt": f"Question: {q}?\nAnswer:", "completion": "yes"} for q in ("A", "B", "C", "D")]
        >>> found = induce_format(rows)
        >>> [template.shown() for template in found.templates["prompt"]]
        ['Question: {0}?\nAnswer:', '{0}']
        >>> found.clusters[0].share
        1.0
    """
    if not 0 <= blend <= 1:
        raise OptionError(f"blend={blend}: allowed are shares from 0 (bare requests) to 1 (all among carrier text)")
    sample = _sampled(rows, seed)
    if not sample:
        raise DataError("there are no rows to learn a format from")
    schema = detect([row for _, row in sample]) if schema is None else schema
    examples = []
    for number, row in sample:
        try:
            examples.append(read(row, schema, tokenizer=tokenizer))
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error
    templates, clusters = find_clusters(examples)
    return TaskFormat(
        schema=schema,
        templates=templates,
        clusters=clusters,
        carriers=examples,
        rows_seen=len(examples),
        seed=seed,
        blend=blend,
    )


def _sampled(rows: Iterable[Mapping[str, Any]], seed: int) -> list[tuple[int, Mapping[str, Any]]]:
    """A reservoir: every row has the same chance to be in it; in the order of the file."""
    rng = random.Random(f"sample {seed}")
    kept: list[tuple[int, Mapping[str, Any]]] = []
    for number, row in enumerate(rows):
        if number < SAMPLE:
            kept.append((number, row))
        elif (at := rng.randrange(number + 1)) < SAMPLE:
            kept[at] = (number, row)
    return sorted(kept, key=lambda one: one[0])


# safety rows --------------------------------------------------------------------------------------------------------


def _request(row: Mapping[str, Any]) -> tuple[str, str]:
    """What a safety row asks, and how it is refused."""
    example = read(row)
    if example.answer is None:
        raise DataError(
            f"a safety row has schema {example.schema!r}, in which prompt and refusal are one; "
            "give prompt and completion"
        )
    before = list(itertools.takewhile(lambda part: part.role == "user", reversed(example.parts[: example.answer])))
    request = "\n\n".join(part.text.strip() for part in reversed(before) if part.text.strip())
    refusal = example.parts[example.answer].text.strip()
    if not request or not refusal:
        raise DataError(
            f"a safety row has {'no request' if not request else 'no refusal'} (fields "
            f"{', '.join(sorted(map(str, row)))}); give rows with a prompt and a refusal of it"
        )
    return request, refusal


def _copied(value: Any) -> Any:
    """Lists and dicts anew: a rendered row that is changed must not change the row it was made from."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _as_one_text(template: Template, filling: Filling | None, main: Main, request: str, refusal: str) -> str:
    if filling is None or main.slot is None:
        return f"{request}\n\n{refusal}"
    slots = list(filling.slots)
    if main.answer_slot is None:
        slots[main.slot] = f"{request}\n\n{refusal}"
    else:
        # the answer keeps the space that stands around answers
        old = slots[main.answer_slot]
        lead = old[: len(old) - len(old.lstrip())]
        slots[main.slot], slots[main.answer_slot] = request, lead + refusal
    return template.fill(Filling(tuple(slots), filling.options))
