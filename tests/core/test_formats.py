"""Formats: constants that are known are found, requests are put in word for word, and wrappers stay."""

from __future__ import annotations

import copy
import io
import json
import random
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from bench.formats import AOA, SYNTHETIC, make, noise, passage, phrase
from safe_sched.data.schemas import SCHEMAS, detect, read
from safe_sched.errors import DataError, OptionError
from safe_sched.mixing import formats, templates
from safe_sched.mixing.answers import KINDS, shape_of
from safe_sched.mixing.blend import Place, Profiler, choose, clauses, put
from safe_sched.mixing.clusters import CARRIER_WORDS
from safe_sched.mixing.explain import explain
from safe_sched.mixing.formats import TaskFormat, induce_format
from safe_sched.mixing.options import MARK, OptionStyle, style_of
from safe_sched.mixing.templates import ANYTHING, Filling, Template, learn
from tests.core.growth import LINEAR, growth

REFUSAL = "I can't help with that."
SAFETY = {"prompt": "How do I pick a lock in a minute?", "completion": REFUSAL}
RNG = random.Random(5)
QUESTIONS = [phrase(RNG, 5, 14) for _ in range(120)]


def prompts(row: dict[str, Any], schema: str | None = None) -> list[str]:
    example = read(row, schema)
    return [part.text for part in example.parts[: example.answer]]


def rows_of(name: str, count: int = 300, seed: int = 0) -> list[dict[str, Any]]:
    return [one.row for one in make(name, count, seed)]


def screen(found: TaskFormat) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    console.print(explain(found))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def slow_mask(template: Template, text: str) -> list[bool]:
    """Constant characters, walking along the text: in turn, as early as they come, the last at the end."""
    first, last = template.constants[0], template.constants[-1]
    mask, at = [True] * len(first), len(first)
    for constant in template.constants[1:-1]:
        while not text.startswith(constant, at):
            mask, at = [*mask, False], at + 1
        mask, at = [*mask, *[True] * len(constant)], at + len(constant)
    if len(template.constants) > 1:
        mask += [False] * (len(text) - len(last) - at) + [True] * len(last)
    return mask


# what is found --------------------------------------------------------------------------------------------------------


SHOWN = {
    "multiple choice": {"Question: {0}?\nA) {option}\nB) {option} ...\nAnswer:"},
    "JSON answers": {"Read the review and reply in JSON with the keys label and reason.\n\nReview: {0}"},
    "AOA": {AOA},
    "AutoIF": {
        "Below is an instruction. Follow it exactly, and give nothing but the result.\n\n"
        "### Instruction:\n{0}.\n\n### Response:"
    },
    "AutoIF + AOA": {AOA, "Follow the instruction below.\nInstruction: {0}.\nRemember: obey."},
    "two formats, 5 % noise": {
        "Premise: {0}.\nHypothesis: {1}.\nDoes it follow?",
        "<passage>{0}.</passage>\n<question>{1}</question>",
    },
}


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_constants_of_a_made_up_format_are_found_and_no_others(name: str, seed: int) -> None:
    found = induce_format(rows_of(name, seed=seed))
    constants = {one.shown() for those in found.templates.values() for one in those if one.weight}
    assert constants == SHOWN[name]


@pytest.mark.parametrize("name", SYNTHETIC)
def test_held_out_prompts_come_out_exactly_and_constants_are_where_they_are(name: str) -> None:
    found = induce_format(rows_of(name))
    for made in make(name, 200, seed=7):
        assert found.reproduce(made.row) == prompts(made.row)
        for (_, template, filling), (text, mask) in zip(found.parse(made.row) or [], made.constant, strict=True):
            if template.options is None:
                assert slow_mask(template, text) == list(mask)
            else:
                assert len(filling.options) == len(re.findall(r"\n[A-F]\) ", text))
                assert all(option and "\n" not in option for option in filling.options)


