"""Answers and openings in token rows; refusals that grow on one prompt, against a model that is run on each alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from safe_sched.errors import DataError
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
from tests.core.batches import BOUNDARIES, Micro, Row, laws, pack, pad, row

FIRST, SECOND = row(5, 6, 7, 8, prompt=2), row(9, 3, 4, 2, 1, prompt=3)
# two turns: prompt 5 6, answer 7; prompt 8 9, answer 3 4; then a prompt that nobody answers
CHAT = Row((5, 6, 7, 8, 9, 3, 4, 2), (False, False, True, False, False, True, True, False))


def answers(micro: Micro, wanted: Sequence[bool] | None = None, **how: Sequence[int]) -> list[Answer]:
    every = [True] * micro.layout.rows if wanted is None else list(wanted)
    return answers_of(*micro, torch.tensor(every), **how)


def said(found: Sequence[Answer]) -> list[tuple[int, list[int], list[int]]]:
    return [(one.row, one.prompt.tolist(), one.tokens.tolist()) for one in found]


LAYOUTS: dict[str, Callable[[Sequence[Row]], Micro]] = {
    "right": lambda rows: pad(rows, "right", extra=2),
    "left": lambda rows: pad(rows, "left", extra=3, filler=7),
    **{name: lambda rows, name=name: pack(rows, name) for name in BOUNDARIES},
}
in_any_layout = pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS)

# answers --------------------------------------------------------------------------------------------------------------


@in_any_layout
def test_an_answer_begins_at_the_first_label(lay):
    micro = lay([FIRST, SECOND])
    found = answers(micro)
    assert said(found) == [(0, [5, 6], [7, 8]), (1, [9, 3, 4], [2, 1])]
    for answer in found:
        line, column = answer.at
        assert micro.ids[line, column] == answer.prompt[-1]
        assert micro.ids[line, column + 1] == answer.tokens[0]
        assert micro.layout.row[line, column] == answer.row


@in_any_layout
def test_every_turn_of_a_conversation_is_an_answer_to_all_that_came_before(lay):
    found = answers(lay([FIRST, CHAT]))
    assert said(found)[1:] == [(1, [5, 6], [7]), (1, [5, 6, 7, 8, 9], [3, 4])]


@st.composite
def conversation(draw: st.DrawFn) -> list[tuple[list[int], list[int]]]:
    """Turns of a prompt and an answer."""
    words = st.integers(1, 9)
    turns = draw(st.integers(1, 3))
    return [
        (
            draw(st.lists(words, min_size=1 if turn else 2, max_size=4)),
            draw(st.lists(words, min_size=1, max_size=4)),
        )
        for turn in range(turns)
    ]


def as_row(turns: list[tuple[list[int], list[int]]]) -> Row:
    tokens, labelled = [], []
    for prompt, answer in turns:
        tokens += prompt + answer
        labelled += [False] * len(prompt) + [True] * len(answer)
    return Row(tuple(tokens), tuple(labelled))


@laws
@given(
    chats=st.lists(conversation(), min_size=1, max_size=4),
    lay=st.sampled_from(list(LAYOUTS)),
    picks=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_the_answers_of_any_conversations_in_any_layout(chats, lay, picks):
    """Against the turns that the rows were made of; only those of the rows asked for."""
    expected = []
    for number, turns in enumerate(chats):
        before: list[int] = []
        for prompt, answer in turns:
            before = before + prompt
            if picks[number]:
                expected.append((number, before, answer))
            before = before + answer
    micro = LAYOUTS[lay]([as_row(turns) for turns in chats])
    found = answers(micro, picks[: len(chats)])
    assert said(found) == expected
    for one in found:
        line, column = one.at
        assert micro.layout.row[line, column] == one.row
        assert micro.layout.position[line, column] == one.prompt.numel() - 1


MARK = (50, 51)
# two turns with labels on everything: user 5 6, assistant 7 8; user 9, assistant 3
MARKED = row(5, 6, 50, 51, 7, 8, 9, 50, 51, 3, prompt=0)


@in_any_layout
@pytest.mark.parametrize("first_label", [True, False])
def test_where_the_prompt_is_trained_on_an_answer_begins_behind_the_mark(lay, first_label):
    """Collators disagree on the label of the first token, which nothing predicts: it tells no prompt."""
    marked = Row(MARKED.tokens, (first_label, *MARKED.labelled[1:]))
    found = answers(lay([FIRST, marked]), mark=MARK)
    assert said(found) == [
        (0, [5, 6], [7, 8]),
        (1, [5, 6, 50, 51], [7, 8, 9]),  # what the user says next is still trained on
        (1, [5, 6, 50, 51, 7, 8, 9, 50, 51], [3]),
    ]


def test_a_prompt_without_labels_needs_no_mark():
    """Control: the mark is looked for only where labels do not tell; half a mark is none."""
    assert said(answers(pad([row(5, 50, 51, 6, 7, prompt=4)]), mark=MARK)) == [(0, [5, 50, 51, 6], [7])]
    assert said(answers(pad([row(50, 5, 50, 51, 6, prompt=0)]), mark=MARK)) == [(0, [50, 5, 50, 51], [6])]


@pytest.mark.parametrize("mark", [(), MARK, (6, 7, 8)])
def test_a_row_without_a_prompt_is_a_data_error_that_names_it(mark):
    """Labels on everything and no mark; or a mark that nothing comes after."""
    whole = row(5, 6, 7, 8, prompt=0)
    with pytest.raises(DataError, match=r"2 of 3 rows have no prompt .*\(rows 0, 2 of the batch\)") as caught:
        answers(pad([whole, FIRST, whole]), mark=mark)
    assert "BDS()" in str(caught.value)
    assert len(answers(pad([whole, FIRST, whole]), [False, True, False])) == 1


def test_a_row_without_labels_is_not_asked_for():
    """Cut before its answer: it teaches nothing, and the session does not want it."""
    silent = row(5, 6, 7, prompt=3)
    assert said(answers(pad([silent, FIRST]), [False, True])) == [(1, [5, 6], [7, 8])]


@in_any_layout
def test_what_all_answers_begin_with_belongs_to_the_prompt(lay):
    """As "<think></think>" does; an answer that does not begin so keeps all its tokens."""
    think = row(5, 6, 40, 41, 7, 8, prompt=2)
    found = answers(lay([think, FIRST]), skip=(40, 41))
    assert said(found) == [(0, [5, 6, 40, 41], [7, 8]), (1, [5, 6], [7, 8])]
    assert said(answers(lay([think])))[0] == (0, [5, 6], [40, 41, 7, 8])


def test_skipped_tokens_come_behind_a_mark_too():
    marked = row(5, 50, 51, 40, 7, 9, 50, 51, 40, 3, prompt=0)
    found = answers(pad([marked]), mark=MARK, skip=(40,))
    assert said(found) == [(0, [5, 50, 51, 40], [7, 9]), (0, [5, 50, 51, 40, 7, 9, 50, 51, 40], [3])]


def test_a_mark_that_is_a_label_too_belongs_to_the_prompt():
    """Some templates mark the assistant's turn within what they train on."""
    labelled = row(5, 6, 50, 51, 40, 7, 8, prompt=2)
    assert said(answers(pad([labelled]), mark=MARK)) == [(0, [5, 6, 50, 51], [40, 7, 8])]
    assert said(answers(pad([labelled]), mark=MARK, skip=(40,))) == [(0, [5, 6, 50, 51, 40], [7, 8])]


