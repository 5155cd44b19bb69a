"""A tokenizer of transformers, by the name of its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from safe_sched.audit import audit
from safe_sched.errors import ModelError
from safe_sched.hooks import NamedTokenizer
from tests import support


def test_rows_of_tokens_are_read_by_a_tokenizer_that_is_named(tmp_path: Path) -> None:
    tokenizer = support.make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    texts = [
        {"prompt": str(row["prompt"]), "completion": str(row["completion"])} for row in support.text_rows(24, seed=3)
    ]

    def tokens(row: dict[str, str]) -> dict[str, list[int]]:
        prompt, answer = (tokenizer.encode(row[name], add_special_tokens=False) for name in ("prompt", "completion"))
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    there = NamedTokenizer(str(tmp_path))
    rows = [tokens(row) for row in texts]
    decoded = [
        [there.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False) for part in parts]
        for parts in ([tokenizer.encode(text, add_special_tokens=False) for text in row.values()] for row in texts)
    ]
    same = [{"prompt": prompt, "completion": answer} for prompt, answer in decoded]
    assert audit(rows, tokenizer=str(tmp_path)).table.equals(audit(same).table)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded as a tokenizer: .*Give the folder"):
        NamedTokenizer(str(tmp_path)).encode("a", add_special_tokens=False)
