"""A row's key is a function of its tokens and its label places, and of nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from safe_sched.errors import DataError
from safe_sched.rows import keys as identity
from safe_sched.rows.keys import keys_of, keys_of_flat, label_positions, layout_of, mix64, sum_by_row
from tests.core.batches import BOUNDARIES, Row, any_row, any_rows, laws, pack, pad, row

WORD = 2**64


def slow_mix(x: int) -> int:
    """splitmix64's finaliser in plain integers, from the paper."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % WORD
    return x ^ (x >> 31)


def slow_key(r: Row) -> int:
    """The three lines of the module's docstring, in plain integers modulo 2**64."""
    a, b, c = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7
    content = sum(slow_mix((x * a + p * b) % WORD) for p, x in enumerate(r.tokens))
    labels = sum(slow_mix(p * c % WORD) for p, on in enumerate(r.labelled) if on and p > 0)
    return slow_mix((content + slow_mix(labels % WORD)) % WORD)


def key(r: Row) -> int:
    return pad([r]).keys[0] % WORD


def flat_keys(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor([token for r in rows for token in r.tokens])
    labels = torch.tensor([label for r in rows for label in r.labels])
    return keys_of_flat(tokens, labels, torch.tensor([len(r.tokens) for r in rows]))


# the hash itself ------------------------------------------------------------------------------------------------------


def test_mix64_gives_the_published_numbers_of_splitmix64():
    """splitmix64 is mix(seed + i * 0x9E37...15) for i = 1, 2, ...; the numbers of seed 1234567 are published widely."""
    steps = torch.arange(1, 6) * (0x9E3779B97F4A7C15 - WORD) + 1234567
    assert [x % WORD for x in mix64(steps).tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@laws
@given(st.lists(st.integers(0, WORD - 1), min_size=1, max_size=20))
def test_mix64_is_the_same_in_plain_integers(words):
    signed = torch.tensor([w - WORD if w >= WORD // 2 else w for w in words])
    assert [x % WORD for x in mix64(signed).tolist()] == [slow_mix(w) for w in words]


def test_an_arithmetic_shift_would_be_noticed(monkeypatch):
    """Control: torch's own >> copies the sign bit, which is wrong for every word with its top bit set."""
    monkeypatch.setattr(identity, "_shift_right", lambda x, bits: x >> bits)
    assert mix64(torch.tensor([-1])).item() % WORD != slow_mix(WORD - 1)


@laws
@given(any_rows())
def test_keys_are_those_of_a_slow_loop_in_plain_integers(rows):
    expected = [slow_key(r) for r in rows]
    assert [k % WORD for k in pad(rows).keys] == expected
    assert [k % WORD for k in pack(rows).keys] == expected


# what a key does not depend on ----------------------------------------------------------------------------------------


@laws
@given(any_rows(), st.sampled_from(["left", "right"]), st.integers(0, 5))
def test_padding_side_and_amount_do_not_change_a_key(rows, side, extra):
    assert pad(rows, side, extra).keys == pad(rows).keys


def test_a_key_of_padded_positions_would_be_noticed():
    """Control: numbering tokens from the start of the line instead of the start of the row breaks the law."""
    micro = pad([row(7, 8, 9)], "left", extra=2)
    wrong = identity.Layout(micro.layout.row, torch.arange(5)[None], 1, False)
    assert keys_of(micro.ids, micro.labels, wrong).item() != pad([row(7, 8, 9)]).keys[0]


@laws
@given(any_rows(), st.integers(0, 200_000), st.sampled_from(["left", "right"]))
def test_ids_of_padding_tokens_do_not_change_a_key(rows, filler, side):
    assert pad(rows, side, extra=2, filler=filler).keys == pad(rows).keys


@laws
@given(any_rows(), st.randoms(use_true_random=False))
def test_place_in_the_batch_does_not_change_a_key(rows, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    moved = [rows[i] for i in order]
    expected = [pad(rows).keys[i] for i in order]
    assert pad(moved).keys == expected
    assert pack(moved).keys == expected


@laws
@given(any_row(), any_rows(), any_rows(), st.sampled_from(BOUNDARIES))
def test_what_is_packed_beside_a_row_does_not_change_its_key(r, before, after, boundaries):
    assert pack([*before, r, *after], boundaries).keys[len(before)] == pad([r]).keys[0]


@laws
@given(any_rows())
def test_position_ids_and_sequence_lengths_and_mask_ids_name_the_same_rows(rows):
    keys = [pack(rows, boundaries).keys for boundaries in BOUNDARIES]
    assert keys[0] == keys[1] == keys[2] == pad(rows).keys


@laws
@given(any_rows())
def test_forgotten_boundaries_give_another_key(rows):
    """Control: two rows or more taken for one row have one key, which is none of theirs."""
    assume(len(rows) > 1)
    ids, labels, _ = pack(rows)
    (found,) = keys_of(ids, labels, layout_of(ids)).tolist()
    assert found not in pad(rows).keys


def test_mask_ids_alone_tell_packed_rows_apart():
    """`layout_of` promises: different positive numbers on one line mark different packed rows."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 0], [5, 6, 7, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 1, 2, 2, 2]])
    layout = layout_of(ids, attention_mask=mask)
    assert layout.row.tolist() == [[0, 0, 0, 1, 1, -1], [2, 2, 2, 3, 3, 3]]
    assert keys_of(ids, ids, layout).tolist() == pad([row(5, 6, 7), row(8, 9), row(5, 6, 7), row(5, 6, 7)]).keys


def test_packed_lines_with_padding_hold_the_same_rows():
    """Two lines, two rows each, padding at the end of one and at the start of the other."""
    rows = [row(5, 6, 7), row(8, 9), row(1, 2), row(3, 4, 5)]
    ids = torch.tensor([[5, 6, 7, 8, 9, 0], [0, 1, 2, 3, 4, 5]])
    labels = torch.tensor([[-100, 6, 7, -100, 9, -100], [-100, -100, 2, -100, 4, 5]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [1, 0, 1, 0, 1, 2]])
    layout = layout_of(ids, attention_mask=(ids > 0).long(), position_ids=positions)
    assert layout.row.tolist() == [[0, 0, 0, 1, 1, -1], [-1, 2, 2, 3, 3, 3]]
    assert keys_of(ids, labels, layout).tolist() == pad(rows).keys


def test_rows_of_single_tokens_are_told_apart():
    ids = torch.tensor([[4, 4, 5]])
    layout = layout_of(ids, position_ids=torch.zeros_like(ids))
    assert layout.row.tolist() == [[0, 1, 2]]
    assert keys_of(ids, ids, layout).tolist() == pad([row(4), row(4), row(5)]).keys


def test_positions_may_begin_anywhere():
    """Some models count positions from 2; only a break in the counting begins a row."""
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    layout = layout_of(ids, position_ids=torch.tensor([[2, 3, 4, 2, 3]]))
    assert layout.position.tolist() == [[0, 1, 2, 0, 1]]


def test_one_line_of_positions_serves_every_line_of_the_batch():
    ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    layout = layout_of(ids, position_ids=torch.tensor([[0, 1, 0, 1]]))
    assert layout.row.tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]


@pytest.mark.parametrize("trailing", [1, 3])
def test_trailing_padding_of_a_padding_free_batch_leaves_its_rows_alone(trailing):
    """Padded to a multiple, positions of the padding are 0 and it has no labels: runs that teach nothing."""
    rows = [row(5, 6, 7), row(8, 9)]
    ids, labels, _ = pack(rows)
    end = torch.zeros(1, trailing, dtype=torch.long)
    ids, labels = torch.cat([ids, end], 1), torch.cat([labels, end - 100], 1)
    layout = layout_of(ids, position_ids=torch.cat([torch.tensor([[0, 1, 2, 0, 1]]), end], 1))
    assert keys_of(ids, labels, layout)[:2].tolist() == pad(rows).keys
    assert sum_by_row(label_positions(labels, layout), layout).tolist() == [2, 1] + [0] * trailing


def test_tokens_after_the_last_sequence_length_are_not_part_of_the_last_row():
    """Lengths 3 and 2 in a line of 7: the two tokens behind belong to nobody's row."""
    rows = [row(5, 6, 7), row(8, 9)]
    ids = torch.tensor([[5, 6, 7, 8, 9, 0, 0]])
    labels = torch.tensor([[-100, 6, 7, -100, 9, -100, -100]])
    layout = layout_of(ids, cu_seq_lens=torch.tensor([0, 3, 5], dtype=torch.int32))
    assert keys_of(ids, labels, layout)[:2].tolist() == pad(rows).keys


def test_empty_sequences_among_the_lengths_are_no_rows():
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    assert layout_of(ids, cu_seq_lens=torch.tensor([0, 3, 3, 5, 5])).row.tolist() == [[0, 0, 0, 1, 1]]


@laws
@given(any_rows())
def test_integers_of_32_bits_give_the_same_keys(rows):
    ids, labels, _ = pad(rows)
    mask = torch.tensor([[1] * len(r.tokens) + [0] * (ids.shape[1] - len(r.tokens)) for r in rows])
    narrow = layout_of(ids.int(), attention_mask=mask.int())
    assert keys_of(ids.int(), labels.int(), narrow).tolist() == pad(rows).keys
    ids, labels, _ = pack(rows)
    positions = torch.tensor([[p for r in rows for p in range(len(r.tokens))]])
    narrow = layout_of(ids.int(), position_ids=positions.int())
    assert keys_of(ids.int(), labels.int(), narrow).tolist() == pad(rows).keys


def test_a_mask_of_booleans_or_floats_gives_the_same_keys():
    ids = torch.tensor([[5, 6, 7, 0], [0, 0, 8, 9]])
    mask = ids > 0
    keys = [keys_of(ids, ids, layout_of(ids, attention_mask=m)).tolist() for m in (mask, mask.long(), mask.float())]
    assert keys[0] == keys[1] == keys[2]


# keys of a table ------------------------------------------------------------------------------------------------------


@laws
@given(any_rows(most=8))
def test_keys_of_flat_are_keys_of(rows):
    keys, counts = flat_keys(rows)
    assert keys.tolist() == pad(rows).keys
    assert counts.tolist() == [r.label_tokens for r in rows]


@laws
@given(any_rows(most=8))
def test_without_labels_every_token_of_a_table_is_a_label(rows):
    tokens = torch.tensor([token for r in rows for token in r.tokens])
    keys, counts = keys_of_flat(tokens, None, torch.tensor([len(r.tokens) for r in rows]))
    full = [Row(r.tokens, (True,) * len(r.tokens)) for r in rows]
    assert keys.tolist() == pad(full).keys
    assert counts.tolist() == [len(r.tokens) - 1 for r in rows]


# what a key does depend on --------------------------------------------------------------------------------------------


@laws
@given(any_row(), st.data())
def test_one_other_token_changes_the_key(r, data):
    place = data.draw(st.integers(0, len(r.tokens) - 1))
    other = data.draw(st.integers(0, 200_000).filter(lambda t: t != r.tokens[place]))
    assert key(Row((*r.tokens[:place], other, *r.tokens[place + 1 :]), r.labelled)) != key(r)


@laws
@given(any_row(shortest=2), st.data())
def test_another_order_of_the_tokens_changes_the_key(r, data):
    i, j = sorted(data.draw(st.sets(st.integers(0, len(r.tokens) - 1), min_size=2, max_size=2)))
    assume(r.tokens[i] != r.tokens[j])
    tokens = list(r.tokens)
    tokens[i], tokens[j] = tokens[j], tokens[i]
    assert key(Row(tuple(tokens), r.labelled)) != key(r)


def test_without_mixing_the_order_would_not_matter(monkeypatch):
    """Control: a plain sum of x * A + p * B is the same for every order."""
    monkeypatch.setattr(identity, "mix64", lambda x: x)
    assert key(row(7, 8, 9)) == key(row(9, 7, 8))


@laws
@given(any_row(), st.sampled_from([0, 1, 151_643]), st.booleans())
def test_another_length_changes_the_key(r, token, labelled):
    """Token 0 as well: what pads one tokenizer is a real token of another."""
    assert key(Row((*r.tokens, token), (*r.labelled, labelled))) != key(r)
    assert key(Row((token, *r.tokens), (labelled, *r.labelled))) != key(r)


@laws
@given(any_row(shortest=2), st.data())
def test_another_label_place_changes_the_key(r, data):
    place = data.draw(st.integers(1, len(r.tokens) - 1))
    flipped = [on != (p == place) for p, on in enumerate(r.labelled)]
    assert key(Row(r.tokens, tuple(flipped))) != key(r)


@laws
@given(any_row())
def test_the_label_of_the_first_token_does_not_change_the_key(r):
    """Nothing predicts it, and collators for packed rows blank it."""
    assert key(Row(r.tokens, (not r.labelled[0], *r.labelled[1:]))) == key(r)


def test_labels_that_did_not_enter_the_key_would_be_noticed(monkeypatch):
    """Control: with no label counted, the prompt's length is lost."""
    monkeypatch.setattr(identity, "label_positions", lambda labels, layout: torch.zeros_like(labels, dtype=torch.bool))
    assert key(row(7, 8, 9, prompt=1)) == key(row(7, 8, 9, prompt=2))


# collisions -----------------------------------------------------------------------------------------------------------


def short_rows(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Random rows of 3 to 8 tokens out of 50; and how many of them differ, by writing each as one number."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (count,), generator=generator)
    real = torch.arange(8) < lengths[:, None]
    tokens = torch.randint(0, 50, (count, 8), generator=generator)
    labelled = torch.rand(count, 8, generator=generator) < 0.5
    digits = torch.where(real, tokens + 1, 0) * 2 + (real & labelled & (torch.arange(8) > 0))
    different = (digits * 102 ** torch.arange(8)).sum(1).unique().numel()
    labels = torch.where(labelled, tokens, -100)
    return tokens[real], labels[real], lengths, different


def test_no_two_of_200000_short_rows_share_a_key():
    """The chance of one collision is 200000**2 / 2**65 = 1e-9."""
    tokens, labels, lengths, different = short_rows(200_000)
    keys, _ = keys_of_flat(tokens, labels, lengths)
    assert different > 190_000
    assert keys.unique().numel() == different


def test_a_weak_hash_would_show_collisions(monkeypatch):
    """Control: without the mixing, rows with the same sum collide by the thousand."""
    monkeypatch.setattr(identity, "mix64", lambda x: x)
    tokens, labels, lengths, different = short_rows(20_000)
    assert keys_of_flat(tokens, labels, lengths)[0].unique().numel() < different / 2


# errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "fields", "seen"),
    [
        ((5,), {}, r"\(5,\)"),
        ((1, 2, 5), {}, r"\(1, 2, 5\)"),
        ((2, 5), {"attention_mask": (2, 4)}, r"\(2, 4\)"),
        ((2, 5), {"attention_mask": (2, 1, 5, 5)}, r"\(2, 1, 5, 5\)"),
        ((2, 5), {"position_ids": (2, 4)}, r"\(2, 4\)"),
        ((2, 5), {"position_ids": (5,)}, r"\(5,\)"),
        ((2, 5), {"position_ids": (3, 2, 5)}, r"\(3, 2, 5\)"),
        ((2, 5), {"position_ids": (3, 5)}, r"\(3, 5\)"),
    ],
)
def test_a_wrong_shape_is_a_data_error_that_shows_it(ids, fields, seen):
    with pytest.raises(DataError, match=seen) as caught:
        layout_of(torch.ones(ids).long(), **{name: torch.ones(shape).long() for name, shape in fields.items()})
    assert "(batch, sequence)" in str(caught.value)


def test_sequence_lengths_beside_several_lines_are_a_data_error():
    """They count along one line; taken for padded rows, two lines of packed rows would be two rows."""
    with pytest.raises(DataError, match="cu_seq_lens"):
        layout_of(torch.ones(2, 5).long(), cu_seq_lens=torch.tensor([0, 3, 5]))


def test_sums_by_row_are_those_of_a_loop():
    """Values 1, 2, 4, ... in rows (5, 6, 7), (8, 9): 1 + 2 + 4 and 8 + 16, whatever lies in the padding."""
    rows = [row(5, 6, 7), row(8, 9)]
    packed = pack(rows).layout
    assert sum_by_row(2 ** torch.arange(5)[None], packed).tolist() == [7, 24]
    padded = pad(rows, extra=1).layout
    values = torch.tensor([[1.0, 2.0, 4.0, torch.nan], [8.0, 16.0, torch.inf, torch.nan]])
    assert sum_by_row(values, padded).tolist() == [7.0, 24.0]