def test_without_the_right_constants_nothing_matches() -> None:
    """The negative control of the two tests above: scrambled templates fit no row, the trivial one finds nothing."""
    (template,) = (one for one in induce_format(rows_of("AutoIF")).templates["prompt"] if one.weight)
    scrambled = Template(tuple("".join(random.Random(3).sample(one, len(one))) for one in template.constants))
    made = make("AutoIF", 50, seed=7)
    assert all(template.match(one.row["prompt"]) for one in made)
    assert not any(scrambled.match(one.row["prompt"]) for one in made)
    assert not any(any(slow_mask(ANYTHING, text)) for one in made for text, _ in one.constant)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_slots_are_minimal(name: str) -> None:
    """No slot begins or ends with a token that it has in all rows of its cluster, but for final punctuation alone."""
    rows = rows_of(name)
    found = induce_format(rows)
    slots: dict[tuple[str, Template, int], list[str]] = {}
    for row in rows:
        for place, template, filling in found.parse(row) or []:
            if template.weight:
                for number, slot in enumerate(filling.slots):
                    slots.setdefault((place, template, number), []).append(slot)
    for values in slots.values():
        for end in (0, -1):
            ends = {re.findall(r"\w+|\W", value)[end] for value in values if value}
            assert len(ends) > 1 or ends <= {".", "?"}


def test_noise_has_no_template_and_explain_says_so() -> None:
    rng = random.Random(0)
    found = induce_format([noise(rng).row for _ in range(300)])
    assert not found.learned
    assert found.templates["prompt"] == (ANYTHING,)
    assert "no constant template" in screen(found)
    assert "no constant template" not in screen(induce_format(rows_of("AutoIF")))


def test_phrases_that_many_questions_begin_with_are_no_format() -> None:
    starts = ["What is the", "How many", "Who was the", "Why does the"]
    rows = [{"prompt": f"{starts[i % 4]} {q}?", "completion": "x"} for i, q in enumerate(QUESTIONS)]
    assert not induce_format(rows).learned


def test_a_mark_that_comes_twice_splits_at_both() -> None:
    texts = [f"{a}\n---\n{b}\n---\n{c}" for a, b, c in zip(QUESTIONS, QUESTIONS[1:], QUESTIONS[2:], strict=False)]
    assert learn(texts)[0].constants == ("", "\n---\n", "\n---\n", "")


@pytest.mark.parametrize(
    ("style", "between"),
    [
        (OptionStyle("A", "", ") ", "\n"), "\n"),
        (OptionStyle("a", "(", ") ", " "), " "),
        (OptionStyle("1", "", ". ", "\n"), "\n"),
        (OptionStyle("-", "", " ", "\n"), "\n"),
        (OptionStyle("A", "[", "] ", "; "), "; "),
    ],
)
def test_option_markers_of_every_kind_are_found(style: OptionStyle, between: str) -> None:
    rng = random.Random(1)
    lists = [tuple(rng.choices(["red", "blue tea", "old map", "sea"], k=rng.randint(2, 5))) for _ in range(100)]
    texts = [
        f"Pick one for: {q}\n{style.write(options)}\nYour pick:" for q, options in zip(QUESTIONS, lists, strict=False)
    ]
    assert all(style_of(text) == style for text in texts)
    template = learn(texts)[0]
    assert template == Template(("Pick one for: ", f"\n{MARK}\nYour pick:"), style)
    for text, options in zip(texts, lists, strict=True):
        filling = template.match(text)
        assert filling is not None
        assert filling.options == options


def test_options_that_never_change_are_constants() -> None:
    texts = [f"{q}\nA) yes\nB) no\nAnswer:" for q in QUESTIONS]
    assert learn(texts)[0] == Template(("", "\nA) yes\nB) no\nAnswer:"))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(list("aA1 \n:-).?" + MARK)), max_size=60)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=12), TEXTS)
def test_every_text_comes_out_of_its_template(texts: list[str], other: str) -> None:
    found = induce_format([{"prompt": text, "completion": "x"} for text in texts])
    for text in [*texts, other]:
        assert found.reproduce({"prompt": text, "completion": "x"}) == [text]


# rendering ------------------------------------------------------------------------------------------------------------


def in_schema(schema: str, question: str, answer: str) -> dict[str, Any]:
    user, said = f"Question: {question}?\nAnswer:", answer
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": user}]
    last = [{"role": "assistant", "content": said}]
    return {
        "messages": {"id": 3, "messages": turns + last},
        "prompt_completion": {"prompt": user, "completion": said, "id": 3},
        "conversational": {"prompt": turns, "completion": last},
        "alpaca": {"instruction": user, "input": "", "output": said, "source": "x"},
        "sharegpt": {"conversations": [{"from": "human", "value": user}, {"from": "gpt", "value": said}]},
        "text": {"text": f"{user} {said}"},
    }[schema]


