"""Who a row is: a 64-bit key of its content, computed on the device from the batch itself.

A row is a run of real tokens together with which of them are labels. Padding, the side it is on, the place
of the row in the batch, the collator that built the batch and what else is packed beside the row do not
change its key, so a key found in a batch names the same row at every epoch, after a resume, and in a file.

With token ``x_p`` at position ``p`` of the row (0-based, real tokens only) and ``M`` the label positions::

    content = sum_p  mix(x_p * A + p * B)            (mod 2**64)
    labels  = sum_{p in M, p > 0}  mix(p * C)         (mod 2**64)
    key     = mix(content + mix(labels))

``mix`` is the finaliser of splitmix64 (Steele, Lea and Flood, 2014), a bijection of 64-bit words. Position 0
never counts as a label: nothing predicts the first token of a row, and collators disagree on its label.
The keys of N different rows are all different with probability about ``1 - N**2 / 2**65`` (N = 10**8: 0.9997).
The hash is public and not secret: it guards against mistakes, not against somebody who builds collisions.

Cost: some twenty elementwise passes over (batch, sequence) integers; no pass over logits or hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safe_sched.errors import DataError

IGNORE_INDEX = -100
"""The label that marks a token as not trained on, as in PyTorch's cross-entropy."""


def _signed(word: int) -> int:
    """A 64-bit word as the signed integer that torch stores it in."""
    return word - (1 << 64) if word >= 1 << 63 else word


_TOKEN = _signed(0x9E3779B97F4A7C15)
_PLACE = _signed(0xD1B54A32D192ED03)
_LABEL = _signed(0x8CB92BA72F3D8DD7)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch's >> copies the sign bit: mask it away to shift in zeros
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix64(x: Tensor) -> Tensor:
    """The finaliser of splitmix64: a bijection of 64-bit words that spreads every input bit.

    Args:
        x: int64 tensor of any shape, read as unsigned words.

    Example:
        >>> import torch
        >>> mix64(torch.tensor([0, 1])).tolist()
        [0, 6238072747940578789]
    """
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


@dataclass(frozen=True)
class Layout:
    """Where the rows of a micro-batch lie.

    Attributes:
        row: int64 (batch, sequence), the row that each token belongs to, -1 on padding. Rows are numbered in
            reading order.
        position: int64 (batch, sequence), the token's place among the real tokens of its row.
        rows: How many rows there are. With padding, one per line of the batch; packed, one per sequence.
        packed: Whether a line of the batch may hold several rows.
    """

    row: Tensor
    position: Tensor
    rows: int
    packed: bool


