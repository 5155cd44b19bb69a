"""Rows of tokens are audited as the texts that their tokenizer makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from safe_sched.audit import Findings, audit
from safe_sched.data import RowWriter
from safe_sched.errors import DataError, OptionError, PluginError, StateError
from safe_sched.hooks import NamedTokenizer, manager
from safe_sched.hooks import hookimpl as implements
from tests.core.audited import Counts, Long, some_rows

TEXTS = some_rows(200)


class Letters:
    """One token per letter: its number, shifted."""

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) + self.shift for letter in text]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not skip_special_tokens
        return "".join(chr(token - self.shift) for token in token_ids)


def tokens(row: dict[str, Any], tokenizer: Letters) -> dict[str, Any]:
    prompt, answer = (tokenizer.encode(row[name], add_special_tokens=False) for name in ("prompt", "completion"))
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def run(rows: Any, **options: Any) -> Findings:
    return audit(rows, detectors=[Counts(), Long()], **options)


ROWS = [tokens(row, Letters(3)) for row in TEXTS]


def test_tokens_are_scored_as_their_texts() -> None:
    assert run(ROWS, tokenizer=Letters(3)).table.equals(run(TEXTS).table)


def test_the_tokenizer_decides_on_the_texts() -> None:
    """Control: with another one the word is not found."""
    assert not run(ROWS, tokenizer=Letters(4)).table.equals(run(TEXTS).table)


def test_without_a_tokenizer_the_error_names_the_option() -> None:
    with pytest.raises(DataError, match=r"the rows are tokens.*tokenizer=\.\.\., on the command line --tokenizer"):
        run(ROWS)


def test_scores_by_another_tokenizer_are_not_gone_on_with(tmp_path: Path) -> None:
    run(ROWS, tokenizer=Letters(3), out=tmp_path)
    run(ROWS, tokenizer=Letters(3), out=tmp_path, resume=True)
    with pytest.raises(StateError, match="was made from other rows: shard 0 differs"):
        run(ROWS, tokenizer=Letters(4), out=tmp_path, resume=True)


class Plugin:
    """Loads tokenizers that are named after their shift, and counts how often."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    @implements
    def safe_sched_tokenizer(self, name: str) -> Any:
        self.asked.append(name)
        if not name.isdecimal():
            raise OptionError(f"no tokenizer {name}")
        return Letters(int(name))


@pytest.fixture
def plugin() -> Any:
    found = Plugin()
    manager().register(found)
    yield found
    manager().unregister(found)


def test_a_name_is_asked_of_the_plugins_once_and_only_for_rows_of_tokens(plugin: Plugin) -> None:
    assert run(TEXTS, tokenizer="nothing").summary.scored == 200
    assert not plugin.asked
    assert run(ROWS, tokenizer="3").table.equals(run(TEXTS).table)
    assert plugin.asked == ["3"]
    with pytest.raises(OptionError, match="no tokenizer nothing"):
        run(ROWS, tokenizer="nothing")


def test_without_a_plugin_that_knows_it_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hooks:
        class hook:
            @staticmethod
            def safe_sched_tokenizer(name: str) -> None:
                return None

    monkeypatch.setattr("safe_sched.hooks.manager", lambda: Hooks)
    with pytest.raises(PluginError, match=r"pip install 'safe-sched\[trl\]'"):
        NamedTokenizer("x").encode("a", add_special_tokens=False)


def test_tokens_of_a_file_and_in_other_processes(tmp_path: Path) -> None:
    """The tokenizer stays here, whatever it holds: what scores elsewhere gets texts."""
    from safe_sched.audit.engines.shard import Shard, to_send
    from safe_sched.audit.inputs import Inputs, Rows

    with RowWriter(tmp_path / "rows.jsonl") as out:
        for row in ROWS:
            out.write(row)
    found = run(tmp_path / "rows.jsonl", tokenizer=Letters(3))
    assert found.table.drop_columns(["where"]).equals(run(TEXTS).table.drop_columns(["where"]))
    (entries,) = Inputs([Rows(ROWS)], tokenizer=Letters(3)).shards(1000)
    sent = to_send(Shard(0, entries, None))  # type: ignore[arg-type]
    assert all(one.example.tokenizer is None for one in sent.entries)  # type: ignore[union-attr]
    assert [one.prompt for one in sent.entries] == [row["prompt"] for row in TEXTS]  # type: ignore[union-attr]