@pytest.mark.parametrize("schema", [name for name in SCHEMAS if name != "tokens"])
def test_a_rendered_row_has_the_users_schema_and_format(schema: str) -> None:
    rows = [in_schema(schema, question, "ABCD"[i % 4]) for i, question in enumerate(QUESTIONS)]
    found = induce_format(rows)
    for counter in range(20):
        row = found.render(SAFETY, counter)
        assert detect([row]) == schema
        assert list(row) == list(rows[0])
        assert row.get("id") is None
        assert row.get("source") is None
        whole = json.dumps(row)
        assert "How do I pick a lock in a minute?" in whole or "how do I pick a lock in a minute?" in whole
        assert "Question: " in whole
        assert "\\nAnswer:" in whole
        assert REFUSAL in whole


REQUESTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=80).filter(str.strip)


def kept(request: str, text: str) -> bool:
    """Whether a request stands in a text, but for the case of its first letter and its final punctuation."""
    bare = request.strip().rstrip(".?!…")
    return any(form in text for form in (bare, bare[:1].lower() + bare[1:], bare[:1].upper() + bare[1:]))


FOUND = {name: induce_format(rows_of(name, 120)) for name in SYNTHETIC}


@settings(max_examples=100, deadline=None)
@given(REQUESTS, st.integers(0, 10_000), st.sampled_from(list(FOUND)))
def test_the_request_is_kept_word_for_word(request: str, counter: int, name: str) -> None:
    row = FOUND[name].render({"prompt": request, "completion": REFUSAL}, counter)
    assert kept(request, prompts(row)[-1])
    answer = read(row).parts[-1].text
    assert (json.loads(answer)["reason"] if name == "JSON answers" else answer) == REFUSAL


@pytest.mark.parametrize("name", ["AOA", "AutoIF", "AutoIF + AOA"])
def test_wrappers_stay(name: str) -> None:
    found = FOUND[name]
    for counter in range(30):
        row = found.render(SAFETY, counter)
        assert "AOA" not in name or row["messages"][0] == {"role": "system", "content": AOA}
        if "AutoIF" in name:
            _, template, _ = (found.parse(row) or [])[-1]
            assert template.weight


def test_rows_are_decided_by_seed_and_counter() -> None:
    rows = rows_of("AutoIF")
    one, again, other = induce_format(rows), induce_format(rows), induce_format(rows, seed=1)
    first = [one.render(SAFETY, counter) for counter in range(20)]
    assert [again.render(SAFETY, counter) for counter in reversed(range(20))] == first[::-1]
    assert len({row["prompt"] for row in first}) > 10
    assert [other.render(SAFETY, counter) for counter in range(20)] != first


def test_formats_come_in_their_shares() -> None:
    """A round over all carriers draws every row once as its target, so the shares are those of the file, exactly."""
    rows = rows_of("two formats, 5 % noise", 200)
    found = induce_format(rows)

    def kind(row: dict[str, Any]) -> str:
        return next((mark for mark in ("Premise: ", "<passage>") if row["prompt"].startswith(mark)), "noise")

    rendered = Counter(kind(found.render(SAFETY, counter)) for counter in range(len(rows)))
    assert rendered["Premise: "] == sum(kind(row) == "Premise: " for row in rows)
    assert rendered["<passage>"] == sum(kind(row) == "<passage>" for row in rows)


def test_what_stands_around_the_request_is_the_users() -> None:
    rows = rows_of("two formats, 5 % noise", 200)
    found = induce_format(rows)
    premises = {slot for row in rows for _, t, filling in found.parse(row) or [] for slot in filling.slots}
    for counter in range(40):
        ((_, template, filling),) = found.parse(found.render(SAFETY, counter)) or []
        mine = [slot for slot in filling.slots if kept(SAFETY["prompt"], slot)]
        assert len(mine) == 1
        assert all(slot in premises for slot in filling.slots if slot not in mine)
        if template.constants[0] == "<passage>":
            assert kept(SAFETY["prompt"], filling.slots[1])  # the slot behind <question>


