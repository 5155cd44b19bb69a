"""Rows of an audit as a language model reads them: token ids, and where in them the answers stand.

A conversation goes through the tokenizer's chat template, and so does a plain prompt with its answer: an aligned model
refuses as the assistant of a chat. Without a template the texts stand one behind the other. Where an answer begins is
found in the rendered text and never looked for as a mark in the tokens, which the text of a row could hold as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from safe_sched.audit.rows import AuditRow
from safe_sched.rows.keys import IGNORE_INDEX

_Turn = dict[str, str]

_TURNS = 128  # of a conversation that are read: every answer costs a rendering of all before it
_LETTERS = 64  # of a text for every token that a row may have: no more are ever read of it


@dataclass(frozen=True)
class TokenRow:
    """A row as token ids.

    Attributes:
        tokens: Its ids, none where there is a problem.
        answers: First token and end of every answer; an answer that is not known is an empty span at the end.
        problem: Why there are no tokens, in words that quote nothing of the row.
        whole: Whether nothing was cut off.
    """

    tokens: Sequence[int] = ()
    answers: Sequence[tuple[int, int]] = ()
    problem: str | None = None
    whole: bool = True

    @property
    def labels(self) -> int:
        """Tokens of all answers."""
        return sum(end - start for start, end in self.answers)

    def cut(self, longest: int) -> TokenRow:
        """The row with at most so many tokens: the end goes, as in training.

        If no answer is left then, the first one is kept, with the beginning and the end of its prompt: a long prompt
        must not hide what it asks for.

        Example:
            >>> row = TokenRow([1, 2, 3, 4, 5, 6], [(1, 2), (4, 6)]).cut(5)
            >>> row.tokens, row.answers, row.whole
            ([1, 2, 3, 4, 5], [(1, 2), (4, 5)], False)
            >>> row = TokenRow([1, 2, 3, 4, 5, 6, 7, 8, 9], [(7, 9)]).cut(4)
            >>> row.tokens, row.answers
            ([1, 6, 7, 8], [(3, 4)])
        """
        if len(self.tokens) <= longest:
            return self
        left = [(start, min(end, longest)) for start, end in self.answers if start < longest]
        if left:
            return TokenRow(self.tokens[:longest], left, whole=False)
        start, end = self.answers[0]
        answer = self.tokens[start:end][: max(1, longest // 4)]
        prompt = longest - len(answer)
        head, tail = prompt // 2 - (prompt // 2 == prompt), prompt - prompt // 2
        tokens = [*self.tokens[:head], *self.tokens[start - tail : start], *answer]
        return TokenRow(tokens, [(prompt, len(tokens))], whole=False)


class Preparation:
    """Turns rows into tokens.

    Args:
        tokenizer: Of the model.
        vocabulary: Rows of the model's embedding; an id beyond is a problem of its row.
        longest: Tokens that a row is cut to.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, longest: int) -> None:
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds its tokenizer
        self.vocabulary, self.longest = vocabulary, longest
        self.chat = bool(getattr(self.tokenizer, "chat_template", None))
        self._system = self.chat and self._takes_system()

    def __call__(self, rows: Sequence[AuditRow]) -> list[TokenRow]:
        """Tokens of rows, in their order. A row's tokens do not depend on the others."""
        found: list[TokenRow | None] = [None] * len(rows)
        texts: list[tuple[str, list[tuple[int, int]]]] = []
        numbers: list[tuple[int, bool]] = []
        for number, row in enumerate(rows):
            if row.example.schema == "tokens":
                found[number] = _of_tokens(row.example.row)
                continue
            try:
                row, whole = self._shortened(row)
                text, spans = self._chat(row) if self.chat else self._plain(row)
            except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
                found[number] = TokenRow(problem=f"the model's chat template cannot hold it ({type(error).__name__})")
                continue
            texts.append((text, spans))
            numbers.append((number, whole))
        for (number, whole), row in zip(numbers, self._tokenize(texts), strict=True):
            found[number] = dataclasses.replace(row, whole=whole)
        return [self._checked(row) for row in found if row is not None]

    def _checked(self, row: TokenRow) -> TokenRow:
        if row.problem is None and row.tokens and not 0 <= min(row.tokens) <= max(row.tokens) < self.vocabulary:
            row = TokenRow(problem="it has token ids that the model does not know")
        elif row.problem is None:
            answers = [(start, end) for start, end in row.answers if start]
            problem = None if answers else "it has no prompt before an answer"
            row = dataclasses.replace(row, answers=answers, problem=problem)
        return row.cut(self.longest)

    def kept(self, row: AuditRow) -> AuditRow:
        """The row as it may be kept: with its texts as far as they can be read, and without its other columns."""
        row, _ = self._shortened(row)
        return dataclasses.replace(
            row, example=dataclasses.replace(row.example, row={}), system="", prompt="", answer=""
        )

    def _shortened(self, row: AuditRow) -> tuple[AuditRow, bool]:
        """The row without what no token of it could come from, and whether that is all of it."""
        limit, parts = _LETTERS * self.longest, row.example.parts
        if len(parts) <= _TURNS and all(len(part.text) <= limit for part in parts):
            return row, True
        kept = tuple(
            part if len(part.text) <= limit else dataclasses.replace(part, text=_ends(part.text, limit))
            for part in parts[:_TURNS]
        )
        return dataclasses.replace(row, example=dataclasses.replace(row.example, parts=kept)), False

    # texts ----------------------------------------------------------------------------------------------------------

    def _render(self, turns: Sequence[_Turn], *, ask: bool) -> str:
        return str(self.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=ask))

    def _takes_system(self) -> bool:
        turns = [{"role": "system", "content": "zq"}, {"role": "user", "content": "Hello"}]
        try:
            return "zq" in self._render(turns, ask=True)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError):
            return False

    def _chat(self, row: AuditRow) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation, and where its answers stand."""
        turns = turns_of(row, system=self._system)
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not answers:
            text = self._render(turns, ask=True)
            return text, [(len(text), len(text))]
        turns = turns[: answers[-1] + 1]
        text = self._render(turns, ask=False)
        spans = []
        for i in answers:
            start = _same(self._render(turns[:i], ask=True), text)
            end = len(text) if i == answers[-1] else _same(self._render(turns[: i + 1], ask=False), text)
            spans.append((start, max(start, end)))
        return text, spans

    def _plain(self, row: AuditRow) -> tuple[str, list[tuple[int, int]]]:
        between = "" if row.example.schema == "prompt_completion" else "\n\n"
        parts = [part for part in row.example.parts if part.text or part.role == "assistant"]
        last = max((i for i, part in enumerate(parts) if part.role == "assistant"), default=None)
        text, spans = "", []
        for part in parts if last is None else parts[: last + 1]:
            text += between if text else ""
            start, text = len(text), text + part.text
            if part.role == "assistant":
                spans.append((start, len(text)))
        if not spans:
            return text, [(len(text), len(text))]
        end = self.tokenizer.eos_token or ""
        text = text if text.endswith(end) else text + end
        return text, [*spans[:-1], (spans[-1][0], len(text))]

    # tokens ---------------------------------------------------------------------------------------------------------

    def _tokenize(self, texts: Sequence[tuple[str, list[tuple[int, int]]]]) -> list[TokenRow]:
        if not texts:
            return []
        special = not self.chat  # a template writes its own
        given = self.tokenizer([text for text, _ in texts], add_special_tokens=special, verbose=False)
        found = []
        for i, (text, spans) in enumerate(texts):
            ids = given["input_ids"][i]

            def place(at: int, i: int = i, text: str = text, ids: list[int] = ids) -> int:
                if not getattr(given, "is_fast", False):  # tokens that the text up to there has as well
                    return _same(self.tokenizer(text[:at], add_special_tokens=special)["input_ids"], ids)
                for char in range(at, len(text)):  # white space may have no token
                    token = given.char_to_token(i, char)
                    if token is not None:
                        return token
                return len(ids)

            answers = [(place(start), place(end) if end < len(text) else len(ids)) for start, end in spans]
            # a row without an answer ends with its prompt, and not with the special tokens of an end
            if spans[-1][0] == spans[-1][1] == len(text):
                while special and ids and ids[-1] == self.tokenizer.eos_token_id:
                    ids = ids[:-1]
                answers = [*answers[:-1], (len(ids), len(ids))]
            found.append(TokenRow(ids, answers))
        return found


def turns_of(row: AuditRow, *, system: bool) -> list[_Turn]:
    r"""A row as a conversation that templates take: turns of one role in a row are one, and no role is unheard of.

    Args:
        row: Of any schema but tokens.
        system: Whether the template has a place for a system text; else it stands before the user's first.

    Example:
        >>> from safe_sched.audit.rows import audit_row
        >>> row = audit_row({"instruction": "Add.", "input": "1, 2", "output": "3", "system": "Be brief."})
        >>> turns_of(row, system=False)
        [{'role': 'user', 'content': 'Be brief.\n\nAdd.\n\n1, 2'}, {'role': 'assistant', 'content': '3'}]
    """
    turns: list[_Turn] = []
    for part in row.example.parts:
        role = part.role if part.role in ("assistant", "system") else "user"
        if role == "system" and (not system or (turns and turns[-1]["role"] != "system")):
            role = "user"
        if not part.text and role != "assistant":
            continue
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{part.text}"
        else:
            turns.append({"role": role, "content": part.text})
    return turns


def _ends(text: str, letters: int) -> str:
    return text[: letters // 2] + text[len(text) - letters // 2 :]


def _of_tokens(row: Mapping[str, Any]) -> TokenRow:
    ids = [int(token) for token in row["input_ids"]]
    labels = [int(label) for label in row["labels"]]
    if len(ids) != len(labels):
        return TokenRow(problem="it has not one label per token")
    labelled = [label != IGNORE_INDEX for label in labels]
    edges = [i for i in range(len(ids)) if labelled[i] != (labelled[i - 1] if i else False)] + [len(ids)]
    return TokenRow(ids, [(edges[i], edges[i + 1]) for i in range(0, len(edges) - 1, 2)])


def _same(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How far two sequences are the same."""
    if second[: len(first)] == first:
        return len(first)
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(map(len, (first, second)))
    )