def test_a_row_cut_within_its_answer_still_answers():
    """At its first token, and in the midst of what all answers begin with."""
    assert said(answers(pad([row(5, 6, 7, prompt=2)]))) == [(0, [5, 6], [7])]
    assert said(answers(pad([row(5, 6, 40, prompt=2)]), skip=(40, 41))) == [(0, [5, 6], [40])]


def test_a_row_cut_where_its_answer_was_about_to_begin_does_not_stop_the_run():
    """All that is left of the answer is what all answers begin with."""
    found = answers(pad([row(5, 6, 40, 41, prompt=2), FIRST]), skip=(40, 41))
    assert said(found) == [(0, [5, 6], [40, 41]), (1, [5, 6], [7, 8])]


def test_no_answer_is_empty():
    """A turn in which the assistant said nothing: what comes next stands for it."""
    found = answers(pad([row(5, 50, 51, 50, 51, 3, prompt=0)]), mark=MARK)
    assert said(found)[-1] == (0, [5, 50, 51, 50, 51], [3])
    assert all(one.tokens.numel() for one in found)


# openings -------------------------------------------------------------------------------------------------------------

some_answers = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8)


@laws
@given(some_answers, st.integers(1, 4))
def test_the_beginning_of_every_refusal_is_told_by_exactly_one_opening(refusals, length):
    """None begins another, so that their probabilities add up; each is the cut beginning of a refusal."""
    openings = openings_of(refusals, length)
    assert len(set(openings)) == len(openings)
    assert set(openings) <= {tuple(refusal[:length]) for refusal in refusals}
    for refusal in refusals:
        assert sum(tuple(refusal[: len(opening)]) == opening for opening in openings) == 1
        assert opens_with(torch.tensor(refusal), openings)
    for one in openings:
        assert sum(one[: len(other)] == other for other in openings) == 1