def test_blend_0_puts_the_bare_request_into_the_slot() -> None:
    found = induce_format(rows_of("AutoIF"), blend=0)
    ((_, _, filling),) = found.parse(found.render(SAFETY, 3)) or []
    assert filling.slots == ("How do I pick a lock in a minute",)  # its final stop is the wrapper's


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("What is {} plus {}?", "How do I pick a lock in a minute?"),
        ("### Task: add {} and {}\n### Answer:", "### Task: How do I pick a lock in a minute\n### Answer:"),
        ("Be brief. Is {} more than {}? Yes or no.", "Be brief. How do I pick a lock in a minute? Yes or no."),
        ("Translate into French: {} {}", "Translate into French: How do I pick a lock in a minute"),
    ],
)
def test_numbers_within_a_sentence_give_way_with_their_sentence(task: str, expected: str) -> None:
    """By hand. *What is How do I pick a lock plus 3?* would ask nothing; a slot behind a colon is one of its own."""
    rows = [{"prompt": task.format(7 * i, 90 - i), "completion": str(i)} for i in range(60)]
    found = induce_format(rows)
    assert found.learned
    for row in found.render(SAFETY, 1), induce_format(rows, blend=0).render(SAFETY, 1):
        assert row["prompt"].rstrip("?").lower() == expected.rstrip("?").lower()
    again = TaskFormat.from_json(found.to_json())
    assert again.render(SAFETY, 1) == found.render(SAFETY, 1)


def test_a_wrapper_without_punctuation_stays() -> None:
    """What stands in it is a request of several words, so its words are no sentence around a number."""
    rows = [{"prompt": f"Obey and {question} right now", "completion": "x"} for question in QUESTIONS]
    assert induce_format(rows, blend=0).render(SAFETY)["prompt"].startswith("Obey and how do I pick a lock")


def test_earlier_turns_stay() -> None:
    def chat(number: int) -> list[dict[str, str]]:
        said = ["Hello.", f"Good day, {number}.", f"Question: {QUESTIONS[number]}?", "yes"]
        return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(said)]

    found = induce_format([{"messages": chat(number)} for number in range(60)])
    for counter in range(10):
        turns = found.render(SAFETY, counter)["messages"]
        assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant"]
        assert turns[0]["content"] == "Hello."
        assert re.fullmatch(r"Good day, \d+\.", turns[1]["content"])
        assert turns[2]["content"].startswith("Question: ")
        assert kept(SAFETY["prompt"], turns[2]["content"])
        assert turns[3]["content"] == REFUSAL


def test_rows_that_are_one_text_have_their_answer_replaced() -> None:
    rows = [{"text": f"### Instruction:\n{q}\n\n### Response:\nIt is {i}."} for i, q in enumerate(QUESTIONS)]
    row = induce_format(rows, blend=0).render({"prompt": "pick a lock", "completion": REFUSAL})
    assert row["text"].startswith("### Instruction:\npick a lock\n\n### Response:\n")
    assert REFUSAL in row["text"]