def layout_of(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> Layout:
    """Find the rows in a micro-batch: padded on either side, packed, or padding-free.

    Args:
        input_ids: int64 (batch, sequence).
        attention_mask: (batch, sequence), positive on real tokens. Different positive numbers on one line mark
            different packed rows.
        position_ids: int64 (batch, sequence). A row starts wherever they do not go on counting.
        cu_seq_lens: int (rows + 1,), starts of the rows in a padding-free batch of one line, used where
            there are no ``position_ids``.

    Raises:
        DataError: The batch is not (batch, sequence), or a mask has a form that tells nothing about rows.

    Example:
        >>> import torch
        >>> tokens = torch.tensor([[5, 6, 7, 8, 9]])
        >>> layout_of(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1]])).row.tolist()
        [[0, 0, 0, 1, 1]]
    """
    if input_ids.dim() != 2:
        raise DataError(f"a batch has input_ids of shape {tuple(input_ids.shape)}; allowed: (batch, sequence)")
    batch, length = input_ids.shape
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise DataError(
            f"a batch has an attention_mask of shape {tuple(attention_mask.shape)} beside input_ids of shape "
            f"{tuple(input_ids.shape)}: from this the rows cannot be told apart. Allowed: (batch, sequence); for "
            "packed rows give position_ids that start again at every row."
        )
    if position_ids is None and cu_seq_lens is not None:
        if batch != 1:
            raise DataError(
                f"a batch of {batch} lines has cu_seq_lens, which tell rows apart on one line only. Flatten the batch "
                "to one line, or give position_ids that start again at every row."
            )
        starts = torch.zeros(length, dtype=torch.long, device=input_ids.device)
        # the last entry is the end of the last row: what lies behind it is padding, which is no part of that row
        begin = cu_seq_lens.to(input_ids.device, torch.long)
        starts[begin[begin < length]] = 1
        index = torch.arange(length, device=input_ids.device)
        position_ids = (index - (starts * index).cummax(0).values)[None]
    if position_ids is None and attention_mask is not None and bool((attention_mask > 1).any()):
        # the mask alone tells packed rows apart
        position_ids = torch.arange(length, device=input_ids.device)[None]
    if position_ids is not None and position_ids.shape != input_ids.shape:
        if position_ids.shape[-1] != length or position_ids.dim() != 2 or position_ids.shape[0] != 1:
            raise DataError(
                f"a batch has position_ids of shape {tuple(position_ids.shape)} beside input_ids of shape "
                f"{tuple(input_ids.shape)}; allowed: (batch, sequence)"
            )
        position_ids = position_ids.expand(batch, length)

    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask > 0
    if position_ids is None:
        line = torch.arange(batch, device=input_ids.device)[:, None].expand(batch, length)
        return Layout(row=line.masked_fill(~real, -1), position=real.cumsum(1) - 1, rows=batch, packed=False)

    # packed: a row starts at the first real token of a line, where positions jump, or where the mask's id changes
    first = torch.ones_like(real)
    first[:, 1:] = ~real[:, :-1] | (position_ids[:, 1:] != position_ids[:, :-1] + 1)
    if attention_mask is not None:
        first[:, 1:] |= attention_mask[:, 1:] != attention_mask[:, :-1]
    first &= real
    flat_first, flat_real = first.flatten(), real.flatten()
    row = flat_first.cumsum(0) - 1
    place = flat_real.cumsum(0)
    begins = flat_first.nonzero().flatten()  # one synchronisation: the number of rows is data
    rows = int(begins.numel())
    base = place[begins] if rows else place[:1]
    position = place - base[row.clamp(min=0)]
    return Layout(
        row=row.masked_fill(~flat_real, -1).view(batch, length),
        position=position.view(batch, length),
        rows=rows,
        packed=True,
    )


def sum_by_row(values: Tensor, layout: Layout) -> Tensor:
    """Add up a (batch, sequence) tensor over each row; padding adds nothing.

    Integers wrap modulo 2**64; floating-point values are added in double precision.

    Args:
        values: (batch, sequence), any numeric dtype.
        layout: Where the rows lie.

    Returns:
        (rows,) of int64 or float64.
    """
    values = values.to(torch.float64 if values.is_floating_point() else torch.long)
    values = values.masked_fill(layout.row < 0, 0)
    if not layout.packed:
        return values.sum(1)
    total = values.new_zeros(layout.rows)
    return total.index_add_(0, layout.row.clamp(min=0).flatten(), values.flatten())


def label_positions(labels: Tensor, layout: Layout) -> Tensor:
    """Which tokens count as labels of their row: not ignored, not padding, not the first of the row.

    Returns:
        bool (batch, sequence).
    """
    return (labels != IGNORE_INDEX) & (layout.row >= 0) & (layout.position > 0)


def keys_of(input_ids: Tensor, labels: Tensor, layout: Layout) -> Tensor:
    """The 64-bit key of every row in a micro-batch.

    Args:
        input_ids: int64 (batch, sequence).
        labels: int64 (batch, sequence), -100 where a token is not trained on.
        layout: Where the rows lie, from `layout_of`.

    Returns:
        int64 (rows,), to be read as unsigned 64-bit words.

    Example:
        Padding on either side names the same row:

        >>> import torch
        >>> left, right = torch.tensor([[0, 0, 7, 8, 9]]), torch.tensor([[7, 8, 9, 0, 0]])
        >>> keys = []
        >>> for ids in (left, right):
        ...     where = layout_of(ids, attention_mask=(ids > 0).long())
        ...     keys.append(keys_of(ids, ids, where).item())
        >>> keys[0] == keys[1]
        True
    """
    position = layout.position
    tokens = mix64(input_ids.long() * _TOKEN + position * _PLACE)
    marks = mix64(position * _LABEL) * label_positions(labels, layout)
    return mix64(sum_by_row(tokens, layout) + mix64(sum_by_row(marks, layout)))


def keys_of_flat(tokens: Tensor, labels: Tensor | None, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and label counts of many rows stored end to end, as a column of a table stores them.

    The same keys as `keys_of`, without building a batch: one pass over the tokens.

    Args:
        tokens: int64 (total,), the tokens of all rows, one row after another.
        labels: int64 (total,), or None where every token is a label.
        lengths: int64 (rows,), tokens in each row; they add up to ``total``.

    Returns:
        int64 (rows,) keys and int64 (rows,) label tokens.

    Example:
        >>> import torch
        >>> keys, counts = keys_of_flat(torch.tensor([7, 8, 9, 7]), None, torch.tensor([3, 1]))
        >>> counts.tolist()
        [2, 0]
    """
    ends = lengths.cumsum(0)
    starts = ends - lengths
    total = tokens.numel()
    position = torch.arange(total) - torch.repeat_interleave(starts, lengths, output_size=total)
    counted = position > 0
    if labels is not None:
        counted &= labels != IGNORE_INDEX

    def add_up(values: Tensor) -> Tensor:
        # a difference of running sums is exact in wrapping integers, and needs no scatter
        running = torch.zeros(total + 1, dtype=torch.long)
        torch.cumsum(values, 0, out=running[1:])
        return running[ends] - running[starts]

    content = add_up(mix64(tokens.long() * _TOKEN + position * _PLACE))
    marks = add_up(mix64(position * _LABEL) * counted)
    return mix64(content + mix64(marks)), add_up(counted.long())


def batch_fields(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Layout]:
    """Tokens, labels and rows of a micro-batch as a trainer's collator made it.

    Raises:
        DataError: There are no tokens or no labels to go by.
    """
    input_ids, labels = inputs.get("input_ids"), inputs.get("labels")
    if not isinstance(input_ids, Tensor) or not isinstance(labels, Tensor) or labels.shape != input_ids.shape:
        raise DataError(
            f"a training batch has the fields {sorted(inputs)}; needed: input_ids and labels of one shape. Use a "
            "collator that makes labels, for example DataCollatorForLanguageModeling(tokenizer, mlm=False)."
        )
    layout = layout_of(
        input_ids,
        attention_mask=inputs.get("attention_mask"),
        position_ids=inputs.get("position_ids"),
        cu_seq_lens=inputs.get("cu_seq_lens_q"),
    )
    return input_ids, labels, layout