def test_openings_have_three_tokens():
    assert PHRASE == 3
    assert openings_of([[1, 2, 3, 4], [1, 2, 3, 5], [2, 2]]) == [(1, 2, 3), (2, 2)]


def test_a_refusal_that_begins_others_stands_for_them():
    """Control for the law above: the cut beginnings alone begin one another."""
    assert openings_of([[1], [1, 2], [1, 2, 3], [2, 1]]) == [(1,), (2, 1)]


@pytest.mark.parametrize(
    ("answer", "opens"),
    [([1, 2, 3], True), ([1, 2], True), ([1], False), ([2, 1, 2], False), ([4, 1], True), ([], False)],
)
def test_an_answer_opens_with_an_opening_only_where_it_has_all_of_it(answer, opens):
    assert opens_with(torch.tensor(answer), [(1, 2), (4,)]) == opens
    assert not opens_with(torch.tensor(answer), [])


# log-odds -------------------------------------------------------------------------------------------------------------


@laws
@given(st.floats(0.001, 0.999))
def test_log_odds_in_closed_form(p):
    """log p / (1 - p), which changes its sign with p and 1 - p."""
    found = log_odds(torch.tensor([p, 1 - p], dtype=torch.float64).log())
    assert found[0].item() == pytest.approx(math.log(p / (1 - p)), abs=1e-6)
    assert found[1].item() == pytest.approx(-found[0].item(), abs=1e-6)


def test_log_odds_at_the_extremes():
    """Of certainty, that rounding may exceed, they stay finite; of the impossible they are the log-probability."""
    log_p = torch.tensor([-math.inf, -200.0, -20.0, -1e-3, -1e-5, 0.0, 1e-6])
    found = log_odds(log_p)
    assert found.tolist() == pytest.approx([-math.inf, -200.0, -20.0, 6.907, 11.513, 13.816, 13.816], abs=1e-2)
    assert torch.isfinite(found[1:]).all()
    # control: without the clamp certainty has no log-odds
    assert not torch.isfinite(log_p - torch.log(-torch.expm1(log_p))).all()


# branches -------------------------------------------------------------------------------------------------------------


@laws
@given(some_answers)
def test_a_trie_has_every_continuation_and_no_node_twice(continuations):
    """Walking back from each target spells what came before it."""
    branches = branches_of(continuations)
    assert branches.tokens.numel() == len({tuple(c[:i]) for c in continuations for i in range(1, len(c))})
    for number, continuation in enumerate(continuations):
        for place, token in enumerate(continuation):
            assert branches.targets[number, place] == token
            node, path = int(branches.origins[number, place]) - 1, []
            while node >= 0:
                assert branches.depths[node] == place - 1 - len(path)
                path.append(int(branches.tokens[node]))
                node = int(branches.parents[node])
            assert path[::-1] == continuation[:place]
        assert (branches.targets[number, len(continuation) :] == -100).all()


PROMPTS = [[11, 12, 13, 14, 15, 16, 17], [21], [31, 32, 33]]
CONTINUATIONS = [
    [[1, 2, 3, 4], [1, 2, 5], [1, 6], [7], [8, 2, 3, 9, 1]],  # forks at every depth
    [[4], [5]],  # nothing follows these, so no node
    [[2, 2, 2], [3, 1]],
]