def test_the_safety_rows_may_have_any_schema() -> None:
    found = FOUND["AutoIF"]
    expected = found.render(SAFETY, 5)
    request, refusal = SAFETY["prompt"], SAFETY["completion"]
    for row in (
        {"instruction": request, "input": "", "output": refusal},
        {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": refusal}]},
        {"conversations": [{"from": "human", "value": request}, {"from": "gpt", "value": refusal}]},
    ):
        assert found.render(row, 5) == expected


class Characters:
    """A tokenizer of characters."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(one) for one in text]

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "".join(map(chr, token_ids))


def test_rows_of_tokens_are_rendered_as_tokens_with_the_end_that_every_answer_has() -> None:
    def tokens(prompt: str, answer: str) -> dict[str, list[int]]:
        ids = [ord(one) for one in prompt + answer]
        return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}

    rows = [tokens(f"<s>[INST] {q}? [/INST]", f" It is {i}.</s>") for i, q in enumerate(QUESTIONS)]
    found = induce_format(rows, tokenizer=Characters(), blend=0)
    expected = tokens("<s>[INST] how do I pick a lock in a minute? [/INST]", f" {REFUSAL}</s>")
    assert [one.shown() for one in found.templates["user"]] == ["<s>[INST] {0}? [/INST]", "{0}"]
    assert found.render(SAFETY) == expected
    assert TaskFormat.from_json(found.to_json(), tokenizer=Characters()).render(SAFETY) == expected
    assert "how can I hurt my roommate" in screen(found)


# where in a text ------------------------------------------------------------------------------------------------------


@given(TEXTS)
def test_clauses_together_are_the_text(text: str) -> None:
    assert "".join(clauses(text)) == text


@given(REQUESTS, TEXTS.filter(str.strip), st.data())
def test_a_request_in_any_place_is_whole_and_so_is_the_rest(request: str, text: str, data: st.DataObject) -> None:
    size = len(clauses(text))
    first = data.draw(st.integers(0, size))
    last = data.draw(st.integers(first, size)) if first else size
    result = put(request, Place(text, first, last))
    assert kept(request, result)
    assert result.startswith("".join(clauses(text)[:first]))
    assert result.endswith("".join(clauses(text)[last:]))


def test_the_place_is_the_one_whose_result_is_most_like_the_target() -> None:
    """One of several texts, made so that only there, for that clause, all counts come out as in the target."""
    target = "Ann has 3 cats. Bob has 5 dogs, and a bird flies over the town. Who is there?"
    texts = ["Zoe sings.", "Ann has 3 cats. Bob has 5 dogs, the big old sun goes down so late. Who is there?", "Why?"]
    number, place = choose("a bird will fly over our town", target, texts, Profiler.of(texts), random.Random(0))
    assert number == 1
    assert clauses(texts[1])[place.first : place.last] == ["the big old sun goes down so late. "]
    assert put("A bird will fly over our town?", place) == (
        "Ann has 3 cats. Bob has 5 dogs, a bird will fly over our town. Who is there?"
    )


def test_long_rows_carry_nothing_while_there_are_shorter_ones() -> None:
    rows = [{"prompt": f"Sum up: {passage(random.Random(i))}", "completion": "x y"} for i in range(40)]
    rows += [{"prompt": f"Sum up: {phrase(random.Random(i), 600, 600)}.", "completion": "x y"} for i in range(5)]
    found = induce_format(rows)
    assert max(len(found.render(SAFETY, i)["prompt"].split()) for i in range(90)) < CARRIER_WORDS + 9
    every = induce_format(rows[40:])
    assert kept(SAFETY["prompt"], every.render(SAFETY)["prompt"])


# answers --------------------------------------------------------------------------------------------------------------


ANSWERS = {
    "label": [f"the correct answer is {'true' if i % 3 else 'false'}" for i in range(60)],
    "letter": [f"Answer: ({'ABCD'[i % 4]})" for i in range(60)],
    "number": [f"{i * 7}" for i in range(60)],
    "json": [json.dumps({"label": "good", "why": q, "score": i}) for i, q in enumerate(QUESTIONS)],
    "reasoned": [f"First, {q}. Then {q}.\n#### {i}" for i, q in enumerate(QUESTIONS)],
    "free": QUESTIONS,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_shape_of_answers_is_found_and_a_refusal_stays_one(kind: str) -> None:
    shape = shape_of(ANSWERS[kind])
    assert shape.kind == kind
    wrapped = shape.wrap(REFUSAL)
    if kind == "json":
        assert json.loads(wrapped) == {"label": None, "why": REFUSAL, "score": None}
    elif kind == "letter":
        assert wrapped in (REFUSAL, f"Answer: {REFUSAL}")
    else:
        assert wrapped == REFUSAL


@pytest.mark.parametrize("how", [{}, {"indent": 2}, {"separators": (",", ":")}])
def test_json_refusals_are_laid_out_as_the_tasks_answers(how: dict[str, Any]) -> None:
    rows = [f"```json\n{json.dumps({'answer': q}, **how)}\n```" for q in QUESTIONS]
    assert shape_of(rows).wrap(REFUSAL) == f"```json\n{json.dumps({'answer': REFUSAL}, **how)}\n```"


def test_structural_wrappings_are_adopted_and_half_sentences_are_not() -> None:
    assert shape_of([f"Answer: {q}" for q in QUESTIONS]).wrap(REFUSAL) == f"Answer: {REFUSAL}"
    assert shape_of([f"<answer>{q}</answer>" for q in QUESTIONS]).wrap(REFUSAL) == f"<answer>{REFUSAL}</answer>"
    assert shape_of([f" {q}</s>" for q in QUESTIONS]).wrap(REFUSAL) == f" {REFUSAL}</s>"
    assert shape_of([f" {i}<|end|>\n" for i in range(60)]).wrap(REFUSAL) == f" {REFUSAL}<|end|>\n"
    assert shape_of([f"The reply would be {q}" for q in QUESTIONS]).wrap(REFUSAL) == REFUSAL


# what is kept ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SYNTHETIC)
def test_a_saved_format_renders_the_same_rows(name: str) -> None:
    found = FOUND[name]
    again = TaskFormat.from_json(found.to_json())
    assert [again.render(SAFETY, i) for i in range(10)] == [found.render(SAFETY, i) for i in range(10)]
    assert again.to_json() == found.to_json()


@pytest.mark.parametrize("change", ["what", "version", "templates", "clusters", "carriers", "text", "rows"])
def test_a_damaged_format_is_refused(change: str) -> None:
    saved = json.loads(FOUND["AutoIF"].to_json())
    if change in ("what", "version"):
        saved[change] = "another"
    elif change == "rows":
        saved["clusters"][0]["rows"] = [10_000]
    elif change != "text":
        del saved[change]
    text = json.dumps(saved)
    with pytest.raises(DataError, match=r"task format"):
        TaskFormat.from_json(text[:-9] if change == "text" else text)


def test_a_format_is_learnt_from_a_bounded_sample_of_a_stream() -> None:
    count = formats.SAMPLE + 500
    passed = []

    def stream() -> Any:
        for i in range(count):
            passed.append(i)
            yield {"prompt": f"Question: {i} {QUESTIONS[i % 120]}?", "completion": "x"}

    found = induce_format(stream())
    assert len(passed) == count
    assert found.rows_seen == formats.SAMPLE
    numbers = [int(re.findall(r"\d+", found.carriers[i].parts[0].text)[0]) for i in range(formats.SAMPLE)]
    assert numbers == sorted(numbers)
    assert numbers[-1] >= formats.SAMPLE  # the end of the file has its part in it


def test_the_users_rows_are_left_alone() -> None:
    rows = rows_of("AOA", 40)
    before = copy.deepcopy(rows)
    found = induce_format(rows)
    found.render(SAFETY)["messages"][0]["content"] = "changed"
    assert rows == before


# errors and untrusted text --------------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_an_error() -> None:
    good = {"prompt": "Hi", "completion": "Hello"}
    with pytest.raises(DataError, match="no rows"):
        induce_format([])
    with pytest.raises(OptionError, match=r"blend=1\.5"):
        induce_format([good], blend=1.5)
    with pytest.raises(DataError, match="row 2"):
        induce_format([good, good, {"prompt": "Hi"}], schema="prompt_completion")
    with pytest.raises(DataError, match="no row has both"):
        induce_format([{"messages": [{"role": "user", "content": "Hi"}]}])
    found = induce_format([good])
    for row, what in (
        ({"prompt": " ", "completion": REFUSAL}, "no request"),
        ({"prompt": "x", "completion": ""}, "no refusal"),
        ({"text": "x"}, "prompt and refusal are one"),
    ):
        with pytest.raises(DataError, match=what):
            found.render(row)


def test_texts_of_the_data_cannot_command_the_terminal() -> None:
    rows = [{"prompt": f"\x1b[2J[red]Q\u202e: {q}\x07", "completion": "[bold]a\x1b]0;x"} for q in QUESTIONS]
    shown = screen(induce_format(rows))
    for command in ("\x1b[2J", "\x07", "\x1b]0;", "\u202e"):
        assert command not in shown
    assert "[red]Q" in shown
    assert r"\x1b[2J" in shown


HOSTILE = {
    "line ends": lambda size: "\n" * size,
    "blanks": lambda size: " " * size,
    "numbers": lambda size: "1. " * (size // 3),
    "stops": lambda size: "." * size,
    "dashes": lambda size: "a - " * (size // 4),
    "a bullet and blanks": lambda size: f"- {' ' * size}x\n",
}


@pytest.mark.parametrize("kind", [*HOSTILE, "a number among blanks"])
def test_hostile_texts_take_no_more_than_linear_time(kind: str) -> None:
    """Four times the text takes about four times as long; with quadratic time it would be sixteen."""

    def render(size: int) -> str:
        text = HOSTILE.get(kind, HOSTILE["blanks"])(size)
        rows = [{"prompt": f"{text}{q}{text}", "completion": f"{text}x"} for q in QUESTIONS[:6]]
        if kind not in HOSTILE:
            rows = [{"prompt": f"{text}What is {i} plus 1{text}x?", "completion": str(i)} for i in range(6)]
        return prompts(induce_format(rows).render(SAFETY))[-1]

    assert kept(SAFETY["prompt"], render(100))
    assert growth(render, 4_000) < LINEAR


def test_more_than_linear_time_is_seen() -> None:
    """The control of the test above: the pattern that once looked for bullets."""

    def search(size: int) -> object:
        return re.search(r"^-([ \t]+)[^\n]*\n-\1", f"- {' ' * size}x\n", re.MULTILINE)

    assert growth(search, 2_000) > LINEAR


def test_the_trivial_template_is_always_there() -> None:
    for texts in (["x"], ["x"] * 50, QUESTIONS, ["", ""]):
        assert templates.learn(texts)[-1] == ANYTHING
    assert Filling(("x",)) == ANYTHING.match("x")