def tiny(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    config._attn_implementation = attention
    model = LlamaForCausalLM(config).eval()
    assert model.config._attn_implementation == attention
    return model


@torch.no_grad()
def directly(model: LlamaForCausalLM, prompt: list[int], continuation: list[int]) -> list[float]:
    """One continuation, alone on its own line."""
    logits = model(input_ids=torch.tensor([prompt + continuation])).logits[0].double()
    log_p = logits.log_softmax(-1)
    return [float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(continuation)]


Change = Callable[[Tensor, Tensor, list[Branches]], None]


@torch.no_grad()
def together(model: LlamaForCausalLM, change: Change = lambda seen, positions, ways: None) -> list[Tensor]:
    """All continuations of all prompts in one forward."""
    ways = [branches_of(some) for some in CONTINUATIONS]
    ids, positions, seen = grow([torch.tensor(prompt) for prompt in PROMPTS], ways, pad=0)
    change(seen, positions, ways)
    mask = seen
    if model.config._attn_implementation == "eager":
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    nodes = max(way.tokens.numel() for way in ways)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return branch_log_probs(logits[:, -1 - nodes :], ways)


def furthest(model: LlamaForCausalLM, found: list[Tensor]) -> float:
    """The largest difference to the direct computation."""
    worst = 0.0
    for prompt, some, log_p in zip(PROMPTS, CONTINUATIONS, found, strict=True):
        for one, values in zip(some, log_p.tolist(), strict=True):
            for a, b in zip(values, directly(model, prompt, one), strict=False):
                worst = max(worst, abs(a - b))
    return worst


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_branches_have_the_probabilities_of_separate_lines(attention):
    """Prompts of different lengths, each with branches of its own; 0 behind the end of a continuation."""
    model = tiny(attention)
    found = together(model)
    assert furthest(model, found) < 1e-5
    for some, log_p in zip(CONTINUATIONS, found, strict=True):
        assert log_p.shape == (len(some), max(map(len, some)))
        assert log_p.dtype == torch.float32
        for one, values in zip(some, log_p, strict=True):
            assert (values[: len(one)] < 0).all()
            assert (values[len(one) :] == 0).all()


def all_nodes_see_each_other(seen: Tensor, positions: Tensor, ways: list[Branches]) -> None:
    nodes = max(way.tokens.numel() for way in ways)
    seen[:, :, -nodes:, -nodes:] |= torch.ones(nodes, nodes, dtype=torch.bool).tril()


def no_node_sees_its_parent(seen: Tensor, positions: Tensor, ways: list[Branches]) -> None:
    nodes = max(way.tokens.numel() for way in ways)
    seen[:, :, -nodes:, -nodes:] &= torch.eye(nodes, dtype=torch.bool)


def positions_count_on(seen: Tensor, positions: Tensor, ways: list[Branches]) -> None:
    nodes = max(way.tokens.numel() for way in ways)
    positions[:, -nodes:] = positions[:, -nodes - 1 : -nodes] + 1 + torch.arange(nodes)


def padding_is_seen(seen: Tensor, positions: Tensor, ways: list[Branches]) -> None:
    length = seen.shape[-1]
    seen |= torch.ones(length, length, dtype=torch.bool).tril() & (positions == 0)[:, None, None, :]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "change", [all_nodes_see_each_other, no_node_sees_its_parent, positions_count_on, padding_is_seen]
)
def test_a_broken_mask_or_position_would_be_noticed(attention, change):
    """Control: the numbers differ by far more than rounding."""
    model = tiny(attention)
    assert furthest(model, together(model, change)) > 1e-2


def test_a_line_of_branches_by_hand():
    """Prompt 7 8, padded by one; nodes 1, 1 2 and 3: who sees whom, and where each stands."""
    ways = [branches_of([[1, 2, 9], [3, 9]]), branches_of([[1]])]
    ids, positions, seen = grow([torch.tensor([7, 8]), torch.tensor([4, 5, 6])], ways, pad=0)
    assert ids.tolist() == [[0, 7, 8, 1, 2, 3], [4, 5, 6, 0, 0, 0]]
    assert positions.tolist() == [[0, 0, 1, 2, 3, 2], [0, 1, 2, 0, 0, 0]]
    assert seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 0, 0, 1],
    ]
    assert seen[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_log_probabilities_are_read_in_float32_by_hand():
    """Logits of two tokens in bfloat16, log 3 apart: 3/4 and 1/4 to the accuracy of bfloat16's log 3."""
    gap = torch.tensor(math.log(3.0)).bfloat16()
    logits = torch.zeros(1, 2, 2, dtype=torch.bfloat16)
    logits[0, 0, 0], logits[0, 1, 1] = gap, gap
    (found,) = branch_log_probs(logits, [branches_of([[0, 0], [1]])])
    assert found.dtype == torch.float32
    high, low = -math.log1p(math.exp(-float(gap))), -math.log1p(math.exp(float(gap)))
    assert found.flatten().tolist() == pytest.approx([high, low, low, 0.0], abs=1e-6)
